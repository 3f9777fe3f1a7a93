"""What every row of a batch has in common, and one row from its files to its picture and its record."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import re
import traceback
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindiffedit.cli.wording import kind_and_text, told
from mindiffedit.errors import InputError, InputTypeError
from mindiffedit.images import colours, reading, writing
from mindiffedit.options import NumericalError
from mindiffedit.service.batch_rows import Row
from mindiffedit.service.batch_table import DONE, FAILED, is_same, stamp

if TYPE_CHECKING:
    from mindiffedit.service.editor import Editor

_ADDRESS = re.compile(r"\s*(https?|data|file):", re.IGNORECASE)


def loaded(args: Namespace, number: int) -> Editor:
    """The editor of a worker, the `number`-th of this machine from 0 on.

    On a CPU it computes on `args.cores` cores of its own: how many there are is seen in the last digits of its results.
    """
    from mindiffedit.service import editor

    model = editor.Editor.load(args)
    if model.device == "CPU":
        most = len(os.sched_getaffinity(0))
        if args.cores > most:
            raise InputError("--cores {count}: there are {most}; give at most that many.", count=args.cores, most=most)
        cores = cores_of(number, args.cores)
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(int(thread), cores)
    return model


def cores_of(number: int, count: int) -> set[int]:
    """So many of the cores that this process may use; others for the next number, as long as there are some."""
    cores = sorted(os.sched_getaffinity(0))
    return {cores[(number * count + i) % len(cores)] for i in range(count)}


@dataclass(frozen=True)
class Task:
    """What a worker needs beside its rows.

    Attributes:
        args: of `mindiffedit edit`, for its model.
        defaults: of the rows' options.
        home: where relative paths of pictures and masks begin, an absolute path.
        folder: of the results, an absolute path.
        model: what tells this model and its way of running from another, as `identity` says.
        versions: of the packages that compute.
    """

    args: Namespace
    defaults: Mapping[str, Any]
    home: Path
    folder: Path
    model: Mapping[str, Any]
    versions: Mapping[str, str]

    def options(self, row: Row) -> dict[str, Any]:
        return {**self.defaults, **row.options}

    def files(self, row: Row) -> dict[str, str]:
        """The names of the files that a row reads."""
        return {what: name for what, name in (("picture", row.picture), ("mask", row.mask)) if name}

    def paths(self, row: Row) -> dict[str, Path | None]:
        """The paths of these files; None for an address."""
        return {what: None if _ADDRESS.match(name) else self.home / name for what, name in self.files(row).items()}

    # --- done, or to be done ---------------------------------------------------------------------------

    def key(self, row: Row) -> str:
        """Tells a row from a changed one: by its options, its model and the versions, not by what is in its files."""
        everything = [self.files(row), row.output, self.options(row), self.model, self.versions]
        return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()

    def is_finished(self, row: Row, record: Mapping[str, Any] | None) -> bool:
        """Whether a record is that of this very row, its files are as they were, and its picture is there."""
        if record is None or record["state"] != DONE or record["key"] != self.key(row):
            return False
        paths = {**self.paths(row), "output": self.folder / row.output}
        return all(path is None or is_same(record[what], path) for what, path in paths.items())

    # --- to do -----------------------------------------------------------------------------------------

    def do(self, editor: Editor, row: Row) -> dict[str, Any]:
        """Edit a row and write its picture, whole or not at all; returns its record, whatever happens."""
        try:
            return self._done(editor, row)
        except (InputError, InputTypeError, NumericalError) as error:
            return self.failed(row, told(error.message, "edit"))
        except Exception as error:  # memory that runs out, a full disk, a bug: of this row, not of the batch
            return {**self.failed(row, f"{kind_and_text(error)}."), "traceback": traceback.format_exc()}

    def _done(self, editor: Editor, row: Row) -> dict[str, Any]:
        names, paths = self.files(row), self.paths(row)
        stamps = {what: _stamp(name, paths[what]) for what, name in names.items()}
        read = {what: reading.load_as_is(paths[what] or name) for what, name in names.items()}
        edited = editor.edit(read["picture"], self.options(row), mask=read.get("mask"))
        target = self.folder / row.output
        target.parent.mkdir(parents=True, exist_ok=True)
        writing.save_image_atomically(edited.image, target)
        settings = dict(edited.settings)
        losses = colours.fit_format(edited.image, writing.format_of(target))[1]
        if losses and settings.get("report"):
            settings["report"] = {**settings["report"], "warnings": [*settings["report"]["warnings"], *losses]}
        return {
            **self._head(row, DONE),
            **stamps,
            "output": stamp(row.output, target),
            "seed": settings.get("seed"),
            "seconds": edited.seconds,
            "report": settings.pop("report", None),
            "settings": {name: value for name, value in settings.items() if name != "seconds"},
            "versions": self.versions,
        }

    def failed(self, row: Row, sentence: str) -> dict[str, Any]:
        """The record of a row that cannot be done."""
        return {**self._head(row, FAILED), "error": sentence}

    def _head(self, row: Row, state: str) -> dict[str, Any]:
        now = datetime.datetime.now(datetime.timezone.utc)
        return {
            "id": row.id,
            "row": row.number,
            "state": state,
            "finished": now.isoformat(timespec="milliseconds"),
            "key": self.key(row),
        }


def _stamp(name: str, path: Path | None) -> dict[str, Any]:
    if path is None or not path.is_file():  # of which `load_image` says what is wrong
        return {"path": name}
    return stamp(name, path)
