"""What the page's buttons do with pictures and settings. Nothing here knows how a page looks."""

from __future__ import annotations

import contextlib
import html
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from mindiffedit import masks, options
from mindiffedit.cli import sweeps
from mindiffedit.cli.wording import BLACKENED, option, told
from mindiffedit.errors import InputError, InputTypeError
from mindiffedit.images import colours, pictures, reading, sheets
from mindiffedit.options import NumericalError
from mindiffedit.service.controls import LABELS, OF_COMPUTED_MASKS
from mindiffedit.service.editor import Cancelled, Edited, Editor, Progress
from mindiffedit.service.painter import painted_mask

MAX_SHOWN = 1600
"""Pixels of the longer side of what is shown and painted on. Masks are used on the latents' grid, which is coarser."""


@dataclass(frozen=True)
class Result:
    """An edit, and the file of the picture that was edited."""

    picture: str
    edited: Edited


class Edits:
    """The page's work, for all its tabs. A tab does one thing at a time, which another thread can cancel.

    Args:
        editor: gives the editor, waiting until it is loaded.
        fixed: options that every edit gets.
    """

    def __init__(self, editor: Callable[[], Editor], fixed: Mapping[str, Any] | None = None):
        self._editor, self._fixed = editor, dict(fixed or {})
        self._stops: dict[str, threading.Event] = {}

    # --- a tab's work --------------------------------------------------------------------------------

    def begin(self, tab: str) -> None:
        """From now on `cancel` stops what this tab does next."""
        self._stops[tab] = threading.Event()

    def cancel(self, tab: str) -> None:
        """Stop what a tab does, within a step of the model."""
        if tab in self._stops:
            self._stops[tab].set()

    def close(self, tab: str) -> None:
        """The tab is gone: stop what it does, and forget it."""
        self.cancel(tab)
        self._stops.pop(tab, None)

    def _run(
        self, tab: str, picture: PIL.Image.Image, options: Mapping[str, Any], progress: Progress, mask=None, reuse=None
    ) -> Edited:
        stop = self._stops.get(tab) or threading.Event()
        progress("waiting for the model", 0, 1)
        editor = self._editor()
        options = {**self._fixed, **options}
        if mask is not None:
            options = {name: value for name, value in options.items() if name not in OF_COMPUTED_MASKS}
        return editor.edit(picture, options, mask=mask, reuse=reuse, progress=progress, cancelled=stop)

    # --- the three kinds of work ---------------------------------------------------------------------

    def edit(self, tab: str, picture: str | None, options: Mapping[str, Any], progress: Progress) -> Result:
        """The edit of a picture's file with a mask that is computed."""
        path = _given(picture)
        return Result(path, self._run(tab, reading.load_as_is(path), options, progress))

    def edit_inside(
        self,
        tab: str,
        picture: str | None,
        options: Mapping[str, Any],
        painted: str,
        progress: Progress,
        earlier: Result | None = None,
    ) -> Result:
        """The edit inside a mask as `painter.READ` gives it; an `earlier` inversion that is the same serves."""
        path, mask = _given(picture), painted_mask(painted)
        reuse = None if earlier is None else earlier.edited
        return Result(path, self._run(tab, reading.load_as_is(path), options, progress, mask=mask, reuse=reuse))

    def sheet(
        self,
        tab: str,
        picture: str | None,
        options: Mapping[str, Any],
        strengths: str,
        guidances: str,
        progress: Progress,
    ) -> PIL.Image.Image:
        """A contact sheet over strength (down) and guidance (across), all edits inside the first one's mask.

        Args:
            tab: as for `begin`.
            picture: the picture's file.
            options: as for `edit`.
            strengths: numbers with commas between; without any, some around the present one.
            guidances: likewise.
            progress: likewise.
        """
        down, across = _values(options, strengths, guidances)
        original = reading.load_as_is(_given(picture))
        mask: np.ndarray | None = None
        rows: list[list[PIL.Image.Image]] = []
        for strength in down:
            row: list[Edited] = []
            for guidance in across:
                cell = f"picture {len(rows) * len(across) + len(row) + 1} of {len(down) * len(across)}"
                asked = {**options, "strength": strength, "guidance": guidance}
                shown_by = lambda stage, *steps, cell=cell: progress(f"{cell}: {stage}", *steps)
                reuse = row[0] if row else None
                row.append(self._run(tab, original, asked, shown_by, mask=mask, reuse=reuse))
                mask = row[0].mask if mask is None else mask
            rows.append([sweeps.cell(edited.image) for edited in row])
        return sheets.contact_sheet(
            rows,
            [f"{strength:g}" for strength in down],
            [f"{guidance:g}" for guidance in across],
            corner="strength down, guidance across",
            title=f"{row[0].settings['source']} -> {row[0].settings['target']}",
        )


