"""Contact sheets to choose settings from: masks over strength and threshold, edits over strength and guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image

from mindiffedit import masks, options
from mindiffedit.cli import runs
from mindiffedit.cli.job import Job
from mindiffedit.images import colours, edges, pictures, sheets

CELL = 384
"""Pixels of a cell's longer side."""


@dataclass(frozen=True)
class Sweep:
    """Values to try: strengths for the rows, the other option's for the columns."""

    strengths: list[float]
    others: list[float]
    other: str  # "threshold" or "guidance"


def settled(job: Job) -> Sweep | None:
    """The values of a command's sweep, checked: those given, or some around the present settings; None without one."""
    args, settings = job.args, job.settings
    if args.sweep is None:
        return None
    if args.command == "mask":
        strength, other = settings["mask_strength"], settings["mask_threshold"]
        name, text, check = "threshold", args.sweep_thresholds, options.check_ratio
        others = _around(other)
    else:
        strength, other = settings["strength"], settings["guidance"]
        name, text, check = "guidance", args.sweep_guidances, options.check_guidance_scale
        others = around_guidance(other)

    strengths = [strength]  # with latents that of the inversion
    if args.sweep_strengths is not None:
        strengths = masks.sweep_values(args.sweep_strengths, "--sweep-strengths", strength_check(settings["steps"]))
    elif job.latents is None:
        strengths = around_strength(strength, settings["steps"])
    if text is not None:
        others = masks.sweep_values(text, f"--sweep-{name}s", check)
    return Sweep(strengths, others, name)


def strength_check(steps: int) -> Callable[[Any, str], float]:
    """The check of a sweep's strengths, for `masks.sweep_values`: of so many steps one has to run."""

    def check(value, name):
        value = options.check_strength(value, name)
        options.effective_steps(steps, value, name)
        return value

    return check


def around_strength(strength: float, steps: int) -> list[float]:
    """A strength and those 0.2 from it, as far as a step runs there."""
    tried = {round(min(max(strength + change, 1 / steps), 1), 3) for change in (-0.2, 0, 0.2)}
    return sorted(value for value in tried if int(steps * value) >= 1)


def around_guidance(guidance: float) -> list[float]:
    """A guidance and others to try beside it."""
    return _around(guidance) if guidance > 1 else [guidance, 3.0, 7.5]


def _around(value: float) -> list[float]:
    """A value with a third less and a third more, to three digits."""
    return [float(f"{value * factor:.3g}") for factor in (2 / 3, 1, 4 / 3)]


def mask_sheet(job: Job, pipe, sweep: Sweep, known: dict[float, np.ndarray] | None = None) -> PIL.Image.Image:
    """The picture under the mask of every strength (rows) and threshold (columns).

    A map is computed once for each strength; `known` has some already, (1, h, w) by strength.
    """
    guides = None
    if job.mask_options.edges:
        pixels = pictures.preprocess_image(job.fitted, job.factor)
        guides = edges.guides_of(pixels, tuple(side // job.factor for side in pixels.shape[2:]))
    rows = []
    for strength in sweep.strengths:
        map_ = (known or {}).get(strength)
        if map_ is None:
            _, map_ = runs.find_mask(job, pipe, strength)
        row = []
        for threshold in sweep.others:
            mask = masks.mask_of(map_, threshold, job.mask_options, per_image=True, guides=guides)
            row.append(cell(masks.overlay(job.fitted, runs.whole_mask(job, mask)[0])))
        rows.append(row)
    return _sheet(job, sweep, rows, "mask strength", "threshold")


def edit_sheet(job: Job, pipe, sweep: Sweep, mask: np.ndarray | None = None) -> PIL.Image.Image:
    """The edited picture of every strength (rows) and guidance (columns).

    The mask is computed once, unless it is given, (1, h, w); the inversion once for each strength.
    """
    if mask is None:
        mask = job.grid_mask if not job.computes_mask else runs.whole_mask(job, runs.find_mask(job, pipe)[0])
    rows = []
    for strength in sweep.strengths:
        inverted = job.inverted if job.inverted is not None else runs.invert(job, pipe, strength)
        row = []
        for guidance in sweep.others:
            stage = f"edit, strength {strength:g}, guidance {guidance:g}"
            row.append(cell(runs.edit(job, pipe, mask, inverted, strength, guidance, stage).image))
        rows.append(row)
    return _sheet(job, sweep, rows, "strength", "guidance")


def cell(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A picture as a sheet has it: RGB, sRGB, no larger than `CELL`."""
    return pictures.at_most(colours.to_srgb(picture), CELL)


def _sheet(job: Job, sweep: Sweep, rows, down: str, across: str) -> PIL.Image.Image:
    return sheets.contact_sheet(
        rows,
        [f"{strength:g}" for strength in sweep.strengths],
        [f"{other:g}" for other in sweep.others],
        corner=f"{down} down, {across} across",
        title=f"{job.source} -> {job.target}",
    )
