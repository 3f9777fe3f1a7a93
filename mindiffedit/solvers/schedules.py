"""Noise schedules and solver coefficients in NumPy, float32, rounded where the PyTorch reference rounds.

The tables of the reference come from ``torch.linspace`` and ``torch.cumprod`` in float32. NumPy's ``linspace`` in
float64 differs in the last bits, which is enough to move latents by 1e-4 over a few steps, so the float32 recipes are
followed here. Square roots, exponentials and logarithms are correctly rounded. Torch takes them from a vector library,
also for single numbers, and about one in a hundred has a wrong last bit there; that is all that differs.

Then what a scheduler's configuration says about inversion, for the pipeline and, before MindSpore is imported, the
command line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mindiffedit.arrays import rounded
from mindiffedit.errors import InputError

F32 = np.float32


def linspace(start: float | F32, end: float | F32, count: int) -> np.ndarray:
    """``torch.linspace`` in float32: counted up from the start for one half and down from the end for the other."""
    start, end = F32(start), F32(end)
    if count == 1:
        return np.array([start], F32)
    step = F32((end - start) / F32(count - 1))
    index = np.arange(count)
    # torch's kernel evaluates start + step * i with one rounding (fused multiply-add).
    up = (np.float64(start) + np.float64(step) * index).astype(F32)
    down = (np.float64(end) - np.float64(step) * (count - 1 - index)).astype(F32)
    return np.where(index < count // 2, up, down)


def betas(config) -> np.ndarray:
    """The variance schedule (float32, ``num_train_timesteps`` values) that a scheduler config describes."""
    count = config["num_train_timesteps"]
    schedule = config["beta_schedule"]
    if config.get("trained_betas") is not None:
        table: np.ndarray = np.asarray(config["trained_betas"], F32)
    elif schedule == "linear":
        table = linspace(config["beta_start"], config["beta_end"], count)
    elif schedule == "scaled_linear":
        table = linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, count) ** 2
    elif schedule == "squaredcos_cap_v2":

        def bar(t):
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        table = np.array([min(1 - bar((i + 1) / count) / bar(i / count), 0.999) for i in range(count)], F32)
    else:
        raise NotImplementedError(f"beta schedule {schedule!r} is not one of linear, scaled_linear, squaredcos_cap_v2.")
    return _zero_terminal_snr(table) if config.get("rescale_betas_zero_snr") else table


def alphas_cumprod(table: np.ndarray) -> np.ndarray:
    """Cumulative products of ``1 - beta``: accumulated in double, each rounded to float32, as torch does on a CPU."""
    return np.cumprod((F32(1) - table).astype(np.float64)).astype(F32)


def _zero_terminal_snr(table: np.ndarray) -> np.ndarray:
    """Betas rescaled so that the last step is pure noise (Lin et al. 2023, algorithm 1)."""
    root = np.sqrt(alphas_cumprod(table))
    first, last = root[0], root[-1]
    root = root - last
    root = root * (first / (first - last))
    bar = root**2
    alphas = np.concatenate([bar[:1], bar[1:] / bar[:-1]])
    return (F32(1) - alphas).astype(F32)


@dataclass(frozen=True)
class StepPlan:
    """What the compiled step needs for a whole run of one solver.

    Attributes:
        solver: "ddim" or "dpm"; the formula that is compiled.
        prediction_type: "epsilon", "sample" or "v_prediction"; compiled in.
        clip: bound of the predicted clean sample, or None; compiled in.
        coefficients: (steps, 5) float32, one row for each step; arguments of the compiled step.
        noisy: whether the rows' noise coefficient is used (eta > 0).
    """

    solver: str
    prediction_type: str
    clip: float | None
    coefficients: np.ndarray
    noisy: bool = False


def ddim_row(alpha_t: F32, alpha_next: F32, eta: float = 0.0) -> np.ndarray:
    """Coefficients of one DDIM update between two noise levels (formula 12 of arXiv 2010.02502), either direction.

    Returns:
        float32 (5,): sqrt(alpha_t), sqrt(1 - alpha_t), sqrt(alpha_next), factor of the noise prediction, sigma.
    """
    one = F32(1)
    alpha_t, alpha_next = F32(alpha_t), F32(alpha_next)
    beta_t, beta_next = one - alpha_t, one - alpha_next
    sigma = F32(0)
    if eta > 0:
        variance = (beta_next / beta_t) * (one - alpha_t / alpha_next)
        sigma = F32(F32(eta) * np.sqrt(variance))
    # With eta 1 and a pure-noise start the difference is 0, rounded to either side; the reference gets NaN below it.
    direction = np.sqrt(np.maximum(one - alpha_next - sigma * sigma, F32(0)))
    return np.array([np.sqrt(alpha_t), np.sqrt(beta_t), np.sqrt(alpha_next), direction, sigma], F32)


def dpm_rows(sigmas: np.ndarray, first: int, count: int, order: int, solver_type: str, first_order) -> np.ndarray:
    """Coefficients of ``count`` multistep DPM-Solver++ updates (arXiv 2211.01095), orders 1 and 2, either direction.

    Args:
        sigmas: the run's noise levels, float32, ``sigmas[i + 1]`` is where step i arrives.
        first: index of the first step taken.
        first_order: function of the step index: whether this step must fall back to first order.

    Returns:
        float32 (count, 5): alpha_s, sigma_s, factor of the sample, factor of the clean prediction D0, factor of
        ``m0 - m1`` (zero in first-order steps).
    """
    sigmas = sigmas.astype(F32)
    alphas = (F32(1) / np.sqrt(sigmas**2 + F32(1))).astype(F32)
    spreads = (sigmas * alphas).astype(F32)
    rows = np.zeros((count, 5), F32)
    # The last noise level may be 0 (lambda = +inf, exp(-h) = 0), and schedules of many steps may have one level twice
    # (h = 0); what comes of that is the reference's.
    with np.errstate(divide="ignore", invalid="ignore"):
        lambdas = rounded(np.log, alphas) - rounded(np.log, spreads)
        for i in range(count):
            s = first + i
            h = lambdas[s + 1] - lambdas[s]
            shrink = rounded(np.exp, -h) - F32(1)
            rows[i, :4] = alphas[s], spreads[s], spreads[s + 1] / spreads[s], -(alphas[s + 1] * shrink)
            if order == 1 or i == 0 or first_order(s):
                continue
            inverse_ratio = F32(1) / ((lambdas[s] - lambdas[s - 1]) / h)
            if solver_type == "midpoint":
                weight = -(F32(0.5) * (alphas[s + 1] * shrink))
            else:  # heun
                weight = alphas[s + 1] * (shrink / h + F32(1))
            rows[i, 4] = weight * inverse_ratio
    return rows


def index_of_timestep(timesteps: np.ndarray, timestep: int) -> int:
    """Where a multistep run starts: the second match if there are several, the last step if there is none."""
    matches = np.flatnonzero(timesteps == timestep)
    if len(matches) == 0:
        return len(timesteps) - 1
    return int(matches[1] if len(matches) > 1 else matches[0])


CLASSES = {
    "ddim": ("DDIMScheduler", "DDIMInverseScheduler"),
    "dpm": ("DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler"),
}
"""Class names of a solver and of its inverse."""


# --- configurations: which can be run backwards, and which options go from one solver to another ---


def obstacles(config) -> dict:
    """Options of a DPM-Solver++ that cannot be run backwards, as ``{option: (why, value that can be)}``."""
    reasons: dict[str, tuple[str, Any]] = {}
    if str(config.get("algorithm_type", "")).startswith("sde"):
        reasons["algorithm_type"] = ("it adds noise in every step", "dpmsolver++")
    if config.get("thresholding"):
        reasons["thresholding"] = ("backwards it makes latents several times too large", False)
    if config.get("use_flow_sigmas"):
        reasons["use_flow_sigmas"] = ("its noise levels are not Stable Diffusion's", False)
    if config.get("variance_type") in ("learned", "learned_range"):
        reasons["variance_type"] = ("it takes a UNet that predicts a variance, too", None)
    return reasons


def why_not(config) -> str:
    """The obstacles of a configuration for a message; empty where there are none."""
    return " and ".join(f"{name}={config[name]!r} ({why})" for name, (why, _) in obstacles(config).items())


def suited(class_name: str, config) -> dict:
    """Options for ``from_config`` of DDIM or DPM-Solver++ with the configuration of a scheduler of another class.

    Such a configuration does not know DDIM's options, whose defaults are not made for latents: they are not to be
    clipped. And "linspace" gives timesteps that DDIM's steps do not arrive at. Other solvers' names of
    ``algorithm_type`` are none of DPM-Solver++.

    Raises:
        InputError: it is for models of another kind (flow matching, EDM), which these two cannot run.
    """
    predicts = config.get("prediction_type", "epsilon")
    if config.get("beta_start") is None or predicts not in ("epsilon", "sample", "v_prediction"):
        raise InputError(
            f"The model's scheduler, with prediction_type {predicts!r} and beta_start {config.get('beta_start')!r}, is"
            " for flow matching or another kind of diffusion, which neither DDIM nor DPM-Solver++ can invert; take a"
            " model that was trained with betas and predicts 'epsilon' or 'v_prediction'."
        )
    if class_name == "DPMSolverMultistepScheduler":
        return dict(algorithm_type="dpmsolver++")
    spacing = "trailing" if config.get("timestep_spacing") == "trailing" else "leading"
    return dict(clip_sample=False, steps_offset=1, timestep_spacing=spacing)
