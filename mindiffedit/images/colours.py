"""What a picture holds beside the colours that a model sees: its mode, its colour profile, its transparency.

Models see sRGB, 8 bits each. A picture's numbers can mean other colours, by an embedded profile (a photo in Display
P3) or by their kind (CMYK). `Original` shows a picture in sRGB, and brings what was drawn into it back into the
picture's own numbers. No file is read or written here.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageCms

from mindiffedit.errors import InputError, first_line

__all__ = ["Original", "blend", "fit_format", "grey_levels", "to_rgb", "to_srgb"]

# Of `PIL.Image.Image.info`, what is kept: it goes on being true of a picture with other pixels.
_KEPT_INFO = ("icc_profile", "gamma", "srgb", "exif", "dpi")
# Modes of pixels that can be drawn into, and the colour space that their profile has to be of (ICC.1, 7.2.6).
_SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}
# Levels out of 255 by which a profile may differ from sRGB and still be taken for it. The common sRGB profiles differ
# by 1 from one another; taking them all for the same keeps a picture's numbers, and is what the reference does.
_SAME = 2
_BLACK_POINT_COMPENSATION: Any = 0x2000  # of lcms2.h; Pillow names it from 10.3 on
_SRGB_GAMMA, _GAMMA_TOLERANCE = 0.45455, 0.01

# What each format cannot hold, by Pillow's name.
_OPAQUE_FORMATS = ("JPEG", "BMP")
_MAX_SIDE = {"JPEG": 65535, "WEBP": 16383}
_FORMAT_MODES = {
    "PNG": ("1", "L", "LA", "RGB", "RGBA", "P", "I", "I;16"),
    "TIFF": ("1", "L", "LA", "RGB", "RGBA", "P", "I", "I;16", "CMYK", "LAB"),
    "JPEG": ("1", "L", "RGB", "CMYK"),
    "WEBP": ("1", "L", "LA", "RGB", "RGBA", "P"),
    "BMP": ("1", "L", "RGB", "P"),
}

_Conversion = Callable[[PIL.Image.Image], PIL.Image.Image]


class Original:
    """A picture that something is drawn into.

    Args:
        picture: PIL picture of any mode but F, decoded and upright.

    Attributes:
        shown: the same picture as models see it, PIL in RGB, sRGB. Transparency is left out, so that the colours stored
            under it show.
        losses: sentences, one for each thing that a result will not have of the picture.
        plain: whether `shown` is all there is: RGB without transparency, in sRGB.

    Raises:
        InputError: as `to_rgb`.
    """

    def __init__(self, picture: PIL.Image.Image):
        self.losses: list[str] = []
        self._info: dict[Any, Any] = {name: picture.info[name] for name in _KEPT_INFO if name in picture.info}
        self._pixels, self._alpha = _split(picture)
        self._wide = self._pixels.mode == "I;16"
        pixels = _eight_bits(self._pixels)
        if "bits" in picture.info:
            self.losses.append(f"the picture has {picture.info['bits']} bits for each channel; 8 of them are kept.")
        if picture.mode in ("P", "PA"):
            self.losses.append(f"the picture has a palette; the result has none, it is {self._mode}.")
        elif picture.mode not in (self._mode, self._pixels.mode, "RGBa", "La", "I") and not self._wide:
            self.losses.append(f"the picture is of mode {picture.mode}; the result is {self._mode}.")
        if self._wide and "transparency" in picture.info:
            self.losses.append("the picture has a transparent colour; the result has none, it is 16-bit grey.")
        if pixels.mode == "L":
            self.losses.append(
                "the picture is grey, so what is drawn into it is made grey; give it as RGB to have colours."
            )
        to_srgb, from_srgb = self._conversions(pixels)
        self.shown = to_srgb(pixels)
        if self.shown is not pixels:
            self.shown.info = {key: of for key, of in self.shown.info.items() if key not in ("icc_profile", "gamma")}
        if from_srgb is None:
            self._pixels, self._wide, from_srgb = self.shown, False, _unchanged
            self._info = {name: value for name, value in self._info.items() if name not in ("icc_profile", "gamma")}
        self._from_srgb = from_srgb
        self.plain = self.shown is self._pixels and self._alpha is None

    @property
    def _mode(self) -> str:
        return self._pixels.mode + ("A" if self._alpha is not None else "")

    def _conversions(self, pixels: PIL.Image.Image) -> tuple[_Conversion, _Conversion | None]:
        """To sRGB, and from it into the picture's numbers; None where there is no way back."""
        profile, why = _profile_of(pixels.mode, self._info.get("icc_profile"))
        if why is not None:
            self.losses.append(
                f"the picture's colour profile cannot be used ({why}); its colours are taken for sRGB's."
            )
        if profile is not None:
            srgb = PIL.ImageCms.createProfile("sRGB")
            to_srgb = _transform(profile, srgb, pixels.mode, "RGB")
            if pixels.mode == "RGB" and _is_unchanging(to_srgb):
                return _unchanged, _unchanged
            try:
                from_srgb = _transform(srgb, profile, "RGB", pixels.mode)
                from_srgb(PIL.Image.new("RGB", (1, 1)))
                return to_srgb, from_srgb
            except Exception:  # a scanner's profile leads one way only, and with some Pillow fails when they are used
                self.losses.append("the picture's colour profile cannot be written with; the result is in sRGB.")
                return to_srgb, None
        gamma = 0 if "icc_profile" in self._info or "srgb" in self._info else self._info.get("gamma", 0)
        if gamma > 0 and abs(gamma - _SRGB_GAMMA) > _GAMMA_TOLERANCE and pixels.mode in ("RGB", "L"):
            levels = np.arange(256) / 255
            there = _table(_srgb_of_light(levels ** (1 / gamma)), len(pixels.getbands()))
            back = _table(_light_of_srgb(levels) ** gamma, len(pixels.getbands()))
            return lambda p: p.point(there).convert("RGB"), lambda p: p.convert(pixels.mode).point(back)
        if pixels.mode == "RGB":  # a copy does without the profile that cannot be used
            return _unchanged if why is None else PIL.Image.Image.copy, _unchanged
        return lambda p: p.convert("RGB"), lambda p: p.convert(pixels.mode)

    def rewritten(self, edited: PIL.Image.Image, weights: np.ndarray | None = None) -> PIL.Image.Image:
        """An edited picture in the mode, the profile and with the transparency of this one.

        Args:
            edited: PIL in RGB, sRGB, of this picture's size.
            weights: (H, W) in [0, 1], of the edited picture over this one. Where they are 0, the result has this
                picture's own numbers. None: 1 everywhere.
        """
        drawn = self._from_srgb(edited)
        if self._wide:
            drawn = PIL.Image.fromarray(np.asarray(drawn).astype(np.uint16) * 257)
        if weights is not None:
            numbers = np.asarray(self._pixels)
            weights = weights[..., None] if numbers.ndim == 3 else weights
            blended = blend(numbers, np.asarray(drawn), weights)
            drawn = PIL.Image.frombytes(self._pixels.mode, self._pixels.size, blended.tobytes())
        if drawn is edited:
            drawn = edited.copy()
        if self._alpha is not None:
            drawn.putalpha(self._alpha)
        drawn.info = dict(self._info)
        return drawn


