"""What a request for an edit or a mask says: fields of a form, as OpenAI's clients send them and with our options."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import PIL.Image
import PIL.ImageChops

from mindiffedit.errors import InputError
from mindiffedit.images import pictures, reading
from mindiffedit.images.colours import to_srgb
from mindiffedit.service.editor import option_schemas
from mindiffedit.service.fetching import fetch

MAX_PICTURES = 10
READ = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""Formats of pictures that are read: Pillow has decoders of many more, which are written with less care."""
FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}

_OPTION_OF = {"prompt": "target", "source_prompt": "source"}
_FIELD_OF = {option: field for field, option in _OPTION_OF.items()}
_UNUSED = ("model", "user", "quality", "background", "input_fidelity", "safety_identifier")
"""What OpenAI's clients may send and what means nothing here."""


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        body: bytes of the whole request, and of a picture behind a URL.
        pixels: of the picture, and of the mask.
        size: pixels of a side that the model works at, by the field `size`.
        urls: whether `image` and `mask` may be URLs.
    """

    body: int = 32 * 2**20
    pixels: int = 4096 * 4096
    size: int = 1024
    urls: bool = False


@dataclass(frozen=True)
class Asked:
    """A request, understood.

    Attributes:
        picture: of any mode.
        mask: white where the picture may change, or None.
        options: of `Editor.edit`.
        count: how many results, of one seed after the other.
        format: a key of `FORMATS`.
        as_url: whether results are given as data URLs.
    """

    picture: PIL.Image.Image
    mask: PIL.Image.Image | None
    options: dict[str, Any]
    count: int
    format: str
    as_url: bool


def understood(fields: Mapping[str, str | bytes], command: str, limits: Limits) -> Asked:
    """A request for the command "edit" or "mask"; its pictures are decoded here.

    Args:
        fields: texts, and the contents of files.

    Raises:
        InputError: a field is missing, unknown, or has a value that does not fit; the sentence names it in backticks.
            Options are not judged here.
    """
    schemas = _schemas(command)
    for name, value in fields.items():
        if name not in schemas:
            raise InputError("there is no field {name!r} here; /docs lists those that there are.", name=name)
        if isinstance(value, bytes) != (name in ("image", "mask")) and not (limits.urls and name in ("image", "mask")):
            kind = "a file" if name in ("image", "mask") else "a text, not a file"
            raise InputError("{parameter} has to be {kind}.", name, kind=kind)
    if "image" not in fields:
        raise InputError("{parameter} is missing: send the picture as a file.", "image")
    picture = _picture(fields["image"], "image", limits)
    mask = _picture(fields["mask"], "mask", limits) if "mask" in fields else None
    texts = {name: value for name, value in fields.items() if isinstance(value, str) and name not in ("image", "mask")}
    size = texts.pop("size", "auto")
    if size != "auto" and not re.fullmatch("[0-9]{1,5}", size):
        picture = _resized(picture, size, limits)
    elif size != "auto":
        if int(size) > limits.size:
            raise InputError(
                "{parameter} is {size}; at most {most} is worked at here.", "size", size=size, most=limits.size
            )
        texts["size"] = size
    count = _choice(texts, "n", "1", [str(number) for number in range(1, MAX_PICTURES + 1)])
    as_url = _choice(texts, "response_format", "b64_json", ["b64_json", "url"]) == "url"
    kind = _choice(texts, "output_format", "png", list(FORMATS))
    options = {_OPTION_OF.get(name, name): value for name, value in texts.items() if name not in _UNUSED}
    return Asked(picture, None if mask is None else _white_on_black(mask), options, int(count), kind, as_url)


def in_fields(sentence: str) -> str:
    """A sentence of the editor's in the names of these fields: `prompt` is its `target`."""
    return re.sub("`(source|target)`", lambda found: f"`{_FIELD_OF[found[1]]}`", sentence)


def field_of(parameter: str | None) -> str | None:
    """The field of an error's parameter."""
    return _FIELD_OF.get(parameter or "", parameter)


def _choice(texts: dict[str, str], name: str, default: str, choices: list[str]) -> str:
    value = texts.pop(name, default)
    if value not in choices:
        raise InputError(
            "{parameter} has to be one of {choices}, but is {value!r}.", name, choices=", ".join(choices), value=value
        )
    return value


def _picture(content: str | bytes, name: str, limits: Limits) -> PIL.Image.Image:
    try:
        if isinstance(content, str):
            content = fetch(content.strip(), limits.body)
        return reading.decode(io.BytesIO(content), f"`{name}`", limits.pixels, READ)
    except InputError as error:
        raise error.renamed(image=name) from error


def _white_on_black(mask: PIL.Image.Image) -> PIL.Image.Image:
    """A mask as the editor takes it; one that is transparent somewhere is OpenAI's, which is so where to edit."""
    if mask.has_transparency_data:
        alpha = mask.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            return PIL.ImageChops.invert(alpha)
    return mask


def _resized(picture: PIL.Image.Image, size: str, limits: Limits) -> PIL.Image.Image:
    """The picture at the size WIDTHxHEIGHT that its result is to have."""
    found = re.fullmatch("([0-9]{1,5})x([0-9]{1,5})", size)
    width, height = (int(side) for side in found.groups()) if found else (0, 0)
    if not 0 < width * height <= limits.pixels:
        raise InputError(
            "{parameter} is {size!r}; give auto, WIDTHxHEIGHT of at most {most} pixels, or the one number N to work on "
            "at most N x N pixels.",
            "size",
            size=size,
            most=limits.pixels,
        )
    if abs(width * picture.height - height * picture.width) > 0.05 * height * picture.width:
        raise InputError(
            "{parameter} is {size}, and the picture {width} x {height}, which is of another shape; crop it first.",
            "size",
            size=size,
            width=picture.width,
            height=picture.height,
        )
    return pictures.restore_size(to_srgb(picture), (width, height))


# --- what the documentation says -------------------------------------------------------------------


@functools.cache
def _schemas(command: str) -> dict[str, dict[str, Any]]:
    """JSON schemas of the fields."""
    file = {"type": "string", "format": "binary"}
    fields: dict[str, dict[str, Any]] = {
        "image": {**file, "description": f"the picture: {', '.join(READ)}"},
        "prompt": {"type": "string", "description": "what it should show"},
        "source_prompt": {
            "type": "string",
            "description": "what it shows; may be missing where the server has a captioner",
        },
        "size": {
            "type": "string",
            "description": "auto: the result has the picture's size (the default); WIDTHxHEIGHT: the result has that "
            "size; N: the model works on at most N x N pixels",
        },
        "response_format": {
            "enum": ["b64_json", "url"],
            "description": "url: a data URL, since nothing is kept (default: b64_json)",
        },
    }
    if command == "edit":
        fields["mask"] = {
            **file,
            "description": "where to edit: transparent where it has transparency, as OpenAI's, else white (default: "
            "found by the two prompts)",
        }
        fields["n"] = {"type": "integer", "minimum": 1, "maximum": MAX_PICTURES, "description": "results (default: 1)"}
        fields["output_format"] = {"enum": list(FORMATS), "description": "default: png"}
    fields.update(dict.fromkeys(_UNUSED, {"type": "string", "description": "not used"}))
    others = {name: schema for name, schema in option_schemas(command).items() if name not in (*_FIELD_OF, "size")}
    return {**fields, **others}


def body_schema(command: str) -> dict[str, Any]:
    """The request's body, as OpenAPI describes it."""
    schema = {"type": "object", "required": ["image", "prompt"], "properties": _schemas(command)}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