def _given(picture: str | None) -> str:
    if picture is None:
        raise InputError("there is no picture yet; choose one, or one of the examples.")
    return picture


def _values(given: Mapping[str, Any], strengths: str, guidances: str) -> tuple[list[float], list[float]]:
    steps = given["steps"]

    down = sweeps.around_strength(given["strength"], steps)
    across = sweeps.around_guidance(given["guidance"])
    if strengths.strip():
        down = masks.sweep_values(strengths, option("sweep_strengths"), sweeps.strength_check(steps))
    if guidances.strip():
        across = masks.sweep_values(guidances, option("sweep_guidances"), options.check_guidance_scale)
    return down, across


# --- pictures to look at ---------------------------------------------------------------------------


def shown(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A picture as a browser shows it: RGB, sRGB, no larger than `MAX_SHOWN`."""
    return pictures.at_most(colours.Original(picture).shown, MAX_SHOWN)


def map_picture(edited: Edited, size: tuple[int, int]) -> PIL.Image.Image | None:
    """The map that a mask was made of, white at its largest value; None for a mask that was given."""
    if edited.map is None:
        return None
    return masks.as_picture(edited.map / max(float(edited.map.max()), 1e-12), size)


# --- words -----------------------------------------------------------------------------------------

_logger = logging.getLogger(__name__)


def in_page_words(sentence: object) -> str:
    """A sentence of the command line as the page says it: options are controls, and files have no folders."""
    text = re.sub(r"--([a-z-]+)|`([a-z_]+)`", _control, told(sentence, "edit"))
    text = re.sub(r"/(?:[^/\s]+/)+([^/\s]+)", r"\1", text)
    return re.sub(r"^[a-z]+(?= )", lambda word: word[0].capitalize(), text)


def _control(match: re.Match) -> str:
    label = LABELS.get((match[1] or match[2]).replace("-", "_"))
    return match[0] if label is None else f"“{label}”"


def line(sentence: str, kind: str = "done") -> str:
    """A sentence as HTML for the page's one line of state; `kind` is "done", "note" or "problem"."""
    role = "alert" if kind == "problem" else "status"
    return f'<p class="{kind}" role="{role}">{html.escape(sentence, quote=False)}</p>'


def summary(edited: Edited) -> str:
    """What an edit says of itself, as HTML."""
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in edited.seconds.items() if seconds >= 0.05)
    lines = [line(f"{edited.share:.0%} of the picture is in the mask. {stages[:1].upper()}{stages[1:]}.")]
    warnings = [] if edited.report is None else list(edited.report.warnings)
    if edited.flagged:
        warnings.append(BLACKENED)
    return "".join([*lines, *(line(in_page_words(warning), "note") for warning in warnings)])


@dataclass
class Problem:
    """What went wrong, as a line of HTML."""

    line: str = ""


@contextlib.contextmanager
def problems() -> Iterator[Problem]:
    """What goes wrong in the block is said in words, and the block ends; a bug is logged with its traceback, too."""
    problem = Problem()
    try:
        yield problem
    except Cancelled:
        problem.line = line("Cancelled.", "note")
    except (InputError, InputTypeError, NumericalError) as error:
        problem.line = line(in_page_words(error.message), "problem")
    except (OSError, MemoryError) as error:  # of the surroundings: a full disk
        problem.line = line(f"This failed: {in_page_words(f'{type(error).__name__}: {error}')}", "problem")
    except Exception as error:
        _logger.exception("The page failed.")
        what = in_page_words(f"{type(error).__name__}: {error}")
        problem.line = line(f"This failed, by a bug of mindiffedit: {what} The terminal has the traceback.", "problem")


def suggested_name(picture: str, extension: str) -> str:
    """The name of the file to download."""
    return f"{Path(picture).stem}-edited.{extension}"
