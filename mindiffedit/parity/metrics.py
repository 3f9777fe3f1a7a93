"""How far one tensor is from its reference, and whether that is near enough.

A *trace* is an ordered dict of arrays, name -> array, in the order in which the stages run; a name is
"<call>/<stage>", such as "invert/inverted_latents". Everything is computed in float64. What cannot be compared (NaN,
another shape, a missing stage) is out of tolerance, never left out: a comparison passes only where a number was found
to be small enough.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mindiffedit.errors import InputError

# How stages are compared, and what is held against the tolerance.
KINDS = {
    "close": "largest difference over the reference's rms",
    "absolute": "largest difference",
    "exact": "every value equal",
    "levels": "largest difference in levels of 0..255",
    "mask": "every pixel equal, except where the reference's map is within a margin of the threshold",
}

# Where more than this share of a mask's pixels is excepted, the rest says nothing about the mask.
MAX_EXCEPTED = 0.25

_FAMILIES = {"f": "floating-point numbers", "i": "integers", "u": "integers", "b": "booleans"}

__all__ = ["KINDS", "MAX_EXCEPTED", "Comparison", "Limit", "compare", "compare_traces", "first_failure", "passed"]


@dataclass(frozen=True)
class Limit:
    """What one stage is allowed: `kind` is one of `KINDS`, `value` the tolerance.

    `value` is a number or, where `stacked` (the first axis counts steps), one number for each step.
    """

    kind: str
    value: float | Sequence[float] | np.ndarray
    stacked: bool = False


@dataclass(frozen=True)
class Comparison:
    """One tensor against its reference.

    Attributes:
        name, kind: the stage, and how it was compared.
        shape: the reference's, or ours where the reference has no such stage.
        max_abs, relative, rms_relative, cosine: largest difference; that over the reference's rms; rms of the
            difference over the reference's rms; cosine of the angle between the two. NaN where there is nothing to
            compare. Of a stacked stage: those of `step`.
        tolerance: what was allowed (at `step`); a mask's is the margin, relative to the rms of its map.
        ok: whether it is within the tolerance.
        reason: None, or why it is not, in a sentence without a full stop.
        step, steps: of a stage that is stacked by step: the first step out of tolerance, or the worst where all are
            within, counted from 0; and how many there are. None for other stages.
        counts: "differing" and "total" values of exact and levels stages (over all steps); of masks also "excepted"
            pixels and "excepted_differing", those of them that differ.
        by_step: what was held against the tolerance, for each step of a stacked stage; else empty.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    max_abs: float
    relative: float
    rms_relative: float
    cosine: float
    tolerance: float
    ok: bool
    reason: str | None = None
    step: int | None = None
    steps: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    by_step: tuple[float, ...] = ()

    @property
    def where(self) -> str:
        """The stage and, where it has steps, which of them, counted from 1 for people."""
        return self.name if self.step is None else f"{self.name}, step {self.step + 1} of {self.steps}"

    @property
    def measure(self) -> float:
        """What is held against the tolerance, see `KINDS`; of exact stages and masks, how many differ."""
        if self.kind == "close":
            return self.relative
        if self.kind in ("absolute", "levels"):
            return self.max_abs
        if not self.counts:
            return math.nan
        return float(self.counts["differing"] - self.counts.get("excepted_differing", 0))

    @property
    def excess(self) -> float:
        """The measure as a multiple of what is allowed, to rank comparisons; inf where nothing is allowed."""
        if math.isnan(self.measure) or math.isnan(self.tolerance):
            return math.inf
        return _over(self.measure, 0.0 if self.kind in ("exact", "mask") else self.tolerance)


# --- one tensor ------------------------------------------------------------------------------------


def compare(
    ours,
    theirs,
    tolerance,
    *,
    name: str = "",
    kind: str = "close",
    stacked: bool = False,
    reference_map=None,
    clamp_magnitude=None,
) -> Comparison:
    """Compare one tensor with its reference.

    Args:
        ours, theirs: arrays of numbers or booleans; None where a side does not have the stage.
        tolerance: number of at least 0, or one for each step of a stacked stage. For kind "mask" the margin around
            the threshold, relative to the rms of `reference_map`; "exact" has no use for it.
        kind: one of `KINDS`.
        stacked: the first axis counts steps. Each step is compared by itself, with its own rms.
        reference_map, clamp_magnitude: for kind "mask", the reference's map (shape of the mask) and the value it is
            clamped at, one number. The mask is clip(map, 0, magnitude) / magnitude > 0.5, so the threshold on the map
            is magnitude / 2. Without either no pixel is excepted.

    Returns:
        The comparison. Out of tolerance, with a reason, is also what cannot be compared: a missing or empty side, NaN
        or infinity, other shapes, integers against floats, a tolerance that is negative or not finite.

    Raises:
        ValueError: `kind` is none of `KINDS`.
    """
    if kind not in KINDS:
        raise InputError(
            "{parameter} has to be one of {known}, but is {kind!r}.", "kind", known=", ".join(KINDS), kind=kind
        )
    ours, theirs = (None if side is None else np.asarray(side) for side in (ours, theirs))
    allowed = np.asarray(tolerance, np.float64)
    problem = _problem(ours, theirs, kind, stacked, allowed)
    if problem is not None:
        present = theirs if theirs is not None else ours
        nan, shape = math.nan, () if present is None else present.shape
        return Comparison(name, kind, shape, nan, nan, nan, nan, float(allowed.max()), False, problem)
    if stacked:
        return _compare_steps(name, kind, ours, theirs, np.broadcast_to(allowed, (len(theirs),)))
    excepted, problem = None, None
    if kind == "mask" and not (reference_map is None and clamp_magnitude is None):
        excepted, problem = _excepted(reference_map, clamp_magnitude, float(allowed), theirs.shape)
    whole = _compare_whole(name, kind, ours, theirs, float(allowed), excepted)
    return whole if problem is None else replace(whole, ok=False, reason=problem)


