"""Pictures of any kind ⇄ the arrays that models take and give, and their sizes.

Nothing here knows a model. `reading` has what comes from files and URLs, `writing` what goes there, `colours` what a
picture has beside the colours that models see, `sheets` several pictures in one. Arrays that go to a model are float32
with channels first, (B, C, H, W), in [-1, 1].
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import PIL.Image

from mindiffedit.arrays import is_tensor, to_numpy
from mindiffedit.errors import InputError, InputTypeError
from mindiffedit.images.colours import to_srgb

# A picture is called small that has so many times fewer pixels than a model works at, at most: a quarter of what it was
# made for, as models work at up to one and a half times that.
SMALL_SHARE = 6
# Arrays of a picture are in [0, 1] or [-1, 1]. Resampling may overshoot a little; 0..255 is far outside.
MAX_ARRAY_VALUE = 1.5

__all__ = [
    "at_most",
    "check_sizes",
    "fit_picture",
    "fitted_size",
    "mask_to_pil",
    "of_arrays",
    "originals",
    "postprocess_image",
    "preprocess_image",
    "resized_arrays",
    "restore_size",
    "working_size",
]


# --- to a model ------------------------------------------------------------------------------------


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
    kind = _kind_of(pictures[0])
    for picture in pictures:
        if _kind_of(picture) != kind:
            raise InputTypeError(
                "{parameter} is a list that mixes {kind} with {other}; give pictures of one kind.",
                "image",
                kind=kind,
                other=type(picture).__name__,
            )
    if kind == "PIL pictures":
        return _preprocess_pil(pictures, scale_factor)

    tensors = kind == "tensors"
    batch = _stacked(pictures, kind)
    if batch.dtype.kind == "f" and not np.isfinite(batch).all():
        raise InputError("{parameter} has NaN or infinite values; every value has to be finite.", "image")
    if batch.ndim == 4 and batch.shape[1] == latent_channels and (tensors or batch.shape[-1] != 3):
        if batch.dtype.kind != "f":
            raise InputError(
                "latents given as {parameter} have to be floating-point, but are {dtype}.", "image", dtype=batch.dtype
            )
        return batch.astype(np.float32, copy=False)
    return _preprocess_batch(batch, tensors, scale_factor, latent_channels)


def _kind_of(picture) -> str:
    if isinstance(picture, PIL.Image.Image):
        return "PIL pictures"
    if isinstance(picture, np.ndarray):
        return "arrays"
    if is_tensor(picture):
        return "tensors"
    raise InputTypeError(
        "{parameter} has to be a PIL picture, an array, a tensor or a list of these, but is or holds {kind}.",
        "image",
        kind=type(picture).__name__,
    )


def _preprocess_pil(pictures: Sequence[PIL.Image.Image], scale_factor: int) -> np.ndarray:
    # E13: the reference squeezes all of a list into the size of the first.
    size, *others = [fitted_size(_readable(picture).size, scale_factor) for picture in pictures]
    if any(other != size for other in others):
        check_sizes(pictures)
    # B12: the reference takes the numbers of any profile for those of sRGB.
    resized = [to_srgb(picture).resize(size, resample=PIL.Image.Resampling.LANCZOS) for picture in pictures]
    batch = np.stack([np.asarray(picture) for picture in resized]).astype(np.float32) / 255.0
    return 2.0 * np.ascontiguousarray(batch.transpose(0, 3, 1, 2)) - 1.0


def check_sizes(pictures: Sequence[PIL.Image.Image]) -> None:
    """Raise an InputError where PIL pictures for one call are of different sizes."""
    sizes = [f"{picture.width} x {picture.height}" for picture in pictures]
    if len(set(sizes)) > 1:
        raise InputError(
            "{parameter} is a list of pictures of different sizes, {sizes}, and one call works at one size; call for "
            "each picture alone, or resize them to one size.",
            "image",
            sizes=few(sizes),
        )


def few(items: Sequence) -> str:
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
        why = " ".join(str(error).split()).rstrip(".")[:300]
        raise InputError("{parameter} is truncated, damaged or closed: {why}.", "image", why=why) from error
    return picture


def _stacked(pictures: Sequence, kind: str) -> np.ndarray:
    """One array of a list of arrays or tensors: those with four dimensions are joined, the others stacked."""
    arrays = [to_numpy(picture) for picture in pictures]
    for array in arrays:
        if array.ndim not in (3, 4) or array.size == 0:
            raise InputError(
                "{parameter} given as {kind} has to be {layout}, but has shape {shape}.",
                "image",
                kind=kind,
                layout="(B, 3, H, W) or (3, H, W)" if kind == "tensors" else "(B, H, W, 3) or (H, W, 3)",
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
    if batch.shape[1 if tensors else 3] != 3:
        raise InputError(
            "{parameter} has to hold 3 channels in the layout {layout}, or be latents of shape (B, {channels}, h, w), "
            "but has shape {shape}.",
            "image",
            layout="(B, 3, H, W)" if tensors else "(B, H, W, 3)",
            channels=latent_channels,
            shape=batch.shape,
        )
    if batch.dtype == np.uint8:
        batch = batch.astype(np.float32) / 255.0
    elif batch.dtype.kind != "f":
        raise InputError(
            "{parameter} has to be float in [0, 1] or uint8 in 0..255, but is {dtype}.", "image", dtype=batch.dtype
        )
    elif np.abs(batch).max() > MAX_ARRAY_VALUE:
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


def _nearest(length: int, wanted: int, dtype) -> np.ndarray:
    """Source index of each of `wanted` samples, as torch's "nearest" picks them for values of `dtype`.

    The position is rounded down after arithmetic in float64 for float64 values and in float32 for others; the
    two differ in some positions.
    """
    real: type[np.floating] = np.float64 if dtype == np.float64 else np.float32
    scale = real(length) / real(wanted)
    index = np.floor(np.arange(wanted, dtype=real) * scale).astype(np.int64)
    return np.minimum(index, length - 1)


# --- from a model ----------------------------------------------------------------------------------


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
    pixels = np.clip(image * np.float32(0.5) + np.float32(0.5), 0, 1)
    if do_denormalize is not None:
        pixels = np.where(np.reshape(do_denormalize, (-1, 1, 1, 1)), pixels, image)
    pixels = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    return pixels if output_type == "np" else of_arrays(pixels)


def of_arrays(images: np.ndarray) -> list[PIL.Image.Image]:
    """PIL pictures of (B, H, W, 1 or 3) in [0, 1]."""
    if not np.isfinite(images).all():
        raise InputError("a picture has NaN or infinite values and cannot become a PIL picture.")
    levels = (images * 255).round().clip(0, 255).astype(np.uint8)
    return [PIL.Image.fromarray(row[:, :, 0] if row.shape[2] == 1 else row) for row in levels]


def mask_to_pil(mask) -> list[PIL.Image.Image]:
    """Masks (B, h, w) or (h, w) of 0 to 1 as a list of B pictures of mode L, 0 (black) to 255 (white)."""
    mask = to_numpy(mask)
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3:
        raise InputError("{parameter} has to be (B, h, w) or (h, w), but has shape {shape}.", "mask", shape=mask.shape)
    return [PIL.Image.fromarray(np.round(row * 255.0).clip(0, 255).astype(np.uint8)) for row in mask]


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


# --- sizes -----------------------------------------------------------------------------------------


def fitted_size(size: tuple[int, int], scale_factor: int) -> tuple[int, int]:
    """(width, height) brought down to the next multiples of `scale_factor`, as the reference does.

    Raises an InputError where one of them is smaller than `scale_factor`: nothing would be left.
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
    size = working_size((width, height), scale_factor, max_pixels)
    notice = (
        f"the picture is {picture.width} x {picture.height}; the model works on it at {size[0]} x {size[1]}{small}."
    )
    if size == picture.size:
        return picture, notice if small else None
    return picture.resize(size, resample=PIL.Image.Resampling.LANCZOS), notice


