"""Masks: from a map to a mask, masks drawn by users, combinations of the two, and results pasted back through them.

A *map* is the averaged difference of two noise predictions, (B, h, w) float32, at least 0, on the latents' grid. A
*mask* is on the same grid, from 0 (keep) to 1 (change). Nothing here knows a model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image

from mindiffedit.arrays import is_tensor, to_numpy
from mindiffedit.errors import InputError, InputTypeError, Message, named
from mindiffedit.images.edges import follow_edges
from mindiffedit.images.pictures import contact_sheet, grey_levels, mask_values, to_srgb
from mindiffedit.options import (
    NumericalError,
    check_at_least_zero,
    check_count,
    check_finite,
    check_output_type,
    check_positive_int,
    check_ratio,
    check_strength,
    check_switch,
    check_threshold,
)

COMBINATIONS = ("replace", "union", "subtract", "intersection")
MAX_SWEEP_VALUES = 12
# Far beyond any grid of latents; a kernel or a footprint of this size is still computed at once.
_MOST_LATENTS = 1000
_LARGEST_SIGMA = 100.0
_LARGEST_WINDOW = 100
_LARGEST_RADIUS = 10000.0

NO_DIFFERENCE = (
    "Source and target prompt give the same noise prediction everywhere, so there is no difference to"
    " make a mask of; say in the target prompt what shall change."
)

__all__ = [
    "COMBINATIONS",
    "MAX_SWEEP_VALUES",
    "NO_DIFFERENCE",
    "MaskOptions",
    "checked_options",
    "clamp_of",
    "combine",
    "contact_sheet",
    "enlarged",
    "feathered",
    "mask_coverage",
    "mask_of",
    "overlay",
    "paste_back",
    "sweep_values",
    "user_mask",
]


# --- from a map to a mask --------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskOptions:
    """How a map becomes a mask; in the order in which `mask_of` does it. The defaults are the reference's.

    Checked on construction: a wrong type is a TypeError, a wrong value a ValueError.

    Args:
        smoothing: sigma in latents, 0 to 100, of a Gaussian over the clamped map; 0: none. The grid goes on at its
            edges with the values there.
        threshold: in (0, 1); a latent belongs to the mask where the map is above this share of the clamp. The
            paper's and the reference's is 0.5.
        edges: radius in latents, 0 to 100, of windows in which the map follows the picture's edges, see
            `edges.follow_edges`; 0: it does not. Needs `guides` in `mask_of`; the pipeline gives its picture.
        edge_contrast: above 0; colours, in [0, 1], that vary by less than this in a window count as one.
        fill_holes: holes that the mask encloses become part of it. What reaches the edge of the grid is no hole.
        smallest_region: connected regions of fewer latents are dropped; latents that touch at a corner are connected.
            0 or 1: all are kept.
        erosion: latents taken off the mask's border, then
        dilation: latents added around it. Both footprints are discs: a latent within this distance, from middle to
            middle. The edge of the grid is no border of the mask.
        soft: continuous values in place of 0 and 1; `mask_of` has the formula.
    """

    threshold: float = 0.5
    smoothing: float = 0.0
    erosion: int = 0
    dilation: int = 0
    fill_holes: bool = False
    smallest_region: int = 0
    soft: bool = False
    edges: int = 0
    edge_contrast: float = 0.06

    def __post_init__(self):
        checked = {
            "threshold": check_threshold(self.threshold, "threshold"),
            "smoothing": check_at_least_zero(self.smoothing, "smoothing", _LARGEST_SIGMA),
            "erosion": check_count(self.erosion, "erosion", _MOST_LATENTS),
            "dilation": check_count(self.dilation, "dilation", _MOST_LATENTS),
            "fill_holes": check_switch(self.fill_holes, "fill_holes"),
            "smallest_region": check_count(self.smallest_region, "smallest_region", _MOST_LATENTS**2),
            "soft": check_switch(self.soft, "soft"),
            "edges": check_count(self.edges, "edges", _LARGEST_WINDOW),
            "edge_contrast": check_ratio(self.edge_contrast, "edge_contrast"),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def checked_options(options) -> MaskOptions:
    """`options` where they are MaskOptions; the reference's for None; a TypeError for anything else."""
    if options is None:
        return MaskOptions()
    if not isinstance(options, MaskOptions):
        raise InputTypeError(
            "{parameter} has to be a MaskOptions or None, but is {options!t}; give for example "
            "MaskOptions(smoothing=1.0).",
            parameter="mask_options",
            options=options,
        )
    return options


