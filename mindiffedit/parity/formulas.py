"""The coefficients of a solver as diffusers' own ``step`` uses them, read out of it. Needs torch and diffusers.

A step is linear in latents, model output, earlier clean predictions and noise. It is run with a ``Formula`` in place of
each tensor, which remembers what it is multiplied with; no formula of diffusers is written down a second time.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch

_INVERSES = (diffusers.DDIMInverseScheduler, diffusers.DPMSolverMultistepInverseScheduler)
_DDIM = (diffusers.DDIMScheduler, diffusers.DDIMInverseScheduler)
_DPM = (diffusers.DPMSolverMultistepScheduler, diffusers.DPMSolverMultistepInverseScheduler)

# x: latents, e: model output, n: noise, m0, m1, ...: clean predictions.
_CLEAN = {"epsilon": "(x-c*e)/c", "v_prediction": "(c*x-c*e)", "sample": "e"}
_NOISE = {"epsilon": "e", "v_prediction": "(c*e+c*x)", "sample": "(x-c*e)/c"}


class OtherFormula(Exception):
    """A step that is not DDIM's, nor that of DPM-Solver++ of first or second order."""


class Formula:
    """A tensor's stand-in in a step: ``text`` has a "c" for each number of ``numbers``, in the same order."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, text, numbers=()):
        self.text, self.numbers = text, tuple(numbers)

    def to(self, *args, **kwargs):
        return self

    def __rmul__(self, number):
        return Formula("c*" + self.text, (float(number), *self.numbers))

    def __truediv__(self, number):
        return Formula(self.text + "/c", (*self.numbers, float(number)))

    def __add__(self, other):
        return Formula(f"({self.text}+{other.text})", self.numbers + other.numbers)

    def __sub__(self, other):
        return Formula(f"({self.text}-{other.text})", self.numbers + other.numbers)

    def clamp(self, low, high):
        return Formula(f"clamp({self.text},{low},{high})", self.numbers)


def rows_of(scheduler, timesteps, eta: float = 0.0, dtype=np.float32) -> np.ndarray:
    """The five numbers of each step, as ``schedules.ddim_row`` and ``schedules.dpm_rows`` name them, (T, 5).

    Args:
        scheduler: of diffusers, its timesteps set; its steps are run, so it has to be fresh, and is spent afterwards.
        timesteps: those of the run.
        eta: DDIM's.
        dtype: of the result; the numbers are computed in that of the scheduler's tables.

    Raises:
        OtherFormula: for another solver, and options that change the formula.
    """
    try:
        if isinstance(scheduler, _DDIM):
            return np.stack([ddim_row(scheduler, t, eta, dtype) for t in timesteps])
        if isinstance(scheduler, _DPM):
            return _dpm_rows(scheduler, timesteps, dtype)
    except (AttributeError, TypeError) as error:  # a step that does what no linear one does with its tensors
        raise OtherFormula(str(error)) from error
    raise OtherFormula(type(scheduler).__name__)


def _expect(text: str, *known: str) -> None:
    if text not in known:
        raise OtherFormula(text)


def ddim_row(scheduler, timestep, eta: float, dtype=np.float32) -> np.ndarray:
    """The numbers of one step of DDIM or its inverse, (5,)."""
    kind, config = scheduler.config.prediction_type, scheduler.config
    noise = {} if isinstance(scheduler, _INVERSES) else dict(eta=eta, variance_noise=Formula("n"))
    result = scheduler.step(Formula("e"), int(timestep), Formula("x"), **noise).prev_sample
    clean, numbers, row = _CLEAN[kind], list(result.numbers), np.zeros(5, dtype)
    if config.clip_sample:
        clean = f"clamp({clean},{-config.clip_sample_range},{config.clip_sample_range})"
    text = f"(c*{clean}+c*{_NOISE[kind]})"
    if eta > 0:
        text = f"({text}+c*n)"
        row[4] = numbers.pop()
    _expect(result.text, text)
    if kind == "v_prediction" and numbers[4:] != numbers[1:3]:
        raise OtherFormula(text)
    order = {"epsilon": [2, 1, 0, 3], "v_prediction": [2, 0, 1, 3], "sample": [2, 3, 0, 1]}[kind]
    row[order] = numbers[:4]
    return row


def _dpm_rows(scheduler, timesteps, dtype) -> np.ndarray:
    """The same for a whole run of the multistep solver; 0 in the last place of first-order steps."""
    rows, convert = np.zeros((len(timesteps), 5), dtype), type(scheduler).convert_model_output
    kind = scheduler.config.prediction_type
    for i, t in enumerate(timesteps):
        cleans: list[Any] = []

        def watched(output, sample, i=i, cleans=cleans):
            cleans.append(convert(scheduler, output, sample=sample))
            if kind == "sample":  # whose formula has no noise levels
                levels = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[scheduler.step_index])
                rows[i, :2] = [float(level) for level in levels]
            return Formula(f"m{i}")

        with mock.patch.object(scheduler, "convert_model_output", watched):
            result = scheduler.step(Formula("e"), torch.tensor(int(t)), Formula("x")).prev_sample
        _expect(cleans[0].text, _CLEAN[kind])
        if kind != "sample":
            rows[i, [1, 0] if kind == "epsilon" else [0, 1]] = cleans[0].numbers
        numbers = np.array(result.numbers, dtype)
        rows[i, 2], rows[i, 3] = numbers[0], -numbers[1]
        first, second = f"(c*x-c*m{i})", f"c*c*(m{i}-m{i - 1})"
        _expect(result.text, first, f"({first}-{second})", f"({first}+{second})")
        if result.text != first:
            sign = -1 if result.text == f"({first}-{second})" else 1
            rows[i, 4] = sign * (numbers[2] * numbers[3])
    return rows