def to_srgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The colours that a picture shows: PIL in RGB, sRGB, 8 bits each; transparency is left out.

    Raises:
        InputError: as `to_rgb`.
    """
    return Original(picture).shown


def to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """`picture` in mode RGB, 8 bits each.

    A picture that is RGB, has a palette or transparency goes through `PIL.Image.convert` and keeps its numbers and its
    colour profile. Other kinds of colours, for which an own profile would mean nothing in RGB, become sRGB's by it.
    Wide greyscale is brought to 8 bits: modes I;16* are 0..65535; mode I is taken as 0..255 where no value is larger,
    as 0..65535 otherwise.

    Raises:
        InputError: Mode I with values outside 0..65535, mode F (its range is unknown), or a mode Pillow
            cannot convert.
    """
    if picture.mode not in ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA"):
        return to_srgb(picture)
    return _converted(picture)


def blend(before: np.ndarray, after: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The values before where the weights are 0, those after where they are 1, their mean between.

    Args:
        before: of any dtype, which the result has; whole numbers are rounded to the nearest.
        after: of the same shape and dtype.
        weights: in [0, 1], of a shape that broadcasts.
    """
    mean = before + weights * (after.astype(np.float32) - before)
    if before.dtype.kind != "f":
        mean = np.rint(mean)
    return np.where(weights == 0, before, mean).astype(before.dtype)


