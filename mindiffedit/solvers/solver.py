"""A scheduler as the algorithm sees it: one interface over ours, which have exact tables, and all others of mindone's.

``schedule`` sets the timesteps of a run, ``add_noise`` brings latents to a noise level, ``scale_input`` is what the
UNet sees of them, ``plan`` gives the coefficients of the compiled step, and ``stepper`` the scheduler's own step where
there is no plan. Nothing outside this folder asks what kind of scheduler it has.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np

from mindiffedit.errors import InputError
from mindiffedit.noise import randomness
from mindiffedit.runtime.kernels import eagerly
from mindiffedit.runtime.notices import say_once
from mindiffedit.solvers import schedulers, schedules
from mindiffedit.solvers.schedulers import DDIMInverseScheduler, DDIMScheduler


def solver_of(scheduler, inverse: bool = False) -> Solver:
    """The interface over a scheduler, which runs from clean to noisy where it is an ``inverse``."""
    return (TabulatedSolver if schedulers.is_tabulated(scheduler) else Solver)(scheduler, inverse)


class Solver:
    """Any scheduler, run by its own methods.

    Attributes:
        scheduler: mindone's, or ours; a copy of it once ``schedule`` has set its timesteps.
        inverse: whether it runs from clean to noisy.
        name: its class's.
    """

    def __init__(self, scheduler, inverse: bool):
        self.scheduler, self.inverse, self.name = scheduler, inverse, type(scheduler).__name__

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: "epsilon", "sample" or "v_prediction"."""
        return self.scheduler.config.prediction_type

    @property
    def order(self) -> int:
        """Timesteps in the schedule for each of its steps."""
        return self.scheduler.order

    @property
    def refines_inversion(self) -> bool:
        """Whether it inverts, by steps that a fixed-point iteration can refine: DDIM's."""
        return isinstance(self.scheduler, DDIMInverseScheduler)

    def schedule(self, num_inference_steps: int, strength: float) -> tuple[np.ndarray, int]:
        """Sets the scheduler's timesteps; returns those that a strength leaves, and the number of steps.

        From here on the solver has a copy of the scheduler for its run. A scheduler keeps timesteps, and what it has
        seen from step to step; pipelines may share it, and while an observer or callback runs, another call may set
        it up anew.

        Raises:
            InputError: more steps than the model was trained with, a schedule that cannot be made, or timesteps beyond
                the noise table, which an offset on a schedule of full length gives.
        """
        trained = self.scheduler.config.num_train_timesteps
        if num_inference_steps > trained:
            raise InputError(
                "{parameter} is {steps}, but the model was trained with {trained} timesteps; give fewer steps.",
                parameter="num_inference_steps",
                steps=num_inference_steps,
                trained=trained,
            )
        try:
            self.scheduler.set_timesteps(num_inference_steps)
        except ValueError as error:
            raise InputError(
                "{name} cannot make a schedule of {steps} steps: {error}",
                parameter="num_inference_steps",
                name=self.name,
                steps=num_inference_steps,
                error=error,
            ) from error
        timesteps, steps = remaining(self.scheduler, num_inference_steps, strength, self.inverse)
        if timesteps.max() > trained - 1:
            raise InputError(
                "{steps} steps reach timestep {reached}, but the model's last is {last}; give fewer steps.",
                parameter="num_inference_steps",
                steps=num_inference_steps,
                reached=int(timesteps.max()),
                last=trained - 1,
            )
        self.scheduler = copy.deepcopy(self.scheduler)
        return timesteps, steps

    def alpha_cumprod(self, timestep) -> np.float32:
        """The schedule's cumulative alpha at a timestep."""
        return self.scheduler.alphas_cumprod.asnumpy()[int(timestep)]

    def noise_levels(self, timestep) -> tuple[np.float32, np.float32] | None:
        """Factors of latents and noise at a timestep; None where only ``add_noise`` knows them."""
        return None

    def add_noise(self, latents: np.ndarray, noise: np.ndarray, timestep) -> np.ndarray:
        """Latents brought to a timestep's noise level."""
        with eagerly():
            timesteps = ms.Tensor(np.repeat(timestep, len(latents)))
            return self.scheduler.add_noise(ms.Tensor(latents), ms.Tensor(noise), timesteps).asnumpy()

    def scale_input(self, latents: ms.Tensor, timestep) -> ms.Tensor:
        """What the UNet is given of latents."""
        with eagerly():
            return self.scheduler.scale_model_input(latents, self._own(timestep))

    def plan(self, timesteps: np.ndarray, eta: float = 0.0) -> schedules.StepPlan | None:
        """Coefficients of a run along ``timesteps``; None where only ``stepper`` covers scheduler and options."""
        return None

    def stepper(self, timesteps: np.ndarray, eta: float, draw: Callable[[tuple, int], np.ndarray]) -> Callable:
        """A run by the scheduler's own ``step``; one for each call of ``schedule``.

        Args:
            timesteps: those of the run.
            eta: DDIM's, for schedulers that know it.
            draw: noise of a shape in the step of an index, for schedulers that add some.

        Returns:
            A function (index, latents, output) -> (latents, pred_x0 or None), of float32 tensors (B, C, h, w).
        """
        scheduler = self.scheduler
        accepted = inspect.signature(scheduler.step).parameters
        options: dict[str, Any] = {"eta": eta} if "eta" in accepted else {}
        wants_noise = "variance_noise" in accepted
        adds_noise = (eta > 0 and "eta" in accepted) or "sde" in str(scheduler.config.get("algorithm_type", ""))

        def step(index, latents, output):
            if wants_noise and adds_noise:
                options["variance_noise"] = ms.Tensor(draw(tuple(latents.shape), index))
            elif not wants_noise and "generator" in accepted:
                options["generator"] = randomness.Draws(lambda shape: draw(shape, index))
            with eagerly():
                result = scheduler.step(output, self._own(timesteps[index]), latents, **options, return_dict=True)
            return result["prev_sample"], result.get("pred_original_sample")

        return step

    def _own(self, timestep) -> ms.Tensor:
        """A timestep as the scheduler's own ``timesteps`` would give it: some refuse anything else."""
        return ms.Tensor(timestep.item(), self.scheduler.timesteps.dtype)