def working_size(size: tuple[int, int], scale_factor: int, max_pixels: int | None = None) -> tuple[int, int]:
    """The size (width, height) that `fit_picture` brings a picture of this size to."""
    width, height = size
    if max_pixels is not None and width * height > max_pixels:
        shrink = (max_pixels / (width * height)) ** 0.5
        width, height = (max(scale_factor, round(side * shrink)) for side in (width, height))
    return fitted_size((width, height), scale_factor)


def at_most(picture: PIL.Image.Image, side: int) -> PIL.Image.Image:
    """A picture whose longer side has at most so many pixels: itself, or made smaller."""
    factor = side / max(picture.size)
    if factor >= 1:
        return picture
    width, height = (max(1, round(length * factor)) for length in picture.size)
    return picture.resize((width, height), resample=PIL.Image.Resampling.LANCZOS)


def restore_size(picture: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image:
    """A result at the size (width, height) of its picture; masks (modes L and 1) stay black and white."""
    if picture.size == tuple(size):
        return picture
    nearest = picture.mode in ("L", "1")
    resample = PIL.Image.Resampling.NEAREST if nearest else PIL.Image.Resampling.LANCZOS
    return picture.resize(size, resample=resample)


def resized_arrays(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pictures (B, H, W, 3) float32 in [0, 1] brought to (height, width); untouched where they have it."""
    if images.shape[1:3] == tuple(size):
        return images
    resized = [restore_size(picture, (size[1], size[0])) for picture in of_arrays(images)]
    return np.stack([np.asarray(picture) for picture in resized]).astype(np.float32) / np.float32(255)
