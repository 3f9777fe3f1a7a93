"""The file that `mindiffedit parity record` writes: the reference's tensors, and how they were made.

A safetensors file with one tensor for each stage, in a fixed order, and a manifest. The manifest says what
made the trace (versions, arguments, hashes of the model's files, floors), and lists every tensor with its
shape, dtype and hash; a hash of its own covers it. What was changed or cut off after the recording is
refused, by name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mindiffedit import options
from mindiffedit.errors import InputError
from mindiffedit.images import writing

FORMAT = "mindiffedit-parity"
VERSION = 1
INPUTS = "input/"  # what the names of tensors begin with that are given to both sides, and not compared

# The components that a trace depends on, and their files.
COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
MODEL_FILES = ("*.safetensors", "*.json", "merges.txt")
_WITH_WEIGHTS = ("text_encoder", "unet", "vae")
_VOCABULARY = ("vocab.json", "merges.txt", "tokenizer.json")
# Keys of a config that saving it anew may change; the dtype is that of the file, and an argument of the run.
_SAVING = ("transformers_version", "torch_dtype", "dtype")

_BLOCK = 2**20  # bytes that are hashed at a time
_MAX_NAMED = 3  # files or arguments that one message names

# Every dtype that a trace may have, with safetensors' name of it.
_DTYPES = {
    "bool": "BOOL",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
}

_ANEW = "record anew with `mindiffedit parity record`"

__all__ = [
    "COMPONENTS",
    "FORMAT",
    "INPUTS",
    "MODEL_FILES",
    "VERSION",
    "Golden",
    "check_arguments",
    "check_files",
    "hash_files",
    "read_golden",
    "write_golden",
]


@dataclass(frozen=True)
class Golden:
    """What a golden file holds.

    Attributes:
        trace: {stage: array}, in the order of the stages.
        manifest: what was given to `write_golden`, as JSON gives it back: tuples are lists.
        inputs: {name: array}, the tensors under "input/", by their names without it.
        sha256: hash of the manifest, and so of the whole recording.
    """

    trace: dict[str, np.ndarray]
    manifest: dict[str, Any]
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    sha256: str = ""


# --- writing ---------------------------------------------------------------------------------------


def write_golden(path, trace: Mapping[str, np.ndarray], manifest: Mapping[str, Any]) -> None:
    """Write a trace and how it was made, whole or not at all.

    Args:
        trace: {name: array} in the order of the stages; names that begin with "input/" are inputs. Numbers or
            booleans of any shape, not empty, finite.
        manifest: anything that JSON can hold, NumPy's numbers and arrays and paths included.

    Raises:
        ValueError: nothing but inputs, a name that a file cannot hold, a dtype other than plain numbers, an empty
            array, NaN or infinity (`options.NumericalError`, which names the stage), or a manifest that is no JSON.
    """
    arrays = {name: _storable(name, array) for name, array in trace.items()}
    if all(name.startswith(INPUTS) for name in arrays):
        raise InputError("a golden file needs at least one stage to compare with, but the trace has none.")
    document = {
        "manifest": dict(manifest),
        "tensors": [
            {
                "name": name,
                "shape": list(array.shape),
                "dtype": array.dtype.name,
                "sha256": _hash_array(array),
            }
            for name, array in arrays.items()
        ],
    }
    try:
        text = _canonical(document)
    except (TypeError, ValueError) as error:
        raise InputError("the manifest cannot be written as JSON: {why}.", why=str(error).rstrip(".")) from error
    metadata = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "manifest": text,
        "manifest_sha256": _hash_text(text),
    }
    with writing.atomic_path(path) as draft:
        save_file(arrays, str(draft), metadata=metadata)


def _storable(name, array) -> np.ndarray:
    """The array as the file holds it: in C order, of a plain dtype, not empty, finite."""
    if not isinstance(name, str) or not name or name == "__metadata__":
        raise InputError("a stage cannot be called {name!r}; give it a name such as 'mask/moments'.", name=name)
    array = np.asarray(array, order="C")
    if array.dtype.name not in _DTYPES:
        raise InputError(
            "the stage {name} is of dtype {dtype}, which a golden file does not hold.",
            name=name,
            dtype=array.dtype,
        )
    if array.size == 0:
        raise InputError(
            "the stage {name} is empty, with shape {shape}; nothing could be compared with it.",
            name=name,
            shape=array.shape,
        )
    options.check_finite(array, name)
    return array


def _canonical(content, allow_nan: bool = False) -> str:
    """JSON with one spelling only: sorted keys, no spaces."""
    return json.dumps(content, default=_to_json, sort_keys=True, allow_nan=allow_nan, separators=(",", ":"))


def _to_json(value):
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _hash_array(array: np.ndarray) -> str:
    # Little-endian as in the file, whatever the machine is.
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()).hexdigest()


# --- reading ---------------------------------------------------------------------------------------


def read_golden(path) -> Golden:
    """Read what `write_golden` wrote, every hash checked.

    Raises:
        ValueError: the file is missing, cut off, no safetensors file, of another format or another version, or
            manifest or tensors are not those that were written. The message names the path and says what to do.
    """
    if not os.path.isfile(path):
        raise InputError("there is no golden file {path}; make one with `mindiffedit parity record`.", path=path)
    try:
        with safe_open(str(path), framework="numpy") as file:
            document, digest = _read_document(path, file.metadata() or {})
            arrays = _read_tensors(path, file, document["tensors"])
    except (SafetensorError, OSError) as error:
        raise InputError(
            "{path} is not a whole safetensors file ({why}); copy it again, or {anew}.",
            path=path,
            why=str(error).rstrip("."),
            anew=_ANEW,
        ) from error
    inputs = {name[len(INPUTS) :]: array for name, array in arrays.items() if name.startswith(INPUTS)}
    trace = {name: array for name, array in arrays.items() if not name.startswith(INPUTS)}
    return Golden(trace, document["manifest"], inputs, digest)


def _read_document(path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """The manifest with the list of tensors, and its hash."""
    if metadata.get("format") != FORMAT:
        raise InputError("{path} was not written by `mindiffedit parity record`; give a file that was.", path=path)
    _check_version(path, metadata.get("format_version"))
    try:
        document = json.loads(metadata.get("manifest", ""))
        digest = _hash_text(_canonical(document))
    except ValueError as error:
        raise InputError("{path}: the manifest is not JSON; {anew}.", path=path, anew=_ANEW) from error
    if digest != metadata.get("manifest_sha256"):
        raise InputError("{path}: the manifest was changed after the recording; {anew}.", path=path, anew=_ANEW)
    if not _is_document(document):
        raise InputError("{path}: the manifest does not list its tensors as it should; {anew}.", path=path, anew=_ANEW)
    return document, digest


def _check_version(path, version) -> None:
    if version == str(VERSION):
        return
    newer = isinstance(version, str) and version.isdecimal() and int(version) > VERSION
    remedy = f"update mindiffedit, or {_ANEW}" if newer else _ANEW
    raise InputError(
        "{path} has format version {version}, this program reads version {known}; {remedy}.",
        path=path,
        version=version,
        known=VERSION,
        remedy=remedy,
    )


def _is_document(document) -> bool:
    if not isinstance(document, dict) or not isinstance(document.get("manifest"), dict):
        return False
    tensors = document.get("tensors")
    if not isinstance(tensors, list) or not all(
        isinstance(one, dict)
        and isinstance(one.get("name"), str)
        and isinstance(one.get("shape"), list)
        and one.get("dtype") in _DTYPES
        and isinstance(one.get("sha256"), str)
        for one in tensors
    ):
        return False
    return len({one["name"] for one in tensors}) == len(tensors)


def _read_tensors(path, file, listed: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    names, there = [one["name"] for one in listed], set(file.keys())
    missing = [name for name in names if name not in there]
    extra = sorted(there - set(names))
    if missing:
        raise InputError(
            "{path} lacks the tensor {first} that its manifest lists; {anew}.",
            path=path,
            first=_first(missing),
            anew=_ANEW,
        )
    if extra:
        raise InputError(
            "{path} has the tensor {first} that its manifest does not list; {anew}.",
            path=path,
            first=_first(extra),
            anew=_ANEW,
        )
    arrays = {}
    for one in listed:
        name, part = one["name"], file.get_slice(one["name"])
        found, expected = (part.get_dtype(), part.get_shape()), (_DTYPES[one["dtype"]], one["shape"])
        if found != expected:
            raise InputError(
                "{path}: the tensor {name} is {dtype} of shape {shape}, but the manifest says {other} of shape "
                "{expected}; {anew}.",
                path=path,
                name=name,
                dtype=found[0],
                shape=found[1],
                other=expected[0],
                expected=expected[1],
                anew=_ANEW,
            )
        arrays[name] = file.get_tensor(name)
        if _hash_array(arrays[name]) != one["sha256"]:
            raise InputError(
                "{path}: the tensor {name} was changed after the recording; {anew}.",
                path=path,
                name=name,
                anew=_ANEW,
            )
    return arrays


def _first(names: Sequence[str]) -> str:
    """The first of several names, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


