"""safetensors files: which ones a folder has, what is in them, and their values.

The format: 8 bytes little-endian length of the header, the header (JSON: name -> dtype, shape, offsets), the values. It
is read here without its library because NumPy has no bfloat16, and because the messages should tell a pointer of
git-lfs from a truncated download.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mindiffedit.checkpoints.layout import CheckpointError, WeightsError, held_by, read_json, some
from mindiffedit.errors import Message, first_line

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
"""Endings of files that are never read, since reading a pickle can run code."""

FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1"}
"""The types that weights can have, and what NumPy reads their bytes as."""

_NUMBERS = FLOATS | {
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1"
}  # fmt: skip

SIZES = {name: np.dtype(kind).itemsize for name, kind in _NUMBERS.items()} | {"BOOL": 1}
"""Bytes of one value, of all types that are known."""

_MAX_HEADER = 100_000_000  # bytes


# --- which files -----------------------------------------------------------------------------------


def file_name(stem: str, variant: str | None = None) -> str:
    """The name of weights in one file, such as 'model.safetensors', or 'model.fp16.safetensors' of a variant."""
    return f"{stem}.safetensors" if variant is None else f"{stem}.{variant}.safetensors"


def _index_names(stem: str, variant: str | None) -> tuple[str, ...]:
    """Names of the file that lists the shards; with a variant there is an old spelling too."""
    if variant is None:
        return (f"{stem}.safetensors.index.json",)
    return (f"{stem}.safetensors.index.{variant}.json", f"{stem}.safetensors.{variant}.index.json")


def weight_patterns(stem: str, variant: str | None = None, inside: str = "") -> list[str]:
    """Glob patterns of a model's weight files in a repository, shards included; `inside` is its folder there."""
    dotted = stem if variant is None else f"{stem}.{variant}"
    names = [file_name(stem, variant), *_index_names(stem, variant), f"{dotted}-*-of-*.safetensors"]
    if variant is not None:
        names.append(f"{stem}-*-of-*.{variant}.safetensors")
    return [f"{inside}/{name}" if inside else name for name in names]


def find_weights(folder: Path, stem: str, variant: str | None = None) -> Path | None:
    """The weight file, or the index of its shards, that `folder` has for `variant`; None if it has none."""
    names = (file_name(stem, variant), *_index_names(stem, variant))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def no_weights(folder: Path, stem: str, variant: str | None, writer: str = "diffusers: pipeline") -> CheckpointError:
    """The error for a component's folder without usable weights, by what lies there instead.

    `writer` is whose save_pretrained writes safetensors files of such a model.
    """
    files = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    matches = (re.match(rf"{re.escape(stem)}\.([\w-]+?)[-.].*safetensors", f) for f in files)
    variants = sorted({match[1] for match in matches if match} - {"safetensors"})
    pickles = [f for f in files if f.endswith(PICKLES)]
    if variants:
        what = f"holds only the variant{'s' if len(variants) > 1 else ''} {', '.join(variants)}"
        do: str = Message("Give {variant} {name}.", name=variants[0])
    elif pickles:
        what = f"holds only pickle weights ({some(pickles)}), which are not read because a pickle can run code"
        do = f"Convert them with {writer}.save_pretrained(folder, safe_serialization=True)."
    else:
        what = f"has no weights; it holds {held_by(folder)}"
        do = "The checkpoint is incomplete: copy or download it again."
    return CheckpointError(
        "{folder} {what}. Expected {tried}. {do}",
        do=do,
        parameter="variant" if variants else None,
        folder=folder,
        what=what,
        tried=file_name(stem, variant),
    )


# --- what is in them -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: where it lies and what it is. `offset` is in bytes from the file's start."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """Values as float32, float64 where the file has these, or integers; always exact."""
        values = np.fromfile(self.file, _NUMBERS[self.dtype], math.prod(self.shape), offset=self.offset)
        return _decoded(values, self.dtype).reshape(self.shape)

    def load(self, dtype: np.dtype, mapping: mmap.mmap | None) -> np.ndarray:
        """Values as float32 or float16, infinite where they are too large; the caller may write to them.

        Those that the file has in this type stay where they are in its `mapping` (see `map_file`), uncopied.
        """
        if mapping is None:
            return self.read().astype(dtype, copy=False)
        stored = np.frombuffer(mapping, _NUMBERS[self.dtype], math.prod(self.shape), self.offset).reshape(self.shape)
        if stored.dtype == dtype and stored.flags.aligned:
            return stored
        # Not NumPy's own memory: for that it asks for huge pages, which take a virtual machine twice as long to make.
        size = max(1, stored.size * dtype.itemsize)
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        values = np.frombuffer(memory, dtype, stored.size).reshape(self.shape)
        if self.dtype == "BF16" and dtype == np.float32:
            np.left_shift(stored, 16, out=values.view(np.uint32), dtype=np.uint32)
        else:
            floats = stored if stored.dtype.kind == "f" else _decoded(stored, self.dtype)
            np.copyto(values, floats, casting="same_kind")
        # Beside the copy, the pages of the file would count as this process's memory until all is loaded.
        start = self.offset // mmap.PAGESIZE * mmap.PAGESIZE
        mapping.madvise(mmap.MADV_DONTNEED, start, self.offset - start + stored.nbytes)
        return values

    def rows(self, first: int, count: int) -> Stored:
        """So many rows of it from the first given, as a tensor of its own."""
        row = SIZES.get(self.dtype, 0) * math.prod(self.shape[1:])
        return replace(self, shape=(count, *self.shape[1:]), offset=self.offset + first * row)


