"""mindone's schedulers with the PyTorch reference's exact noise tables, and their plans for the compiled step.

The four classes keep mindone's configuration (diffusers' options, ``from_config``, ``config``), saving and loading,
``set_timesteps`` and eager ``step``; only the tables that mindone computes in float64 are replaced by the float32 ones
of ``schedules``, which equal diffusers' to the last bit. A *plan* gives every coefficient of a run in advance, so that
the compiled step is pure and runs with the UNet. Schedulers without a plan (other classes of mindone, or options that
the compiled formulas do not cover: thresholding, SDE variants, third order) run with their own ``step``; the UNet stays
compiled. ``invert`` needs a scheduler that has an inverse.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
from mindone.diffusers.schedulers import DDIMInverseScheduler as _DDIMInverse
from mindone.diffusers.schedulers import DDIMScheduler as _DDIM
from mindone.diffusers.schedulers import DPMSolverMultistepInverseScheduler as _DPMInverse
from mindone.diffusers.schedulers import DPMSolverMultistepScheduler as _DPM

from mindiffedit.errors import InputError
from mindiffedit.runtime import devices
from mindiffedit.runtime.exact_mint import exact_mint
from mindiffedit.runtime.kernels import portable_kernels
from mindiffedit.solvers import schedules


def _with_exact_tables(cls):
    """Class decorator: mindone's ``__init__`` and ``set_timesteps`` on any device, then the reference's tables."""
    parent = next(base for base in cls.__mro__ if base.__module__.startswith("mindone."))

    # functools.wraps keeps the parent's signature, from which ``from_config`` reads the accepted options.
    @functools.wraps(parent.__init__)
    def __init__(self, *args, **kwargs):
        with portable_kernels():
            parent.__init__(self, *args, **kwargs)
        table = schedules.betas(self.config)
        bar = schedules.alphas_cumprod(table)
        if self.config.get("rescale_betas_zero_snr") and isinstance(self, (_DPM, _DPMInverse)):
            bar[-1] = 2**-24  # as in the reference: keeps the first noise level finite
        self.exact_alphas_cumprod = bar
        self.betas, self.alphas = ms.Tensor(table), ms.Tensor(np.float32(1) - table)
        self.alphas_cumprod = ms.Tensor(bar)
        for name in ("final_alpha_cumprod", "initial_alpha_cumprod"):
            if hasattr(self, name):
                setattr(self, name, ms.Tensor(self.exact_end_alpha))
        if hasattr(self, "alpha_t"):
            self.alpha_t, self.sigma_t = ms.Tensor(np.sqrt(bar)), ms.Tensor(np.sqrt(np.float32(1) - bar))
            self.lambda_t = ms.Tensor(
                schedules.rounded(np.log, np.sqrt(bar)) - schedules.rounded(np.log, np.sqrt(np.float32(1) - bar))
            )
            self.sigmas = ms.Tensor(np.sqrt((np.float32(1) - bar) / bar))

    inner = cls.set_timesteps

    @functools.wraps(inner)
    def set_timesteps(self, *args, **kwargs):
        kwargs.pop("device", None)  # diffusers' argument; MindSpore places tensors itself
        with portable_kernels():
            inner(self, *args, **kwargs)
        self.exact_timesteps = self.timesteps.asnumpy()
        if isinstance(self, (_DPM, _DPMInverse)):
            self.exact_sigmas = self._exact_sigmas()
            self.sigmas = ms.Tensor(self.exact_sigmas)

    cls.__init__, cls.set_timesteps = __init__, set_timesteps
    return cls


def _with_exact_coefficients(cls):
    """Class decorator: mindone's multistep ``step`` on any device, with the coefficients that the plans have too."""
    parent = next(base for base in cls.__mro__ if base.__module__.startswith("mindone."))
    home: Any = sys.modules[parent.__module__]

    @functools.wraps(parent.step)
    def step(self, *args, **kwargs):
        with exact_mint(home), portable_kernels():
            return parent.step(self, *args, **kwargs)

    cls.step = step
    return cls


class _DDIMTables:
    """Noise levels and plan rows shared by DDIM and its inverse.

    Only the level that a step's jump reaches may lie beyond the cleanest timestep. The timestep itself is an index
    into the table, as in the reference, also where trailing spacing rounds the last one to -1 (61 steps do).
    """

    config: Any
    timesteps: ms.Tensor
    exact_alphas_cumprod: np.ndarray

    @property
    def exact_end_alpha(self) -> np.float32:
        """Cumulative alpha beyond the cleanest timestep."""
        return np.float32(1.0) if self.config.set_alpha_to_one else self.exact_alphas_cumprod[0]

    def _alpha(self, timestep: int) -> np.float32:
        return self.exact_alphas_cumprod[timestep] if timestep >= 0 else self.exact_end_alpha

    def noise_scale(self, timestep: int):
        """Factors of latents and noise in ``add_noise`` at a timestep, float32."""
        bar = self.exact_alphas_cumprod[int(timestep)]
        return np.sqrt(bar), np.sqrt(np.float32(1) - bar)

    def _plan(self, rows, eta: float = 0.0) -> schedules.StepPlan | None:
        if self.config.get("thresholding"):
            return None
        clip = float(self.config.clip_sample_range) if self.config.clip_sample else None
        return schedules.StepPlan("ddim", self.config.prediction_type, clip, np.stack(rows), eta > 0)


