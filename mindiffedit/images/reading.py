"""Pictures from files and URLs: found, fetched, judged by their header, decoded, turned upright.

A picture is read where its pixels can be: what else is in the file may be odd or damaged. Limits on pixels, bytes and
seconds hold for whatever a header or a server promises. No setting of Pillow is changed: it is the whole process's.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import PIL.Image
import PIL.ImageOps

from mindiffedit.errors import InputError, cut
from mindiffedit.images.colours import to_rgb

# A header may promise any size; nothing is decoded above this many pixels (8192 × 8192; 192 MiB as RGB).
MAX_PIXELS = 8192 * 8192
# What a URL may send, in bytes, and how many seconds one answer and the whole picture may take.
MAX_DOWNLOAD = 64 * 2**20
URL_TIMEOUT = 30.0
DOWNLOAD_TIMEOUT = 120.0
MAX_REDIRECTS = 20

# Formats whose further "frames" are previews, gain maps or layers; the first one is the whole still picture.
_STILL_FORMATS = ("MPO", "PSD")
# Formats that Pillow hands to another program to draw.
_REFUSED_FORMATS = ("EPS", "WMF")
# Rows at the lower end that a JPEG may lack: one row of its largest blocks, and the row above, whose colours are
# smoothed with theirs; no more than a tenth of the picture.
_MAX_ROWS_LOST = 17
_MAX_PROFILE = 64 * 2**20
_MAX_NAME = 200  # characters of a path or URL in a message

__all__ = ["DamagedPicture", "MAX_DOWNLOAD", "MAX_PIXELS", "decode", "load_as_is", "load_image"]


def load_image(
    image: str | os.PathLike | PIL.Image.Image,
    convert_method: Callable[[PIL.Image.Image], PIL.Image.Image] | None = None,
) -> PIL.Image.Image:
    """Load one still picture, upright (EXIF orientation applied) and in RGB.

    Args:
        image: path, URL (http, https, file or data, as a browser takes it) or PIL picture.
        convert_method: called with the upright picture in its own mode, in place of the conversion to RGB.

    Returns:
        PIL picture, fully decoded. Transparency is dropped as `PIL.Image.convert("RGB")` drops it, so the colours
        stored under it show. A colour profile stays in `info["icc_profile"]` where it is one of RGB; by that of a
        CMYK or grey picture its colours become sRGB's. 16-bit greyscale is scaled to 8 bits, not clipped. Of a file
        with 16 bits for each of several channels, Pillow reads 8, and `info["bits"]` is 16.

    Raises:
        InputError: The picture is missing, empty, truncated, no picture, animated, zero-sized or above
            `MAX_PIXELS`, or the URL does not answer, answers with an error, or sends more than `MAX_DOWNLOAD`
            bytes. It is a ValueError.
    """
    if isinstance(image, PIL.Image.Image):
        picture = _upright(image, "the picture")
    elif isinstance(image, (str, os.PathLike)):
        picture = _from_name(os.fspath(image))
    else:
        raise InputError(
            "a picture has to be a path, a URL or a PIL picture, but is {kind}.", "image", kind=type(image).__name__
        )
    return to_rgb(picture) if convert_method is None else convert_method(picture)


def load_as_is(image) -> PIL.Image.Image:
    """`load_image`, not made RGB on the way: with the picture's mode, profile, transparency and wide greyscale."""
    return load_image(image, convert_method=lambda picture: picture)


def _from_name(name) -> PIL.Image.Image:
    if isinstance(name, str):
        address = name.strip()
        # One slash is what pathlib leaves of two.
        if re.match(r"https?:[/\\]", address, re.IGNORECASE):
            address = re.sub(r"[\t\r\n]", "", re.sub(r"^(\w+):[/\\]+", r"\1://", address))
            address = re.sub(r"^[^?#]*", lambda path: path[0].replace("\\", "/"), address)
            return decode(io.BytesIO(_download(address)), _shown_address(address))
        if re.match(r"(data|file):", address, re.IGNORECASE) and not os.path.exists(name):
            return _of_local_address(address)
    return _load_file(name)


def _of_local_address(address: str) -> PIL.Image.Image:
    """The picture of a data: or file: URL."""
    import base64
    import urllib.parse
    import urllib.request

    if address[:5].lower() == "file:":
        parts = urllib.parse.urlsplit(address)
        if parts.netloc not in ("", "localhost"):
            raise InputError(
                "{name} is on another machine; give the path of a file.", "image", name=cut(address, _MAX_NAME)
            )
        return _load_file(urllib.request.url2pathname(parts.path))
    kind, comma, content = address.partition(",")
    data = urllib.parse.unquote_to_bytes(content)
    try:
        if not comma:
            raise ValueError("it has no comma")
        if re.search(r";\s*base64\s*$", kind, re.IGNORECASE):
            data = b"".join(data.split()).rstrip(b"=")  # browsers do without the padding
            data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError as error:
        raise InputError(
            "{name} is no data URL ({why}); it begins as data:image/png;base64, and the data follow.",
            "image",
            name=cut(address, 40),
            why=_sentence(error),
        ) from error
    return decode(io.BytesIO(data), cut(address, 40))