class TabulatedSolver(Solver):
    """One of our four schedulers: noise levels from the exact tables, and plans."""

    def noise_levels(self, timestep) -> tuple[np.float32, np.float32]:
        return self.scheduler.noise_scale(timestep)

    def add_noise(self, latents: np.ndarray, noise: np.ndarray, timestep) -> np.ndarray:
        # Also for DPM-Solver++, on which the reference fails here (W3).
        sqrt_alpha, sqrt_one_minus_alpha = self.noise_levels(timestep)
        return sqrt_alpha * latents + sqrt_one_minus_alpha * noise

    def scale_input(self, latents: ms.Tensor, timestep) -> ms.Tensor:
        return latents

    def plan(self, timesteps: np.ndarray, eta: float = 0.0) -> schedules.StepPlan | None:
        return self.scheduler.plan(timesteps, eta)


def remaining(scheduler, num_inference_steps: int, strength: float, inverse: bool) -> tuple[np.ndarray, int]:
    """The timesteps of a schedule that a strength leaves, and their number of steps.

    Args:
        inverse: whether the schedule begins with the cleanest timestep; its end is then left out, else its beginning.
    """
    kept = min(int(num_inference_steps * strength), num_inference_steps)
    start = max(num_inference_steps - kept, 0)
    timesteps = scheduler.timesteps.asnumpy()
    if inverse:
        return (timesteps if start == 0 else timesteps[:-start]), num_inference_steps - start
    return timesteps[start * scheduler.order :], num_inference_steps - start


def ready(scheduler):
    """The scheduler that a pipeline runs: ours where mindone's of the same class is given."""
    scheduler = schedulers.portable(scheduler)
    config = scheduler.config
    if config.get("clip_sample") and "clip_sample" in config.get("_use_default_values", ()):
        say_once(
            f"{type(scheduler).__name__} clips latents, as it does by default where a configuration says nothing of it;"
            " one with clip_sample=False does not."
        )
    return scheduler


def checked_inverse(inverse, scheduler):
    """An inverse scheduler that a user has set, ready to run; says so where it does not belong to the scheduler.

    Raises:
        InputError: it cannot be run backwards as it is configured.
    """
    inverse = schedulers.portable(inverse)
    schedulers.check_invertible(inverse)
    if not schedulers.belong_together(scheduler, inverse):
        say_once(
            f"{type(inverse).__name__} is not the inverse of {type(scheduler).__name__}, so the edit does not lead back"
            " from what it inverts; `pipeline.inverse_scheduler = None` takes the one that is."
        )
    return inverse


def invertible(scheduler):
    """The scheduler, or DDIM in its place where it has no inverse (W14).

    For the mask and the edit too: the three have to be at the same noise levels.
    """
    if schedulers.has_inverse(scheduler):
        return scheduler
    suited = schedules.suited("DDIMScheduler", scheduler.config)
    say_once(
        f"{type(scheduler).__name__} has no inverse, so the pipeline takes DDIM in its place from now on, with"
        f" timestep_spacing={suited['timestep_spacing']!r}; to choose yourself, set `pipeline.scheduler` to a"
        " DDIMScheduler or DPMSolverMultistepScheduler."
    )
    return DDIMScheduler.from_config(scheduler.config, **suited)