def grey_levels(picture: PIL.Image.Image) -> np.ndarray:
    """The luminance of a PIL picture of any mode but F, uint8 (H, W)."""
    return np.asarray(_eight_bits(picture).convert("L"))


def fit_format(picture: PIL.Image.Image, format: str) -> tuple[PIL.Image.Image, list[str]]:
    """A picture as a format of files can hold it, and sentences about what the format cannot hold.

    Args:
        picture: PIL picture of any mode but F.
        format: Pillow's name: PNG, TIFF, JPEG, WEBP or BMP.

    Raises:
        InputError: the format cannot hold a picture of this size.
    """
    losses = []
    if max(picture.size) > _MAX_SIDE.get(format, max(picture.size)):
        raise InputError(
            "a {format} file has at most {most} pixels on a side, and the picture is {width} x {height}; give the "
            "output a name that ends in .png.",
            "output",
            format=format,
            most=_MAX_SIDE[format],
            width=picture.width,
            height=picture.height,
        )
    if picture.has_transparency_data and format in _OPAQUE_FORMATS:
        pixels, alpha = _split(picture)
        if alpha is not None and np.asarray(alpha).min() < 255:
            losses.append(
                f"the picture's transparency is lost: a {format} file has none, the colours under it show; a PNG, TIFF "
                f"or WebP file keeps it."
            )
        pixels.info = {name: picture.info[name] for name in _KEPT_INFO if name in picture.info}
        picture = pixels
    profiled = "icc_profile" in picture.info
    grey = picture.mode in ("L", "LA", "1")
    unfit = picture.mode not in _FORMAT_MODES[format] and picture.mode
    if picture.mode.startswith("I"):
        unfit = unfit and "16-bit grey"
    elif profiled and (format == "BMP" or format == "WEBP" and grey):
        unfit = "the colour profile"
    elif not profiled and "gamma" in picture.info and format != "PNG" and not Original(picture).plain:
        unfit = "the picture's gamma"
    if not unfit:
        return picture, losses
    original = Original(picture)
    shown = original.shown.copy()
    if picture.mode.startswith("I"):
        shown = shown.convert("L")
    if original._alpha is not None:
        shown.putalpha(original._alpha)
    if not original.plain:  # a profile that says sRGB is no loss
        losses.append(
            f"a {format} file cannot hold {unfit}: the picture is written as {shown.mode} of 8 bits, in sRGB."
        )
    shown.info = {name: picture.info[name] for name in ("exif", "dpi") if name in picture.info}
    return shown, losses


# --- parts -----------------------------------------------------------------------------------------


def _unchanged(picture: PIL.Image.Image) -> PIL.Image.Image:
    return picture