def _load_file(path) -> PIL.Image.Image:
    name = cut(os.fsdecode(path), _MAX_NAME)
    if os.path.isdir(path):
        raise InputError("{name} is a folder; give the path of one picture.", "image", name=name)
    if "\0" in os.fsdecode(path) or not os.path.isfile(path):
        raise InputError("there is no picture {name}; give the path of a file or an http(s) URL.", "image", name=name)
    try:
        stream = open(path, "rb")
    except OSError as error:
        raise InputError(
            "{name} cannot be opened: {why}.", "image", name=name, why=error.strerror or str(error)
        ) from error
    with stream:
        return decode(stream, name)


# --- decoding --------------------------------------------------------------------------------------


class DamagedPicture(InputError):
    """A file whose pixels cannot be read."""


def decode(stream, name: str, max_pixels: int | None = None, formats: Sequence[str] | None = None) -> PIL.Image.Image:
    """Decode a binary stream into an upright picture, after its header has been judged.

    Args:
        stream: at its beginning; it can seek.
        name: what messages call the picture.
        max_pixels: a picture that claims more is not decoded; None: `MAX_PIXELS`.
        formats: those that are tried, by Pillow's names; None: all.

    Raises:
        InputError: as for `load_image`.
    """
    start = stream.read(16)
    if not start:
        raise InputError("{name} is an empty file, not a picture.", "image", name=name)
    stream.seek(0)
    with warnings.catch_warnings():
        # Pillow warns from half of its own limit on (ours is lower and an error), and of metadata that it cannot read.
        warnings.simplefilter("ignore")
        try:
            picture = _decoded(stream, name, max_pixels, formats)
        except DamagedPicture:
            # Another reading of the same bytes may still give the pixels.
            stream.seek(0)
            if start.startswith(b"\x89PNG\r\n\x1a\n"):
                cleaned, profile = _pixels_of_png(stream)
                picture = _decoded(cleaned, name, max_pixels)
                if profile:
                    picture.info["icc_profile"] = profile
            elif start.startswith(b"\xff\xd8\xff"):
                picture = _ended_jpeg(stream.read(), name)
            else:
                raise
        return _upright(picture, name)


def _decoded(stream, name: str, max_pixels: int | None = None, formats=None) -> PIL.Image.Image:
    try:
        picture = PIL.Image.open(stream, formats=formats)
    except PIL.UnidentifiedImageError as error:
        stream.seek(0)
        brand = stream.read(12)
        if brand[4:8] == b"ftyp":
            raise InputError(
                "{name} is a file of the kind {brand}, which this Pillow cannot read; save it as JPEG or PNG.",
                "image",
                name=name,
                brand=brand[8:].decode("ascii", "replace").strip().upper(),
            ) from error
        raise DamagedPicture("{name} is not a picture in a format that Pillow reads.", "image", name=name) from error
    except PIL.Image.DecompressionBombError as error:
        raise InputError(
            "{name} claims to be a picture of far more than {most} pixels and was not decoded.",
            "image",
            name=name,
            most=min(MAX_PIXELS, PIL.Image.MAX_IMAGE_PIXELS or MAX_PIXELS),
        ) from error
    except Exception as error:  # a damaged header makes Pillow raise nearly anything
        raise DamagedPicture(
            "{name} cannot be read as a picture: {why}.", "image", name=name, why=_sentence(error)
        ) from error
    _check_header(picture, name, max_pixels)
    bits = _bits_of(picture)
    _load(picture, name)
    if bits > 8 and picture.mode in ("RGB", "RGBA", "LA", "CMYK", "LAB"):
        picture.info["bits"] = bits
    return picture


def _damaged(name: str, error: Exception) -> DamagedPicture:
    return DamagedPicture("{name} is truncated or damaged: {why}.", "image", name=name, why=_sentence(error))


def _load(picture: PIL.Image.Image, name: str) -> None:
    try:
        picture.load()
    except Exception as error:  # a PIL picture may still be an unread, damaged file
        raise _damaged(name, error) from error