def clamp_of(maps, ratio: float = 3.0, per_image: bool = False) -> np.ndarray:
    """The magnitude that maps are clamped to: `ratio` times their mean.

    Args:
        maps: (B, h, w), at least 0.
        ratio: above 0.
        per_image: False: the mean of the whole batch, as the reference takes it (D4). True: each map's own, so that
            no mask depends on its batch-mates.

    Returns:
        float32, of shape () or, per image, (B, 1, 1). The mean is taken in float64, the product in float32.

    Raises:
        options.NumericalError: The mean, or that of one image, is 0: there is no difference to make a mask
            of.
        ValueError, TypeError: `maps` or `ratio` is not as above.
    """
    maps, ratio = _maps(maps), np.float32(check_ratio(ratio, "ratio"))
    groups = maps if check_switch(per_image, "per_image") else [maps]
    magnitudes = np.array([group.mean(dtype=np.float64) for group in groups]).astype(np.float32) * ratio
    empty = np.flatnonzero(magnitudes == 0)
    if len(empty):
        which = f" (picture {empty[0] + 1} of {len(maps)})" if per_image and len(maps) > 1 else ""
        raise NumericalError(f"{NO_DIFFERENCE[:-1]}{which}.")
    return magnitudes.reshape(-1, 1, 1) if per_image else magnitudes.reshape(())


def mask_of(
    maps,
    ratio: float = 3.0,
    options: MaskOptions = MaskOptions(),
    per_image: bool = False,
    clamp=None,
    guides=None,
) -> np.ndarray:
    """Make masks of maps (DiffEdit, section 3.2, step 1; with the defaults what the reference does).

    1. Clamp: x = clip(map, 0, c) / c with c = `clamp_of(maps, ratio, per_image)`. First, so that an outlier, which
       may be a hundred times the mean, counts no more than a clear difference when values are averaged.
    2. Smooth x with a Gaussian. Before the threshold, because averaging decides there what a lone latent can't.
    3. Follow the picture's edges. After smoothing, which would blur them again.
    4. Threshold: 1 where x > t.
    5. Fill holes. Before regions are counted, so that a hollow outline counts with its inside; before erosion,
       which would widen the holes.
    6. Drop small regions. Before erosion and dilation, so that sizes are those of the map's own regions.
    7. Erode, then 8. dilate: with equal numbers an opening, which takes off what is thin and leaves the rest.

    With `options.soft` the result of these steps, H, says where the border is, and the map how sharp it is:

        s = clip(1/2 + (x - t) / min(t, 1 - t), 0, 1)              1/2 at the threshold; 0 and 1 well below and above
        in H:       soft = max(s, min(1, 1/2 + (d - 1) / 2r))      d: distance to the nearest latent outside H
        outside H:  soft = min(s, max(0, 1/2 - (d - 1) / 2r))      d: distance to the nearest latent in H

    with r = 1 + ceil(smoothing), away from 1/2 to a multiple of 1/255. So the value is 1 deeper than r latents in H, 0
    further than r outside, above 1/2 in H and at most 1/2 elsewhere; without `edges` it never falls where the map rises
    under the same clamp.

    Args:
        maps: (B, h, w), finite and at least 0; computed with as float32.
        ratio: as for `clamp_of`.
        per_image: as `ratio`.
        options: see `MaskOptions`.
        clamp: magnitudes above 0 of shape (), (B,) or (B, 1, 1), as `clamp_of` gives them; `ratio` and `per_image` are
            then not used. None: computed.
        guides: (1 or B, h, w, C), what `edges.guides_of` makes of the pictures; for `options.edges`.

    Returns:
        int64 (B, h, w) of 0 and 1; float32 in [0, 1] with `options.soft`.

    Raises:
        options.NumericalError: The maps are 0 everywhere (per image: one of them is), or hold NaN or
            infinity.
        ValueError, TypeError: An argument is not as above.
    """
    if not isinstance(options, MaskOptions):
        raise InputTypeError(
            "{parameter} has to be a MaskOptions, but is {options!t}.", parameter="options", options=options
        )
    maps = _maps(maps)
    magnitude = clamp_of(maps, ratio, per_image) if clamp is None else _clamp(clamp, len(maps))
    share = np.clip(maps, 0, magnitude) / magnitude
    if options.smoothing > 0:
        from scipy import ndimage

        share = np.stack([ndimage.gaussian_filter(x, options.smoothing, mode="nearest") for x in share])
    if options.edges > 0:
        followed = zip(share, _guides(guides, maps.shape))
        share = np.stack([follow_edges(x, guide, options.edges, options.edge_contrast) for x, guide in followed])
    threshold = np.float32(options.threshold)
    masks = np.stack([_cleaned(x > threshold, options) for x in share])
    if not options.soft:
        return masks.astype(np.int64)
    reach = 1 + int(np.ceil(options.smoothing))
    return np.stack([_softened(x, mask, float(threshold), reach) for x, mask in zip(share, masks)])


