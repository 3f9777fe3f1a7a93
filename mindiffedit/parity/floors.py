"""Floors: how far PyTorch in float32 is from PyTorch in float64 on the same input, stage by stage. Needs torch.

Two kinds. *Isolated*: every stage starts from the float32 run's own tensors, so each figure is the rounding of that
stage alone. *Chained*: the float64 run goes its own way from the same noise, so figures grow along a run as rounding
does. In loops the isolated figure is the largest of all steps (each does the same arithmetic), the chained one the
largest up to each step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from mindiffedit.parity import reference, tolerances
from mindiffedit.parity.case import Case

_NOISE = ("posterior_noise", "noise", "step_noise")


def measure_on(
    pipe, case: Case, trace: dict[str, np.ndarray], kinds: Iterable[str] = ("isolated", "chained")
) -> dict[str, dict[str, Any]]:
    """{"isolated": {stage: figure}, "chained": {stage: figure or list by step}} of a case and its float32 trace.

    A figure is the largest absolute difference over the root mean square of the float32 values. ``pipe`` is the
    reference's pipeline in float64, which runs once for each kind.
    """
    chained = {name: value for name, value in trace.items() if name.partition("/")[2] in _NOISE}
    # The mask is a decision, not a number: the float64 run edits inside the float32 run's mask.
    chained.update({name: trace[name] for name in ("mask/mask",) if name in trace})
    substitutes = {"isolated": trace, "chained": chained}
    return {kind: _figures(trace, reference.run(pipe, case, substitutes[kind]), kind) for kind in kinds}


def _figures(trace, exact, kind: str) -> dict[str, Any]:
    figures = {}
    for name, value in trace.items():
        row = tolerances.for_stage(name)
        if row.factor == 0 or row.floor_stage is not None:
            continue
        if row.stacked:
            steps = [_figure(*pair) for pair in zip(value, exact[name])]
            figures[name] = max(steps) if kind == "isolated" else np.maximum.accumulate(steps).tolist()
        else:
            figures[name] = _figure(value, exact[name])
    return figures


def _figure(value, exact) -> float:
    value, exact = np.asarray(value, np.float64), np.asarray(exact, np.float64)
    scale = np.sqrt(np.mean(value**2))
    return float(np.max(np.abs(value - exact)) / scale) if scale > 0 else 0.0
