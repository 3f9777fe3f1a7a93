"""Pictures and masks, in and out: PIL pictures, arrays of any framework and files ⇄ NumPy arrays.

Nothing here knows a model. `reading` has what comes from files and URLs, `colours` what a picture has beside the colours
that models see. Arrays that go to a model are float32 with channels first, (B, C, H, W); pictures are in [-1, 1], masks
are 0 or 1 and 1 means "change here".
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import PIL.PngImagePlugin

from mindiffedit.arrays import is_tensor, to_numpy
from mindiffedit.errors import InputError, InputTypeError, first_line
from mindiffedit.images.colours import fit_format, grey_levels, to_rgb, to_srgb
from mindiffedit.images.reading import MAX_DOWNLOAD, MAX_PIXELS, load_image

# Extensions that can be written, with Pillow's name of the format. JPEG loses values, and many a WebP file has; masks
# must not.
PICTURE_FORMATS = {
    ".png": "PNG",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
}
# A picture is called small that has so many times fewer pixels than a model works at, at most: a quarter of what it was
# made for, as models work at up to one and a half times that.
SMALL_SHARE = 6
LOSSLESS_EXTENSIONS = (".png", ".bmp", ".tif", ".tiff")

# Arrays of a picture are in [0, 1] or [-1, 1]. Resampling may overshoot a little; 0..255 is far outside.
_LARGEST_ARRAY_VALUE = 1.5

__all__ = [
    "LOSSLESS_EXTENSIONS",
    "MAX_DOWNLOAD",
    "MAX_PIXELS",
    "PICTURE_FORMATS",
    "atomic_path",
    "check_output_path",
    "contact_sheet",
    "fit_mask",
    "fit_picture",
    "fitted_size",
    "grey_levels",
    "labelled_grid",
    "load_image",
    "make_image_grid",
    "mask_to_pil",
    "mask_values",
    "postprocess_image",
    "preprocess_image",
    "preprocess_mask",
    "restore_size",
    "save_image_atomically",
    "save_images_atomically",
    "to_rgb",
    "to_srgb",
]


# --- pictures to arrays and back -------------------------------------------------------------------


def preprocess_image(image, scale_factor: int, latent_channels: int = 4) -> np.ndarray:
    """Bring pictures of any accepted kind to what the VAE takes.

    Args:
        image: one of the following, or a list of them (all of one kind and one size):

            - PIL picture of any mode, made RGB in sRGB;
            - NumPy array (H, W, 3) or (B, H, W, 3), in [0, 1], or uint8 in 0..255;
            - MindSpore or PyTorch tensor (3, H, W) or (B, 3, H, W), same ranges;
            - latents, (B, latent_channels, h, w), as tensor or array, or (latent_channels, h, w) as tensor.
        scale_factor: pixels per latent; height and width go down to its next multiple, by Lanczos for PIL, by nearest
            neighbour for arrays.
        latent_channels: channels that tell latents from pictures.

    Returns:
        float32 (B, 3, H, W) in [-1, 1], or the latents as float32, otherwise untouched. Data with a negative
        value is taken to be in [-1, 1] already: a FutureWarning, and no normalisation. float16 and float64 are
        normalised in their own precision, as the reference does; bfloat16 in float32, where the reference rounds.

    Raises:
        ValueError: Another layout, sizes that differ in a list, a picture smaller than `scale_factor`, NaN or
            inf, or values that are neither in [0, 1] nor in [-1, 1], nor uint8.
        TypeError: Another type.
    """
    pictures = list(image) if isinstance(image, (list, tuple)) else [image]
    if len(pictures) == 0:
        raise InputError("{parameter} is an empty list; give at least one picture.", "image")
    if isinstance(pictures[0], PIL.Image.Image):
        return _preprocess_pil(pictures, scale_factor)

    tensors = is_tensor(pictures[0])
    if not tensors and not isinstance(pictures[0], np.ndarray):
        raise InputTypeError(
            "{parameter} has to be a PIL picture, an array, a tensor or a list of these, but is or holds {kind}.",
            "image",
            kind=type(pictures[0]).__name__,
        )
    batch = _stack(pictures, tensors)
    if batch.ndim == 4 and batch.shape[1] == latent_channels and (tensors or batch.shape[-1] != 3):
        if batch.dtype.kind != "f":
            raise InputError(
                "latents given as {parameter} have to be floating-point, but are {dtype}.", "image", dtype=batch.dtype
            )
        _check_finite_image(batch)
        return batch.astype(np.float32, copy=False)
    return _preprocess_batch(batch, tensors, scale_factor, latent_channels)


def _preprocess_pil(pictures: Sequence[PIL.Image.Image], scale_factor: int) -> np.ndarray:
    for picture in pictures:
        if not isinstance(picture, PIL.Image.Image):
            raise InputTypeError(
                "{parameter} is a list that mixes PIL pictures with {kind}; give pictures of one kind.",
                "image",
                kind=type(picture).__name__,
            )
    # E13: the reference squeezes all of a list into the size of the first.
    size, *others = [fitted_size(_readable(picture).size, scale_factor) for picture in pictures]
    if any(other != size for other in others):
        check_sizes(pictures)
    rows = []
    for picture in pictures:
        # B12: the reference takes the numbers of any profile for those of sRGB.
        resized = to_srgb(picture).resize(size, resample=PIL.Image.Resampling.LANCZOS)
        rows.append(np.asarray(resized).astype(np.float32) / 255.0)
    return 2.0 * np.ascontiguousarray(np.stack(rows).transpose(0, 3, 1, 2)) - 1.0


def check_sizes(pictures: Sequence[PIL.Image.Image]) -> None:
    """Raise an InputError where PIL pictures for one call are of different sizes."""
    sizes = [f"{picture.width} x {picture.height}" for picture in pictures]
    if len(set(sizes)) > 1:
        raise InputError(
            "{parameter} is a list of pictures of different sizes, {sizes}, and one call works at one size; call for "
            "each picture alone, or resize them to one size.",
            "image",
            sizes=_few(sizes),
        )


def _few(items: Sequence) -> str:
    """The first of the different items, for a message."""
    texts = list(dict.fromkeys(str(item) for item in items))
    return ", ".join(texts[:4]) + (", ..." if len(texts) > 4 else "")


def _readable(picture: PIL.Image.Image) -> PIL.Image.Image:
    if 0 in picture.size:
        raise InputError(
            "{parameter} is a picture of {width} x {height} pixels: there is nothing in it.",
            "image",
            width=picture.width,
            height=picture.height,
        )
    try:
        picture.load()
    except Exception as error:  # of a file that has not been read yet
        raise InputError(
            "{parameter} is truncated, damaged or closed: {why}.", "image", why=first_line(error)
        ) from error
    return picture


def _stack(pictures, tensors: bool) -> np.ndarray:
    """One array of a list of arrays or tensors: those with four dimensions are joined, the others stacked."""
    kind = "tensors" if tensors else "arrays"
    for picture in pictures:
        if is_tensor(picture) != tensors or not (tensors or isinstance(picture, np.ndarray)):
            raise InputTypeError(
                "{parameter} is a list that mixes {kind} with {other}; give pictures of one kind.",
                "image",
                kind=kind,
                other=type(picture).__name__,
            )
    arrays = [to_numpy(picture) for picture in pictures]
    layout = "(B, 3, H, W) or (3, H, W)" if tensors else "(B, H, W, 3) or (H, W, 3)"
    for array in arrays:
        if array.ndim not in (3, 4) or array.size == 0:
            raise InputError(
                "{parameter} given as {kind} has to be {layout}, but has shape {shape}.",
                "image",
                kind=kind,
                layout=layout,
                shape=array.shape,
            )
        if array.shape[-3:] != arrays[0].shape[-3:] or array.ndim != arrays[0].ndim:
            raise InputError(
                "{parameter} is a list of {kind} of different shapes, {first} and {other}; bring them to one size, or "
                "call for each alone.",
                "image",
                kind=kind,
                first=arrays[0].shape,
                other=array.shape,
            )
    return np.concatenate(arrays) if arrays[0].ndim == 4 else np.stack(arrays)


def _preprocess_batch(batch: np.ndarray, tensors: bool, scale_factor: int, latent_channels: int) -> np.ndarray:
    channels = batch.shape[1 if tensors else 3]
    if channels != 3:
        layout = "(B, 3, H, W)" if tensors else "(B, H, W, 3)"
        raise InputError(
            "{parameter} has to hold 3 channels in the layout {layout}, or be latents of shape (B, {channels}, h, w), "
            "but has shape {shape}.",
            "image",
            layout=layout,
            channels=latent_channels,
            shape=batch.shape,
        )
    _check_finite_image(batch)
    if batch.dtype == np.uint8:
        batch = batch.astype(np.float32) / 255.0
    elif batch.dtype.kind != "f":
        raise InputError(
            "{parameter} has to be float in [0, 1] or uint8 in 0..255, but is {dtype}.", "image", dtype=batch.dtype
        )
    elif np.abs(batch).max() > _LARGEST_ARRAY_VALUE:
        raise InputError(
            "{parameter} has to be in [0, 1] (or [-1, 1]), but has values from {least:g} to {most:g}; divide by 255, "
            "or give it as uint8.",
            "image",
            least=batch.min(),
            most=batch.max(),
        )
    batch = batch if tensors else np.ascontiguousarray(batch.transpose(0, 3, 1, 2))
    width, height = fitted_size((batch.shape[3], batch.shape[2]), scale_factor)
    rows = _nearest(batch.shape[2], height, batch.dtype)
    columns = _nearest(batch.shape[3], width, batch.dtype)
    batch = batch[:, :, rows][:, :, :, columns]
    if batch.min() < 0:
        warnings.warn(
            f"`image` has values from {batch.min():g} to {batch.max():g}: it is taken to be in [-1, 1] "
            f"already. Give pictures in [0, 1].",
            FutureWarning,
            stacklevel=3,
        )
    else:
        # In the array's own dtype, as the reference does; a Python float does not widen it.
        batch = 2.0 * batch - 1.0
    return batch.astype(np.float32, copy=False)


def _check_finite_image(batch: np.ndarray) -> None:
    if batch.dtype.kind == "f" and not np.isfinite(batch).all():
        raise InputError("{parameter} has NaN or infinite values; every value has to be finite.", "image")


def _nearest(length: int, wanted: int, dtype) -> np.ndarray:
    """Source index of each of `wanted` samples, as torch's "nearest" picks them for values of `dtype`.

    The position is rounded down after arithmetic in float64 for float64 values and in float32 for others; the
    two differ in some positions.
    """
    real = np.float64 if dtype == np.float64 else np.float32
    scale = real(length) / real(wanted)
    index = np.floor(np.arange(wanted, dtype=real) * scale).astype(np.int64)
    return np.minimum(index, length - 1)


def postprocess_image(image: np.ndarray, output_type: str = "pil", do_denormalize: list[bool] | None = None):
    """What a decoder gives, as the user wants it.

    Args:
        image: float (B, C, H, W).
        output_type: 'pil', 'np', or 'latent' (given back untouched).
        do_denormalize: for each picture whether it is brought from [-1, 1] to [0, 1] and clamped; None: all are.

    Returns:
        'pil': list of B pictures (mode L where C is 1); 'np': float32 (B, H, W, C).
    """
    if output_type == "latent":
        return image
    if output_type not in ("pil", "np"):
        raise InputError(
            "{parameter} has to be 'pil', 'np' or 'latent', but is {value!r}.", "output_type", value=output_type
        )
    image = to_numpy(image)
    if image.ndim != 4:
        raise InputError(
            "{parameter} to post-process has to be (B, C, H, W), but has shape {shape}.", "image", shape=image.shape
        )
    image = image.astype(np.float32, copy=False)
    if do_denormalize is not None and len(do_denormalize) != len(image):
        raise InputError(
            "{parameter} has {entries} entries for {count} pictures; give one for each.",
            "do_denormalize",
            entries=len(do_denormalize),
            count=len(image),
        )
    done = np.clip(image * np.float32(0.5) + np.float32(0.5), 0, 1)
    if do_denormalize is not None:
        done = np.stack([done[i] if wanted else image[i] for i, wanted in enumerate(do_denormalize)])
    done = np.ascontiguousarray(done.transpose(0, 2, 3, 1))
    return done if output_type == "np" else of_arrays(done)


def originals(image, count: int) -> np.ndarray:
    """The pictures that were given to an edit, (count, H, W, 3) float32 in [0, 1], at their own size.

    Pixels of 8 bits are exact: they come back the same when the result is made a picture of 8 bits.
    """
    if isinstance(image, PIL.Image.Image):
        image = [image]
    if isinstance(image, (list, tuple)) and isinstance(image[0], PIL.Image.Image):
        batch = np.stack([np.asarray(to_srgb(picture)) for picture in image])
    elif isinstance(image, (list, tuple)) and isinstance(image[0], np.ndarray) and image[0].ndim == 3:
        batch = np.stack(image)
    elif isinstance(image, np.ndarray):
        batch = image if image.ndim == 4 else image[None]
    else:
        batch = None
    if batch is not None and batch.dtype == np.uint8:
        batch = batch.astype(np.float32) / np.float32(255)
    if batch is None or batch.min() < 0:
        batch = (preprocess_image(image, 1).transpose(0, 2, 3, 1) + np.float32(1)) / np.float32(2)
    return np.concatenate([batch.astype(np.float32)] * (count // len(batch)))


def resized_arrays(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pictures (B, H, W, 3) float32 in [0, 1] brought to (height, width); untouched where they have it."""
    if images.shape[1:3] == tuple(size):
        return images
    resized = [restore_size(picture, (size[1], size[0])) for picture in of_arrays(images)]
    return np.stack([np.asarray(picture) for picture in resized]).astype(np.float32) / np.float32(255)