def _problem(ours, theirs, kind: str, stacked: bool, allowed: np.ndarray) -> str | None:
    """Why two arrays cannot be compared value by value, or None."""
    if theirs is None:
        return "the reference does not have this stage"
    if ours is None:
        return "our run did not give this stage"
    for side, array in (("ours", ours), ("the reference", theirs)):
        if array.dtype.kind not in _FAMILIES:
            return f"{side} is of dtype {array.dtype}, which holds no numbers that can be compared"
    families = _FAMILIES[ours.dtype.kind], _FAMILIES[theirs.dtype.kind]
    if families[0] != families[1]:
        return f"ours holds {families[0]} ({ours.dtype}), the reference {families[1]} ({theirs.dtype})"
    if ours.shape != theirs.shape:
        return f"ours has shape {ours.shape}, the reference {theirs.shape}"
    if theirs.size == 0:
        return f"both sides are empty: their shape is {theirs.shape}"
    if stacked and theirs.ndim == 0:
        return "the stage should be stacked by step, but is a single number"
    if kind == "levels" and theirs.dtype.kind not in "iu":
        return f"levels of a picture have to be integers, but are {theirs.dtype}"
    if allowed.shape not in ((), (len(theirs),) if stacked else ()):
        return f"the tolerance has shape {allowed.shape}, expected one number{' (or one for each step)' * stacked}"
    if not (np.isfinite(allowed) & (allowed >= 0)).all():
        return f"the tolerance is {allowed}, expected a finite number of at least 0"
    return None


def _compare_steps(name: str, kind: str, ours, theirs, allowed) -> Comparison:
    """The first step out of tolerance, or the worst of all where there is none."""
    every = [_compare_whole(name, kind, ours[i], theirs[i], float(allowed[i]), None) for i in range(len(theirs))]
    bad = [i for i, one in enumerate(every) if not one.ok]
    # Where nothing differs at all, the last step speaks for the stage.
    step = bad[0] if bad else max(range(len(every)), key=lambda i: (every[i].excess, i))
    counts: Counter[str] = Counter()
    for one in every:
        counts.update(one.counts)
    by_step = tuple(one.measure for one in every)
    return replace(every[step], shape=theirs.shape, step=step, steps=len(every), counts=dict(counts), by_step=by_step)


def _compare_whole(name: str, kind: str, ours, theirs, allowed: float, excepted) -> Comparison:
    """Compare two arrays that fit together; `excepted` marks pixels of a mask that may differ, or is None."""
    counts: dict[str, int] = {}
    if kind in ("exact", "levels", "mask"):
        differs = ours != theirs
        counts = {"differing": int(np.count_nonzero(differs)), "total": int(theirs.size)}
        if excepted is not None:
            counts["excepted"] = int(np.count_nonzero(excepted))
            counts["excepted_differing"] = int(np.count_nonzero(differs & excepted))
    one = Comparison(name, kind, theirs.shape, *_numbers(ours, theirs), tolerance=allowed, ok=True, counts=counts)
    reason = _not_finite(ours, theirs) or _no_mask(one, ours, theirs) or _beyond(one, ours, theirs)
    return one if reason is None else replace(one, ok=False, reason=reason)


def _not_finite(ours, theirs) -> str | None:
    for side, array in (("ours", ours), ("the reference", theirs)):
        bad = int(np.count_nonzero(~np.isfinite(array)))
        if bad:
            return f"{bad} of {array.size} values of {side} are NaN or infinite"
    return None


