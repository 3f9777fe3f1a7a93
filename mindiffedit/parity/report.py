"""What a comparison found, for people and programs: a table, a report, pictures of the worst tensors."""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from mindiffedit import options
from mindiffedit.errors import InputError
from mindiffedit.images import sheets, writing
from mindiffedit.parity.metrics import Comparison, first_failure, passed

# Extensions of reports, with the kind that `render` knows.
REPORT_KINDS = {".md": "md", ".json": "json", ".html": "html"}

_HEADINGS = ("stage", "shape", "max abs", "relative to rms", "cosine", "tolerance", "verdict")
_NUMBERS = (2, 3, 4)  # columns that are aligned to the right

_SHOWN_SIDE = 512  # small tensors are enlarged to about this many pixels
_LEAST_SIDE = 64
_MAX_WIDTH = 2048  # channels that are wider than this side by side are shown as their mean
_MAX_CHANNELS = 8

# Colour maps: RGB at evenly spaced values, lowest first.
_VALUES = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_DIFFERENCES = ((0, 0, 0), (120, 10, 20), (225, 60, 10), (255, 180, 40), (255, 245, 150))
_NOT_FINITE = (255, 0, 255)

__all__ = [
    "REPORT_KINDS",
    "as_plain",
    "check_report_path",
    "render",
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
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in _NUMBERS else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _cells(one: Comparison) -> tuple[str, ...]:
    shape = "×".join(str(side) for side in one.shape) or "number"
    cosine = "–" if math.isnan(one.cosine) else f"{one.cosine:.8f}"
    words = "ok" if one.ok else f"OUT: {one.reason}"
    note = _note(one)
    if note and one.ok:
        words += f", {note}"
    elif note and one.kind == "mask":
        words += f"; {note}"
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


def _shown(value) -> str:
    """A value of the context on one line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(inner) for inner in value)
    return "–" if value is None else " ".join(str(value).split())


# --- report files ----------------------------------------------------------------------------------


def check_report_path(path) -> Path:
    """Check that a report can be written at `path`, before the long work that will fill it.

    Raises:
        ValueError: as `writing.check_output_path`; the extension has to be one of `REPORT_KINDS`.
    """
    return writing.check_output_path(path, tuple(REPORT_KINDS))


def write_report(path, comparisons: Sequence[Comparison], context: Mapping[str, Any]) -> None:
    """Write a report, whole or not at all; the extension of `path` says its kind. ValueErrors as above."""
    path = check_report_path(path)
    text = render(comparisons, context, REPORT_KINDS[path.suffix.lower()])
    with writing.atomic_path(path) as draft:
        draft.write_text(text, encoding="utf-8")


def render(comparisons: Sequence[Comparison], context: Mapping[str, Any], kind: str) -> str:
    """A report as text.

    Args:
        context: what the reader has to know, in the order in which it is shown: golden file, model, mode, device,
            versions, date, ... Values are text, numbers, booleans, None, or lists and dicts of these.
        kind: "md", "json" or "html". JSON is strict: NaN and infinity are the strings "nan", "inf" and "-inf".

    Raises:
        ValueError: another kind.
    """
    if kind not in _RENDERERS:
        raise InputError(
            "{parameter} has to be one of {known}, but is {given!r}.",
            "kind",
            known=", ".join(_RENDERERS),
            given=kind,
        )
    return _RENDERERS[kind](comparisons, context)


def _markdown(comparisons: Sequence[Comparison], context: Mapping[str, Any]) -> str:
    lines = ["# Parity", "", f"**{_escaped(verdict(comparisons))}.**", ""]
    lines += [f"- {_escaped(name)}: {_escaped(_shown(value))}" for name, value in context.items()]
    lines += ["", _markdown_row(_HEADINGS), _markdown_row(["---"] * len(_HEADINGS))]
    lines += [_markdown_row([_escaped(cell) for cell in _cells(one)]) for one in comparisons]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))


def _json(comparisons: Sequence[Comparison], context: Mapping[str, Any]) -> str:
    first = first_failure(comparisons)
    content = {
        "context": dict(context),
        "passed": passed(comparisons),
        "verdict": verdict(comparisons),
        "first_failure": None if first is None else first.name,
        "stages": as_plain(comparisons),
    }
    return json.dumps(_strict(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def as_plain(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Comparisons as strict JSON can hold them: NaN and infinity are text."""
    return [_strict(_fields(one)) for one in comparisons]


def _fields(one: Comparison) -> dict[str, Any]:
    """All that a comparison holds; the steps are counted from 0."""
    return {**vars(one), "measure": one.measure}


def _strict(value):
    """The same content in types that JSON has."""
    if isinstance(value, Mapping):
        return {str(name): _strict(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(inner) for inner in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return _strict(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Parity</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; }}
body {{ margin: 2em auto; max-width: 80em; padding: 0 1em; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ padding: .25em .6em; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }}
thead th {{ border-bottom: 2px solid #888; }}
.context {{ width: auto; margin: 1em 0; }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
.verdict {{ padding: .6em .9em; font-weight: 600; border-left: .4em solid; }}
.ok {{ color: #0b6b2f; }}
.out {{ color: #b00020; }}
tr.out td {{ background: #fdecee; }}
p.ok {{ background: #e8f6ec; }}
p.out {{ background: #fdecee; }}
</style>
</head>
<body>
<h1>Parity</h1>
<p class="verdict {outcome}">{verdict}.</p>
<table class="context">
{context}
</table>
<table>
<thead>{headings}</thead>
<tbody>
{rows}
</tbody>
</table>
</body>
</html>
"""


def _html(comparisons: Sequence[Comparison], context: Mapping[str, Any]) -> str:
    known = [
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(_shown(value))}</td></tr>"
        for name, value in context.items()
    ]
    rows = []
    for one in comparisons:
        outcome = "ok" if one.ok else "out"
        cells = [_html_cell(i, cell) for i, cell in enumerate(_cells(one)[:-1])]
        cells.append(f'<td class="{outcome}">{html.escape(_cells(one)[-1])}</td>')
        rows.append(f'<tr class="{outcome}">{"".join(cells)}</tr>')
    headings = "".join(
        f'<th class="number">{text}</th>' if i in _NUMBERS else f"<th>{text}</th>" for i, text in enumerate(_HEADINGS)
    )
    return _PAGE.format(
        outcome="ok" if passed(comparisons) else "out",
        verdict=html.escape(verdict(comparisons)),
        context="\n".join(known),
        headings=f"<tr>{headings}</tr>",
        rows="\n".join(rows),
    )


def _html_cell(column: int, text: str) -> str:
    of_class = ' class="number"' if column in _NUMBERS else ""
    return f"<td{of_class}>{html.escape(text)}</td>"


_RENDERERS = {"md": _markdown, "json": _json, "html": _html}


# --- pictures of differences -----------------------------------------------------------------------


def save_diff(
    folder,
    comparisons: Sequence[Comparison],
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    worst: int = 6,
) -> list[Path]:
    """Draw the worst tensors: reference, ours and the absolute difference side by side, one PNG for each.

    Args:
        folder: where the PNGs go; made where it is missing. They are numbered from the worst on.
        comparisons: those out of tolerance come first, in their order, then the nearest to their tolerance. Stages
            that cannot be drawn (missing on a side, other shapes, single numbers) and such without any difference are
            left out.
        ours, theirs: the traces.
        worst: at most so many.

    Returns:
        The paths written. Of stacked stages the step is drawn that the comparison names; of several items, the one
        with the largest difference; channels side by side, or their mean where they are many or wide. Values that are
        not finite are magenta.

    Raises:
        ValueError: `worst` is not at least 1, or `folder` is a file.
    """
    worst = options.check_positive_int("worst", worst)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError("{folder} is a file; give a folder for the pictures of the differences.", folder=folder)
    os.makedirs(folder, exist_ok=True)
    # `sorted` keeps the order of equals, so that failures stay in the order of the stages.
    ranked = sorted(comparisons, key=lambda one: (one.ok, -one.excess if one.ok else 0.0))
    drawn: dict[Any, PIL.Image.Image] = {}
    for one in ranked:
        if len(drawn) == worst:
            break
        picture = _drawing(one, ours.get(one.name), theirs.get(one.name))
        if picture is not None:
            stage = re.sub(r"[^A-Za-z0-9._-]+", "-", one.name).strip("-.") or "stage"
            step = "" if one.step is None else f"-step{one.step + 1}"
            drawn[folder / f"{len(drawn) + 1:02d}-{stage}{step}.png"] = picture
    writing.save_images_atomically(drawn)
    return list(drawn)


def _drawing(one: Comparison, ours, theirs) -> PIL.Image.Image | None:
    """Reference | ours | difference with captions, or None where there is nothing to draw."""
    ours, theirs = (None if side is None else np.asarray(side) for side in (ours, theirs))
    if not _can_be_drawn(ours, theirs):
        return None
    place = one.where
    if one.step is not None:
        ours, theirs = ours[one.step], theirs[one.step]
    if ours.ndim == 0 or np.array_equal(ours, theirs):
        return None
    coloured = ours.dtype == theirs.dtype == np.uint8 and ours.ndim >= 3 and ours.shape[-1] == 3
    # One item is (C, h, w), (h, w, 3) of a coloured picture, (h, w) or (w,).
    axes = 3 if ours.ndim >= 4 or coloured else 2
    ours, theirs, difference = (_items(array, axes) for array in (ours, theirs, _difference(ours, theirs)))
    item = _worst_item(difference)
    if len(difference) > 1:
        place += f", item {item + 1} of {len(difference)}"
    ours, theirs, difference = ours[item], theirs[item], difference[item]
    if ours.ndim == 3 and len(ours) > 1 and not coloured:
        place += f", {len(ours)} channels" if _fits(ours.shape) else f", mean of {len(ours)} channels"
    captions = _captions(place, one, ours, theirs, difference)
    tiles = _tiles(ours, theirs, difference, coloured)
    return sheets.labelled_grid(
        [(caption, _enlarged(tile)) for caption, tile in zip(captions, tiles)], smallest_side=1
    )


def _can_be_drawn(ours: np.ndarray | None, theirs: np.ndarray | None) -> bool:
    if ours is None or theirs is None or ours.shape != theirs.shape or ours.size == 0:
        return False
    return ours.dtype.kind in "fiub" and theirs.dtype.kind in "fiub"


def _captions(place: str, one: Comparison, ours, theirs, difference) -> tuple[str, str, str]:
    ranges = ["{:.3g} to {:.3g}".format(*_span(side)) for side in (theirs, ours)]
    finite = "" if np.isfinite(difference).all() else ", not finite in places"
    relative = f", {_number(one.relative)} of the rms" if one.kind == "close" else ""
    return (
        f"{place}: reference, {ranges[0]}",
        f"ours, {'within tolerance' if one.ok else 'out of tolerance'}, {ranges[1]}",
        f"difference, up to {_number(_span(difference)[1])}{finite}{relative}; allowed: {_allowed(one)}",
    )


def _tiles(ours, theirs, difference, coloured: bool) -> list[PIL.Image.Image]:
    """Pictures of the reference, ours and the difference. Colours of the first two mean the same values."""
    if coloured:
        pixels = [np.ascontiguousarray(side) for side in (theirs, ours)]
        matrix = difference.max(axis=-1)
    else:
        left, right, matrix = (_matrix(array) for array in (theirs, ours, difference))
        pixels = [_colours(side, *_span(left), _VALUES) for side in (left, right)]
    pixels.append(_colours(matrix, 0.0, _span(matrix)[1], _DIFFERENCES))
    return [PIL.Image.fromarray(tile) for tile in pixels]


def _difference(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        return np.abs(ours.astype(np.float64) - theirs.astype(np.float64))


def _items(array: np.ndarray, axes: int) -> np.ndarray:
    """All axes but the last `axes` as one, which counts items."""
    return array[None] if array.ndim <= axes else array.reshape(-1, *array.shape[-axes:])


def _worst_item(difference: np.ndarray) -> int:
    """The item with the largest difference; one that is not finite, if any."""
    largest = difference.reshape(len(difference), -1).max(axis=1)
    return int(np.argmax(np.where(np.isnan(largest), np.inf, largest)))


def _matrix(array: np.ndarray) -> np.ndarray:
    """(C, h, w), (h, w) or (w,) as one float64 matrix: channels side by side, or their mean."""
    array = array.astype(np.float64)
    if array.ndim < 2:
        return array.reshape(1, -1)
    if array.ndim == 2:
        return array
    if _fits(array.shape):
        return np.concatenate(list(array), axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        return array.mean(axis=0)


def _fits(shape: tuple[int, ...]) -> bool:
    """Whether channels (C, h, w) are few and narrow enough to be shown side by side."""
    return shape[0] <= _MAX_CHANNELS and shape[0] * shape[2] <= _MAX_WIDTH


def _span(matrix: np.ndarray) -> tuple[float, float]:
    finite = matrix[np.isfinite(matrix)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def _colours(matrix: np.ndarray, low: float, high: float, anchors) -> np.ndarray:
    """uint8 (h, w, 3): `low` has the first colour, `high` the last; what lies beyond is cut off there."""
    finite = np.isfinite(matrix)
    values = np.where(finite, matrix, low)
    share = np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)
    places = np.linspace(0, 1, len(anchors))
    colours = [np.interp(share, places, [anchor[c] for anchor in anchors]) for c in range(3)]
    pixels = np.stack(colours, axis=-1).round().astype(np.uint8)
    pixels[~finite] = _NOT_FINITE
    return pixels


def _enlarged(tile: PIL.Image.Image) -> PIL.Image.Image:
    """Each value as a block of pixels, so that small tensors are seen and stay sharp."""
    width, height = tile.size
    factor = max(1, _SHOWN_SIDE // max(width, height))
    across = max(factor, -(-_LEAST_SIDE // width))
    down = max(factor, -(-_LEAST_SIDE // height))
    return tile.resize((width * across, height * down), resample=PIL.Image.Resampling.NEAREST)
