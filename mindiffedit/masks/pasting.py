"""Masks over pictures: results pasted back into their originals, and masks to look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image

from mindiffedit.arrays import to_numpy
from mindiffedit.errors import InputError, InputTypeError
from mindiffedit.images.colours import blend, to_srgb
from mindiffedit.images.pictures import mask_to_pil
from mindiffedit.masks.drawn import enlarged, grids, user_mask
from mindiffedit.masks.maps import distance_to
from mindiffedit.options import check_at_least_zero, check_count, check_strength, check_switch

MAX_RADIUS = 10000.0

__all__ = ["feathered", "overlay", "paste_back"]


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
    radius = check_at_least_zero(radius, "radius", MAX_RADIUS)
    inside = enlarged(mask, size) > 0
    if radius == 0:
        return inside.astype(np.float32)
    weights = []
    for pixels in inside:
        part = np.minimum(distance_to(pixels), radius) / radius  # in this order no radius is too small
        weights.append(np.where(part < 1, 0.5 + 0.5 * np.cos(np.pi * part), 0).astype(np.float32))
    return np.stack(weights)


def paste_back(original, edited, weights) -> np.ndarray:
    """The edited pictures where the weights are 1, the originals where they are 0, and a blend between.

    Args:
        original: (B, H, W, 3), both uint8 or both float.
        edited: as `original`.
        weights: float (B or 1, H, W) in [0, 1], as `feathered` gives them.

    Returns:
        (B, H, W, 3), a new array of the same dtype, bytes rounded to the nearest. Where a weight is 0 it is the
        original, value by value.

    Raises:
        ValueError, TypeError: Another dtype, shapes that do not fit, weights outside [0, 1] or NaN.
    """
    original, edited = to_numpy(original), to_numpy(edited)
    if original.dtype != edited.dtype or original.dtype != np.uint8 and original.dtype.kind != "f":
        raise InputTypeError(
            "{parameter} and {edited} have to be both uint8 or both float of one dtype, but are {dtype} and {other}; "
            "convert one of them.",
            "original",
            dtype=original.dtype,
            other=edited.dtype,
        )
    if original.shape != edited.shape or original.ndim != 4 or original.shape[3] != 3 or original.size == 0:
        raise InputError(
            "{parameter} and {edited} have to be (B, H, W, 3), of one shape, but have {shape} and {other}; bring the "
            "edited pictures to the originals' size.",
            "original",
            shape=original.shape,
            other=edited.shape,
        )
    weights = grids(weights, "weights")
    if weights.shape[1:] != original.shape[1:3] or len(weights) not in (1, len(original)):
        raise InputError(
            "{parameter} has shape {shape}, but the pictures need {needed}; make it by `feathered` with the pictures' "
            "size.",
            "weights",
            shape=weights.shape,
            needed=original.shape[:3],
        )
    return blend(original, edited, weights[..., None])


def as_picture(values, size: tuple[int, int]) -> PIL.Image.Image:
    """A mask or map (1, h, w) in [0, 1] as a grey picture of a width and height, each pixel with its latent's value."""
    return mask_to_pil(enlarged(values, size[::-1]))[0]


def overlay(
    picture: PIL.Image.Image, mask, colour: Sequence[int] = (255, 0, 64), opacity: float = 0.5, outline: bool = True
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
        raise InputTypeError("{parameter} has to be a PIL picture, but is {picture!t}.", "picture", picture=picture)
    try:
        colour = tuple(check_count(value, "colour", 255) for value in colour)
    except (TypeError, ValueError):
        colour = ()
    if len(colour) != 3:
        raise InputError("{parameter} has to be (red, green, blue), whole numbers from 0 to 255.", "colour")
    opacity = check_strength(opacity, "opacity")
    check_switch(outline, "outline")
    pixels = np.asarray(to_srgb(picture)).astype(np.float32)
    values = user_mask(mask, (picture.height, picture.width))[0]
    weights = np.float32(opacity) * values
    if outline:
        inside = values >= 0.5
        border = inside & (distance_to(~inside) <= max(1, round(min(inside.shape) / 200)))
        weights = np.where(border, np.float32(1), weights)
    shown = pixels + weights[..., None] * (np.array(colour, np.float32) - pixels)
    return PIL.Image.fromarray(np.rint(shown).astype(np.uint8))