def _bits_of(picture: PIL.Image.Image) -> int:
    """Bits of each channel in the file, as far as Pillow's own name for the layout says it."""
    found = [re.search(r";(1[0-6])", str(tile[3])) for tile in getattr(picture, "tile", ())]
    return max((int(one[1]) for one in found if one), default=8)


def _check_header(picture: PIL.Image.Image, name: str, max_pixels: int | None) -> None:
    width, height = picture.size
    max_pixels = MAX_PIXELS if max_pixels is None else max_pixels
    if picture.format in _REFUSED_FORMATS:
        raise InputError(
            "{name} is a {kind} drawing; give a picture of pixels, such as a PNG.",
            "image",
            name=name,
            kind=picture.format,
        )
    _check_size(picture, name)
    if width * height > max_pixels:
        raise InputError(
            "{name} claims to be {width} x {height} pixels and was not decoded: at most {most} pixels "
            "are read. Scale it down first.",
            "image",
            name=name,
            width=width,
            height=height,
            most=max_pixels,
        )
    try:
        animated = picture.format not in _STILL_FORMATS and getattr(picture, "is_animated", False)
    except Exception as error:  # looking for a second frame reads on, into what may be damaged
        raise _damaged(name, error) from error
    if animated:
        raise InputError("{name} is animated or has several pages; give one still picture.", "image", name=name)


def _check_size(picture: PIL.Image.Image, name: str) -> None:
    if 0 in picture.size:
        raise InputError(
            "{name} is {width} x {height} pixels: there is nothing in it.",
            "image",
            name=name,
            width=picture.width,
            height=picture.height,
        )


def _upright(picture: PIL.Image.Image, name: str) -> PIL.Image.Image:
    _check_size(picture, name)
    _load(picture, name)
    with contextlib.suppress(Exception):
        return PIL.ImageOps.exif_transpose(picture)
    # Damaged EXIF data, which cannot be read or cannot be written again: only the orientation is taken of it.
    bare, orientation = picture.copy(), 1
    with contextlib.suppress(Exception):
        orientation = picture.getexif().get(0x0112, 1)
    for key in ("exif", "Raw profile type exif"):
        bare.info.pop(key, None)
    turns = [PIL.Image.Transpose.FLIP_LEFT_RIGHT, PIL.Image.Transpose.ROTATE_180,
             PIL.Image.Transpose.FLIP_TOP_BOTTOM, PIL.Image.Transpose.TRANSPOSE, PIL.Image.Transpose.ROTATE_270,
             PIL.Image.Transpose.TRANSVERSE, PIL.Image.Transpose.ROTATE_90]  # fmt: skip
    if orientation in range(2, 9):
        return bare.transpose(turns[int(orientation) - 2])
    return bare


# --- files with damage beside their pixels ---------------------------------------------------------