@_with_exact_tables
class DDIMScheduler(_DDIMTables, _DDIM):
    """DDIM (arXiv 2010.02502); options and methods of diffusers' class of that name."""

    def plan(self, timesteps: np.ndarray, eta: float = 0.0) -> schedules.StepPlan | None:
        """Coefficients for denoising along ``timesteps``; None where only ``step`` covers the options.

        Args:
            timesteps: those of the run, noisiest first.
            eta: DDIM's eta, in [0, 1].
        """
        jump = self.config.num_train_timesteps // self.num_inference_steps
        return self._plan(
            [schedules.ddim_row(self.exact_alphas_cumprod[t], self._alpha(t - jump), eta) for t in timesteps],
            eta,
        )


@_with_exact_tables
class DDIMInverseScheduler(_DDIMTables, _DDIMInverse):
    """DDIM run from clean to noisy; options and methods of diffusers' class of that name.

    ``timestep_spacing`` can be "linspace", too, as in DDIM's class.
    """

    def set_timesteps(self, num_inference_steps: int) -> None:
        if self.config.timestep_spacing != "linspace":
            super().set_timesteps(num_inference_steps)
            return
        # W14: the reference's class refuses this spacing; what belongs to it are DDIM's timesteps, the other way round.
        _DDIM.set_timesteps(self, num_inference_steps)
        self.timesteps = ms.Tensor(self.timesteps.asnumpy()[::-1].copy())

    def plan(self, timesteps: np.ndarray, eta: float = 0.0) -> schedules.StepPlan | None:
        """Coefficients for inverting along ``timesteps``; ``eta`` has no meaning backwards."""
        jump, last = (
            self.config.num_train_timesteps // self.num_inference_steps,
            self.config.num_train_timesteps - 1,
        )
        return self._plan(
            [schedules.ddim_row(self._alpha(min(t - jump, last)), self.exact_alphas_cumprod[t]) for t in timesteps]
        )


class _DPMTables:
    """Noise levels and plan rows shared by DPM-Solver++ and its inverse."""

    config: Any
    sigmas: ms.Tensor
    exact_alphas_cumprod: np.ndarray
    exact_sigmas: np.ndarray
    exact_timesteps: np.ndarray
    _last_level: Callable[[np.ndarray], np.float32]
    _falls_to_first_order: Callable[[int], bool]

    def _rescaled_levels(self) -> bool:
        options = (
            "use_karras_sigmas",
            "use_exponential_sigmas",
            "use_beta_sigmas",
            "use_flow_sigmas",
            "use_lu_lambdas",
        )
        return any(self.config.get(name) for name in options)

    def _exact_sigmas(self) -> np.ndarray:
        if self._rescaled_levels():
            return self.sigmas.asnumpy().astype(np.float32)
        bar = self.exact_alphas_cumprod
        table = np.sqrt((np.float32(1) - bar) / bar)
        timesteps, levels = self.exact_timesteps, self.sigmas.asnumpy()[:-1]
        if len(levels) > len(timesteps):
            # The inverse drops timesteps that come twice but keeps their levels, so that the two no longer run in step.
            timesteps = timesteps[np.cumsum(np.append(False, levels[1:] != levels[:-1]))]
        levels = np.interp(timesteps, np.arange(len(table)), table)
        return np.append(levels, self._last_level(table)).astype(np.float32)

    def noise_scale(self, timestep: int):
        """Factors of latents and noise in ``add_noise`` at a timestep, float32."""
        sigma = self.exact_sigmas[schedules.index_of_timestep(self.exact_timesteps, int(timestep))]
        alpha = np.float32(1) / np.sqrt(sigma**2 + np.float32(1))
        return alpha, sigma * alpha

    def plan(self, timesteps: np.ndarray, eta: float = 0.0) -> schedules.StepPlan | None:
        """Coefficients along ``timesteps``; None for SDE variants, third order, thresholding and flow levels."""
        config = self.config
        if (
            config.algorithm_type != "dpmsolver++"
            or config.solver_order > 2
            or config.thresholding
            or config.get("use_flow_sigmas")
            or config.prediction_type not in ("epsilon", "sample", "v_prediction")
        ):
            return None
        first = schedules.index_of_timestep(self.exact_timesteps, int(timesteps[0]))
        rows = schedules.dpm_rows(
            self.exact_sigmas,
            first,
            len(timesteps),
            config.solver_order,
            config.solver_type,
            self._falls_to_first_order,
        )
        return schedules.StepPlan("dpm", config.prediction_type, None, rows)


@_with_exact_tables
@_with_exact_coefficients
class DPMSolverMultistepScheduler(_DPMTables, _DPM):
    """Multistep DPM-Solver++ (arXiv 2211.01095); options and methods of diffusers' class of that name."""

    def _last_level(self, table) -> np.float32:
        return table[0] if self.config.final_sigmas_type == "sigma_min" else np.float32(0)

    def _falls_to_first_order(self, index: int) -> bool:
        config, count = self.config, len(self.exact_timesteps)
        return index == count - 1 and (
            config.euler_at_final or (config.lower_order_final and count < 15) or config.final_sigmas_type == "zero"
        )


