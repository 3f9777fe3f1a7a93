"""The rows of a jobs file, JSONL or CSV: read, named and judged one by one. A row that is wrong says why."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from mindiffedit.errors import InputError, first_line
from mindiffedit.images.writing import PICTURE_FORMATS

MAX_ID_LENGTH = 200
MAX_CELL = 2**20  # characters of a CSV's cell; the default of `csv` is 128 Ki


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        number: 1, 2, ... as they come; blank lines are none.
        id: its name in the table of results: its own, or its number in six digits.
        output: path of its picture in the folder of results.
        picture: path or address, as given.
        mask: path, as given, or None.
        options: of `mindiffedit edit`, by name with underscores.
        error: why it cannot be done, in one sentence, or None.
    """

    number: int
    id: str
    output: str = ""
    picture: str = ""
    mask: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def read_rows(path: Path) -> list[Row]:
    """All rows of a jobs file, wrong ones too: a file whose name ends in .csv is a CSV with a header, others are JSONL.

    Raises:
        InputError: There is no such file, or it has no rows, or it is a CSV whose header has no column `picture`.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError("the jobs file {path} cannot be read: {why}.", path=path, why=first_line(error)) from error
    text = content.decode("utf-8-sig", errors="surrogateescape")
    rows: list[Row] = []
    ids: set[str] = set()
    outputs: dict[str, int] = {}
    for number, values in enumerate((_csv if path.suffix.lower() == ".csv" else _jsonl)(text, path), 1):
        try:
            if isinstance(values, str):
                raise InputError(values)
            row = _row(number, values)
            if row.id in ids:
                raise InputError("there is a row with the id {id} before it; give it another.", id=row.id)
            if row.output in outputs:
                raise InputError(
                    "its output {output} is that of row {other}, too; give it an `output` of its own.",
                    output=row.output,
                    other=outputs[row.output],
                )
            outputs[row.output] = number
        except InputError as error:
            name = default_id(number)
            while name in ids:  # which another row has for its own
                name += "-"
            row = Row(number, name, error=str(error))
        ids.add(row.id)
        rows.append(row)
    if not rows:
        raise InputError(
            "the jobs file {path} has no rows; write a picture, a source and a target into each.", path=path
        )
    return rows


def default_id(number: int) -> str:
    return f"{number:06d}"


# --- files -----------------------------------------------------------------------------------------


def _jsonl(text: str, path: Path) -> Iterator[dict[str, Any] | str]:
    """The objects of the lines; of a line that is none, the reason."""
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield f"it is not JSON ({first_line(error)}); write one object in one line."
            continue
        yield values if isinstance(values, dict) else 'it is not a JSON object, such as {"picture": "bowl.png"}.'


def _csv(text: str, path: Path) -> Iterator[dict[str, Any] | str]:
    """The rows below the header by its names, without empty cells; of a row that cannot be read, the reason."""
    limit = csv.field_size_limit(MAX_CELL)
    try:
        reader = csv.reader(io.StringIO(text, newline=""))
        header = [name.strip() for name in next(reader, [])]
        if "picture" not in header:
            raise InputError(
                "the jobs file {path} begins with {names}; the first line of a CSV names its columns, picture, source "
                "and target among them.",
                path=path,
                names=", ".join(header) or "nothing",
            )
        if len(set(header)) < len(header):
            raise InputError("the jobs file {path} has two columns of one name; give each its own.", path=path)
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield f"it is not a row of a CSV ({first_line(error)})."
                continue
            if len(cells) > len(header):
                yield f"it has {len(cells)} cells, and the header {len(header)}; put texts with commas in quotes."
            elif any(cells):
                yield {name: cell for name, cell in zip(header, cells) if cell != ""}
    finally:
        csv.field_size_limit(limit)


# --- one row ---------------------------------------------------------------------------------------


def _row(number: int, values: dict[str, Any]) -> Row:
    # A null is what a program writes for nothing.
    options = {name.replace("-", "_"): value for name, value in values.items() if value is not None}
    name = options.pop("id", default_id(number))
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    if not isinstance(name, str) or not 0 < len(name) <= MAX_ID_LENGTH:
        raise InputError(
            "its id has to be a text of 1 to {most} characters, but is {name!r}.", most=MAX_ID_LENGTH, name=name
        )
    output = _output(options.pop("output", f"{name}.png"))
    paths = {}
    for what in ("picture", "mask"):
        path = paths[what] = options.pop(what, None)
        if path is None and what == "mask":
            continue
        if not isinstance(path, str) or not path or "\0" in path:
            raise InputError("its {what} has to be a path, but is {path!r}.", what=what, path=path)
    return Row(number, name, output, paths["picture"], paths["mask"], options)


def _output(name: Any) -> str:
    """The name of a picture in the folder of results, which it does not leave."""
    if not isinstance(name, str) or "\0" in name:
        raise InputError("its output has to be the name of a file, but is {name!r}.", name=name)
    path = PurePosixPath(name)
    if path.is_absolute() or any(part.startswith(".") for part in path.parts):
        raise InputError(
            "its output {name!r} has to be a name within the folder of results, and none that begins with a dot.",
            name=name,
        )
    if path.suffix.lower() not in PICTURE_FORMATS:
        raise InputError(
            "its output {name!r} has to end in {endings}.", name=name, endings=" or ".join(PICTURE_FORMATS)
        )
    return str(path)
