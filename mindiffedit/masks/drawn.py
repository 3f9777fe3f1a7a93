"""Masks of users: of any kind and size, on the latents' grid, at the picture's size, combined with a computed one."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import PIL.Image

from mindiffedit.arrays import is_tensor, to_numpy
from mindiffedit.errors import InputError, InputTypeError
from mindiffedit.images.colours import grey_levels
from mindiffedit.images.pictures import few
from mindiffedit.options import check_output_type, check_positive_int, check_switch

COMBINATIONS = ("replace", "union", "subtract", "intersection")

__all__ = [
    "COMBINATIONS",
    "combine",
    "enlarged",
    "fit_mask",
    "grids",
    "mask_coverage",
    "mask_values",
    "on_latents",
    "preprocess_mask",
    "user_mask",
]


# --- masks as the reference takes them -------------------------------------------------------------


def preprocess_mask(mask, batch_size: int = 1, soft: bool = False) -> np.ndarray:
    """Bring a mask of any accepted kind to zeros and ones; the caller's array is never written to.

    Args:
        mask: in [0, 1], a value of 0.5 or more means "change here":

            - PIL picture of any mode (its luminance / 255), or a list of them;
            - array or tensor (h, w), (B, h, w) or (B, 1, h, w), float, bool or integer, or a list of arrays or
              tensors, of which those with two dimensions are stacked and the others joined.
        batch_size: number of pictures; a single mask is repeated for all.
        soft: keep values between 0 and 1, which then blend.

    Returns:
        float32 (batch_size, 1, h, w) of 0 and 1, or between them with `soft`.

    Raises:
        ValueError: Values outside [0, 1] or NaN, more than one channel, another count than 1 or `batch_size`,
            sizes that differ, nothing in it.
        TypeError: Another type.
    """
    values = mask_values(mask, batch_size)
    values = (values if soft else values >= 0.5).astype(np.float32)
    return np.repeat(values, batch_size, axis=0) if len(values) != batch_size else values


def mask_values(mask, batch_size: int | None = None, name: str = "mask_image") -> np.ndarray:
    """The values of a mask of any kind that `preprocess_mask` takes, checked but not made 0 or 1.

    Args:
        mask: as for `preprocess_mask`.
        batch_size: number of pictures; None: any number of masks.
        name: what messages call the mask.

    Returns:
        (1 or batch_size, 1, h, w) in [0, 1], of the mask's own dtype; it may be the caller's memory.

    Raises:
        ValueError, TypeError: As `preprocess_mask`.
    """
    values = _joined(mask, name)
    if values.size == 0:
        raise InputError("{parameter} is empty: its shape is {shape}.", name, shape=values.shape)
    if values.ndim not in (2, 3, 4):
        raise InputError(
            "{parameter} has to be (h, w), (B, h, w) or (B, 1, h, w), but has shape {shape}.", name, shape=values.shape
        )
    if values.ndim < 4:
        values = values.reshape(-1, 1, *values.shape[-2:])
    if values.shape[1] != 1:
        raise InputError(
            "{parameter} must have 1 channel, but has {channels} channels; give (h, w), (B, h, w) or (B, 1, h, w).",
            name,
            channels=values.shape[1],
        )
    if batch_size is not None and len(values) not in (1, batch_size):
        raise InputError(
            "{parameter} with batch size {count} cannot be broadcasted to batch size {batch} inferred by prompt "
            "inputs; give one mask, (h, w), or one for each picture, (B, h, w){hint}.",
            name,
            count=len(values),
            batch=batch_size,
            hint="; of (h, w, channels) give one channel, mask[:, :, 0]" if values.shape[-1] in (1, 3, 4) else "",
        )
    if values.dtype.kind == "f" and np.isnan(values).any():
        raise InputError("{parameter} has NaN in it; every value has to be in [0, 1].", name)
    if values.min() < 0 or values.max() > 1:
        raise InputError(
            "{parameter} should be in [0, 1] range, but has values from {least:g} to {most:g}; divide a mask in 0..255 "
            "by 255.",
            name,
            least=values.min(),
            most=values.max(),
        )
    return values


def _joined(mask, name: str) -> np.ndarray:
    """The mask or the list of masks as one array, before any check of its values."""
    parts = list(mask) if isinstance(mask, (list, tuple)) else [mask]
    if len(parts) == 0:
        raise InputError("{parameter} is an empty list; give at least one mask.", name)
    pil = isinstance(parts[0], PIL.Image.Image)
    arrays = []
    for part in parts:
        if isinstance(part, PIL.Image.Image) != pil:
            raise InputTypeError(
                "{parameter} is a list that mixes PIL pictures with arrays or tensors; give masks of one kind.", name
            )
        if pil:
            arrays.append(grey_levels(part).astype(np.float32) / 255.0)
        elif isinstance(part, np.ndarray) or is_tensor(part):
            arrays.append(to_numpy(part))
        else:
            raise InputTypeError(
                "{parameter} has to be a PIL picture, an array, a tensor or a list of these, but is or holds {kind}.",
                name,
                kind=type(part).__name__,
            )
        if arrays[-1].dtype.kind not in "fbiu":
            raise InputTypeError(
                "{parameter} has to hold numbers, but is of dtype {dtype}.", name, dtype=arrays[-1].dtype
            )
    if not isinstance(mask, (list, tuple)):
        return arrays[0]
    stacked = arrays[0].ndim < 3
    shapes = [array.shape if stacked else array.shape[1:] for array in arrays]
    if any(shape != shapes[0] for shape in shapes):
        raise InputError(
            "{parameter} is a list of masks of different shapes: {shapes}; bring them to one size.",
            name,
            shapes=few([array.shape for array in arrays]),
        )
    return np.stack(arrays) if stacked else np.concatenate(arrays)


def fit_mask(
    mask: PIL.Image.Image, picture_size: tuple[int, int], latent_size: tuple[int, int], scale_factor: int
) -> np.ndarray:
    """A mask drawn by the user, on the latent grid.

    Args:
        mask: PIL picture; white means "change here".
        picture_size: (width, height) of the user's picture and of the latents.
        latent_size: as `picture_size`.
        scale_factor: pixels per latent.

    Returns:
        float32 (1, 1, h, w) of 0 and 1: a latent changes where at least half of its area is marked.

    Raises:
        ValueError: The mask is neither of the picture's size, nor of the size the model works at, nor of the
            latents'.
    """
    working = (latent_size[0] * scale_factor, latent_size[1] * scale_factor)
    accepted = [tuple(picture_size), working, tuple(latent_size)]
    if mask.size not in accepted:
        sizes = " or ".join(f"{w} x {h}" for w, h in dict.fromkeys(accepted))
        raise InputError(
            "{parameter} is {width} x {height} pixels; it has to be {sizes}, as its picture: resize it.",
            "mask_image",
            width=mask.width,
            height=mask.height,
            sizes=sizes,
        )
    share = PIL.Image.fromarray(preprocess_mask(mask)[0, 0]).resize(latent_size, PIL.Image.Resampling.BOX)
    return preprocess_mask(np.clip(np.asarray(share), 0, 1))


# --- masks of any kind and size --------------------------------------------------------------------


def user_mask(mask, size: tuple[int, ...], batch: int = 1, name: str = "mask", soft: bool = True) -> np.ndarray:
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


def on_latents(mask, size: tuple[int, ...], factor: int, batch: int, soft: bool) -> np.ndarray:
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
    rows, columns = mask_values(mask, batch).shape[2:]
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
    values = user_mask(mask, size, batch, "mask_image", soft)[:, None]
    return np.broadcast_to(values, (batch, *values.shape[1:]))


def _user_values(mask, name: str) -> Any:
    """`mask` as one that `mask_values` takes."""
    if not isinstance(mask, (list, tuple)):
        return _user_part(mask)
    if len(mask) == 0 or not isinstance(mask[0], (list, tuple)):
        return [_user_part(part) for part in mask]
    try:
        return np.asarray(mask)
    except ValueError as error:
        raise InputError("{parameter} is a list of rows of different lengths; give each row as many.", name) from error


def _user_part(part) -> Any:
    if isinstance(part, PIL.Image.Image):
        part = _levels(part)
    if not isinstance(part, np.ndarray) and not is_tensor(part):
        return part
    values = to_numpy(part)
    if values.dtype == np.uint8 and values.size and values.max() > 1:
        return values.astype(np.float32) / 255
    return values


def _levels(picture: PIL.Image.Image) -> np.ndarray:
    """Levels of a drawing, uint8 (H, W), or float for mode F. Where nothing was drawn, the colour stored is nothing."""
    if 0 in picture.size:
        return np.zeros((picture.height, picture.width), np.uint8)
    if picture.mode == "F":
        return np.asarray(picture)
    if picture.has_transparency_data:
        drawing = picture.convert("RGBA")
        picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", drawing.size, (0, 0, 0, 255)), drawing)
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
    own = grids(own, "own")
    if automatic is None and how == "replace":
        return own.copy()
    if automatic is None:
        raise InputError(
            "{parameter} is None, so there is nothing to combine by {combination!r}; give a mask, or {how} "
            "of 'replace'.",
            "automatic",
            combination=how,
        )
    automatic = grids(automatic, "automatic")
    if automatic.shape[1:] != own.shape[1:] or len(automatic) != len(own) and 1 not in (len(automatic), len(own)):
        raise InputError(
            "{parameter} is {shape}, but {automatic} {others}; give one mask, or one for each, on the same grid: "
            "`user_mask` brings it there.",
            "own",
            shape=own.shape,
            others=automatic.shape,
        )
    automatic, own = np.broadcast_arrays(automatic, own)
    if how == "replace":
        return own.copy()
    if how == "union":
        return np.maximum(automatic, own)
    return np.minimum(automatic, 1 - own if how == "subtract" else own)


# --- grids and sizes -------------------------------------------------------------------------------


def grids(mask, name: str = "mask") -> np.ndarray:
    """A mask of any accepted kind and number as float32 (B, h, w); it may be the caller's memory."""
    return mask_values(mask, None, name)[:, 0].astype(np.float32, copy=False)


def mask_coverage(mask) -> list[float]:
    """For each mask its share of the latents, from 0 to 1; a soft value counts as the part that it is."""
    return [float(values.mean(dtype=np.float64)) for values in grids(mask)]


def enlarged(mask, size: tuple[int, int]) -> np.ndarray:
    """A mask at the size (H, W) of its picture, each pixel with the value of its latent: float32 (B, H, W).

    `size` may be no multiple of the latents; `user_mask` is the way back. A size below the mask's takes the largest
    values.
    """
    return _resampled(grids(mask), _checked_size(size))


def _checked_size(size) -> tuple[int, int]:
    try:
        height, width = size
    except (TypeError, ValueError):
        raise InputError("{parameter} has to be (height, width), but is {size!r}.", "size", size=size) from None
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
