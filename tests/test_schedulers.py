"""Schedulers against diffusers: tables and timesteps bit for bit, the compiled step's update within rounding."""

import diffusers
import mindspore as ms
import numpy as np
import pytest
import torch

from mindiffedit import schedulers, steps
from mindiffedit.schedulers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
)

SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
DDIM = dict(SD, clip_sample=False, set_alpha_to_one=False)
PAIRS = [
    (DDIMScheduler, DDIM),
    (
        DDIMScheduler,
        dict(DDIM, prediction_type="v_prediction", timestep_spacing="trailing", set_alpha_to_one=True),
    ),
    (DDIMScheduler, dict(beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=True)),
    (DDIMScheduler, dict(beta_schedule="linear", clip_sample=True, timestep_spacing="linspace")),
    (DDIMInverseScheduler, DDIM),
    (DDIMInverseScheduler, dict(DDIM, prediction_type="v_prediction", timestep_spacing="trailing")),
    (DPMSolverMultistepScheduler, SD),
    (DPMSolverMultistepScheduler, dict(SD, solver_order=1)),
    (DPMSolverMultistepScheduler, dict(SD, solver_type="heun", prediction_type="v_prediction")),
    (DPMSolverMultistepScheduler, dict(SD, use_karras_sigmas=True)),
    (DPMSolverMultistepScheduler, dict(SD, final_sigmas_type="sigma_min", timestep_spacing="leading")),
    (DPMSolverMultistepScheduler, dict(SD, euler_at_final=True, timestep_spacing="trailing")),
    (DPMSolverMultistepInverseScheduler, SD),
    (DPMSolverMultistepInverseScheduler, dict(SD, solver_order=1, prediction_type="v_prediction")),
    (DPMSolverMultistepInverseScheduler, dict(SD, solver_type="heun", timestep_spacing="leading")),
]
IDS = [f"{ours.__name__}-{i}" for i, (ours, _) in enumerate(PAIRS)]


def _both(ours, options):
    return ours(**options), getattr(diffusers, ours.__name__)(**options)


@pytest.mark.parametrize("ours, options", PAIRS, ids=IDS)
@pytest.mark.parametrize("count", [7, 50])
def test_tables_and_timesteps_are_the_references(ours, options, count):
    mine, theirs = _both(ours, options)
    assert np.array_equal(mine.betas.asnumpy(), theirs.betas.numpy())
    assert np.array_equal(mine.exact_alphas_cumprod, theirs.alphas_cumprod.numpy())
    assert np.array_equal(mine.alphas_cumprod.asnumpy(), theirs.alphas_cumprod.numpy())
    mine.set_timesteps(count)
    theirs.set_timesteps(count)
    assert np.array_equal(mine.exact_timesteps, theirs.timesteps.numpy())
    if hasattr(mine, "exact_sigmas"):
        np.testing.assert_allclose(mine.exact_sigmas, theirs.sigmas.numpy(), rtol=2e-7)


@pytest.mark.parametrize("ours, options", PAIRS, ids=IDS)
@pytest.mark.parametrize("count, strength", [(8, 1.0), (20, 0.6)])
def test_update_follows_the_references_step(ours, options, count, strength):
    mine, theirs = _both(ours, options)
    mine.set_timesteps(count)
    theirs.set_timesteps(count)
    skipped = count - int(count * strength)
    inverse = "Inverse" in ours.__name__
    timesteps = mine.exact_timesteps[: count - skipped] if inverse else mine.exact_timesteps[skipped:]
    plan = mine.plan(timesteps)
    update = steps._update(plan.solver, plan.prediction_type, plan.clip)
    rng = np.random.default_rng(count)
    latents = rng.standard_normal((2, 4, 5, 3), np.float32)
    expected, clean = torch.from_numpy(latents), ms.Tensor(np.zeros_like(latents))
    latents = ms.Tensor(latents)
    for i, t in enumerate(timesteps):
        output = rng.standard_normal((2, 4, 5, 3), np.float32)
        latents, clean = update(latents, ms.Tensor(output), clean, ms.Tensor(plan.coefficients[i]), clean * 0)
        expected = theirs.step(torch.from_numpy(output), torch.tensor(t), expected).prev_sample
        # Both sides go on from the reference's latents, so that each step is judged alone.
        # Rounding is judged against the largest term: the first inverse DPM step takes 12.7 times the latents and
        # subtracts nearly as much again.
        scale = np.abs(expected.numpy()).max() * max(1.0, abs(plan.coefficients[i, 2]))
        # torch's vectorised square root can be one bit off, ours is correctly rounded; the heun weight
        # (exp(-h) - 1) / h + 1 magnifies that bit of the noise levels.
        scale *= 3 if mine.config.get("solver_type") == "heun" else 1
        np.testing.assert_allclose(latents.asnumpy() / scale, expected.numpy() / scale, atol=1e-6)
        latents = ms.Tensor(expected.numpy())


