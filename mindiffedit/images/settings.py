"""The settings of an edit in the file of its picture: a text chunk of a PNG, the EXIF comment of a JPEG or WebP.

They are one JSON object. What a file says is anybody's word: who reads it has to judge the values.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

import PIL.ExifTags
import PIL.Image

from mindiffedit.images.colours import fit_format
from mindiffedit.images.writing import TEXT_CHUNK, format_of, save_image_atomically

MAX_SETTINGS = 60_000
"""Characters of the object; the EXIF data of a JPEG has room for 65,533 bytes."""

_ASCII = b"ASCII\0\0\0"  # how an EXIF comment says its encoding (EXIF 2.32, table 9)

__all__ = ["MAX_SETTINGS", "save_with_settings", "settings_in"]


def save_with_settings(picture: PIL.Image.Image, path, settings: Mapping[str, Any]) -> None:
    """Write a picture with the settings that made it, whole or not at all; the extension of `path` says the format.

    Args:
        picture: as for `save_images_atomically`; it is not changed.
        path: ends in .png, .jpg, .jpeg or .webp.
        settings: what JSON can hold. Above `MAX_SETTINGS` characters they are left out, and the picture is written.

    Raises:
        InputError: as `check_output_path`.
    """
    text, (fitted, _) = json.dumps(settings), fit_format(picture, format_of(path))
    copy = fitted.copy()
    if len(text) <= MAX_SETTINGS:
        if format_of(path) == "PNG":
            copy.info[TEXT_CHUNK] = text
        else:
            copy.info["exif"] = _with_comment(copy.info.get("exif", b""), _ASCII + text.encode("ascii"))
    save_image_atomically(copy, path)


def settings_in(picture: PIL.Image.Image) -> dict[str, Any] | None:
    """The settings in the file that a picture was read from; None where there are none, or others than ours."""
    text = picture.info.get(TEXT_CHUNK)
    if text is None:
        comment = _exif(picture.info.get("exif", b"")).get_ifd(PIL.ExifTags.IFD.Exif).get(_COMMENT, b"")
        text = comment[len(_ASCII) :] if isinstance(comment, bytes) and comment.startswith(_ASCII) else ""
    if not isinstance(text, (str, bytes)) or len(text) > MAX_SETTINGS:
        return None
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return settings if isinstance(settings, dict) and settings.get("command") == "edit" else None


_COMMENT = PIL.ExifTags.Base.UserComment


def _exif(data: bytes) -> PIL.Image.Exif:
    """EXIF data read; none of what is damaged."""
    exif = PIL.Image.Exif()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exif.load(data)
            exif.get_ifd(PIL.ExifTags.IFD.Exif)
        except Exception:
            exif = PIL.Image.Exif()
    return exif


def _with_comment(data: bytes, comment: bytes) -> bytes:
    exif = _exif(data)
    exif[PIL.ExifTags.IFD.Exif] = {**exif.get_ifd(PIL.ExifTags.IFD.Exif), _COMMENT: comment}
    return exif.tobytes()
