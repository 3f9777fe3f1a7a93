"""Checkpoints with any of mindone's solvers: edited as they are, by the guide's calls, and on the command line."""

import json
import re
from argparse import Namespace

import diffusers
import mindspore as ms
import numpy as np
import parity
import PIL.Image
import pytest
from test_pipeline import CLOSE, PICTURE, SOURCE, TARGET, both_edits, both_masks, our_pipeline, their_pipeline

import mindiffedit
from mindiffedit import DDIMInverseScheduler, DDIMScheduler, load_component
from mindiffedit.cli import loading, wording
from mindiffedit.cli.job import Job
from mindiffedit.errors import InputError
from mindiffedit.runtime import notices
from mindiffedit.solvers import schedulers

SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
OWN = ("DDIMScheduler", "DPMSolverMultistepScheduler")
OTHERS = (
    "CogVideoXDDIMScheduler DDIMInverseScheduler DDIMParallelScheduler DDPMParallelScheduler DDPMScheduler"
    " DEISMultistepScheduler DPMSolverMultistepInverseScheduler DPMSolverSinglestepScheduler"
    " EulerAncestralDiscreteScheduler EulerDiscreteScheduler HeunDiscreteScheduler KDPM2AncestralDiscreteScheduler"
    " KDPM2DiscreteScheduler LCMScheduler LMSDiscreteScheduler PNDMScheduler SASolverScheduler TCDScheduler"
    " UniPCMultistepScheduler"
).split()
BOX = np.zeros((8, 10), np.float32)
BOX[2:6, 3:7] = 1
SHORT = dict(num_inference_steps=5, generator=0)
EDIT = dict(SHORT, mask_image=BOX, output_type="latent", guidance_scale=2.0)


@pytest.fixture(scope="module")
def ours(sd1_folder):
    return our_pipeline(sd1_folder)


@pytest.fixture(scope="module")
def theirs(sd1_folder):
    return their_pipeline(sd1_folder)


@pytest.fixture
def loaded(tmp_path):
    """A scheduler as a checkpoint's folder gives it, with every option written down."""

    def load(name, **options):
        getattr(diffusers, name)(**{**SD, **options}).save_pretrained(tmp_path)
        return load_component(tmp_path, "scheduler")

    return load


@pytest.fixture
def said(monkeypatch):
    """What was said once, from now on."""
    monkeypatch.setattr(notices, "_said", set())
    return notices._said


@pytest.fixture
def models_run(ours, monkeypatch):
    """Names of the stages that ran."""
    ran = []
    for name in ("predictor", "encode_image", "encode_text", "decode_latents"):
        original = getattr(type(ours._stages), name)
        monkeypatch.setattr(
            type(ours._stages), name, lambda *args, n=name, f=original, **more: ran.append(n) or f(*args, **more)
        )
    return ran


def put(pipe, scheduler, inverse=None):
    pipe.scheduler, pipe.inverse_scheduler = scheduler, inverse


# --- solvers without an inverse ----------------------------------------------------------------------------------


def test_edits_of_every_checkpoint_as_it_is_loaded(ours, loaded, said):
    expected = {}
    for alpha_one in (True, False):
        put(ours, DDIMScheduler(**SD, clip_sample=False, steps_offset=1, set_alpha_to_one=alpha_one))
        expected[alpha_one] = (
            ours.edit(PICTURE, SOURCE, TARGET, **EDIT).latents.asnumpy(),
            ours.invert(SOURCE, PICTURE, **SHORT).latents.asnumpy(),
        )
    for name in OTHERS:
        put(ours, loaded(name))
        said.clear()
        edited = ours.edit(PICTURE, SOURCE, TARGET, **EDIT).latents.asnumpy()
        (notice,) = said
        assert name in notice and "'leading'" in notice and "`pipeline.scheduler`" in notice
        assert type(ours.scheduler) is DDIMScheduler and ours.inverse_scheduler is None
        whole, inverted = expected[ours.scheduler.config.set_alpha_to_one]
        assert np.array_equal(edited, whole), name
        if name not in ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "DDPMScheduler", "PNDMScheduler"):
            continue
        put(ours, loaded(name))
        assert np.array_equal(ours.invert(SOURCE, PICTURE, **SHORT).latents.asnumpy(), inverted)
        # The call goes on with the solver that the inversion took.
        ours(TARGET, BOX, ms.Tensor(inverted), num_inference_steps=5, output_type="latent")
    assert len(said) == 1


