"""How much each stage may differ from the reference: one table, with the reason for each row.

Most tolerances are multiples of a measured *floor*: how far the reference, in float32, is from itself in
float64 with the same inputs. It is the size of rounding in that stage of that checkpoint. A network may
magnify rounding a hundredfold, so no one number suits all checkpoints; a small multiple of the floor does.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from mindiffedit.errors import InputError
from mindiffedit.parity.metrics import KINDS, Limit

__all__ = ["TABLE", "Tolerance", "floor_of", "for_stage", "limit", "limits", "render_markdown"]


@dataclass(frozen=True)
class Tolerance:
    """One row of the table.

    Attributes:
        pattern: of the stage's name without its call, as in `fnmatch`; the first row that matches counts.
        kind: how the stage is compared, one of `metrics.KINDS`.
        factor: the tolerance is this many times the measured floor; 0 where it is `least` whatever the floor.
        least: the tolerance is never below this.
        default: the tolerance where no floor was measured.
        why: one sentence.
        stacked: the first axis counts steps, each compared by itself.
        floor_stage: stage of the same call whose floor is meant; None is the stage itself.
        goal: what the project aims at, for the table; it is not enforced.
    """

    pattern: str
    kind: str
    factor: float
    least: float
    default: float
    why: str
    stacked: bool = False
    floor_stage: str | None = None
    goal: float | None = None


def _fixed(pattern: str, kind: str, allowed: float, why: str, stacked: bool = False) -> Tolerance:
    """A row whose tolerance depends on no floor."""
    return Tolerance(pattern, kind, 0, allowed, allowed, why, stacked)


TABLE = (
    _fixed("*token_ids", "exact", 0, "Both sides cut the same text with the same vocabulary."),
    _fixed("timestep", "exact", 0, "A timestep is a whole number."),
    _fixed("timesteps", "exact", 0, "Timesteps are whole numbers; one off is another schedule.", stacked=True),
    _fixed(
        "coefficients",
        "close",
        1e-6,
        "They follow the reference's float32 recipe; the reference takes square roots, exponentials and "
        "logarithms from a vector library whose last bits depend on the processor, ours are correctly rounded.",
        stacked=True,
    ),
    _fixed(
        "step_noise",
        "absolute",
        1e-6,
        "Both sides take the same draws from a standard normal distribution, step by step.",
        stacked=True,
    ),
    _fixed(
        "*noise",
        "absolute",
        1e-6,
        "Both sides take the same draws from a standard normal distribution; the functions that shape them "
        "round differently in the last bits.",
    ),
    Tolerance("*prompt_embeds", "close", 5, 1e-6, 2e-5, "The text encoder, in another order of summation."),
    Tolerance("moments", "close", 5, 1e-6, 1e-4, "The VAE's encoder, in another order of summation."),
    Tolerance("noised_latents", "close", 5, 2e-6, 1e-4, "The latents and noise, weighted; as near as they are."),
    Tolerance("latents", "close", 5, 2e-6, 1e-4, "Mean plus noise times deviation: carries the moments' rounding."),
    Tolerance("*noise_predictions", "close", 5, 2e-6, 1e-4, "The UNet, in another order of summation."),
    Tolerance(
        "predictions",
        "close",
        10,
        2e-6,
        1e-3,
        "The UNet at each step of a run, of latents that carry the rounding of the steps before.",
        stacked=True,
    ),
    Tolerance(
        "map", "close", 5, 2e-6, 1e-3, "A difference of predictions that are nearly equal magnifies their rounding."
    ),
    Tolerance(
        "clamp_magnitude",
        "close",
        5,
        2e-6,
        1e-3,
        "A mean of the map, times the threshold's ratio; one number has no floor of its own to go by.",
        floor_stage="map",
    ),
    Tolerance(
        "mask",
        "mask",
        5,
        2e-6,
        1e-3,
        "A pixel may flip only where the map is so near the threshold that the map's own tolerance decides.",
        floor_stage="map",
    ),
    Tolerance(
        "inverted_latents",
        "close",
        10,
        2e-6,
        1e-3,
        "Each step magnifies the rounding of those before it; by how much is chance, for the reference as for us.",
        stacked=True,
        goal=1e-4,
    ),
    Tolerance(
        "clean_predictions",
        "close",
        10,
        2e-6,
        1e-3,
        "What a multistep solver hands to its next step; at high noise levels it divides by a small number.",
        stacked=True,
    ),
    Tolerance(
        "edited_latents",
        "close",
        10,
        2e-6,
        1e-3,
        "As for the inversion, with the background of the inversion blended in at each step.",
        stacked=True,
        goal=1e-4,
    ),
    Tolerance("decoded", "close", 10, 2e-6, 1e-3, "The VAE's decoder, of latents that a whole run has led to."),
    _fixed("picture", "levels", 1, "Rounding to 256 levels turns any difference into one level here and there."),
)


# --- from stages to tolerances ---------------------------------------------------------------------


def for_stage(name: str) -> Tolerance:
    """The row for a stage, such as "invert/moments".

    Raises:
        ValueError: no row matches.
    """
    for row in TABLE:
        if fnmatch.fnmatchcase(name.rpartition("/")[2], row.pattern):
            return row
    raise InputError("there is no tolerance for the stage {name}; add a row to `tolerances.TABLE`.", name=name)


def floor_of(name: str) -> str:
    """The stage whose floor the tolerance of `name` is a multiple of: itself, or for a mask its map."""
    stage = for_stage(name).floor_stage
    return name if stage is None else f"{name.rpartition('/')[0]}/{stage}"


def limit(name: str, floor=None) -> float | np.ndarray:
    """The tolerance of a stage: the larger of `least` and `factor` times the floor.

    Args:
        name: the stage.
        floor: that of `floor_of(name)`, relative as the stage is compared; a number, for a stage that is stacked by
            step also one for each step, or None where it was not measured.

    Returns:
        float, or float64 (T,) where there is a floor for each step.

    Raises:
        ValueError: no row matches, or the floor is no number of at least 0 (nor a list of them for a stacked stage).
    """
    row = for_stage(name)
    if row.factor == 0 or floor is None:
        return float(row.least if row.factor == 0 else row.default)
    floors = np.asarray(floor, np.float64)
    if floors.size == 0 or floors.ndim > row.stacked or not (np.isfinite(floors) & (floors >= 0)).all():
        raise InputError(
            "the floor of {name} has to be a finite number of at least 0{each}, but is {floor!r}.",
            name=name,
            each=", or one for each step" if row.stacked else "",
            floor=floor,
        )
    allowed = np.maximum(row.least, row.factor * floors)
    return float(allowed) if allowed.ndim == 0 else allowed


def limits(names: Iterable[str], floors: Mapping[str, object] | None = None) -> dict[str, Limit]:
    """What each stage is allowed, for `metrics.compare_traces`; stages without a floor get the table's default.

    Raises:
        ValueError: as `limit` and `for_stage`.
    """
    floors, allowed = floors or {}, {}
    for name in names:
        row = for_stage(name)
        allowed[name] = Limit(row.kind, limit(name, floors.get(floor_of(name))), row.stacked)
    return allowed


# --- the table for people --------------------------------------------------------------------------


def render_markdown() -> str:
    """The table as Markdown, each row with its reason."""
    lines = [("stage", "compared as", "factor", "least", "without a floor", "goal", "why"), ["---"] * 7]
    for row in TABLE:
        stage = f"`{row.pattern}`" + (", each step" if row.stacked else "")
        factor = "–" if row.factor == 0 else f"{row.factor:g} × floor"
        if row.floor_stage is not None:
            factor += f" of `{row.floor_stage}`"
        numbers = (None, None, None) if row.kind == "exact" else (row.least, row.default, row.goal)
        lines.append((stage, KINDS[row.kind], factor, *(_number(value) for value in numbers), row.why))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    # As a power of ten where it is one in spirit: 0.0001 would be hard to read among the others.
    return f"{value:g}" if value == 0 or value >= 0.01 else np.format_float_scientific(value, trim="-", exp_digits=2)
