"""What a comparison found, for people and programs: a table, a report, pictures of the worst tensors."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from mindiffedit.errors import InputError
from mindiffedit.images import sheets, writing
from mindiffedit.parity.metrics import Comparison, first_failure, passed

REPORT_EXTENSIONS = (".md", ".json")
MAX_DRAWN = 6  # tensors of which `save_diff` makes pictures

_HEADINGS = ("stage", "shape", "max abs", "relative to rms", "cosine", "tolerance", "verdict")
_NUMBERS = (2, 3, 4)  # columns that are aligned to the right
_SHOWN_SIDE = 512  # small tensors are enlarged to about this many pixels
_LEAST_SIDE = 64

__all__ = [
    "MAX_DRAWN",
    "REPORT_EXTENSIONS",
    "as_plain",
    "check_report_path",
    "json_text",
    "markdown",
    "save_diff",
    "table_text",
    "verdict",
    "write_report",
]


# --- words -----------------------------------------------------------------------------------------


def verdict(comparisons: Sequence[Comparison]) -> str:
    """One sentence: all is well, or which stage is the first that is not, and why."""
    if len(comparisons) == 0:
        return "no stage was compared"
    first = first_failure(comparisons)
    if first is None:
        return f"all {len(comparisons)} stages are within their tolerances"
    bad = sum(not one.ok for one in comparisons)
    return (
        f"FIRST stage out of tolerance: {first.where}: {first.reason} "
        f"({bad} of {len(comparisons)} stages are out of tolerance)"
    )


def table_text(comparisons: Sequence[Comparison]) -> str:
    """The comparisons as aligned plain text, a line each below the headings; no newline at the end."""
    rows = [_HEADINGS, *(_cells(one) for one in comparisons)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        columns = enumerate(zip(row, widths))
        cells = [cell.rjust(width) if i in _NUMBERS else cell.ljust(width) for i, (cell, width) in columns]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _cells(one: Comparison) -> tuple[str, ...]:
    shape = "×".join(str(side) for side in one.shape) or "number"
    cosine = "–" if math.isnan(one.cosine) else f"{one.cosine:.8f}"
    words, note = "ok" if one.ok else f"OUT: {one.reason}", _note(one)
    if note and (one.ok or one.kind == "mask"):  # what is out of tolerance says its own numbers
        words += f"{',' if one.ok else ';'} {note}"
    return one.where, shape, _number(one.max_abs), _number(one.relative), cosine, _allowed(one), words


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "0" if value == 0 else f"{value:.1e}"


def _allowed(one: Comparison) -> str:
    if one.kind == "exact":
        return "exact"
    if math.isnan(one.tolerance):
        return "–"
    if one.kind == "levels":
        return f"{one.tolerance:g} level" + ("" if one.tolerance == 1 else "s")
    if one.kind == "mask":
        return f"margin {one.tolerance:.1e}"
    return f"{one.tolerance:.1e}" + (" abs" if one.kind == "absolute" else "")


def _note(one: Comparison) -> str:
    """What the numbers of a mask or a picture mean, or nothing."""
    counts = one.counts
    if one.kind == "mask" and counts:
        note = f"{one.measure:g} of {counts['total']} pixels differ"
        if "excepted" not in counts:
            return note
        flipped = counts["excepted_differing"]
        return f"{note} ({counts['excepted']} excepted{f', {flipped} of them flipped' if flipped else ''})"
    if one.kind == "levels" and counts.get("differing"):
        return f"{counts['differing']} of {counts['total']} values differ"
    return ""


# --- report files ----------------------------------------------------------------------------------


def check_report_path(path) -> Path:
    """Check that a report can be written at `path`, before the long work that will fill it.

    Raises:
        ValueError: as `writing.check_output_path`; the extension has to be one of `REPORT_EXTENSIONS`.
    """
    return writing.check_output_path(path, REPORT_EXTENSIONS)


def write_report(path, comparisons: Sequence[Comparison], context: Mapping[str, Any]) -> None:
    """Write a report, whole or not at all; the extension of `path` says its kind. ValueErrors as above.

    Args:
        context: what the reader has to know, in the order in which it is shown: golden file, model, mode, device,
            versions, date, ... Text, numbers or None.
    """
    path = check_report_path(path)
    text = (json_text if path.suffix.lower() == ".json" else markdown)(comparisons, context)
    with writing.atomic_path(path) as draft:
        draft.write_text(text, encoding="utf-8")


def markdown(comparisons: Sequence[Comparison], context: Mapping[str, Any]) -> str:
    """The report as Markdown: the verdict, the context, the table."""
    lines = ["# Parity", "", f"**{_escaped(verdict(comparisons))}.**", ""]
    lines += [f"- {_escaped(name)}: {_escaped(value)}" for name, value in context.items()]
    rows = [_HEADINGS, ["---"] * len(_HEADINGS), *([_escaped(cell) for cell in _cells(one)] for one in comparisons)]
    lines += ["", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def _escaped(value) -> str:
    """A value as one line that Markdown shows as it is."""
    return "–" if value is None else re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(value).split()))


def json_text(comparisons: Sequence[Comparison], context: Mapping[str, Any]) -> str:
    """The report as strict JSON: NaN and infinity are the strings "nan", "inf" and "-inf"."""
    first = first_failure(comparisons)
    content = {
        "context": dict(context),
        "passed": passed(comparisons),
        "verdict": verdict(comparisons),
        "first_failure": None if first is None else first.name,
        "stages": as_plain(comparisons),
    }
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def as_plain(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """All that comparisons hold, as strict JSON can; steps are counted from 0."""
    return [
        {name: _strict(value) for name, value in {**vars(one), "measure": one.measure}.items()} for one in comparisons
    ]


def _strict(value):
    if isinstance(value, tuple):
        return [_strict(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# --- pictures of differences -----------------------------------------------------------------------


def save_diff(
    folder, comparisons: Sequence[Comparison], ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> list[Path]:
    """Draw the `MAX_DRAWN` worst tensors in grey: reference, ours and the absolute difference side by side, a PNG each.

    Args:
        folder: where the PNGs go; made where it is missing. They are numbered from the worst on.
        comparisons: those out of tolerance come first, in their order, then the nearest to their tolerance. Stages
            that cannot be drawn (missing on a side, other shapes, single numbers) and such without any difference are
            left out.
        ours, theirs: the traces.

    Returns:
        The paths written. Of stacked stages the step is drawn that the comparison names; of several items, the one
        with the largest difference; channels side by side. Black is the least value and white the largest, of
        reference and ours together and of the difference by itself; values that are not finite are white.

    Raises:
        ValueError: `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError("{folder} is a file; give a folder for the pictures of the differences.", folder=folder)
    os.makedirs(folder, exist_ok=True)
    drawings: dict[Any, PIL.Image.Image] = {}
    # `sorted` keeps the order of equals, so that failures stay in the order of the stages.
    for one in sorted(comparisons, key=lambda one: (one.ok, -one.excess if one.ok else 0.0)):
        drawing = _drawing(one, ours.get(one.name), theirs.get(one.name))
        if drawing is not None and len(drawings) < MAX_DRAWN:
            stage = re.sub(r"[^A-Za-z0-9._-]+", "-", one.where).strip("-.")
            drawings[folder / f"{len(drawings) + 1:02d}-{stage}.png"] = drawing
    writing.save_images_atomically(drawings)
    return list(drawings)


def _drawing(one: Comparison, ours, theirs) -> PIL.Image.Image | None:
    """Reference | ours | difference with captions, or None where there is nothing to draw."""
    if ours is None or theirs is None or ours.shape != theirs.shape or np.array_equal(ours, theirs):
        return None
    if one.step is not None:
        ours, theirs = ours[one.step], theirs[one.step]
    if ours.ndim == 0:
        return None
    sides = [_items(np.asarray(side, np.float64), one.kind == "levels") for side in (theirs, ours)]
    with np.errstate(invalid="ignore"):
        difference = np.abs(sides[0] - sides[1])
    # The worst item, of which one that is not finite is worse than any.
    item = int(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max(axis=(1, 2)).argmax())
    place = one.where if len(difference) == 1 else f"{one.where}, item {item + 1} of {len(difference)}"
    theirs, ours, difference = sides[0][item], sides[1][item], difference[item]
    span = _span(np.concatenate([theirs, ours]))
    relative = f", {_number(one.relative)} of the rms" if one.kind == "close" else ""
    panels = [
        (f"{place}: reference, {_said(_span(theirs))}", _grey(theirs, span)),
        (f"ours, {'within tolerance' if one.ok else 'out of tolerance'}, {_said(_span(ours))}", _grey(ours, span)),
        (
            f"difference, up to {_number(_span(difference)[1])}{relative}; allowed: {_allowed(one)}",
            _grey(difference, (0.0, _span(difference)[1])),
        ),
    ]
    return sheets.labelled_grid(panels, smallest_side=1)


def _items(array: np.ndarray, coloured: bool) -> np.ndarray:
    """A tensor as items (N, h, w): (B, C, h, w), or pictures (B, H, W, 3), with the channels side by side."""
    if coloured:
        array = np.moveaxis(array, -1, -3)
    if array.ndim < 3:
        return array.reshape(1, -1, array.shape[-1])
    if array.ndim == 3:
        return array
    array = np.moveaxis(array.reshape(-1, *array.shape[-3:]), 1, 2)  # (N, h, C, w)
    return array.reshape(*array.shape[:2], -1)


def _span(matrix: np.ndarray) -> tuple[float, float]:
    finite = matrix[np.isfinite(matrix)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def _said(span: tuple[float, float]) -> str:
    return "{:.3g} to {:.3g}".format(*span)


def _grey(matrix: np.ndarray, span: tuple[float, float]) -> PIL.Image.Image:
    """Values as blocks of pixels, so that small tensors are seen and stay sharp."""
    low, high = span
    share = (np.clip(matrix, low, high) - low) / ((high - low) or 1.0)
    pixels = np.where(np.isfinite(matrix), share * 255, 255).round().astype(np.uint8)
    height, width = pixels.shape
    factor = max(1, _SHOWN_SIDE // max(width, height))
    size = max(width * factor, _LEAST_SIDE), max(height * factor, _LEAST_SIDE)
    return PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.NEAREST)
