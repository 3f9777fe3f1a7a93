"""The file that `mindiffedit parity record` writes: the reference's tensors, and how they were made.

A safetensors file with one tensor for each stage, in a fixed order, and a manifest. The manifest says what made the
trace (versions, arguments, hashes of the model's files, floors), and lists every tensor with its shape, dtype and hash;
a hash of its own covers it. What was changed or cut off after the recording is refused, by name.
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
from mindiffedit.errors import InputError, first_line
from mindiffedit.images import writing

FORMAT = "mindiffedit-parity"
VERSION = 1
INPUTS = "input/"  # what the names of tensors begin with that are given to both sides, and not compared

# The components that a trace depends on, and their files; others, such as a safety checker, change no tensor.
COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
_FILES = ("*.safetensors", "*.json", "merges.txt")
_WITH_WEIGHTS = ("text_encoder", "unet", "vae")
_VOCABULARY = ("vocab.json", "merges.txt", "tokenizer.json")
# Keys of a config that saving it anew may change; the dtype is that of the file, and an argument of the run.
_SAVING = ("transformers_version", "torch_dtype", "dtype")

_MAX_NAMED = 3  # files that one message names
_ANEW = "record anew with `mindiffedit parity record`"

__all__ = [
    "COMPONENTS",
    "FORMAT",
    "INPUTS",
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
    """

    trace: dict[str, np.ndarray]
    manifest: dict[str, Any]
    inputs: dict[str, np.ndarray] = field(default_factory=dict)


# --- writing and reading ---------------------------------------------------------------------------


def write_golden(path, trace: Mapping[str, np.ndarray], manifest: Mapping[str, Any]) -> None:
    """Write a trace and how it was made, whole or not at all.

    Args:
        trace: {name: array} in the order of the stages; names that begin with "input/" are inputs. Numbers or
            booleans of any shape, finite.
        manifest: what JSON can hold.

    Raises:
        ValueError: NaN or infinity (`options.NumericalError`, which names the stage).
    """
    arrays = {name: np.asarray(array, order="C") for name, array in trace.items()}
    for name, array in arrays.items():
        options.check_finite(array, name)
    text = _canonical({"manifest": manifest, "tensors": [_entry(name, array) for name, array in arrays.items()]})
    metadata = {"format": FORMAT, "format_version": str(VERSION), "manifest": text, "manifest_sha256": _hash_text(text)}
    with writing.atomic_path(path) as draft:
        save_file(arrays, str(draft), metadata=metadata)


def _entry(name: str, array: np.ndarray) -> dict[str, Any]:
    # Little-endian as in the file, whatever the machine is.
    content = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    digest = hashlib.sha256(content).hexdigest()
    return {"name": name, "shape": list(array.shape), "dtype": array.dtype.name, "sha256": digest}


def _canonical(content, allow_nan: bool = False) -> str:
    """JSON with one spelling only: sorted keys, no spaces."""
    return json.dumps(content, sort_keys=True, allow_nan=allow_nan, separators=(",", ":"))


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


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
            document = _read_document(path, file.metadata() or {})
            names = [entry["name"] for entry in document["tensors"]]
            if set(names) != set(file.keys()):
                raise InputError("{path} has not the tensors that its manifest lists; {anew}.", path=path, anew=_ANEW)
            arrays = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise InputError(
            "{path} is not a whole safetensors file ({why}); copy it again, or {anew}.",
            path=path,
            why=first_line(error),
            anew=_ANEW,
        ) from error
    for entry in document["tensors"]:
        if _entry(entry["name"], arrays[entry["name"]]) != entry:
            raise InputError(
                "{path}: the tensor {name} was changed after the recording; {anew}.",
                path=path,
                name=entry["name"],
                anew=_ANEW,
            )
    inputs = {name[len(INPUTS) :]: array for name, array in arrays.items() if name.startswith(INPUTS)}
    trace = {name: array for name, array in arrays.items() if not name.startswith(INPUTS)}
    return Golden(trace, document["manifest"], inputs)


def _read_document(path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The manifest with the list of tensors."""
    if metadata.get("format") != FORMAT:
        raise InputError("{path} was not written by `mindiffedit parity record`; give a file that was.", path=path)
    version = metadata.get("format_version")
    if version != str(VERSION):
        raise InputError(
            "{path} has format version {version}, this program reads version {known}; update mindiffedit, or {anew}.",
            path=path,
            version=version,
            known=VERSION,
            anew=_ANEW,
        )
    text = metadata.get("manifest", "")
    if _hash_text(text) != metadata.get("manifest_sha256"):
        raise InputError("{path}: the manifest was changed after the recording; {anew}.", path=path, anew=_ANEW)
    return json.loads(text)


# --- the model's files -----------------------------------------------------------------------------


def hash_files(folder) -> dict[str, str]:
    """Hashes of the files that make a checkpoint what it is.

    Args:
        folder: checkpoint folder as diffusers writes it, one folder for each component.

    Returns:
        {path relative to `folder`, with slashes: sha256 in hexadecimal}, sorted. Weights and vocabularies are hashed
        byte by byte; of other .json files the content, without keys that begin with "_" and without the version and
        dtype of whoever saved it, so that saving a checkpoint anew does not make it another.

    Raises:
        ValueError: a component has no such file, one with weights no safetensors file, or a file cannot be read.
    """
    folder, hashes = Path(folder), {}
    for component in COMPONENTS:
        paths = {path for pattern in _FILES for path in (folder / component).glob(pattern) if path.is_file()}
        needed = "weights as safetensors" if component in _WITH_WEIGHTS else "configuration"
        if not paths or component in _WITH_WEIGHTS and not any(path.suffix == ".safetensors" for path in paths):
            raise InputError(
                "{folder} has no {needed} of the {component}; give a checkpoint folder in diffusers' layout.",
                folder=folder,
                needed=needed,
                component=component,
            )
        for path in paths:
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
        ("other settings, though the same weights,", different),
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


def _some(names: Sequence[str]) -> str:
    """The first few of several names."""
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _hash_file(path: Path) -> str:
    try:
        if path.suffix == ".json" and path.name not in _VOCABULARY:
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict):  # without the marks of who saved it
                content = {key: value for key, value in content.items() if key[:1] != "_" and key not in _SAVING}
            # Some schedulers' settings are infinite, which Python writes and reads as -Infinity.
            return _hash_text(_canonical(content, allow_nan=True))
        digest = hashlib.sha256()
        with open(path, "rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise InputError("{path} cannot be read: {why}.", path=path, why=error.strerror or error) from error
    except ValueError as error:
        raise InputError("{path} is not JSON: {why}.", path=path, why=str(error).rstrip(".")) from error


# --- the arguments of a run ------------------------------------------------------------------------


def check_arguments(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Check that arguments given on the command line are those of the recording.

    Args:
        recorded: arguments by name ("mask_strength" is the option --mask-strength), from the manifest.
        given: the same names; None was not given and agrees with everything.

    Raises:
        ValueError: a given argument differs. All that differ are named.
    """
    different = [name for name, value in given.items() if value is not None and value != recorded[name]]
    if different:
        raise InputError(
            "the golden file was recorded with {were}, but {are}; leave {them} out or record anew.",
            were=" and ".join(_said(name, recorded[name]) for name in different),
            are=" and ".join(f"{_option(name)} is {_shown(given[name])}" for name in different),
            them="it" if len(different) == 1 else "them",
        )


def _said(name: str, value) -> str:
    return f"no {_option(name)}" if value is None else f"{_option(name)} {_shown(value)}"


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shown(value) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)
