"""The two regularisers of ``invert`` (Pix2Pix-Zero, section 3.2) and their gradients, in NumPy.

The reference differentiates them with autograd at every step. Their gradients are short closed forms on an array of
one latent's size, so they are written out here: they then need no gradient support of a device, and the compiled
step stays a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mindiffedit.errors import InputError


def auto_correlation(noise: np.ndarray, draw_roll: Callable[[int], int]) -> tuple[float, np.ndarray]:
    """Sum over samples, channels and pyramid levels of the squared correlation with a shifted copy.

    Source: ``auto_corr_loss`` of the reference. At each level a shift s is drawn; the level adds
    ``mean(n * roll_rows(n, s))**2 + mean(n * roll_columns(n, s))**2``; the next level is the 2 x 2 average.

    Args:
        noise: (B, C, h, w), h at least 2.
        draw_roll: called with ``h // 2`` of the level, gives a whole number from 0 up to, not including, it.

    Returns:
        The loss and its gradient, float64, same shape as ``noise``.
    """
    noise = noise.astype(np.float64)
    loss, gradient = 0.0, np.zeros_like(noise)
    for sample in range(noise.shape[0]):
        for channel in range(noise.shape[1]):
            level = noise[sample, channel]
            scale = 1
            while True:
                shift = draw_roll(level.shape[0] // 2)
                level_gradient = np.zeros_like(level)
                for axis in (0, 1):
                    correlation = float(np.mean(level * np.roll(level, shift, axis)))
                    loss += correlation**2
                    # d mean(n * roll(n, s)) / dn = (roll(n, s) + roll(n, -s)) / N
                    both = np.roll(level, shift, axis) + np.roll(level, -shift, axis)
                    level_gradient += 2 * correlation * both / level.size
                gradient[sample, channel] += _spread(level_gradient, scale, noise.shape[2:])
                if level.shape[0] <= 8:
                    break
                level, scale = _halve(level), scale * 2
    return loss, gradient


def kl_divergence(noise: np.ndarray) -> tuple[float, np.ndarray]:
    """``var + mean**2 - 1 - log(var + 1e-7)`` over all values together, var unbiased, and its gradient (float64).

    Source: ``kl_divergence`` of the reference.
    """
    noise = noise.astype(np.float64)
    mean, var = noise.mean(), noise.var(ddof=1)
    loss = var + mean**2 - 1 - np.log(var + 1e-7)
    var_gradient = 2 * (noise - mean) / (noise.size - 1)
    return float(loss), var_gradient * (1 - 1 / (var + 1e-7)) + 2 * mean / noise.size


def regularise(
    noise_pred: np.ndarray,
    latent_model_input: np.ndarray,
    alpha_prod_t: float | np.float32,
    prediction_type: str,
    draw_roll: Callable[[int], int],
    lambda_auto_corr: float,
    lambda_kl: float,
    num_reg_steps: int,
    num_auto_corr_rolls: int,
) -> np.ndarray:
    """The regularised noise prediction of one inversion step, float32 (B, C, h, w).

    Args:
        noise_pred: guided model output (B, C, h, w).
        latent_model_input: what the UNet saw, (B or 2 B, C, h, w). With guidance and a v- or sample-predicting model
            the reference mixes the doubled batch into the epsilon; that is reproduced by broadcasting, and like
            there it fails (ValueError) for B > 1.
        alpha_prod_t: the noise schedule's cumulative alpha at this timestep.
    """
    a = np.float64(alpha_prod_t)
    noise_pred = noise_pred.astype(np.float32)

    def epsilon(output):
        """epsilon(output) and d epsilon / d output (a number), see the reference's ``get_epsilon``."""
        if prediction_type == "epsilon":
            return output, 1.0
        if output.shape[0] not in (1, latent_model_input.shape[0]):
            raise InputError(
                "{parameter} with guidance and prediction type {kind!r} works for one prompt at a time, but {count} "
                "were given; set {guidance_scale=1} or invert them one by one.",
                parameter="num_reg_steps",
                kind=prediction_type,
                count=output.shape[0],
            )
        if prediction_type == "sample":
            return (latent_model_input - a**0.5 * output) / (1 - a) ** 0.5, -(a**0.5) / (1 - a) ** 0.5
        if prediction_type == "v_prediction":
            return a**0.5 * output + (1 - a) ** 0.5 * latent_model_input, a**0.5
        raise InputError(
            "{parameter} has to be one of epsilon, sample, v_prediction, but is {value!r}.",
            parameter="prediction_type",
            value=prediction_type,
        )

    def descended(output, loss_and_gradient, rate):
        value, slope = epsilon(output)
        gradient = loss_and_gradient(value)[1] * slope
        if gradient.shape[0] != output.shape[0]:  # the doubled batch of the doc string: add up what was broadcast
            gradient = gradient.sum(axis=0, keepdims=True)
        return (output - rate * gradient).astype(np.float32)

    for _ in range(num_reg_steps):
        if lambda_auto_corr > 0:
            for _ in range(num_auto_corr_rolls):
                noise_pred = descended(
                    noise_pred, lambda n: auto_correlation(n, draw_roll), lambda_auto_corr / num_auto_corr_rolls
                )
        if lambda_kl > 0:
            noise_pred = descended(noise_pred, kl_divergence, lambda_kl)
    return noise_pred


def _halve(level: np.ndarray) -> np.ndarray:
    """2 x 2 averages; an odd last row or column is left out, as ``avg_pool2d`` leaves it."""
    h, w = level.shape[0] // 2 * 2, level.shape[1] // 2 * 2
    return level[:h, :w].reshape(h // 2, 2, w // 2, 2).mean((1, 3))


def _spread(gradient: np.ndarray, scale: int, shape) -> np.ndarray:
    """Gradient of repeated ``_halve`` calls: every averaged value hands its gradient on in equal shares."""
    if scale == 1:
        return gradient
    grown = np.repeat(np.repeat(gradient, scale, 0), scale, 1) / scale**2
    full = np.zeros(shape)
    full[: grown.shape[0], : grown.shape[1]] = grown
    return full