def of_arrays(images: np.ndarray) -> list[PIL.Image.Image]:
    """PIL pictures of (B, H, W, 1 or 3) in [0, 1]."""
    if not np.isfinite(images).all():
        raise InputError("a picture has NaN or infinite values and cannot become a PIL picture.")
    bytes_ = (images * 255).round().clip(0, 255).astype(np.uint8)
    return [PIL.Image.fromarray(row[:, :, 0] if row.shape[2] == 1 else row) for row in bytes_]


# --- masks -----------------------------------------------------------------------------------------


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
    values = _joined_masks(mask, name)
    if values.size == 0:
        raise InputError("{parameter} is empty: its shape is {shape}.", name, shape=values.shape)
    if values.ndim == 2:
        values = values[None, None]
    elif values.ndim == 3:
        values = values[:, None]
    elif values.ndim != 4:
        raise InputError(
            "{parameter} has to be (h, w), (B, h, w) or (B, 1, h, w), but has shape {shape}.", name, shape=values.shape
        )
    if values.shape[1] != 1:
        raise InputError(
            "{parameter} must have 1 channel, but has {channels} channels; give (h, w), (B, h, w) or (B, 1, h, w).",
            name,
            channels=values.shape[1],
        )
    if batch_size is not None and values.shape[0] not in (1, batch_size):
        channels_last = values.shape[-1] in (1, 3, 4) and values.shape[1] == 1
        raise InputError(
            "{parameter} with batch size {count} cannot be broadcasted to batch size {batch} inferred by prompt "
            "inputs; give one mask, (h, w), or one for each picture, (B, h, w){hint}.",
            name,
            count=values.shape[0],
            batch=batch_size,
            hint="; of (h, w, channels) give one channel, mask[:, :, 0]" if channels_last else "",
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


def _joined_masks(mask, name: str) -> np.ndarray:
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
    if not all(array.dtype.kind in "fbiu" for array in arrays):
        raise InputTypeError("{parameter} has to hold numbers, but is of dtype {dtype}.", name, dtype=arrays[0].dtype)
    if not isinstance(mask, (list, tuple)):
        return arrays[0]
    if any(a.ndim != arrays[0].ndim or a.shape[1:] != arrays[0].shape[1:] for a in arrays) or (
        arrays[0].ndim < 3 and any(a.shape != arrays[0].shape for a in arrays)
    ):
        shapes = _few([a.shape for a in arrays])
        raise InputError(
            "{parameter} is a list of masks of different shapes: {shapes}; bring them to one size.", name, shapes=shapes
        )
    return np.stack(arrays) if arrays[0].ndim < 3 else np.concatenate(arrays)


def mask_to_pil(mask) -> list[PIL.Image.Image]:
    """Masks (B, h, w) or (h, w) of 0 to 1 as a list of B pictures of mode L, 0 (black) to 255 (white)."""
    mask = to_numpy(mask)
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3:
        raise InputError("{parameter} has to be (B, h, w) or (h, w), but has shape {shape}.", "mask", shape=mask.shape)
    return [PIL.Image.fromarray(np.round(row * 255.0).clip(0, 255).astype(np.uint8)) for row in mask]


# --- sizes -----------------------------------------------------------------------------------------


def fitted_size(size: tuple[int, int], scale_factor: int) -> tuple[int, int]:
    """(width, height) brought down to the next multiples of `scale_factor`, as the reference does.

    Raises ValueError where one of them is smaller than `scale_factor`: nothing would be left.
    """
    width, height = (side - side % scale_factor for side in size)
    if width < 1 or height < 1:
        raise InputError(
            "a picture of {width} x {height} pixels is too small: width and height have to be at least {least}; "
            "enlarge it.",
            "image",
            width=size[0],
            height=size[1],
            least=scale_factor,
        )
    return width, height


def fit_picture(
    picture: PIL.Image.Image, scale_factor: int, max_pixels: int | None = None
) -> tuple[PIL.Image.Image, str | None]:
    """Resize a picture to a size the model can take.

    Args:
        picture: PIL picture in RGB.
        scale_factor: pixels per latent; both sides become multiples of it.
        max_pixels: pictures of more pixels are scaled down to about that many, in their own proportions. Of those
            with a sixth of it or less the notice says that they are small.

    Returns:
        (picture, notice): the notice says what was done or should be done, or is None where the size is right.
    """
    width, height = picture.size
    small = ""
    if max_pixels is not None and width * height * SMALL_SHARE <= max_pixels:
        # To a little less than what the model was made for, which is two thirds of the most.
        enlarge = (0.6 * max_pixels / (width * height)) ** 0.5
        small = (
            f", far below what it was made for, and draws little of use there; enlarge the picture first, to about "
            f"{round(width * enlarge)} x {round(height * enlarge)}"
        )
    if max_pixels is not None and width * height > max_pixels:
        shrink = (max_pixels / (width * height)) ** 0.5
        width, height = (max(scale_factor, round(side * shrink)) for side in (width, height))
    size = fitted_size((width, height), scale_factor)
    notice = (
        f"the picture is {picture.width} x {picture.height}; the model works on it at {size[0]} x {size[1]}{small}."
    )
    if size == picture.size:
        return picture, notice if small else None
    return picture.resize(size, resample=PIL.Image.Resampling.LANCZOS), notice


def restore_size(picture: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image:
    """A result at the size (width, height) of its picture; masks (modes L and 1) stay black and white."""
    if picture.size == tuple(size):
        return picture
    nearest = picture.mode in ("L", "1")
    resample = PIL.Image.Resampling.NEAREST if nearest else PIL.Image.Resampling.LANCZOS
    return picture.resize(tuple(size), resample=resample)


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
    binary = preprocess_mask(mask)[0, 0]
    share = PIL.Image.fromarray(binary).resize(tuple(latent_size), resample=PIL.Image.Resampling.BOX)
    return preprocess_mask(np.clip(np.asarray(share), 0, 1))


# --- several pictures in one -----------------------------------------------------------------------


def make_image_grid(images: list[PIL.Image.Image], rows: int, cols: int, resize: int | None = None) -> PIL.Image.Image:
    """One RGB picture of `rows` × `cols` pictures, row by row.

    Args:
        images: rows * cols pictures; tiles have the size of the first.
        rows: number of rows.
        cols: number of columns.
        resize: make each picture a square of this side first, in pixels.

    Returns:
        The picture.

    Raises:
        ValueError: The count does not fill the grid.
    """
    if len(images) != rows * cols or len(images) == 0:
        raise InputError(
            "{count} pictures do not fill a grid of {height} rows and {width} columns.",
            "images",
            count=len(images),
            height=rows,
            width=cols,
        )
    if resize is not None:
        images = [image.resize((resize, resize)) for image in images]
    width, height = images[0].size
    grid = PIL.Image.new("RGB", size=(cols * width, rows * height))
    for i, image in enumerate(images):
        grid.paste(image, box=(i % cols * width, i // cols * height))
    return grid


def labelled_grid(items: Sequence[tuple[str, PIL.Image.Image]], smallest_side: int = 256) -> PIL.Image.Image:
    """Pictures side by side, each under its caption.

    Args:
        items: (caption, picture) pairs; all tiles get the size of the first picture.
        smallest_side: where that size has a side below this many pixels, tiles are enlarged by a whole factor,
            so that captions can be read.
    """
    if len(items) == 0:
        raise InputError("there is no picture to put into the grid; give at least one.", "items")
    width, height = items[0][1].size
    factor = max(1, -(-smallest_side // min(width, height)))
    width, height = width * factor, height * factor
    font_size = int(np.clip(width // 16, 12, 40))
    font = _font(font_size)
    line_height, gap = round(font_size * 1.35), max(4, font_size // 3)
    captions = [_wrapped(caption, font, width - 2 * gap) for caption, _ in items]
    strip = max(len(lines) for lines in captions) * line_height + 2 * gap

    border = max(4, width // 64)
    grid = PIL.Image.new("RGB", (len(items) * (width + border) + border, strip + height + border), "white")
    pen = PIL.ImageDraw.Draw(grid)
    for i, ((_, picture), lines) in enumerate(zip(items, captions)):
        left = border + i * (width + border)
        _write_lines(pen, lines, font, left, gap, width, line_height)
        grid.paste(_tile(picture, (width, height)), (left, strip))
    return grid


def contact_sheet(
    rows: Sequence[Sequence[PIL.Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    corner: str | None = None,
    title: str | None = None,
    smallest_side: int = 96,
) -> PIL.Image.Image:
    """A table of pictures, such as the results over two options, with a label for each row and each column.

    Args:
        rows: list of lists of PIL pictures, all of one length; every cell gets the size of the first picture.
        row_labels: texts at the left and on top.
        column_labels: as `row_labels`.
        corner: text over the row labels, such as what rows and columns are; None: nothing.
        title: text over everything; None: nothing.
        smallest_side: where the first picture has a side below this many pixels, cells are enlarged by a whole
            factor.

    Returns:
        PIL picture in RGB. Texts that do not fit in four lines are cut off.

    Raises:
        ValueError: No picture, rows of different lengths, another number of labels than of rows or columns,
            more than `MAX_PIXELS` pixels in all.
        TypeError: A cell is no PIL picture.
    """
    rows = [list(row) for row in rows]
    columns = len(rows[0]) if rows else 0
    if columns == 0:
        raise InputError("there is no picture to put into the contact sheet; give at least one row of one.", "rows")
    if any(len(row) != columns for row in rows):
        lengths = _few([len(row) for row in rows])
        raise InputError(
            "the rows of the contact sheet have {lengths} pictures; give each as many.", "rows", lengths=lengths
        )
    for what, labels, count in (("row", row_labels, len(rows)), ("column", column_labels, columns)):
        if isinstance(labels, str) or len(labels) != count:
            raise InputError(
                "the contact sheet has {count} {what}s, but {labels!r} as {parameter}; give {count}.",
                f"{what}_labels",
                count=count,
                what=what,
                labels=labels,
            )
    for picture in (picture for row in rows for picture in row):
        if not isinstance(picture, PIL.Image.Image):
            raise InputTypeError(
                "cells of a contact sheet are PIL pictures, but one is {kind}.", "rows", kind=type(picture).__name__
            )
        if 0 in picture.size:
            raise InputError(
                "a cell of the contact sheet is {width} x {height} pixels; leave it out.",
                "rows",
                width=picture.width,
                height=picture.height,
            )

    width, height = rows[0][0].size
    factor = max(1, -(-smallest_side // min(width, height)))
    width, height = width * factor, height * factor
    font_size = int(np.clip(width // 10, 12, 32))
    font = _font(font_size)
    line_height, gap = round(font_size * 1.35), max(4, font_size // 3)
    texts = [str(text) for text in (*row_labels, corner or "")]
    left = int(np.ceil(max(_length(font, text) for text in texts))) + 2 * gap
    left = min(left, max(width, 8 * font_size))
    full_width, border = left + columns * (width + gap), gap
    heading = _wrapped(title, font, full_width - 2 * gap) if title else []
    tops = [_wrapped(str(label), font, width) for label in column_labels]
    cornered = _wrapped(corner, font, left - 2 * gap) if corner else []
    band = max(len(lines) for lines in (*tops, cornered)) * line_height + 2 * gap
    above = len(heading) * line_height + (gap if heading else 0)
    size = (full_width, above + band + len(rows) * (height + border))
    if size[0] * size[1] > MAX_PIXELS:
        raise InputError(
            "the contact sheet would be {width} x {height} pixels; at most {most} pixels are drawn: give fewer or "
            "smaller pictures.",
            "rows",
            width=size[0],
            height=size[1],
            most=MAX_PIXELS,
        )

    sheet = PIL.Image.new("RGB", size, "white")
    pen = PIL.ImageDraw.Draw(sheet)
    _write_lines(pen, heading, font, gap, gap, full_width - 2 * gap, line_height)
    _write_lines(pen, cornered, font, gap, above + gap, left - 2 * gap, line_height)
    for column, lines in enumerate(tops):
        _write_lines(pen, lines, font, left + column * (width + gap), above + gap, width, line_height)
    for i, (label, row) in enumerate(zip(row_labels, rows)):
        top = above + band + i * (height + border)
        lines = _wrapped(str(label), font, left - 2 * gap)
        middle = top + max(0, (height - len(lines) * line_height) // 2)
        _write_lines(pen, lines, font, gap, middle, left - 2 * gap, line_height)
        for column, picture in enumerate(row):
            sheet.paste(_tile(picture, (width, height)), (left + column * (width + gap), top))
    return sheet


def _tile(picture: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image:
    """A picture to be part of another, which has no profile: in sRGB. Masks keep their edges."""
    if picture.mode not in ("L", "1"):
        picture = to_srgb(picture)
    return to_srgb(restore_size(picture, size))


def _write_lines(pen, lines: Sequence[str], font, left: int, top: int, width: int, line_height: int) -> None:
    """Lines of text under one another, each in the middle of `width` pixels."""
    for number, line in enumerate(lines):
        x = left + (width - _length(font, line)) / 2
        pen.text((x, top + number * line_height), line, fill="black", font=font)


def _font(size: int):
    try:
        return PIL.ImageFont.load_default(size=size)
    except (TypeError, OSError, ImportError):  # older Pillow, or one without FreeType: one small bitmap font
        return PIL.ImageFont.load_default()


def _wrapped(text: str, font, width: int, most: int = 4) -> list[str]:
    """`text` in at most `most` lines no wider than `width` pixels; what does not fit ends in dots."""
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and _length(font, longer) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    lines = [*lines, line]
    if len(lines) > most:
        lines = [*lines[: most - 1], " ".join(lines[most - 1 :])]
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font, width: int) -> str:
    if _length(font, line) <= width:
        return line
    kept, most = 0, len(line)
    while kept < most:  # bisection: prompts can be thousands of characters long
        middle = (kept + most + 1) // 2
        if _length(font, line[:middle] + "...") <= width:
            kept = middle
        else:
            most = middle - 1
    return line[:kept].rstrip() + "..."


def _length(font, text: str) -> float:
    try:
        return font.getlength(text)
    except UnicodeError:  # the bitmap font knows Latin-1 only
        return font.getlength(text.encode("latin-1", "replace").decode("latin-1"))


# --- writing ---------------------------------------------------------------------------------------


def check_output_path(path, extensions: Sequence[str] | None = None) -> Path:
    """Check that a file can be written at `path`, before the long work that will fill it.

    Args:
        path: str or path. Its folder has to exist.
        extensions: accepted extensions, with the dot; None means those of pictures.

    Returns:
        The path.

    Raises:
        InputError: The folder is missing or no file can be written there, the path is a folder, or the extension is
            none of the accepted.
    """
    path = Path(path)
    accepted = tuple(PICTURE_FORMATS) if extensions is None else tuple(extensions)
    if path.is_dir():
        raise InputError(
            "{path} is a folder; give the name of a file to write, ending in {ending}.",
            "output",
            path=path,
            ending=accepted[0],
        )
    if path.suffix.lower() not in accepted:
        raise InputError(
            "{path}: the name of the output has to end in {endings}.",
            "output",
            path=path,
            endings=" or ".join(accepted),
        )
    folder = path.parent
    if not folder.is_dir():
        raise InputError(
            "the folder {folder} of the output {name} does not exist; create it first.",
            "output",
            folder=folder,
            name=path.name,
        )
    check_writable(folder, f"the output {path.name}")
    return path


def check_writable(folder: Path, what: str) -> None:
    """Raise a ValueError, naming what is to be written, where no file can be made in an existing folder."""
    try:
        # Tried, not asked for: a read-only file system or a full one refuses those as well who may write everywhere.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            "no file can be written in the folder {folder} of {what} ({reason}); give another place.",
            "output",
            folder=folder,
            what=what,
            reason=first_line(error),
        ) from error


@contextlib.contextmanager
def atomic_path(path) -> Iterator[Path]:
    """Write a file whole or not at all.

    Gives the path of a new, empty file in the same folder to write to. When the block ends well that file
    takes the place of `path`; when it ends in any exception it is removed and `path` is as it was.
    """
    target = Path(os.path.realpath(path))  # a link keeps pointing where it points
    number = 0
    while True:
        draft = target.with_name(f".{target.stem[:100]}.{os.getpid()}-{number}{target.suffix}")
        try:
            # Not tempfile: the result should have the permissions that any new file gets.
            os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            break
        except FileExistsError:
            number += 1
    mode = os.stat(draft).st_mode & 0o777
    try:
        yield draft
        os.chmod(draft, mode)  # some writers put a file of their own, for the owner alone, in the draft's place
        os.replace(draft, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)


def save_image_atomically(image: PIL.Image.Image, path) -> None:
    """Write one picture, whole or not at all; the extension of `path` says the format."""
    save_images_atomically({path: image})


def save_images_atomically(images: dict[str | os.PathLike, PIL.Image.Image]) -> None:
    """Write pictures by path: all are encoded before the first takes its place; a failure leaves none.

    A picture's colour profile, its EXIF data (without their preview, which shows the picture before) and its pixels per
    inch go with it, where the format has room for them. What the format cannot hold otherwise is left out, as
    `fit_format` says.
    """
    paths = {check_output_path(path): image for path, image in images.items()}
    with contextlib.ExitStack() as drafts:
        for path, image in paths.items():
            kind = format_of(path)
            image, _ = fit_format(image, kind)
            image.save(drafts.enter_context(atomic_path(path)), format=kind, **_options(image, kind))


def format_of(path) -> str:
    """Pillow's name of the format that a path's extension says."""
    return PICTURE_FORMATS[Path(path).suffix.lower()]


def _options(picture: PIL.Image.Image, kind: str) -> dict[str, Any]:
    """What goes with a picture into its file."""
    options: dict[str, Any] = {}
    if kind == "JPEG":
        # The finest: what is outside a mask should be as it came, and at 95 it is off by up to 20 levels of 255.
        options = {"quality": 100, "subsampling": 0}
    elif kind == "WEBP":
        options = {"lossless": True, "exact": True}  # exact: also where it is transparent
    elif kind == "BMP":
        return options
    info = picture.info
    if info.get("icc_profile"):
        options["icc_profile"] = info["icc_profile"]
    with contextlib.suppress(Exception), warnings.catch_warnings():  # damaged EXIF data
        warnings.simplefilter("ignore")
        exif = PIL.Image.Exif()
        exif.load(info.get("exif", b""))
        written = exif.tobytes()  # without the preview
        if len(exif) and len(written) < 65000:  # what a JPEG has room for
            options["exif"] = written
    with contextlib.suppress(TypeError, ValueError):
        dots = tuple(float(number) for number in info.get("dpi", ()))
        if len(dots) == 2 and all(1 < number <= 65535 for number in dots):
            options["dpi"] = dots
    if kind == "PNG" and info.get("gamma") and "icc_profile" not in options:
        chunks = PIL.PngImagePlugin.PngInfo()
        chunks.add(b"gAMA", struct.pack(">I", round(info["gamma"] * 100000)))
        options["pnginfo"] = chunks
    return options