@_with_exact_tables
@_with_exact_coefficients
class DPMSolverMultistepInverseScheduler(_DPMTables, _DPMInverse):
    """DPM-Solver++ run from clean to noisy; options and methods of diffusers' class of that name."""

    def _last_level(self, table) -> np.float32:
        return table[self.noisiest_timestep]

    def _falls_to_first_order(self, index: int) -> bool:
        config, count = self.config, len(self.exact_timesteps)
        return index == count - 1 and (config.euler_at_final or (config.lower_order_final and count < 15))


_OURS = {
    cls.__name__: cls
    for cls in (
        DDIMScheduler,
        DDIMInverseScheduler,
        DPMSolverMultistepScheduler,
        DPMSolverMultistepInverseScheduler,
    )
}

INVERSES: dict[str, Any] = {forward: _OURS[inverse] for forward, inverse in schedules.CLASSES.values()}
"""Which inverse belongs to which scheduler, by class name."""


def is_tabulated(scheduler) -> bool:
    """Whether it is one of ours, with exact tables."""
    return isinstance(scheduler, (_DDIMTables, _DPMTables))


def has_inverse(scheduler) -> bool:
    """Whether an inverse belongs to a scheduler; whether its options allow one, ``inverse_of`` says."""
    return type(scheduler).__name__ in INVERSES


def belong_together(scheduler, inverse) -> bool:
    """Whether an inverse is of the class that belongs to the scheduler's."""
    return has_inverse(scheduler) and INVERSES[type(scheduler).__name__].__name__ == type(inverse).__name__


def inverse_of(scheduler):
    """The matching inverse scheduler with the same configuration.

    Args:
        scheduler: a DDIMScheduler or DPMSolverMultistepScheduler.

    Raises:
        InputError: when the scheduler has no inverse here, or its options allow none.
    """
    inverse = INVERSES.get(type(scheduler).__name__)
    if inverse is None:
        raise InputError(
            f"{type(scheduler).__name__} has no inverse scheduler, which `invert` needs. Set"
            " `pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)` and"
            " `pipeline.inverse_scheduler = DDIMInverseScheduler.from_config(pipeline.scheduler.config)`, or the same"
            " with DPMSolverMultistepScheduler and DPMSolverMultistepInverseScheduler."
        )
    check_invertible(scheduler)
    known = inspect.signature(inverse.__init__).parameters
    return inverse.from_config(
        {name: value for name, value in scheduler.config.items() if name in known or name.startswith("_")}
    )


def check_invertible(scheduler) -> None:
    """InputError for a DPM-Solver++, or an inverse of one, that cannot be run backwards as it is configured.

    E14: the reference's results are NaN, far too large, or a crash within the loop.
    """
    obstacles = schedules.obstacles(scheduler.config)
    if not isinstance(scheduler, (_DPM, _DPMInverse)) or not obstacles:
        return
    remedy = ", ".join(f"{name}={value!r}" for name, (_, value) in obstacles.items())
    raise InputError(
        f"{type(scheduler).__name__} cannot be inverted with {schedules.why_not(scheduler.config)}. Set"
        f" `pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, {remedy})`, or"
        " `pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)`; and then"
        " `pipeline.inverse_scheduler = None`, which takes its inverse."
    )


# --- by the names of classes, as files have them --------------------------------------------------------------------


def portable(scheduler):
    """The scheduler itself, or ours with the same configuration where mindone's own class of that name is given."""
    ours = _OURS.get(type(scheduler).__name__)
    return scheduler if ours is None or isinstance(scheduler, ours) else ours.from_config(scheduler.config)


def make(class_name: str, config, **options):
    """The scheduler of that class, as files name it, with a configuration and options: ours, or else mindone's.

    Raises:
        ValueError: there is none of that name; or whatever a config that is none of its makes it raise.
    """
    scheduler = _OURS.get(class_name)
    if scheduler is None and class_name.endswith("Scheduler"):
        import mindone.diffusers.schedulers  # all of them; the package above leaves some out

        scheduler = getattr(mindone.diffusers.schedulers, class_name, None)
    if scheduler is None:
        raise ValueError("mindone has none of this name")
    with portable_kernels():
        try:
            return scheduler.from_config(config, **options)
        except Exception:
            with contextlib.suppress(Exception):  # or the next operator that runs may fail by the same error
                devices.synchronize()
            raise


def ddim_instead_of(class_name: str, config):
    """DDIM in place of a scheduler that cannot be made; None where that is one of ours, an inverse, or no solver."""
    solver = class_name.endswith("Scheduler") and "Inverse" not in class_name and "beta_start" in config
    if class_name in _OURS or not solver:
        return None
    known = inspect.signature(DDIMScheduler.__init__).parameters
    options = {name: value for name, value in config.items() if name in known}
    return DDIMScheduler(**options | schedules.suited("DDIMScheduler", config))