def _maps(maps) -> np.ndarray:
    maps = to_numpy(maps)
    if maps.dtype.kind != "f":
        raise InputTypeError(
            "{parameter} has to hold floating-point numbers, but is of dtype {dtype}.",
            parameter="maps",
            dtype=maps.dtype,
        )
    if maps.ndim != 3 or maps.size == 0:
        raise InputError(
            "{parameter} has to be (B, h, w) with something in it, but has shape {shape}.",
            parameter="maps",
            shape=maps.shape,
        )
    check_finite(maps, "map")
    if maps.min() < 0:
        raise InputError(
            "{parameter} holds magnitudes, at least 0, but the smallest value is {least:g}.",
            parameter="maps",
            least=maps.min(),
        )
    return maps.astype(np.float32, copy=False)


def _clamp(clamp, count: int) -> np.ndarray:
    clamp = to_numpy(clamp)
    if clamp.dtype.kind not in "fiu" or clamp.shape not in ((), (count,), (count, 1, 1)):
        raise InputError(
            "{parameter} has to be one number for all or ({count},) for each map, but is {dtype} of shape {shape}; "
            "give what `clamp_of` returns.",
            parameter="clamp",
            count=count,
            dtype=clamp.dtype,
            shape=clamp.shape,
        )
    clamp = clamp.astype(np.float32)
    if not (clamp > 0).all():
        raise InputError("{parameter} has to be above 0, but is {least:g}.", parameter="clamp", least=clamp.min())
    return clamp if clamp.ndim == 0 else clamp.reshape(-1, 1, 1)


def _guides(guides, shape: tuple[int, ...]) -> np.ndarray:
    if guides is None:
        raise InputError(
            "{parameter} asks for the picture's edges; give {guides}, as `edges.guides_of` makes them.",
            parameter="edges",
        )
    guides = to_numpy(guides)
    if guides.ndim != 4 or guides.shape[1:3] != shape[1:] or guides.shape[0] not in (1, shape[0]):
        raise InputError(
            "{parameter} has shape {shape}, but maps of shape {maps} need ({count}, {height}, {width}, C); make "
            "it by `edges.guides_of`.",
            parameter="guides",
            shape=guides.shape,
            maps=shape,
            count=shape[0] if shape[0] == 1 else f"1 or {shape[0]}",
            height=shape[1],
            width=shape[2],
        )
    check_finite(guides, "guide")
    return np.broadcast_to(guides, (shape[0], *guides.shape[1:]))


def _cleaned(mask: np.ndarray, options: MaskOptions) -> np.ndarray:
    """Steps 5 to 8 of `mask_of` on one boolean mask (h, w)."""
    if options.fill_holes:
        from scipy import ndimage

        mask = ndimage.binary_fill_holes(mask)
    if options.smallest_region > 1:
        from scipy import ndimage

        regions, _ = ndimage.label(mask, structure=np.ones((3, 3)))
        mask = mask & (np.bincount(regions.ravel())[regions] >= options.smallest_region)
    if options.erosion:
        mask = _distance_to(~mask) > options.erosion
    if options.dilation:
        mask = _distance_to(mask) <= options.dilation
    return mask


