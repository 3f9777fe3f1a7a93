"""Pictures and masks, in and out: files, URLs, PIL pictures and arrays of any framework ⇄ NumPy arrays.

Nothing here knows a model. Arrays that go to a model are float32 with channels first, (B, C, H, W); pictures
are in [-1, 1], masks are 0 or 1 and 1 means "change here".
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import PIL.ImageOps

# A header may promise any size; nothing is decoded above this many pixels (8192 × 8192; 192 MiB as RGB).
MAX_PIXELS = 8192 * 8192
# What a URL may send, in bytes, and how many seconds one answer and the whole picture may take.
MAX_DOWNLOAD = 64 * 2**20
URL_TIMEOUT = 30.0
DOWNLOAD_TIMEOUT = 120.0

# Extensions that can be written, with Pillow's name of the format. JPEG and WebP lose values, masks must not.
PICTURE_FORMATS = {
    ".png": "PNG",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
}
LOSSLESS_EXTENSIONS = (".png", ".bmp", ".tif", ".tiff")

# Formats whose further "frames" are previews, gain maps or layers; the first one is the whole still picture.
_STILL_FORMATS = ("MPO", "PSD")
# Formats that Pillow hands to another program to draw.
_REFUSED_FORMATS = ("EPS", "WMF")
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
    "to_numpy",
    "to_rgb",
]


# --- arrays of other frameworks --------------------------------------------------------------------


def is_tensor(value) -> bool:
    """True for a MindSpore or PyTorch tensor, known by its methods: neither framework is imported for it."""
    return hasattr(value, "asnumpy") or (hasattr(value, "detach") and hasattr(value, "numpy"))


def to_numpy(value) -> np.ndarray:
    """`value` as a NumPy array of the same shape; an array comes back as it is, not copied.

    Args:
        value: NumPy array, MindSpore tensor, PyTorch tensor (of any device, with or without gradient), or what
            `numpy.asarray` takes. bfloat16, which NumPy does not have, becomes float32.
    """
    if isinstance(value, np.ndarray):
        return value
    if not is_tensor(value):
        return np.asarray(value)
    if hasattr(value, "detach") and not hasattr(value, "asnumpy"):
        value = value.detach().cpu()
    if "bfloat16" in str(value.dtype).lower():
        value = value.float()
    return value.asnumpy() if hasattr(value, "asnumpy") else value.numpy()


# --- reading ---------------------------------------------------------------------------------------


def load_image(
    image: Union[str, os.PathLike, PIL.Image.Image],
    convert_method: Optional[Callable[[PIL.Image.Image], PIL.Image.Image]] = None,
) -> PIL.Image.Image:
    """Load one still picture, upright (EXIF orientation applied) and in RGB.

    Args:
        image: path, http(s) URL or PIL picture.
        convert_method: called with the upright picture in its own mode, in place of the conversion to RGB.

    Returns:
        PIL picture, fully decoded. Transparency is dropped as `PIL.Image.convert("RGB")` drops it, so the colours
        stored under it show. 16-bit greyscale is scaled to 8 bits, not clipped.

    Raises:
        ValueError: The picture is missing, empty, truncated, no picture, animated, zero-sized or above
            `MAX_PIXELS`, or the URL does not answer, answers with an error, or sends more than `MAX_DOWNLOAD`
            bytes.
    """
    if isinstance(image, PIL.Image.Image):
        picture = _upright(image, "the picture")
    elif isinstance(image, str) and image.startswith(("http://", "https://")):
        picture = _decode(io.BytesIO(_download(image)), image)
    elif isinstance(image, (str, os.PathLike)):
        picture = _load_file(image)
    else:
        raise ValueError(
            f"a picture has to be a path, an http(s) URL or a PIL picture, but is {type(image).__name__}."
        )
    return to_rgb(picture) if convert_method is None else convert_method(picture)


def _load_file(path) -> PIL.Image.Image:
    name = os.fspath(path)
    if os.path.isdir(name):
        raise ValueError(f"{name} is a folder; give the path of one picture.")
    if not os.path.isfile(name):
        raise ValueError(f"there is no picture {name}; give the path of a file or an http(s) URL.")
    try:
        stream = open(name, "rb")
    except OSError as error:
        raise ValueError(f"{name} cannot be opened: {error.strerror or error}.") from error
    with stream:
        return _decode(stream, name)


def _decode(stream, name: str) -> PIL.Image.Image:
    """Decode a binary stream into an upright picture, after its header has been judged."""
    if not stream.read(1):
        raise ValueError(f"{name} is an empty file, not a picture.")
    stream.seek(0)
    with warnings.catch_warnings():
        # Pillow warns from half of its own limit on; ours is lower and an error.
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        try:
            picture = PIL.Image.open(stream)
        except PIL.UnidentifiedImageError as error:
            raise ValueError(f"{name} is not a picture in a format that Pillow reads.") from error
        except PIL.Image.DecompressionBombError as error:
            raise ValueError(
                f"{name} claims to be a picture of far more than {MAX_PIXELS} pixels and was not decoded."
            ) from error
        except Exception as error:  # a damaged header makes Pillow raise nearly anything
            raise ValueError(f"{name} cannot be read as a picture: {_sentence(error)}.") from error
        _check_header(picture, name)
        try:
            picture.load()
        except Exception as error:
            raise ValueError(f"{name} is truncated or damaged: {_sentence(error)}.") from error
        return _upright(picture, name)


def _check_header(picture: PIL.Image.Image, name: str) -> None:
    width, height = picture.size
    if picture.format in _REFUSED_FORMATS:
        raise ValueError(f"{name} is a {picture.format} drawing; give a picture of pixels, such as a PNG.")
    if width < 1 or height < 1:
        raise ValueError(f"{name} is {width} x {height} pixels: there is nothing in it.")
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{name} claims to be {width} x {height} pixels and was not decoded: at most {MAX_PIXELS} pixels "
            f"are read. Scale it down first."
        )
    try:
        animated = picture.format not in _STILL_FORMATS and getattr(picture, "is_animated", False)
    except Exception as error:  # looking for a second frame reads on, into what may be damaged
        raise ValueError(f"{name} is truncated or damaged: {_sentence(error)}.") from error
    if animated:
        raise ValueError(f"{name} is animated or has several pages; give one still picture.")


def _upright(picture: PIL.Image.Image, name: str) -> PIL.Image.Image:
    if 0 in picture.size:
        raise ValueError(f"{name} is {picture.width} x {picture.height} pixels: there is nothing in it.")
    try:
        return PIL.ImageOps.exif_transpose(picture)
    except Exception as error:  # a PIL picture may still be an unread, damaged file
        raise ValueError(f"{name} is truncated or damaged: {_sentence(error)}.") from error


def _download(url: str) -> bytes:
    """The bytes behind an http(s) URL, at most `MAX_DOWNLOAD` of them."""
    import http.client
    import urllib.request
    from urllib.parse import urlsplit

    too_much = f"{url} sends more than {MAX_DOWNLOAD} bytes; download the picture and give its path."
    try:
        # Some servers refuse urllib's own name.
        request = urllib.request.Request(url, headers={"User-Agent": "mindiffedit"})
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as answer:
            if urlsplit(answer.url).scheme not in ("http", "https"):
                raise ValueError(f"{url} leads to {answer.url}, which is not http(s).")
            promised = answer.headers.get("Content-Length", "")
            if promised.isdigit() and int(promised) > MAX_DOWNLOAD:
                raise ValueError(too_much)
            start, data = time.monotonic(), bytearray()
            while chunk := answer.read1(2**16):
                data += chunk
                if len(data) > MAX_DOWNLOAD:
                    raise ValueError(too_much)
                if time.monotonic() - start > DOWNLOAD_TIMEOUT:
                    raise ValueError(f"{url} has not sent its picture in {DOWNLOAD_TIMEOUT:.0f} seconds.")
            if promised.isdigit() and len(data) < int(promised):
                raise ValueError(f"{url} broke off after {len(data)} of {promised} bytes.")
            return bytes(data)
    except (OSError, http.client.HTTPException) as error:  # URLError, HTTPError and timeouts are OSErrors
        why = getattr(error, "reason", None) or error
        raise ValueError(f"{url} cannot be fetched: {_sentence(why)}.") from error


def _sentence(error) -> str:
    """What an error says, on one line and without a full stop."""
    text = " ".join(str(error).split())
    return text.rstrip(".")[:300] or type(error).__name__


def to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """`picture` in mode RGB, 8 bits each.

    Palettes and every 8-bit mode go through `PIL.Image.convert`. Wide greyscale is brought to 8 bits: modes
    I;16* are 0..65535; mode I is taken as 0..255 where no value is larger, as 0..65535 otherwise.

    Raises:
        ValueError: Mode I with values outside 0..65535, mode F (its range is unknown), or a mode Pillow
            cannot convert.
    """
    if picture.mode == "RGB":
        return picture
    picture = _eight_bits(picture)
    if "transparency" in picture.info and picture.mode == "P":
        # Straight to RGB gives the same pixels, with a warning from Pillow.
        picture = picture.convert("RGBA")
    try:
        return picture.convert("RGB")
    except (ValueError, OSError) as error:
        why = _sentence(error)
        raise ValueError(f"a picture of mode {picture.mode} cannot be made RGB: {why}.") from error


def _eight_bits(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Wide greyscale as mode L; any other picture as it is."""
    if picture.mode == "F":
        raise ValueError("a picture of floating-point pixels (mode F) has no known range; save it as 8 bits.")
    if picture.mode != "I" and not picture.mode.startswith("I;16"):
        return picture
    values = np.asarray(picture).astype(np.int64)
    least, most = values.min(), values.max()
    if least < 0 or most > 65535:
        raise ValueError(
            f"a greyscale picture has values from {least} to {most}; expected 0 to 255 or 0 to 65535."
        )
    if picture.mode == "I" and most <= 255:
        return PIL.Image.fromarray(values.astype(np.uint8))
    # 65535 = 255 · 257: rounded to the nearest of 256 levels.
    return PIL.Image.fromarray(((values + 128) // 257).astype(np.uint8))


# --- pictures to arrays and back -------------------------------------------------------------------


def preprocess_image(image, scale_factor: int, latent_channels: int = 4) -> np.ndarray:
    """Bring pictures of any accepted kind to what the VAE takes.

    Args:
        image: one of the following, or a list of them (all of one kind and, but for PIL, of one size):

            - PIL picture of any mode, made RGB;
            - NumPy array (H, W, 3) or (B, H, W, 3), in [0, 1], or uint8 in 0..255;
            - MindSpore or PyTorch tensor (3, H, W) or (B, 3, H, W), same ranges;
            - latents, (B, latent_channels, h, w), as tensor or array, or (latent_channels, h, w) as tensor.
        scale_factor: pixels per latent; height and width go down to its next multiple, by Lanczos for PIL (to
            the first picture's size for all of a list), by nearest neighbour for arrays.
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
        raise ValueError("`image` is an empty list; give at least one picture.")
    if isinstance(pictures[0], PIL.Image.Image):
        return _preprocess_pil(pictures, scale_factor)

    tensors = is_tensor(pictures[0])
    if not tensors and not isinstance(pictures[0], np.ndarray):
        raise TypeError(
            f"`image` has to be a PIL picture, an array, a tensor or a list of these, but is or holds "
            f"{type(pictures[0]).__name__}."
        )
    batch = _stack(pictures, tensors)
    if batch.ndim == 4 and batch.shape[1] == latent_channels and (tensors or batch.shape[-1] != 3):
        if batch.dtype.kind != "f":
            raise ValueError(f"latents given as `image` have to be floating-point, but are {batch.dtype}.")
        _check_finite_image(batch)
        return batch.astype(np.float32, copy=False)
    return _preprocess_batch(batch, tensors, scale_factor, latent_channels)


def _preprocess_pil(pictures: Sequence[PIL.Image.Image], scale_factor: int) -> np.ndarray:
    for picture in pictures:
        if not isinstance(picture, PIL.Image.Image):
            raise TypeError(f"`image` is a list that mixes PIL pictures with {type(picture).__name__}.")
    size = fitted_size(pictures[0].size, scale_factor)
    rows = []
    for picture in pictures:
        resized = to_rgb(_not_empty(picture)).resize(size, resample=PIL.Image.Resampling.LANCZOS)
        rows.append(np.asarray(resized).astype(np.float32) / 255.0)
    return 2.0 * np.ascontiguousarray(np.stack(rows).transpose(0, 3, 1, 2)) - 1.0


def _not_empty(picture: PIL.Image.Image) -> PIL.Image.Image:
    if 0 in picture.size:
        raise ValueError(f"`image` is a picture of {picture.width} x {picture.height} pixels.")
    return picture


def _stack(pictures, tensors: bool) -> np.ndarray:
    """One array of a list of arrays or tensors: those with four dimensions are joined, the others stacked."""
    kind = "tensors" if tensors else "arrays"
    for picture in pictures:
        if is_tensor(picture) != tensors or not (tensors or isinstance(picture, np.ndarray)):
            raise TypeError(f"`image` is a list that mixes {kind} with {type(picture).__name__}.")
    arrays = [to_numpy(picture) for picture in pictures]
    layout = "(B, 3, H, W) or (3, H, W)" if tensors else "(B, H, W, 3) or (H, W, 3)"
    for array in arrays:
        if array.ndim not in (3, 4) or array.size == 0:
            raise ValueError(f"`image` given as {kind} has to be {layout}, but has shape {array.shape}.")
        if array.shape[-3:] != arrays[0].shape[-3:] or array.ndim != arrays[0].ndim:
            raise ValueError(
                f"`image` is a list of {kind} of different shapes, {arrays[0].shape} and {array.shape}; "
                f"bring them to one size."
            )
    return np.concatenate(arrays) if arrays[0].ndim == 4 else np.stack(arrays)


def _preprocess_batch(
    batch: np.ndarray, tensors: bool, scale_factor: int, latent_channels: int
) -> np.ndarray:
    channels = batch.shape[1 if tensors else 3]
    if channels != 3:
        layout = "(B, 3, H, W)" if tensors else "(B, H, W, 3)"
        raise ValueError(
            f"`image` has to hold 3 channels in the layout {layout}, or be latents of shape "
            f"(B, {latent_channels}, h, w), but has shape {batch.shape}."
        )
    _check_finite_image(batch)
    if batch.dtype == np.uint8:
        batch = batch.astype(np.float32) / 255.0
    elif batch.dtype.kind != "f":
        raise ValueError(f"`image` has to be float in [0, 1] or uint8 in 0..255, but is {batch.dtype}.")
    elif np.abs(batch).max() > _LARGEST_ARRAY_VALUE:
        raise ValueError(
            f"`image` has to be in [0, 1] (or [-1, 1]), but has values from {batch.min():g} to "
            f"{batch.max():g}; divide by 255, or give it as uint8."
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
        raise ValueError("`image` has NaN or infinite values; every value has to be finite.")


def _nearest(length: int, wanted: int, dtype) -> np.ndarray:
    """Source index of each of `wanted` samples, as torch's "nearest" picks them for values of `dtype`.

    The position is rounded down after arithmetic in float64 for float64 values and in float32 for others; the
    two differ in some positions.
    """
    real = np.float64 if dtype == np.float64 else np.float32
    scale = real(length) / real(wanted)
    index = np.floor(np.arange(wanted, dtype=real) * scale).astype(np.int64)
    return np.minimum(index, length - 1)


def postprocess_image(
    image: np.ndarray, output_type: str = "pil", do_denormalize: Optional[List[bool]] = None
):
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
        raise ValueError(f"`output_type` has to be 'pil', 'np' or 'latent', but is {output_type!r}.")
    image = to_numpy(image)
    if image.ndim != 4:
        raise ValueError(f"pictures to post-process have to be (B, C, H, W), but have shape {image.shape}.")
    image = image.astype(np.float32, copy=False)
    if do_denormalize is not None and len(do_denormalize) != len(image):
        raise ValueError(f"`do_denormalize` has {len(do_denormalize)} entries for {len(image)} pictures.")
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
        batch = np.stack([np.asarray(to_rgb(picture)) for picture in image])
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


def resized_arrays(images: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    """Pictures (B, H, W, 3) float32 in [0, 1] brought to (height, width); untouched where they have it."""
    if images.shape[1:3] == tuple(size):
        return images
    resized = [restore_size(picture, (size[1], size[0])) for picture in of_arrays(images)]
    return np.stack([np.asarray(picture) for picture in resized]).astype(np.float32) / np.float32(255)


def of_arrays(images: np.ndarray) -> List[PIL.Image.Image]:
    """PIL pictures of (B, H, W, 1 or 3) in [0, 1]."""
    if not np.isfinite(images).all():
        raise ValueError("a picture has NaN or infinite values and cannot become a PIL picture.")
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


def mask_values(mask, batch_size: Optional[int] = None, name: str = "mask_image") -> np.ndarray:
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
        raise ValueError(f"`{name}` is empty: its shape is {values.shape}.")
    if values.ndim == 2:
        values = values[None, None]
    elif values.ndim == 3:
        values = values[:, None]
    elif values.ndim != 4:
        raise ValueError(
            f"`{name}` has to be (h, w), (B, h, w) or (B, 1, h, w), but has shape {values.shape}."
        )
    if values.shape[1] != 1:
        raise ValueError(
            f"`{name}` must have 1 channel, but has {values.shape[1]} channels; give (h, w), (B, h, w) or "
            f"(B, 1, h, w)."
        )
    if batch_size is not None and values.shape[0] not in (1, batch_size):
        raise ValueError(
            f"`{name}` with batch size {values.shape[0]} cannot be broadcasted to batch size {batch_size} "
            f"inferred by prompt inputs; give one mask, (h, w), or one for each picture, (B, h, w)."
        )
    if values.dtype.kind == "f" and np.isnan(values).any():
        raise ValueError(f"`{name}` has NaN in it; every value has to be in [0, 1].")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(
            f"`{name}` should be in [0, 1] range, but has values from {values.min():g} to "
            f"{values.max():g}; divide a mask in 0..255 by 255."
        )
    return values


def _joined_masks(mask, name: str) -> np.ndarray:
    """The mask or the list of masks as one array, before any check of its values."""
    parts = list(mask) if isinstance(mask, (list, tuple)) else [mask]
    if len(parts) == 0:
        raise ValueError(f"`{name}` is an empty list; give at least one mask.")
    pil = isinstance(parts[0], PIL.Image.Image)
    arrays = []
    for part in parts:
        if isinstance(part, PIL.Image.Image) != pil:
            raise TypeError(f"`{name}` is a list that mixes PIL pictures with arrays or tensors.")
        if pil:
            arrays.append(grey_levels(part).astype(np.float32) / 255.0)
        elif isinstance(part, np.ndarray) or is_tensor(part):
            arrays.append(to_numpy(part))
        else:
            raise TypeError(
                f"`{name}` has to be a PIL picture, an array, a tensor or a list of these, but is or "
                f"holds {type(part).__name__}."
            )
    if not all(array.dtype.kind in "fbiu" for array in arrays):
        raise TypeError(f"`{name}` has to hold numbers, but is of dtype {arrays[0].dtype}.")
    if not isinstance(mask, (list, tuple)):
        return arrays[0]
    if any(a.ndim != arrays[0].ndim or a.shape[1:] != arrays[0].shape[1:] for a in arrays) or (
        arrays[0].ndim < 3 and any(a.shape != arrays[0].shape for a in arrays)
    ):
        shapes = ", ".join(str(a.shape) for a in arrays)
        raise ValueError(
            f"`{name}` is a list of masks of different shapes: {shapes}; bring them to one size."
        )
    return np.stack(arrays) if arrays[0].ndim < 3 else np.concatenate(arrays)


def grey_levels(picture: PIL.Image.Image) -> np.ndarray:
    """The luminance of a PIL picture of any mode but F, uint8 (H, W)."""
    return np.asarray(_eight_bits(picture).convert("L"))


def mask_to_pil(mask) -> List[PIL.Image.Image]:
    """Masks (B, h, w) or (h, w) of 0 to 1 as a list of B pictures of mode L, 0 (black) to 255 (white)."""
    mask = to_numpy(mask)
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3:
        raise ValueError(f"a mask has to be (B, h, w) or (h, w), but has shape {mask.shape}.")
    return [PIL.Image.fromarray(np.round(row * 255.0).clip(0, 255).astype(np.uint8)) for row in mask]


# --- sizes -----------------------------------------------------------------------------------------


def fitted_size(size: Tuple[int, int], scale_factor: int) -> Tuple[int, int]:
    """(width, height) brought down to the next multiples of `scale_factor`, as the reference does.

    Raises ValueError where one of them is smaller than `scale_factor`: nothing would be left.
    """
    width, height = (side - side % scale_factor for side in size)
    if width < 1 or height < 1:
        raise ValueError(
            f"a picture of {size[0]} x {size[1]} pixels is too small: width and height have to be at least "
            f"{scale_factor}."
        )
    return width, height


def fit_picture(
    picture: PIL.Image.Image, scale_factor: int, max_pixels: Optional[int] = None
) -> Tuple[PIL.Image.Image, Optional[str]]:
    """Resize a picture to a size the model can take.

    Args:
        picture: PIL picture in RGB.
        scale_factor: pixels per latent; both sides become multiples of it.
        max_pixels: pictures of more pixels are scaled down to about that many, in their own proportions.

    Returns:
        (picture, notice): the notice says what was done, or is None where the size was right already.
    """
    width, height = picture.size
    if max_pixels is not None and width * height > max_pixels:
        shrink = (max_pixels / (width * height)) ** 0.5
        width, height = (max(scale_factor, round(side * shrink)) for side in (width, height))
    size = fitted_size((width, height), scale_factor)
    if size == picture.size:
        return picture, None
    notice = (
        f"the picture is {picture.width} x {picture.height}; the model works on it at {size[0]} x {size[1]}."
    )
    return picture.resize(size, resample=PIL.Image.Resampling.LANCZOS), notice


def restore_size(picture: PIL.Image.Image, size: Tuple[int, int]) -> PIL.Image.Image:
    """A result at the size (width, height) of its picture; masks (modes L and 1) stay black and white."""
    if picture.size == tuple(size):
        return picture
    nearest = picture.mode in ("L", "1")
    resample = PIL.Image.Resampling.NEAREST if nearest else PIL.Image.Resampling.LANCZOS
    return picture.resize(tuple(size), resample=resample)


def fit_mask(
    mask: PIL.Image.Image, picture_size: Tuple[int, int], latent_size: Tuple[int, int], scale_factor: int
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
        raise ValueError(f"the mask is {mask.width} x {mask.height}; it has to be {sizes}, as its picture.")
    binary = preprocess_mask(mask)[0, 0]
    share = PIL.Image.fromarray(binary).resize(tuple(latent_size), resample=PIL.Image.Resampling.BOX)
    return preprocess_mask(np.clip(np.asarray(share), 0, 1))


# --- several pictures in one -----------------------------------------------------------------------


def make_image_grid(
    images: List[PIL.Image.Image], rows: int, cols: int, resize: Optional[int] = None
) -> PIL.Image.Image:
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
        raise ValueError(f"{len(images)} pictures do not fill a grid of {rows} rows and {cols} columns.")
    if resize is not None:
        images = [image.resize((resize, resize)) for image in images]
    width, height = images[0].size
    grid = PIL.Image.new("RGB", size=(cols * width, rows * height))
    for i, image in enumerate(images):
        grid.paste(image, box=(i % cols * width, i // cols * height))
    return grid


def labelled_grid(items: Sequence[Tuple[str, PIL.Image.Image]], smallest_side: int = 256) -> PIL.Image.Image:
    """Pictures side by side, each under its caption.

    Args:
        items: (caption, picture) pairs; all tiles get the size of the first picture.
        smallest_side: where that size has a side below this many pixels, tiles are enlarged by a whole factor,
            so that captions can be read.
    """
    if len(items) == 0:
        raise ValueError("there is no picture to put into the grid.")
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
        grid.paste(restore_size(picture, (width, height)), (left, strip))
    return grid


def contact_sheet(
    rows: Sequence[Sequence[PIL.Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    corner: Optional[str] = None,
    title: Optional[str] = None,
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
        raise ValueError("there is no picture to put into the contact sheet; give at least one row of one.")
    if any(len(row) != columns for row in rows):
        lengths = ", ".join(str(len(row)) for row in rows)
        raise ValueError(f"the rows of the contact sheet have {lengths} pictures; give each as many.")
    for labels, count, what in ((row_labels, len(rows), "rows"), (column_labels, columns, "columns")):
        if isinstance(labels, str) or len(labels) != count:
            raise ValueError(f"the contact sheet has {count} {what}, but {labels!r} as labels; give {count}.")
    for picture in (picture for row in rows for picture in row):
        if not isinstance(picture, PIL.Image.Image):
            raise TypeError(
                f"cells of a contact sheet are PIL pictures, but one is {type(picture).__name__}."
            )
        if 0 in picture.size:
            raise ValueError(
                f"a cell of the contact sheet is {picture.width} x {picture.height} pixels; leave it out."
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
        raise ValueError(
            f"the contact sheet would be {size[0]} x {size[1]} pixels; at most {MAX_PIXELS} pixels are drawn: "
            f"give fewer or smaller pictures."
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
            cell = restore_size(picture, (width, height))
            sheet.paste(cell.convert("RGB"), (left + column * (width + gap), top))
    return sheet


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


def _wrapped(text: str, font, width: int, most: int = 4) -> List[str]:
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


def check_output_path(path, extensions: Optional[Sequence[str]] = None) -> Path:
    """Check that a file can be written at `path`, before the long work that will fill it.

    Args:
        path: str or path. Its folder has to exist.
        extensions: accepted extensions, with the dot; None means those of pictures.

    Returns:
        The path.

    Raises:
        ValueError: The folder is missing or no file can be written there, the path is a folder, or the extension is none of the
            accepted.
    """
    path = Path(path)
    accepted = tuple(PICTURE_FORMATS) if extensions is None else tuple(extensions)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file to write, ending in {accepted[0]}.")
    if path.suffix.lower() not in accepted:
        raise ValueError(f"{path}: the name of the output has to end in {' or '.join(accepted)}.")
    folder = path.parent
    if not folder.is_dir():
        raise ValueError(f"the folder {folder} of the output {path.name} does not exist; create it first.")
    check_writable(folder, f"the output {path.name}")
    return path


def check_writable(folder: Path, what: str) -> None:
    """Raise a ValueError, naming what is to be written, where no file can be made in an existing folder."""
    try:
        # Tried, not asked for: a read-only file system or a full one refuses those as well who may write everywhere.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(
            f"no file can be written in the folder {folder} of {what} ({reason}); give another place."
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
        os.chmod(
            draft, mode
        )  # some writers put a file of their own, for the owner alone, in the draft's place
        os.replace(draft, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)


def save_image_atomically(image: PIL.Image.Image, path) -> None:
    """Write one picture, whole or not at all; the extension of `path` says the format."""
    save_images_atomically({path: image})


def save_images_atomically(images: Dict[Union[str, os.PathLike], PIL.Image.Image]) -> None:
    """Write pictures by path: all are encoded before the first takes its place; a failure leaves none."""
    paths = {check_output_path(path): image for path, image in images.items()}
    with contextlib.ExitStack() as drafts:
        for path, image in paths.items():
            kind = PICTURE_FORMATS[path.suffix.lower()]
            options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
            image.save(drafts.enter_context(atomic_path(path)), format=kind, **options)