def test_the_spacing_of_a_checkpoint_without_an_inverse(ours, loaded, said):
    for given, taken in (("linspace", "leading"), ("leading", "leading"), ("trailing", "trailing")):
        put(ours, loaded("EulerDiscreteScheduler", timestep_spacing=given, prediction_type="v_prediction"))
        inverse = ours._solver(inverse=True).scheduler
        for scheduler in (ours.scheduler, inverse):
            config = scheduler.config
            assert (config.timestep_spacing, config.prediction_type) == (taken, "v_prediction")
            assert config.clip_sample is False and config.steps_offset == 1
    # One that is set is kept.
    put(ours, DDIMScheduler(**SD, timestep_spacing="linspace"))
    assert ours._solver(inverse=True).scheduler.config.timestep_spacing == "linspace"


def test_a_scheduler_that_cannot_be_made_gives_way_to_ddim(ours, tmp_path, said):
    """No class of that name in mindone, or kernels that this device has not: only its configuration is needed."""
    config = dict(**SD, prediction_type="v_prediction", timestep_spacing="trailing", _diffusers_version="0.40.0")

    def load(name, content):
        (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": name, **content}))
        return load_component(tmp_path, "scheduler")

    for name in ("NewestScheduler", "DPMSolverSDEScheduler", "IPNDMScheduler"):
        said.clear()
        made = load(name, config)
        assert type(made) is DDIMScheduler and (made.config.beta_start, made.config.beta_schedule) == (
            0.00085,
            SD["beta_schedule"],
        )
        assert (made.config.prediction_type, made.config.timestep_spacing) == ("v_prediction", "trailing")
        assert not made.config.clip_sample and name in "".join(said)
        put(ours, made)
        ours.invert(SOURCE, PICTURE, **SHORT)
    for name, content in (("NewestScheduler", {}), ("Newest", config), ("NewestInverseScheduler", config)):
        with pytest.raises(ValueError, match=f"no {name} can be made.*Put a DDIMScheduler"):
            load(name, content)


def test_solvers_of_another_kind_of_diffusion_are_refused(ours, loaded, models_run):
    import mindone.diffusers.schedulers as theirs

    for scheduler in (
        theirs.FlowMatchEulerDiscreteScheduler(),
        loaded("UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True),
    ):
        put(ours, scheduler)
        with pytest.raises(InputError, match="flow matching or another kind of diffusion"):
            ours.invert(SOURCE, PICTURE, **SHORT)
    assert not models_run


def test_the_guides_calls_on_every_checkpoint(ours, theirs, loaded, said):
    """`from_config` as it is there; where diffusers has a result, it is that."""
    for name in (*OTHERS, *OWN):
        own = loaded(name)
        ours.scheduler = DDIMScheduler.from_config(own.config)
        ours.inverse_scheduler = DDIMInverseScheduler.from_config(ours.scheduler.config)
        ours.generate_mask(PICTURE, TARGET, source_prompt=SOURCE, num_maps_per_mask=1, **SHORT)
        latents = ours.invert(SOURCE, PICTURE, **SHORT).latents
        result = ours(TARGET, BOX, latents, num_inference_steps=5, output_type="latent").images
        assert np.isfinite(result.asnumpy()).all(), name
    assert any("clip_sample=False" in notice for notice in said)
    before = theirs.scheduler
    own = loaded("EulerDiscreteScheduler")
    try:
        theirs.scheduler = diffusers.DDIMScheduler.from_config(own.config)
        put(ours, DDIMScheduler.from_config(own.config))
        assert theirs.scheduler.config.timestep_spacing == "linspace" and theirs.scheduler.config.clip_sample
        prompts = dict(target_prompt=TARGET, source_prompt=SOURCE)
        assert np.array_equal(*both_masks(ours, theirs, **prompts))
        latents = ours.invert(SOURCE, PICTURE, **SHORT).latents.asnumpy()
        assert parity.relative(*both_edits(ours, theirs, latents, guidance_scale=2.0)) < CLOSE
    finally:
        theirs.scheduler = before


def test_the_inverse_of_linspace():
    """The reference's class refuses it; its DDIM does not."""
    for count in (1, 2, 3, 7, 20, 50, 999, 1000):
        expected = diffusers.DDIMScheduler(**SD, timestep_spacing="linspace")
        expected.set_timesteps(count)
        inverse = DDIMInverseScheduler.from_config(expected.config)
        inverse.set_timesteps(count)
        assert np.array_equal(inverse.timesteps.asnumpy(), expected.timesteps.numpy()[::-1])
        assert inverse.timesteps.dtype == ms.int64 and inverse.num_inference_steps == count
    with pytest.raises(ValueError, match="1001"):
        inverse.set_timesteps(1001)
    # Its steps are DDIM's, backwards: with the same prediction the way back is exact.
    forward = DDIMScheduler(**SD, timestep_spacing="linspace", clip_sample=False)
    inverse = schedulers.inverse_of(forward)
    for scheduler in (forward, inverse):
        scheduler.set_timesteps(6)
    latents, noise = np.random.default_rng(0).standard_normal((2, 1, 4, 5, 3)).astype(np.float32)
    noisier = inverse.step(ms.Tensor(noise), 599, ms.Tensor(latents), return_dict=True)["prev_sample"]
    back = forward.step(ms.Tensor(noise), 599, noisier, return_dict=True)["prev_sample"].asnumpy()
    assert parity.relative(back, latents) < 1e-5
    rows = [scheduler.plan(np.array([599])).coefficients[0] for scheduler in (forward, inverse)]
    assert rows[0][0] == rows[1][2] or np.isfinite(rows).all()


def test_schedulers_that_do_not_belong_together_are_said(ours, loaded, said):
    put(ours, loaded("EulerDiscreteScheduler"), DDIMInverseScheduler(**SD))
    ours._solver(inverse=True)
    assert any("not the inverse of EulerDiscreteScheduler" in notice for notice in said)
    said.clear()
    put(ours, DDIMScheduler(**SD, clip_sample=False), DDIMInverseScheduler(**SD))
    ours._solver(inverse=True)
    put(ours, schedulers.DPMSolverMultistepScheduler(**SD), schedulers.DPMSolverMultistepInverseScheduler(**SD))
    ours._solver(inverse=True)
    assert not said


def test_noise_of_a_solver_with_timesteps_that_come_twice(ours, loaded):
    for name in ("PNDMScheduler", "HeunDiscreteScheduler", "EulerDiscreteScheduler"):
        put(ours, loaded(name, **({"skip_prk_steps": True} if name == "PNDMScheduler" else {})))
        direct = ours.edit(PICTURE, SOURCE, TARGET, inversion="noise", **EDIT).latents.asnumpy()
        noised = ours.noise_image(PICTURE, **SHORT)
        given = ours.edit(PICTURE, SOURCE, TARGET, image_latents=noised, **EDIT).latents.asnumpy()
        assert np.array_equal(direct, given) and type(ours.scheduler).__name__ == name


def chosen(ours, own, **given):
    """What the command line makes of a model's own scheduler."""
    args = dict(command="edit", scheduler=None, reference=False, quiet=False)
    job = Job(Namespace(**{**args, **given}), {"inversion": "ddim", "iterations": 0})
    put(ours, own)
    with wording.notes(job.args):
        loading.choose_solver(job, ours)
    return job.scheduler


def test_the_command_line_on_every_checkpoint(ours, loaded, capsys):
    for name in (*OTHERS, *OWN):
        own = loaded(name)
        assert chosen(ours, own) == ("dpm" if name == "DPMSolverMultistepScheduler" else "ddim")
        assert capsys.readouterr().err.count("\n") == (name not in OWN)
        for given in (dict(scheduler="ddim"), dict(scheduler="ddim", reference=True), dict(scheduler="dpm")):
            chosen(ours, own, **given)
            forward, inverse = ours.scheduler, ours.inverse_scheduler
            forward.set_timesteps(5)
            inverse.set_timesteps(5)
            assert forward.plan(forward.exact_timesteps) is not None
            if given["scheduler"] == "ddim":
                assert np.array_equal(forward.timesteps.asnumpy(), inverse.timesteps.asnumpy()[::-1])
                assert forward.config.timestep_spacing == inverse.config.timestep_spacing
                as_there = "reference" in given or name == "DDIMScheduler"
                assert as_there or (forward.config.timestep_spacing, forward.config.clip_sample) == ("leading", False)
                if "reference" in given:
                    theirs = diffusers.DDIMScheduler.from_config(dict(own.config)).config
                    for option in ("timestep_spacing", "clip_sample", "set_alpha_to_one", "steps_offset"):
                        assert forward.config[option] == theirs[option], (name, option)


# --- solvers that cannot be inverted -----------------------------------------------------------------------------

CANNOT = {
    "sde": dict(algorithm_type="sde-dpmsolver++"),
    "sde, karras": dict(algorithm_type="sde-dpmsolver++", use_karras_sigmas=True),
    "older sde": dict(algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min"),
    "third": dict(algorithm_type="sde-dpmsolver++", solver_order=3, thresholding=True),
    "thresholding": dict(thresholding=True),
    "flow": dict(use_flow_sigmas=True, flow_shift=3.0),
    "variance": dict(variance_type="learned_range"),
}
CAN = {
    "karras": dict(use_karras_sigmas=True),
    "exponential": dict(use_exponential_sigmas=True),
    "beta": dict(use_beta_sigmas=True),
    "lu": dict(use_lu_lambdas=True),
    "older": dict(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
    "older, third": dict(algorithm_type="dpmsolver", final_sigmas_type="sigma_min", solver_order=3),
    "deis": dict(algorithm_type="deis", final_sigmas_type="sigma_min"),
    "logrho": dict(solver_type="logrho"),
    "first": dict(solver_order=1),
    "third": dict(solver_order=3, euler_at_final=True),
    "heun": dict(solver_type="heun", lower_order_final=False),
    "fixed": dict(variance_type="fixed_small"),
    "trailing": dict(timestep_spacing="trailing", final_sigmas_type="sigma_min"),
    "v": dict(prediction_type="v_prediction", rescale_betas_zero_snr=True),
}


@pytest.mark.parametrize("kind", CANNOT)
def test_a_solver_that_cannot_be_inverted_is_refused_by_name(ours, loaded, models_run, kind):
    """Before a model runs; both remedies of the message are followed, and help."""
    options = CANNOT[kind]
    own = loaded("DPMSolverMultistepScheduler", **options)
    inverse = schedulers.DPMSolverMultistepInverseScheduler.from_config(own.config)
    calls = (
        lambda: ours.invert(SOURCE, PICTURE, **SHORT),
        lambda: ours.edit(PICTURE, SOURCE, TARGET, num_inference_steps=5),
    )
    for given in (None, inverse):
        for call in calls:
            put(ours, own, given)
            with pytest.raises(InputError) as refusal:
                call()
            assert "DPMSolverMultistep" in str(refusal.value) and not models_run
            assert all(f"{name}=" in str(refusal.value) for name in options if name in (
                "algorithm_type", "thresholding", "use_flow_sigmas", "variance_type"))  # fmt: skip
            assert own.config.get("algorithm_type") == options.get("algorithm_type", "dpmsolver++")
            *schedulers_, inverse_ = re.findall(r"`(pipeline\.[^`]*)`", str(refusal.value))
            assert len(schedulers_) == 2
            for line in schedulers_:
                put(ours, own, given)
                exec(f"{line}\n{inverse_}", {**vars(mindiffedit), **vars(schedulers), "pipeline": ours})
                assert np.isfinite(ours.invert(SOURCE, PICTURE, **SHORT).latents.asnumpy()).all()
            models_run.clear()
    # An edit that inverts nothing is not refused, where the solver can edit.
    put(ours, own)
    if kind.startswith(("sde", "thres")):
        assert np.isfinite(ours.noise_image(PICTURE, **SHORT).latents.asnumpy()).all()
        edited = ours.edit(PICTURE, SOURCE, TARGET, inversion="noise", **EDIT).latents
        assert np.isfinite(edited.asnumpy()).all()


def test_solvers_of_many_kinds_are_inverted(ours, loaded):
    for kind, options in CAN.items():
        put(ours, loaded("DPMSolverMultistepScheduler", **options))
        edited = ours.edit(PICTURE, SOURCE, TARGET, preset="exact", **EDIT).latents.asnumpy()
        assert np.isfinite(edited).all() and np.sqrt((edited**2).mean()) < 4, kind
        assert type(ours._solver(inverse=True).scheduler).__name__ == "DPMSolverMultistepInverseScheduler"
        assert chosen(ours, loaded("DPMSolverMultistepScheduler", **options)) == "dpm"


def test_the_command_line_takes_ddim_for_a_solver_that_cannot_be_inverted(ours, loaded, capsys):
    for options in CANNOT.values():
        own = loaded("DPMSolverMultistepScheduler", **options)
        assert chosen(ours, own) == "ddim" and "--scheduler" in capsys.readouterr().err
        assert not ours.scheduler.config.clip_sample
        with pytest.raises(InputError, match=r"--scheduler dpm: .*; give --scheduler ddim\."):
            chosen(ours, own, scheduler="dpm")
        assert chosen(ours, own, scheduler="ddim") == "ddim" and not capsys.readouterr().err
        assert chosen(ours, own, scheduler="dpm", command="mask") == "dpm"


# --- what belongs to the caller ----------------------------------------------------------------------------------


def test_the_callers_scheduler_is_not_changed(ours, said):
    """It may serve other pipelines; a correction is made in a copy."""
    from mindone.diffusers import PNDMScheduler

    from mindiffedit.runtime.kernels import portable_kernels

    with portable_kernels():
        outdated = PNDMScheduler(**SD, steps_offset=0, skip_prk_steps=False)
    before = dict(outdated.config)
    parts = {**ours.components, "inverse_scheduler": None, "scheduler": outdated}
    pipe = mindiffedit.StableDiffusionDiffEditPipeline(**parts, requires_safety_checker=False)
    assert dict(outdated.config) == before
    assert type(pipe.scheduler) is PNDMScheduler and pipe.components["scheduler"] is pipe.scheduler
    assert pipe.scheduler.config.steps_offset == 1 and pipe.scheduler.config.skip_prk_steps is True
    timesteps = outdated.timesteps
    pipe.set_progress_bar_config(disable=True)
    pipe.edit(PICTURE, SOURCE, TARGET, **EDIT)
    assert dict(outdated.config) == before and outdated.timesteps is timesteps
    # One that needs no correction is the one that was given, as in the reference.
    fitting = DDIMScheduler(**SD, steps_offset=1, clip_sample=False)
    pipe = mindiffedit.StableDiffusionDiffEditPipeline(**{**parts, "scheduler": fitting}, requires_safety_checker=False)
    assert pipe.scheduler is fitting


def test_two_pipelines_with_one_scheduler(ours):
    shared = DDIMScheduler(**SD, steps_offset=1, clip_sample=False)
    put(ours, shared)
    other = mindiffedit.StableDiffusionDiffEditPipeline(**ours.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    alone = ours.edit(PICTURE, SOURCE, TARGET, **EDIT).latents.asnumpy()
    counts = []

    def between(pipe, step, timestep, tensors):
        other.noise_image(PICTURE, num_inference_steps=9)
        counts.append(shared.num_inference_steps)

    beside = ours.edit(PICTURE, SOURCE, TARGET, callback_on_step_end=between, **EDIT).latents.asnumpy()
    assert np.array_equal(alone, beside) and set(counts) == {9}


def test_what_is_given_to_the_calls_is_not_changed(ours, tmp_path):
    put(ours, DDIMScheduler(**SD, steps_offset=1, clip_sample=False))
    pixels = np.random.default_rng(0).random((1, 64, 80, 3)).astype(np.float32)
    embeds = ours.encode_prompt(SOURCE, None, 1, False)[0].asnumpy()
    mask = np.linspace(0, 1, 80).reshape(8, 10).astype(np.float32)
    negatives, prompts, generators = ["ugly"], [TARGET], [0]
    kwargs = {"scale": 0.5, "unknown": 1}
    vectors = {"<kept>": np.ones((2, 32), np.float32)}
    picture = PIL.Image.fromarray((255 * pixels[0]).astype(np.uint8))
    inverted = ours.invert(prompt_embeds=embeds, image=pixels, **SHORT)
    latents, clean = inverted.latents.asnumpy().copy(), inverted.clean_latents.asnumpy().copy()
    given = [pixels, embeds, mask, negatives, prompts, generators, kwargs, vectors["<kept>"], latents, clean]
    before = [part.copy() for part in given] + [picture.tobytes(), list(vectors)]
    shared = dict(num_inference_steps=5, generator=generators, cross_attention_kwargs=kwargs)
    ours.generate_mask(pixels, prompts, negatives, source_prompt_embeds=embeds, num_maps_per_mask=1, **shared)
    ours.invert(None, pixels, negative_prompt=negatives, prompt_embeds=embeds, **shared)
    ours(prompts, mask, latents, negative_prompt=negatives, clean_latents=clean, soft_mask=True, **shared)
    ours.edit(picture, None, prompts, source_prompt_embeds=embeds, mask_image=mask, **shared)
    ours.noise_image(pixels, generator=generators)
    ours.load_textual_inversion(vectors)
    ours.unload_textual_inversion()
    after = [*given, picture.tobytes(), list(vectors)]
    assert all(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in zip(before, after))