def _distance_to(target: np.ndarray) -> np.ndarray:
    """Euclidean distance of every cell to the nearest one of `target` (bool), float64; infinity where there is none."""
    from scipy import ndimage

    if not target.any():  # scipy would measure to a cell outside the array
        return np.full(target.shape, np.inf)
    return ndimage.distance_transform_edt(~target)


def _softened(share: np.ndarray, mask: np.ndarray, threshold: float, reach: int) -> np.ndarray:
    """The formula of soft masks in `mask_of`, for one image."""
    ramp = np.clip(0.5 + (share.astype(np.float64) - threshold) / min(threshold, 1 - threshold), 0, 1)
    least = np.clip(0.5 + (_distance_to(~mask) - 1) / (2 * reach), 0.5, 1)
    most = np.clip(0.5 - (_distance_to(mask) - 1) / (2 * reach), 0, 0.5)
    soft = np.where(mask, np.maximum(ramp, least), np.minimum(ramp, most)) * 255
    # In steps of 1/255, so that a mask can be a picture; values near 1/2 stay on their side of it.
    levels = np.where(mask, np.maximum(np.ceil(soft), 128), np.minimum(np.floor(soft), 127))
    return levels.astype(np.float32) / np.float32(255)


def mask_coverage(mask) -> list[float]:
    """For each mask its share of the latents, from 0 to 1; a soft value counts as the part that it is."""
    return [float(values.mean(dtype=np.float64)) for values in _grids(mask, "mask")]


# --- masks of users --------------------------------------------------------------------------------


def user_mask(mask, size: tuple[int, int], batch: int = 1, name: str = "mask", soft: bool = True) -> np.ndarray:
    """A mask drawn by the user, of any size and kind, on the latents' grid.

    Args:
        mask: white means "change here":

            - PIL picture of any mode, by its luminance; what is transparent is black; mode F is in [0, 1];
            - array, tensor or nested list of numbers, (H, W), (B, H, W) or (B, 1, H, W), bool, float or integer in
              [0, 1]; bytes, in pictures too, are 0..255 as soon as one is above 1, and 0 and 1 otherwise;
            - list of pictures, arrays or tensors of one size.
        size: (h, w) of the latents.
        batch: number of pictures, B; one mask serves all.
        name: what messages call the mask.
        soft: keep continuous values; otherwise a latent is 1 from a half on, and 0 below.

    Returns:
        float32 (1 or B, h, w) in [0, 1]. Each pixel belongs to the latent that its middle is in, and a latent has the
        largest value of its pixels, so nothing thin is lost. A mask smaller than the grid is enlarged to the nearest.
        A mask that `enlarged` made comes back as it was.

    Raises:
        ValueError: Values outside [0, 1] or NaN, more than one channel, another count than 1 or `batch`,
            sizes that differ, nothing in it.
        TypeError: Another type.

    Warns:
        UserWarning: The mask's proportions are not the grid's: it is stretched, and likely belongs to another
            picture.
    """
    height, width = _checked_size(size)
    values = mask_values(_user_values(mask, name), check_positive_int("batch", batch), name)[:, 0]
    rows, columns = values.shape[1:]
    if min(rows, columns) > 1 and abs(columns * height / rows - width) > 1 + 0.05 * width:
        warnings.warn(
            f"`{name}` is {columns} x {rows}, which are not the proportions of the {width} x {height} latents: it is "
            f"stretched to them; give a mask of the shape of its picture.",
            stacklevel=2,
        )
    resampled = _resampled(values.astype(np.float32), (height, width))
    return resampled if check_switch(soft, "soft") else (resampled >= 0.5).astype(np.float32)