def _decoded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers as NumPy reads their bytes, as numbers of a type that it has."""
    if dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        return (values.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return values.astype(np.float32)
    if dtype == "F8_E5M2":
        # The upper half of a float16.
        return (values.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    if dtype == "F8_E4M3":
        # An exponent of one bit less than a float16's, whose bias is greater by 8; all ones are NaN, none infinite.
        bits = values.astype(np.uint16)
        halves = ((bits & 0x80) << 8 | (bits & 0x7F) << 7).view(np.float16)
        return np.where(bits & 0x7F == 0x7F, np.float32(np.nan), halves.astype(np.float32) * np.float32(256))
    return values


def map_file(path: Path) -> mmap.mmap | None:
    """A file as memory that is read when it is touched; what is written there does not reach the file.

    The file can be replaced or deleted meanwhile, but must not be written to. None on Windows, which lets no file be
    replaced that is mapped.
    """
    if os.name != "posix":
        return None
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a safetensors file, in the order of the file, as ``Stored.read`` gives them; and its metadata.

    Raises:
        CheckpointError: the file cannot be read, is not a whole safetensors file, or holds a tensor that is not of
            numbers.
    """
    metadata: dict[str, str] = {}
    stored = read_header(Path(path), metadata)
    others = [f"{name} ({entry.dtype})" for name, entry in stored.items() if entry.dtype not in _NUMBERS]
    if others:
        raise CheckpointError(
            f"{path} holds tensors of other types than {', '.join(_NUMBERS)}: {some(others)}. Convert them first."
        )
    return {name: entry.read() for name, entry in stored.items()}, metadata


def read_header(path: Path, metadata: dict[str, str] | None = None) -> dict[str, Stored]:
    """The tensors of a safetensors file, checked against the file's size. Reads no values.

    What the file says about itself is added to `metadata`, if that is given.

    Raises:
        CheckpointError: the file cannot be read, or is no whole safetensors file.
    """
    again = "Copy or download it again."
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            length = int.from_bytes(start[:8], "little")
            file.seek(8)
            text = file.read(length if length <= min(size, _MAX_HEADER) else 0)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}.") from error
    if size == 0:
        raise CheckpointError(f"{path} is empty. {again}")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a pointer of git-lfs, not the weights. Run `git lfs install` and "
            f"`git lfs pull` in the folder, or download it again."
        )
    if size < 8 or not 2 <= length <= _MAX_HEADER:
        raise CheckpointError(f"{path} is not a safetensors file, or a corrupt one. {again}")
    if length > size - 8:
        raise CheckpointError(
            f"{path} is truncated, or not a safetensors file: its header should have {length} "
            f"bytes, the file has {size}. {again}"
        )
    tensors, end = {}, 0
    try:
        header = json.loads(text)
        notes = header.pop("__metadata__", None)
        if metadata is not None and notes is not None:
            metadata.update({str(key): str(value) for key, value in notes.items()})
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            shape = tuple(int(n) for n in entry["shape"])
            first, last = (int(n) for n in entry["data_offsets"])
            if first != end or min(shape, default=0) < 0 or last < first:
                raise ValueError(f"the place of {name} is wrong")
            if entry["dtype"] in SIZES and last - first != math.prod(shape) * SIZES[entry["dtype"]]:
                raise ValueError(f"the size of {name} is wrong")
            tensors[name] = Stored(path, str(entry["dtype"]), shape, 8 + length + first)
            end = last
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} has a corrupt header ({first_line(error)}). {again}") from error
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path} is {'truncated' if size < 8 + length + end else 'corrupt'}: {size} bytes, expected "
            f"{8 + length + end}. {again}"
        )
    return tensors


def read_headers(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, or of all shards that an index file lists. Reads no values.

    Raises:
        CheckpointError: a file is missing, cannot be read, or is no whole safetensors file; or the index is none.
        WeightsError: the index names another shard for a weight than has it.
    """
    if path.suffix != ".json":
        return read_header(path)
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{path}: expected a weight_map from weight to file, got {type(places).__name__}")
    tensors: dict[str, Stored] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path} names the shard {file!r}, expected a safetensors file beside it")
        if not (path.parent / file).is_file():
            raise CheckpointError(f"{path.parent / file} is missing, and {path.name} names it. Download it again.")
        shard = read_header(path.parent / file)
        twice = sorted(shard.keys() & tensors.keys())
        if twice:
            raise CheckpointError(f"{path}: {some(twice)} in more than one shard. Download the checkpoint again.")
        tensors |= shard
    misplaced = sorted(n for n, file in places.items() if n not in tensors or tensors[n].file.name != file)
    if misplaced:
        raise WeightsError(f"{path} lists weights that are not in the shard it names: {', '.join(misplaced)}")
    return tensors
