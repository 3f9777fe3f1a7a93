"""One step of a solver, as formulas on tensors whose coefficients come in as arguments: what ``stages`` compiles.

``sqrt_alpha`` and ``sqrt_one_minus_alpha`` are the square roots of the cumulative alpha at the step's timestep and of
what it leaves to 1; the rows of coefficients are those of ``schedules.ddim_row`` and ``schedules.dpm_rows``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindspore import mint, ops


def x0_prediction(prediction_type: str) -> Callable:
    """Clean latents from latents and model output: a function (latents, output, sqrt_alpha, sqrt_one_minus_alpha)."""

    def from_epsilon(latents, output, sqrt_alpha, sqrt_one_minus_alpha):
        return (latents - sqrt_one_minus_alpha * output) / sqrt_alpha

    def from_v(latents, output, sqrt_alpha, sqrt_one_minus_alpha):
        return sqrt_alpha * latents - sqrt_one_minus_alpha * output

    def from_sample(latents, output, sqrt_alpha, sqrt_one_minus_alpha):
        return output

    return {"epsilon": from_epsilon, "v_prediction": from_v, "sample": from_sample}[prediction_type]


def epsilon_prediction(prediction_type: str) -> Callable:
    """Noise from latents and model output: a function of the same arguments."""

    def from_epsilon(latents, output, sqrt_alpha, sqrt_one_minus_alpha):
        return output

    def from_v(latents, output, sqrt_alpha, sqrt_one_minus_alpha):
        return sqrt_alpha * output + sqrt_one_minus_alpha * latents

    def from_sample(latents, output, sqrt_alpha, sqrt_one_minus_alpha):
        return (latents - sqrt_alpha * output) / sqrt_one_minus_alpha

    return {"epsilon": from_epsilon, "v_prediction": from_v, "sample": from_sample}[prediction_type]


def numbers(vector) -> Any:
    """The numbers of a vector (N,), each 0-d, by one operator for all."""
    return tuple(number.reshape(()) for number in mint.split(vector, 1))


def halves(noise_prediction) -> Any:
    """Predictions (2 B, C, h, w), negatives first, as those for negatives and those for prompts."""
    return mint.split(noise_prediction, noise_prediction.shape[0] // 2)


def solver_step(solver: str, prediction_type: str, clip: float | None) -> Callable:
    """One update: a function (latents, output, previous pred_x0, coefficients, noise) -> (latents, pred_x0).

    Args:
        solver: "ddim" (formula 12 of arXiv 2010.02502) or "dpm" (multistep DPM-Solver++, arXiv 2211.01095).
        prediction_type: "epsilon", "sample" or "v_prediction".
        clip: bound of the predicted clean latents, or None.
    """
    x0, epsilon = x0_prediction(prediction_type), epsilon_prediction(prediction_type)

    def ddim(latents, output, previous, coefficients, noise):
        c = numbers(coefficients)
        pred_x0 = x0(latents, output, c[0], c[1])
        if clip is not None:
            pred_x0 = ops.clamp(pred_x0, -clip, clip)
        direction = c[3] * epsilon(latents, output, c[0], c[1])
        return c[2] * pred_x0 + direction + c[4] * noise, pred_x0

    def dpm(latents, output, previous, coefficients, noise):
        c = numbers(coefficients)
        pred_x0 = x0(latents, output, c[0], c[1])
        return c[2] * latents + c[3] * pred_x0 + c[4] * (pred_x0 - previous), pred_x0

    return {"ddim": ddim, "dpm": dpm}[solver]