# --- the model's files -----------------------------------------------------------------------------


def hash_files(folder, components: Sequence[str] = COMPONENTS, patterns: Sequence[str] = MODEL_FILES) -> dict[str, str]:
    """Hashes of the files that make a checkpoint what it is.

    Args:
        folder: checkpoint folder as diffusers writes it, one folder for each component.
        components: which of them; others, such as a safety checker, change no tensor.
        patterns: which files in them, as in `Path.glob`.

    Returns:
        {path relative to `folder`, with slashes: sha256 in hexadecimal}, sorted. Weights and vocabularies are hashed
        byte by byte; of other .json files the content, without keys that begin with "_" and without the version and
        dtype of whoever saved it, so that saving a checkpoint anew does not make it another.

    Raises:
        ValueError: a component has no such file, one with weights no safetensors file, or a file cannot be read.
    """
    folder, hashes = Path(folder), {}
    if not folder.is_dir():
        raise InputError("there is no checkpoint folder {folder}.", folder=folder)
    for component in components:
        found = {path for pattern in patterns for path in (folder / component).glob(pattern) if path.is_file()}
        if not found:
            raise InputError(
                "{folder} is no checkpoint folder: it has no {component} with {patterns}.",
                folder=folder,
                component=component,
                patterns=" or ".join(patterns),
            )
        if component in _WITH_WEIGHTS and not any(path.suffix == ".safetensors" for path in found):
            raise InputError(
                "{folder} has no weights of the {component} as a safetensors file.",
                folder=folder,
                component=component,
            )
        for path in found:
            hashes[path.relative_to(folder).as_posix()] = _hash_file(path)
    return dict(sorted(hashes.items()))


