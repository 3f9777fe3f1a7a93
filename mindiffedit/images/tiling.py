"""Pictures and latents in overlapping tiles, cut and blended as diffusers' ``AutoencoderKL`` does. NumPy only.

The model sees one tile at a time, so what it needs grows with the tile, not with the picture. Only the model is
compiled; cutting and blending are done on the host, in float32. Each shape of tile is a graph of its own. Tiles at the
right and lower edge end with the picture, and the last but one may too: along one side there are up to three lengths
(800 pixels in tiles of 512: 512, 416 and 32), so up to nine shapes. They cannot be made alike without changing the
result: the norms and the attention of the model see all of a tile, and its convolutions see where it ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mindiffedit import options
from mindiffedit.errors import InputError

__all__ = ["Tiles", "in_tiles", "tiles_of"]


@dataclass(frozen=True)
class Tiles:
    """How one half of a VAE is given its input. The encoder's input is pixels and its output latents, or the reverse.

    Attributes:
        size: side of a tile, in the input.
        stride: from one tile to the next, in the input.
        blend: over how much a tile's result fades from its neighbour's, in the output.
        keep: what is kept of the sides of a tile's result, in the output.
    """

    size: int
    stride: int
    blend: int
    keep: int

    def cut(self, shape: tuple[int, ...]) -> bool:
        """Whether an input (..., H, W) is cut at all: only what is larger than a tile is."""
        return max(shape[-2:]) > self.size


def tiles_of(vae) -> tuple[Tiles, Tiles]:
    """The encoder's tiles and the decoder's.

    Source: ``_tiled_encode`` and ``tiled_decode`` of diffusers' AutoencoderKL.

    Args:
        vae: has ``tile_sample_min_size`` (pixels), ``tile_latent_min_size`` (latents), ``tile_overlap_factor`` (the
            shared part of a tile's side, from 0 up to, not including, 1), and ``config.block_out_channels``, of which
            each but the first halves the sides.

    Raises:
        ValueError: sizes whose seams do not meet. The reference returns pictures of another size then.
        TypeError: an overlap that is not a number.
    """
    pixels = options.check_positive_int("vae.tile_sample_min_size", vae.tile_sample_min_size)
    latents = options.check_positive_int("vae.tile_latent_min_size", vae.tile_latent_min_size)
    overlap = options.check_overlap(vae.tile_overlap_factor, "vae.tile_overlap_factor")
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    encoder, decoder = _tiles(pixels, latents, overlap), _tiles(latents, pixels, overlap)
    fit = encoder.stride == encoder.keep * factor and decoder.stride * factor == decoder.keep
    if not fit or not decoder.stride:  # E11
        raise InputError(
            "The VAE's tiles do not fit together: `vae.tile_sample_min_size` is {pixels} pixels, "
            "`vae.tile_latent_min_size` {latents} latents of {factor} pixels, `vae.tile_overlap_factor` {overlap:g}. "
            "Set the first to {factor} times the second, and an overlap that is a whole number of latents.",
            pixels=pixels,
            latents=latents,
            factor=factor,
            overlap=overlap,
        )
    return encoder, decoder


def in_tiles(model: Callable[[np.ndarray], np.ndarray], array: np.ndarray, tiles: Tiles) -> np.ndarray:
    """The model's result (B, C', H', W') float32 for an input (B, C, H, W), computed tile by tile.

    Neighbours overlap. Each result fades, over ``tiles.blend`` rows, from the one above, then over as many columns
    from the one on its left, both of which have been blended before. What is not covered by the next tile is kept.

    Args:
        model: from an input (B, C, h, w), h and w at most ``tiles.size``, to the result, float32.
    """
    height, width = array.shape[-2:]
    above: list[np.ndarray] = []
    strips = []
    for top in range(0, height, tiles.stride):
        row: list[np.ndarray] = []
        for left in range(0, width, tiles.stride):
            part = array[..., top : top + tiles.size, left : left + tiles.size]
            result = np.array(model(part), np.float32)  # a copy: it is written into
            if above:
                _fade(above[len(row)], result, tiles.blend, axis=2)
            if row:
                _fade(row[-1], result, tiles.blend, axis=3)
            row.append(result)
        strips.append(np.concatenate([result[..., : tiles.keep, : tiles.keep] for result in row], axis=3))
        above = row
    return np.concatenate(strips, axis=2)


def _tiles(size: int, result: int, overlap: float) -> Tiles:
    """Tiles of one half, whose results have the side ``result``. Rounded down where the reference does."""
    blend = int(result * overlap)
    return Tiles(size=size, stride=int(size * (1 - overlap)), blend=blend, keep=result - blend)


def _fade(before: np.ndarray, result: np.ndarray, extent: int, axis: int) -> None:
    """The first ``extent`` rows (axis 2) or columns (3) of ``result`` fade in from the last of ``before``, in place.

    Source: ``blend_v`` and ``blend_h``: ``before * (1 - i / extent) + result * (i / extent)``, i from 0.
    """
    extent = min(before.shape[axis], result.shape[axis], extent)
    share = np.arange(extent) / max(extent, 1)
    old = np.moveaxis(before, axis, -1)[..., before.shape[axis] - extent :]
    new = np.moveaxis(result, axis, -1)[..., :extent]
    new[...] = old * (1 - share).astype(np.float32) + new * share.astype(np.float32)
