"""Files written whole or not at all, and pictures written with what belongs to them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import struct
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.PngImagePlugin

from mindiffedit.errors import InputError
from mindiffedit.images.colours import fit_format

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
LOSSLESS_EXTENSIONS = (".png", ".bmp", ".tif", ".tiff")
# What a picture's `info` has under this name is written into a PNG as a text of this name; see `settings`.
TEXT_CHUNK = "mindiffedit"

__all__ = [
    "LOSSLESS_EXTENSIONS",
    "PICTURE_FORMATS",
    "atomic_path",
    "check_output_path",
    "check_writable",
    "encoded",
    "format_of",
    "remove_drafts",
    "save_image_atomically",
    "save_images_atomically",
]


def check_output_path(path, extensions: Sequence[str] | None = None) -> Path:
    """Check that a file can be written at `path`, before the long work that will fill it.

    Args:
        path: str or path. Its folder has to exist.
        extensions: accepted extensions, with the dot; None: those of pictures.

    Returns:
        The path.

    Raises:
        InputError: The folder is missing or no file can be written there, the path is a folder, or the extension is
            none of the accepted.
    """
    path = Path(path)
    accepted = tuple(extensions or PICTURE_FORMATS)
    if path.is_dir():
        raise InputError(
            "{path} is a folder; give the name of a file to write, ending in {ending}.",
            "output",
            path=path,
            ending=accepted[0],
        )
    if path.suffix.lower() not in accepted:
        endings = " or ".join(accepted)
        raise InputError(
            "{path}: the name of the output has to end in {endings}.", "output", path=path, endings=endings
        )
    if not path.parent.is_dir():
        raise InputError(
            "the folder {folder} of the output {name} does not exist; create it first.",
            "output",
            folder=path.parent,
            name=path.name,
        )
    check_writable(path.parent, f"the output {path.name}")
    return path


def check_writable(folder: Path, what: str) -> None:
    """Raise an InputError, naming what is to be written, where no file can be made in an existing folder."""
    try:
        # Tried, not asked for: a read-only file system or a full one refuses those as well who may write everywhere.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(
            "no file can be written in the folder {folder} of {what} ({reason}); give another place.",
            "output",
            folder=folder,
            what=what,
            reason=reason,
        ) from error


@contextlib.contextmanager
def atomic_path(path) -> Iterator[Path]:
    """Write a file whole or not at all.

    Gives the path of a new, empty file in the same folder to write to. When the block ends well that file
    takes the place of `path`; when it ends in any exception it is removed and `path` is as it was.
    """
    target = Path(os.path.realpath(path))  # a link keeps pointing where it points
    draft = target.with_name(f".{target.stem[:100]}.{secrets.token_hex(8)}{target.suffix}")
    # Not tempfile: the result should have the permissions that any new file gets.
    os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    mode = os.stat(draft).st_mode & 0o777
    try:
        yield draft
        os.chmod(draft, mode)  # some writers put a file of their own, for the owner alone, in the draft's place
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def remove_drafts(paths: Iterable[Path]) -> None:
    """Remove the drafts of `atomic_path` that killed processes have left of these paths, which may not exist."""
    names: dict[Path, set[str]] = {}
    for path in paths:
        names.setdefault(path.parent, set()).add(f"{path.stem[:100]}{path.suffix}")
    for folder, wanted in names.items():
        for entry in os.scandir(folder) if folder.is_dir() else ():
            draft = re.fullmatch(r"\.(.+)\.[0-9a-f]{16}(\.\w+)", entry.name)
            if draft and draft[1] + draft[2] in wanted:
                os.unlink(entry.path)


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
            _save(image, drafts.enter_context(atomic_path(path)), format_of(path))


def encoded(image: PIL.Image.Image, kind: str) -> bytes:
    """The file that `save_image_atomically` would write, in memory; `kind` is Pillow's name of its format."""
    stream = io.BytesIO()
    _save(image, stream, kind)
    return stream.getvalue()


def _save(image: PIL.Image.Image, file, kind: str) -> None:
    image, _ = fit_format(image, kind)
    image.save(file, format=kind, **_options(image, kind))


def format_of(path) -> str:
    """Pillow's name of the format that a path's extension says."""
    return PICTURE_FORMATS[Path(path).suffix.lower()]


def _options(picture: PIL.Image.Image, kind: str) -> dict[str, Any]:
    """What goes with a picture into its file."""
    options: dict[str, Any] = {}
    if kind == "BMP":
        return options
    if kind == "JPEG":
        # The finest: what is outside a mask should be as it came, and at 95 it is off by up to 20 levels of 255.
        options = {"quality": 100, "subsampling": 0}
    elif kind == "WEBP":
        options = {"lossless": True, "exact": True}  # exact: also where it is transparent
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
    if kind == "PNG":
        options["pnginfo"] = chunks = PIL.PngImagePlugin.PngInfo()
        if info.get("gamma") and "icc_profile" not in options:
            chunks.add(b"gAMA", struct.pack(">I", round(info["gamma"] * 100000)))
        if TEXT_CHUNK in info:
            chunks.add_text(TEXT_CHUNK, info[TEXT_CHUNK])
    return options