def check_files(folder, expected: Mapping[str, str]) -> None:
    """Check that a folder has the model that a trace was recorded with.

    Args:
        folder: checkpoint folder.
        expected: what `hash_files` gave for the recording's. Files that are not in it may be there.

    Raises:
        ValueError: a file is missing, which makes it another model; weights or vocabulary differ; or only settings
            do. The message names the first of these files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("there is no checkpoint folder {folder}.", folder=folder)
    if not expected:
        raise InputError("the recording lists no file of its model, so nothing says which model it was.")
    missing = [name for name in expected if not (folder / name).is_file()]
    if missing:
        raise InputError(
            "{folder} is another model folder than the recorded one: {count} of its {all} files are missing, "
            "{some}; give the folder that was recorded.",
            folder=folder,
            count=len(missing),
            all=len(expected),
            some=_some(missing),
        )
    different = [name for name, digest in expected.items() if _hash_file(folder / name) != digest]
    for what, names in (
        ("other weights", [name for name in different if name.endswith(".safetensors")]),
        ("another vocabulary", [name for name in different if Path(name).name in _VOCABULARY]),
    ):
        if names:
            raise InputError(
                "{folder} has {what} than the recorded model: {some} {differ}; give the model that was recorded, or "
                "{anew}.",
                folder=folder,
                what=what,
                some=_some(names),
                differ="differs" if len(names) == 1 else "differ",
                anew=_ANEW,
            )
    if different:
        raise InputError(
            "{folder} has the recorded weights but other settings: {some} {differ}; restore the recorded ones, or "
            "{anew}.",
            folder=folder,
            some=_some(different),
            differ="differs" if len(different) == 1 else "differ",
            anew=_ANEW,
        )


def _some(names: Sequence[str]) -> str:
    """The first few of several names."""
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _hash_file(path: Path) -> str:
    try:
        if path.suffix == ".json" and path.name not in _VOCABULARY:
            # Some schedulers' settings are infinite, which Python writes and reads as -Infinity.
            return _hash_text(_canonical(_settings(path), allow_nan=True))
        digest = hashlib.sha256()
        with open(path, "rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise InputError("{path} cannot be read: {why}.", path=path, why=error.strerror or error) from error


def _settings(path: Path):
    """What a config says, without the marks of who saved it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError("{path} is not JSON: {why}.", path=path, why=str(error).rstrip(".")) from error
    if not isinstance(content, dict):
        return content
    return {key: value for key, value in content.items() if not key.startswith("_") and key not in _SAVING}


# --- the arguments of a run ------------------------------------------------------------------------


def check_arguments(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Check that arguments given on the command line are those of the recording.

    Args:
        recorded: arguments by name ("mask_strength" is the option --mask-strength), from the manifest.
        given: the same names; None was not given and agrees with everything.

    Raises:
        ValueError: a given argument differs, or the recording has none of that name. All that differ are named.
    """
    different: list[str] = [
        name
        for name, value in given.items()
        if value is not None and (recorded.get(name) is None or _plain(value) != _plain(recorded[name]))
    ]
    if not different:
        return
    were = " and ".join(_said(name, recorded.get(name)) for name in different)
    are = " and ".join(f"{_option(name)} is {_shown(given[name])}" for name in different)
    them = "it" if len(different) == 1 else "them"
    raise InputError(
        "the golden file was recorded with {were}, but {are}; leave {them} out or record anew.",
        were=were,
        are=are,
        them=them,
    )


def _said(name: str, value) -> str:
    return f"no {_option(name)}" if value is None else f"{_option(name)} {_shown(value)}"


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shown(value) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def _plain(value):
    """The value as it comes out of JSON; booleans told from the numbers that they equal."""
    value = json.loads(json.dumps(value, default=_to_json))
    return ("boolean", value) if isinstance(value, bool) else value