def _split(picture: PIL.Image.Image) -> tuple[PIL.Image.Image, PIL.Image.Image | None]:
    """Pixels in RGB, L, I;16, CMYK or LAB, and the transparency in L; None without."""
    alpha = None
    if picture.mode in ("La", "RGBa"):
        picture = picture.convert(picture.mode[:-1] + "A")
    if picture.has_transparency_data and not picture.mode.startswith("I"):
        # A transparent colour or a palette's transparency becomes a channel.
        if picture.mode not in ("LA", "RGBA"):
            picture = picture.convert("LA" if picture.mode in ("L", "1") else "RGBA")
        alpha = picture.getchannel("A")
    if picture.mode in ("1", "LA"):
        picture = picture.convert("L")
    elif picture.mode == "I" or picture.mode.startswith("I;16"):
        picture = _wide_or_narrow(picture)
    elif picture.mode not in ("L", "CMYK", "LAB"):
        picture = _converted(picture)
    return picture, alpha


def _converted(picture: PIL.Image.Image) -> PIL.Image.Image:
    if picture.mode == "RGB":
        return picture
    _check_range(picture)
    if "transparency" in picture.info and picture.mode == "P":
        # Straight to RGB gives the same pixels, with a warning from Pillow.
        picture = picture.convert("RGBA")
    try:
        return picture.convert("RGB")
    except (ValueError, OSError) as error:
        raise InputError(
            "a picture of mode {mode} cannot be made RGB ({why}); save it as RGB.", mode=picture.mode, why=str(error)
        ) from error


def _check_range(picture: PIL.Image.Image) -> None:
    if picture.mode == "F":
        raise InputError("a picture of floating-point pixels (mode F) has no known range; save it as 8 bits.")


def _wide_or_narrow(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Greyscale of mode I or I;16* in mode I;16, or L where mode I has values to 255 only."""
    values = np.asarray(picture).astype(np.int64)
    least, most = values.min(), values.max()
    if least < 0 or most > 65535:
        raise InputError(
            "a greyscale picture has values from {least} to {most}; expected 0 to 255 or 0 to 65535.",
            least=least,
            most=most,
        )
    return PIL.Image.fromarray(values.astype(np.uint8 if picture.mode == "I" and most <= 255 else np.uint16))


def _eight_bits(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Wide greyscale as mode L; any other picture as it is."""
    _check_range(picture)
    if picture.mode != "I" and not picture.mode.startswith("I;16"):
        return picture
    picture = _wide_or_narrow(picture)
    if picture.mode == "L":
        return picture
    # 65535 = 255 · 257: rounded to the nearest of 256 levels.
    return PIL.Image.fromarray(((np.asarray(picture).astype(np.int64) + 128) // 257).astype(np.uint8))


def _profile_of(mode: str, data: bytes | None) -> tuple[Any, str | None]:
    """The profile to convert pixels of a mode with, or None; and why an embedded one is of no use, or None."""
    if mode == "LAB":
        return PIL.ImageCms.createProfile("LAB"), None
    if not data:
        return None, None
    try:
        profile = PIL.ImageCms.ImageCmsProfile(io.BytesIO(data))
        space = profile.profile.xcolor_space
        if space != _SPACES[mode]:
            return None, f"it is for {space.strip()}, the picture is {mode}"
        _transform(profile, PIL.ImageCms.createProfile("sRGB"), mode, "RGB")(PIL.Image.new(mode, (1, 1)))
        return profile, None
    except Exception as error:  # a damaged profile makes Pillow raise nearly anything
        return None, first_line(error)


def _transform(source, target, source_mode: str, target_mode: str) -> _Conversion:
    # Colours that both can show stay what they are, white stays white and black black, as photo editors do it.
    return PIL.ImageCms.buildTransform(
        source, target, source_mode, target_mode, PIL.ImageCms.Intent.RELATIVE_COLORIMETRIC, _BLACK_POINT_COMPENSATION
    ).apply


def _is_unchanging(conversion: _Conversion) -> bool:
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    probe = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(9, -1, 3)
    converted = np.asarray(conversion(PIL.Image.fromarray(probe)))
    return int(np.abs(converted.astype(int) - probe).max()) <= _SAME


def _srgb_of_light(light: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, values in [0, 1]."""
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def _light_of_srgb(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _table(values: np.ndarray, channels: int) -> list[int]:
    return np.rint(values * 255).astype(int).tolist() * channels