def _beyond(one: Comparison, ours, theirs) -> str | None:
    """Why the numbers are not within the tolerance, or None. Written so that NaN is never within."""
    differing, total = one.counts.get("differing"), one.counts.get("total")
    if one.kind == "close" and not one.relative <= one.tolerance:
        share = f"{one.relative:.2e} of the reference's rms"
        return f"the largest difference is {share}, above the tolerance {one.tolerance:.2e}"
    if one.kind == "absolute" and not one.max_abs <= one.tolerance:
        return f"the largest difference is {one.max_abs:.2e}, above the tolerance {one.tolerance:.2e}"
    if one.kind == "exact" and differing != 0:
        at = tuple(int(i) for i in np.argwhere(ours != theirs)[0])
        place = f", the first at {list(at)}" if at else ""
        return f"{differing} of {total} values differ{place}: ours {ours[at]}, the reference {theirs[at]}"
    if one.kind == "levels" and not one.max_abs <= one.tolerance:
        levels = f"the largest difference is {one.max_abs:g} levels, above the tolerance {one.tolerance:g}"
        return f"{levels}; {differing} of {total} values differ"
    if one.kind == "mask" and one.measure != 0:
        where = ", where the reference's map is not near the threshold" if "excepted" in one.counts else ""
        return f"{one.measure:g} of {total} pixels differ{where}"
    return None


# --- masks -----------------------------------------------------------------------------------------


def _excepted(reference_map, magnitude, margin: float, shape) -> tuple[np.ndarray | None, str | None]:
    """(where the map is so near the threshold that rounding decides, None), or (None, what is wrong)."""
    if reference_map is None or magnitude is None:
        return None, "the reference's map or its clamp magnitude is missing, so nobody knows the threshold"
    values, clamp = np.asarray(reference_map, np.float64), np.asarray(magnitude, np.float64)
    if values.shape != shape or clamp.size != 1:
        return (
            None,
            f"the reference's map has shape {values.shape}, its mask {shape}, its clamp magnitude {clamp.shape}",
        )
    threshold = float(clamp.reshape(())) / 2
    if not (np.isfinite(values).all() and 0 < threshold < math.inf):
        return None, "the reference's map is not finite, or its clamp magnitude not a number above 0"
    return np.abs(values - threshold) <= margin * _rms(values), None


def _no_mask(one: Comparison, ours, theirs) -> str | None:
    """Why two masks say nothing whether or not they are equal, or None."""
    if one.kind != "mask":
        return None
    for side, mask in (("ours", ours), ("the reference", theirs)):
        other = int(np.count_nonzero((mask != 0) & (mask != 1)))
        if other:
            return f"{other} of {mask.size} values of {side} are neither 0 nor 1"
    excepted, total = one.counts.get("excepted", 0), one.counts["total"]
    if excepted > MAX_EXCEPTED * total:
        return f"{excepted} of {total} pixels are too near the threshold to be judged, which leaves too few to tell"
    return None


# --- numbers ---------------------------------------------------------------------------------------


def _numbers(ours, theirs) -> tuple[float, float, float, float]:
    """max_abs, relative, rms_relative and cosine; NaN or inf where values are not finite."""
    # float64 holds every difference of integers of up to 53 bits, so that nothing wraps.
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        difference = np.abs(ours - theirs)
        max_abs, size = float(difference.max()), _rms(theirs)
        # Two zero vectors point the same way.
        cosine = 1.0 if _rms(ours) == size == 0 else _over(float(np.mean(ours * theirs)), _rms(ours) * size)
        return max_abs, _over(max_abs, size), _over(_rms(difference), size), float(np.clip(cosine, -1, 1))


def _rms(values: np.ndarray) -> float:
    return math.sqrt(float(np.mean(np.square(values))))


def _over(difference: float, size: float) -> float:
    """`difference / size`; nothing over nothing is 0, something over nothing, or over what overflowed, infinite."""
    if size == 0 or math.isinf(size):
        return 0.0 if difference == 0 else difference * math.inf
    return difference / size


# --- a whole trace ---------------------------------------------------------------------------------


def compare_traces(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], limits: Mapping[str, Limit]
) -> list[Comparison]:
    """Compare all stages of two traces.

    Args:
        ours, theirs: traces, {stage: array}.
        limits: {stage: Limit} with each stage of `theirs`, see `tolerances.limits`.

    Returns:
        One comparison for each stage of `theirs`, in its order, then one, out of tolerance, for each stage that only
        `ours` has. The mask of a call is judged with the reference's map of the same call.
    """
    comparisons = []
    for name, reference in theirs.items():
        limit, around = limits[name], {}
        if limit.kind == "mask":
            call = name.partition("/")[0]
            around = {what: theirs.get(f"{call}/{stage}") for what, stage in _AROUND_MASKS.items()}
        comparisons.append(
            compare(ours.get(name), reference, limit.value, name=name, kind=limit.kind, stacked=limit.stacked, **around)
        )
    comparisons += [compare(ours[name], None, math.nan, name=name, kind="exact") for name in ours if name not in theirs]
    return comparisons


_AROUND_MASKS = {"reference_map": "map", "clamp_magnitude": "clamp_magnitude"}


def first_failure(comparisons: Sequence[Comparison]) -> Comparison | None:
    """The first comparison that is out of tolerance, or None."""
    return next((one for one in comparisons if not one.ok), None)


def passed(comparisons: Sequence[Comparison]) -> bool:
    """True where there is at least one comparison and all are within their tolerances."""
    return len(comparisons) > 0 and first_failure(comparisons) is None