def _chunks_of_png(stream) -> Iterator[tuple[bytes, bytes, bool]]:
    """(name, data, whether its checksum is right) of each chunk; the last may be cut off."""
    stream.seek(8)
    while len(head := stream.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        data = stream.read(length)
        yield name, data, stream.read(4) == struct.pack(">I", zlib.crc32(name + data))
        if name == b"IEND":
            return


def _pixels_of_png(stream) -> tuple[io.BytesIO, bytes | None]:
    """A PNG with the chunks alone that its pixels need, and its colour profile."""
    cleaned, profile = io.BytesIO(), None
    least = {b"gAMA": 4, b"sRGB": 1, b"pHYs": 9, b"acTL": 8, b"fcTL": 26, b"fdAT": 4}  # bytes of those that serve
    cleaned.write(stream.read(8))
    for name, data, right in _chunks_of_png(stream):
        if name == b"iCCP" and right:
            with contextlib.suppress(zlib.error, IndexError):
                compressed = data[data.index(b"\0") + 2 :] if b"\0" in data else b""
                profile = zlib.decompressobj().decompress(compressed, _MAX_PROFILE)
        if name == b"IHDR" and len(data) == 13:
            least[b"tRNS"] = {0: 2, 2: 6, 3: 1}.get(data[9], 2**32)  # by the kind of pixels
        needed = name in (b"IHDR", b"PLTE", b"IDAT")
        if needed or right and len(data) >= least.get(name, 2**32):
            checksum = zlib.crc32(name + data) if right or name == b"IDAT" else 0
            cleaned.write(struct.pack(">I4s", len(data), name) + data + struct.pack(">I", checksum))
    cleaned.write(struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND")))
    cleaned.seek(0)
    return cleaned, profile


def _ended_jpeg(data: bytes, name: str) -> PIL.Image.Image:
    """A JPEG whose end is cut off, if it lacks a few rows at most: phones and interrupted copies leave such.

    In a progressive one every part is about the whole picture, so that none can be missing.
    """
    end = b"\xff\xd9"
    picture = _decoded(io.BytesIO(data + end), name)
    # What the lost bytes would say is seen where other bytes in their place make a difference.
    other = _decoded(io.BytesIO(data + bytes(range(1, 255)) * 8 + end), name)
    differs = (np.asarray(picture) != np.asarray(other)).reshape(picture.height, -1).any(axis=1)
    lost = differs[: picture.height - min(_MAX_ROWS_LOST, picture.height // 10)].any()
    if lost or "progressive" in picture.info:
        raise DamagedPicture("{name} is truncated or damaged: a part of it is missing.", "image", name=name)
    return picture


# --- URLs ------------------------------------------------------------------------------------------


def _download(url: str) -> bytes:
    """The bytes behind an http(s) URL, at most `MAX_DOWNLOAD` of them."""
    import requests

    from mindiffedit import __version__

    name = _shown_address(url)
    # Some hosts refuse libraries that do not say whom they work for.
    agent = f"mindiffedit/{__version__} (picture editor; reads one picture) python-requests/{requests.__version__}"
    begun = time.monotonic()
    try:
        with requests.Session() as session:
            session.headers.update({"User-Agent": agent, "Accept-Encoding": "identity"})
            for _ in range(MAX_REDIRECTS):
                credentials = requests.utils.get_auth_from_url(url)
                # Only a name and password of the URL itself are sent, none that lie on this machine for other programs.
                auth = credentials if any(credentials) else lambda request: request
                # Redirects are followed here, as their pages could be of any length.
                answer = session.get(url, auth=auth, stream=True, timeout=URL_TIMEOUT, allow_redirects=False)
                with answer:
                    target = session.get_redirect_target(answer)
                    if target is None:
                        return _body(answer, name, begun)
                    url = requests.compat.urljoin(answer.url, target)
                    if not re.match("https?:", url, re.IGNORECASE):
                        raise requests.exceptions.InvalidSchema(f"it leads to {cut(url, 40)}, which is no http(s) URL")
            raise requests.TooManyRedirects(f"it leads on and on, {MAX_REDIRECTS} times")
    # urllib3's errors come out where a body is read, UnicodeError and ValueError of hosts that are no names.
    except InputError:
        raise
    except (OSError, ValueError, requests.packages.urllib3.exceptions.HTTPError) as error:
        raise InputError("{name} cannot be fetched: {why}.", "image", name=name, why=_reason(error)) from error


def _body(answer, name: str, begun: float) -> bytes:
    too_much = "{name} sends more than {most} bytes; download the picture and give its path."
    if not answer.ok:
        raise InputError(
            "{name} cannot be fetched: the server answers {code} {reason}.",
            "image",
            name=name,
            code=answer.status_code,
            reason=answer.reason or "",
        )
    promised = answer.headers.get("Content-Length", "")
    if promised.isdigit() and int(promised) > MAX_DOWNLOAD:
        raise InputError(too_much, "image", name=name, most=MAX_DOWNLOAD)
    data = bytearray()
    while chunk := answer.raw.read1(2**16, decode_content=True):
        data += chunk
        if len(data) > MAX_DOWNLOAD:
            raise InputError(too_much, "image", name=name, most=MAX_DOWNLOAD)
        if time.monotonic() - begun > DOWNLOAD_TIMEOUT:
            raise InputError(
                "{name} has not sent its picture in {most} seconds; download it and give its path.",
                "image",
                name=name,
                most=f"{DOWNLOAD_TIMEOUT:.0f}",
            )
    return bytes(data)


def _reason(error: BaseException) -> str:
    """What went wrong, from the innermost of the errors that libraries wrap into one another."""
    while getattr(error, "reason", None) is not None or error.args and isinstance(error.args[0], Exception):
        inner = getattr(error, "reason", None) or error.args[0]
        if not isinstance(inner, Exception):
            break
        error = inner
    text = error.strerror if isinstance(error, OSError) and error.strerror else str((error.args or [error])[0])
    text = re.sub(r"//[^/?#\s]*@", "//", text)
    # Some begin with the Python object that they are about.
    return _sentence(re.sub(r"^.*?<[^>]*>[):]*\s*", "", text) or type(error).__name__)


def _shown_address(url: str) -> str:
    """A URL for messages: without name and password, and not at any length."""
    return cut(re.sub(r"^(\w+://)[^/?#]*@", r"\1", url), _MAX_NAME)


def _sentence(error) -> str:
    """What an error says, on one line and without a full stop."""
    text = " ".join(str(error).split())
    return text.rstrip(".")[:300] or type(error).__name__