def test_eta_adds_the_references_noise():
    mine, theirs = _both(DDIMScheduler, DDIM)
    mine.set_timesteps(10)
    theirs.set_timesteps(10)
    plan = mine.plan(mine.exact_timesteps, 0.7)
    assert plan.noisy
    rng = np.random.default_rng(0)
    for i, t in enumerate(mine.exact_timesteps):
        latents, output, noise = rng.standard_normal((3, 1, 4, 5, 3), np.float32)
        update = steps._update(plan.solver, plan.prediction_type, plan.clip)
        got = update(*map(ms.Tensor, (latents, output, latents * 0, plan.coefficients[i], noise)))[
            0
        ].asnumpy()
        expected = theirs.step(
            torch.from_numpy(output),
            t,
            torch.from_numpy(latents),
            eta=0.7,
            variance_noise=torch.from_numpy(noise),
        ).prev_sample.numpy()
        np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize("ours, options", [PAIRS[0], PAIRS[6]], ids=["DDIM", "DPM"])
def test_noise_is_added_as_in_the_reference(ours, options):
    mine, theirs = _both(ours, options)
    mine.set_timesteps(20)
    theirs.set_timesteps(20)
    latents, noise = np.random.default_rng(0).standard_normal((2, 1, 4, 5, 3), np.float32)
    for t in mine.exact_timesteps:
        scale, spread = mine.noise_scale(t)
        expected = theirs.add_noise(torch.from_numpy(latents), torch.from_numpy(noise), torch.tensor([t]))
        np.testing.assert_allclose(scale * latents + spread * noise, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        dict(SD, solver_order=3),
        dict(SD, algorithm_type="sde-dpmsolver++"),
        dict(SD, thresholding=True),
    ],
)
def test_options_outside_the_compiled_formulas_have_no_plan(options):
    scheduler = DPMSolverMultistepScheduler(**options)
    scheduler.set_timesteps(10)
    assert scheduler.plan(scheduler.exact_timesteps) is None


def test_configurations_travel_between_the_classes_and_to_diffusers(tmp_path):
    scheduler = DDIMScheduler(**dict(DDIM, prediction_type="v_prediction"))
    inverse = schedulers.inverse_of(scheduler)
    assert type(inverse) is DDIMInverseScheduler and inverse.config.prediction_type == "v_prediction"
    assert (
        type(schedulers.inverse_of(DPMSolverMultistepScheduler(**SD))) is DPMSolverMultistepInverseScheduler
    )
    inverse.save_pretrained(str(tmp_path))
    assert (
        diffusers.DDIMInverseScheduler.from_pretrained(str(tmp_path)).config.prediction_type == "v_prediction"
    )


def test_a_scheduler_without_an_inverse_is_an_error_that_helps():
    from mindone.diffusers import EulerDiscreteScheduler

    from mindiffedit.kernels import portable_kernels

    with portable_kernels():
        scheduler = EulerDiscreteScheduler(**{k: v for k, v in SD.items()})
    with pytest.raises(ValueError, match="EulerDiscreteScheduler has no inverse.*DDIMInverseScheduler"):
        schedulers.inverse_of(scheduler)
