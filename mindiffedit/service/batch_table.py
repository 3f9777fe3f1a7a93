"""The table of results: a JSON object in a line for each row, appended when the row is done; and what is done already.

A line is written at once, and one that a killed process left unfinished is cut off by the next. A process that has a
share of the rows writes a table of its own; all tables of a folder are read.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mindiffedit.errors import InputError
from mindiffedit.images import writing

DONE, FAILED = "done", "failed"
"""States of a row."""

_TABLE = re.compile(r"results(-\d+-of-\d+)?\.jsonl")
_COMPARED = ("state", "finished", "key", "picture", "mask", "output")


# --- files, as they were ---------------------------------------------------------------------------


def stamp(name: str, path: Path) -> dict[str, Any]:
    """A file as it is now: its name as given, size in bytes, time of its last change in ns, and SHA-256.

    Raises:
        OSError: It cannot be read.
    """
    status = os.stat(path)
    return {"path": name, "bytes": status.st_size, "modified": status.st_mtime_ns, "sha256": _sha256(path)}


def is_same(file: Any, path: Path) -> bool:
    """Whether a file is as its stamp says: of the same size and time, or else, as after a copy, of the same content."""
    try:
        status = os.stat(path)
        if not isinstance(file, dict) or status.st_size != file.get("bytes"):
            return False
        return status.st_mtime_ns == file.get("modified") or _sha256(path) == file.get("sha256")
    except OSError:
        return False


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(2**20):
            total.update(chunk)
    return total.hexdigest()


# --- tables ----------------------------------------------------------------------------------------


def table_name(share: tuple[int, int] | None) -> str:
    """The file of a process that does all rows, or the share `(number from 1, of how many)` of them."""
    return "results.jsonl" if share is None else f"results-{share[0]:03d}-of-{share[1]:03d}.jsonl"


def latest_records(folder: Path, ids: Container[str]) -> dict[str, dict[str, Any]]:
    """The last record of each of these rows in all tables of a folder, by id; of it only what tells a finished row."""
    latest: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.iterdir()):
        if _TABLE.fullmatch(path.name):
            for _, record in _records(path):
                known = latest.get(record["id"])
                if record["id"] in ids and (known is None or known["finished"] <= record["finished"]):
                    latest[record["id"]] = {name: record.get(name) for name in _COMPARED}
    return latest


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of a table and where their lines begin; lines that are none, as a full disk leaves them, are not."""
    place = 0
    with open(path, "rb") as stream:
        for line in stream:
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict) and {str} == {type(record.get(name)) for name in ("id", "finished")}:
                    yield place, record
            place += len(line)


class Table:
    """The table that this process writes; a context, in which no other process writes it.

    Raises:
        InputError: Another process does.
    """

    def __init__(self, folder: Path, share: tuple[int, int] | None = None):
        self.path = folder / table_name(share)

    def __enter__(self) -> Table:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = not os.path.samestat(os.fstat(self._file), os.stat(self.path))  # tidied in the meantime
        except BlockingIOError:
            taken = True
        except OSError:  # a file system without locks
            taken = False
        if taken:
            os.close(self._file)
            raise InputError("{path} is being written by another run; wait until it has ended.", path=self.path)
        self._cut_off()
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._file)

    def _cut_off(self) -> None:
        """Leave out a line that has no end."""
        end = os.fstat(self._file).st_size
        start, tail = end, b""
        while start > 0 and b"\n" not in tail:
            start = max(0, start - 2**16)
            tail = os.pread(self._file, end - start, start)
        whole = start + tail.rfind(b"\n") + 1
        if whole < end:
            os.ftruncate(self._file, whole)

    def append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record).encode() + b"\n"
        while line:  # a write may take a part only
            line = line[os.write(self._file, line) :]

    def tidy(self, ids: Iterable[str]) -> None:
        """Write the table anew with the last line of each row only: first of `ids`, in their order, then of others."""
        places = {record["id"]: place for place, record in _records(self.path)}
        order = [name for name in ids if name in places]
        order += sorted(places.keys() - set(order))
        with open(self.path, "rb") as old, writing.atomic_path(self.path) as draft, open(draft, "wb") as new:
            for name in order:
                old.seek(places[name])
                new.write(old.readline())