def on_latents(mask, size: tuple[int, int], factor: int, batch: int, soft: bool) -> np.ndarray:
    """A mask of the picture's size, on the grid of its latents: what `user_mask` makes of it, (batch, 1, h, w).

    W10: for the call that mirrors the reference's, which takes masks of the latents' size alone.

    Args:
        mask: as for `user_mask`.
        size: (h, w) of the latents.
        factor: pixels per latent. A picture's sides may be no multiples of it; what is over is cut off.
        batch: number of pictures.
        soft: as for `user_mask`.

    Raises:
        InputError: it is of the size of no picture that has such latents.
    """
    values = mask_values(mask, batch)
    rows, columns = values.shape[2:]
    height, width = size
    if (rows // factor, columns // factor) != (height, width):
        raise InputError(
            "{parameter} is {columns} x {rows} (width x height), but {image_latents} are {width} x {height}, of a "
            "picture of {wide} x {high} pixels; resize the mask to one of these sizes, or give the latents of the "
            "picture that it was drawn over.",
            "mask_image",
            columns=columns,
            rows=rows,
            width=width,
            height=height,
            wide=width * factor,
            high=height * factor,
        )
    found = user_mask(mask, size, batch, "mask_image", soft)[:, None]
    return np.broadcast_to(found, (batch, *found.shape[1:]))


def _user_values(mask, name: str):
    """`mask` as one that `pictures.mask_values` takes."""
    if isinstance(mask, (list, tuple)) and len(mask) and isinstance(mask[0], (list, tuple)):
        try:
            return np.asarray(mask)
        except ValueError as error:
            raise InputError(
                "{parameter} is a list of rows of different lengths; give each row as many.", parameter=name
            ) from error
    if isinstance(mask, (list, tuple)):
        return [_user_part(part) for part in mask]
    return _user_part(mask)


def _user_part(part):
    if isinstance(part, PIL.Image.Image):
        part = _drawn(part)
    if not isinstance(part, np.ndarray) and not is_tensor(part):
        return part
    values = to_numpy(part)
    if values.dtype == np.uint8 and values.size and values.max() > 1:
        return values.astype(np.float32) / 255
    return values


def _drawn(picture: PIL.Image.Image) -> np.ndarray:
    """Levels of a drawing, uint8 (H, W), or float for mode F. Where nothing was drawn, the colour stored is nothing."""
    if 0 in picture.size:
        return np.zeros((picture.height, picture.width), np.uint8)
    if picture.mode == "F":
        return np.asarray(picture)
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        drawn = picture.convert("RGBA")
        picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", drawn.size, (0, 0, 0, 255)), drawn)
    return grey_levels(picture)


def combine(automatic, own, how: str) -> np.ndarray:
    """One mask of the automatic one, a, and the user's own, b.

    Args:
        automatic: (h, w), (B, h, w) or (B, 1, h, w) in [0, 1], on the same grid; a single one serves all of the
            other. `automatic` may be None where it is replaced.
        own: as `automatic`.
        how: "replace": b; "union": max(a, b); "subtract": min(a, 1 - b); "intersection": min(a, b).

    Returns:
        float32 (B, h, w), of 0 and 1 where both are.

    Raises:
        ValueError: An unknown `how`, grids or numbers of masks that differ, values outside [0, 1].
    """
    check_output_type(how, COMBINATIONS, "how")
    own = _grids(own, "own")
    if automatic is None and how == "replace":
        return own.copy()
    if automatic is None:
        raise InputError(
            "{parameter} is None, so there is nothing to combine by {combination!r}; give a mask, or {how} of 'replace'.",
            parameter="automatic",
            combination=how,
        )
    automatic = _grids(automatic, "automatic")
    if automatic.shape[1:] != own.shape[1:]:
        raise InputError(
            "{automatic} has a grid of {theirs} latents, but {parameter} one of {shape}; bring it to the same grid by "
            "`user_mask`.",
            parameter="own",
            theirs=automatic.shape[1:],
            shape=own.shape[1:],
        )
    if len(automatic) != len(own) and 1 not in (len(automatic), len(own)):
        raise InputError(
            "{parameter} holds {count} masks, but {automatic} {others}; give one, or one for each.",
            parameter="own",
            count=len(own),
            others=len(automatic),
        )
    automatic, own = np.broadcast_arrays(automatic, own)
    if how == "replace":
        return own.copy()
    if how == "union":
        return np.maximum(automatic, own)
    return np.minimum(automatic, 1 - own if how == "subtract" else own)


def _grids(mask, name: str) -> np.ndarray:
    """A mask of any accepted kind and number as float32 (B, h, w); it may be the caller's memory."""
    return mask_values(mask, None, name)[:, 0].astype(np.float32, copy=False)


# --- sizes -----------------------------------------------------------------------------------------


def _checked_size(size) -> tuple[int, int]:
    try:
        height, width = size
    except (TypeError, ValueError):
        raise InputError(
            "{parameter} has to be (height, width), but is {size!r}.", parameter="size", size=size
        ) from None
    return check_positive_int("size", height), check_positive_int("size", width)


def _resampled(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(B, H, W) at another size: the largest value where it shrinks, the nearest where it grows."""
    for axis, wanted in zip((1, 2), size):
        length = values.shape[axis]
        small, large = sorted((length, wanted))
        # Which of the few cells holds the middle of each of the many. In whole numbers: both ways are exact inverses.
        cell = (2 * np.arange(large) + 1) * small // (2 * large)
        if wanted >= length:
            values = values.take(cell, axis=axis)
        else:
            values = np.maximum.reduceat(values, np.searchsorted(cell, np.arange(small)), axis=axis)
    return values


def enlarged(mask, size: tuple[int, int]) -> np.ndarray:
    """A mask at the size (H, W) of its picture, each pixel with the value of its latent: float32 (B, H, W).

    `size` may be no multiple of the latents; `user_mask` is the way back. A size below the mask's takes the largest
    values.
    """
    return _resampled(_grids(mask, "mask"), _checked_size(size))


# --- pasting results back --------------------------------------------------------------------------


def feathered(mask, size: tuple[int, int], radius: float) -> np.ndarray:
    """Weights of an edited picture over its original, float32 (B, H, W) in [0, 1].

    1 on all pixels of the mask, (1 + cos(pi d / radius)) / 2 at a distance of d pixels from the nearest of them, and
    exactly 0 from `radius` on.

    Args:
        mask: (h, w), (B, h, w) or (B, 1, h, w) in [0, 1]; a latent belongs to it where it is above 0: a soft value has
            blended the latents while they were edited, and weighing the pixels too would do it twice.
        size: (H, W) of the picture.
        radius: pixels, 0 to 10000; 0 gives a hard border.
    """
    radius = check_at_least_zero(radius, "radius", _LARGEST_RADIUS)
    inside = enlarged(mask, size) > 0
    if radius == 0:
        return inside.astype(np.float32)
    weights = []
    for pixels in inside:
        part = np.minimum(_distance_to(pixels), radius) / radius  # in this order no radius is too small
        weights.append(np.where(part < 1, 0.5 + 0.5 * np.cos(np.pi * part), 0).astype(np.float32))
    return np.stack(weights)


def paste_back(original, edited, weights) -> np.ndarray:
    """The edited pictures where the weights are 1, the originals where they are 0, and a blend between.

    Args:
        original: (B, H, W, 3), both uint8 or both float.
        edited: as `original`.
        weights: float (B or 1, H, W) in [0, 1], as `feathered` gives them.

    Returns:
        (B, H, W, 3), a new array, float32 or uint8, bytes rounded to the nearest. Where a weight is 0 it is the original,
        value by value.

    Raises:
        ValueError, TypeError: Another dtype, shapes that do not fit, weights outside [0, 1] or NaN.
    """
    original, edited = to_numpy(original), to_numpy(edited)
    for name, pixels in (("original", original), ("edited", edited)):
        if pixels.dtype != np.uint8 and pixels.dtype.kind != "f" or pixels.dtype != original.dtype:
            raise InputTypeError(
                "{parameter} and {edited} have to be both uint8 or both float of one dtype, but {part} is {dtype}; "
                "convert it.",
                parameter="original",
                part=named(name),
                dtype=pixels.dtype,
            )
        if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.size == 0:
            raise InputError(
                "{parameter} has to be (B, H, W, 3), but has shape {shape}.",
                parameter=name,
                shape=pixels.shape,
            )
    if original.shape != edited.shape:
        raise InputError(
            "{parameter} and {edited} have to be of one shape, but have {shape} and {theirs}; bring the edited "
            "pictures to the originals' size.",
            parameter="original",
            shape=original.shape,
            theirs=edited.shape,
        )
    weights = _grids(weights, "weights")
    if weights.shape[1:] != original.shape[1:3] or len(weights) not in (1, len(original)):
        raise InputError(
            "{parameter} has shape {shape}, but the pictures need {needed}; make it by `feathered` with the pictures' "
            "size.",
            parameter="weights",
            shape=weights.shape,
            needed=original.shape[:3],
        )
    weights = weights[..., None]
    blend = original + weights * (edited.astype(np.float32) - original)
    return np.where(weights == 0, original, blend if original.dtype.kind == "f" else np.rint(blend)).astype(
        original.dtype
    )


# --- masks to look at ------------------------------------------------------------------------------


def overlay(
    picture: PIL.Image.Image,
    mask,
    colour: Sequence[int] = (255, 0, 64),
    opacity: float = 0.5,
    outline: bool = True,
) -> PIL.Image.Image:
    """A picture with its mask over it.

    Args:
        picture: PIL picture of any mode.
        mask: one mask of any kind and size that `user_mask` takes.
        colour: (red, green, blue), each 0..255.
        opacity: of the colour where the mask is 1, in [0, 1]; softer values show fainter.
        outline: draw the border of the part that is at least 1/2 in the full colour.

    Returns:
        PIL picture in RGB, sRGB, of the picture's size.
    """
    if not isinstance(picture, PIL.Image.Image):
        raise InputTypeError(
            "{parameter} has to be a PIL picture, but is {picture!t}.", parameter="picture", picture=picture
        )
    try:
        colour = tuple(check_count(value, "colour", 255) for value in colour)
    except (TypeError, ValueError):
        colour = ()
    if len(colour) != 3:
        raise InputError("{parameter} has to be (red, green, blue), whole numbers from 0 to 255.", parameter="colour")
    opacity = check_strength(opacity, "opacity")
    check_switch(outline, "outline")
    pixels = np.asarray(to_srgb(picture)).astype(np.float32)
    values = user_mask(mask, pixels.shape[:2])[0]
    weights = np.float32(opacity) * values
    if outline:
        inside = values >= 0.5
        border = inside & (_distance_to(~inside) <= max(1, round(min(inside.shape) / 200)))
        weights = np.where(border, np.float32(1), weights)
    shown = pixels + weights[..., None] * (np.array(colour, np.float32) - pixels)
    return PIL.Image.fromarray(np.rint(shown).astype(np.uint8))


# --- sweeps ----------------------------------------------------------------------------------------


def sweep_values(text: str, name: str, check: Callable) -> list:
    """The values of an option to try one after the other, such as "0.3,0.5,0.7".

    Args:
        text: 1 to 12 different numbers with commas between them; numbers without a point or exponent are ints.
        name: of the option, for messages.
        check: called as check(value, name) for each; raises for what the option can't be, returns what it is.

    Raises:
        ValueError: An entry is missing, no number, there twice, or refused by `check`; there are too many.
    """
    if not isinstance(text, str) or not text.strip():
        raise InputError(
            "{parameter} to sweep over is {text!r}; give numbers with commas between, as 0.3,0.5,0.7.",
            parameter=name,
            text=text,
        )
    entries = [entry.strip() for entry in text.split(",")]
    if len(entries) > MAX_SWEEP_VALUES:
        raise InputError(
            "{parameter} has {count} values to sweep over; give at most {most}, every one is a run.",
            parameter=name,
            count=len(entries),
            most=MAX_SWEEP_VALUES,
        )
    values = []
    for entry in entries:
        try:
            value = check(_number(entry, text, name), name)
        except InputTypeError as error:  # a fraction where a whole number is meant: the text's value, not a type
            raise InputError(error.message, error.parameter) from error
        if value in values:
            raise InputError(
                "{parameter} has {entry!r} twice in {text!r}; give each value once.",
                parameter=name,
                entry=entry,
                text=text,
            )
        values.append(value)
    return values


def _number(entry: str, text: str, name: str):
    for kind in (int, float):
        try:
            return kind(entry)
        except ValueError:
            pass
    what = Message("an empty place in {text!r}", text=text)
    if entry:
        what = Message("{entry!r} in {text!r}", entry=entry, text=text)
    raise InputError(
        "{parameter} to sweep over has {what}; give numbers with commas between, as 0.3,0.5,0.7.",
        parameter=name,
        what=what,
    )
