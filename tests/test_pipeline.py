"""The pipeline against the reference, call by call, on tiny random checkpoints (graph mode)."""

import inspect

import diffusers
import mindspore as ms
import numpy as np
import parity
import pytest
import torch
from diffusers import StableDiffusionDiffEditPipeline as Reference

import mindiffedit
from mindiffedit import StableDiffusionDiffEditPipeline, options
from mindiffedit import stages as steps
from mindiffedit.runtime import devices, notices

CLOSE = 1e-3  # relative to the reference's rms; what was measured is 1e-5 to 1e-4
PICTURE = parity.picture()
SOURCE, TARGET = "a red apple on a table", "a blue cup on a table"


def our_pipeline(folder, mode="graph", scheduler="DDIMScheduler", **options_):
    pipe = StableDiffusionDiffEditPipeline.from_pretrained(folder, mode=mode, safety_checker=None)
    pipe.scheduler = getattr(mindiffedit, scheduler).from_config(pipe.scheduler.config, **options_)
    pipe.inverse_scheduler = None
    pipe.set_progress_bar_config(disable=True)
    return pipe


def their_pipeline(folder, scheduler="DDIMScheduler", **options_):
    pipe = Reference.from_pretrained(folder, safety_checker=None, low_cpu_mem_usage=False)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **options_)
    inverse = scheduler.replace("Scheduler", "InverseScheduler")
    pipe.inverse_scheduler = getattr(diffusers, inverse).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ours(sd1_folder):
    return our_pipeline(sd1_folder)


@pytest.fixture(scope="module")
def theirs(sd1_folder):
    return their_pipeline(sd1_folder)


@pytest.fixture(scope="module")
def inverted(theirs):
    """Reference latents of PICTURE for 4 of 5 steps, as an array (1, 4, 4, h, w)."""
    return theirs.invert(SOURCE, PICTURE, num_inference_steps=5, generator=parity.torch_noise(3)).latents.numpy()


def both_masks(ours, theirs, image=PICTURE, seed=0, sources=parity, **arguments):
    arguments = {"num_inference_steps": 5, "num_maps_per_mask": 2, **arguments}
    expected = theirs.generate_mask(image, generator=parity.torch_noise(seed), **arguments)
    return ours.generate_mask(image, generator=parity.TorchNoise(seed), **arguments), expected


# --- signatures and outputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["generate_mask", "invert", "__call__", "encode_prompt"])
def test_signatures_are_the_references(method):
    mine = inspect.signature(getattr(StableDiffusionDiffEditPipeline, method)).parameters
    theirs = inspect.signature(inspect.unwrap(getattr(Reference, method))).parameters
    ours = [(p.name, p.default) for p in mine.values() if p.kind is not p.KEYWORD_ONLY]
    assert ours == [(p.name, p.default) for p in theirs.values()]
    # What is ours comes after a star, and is off unless it is asked for.
    assert all(p.default in (None, False, 0, ("latents",)) for p in mine.values() if p.kind is p.KEYWORD_ONLY)


def test_constructor_takes_the_references_components():
    mine = list(inspect.signature(StableDiffusionDiffEditPipeline.__init__).parameters)
    assert mine[:-2] == list(inspect.signature(Reference.__init__).parameters)
    assert mine[-2:] == ["mode", "compile_cache"]


def test_outputs_read_like_diffusers(ours, inverted):
    mask = np.ones((8, 10), np.float32)
    arguments = dict(prompt=TARGET, mask_image=mask, image_latents=inverted, num_inference_steps=5)
    pil = ours(**arguments)
    assert (
        len(pil) == 1
        and "images" in pil
        and pil["images"][0] is pil.images[0] is pil[0][0]
        and pil.images[0].size == (80, 64)
    )
    as_tuple = ours(**arguments, output_type="np", return_dict=False)
    assert as_tuple[0].shape == (1, 64, 80, 3) and as_tuple[1] is None
    assert np.abs(np.asarray(pil.images[0]) / 255 - as_tuple[0][0]).max() <= 0.5 / 255 + 1e-6
    latents = ours(**arguments, output_type="latent").images
    assert isinstance(latents, ms.Tensor) and latents.shape == (1, 4, 8, 10)


# --- generate_mask ------------------------------------------------------------------------------------------------


def test_mask_of_a_batch_with_different_negatives(ours, theirs):
    arguments = dict(
        source_prompt=[SOURCE, "a dog"],
        target_prompt=[TARGET, "a cat"],
        source_negative_prompt=["bad", "worse"],
        target_negative_prompt=["ugly", "dark"],
        guidance_scale=2.0,
        mask_encode_strength=0.7,
    )
    image = [PICTURE, parity.picture(seed=5)]
    with parity.recorded_map(theirs) as maps:
        mine, expected = both_masks(ours, theirs, image, **arguments)
    assert mine.dtype == expected.dtype and np.array_equal(mine, expected)
    assert 0 < mine.mean() < 1
    steps = dict(num_inference_steps=5, num_maps_per_mask=2, generator=parity.TorchNoise(0))
    _, map_ = ours.generate_mask(image, return_map=True, **steps, **arguments)
    assert parity.relative(map_, maps[0]) < CLOSE


def test_mask_with_a_generator_for_each_sample(ours, theirs):
    arguments = dict(source_prompt=SOURCE, target_prompt=TARGET, num_inference_steps=5, num_maps_per_mask=2)
    expected = theirs.generate_mask(
        torch.from_numpy(np.asarray(PICTURE, np.float32).transpose(2, 0, 1)[None] / 255).repeat(1, 1, 1, 1),
        generator=[parity.torch_noise(1), parity.torch_noise(2)],
        **arguments,
    )
    array = np.asarray(PICTURE, np.float32) / 255
    mine = ours.generate_mask(array, generator=[parity.TorchNoise(1), parity.TorchNoise(2)], **arguments)
    assert np.array_equal(mine, expected)


def test_mask_of_latents_and_embeddings(ours, theirs):
    latents = np.random.default_rng(0).standard_normal((1, 4, 6, 8), np.float32)
    positive, negative = theirs.encode_prompt(TARGET, "cpu", 1, True, "ugly")
    other, other_negative = theirs.encode_prompt(SOURCE, "cpu", 1, True, "bad")
    names = (
        "target_prompt_embeds",
        "target_negative_prompt_embeds",
        "source_prompt_embeds",
        "source_negative_prompt_embeds",
    )
    values = (positive, negative, other, other_negative)
    expected = theirs.generate_mask(
        torch.from_numpy(latents),
        generator=parity.torch_noise(0),
        num_maps_per_mask=2,
        num_inference_steps=5,
        **dict(zip(names, values)),
    )
    mine = ours.generate_mask(
        ms.Tensor(latents),
        generator=parity.TorchNoise(0),
        num_maps_per_mask=2,
        num_inference_steps=5,
        **dict(zip(names, (ms.Tensor(v.detach().numpy()) for v in values))),
    )
    assert np.array_equal(mine, expected)


def test_what_crashes_in_the_reference_works(ours, sd1_folder):
    arguments = dict(
        source_prompt=SOURCE, target_prompt=TARGET, num_inference_steps=5, num_maps_per_mask=2, generator=0
    )
    guided = ours.generate_mask(PICTURE, **arguments)
    unguided = ours.generate_mask(PICTURE, guidance_scale=1.0, **arguments)
    # With equal negatives the unconditional terms cancel, so guidance changes the map's scale only.
    assert np.array_equal(guided, unguided)
    picture = ours.generate_mask(PICTURE, output_type="pil", **arguments)[0]
    assert np.array_equal(np.asarray(picture), guided[0] * 255)
    solver = our_pipeline(sd1_folder, scheduler="DPMSolverMultistepScheduler")
    solver.unet, solver.vae, solver.text_encoder, solver._stages_built = (
        ours.unet,
        ours.vae,
        ours.text_encoder,
        ours._stages_built,
    )
    mask = solver.generate_mask(PICTURE, **arguments)
    assert mask.shape == guided.shape and 0 < mask.mean() < 1


def test_equal_prompts_are_an_error_before_and_after_the_models(ours):
    with pytest.raises(ValueError, match="are the same"):
        ours.generate_mask(PICTURE, source_prompt=SOURCE, target_prompt=SOURCE)
    embeds, negative = ours.encode_prompt(SOURCE, None, 1, True, "")
    with pytest.raises(ValueError, match="same noise prediction"):
        ours.generate_mask(
            PICTURE,
            target_prompt_embeds=embeds,
            source_prompt_embeds=embeds,
            num_maps_per_mask=1,
            target_negative_prompt_embeds=negative,
            source_negative_prompt_embeds=negative,
            num_inference_steps=5,
        )


# --- invert -------------------------------------------------------------------------------------------------------


def test_invert_a_batch_and_decode_it(ours, theirs):
    seen, expected_seen = [], []
    arguments = dict(
        prompt=[SOURCE, "a dog"],
        negative_prompt=["bad", ""],
        num_inference_steps=5,
        inpaint_strength=0.6,
        guidance_scale=2.0,
        decode_latents=True,
        output_type="np",
        callback_steps=2,
    )
    image = [PICTURE, parity.picture(seed=5)]
    expected = theirs.invert(
        image=image,
        generator=parity.torch_noise(3),
        callback=lambda i, t, x: expected_seen.append((i, int(t))),
        **arguments,
    )
    mine = ours.invert(
        image=image,
        generator=parity.TorchNoise(3),
        callback=lambda i, t, x: seen.append((i, int(t))),
        **arguments,
    )
    assert mine.latents.shape == expected.latents.shape == (2, 3, 4, 8, 10)
    assert parity.relative(mine.latents.asnumpy(), expected.latents.numpy()) < CLOSE
    assert np.abs(mine.images - expected.images).max() < 2e-3
    assert seen == expected_seen != []


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_regularised_inversion(ours, theirs, prediction, monkeypatch):
    rolls, other = iter([1, 2, 0, 3] * 2000), iter([1, 2, 0, 3] * 2000)
    monkeypatch.setattr(torch, "randint", lambda high, size, generator=None: torch.tensor([next(rolls) % high]))

    class Rolls(parity.TorchNoise):
        def integers(self, high):
            return next(other) % high

    inverses = (ours._solver(inverse=True).scheduler, theirs.inverse_scheduler)
    for scheduler in inverses:
        scheduler.register_to_config(prediction_type=prediction)
    try:
        arguments = dict(
            prompt=SOURCE,
            image=PICTURE,
            num_inference_steps=4,
            num_reg_steps=2,
            num_auto_corr_rolls=2,
            lambda_auto_corr=2.0,
            lambda_kl=3.0,
            guidance_scale=2.0,
        )
        expected = theirs.invert(generator=parity.torch_noise(3), **arguments).latents.numpy()
        mine = ours.invert(generator=Rolls(3), **arguments).latents.asnumpy()
        assert parity.relative(mine, expected) < CLOSE
        plain = ours.invert(generator=parity.TorchNoise(3), **{**arguments, "num_reg_steps": 0}).latents.asnumpy()
        assert parity.relative(plain, expected) > 10 * CLOSE
    finally:
        for scheduler in inverses:
            scheduler.register_to_config(prediction_type="epsilon")


# --- the edit -----------------------------------------------------------------------------------------------------


def both_edits(ours, theirs, inverted, seed=0, **arguments):
    mask = np.zeros((8, 10), np.float32)
    mask[2:6, 3:9] = 1
    arguments = dict(
        dict(
            prompt=TARGET,
            negative_prompt=SOURCE,
            mask_image=mask,
            num_inference_steps=5,
            output_type="latent",
        ),
        **arguments,
    )
    theirs_ = {k: torch.from_numpy(v.copy()) if k.endswith("embeds") else v for k, v in arguments.items()}
    theirs_["mask_image"] = np.copy(arguments["mask_image"])  # the reference writes into it
    expected = theirs(image_latents=torch.from_numpy(inverted), generator=parity.torch_noise(seed), **theirs_).images
    mine = ours(image_latents=inverted, generator=parity.TorchNoise(seed), **arguments).images
    return mine.asnumpy(), expected.numpy()


def test_edit_with_images_per_prompt_and_eta(ours, theirs, inverted):
    mine, expected = both_edits(ours, theirs, inverted, num_images_per_prompt=2, eta=0.6, guidance_scale=2.0)
    assert parity.relative(mine, expected) < CLOSE
    assert np.abs(mine[0] - mine[1]).max() > 0.01, "eta adds noise of its own to each image"


def test_edit_of_a_batch_keeps_the_references_order_of_masks(ours, theirs, inverted):
    batch = np.concatenate([inverted, inverted[:, ::-1] * 0.9])
    masks = np.zeros((2, 8, 10), np.float32)
    masks[0, :4], masks[1, :, 7:] = 1, 1
    mine, expected = both_edits(
        ours,
        theirs,
        batch,
        prompt=[TARGET, "a cat"],
        negative_prompt=[SOURCE, "a dog"],
        mask_image=masks,
        num_images_per_prompt=2,
    )
    assert parity.relative(mine, expected) < CLOSE


def test_edit_without_guidance_with_clip_skip(ours, theirs, inverted):
    mine, expected = both_edits(ours, theirs, inverted, guidance_scale=1.0, clip_skip=1)
    assert parity.relative(mine, expected) < CLOSE
    other, _ = both_edits(ours, theirs, inverted, guidance_scale=1.0)
    assert parity.relative(other, expected) > 10 * CLOSE


def test_edit_with_embeddings_and_flat_latents(ours, theirs, inverted):
    positive, negative = (e.detach().numpy() for e in theirs.encode_prompt(TARGET, "cpu", 1, True, "bad"))
    mine, expected = both_edits(
        ours,
        theirs,
        inverted,
        prompt=None,
        negative_prompt=None,
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
    )
    assert parity.relative(mine, expected) < CLOSE
    flat = ours(
        image_latents=inverted[0],
        mask_image=np.ones((8, 10)),
        prompt_embeds=positive,
        output_type="latent",
        negative_prompt_embeds=negative,
        num_inference_steps=5,
    ).images
    assert flat.shape == (1, 4, 8, 10)


def test_embeddings_need_no_text_encoder(ours):
    positive, negative = ours.encode_prompt(TARGET, None, 1, True, SOURCE)
    without = {**ours.components, "text_encoder": None, "tokenizer": None}
    bare = StableDiffusionDiffEditPipeline(**without, requires_safety_checker=False, mode="pynative")
    bare.set_progress_bar_config(disable=True)
    steps = dict(num_inference_steps=3)
    embeds = dict(prompt_embeds=positive, negative_prompt_embeds=negative)
    inverted = bare.invert(image=PICTURE, **embeds, **steps)
    edited = bare(mask_image=np.ones((8, 10)), image_latents=inverted.latents, output_type="latent", **embeds, **steps)
    assert np.isfinite(edited.images.asnumpy()).all()
    assert bare.noise_image(PICTURE, **steps).latents.shape == inverted.latents.shape
    for arguments in (dict(prompt=SOURCE), dict(prompt_embeds=positive, guidance_scale=2.0)):
        with pytest.raises(ValueError, match="no text encoder or no tokenizer here; give `prompt_embeds`"):
            bare.invert(image=PICTURE, **arguments, **steps)


@pytest.mark.parametrize("order", [1, 2])
def test_dpm_solver_inverts_and_edits(ours, theirs, sd1_folder, order):
    mine = our_pipeline(sd1_folder, scheduler="DPMSolverMultistepScheduler", solver_order=order)
    mine.unet, mine.vae, mine.text_encoder = ours.unet, ours.vae, ours.text_encoder
    other = their_pipeline(sd1_folder, scheduler="DPMSolverMultistepScheduler", solver_order=order)
    arguments = dict(prompt=SOURCE, image=PICTURE, num_inference_steps=6)
    expected = other.invert(generator=parity.torch_noise(1), **arguments).latents
    latents = mine.invert(generator=parity.TorchNoise(1), **arguments).latents
    assert parity.relative(latents.asnumpy(), expected.numpy()) < CLOSE
    result = both_edits(mine, other, expected.numpy(), num_inference_steps=6)
    assert parity.relative(*result) < CLOSE


@pytest.mark.parametrize(
    "name",
    [
        "PNDMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_schedulers_without_a_compiled_step(ours, theirs, name, inverted):
    import mindone.diffusers

    from mindiffedit.runtime.kernels import portable_kernels

    before = ours.scheduler, theirs.scheduler
    extra = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    theirs.scheduler = getattr(diffusers, name).from_config(theirs.scheduler.config, **extra)
    with portable_kernels():
        ours.scheduler = getattr(mindone.diffusers, name).from_config(before[0].config, **extra)
    try:
        theirs.scheduler.set_timesteps(5)
        count = len(theirs.scheduler.timesteps) - 1
        stack = np.repeat(inverted, 2, axis=1)[:, :count]
        mine, expected = both_edits(ours, theirs, stack)
        assert parity.relative(mine, expected) < CLOSE
    finally:
        ours.scheduler, theirs.scheduler = before


def test_the_own_inverse_scheduler_follows_the_scheduler(ours):
    pipe = StableDiffusionDiffEditPipeline(
        **{**ours.components, "inverse_scheduler": None}, requires_safety_checker=False
    )
    assert type(pipe._solver(inverse=True).scheduler).__name__ == "DDIMInverseScheduler"
    pipe.scheduler = mindiffedit.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert type(pipe._solver(inverse=True).scheduler).__name__ == "DPMSolverMultistepInverseScheduler"
    assert pipe.inverse_scheduler is None


def test_stochastic_solver_edits_and_its_inverse_has_no_real_numbers(ours, theirs, sd1_folder, inverted):
    solver = dict(scheduler="DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++")
    mine, other = our_pipeline(sd1_folder, **solver), their_pipeline(sd1_folder, **solver)
    mine.unet, mine.vae, mine.text_encoder = ours.unet, ours.vae, ours.text_encoder
    assert parity.relative(*both_edits(mine, other, inverted, guidance_scale=2.0)) < CLOSE
    # Backwards its formula takes the root of a negative number: the reference returns NaN.
    assert np.isnan(other.invert(SOURCE, PICTURE, num_inference_steps=4).latents.numpy()).any()
    with pytest.raises(ValueError, match="algorithm_type='sde-dpmsolver\\+\\+'"):
        mine.invert(SOURCE, PICTURE, num_inference_steps=4)


def test_attention_kwargs_that_nobody_knows_are_ignored_with_a_warning(ours, inverted, caplog):
    arguments = dict(
        prompt=TARGET,
        mask_image=np.ones((8, 10)),
        image_latents=inverted,
        num_inference_steps=5,
        output_type="latent",
    )
    plain = ours(**arguments).images.asnumpy()
    given = ours(**arguments, cross_attention_kwargs={"scale": 0.5, "nobody": 1}).images.asnumpy()
    assert np.array_equal(plain, given) and "nobody" in caplog.text


# --- compilation and context --------------------------------------------------------------------------------------


def test_nothing_compiles_after_the_first_step(ours, inverted):
    mask = np.ones((8, 10), np.float32)

    def edit(**arguments):
        counts = []
        arguments = dict(prompt=TARGET, guidance_scale=3.0, generator=0, **arguments)
        ours(
            mask_image=mask,
            image_latents=inverted,
            num_inference_steps=5,
            output_type="latent",
            **{**arguments, "callback": lambda i, t, x: counts.append(devices.compile_count())},
        )
        return counts

    ours._stages.forget()
    with devices.CompileCounter() as first:
        counts = edit()
    assert first.count > 0 and len(set(counts)) == 1, "all steps after the first reuse its graph"
    arguments = dict(source_prompt=SOURCE, target_prompt=TARGET, num_inference_steps=5, num_maps_per_mask=2)
    ours.generate_mask(PICTURE, generator=0, **arguments)
    with devices.CompileCounter() as again:
        ours(
            prompt="something else entirely",
            negative_prompt="x",
            mask_image=mask * 0,
            image_latents=inverted * 0.5,
            num_inference_steps=5,
            guidance_scale=9.5,
            generator=7,
            output_type="latent",
            eta=0.3,
        )
        ours.invert("a third text", PICTURE, num_inference_steps=5, guidance_scale=4.0, generator=9)
        ours.generate_mask(PICTURE, generator=3, **{**arguments, "target_prompt": "other", "guidance_scale": 3.0})
    assert again.count == 0


def test_a_whole_edit_runs_each_model_no_more_than_it_must(ours):
    """One UNet graph for mask, inversion and edit; one encoding of the picture and of each text, maps and all."""
    arguments = dict(num_inference_steps=5, generator=0)
    stages = ours._stages
    stages.forget()
    stages.calls.clear()
    with devices.CompileCounter() as count:
        mask = ours.generate_mask(PICTURE, source_prompt=SOURCE, target_prompt=TARGET, num_maps_per_mask=3, **arguments)
        latents = ours.invert(SOURCE, PICTURE, inpaint_strength=0.6, **arguments).latents
        ours(TARGET, mask, latents, inpaint_strength=0.6, negative_prompt=SOURCE, **arguments)
    # Source, target and empty text; two predictions a map; two predictions for each of 3 + 3 guided steps.
    assert stages.calls == {"text": 3, "encode": 1, "decode": 1, "unet": 3 + 6, "rows": 6 + 12}
    assert sorted(key[0] for key in stages._built) == ["decode", "encode", "text", "unet", "update"]
    assert count.count == 5, "each stage is compiled for one set of shapes"

    stages.calls.clear()
    ours.invert(SOURCE, PICTURE, inpaint_strength=0.6, guidance_scale=1.0, **arguments)
    assert stages.calls == {"unet": 3, "rows": 3}, "guidance that is off costs nothing"


def test_a_batch_size_of_the_unet_changes_nothing_but_the_calls(ours):
    arguments = dict(num_inference_steps=5, generator=0, source_prompt=SOURCE, target_prompt=TARGET)
    scale = dict(arguments, num_maps_per_mask=3, source_negative_prompt="bad", guidance_scale=2.0)
    found = {}
    before = ours.unet_batch_size
    try:
        for size in (1, 2, 4):
            ours.unet_batch_size = size
            ours._stages.calls.clear()
            _, map_ = ours.generate_mask(PICTURE, return_map=True, **scale)
            found[size] = map_, ours._stages.calls["unet"]
    finally:
        ours.unet_batch_size = before
    assert [calls for _, calls in found.values()] == [12, 6, 4]
    for size in (2, 4):
        assert parity.relative(found[size][0], found[1][0]) < CLOSE


def test_results_are_kept_only_while_picture_and_weights_are_the_same(ours):
    pixels = ours._limits.pixels(PICTURE)
    stages = ours._stages
    stages.forget()
    stages.calls.clear()
    first = stages.encode_image(pixels)
    assert np.array_equal(stages.encode_image(pixels.copy()), first) and stages.calls["encode"] == 1
    changed = pixels.copy()
    changed[0, 0, 0, 0] += 1e-3
    assert not np.array_equal(stages.encode_image(changed), first) and stages.calls["encode"] == 2
    weight = next(p for p in ours.vae.get_parameters() if "encoder.conv_in.weight" in p.name)
    value = weight.asnumpy().copy()
    try:
        weight.set_data(ms.Tensor(value * np.float32(1.5)))
        stages.encode_image(pixels)
        assert stages.calls["encode"] == 3
    finally:
        weight.set_data(ms.Tensor(value))
        stages.forget()
    assert np.array_equal(stages.encode_image(pixels), first)


@pytest.mark.parametrize("user_mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE])
@pytest.mark.parametrize("mode", ["graph", "pynative"])
def test_both_global_modes_work_and_are_left_as_found(ours, theirs, inverted, user_mode, mode):
    before = ms.get_context("mode")
    ms.set_context(mode=user_mode)
    try:
        pipe = StableDiffusionDiffEditPipeline(**ours.components, requires_safety_checker=False, mode=mode)
        pipe.set_progress_bar_config(disable=True)
        arguments = dict(inpaint_strength=0.4, num_inference_steps=5)
        mine, expected = both_edits(pipe, theirs, inverted[:, :2], **arguments)
        assert parity.relative(mine, expected) < CLOSE
        assert ms.get_context("mode") == user_mode
    finally:
        ms.set_context(mode=before)


def test_an_unknown_mode_is_refused(sd1_folder):
    with pytest.raises(ValueError, match="'eager'"):
        StableDiffusionDiffEditPipeline.from_pretrained(sd1_folder, mode="eager")


# --- switches and failures ----------------------------------------------------------------------------------------


def test_switches_never_raise(ours, inverted):
    for switch in (
        "enable_model_cpu_offload",
        "enable_sequential_cpu_offload",
        "enable_vae_slicing",
        "disable_vae_slicing",
        "enable_attention_slicing",
        "disable_attention_slicing",
        "enable_xformers_memory_efficient_attention",
        "disable_xformers_memory_efficient_attention",
    ):
        getattr(ours, switch)()


def test_half_precision_on_a_cpu_is_float32_with_one_warning(sd1_folder, caplog, monkeypatch):
    monkeypatch.setattr(notices, "_said", set())
    for _ in range(2):
        pipe = StableDiffusionDiffEditPipeline.from_pretrained(
            sd1_folder, mindspore_dtype=ms.float16, safety_checker=None, use_safetensors=True
        )
    if devices.device_target() == "CPU":
        assert pipe.dtype == ms.float32
        assert len([r for r in caplog.records if "float32" in r.getMessage()]) == 1


def test_nan_is_reported_with_stage_and_step(ours, inverted, monkeypatch):
    scheduler = ours._solver().scheduler
    whole = scheduler.plan

    def broken(timesteps, eta):
        plan = whole(timesteps, eta)
        plan.coefficients[2] = np.nan
        return plan

    monkeypatch.setattr(scheduler, "plan", broken, raising=False)
    with pytest.raises(options.NumericalError, match="edit, step 2"):
        ours(prompt=TARGET, mask_image=np.ones((8, 10)), image_latents=inverted, num_inference_steps=5)
    monkeypatch.setattr(steps.Predictor, "stream", lambda self, latents, timestep: iter([latents * float("inf")]))
    with pytest.raises(options.NumericalError, match="mask noise prediction, step 0"):
        ours.generate_mask(
            PICTURE, source_prompt=SOURCE, target_prompt=TARGET, num_inference_steps=5, num_maps_per_mask=2
        )


@pytest.fixture
def no_model(ours, monkeypatch):
    """Any stage that is asked for fails the test with an error that is neither ValueError nor TypeError."""

    def stage(*arguments, **options_):
        raise AssertionError("a model was about to run")

    monkeypatch.setattr(type(ours._stages), "_stage", stage)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(inpaint_strength=0.0),
        dict(inpaint_strength=1.5),
        dict(inpaint_strength="0.5"),
        dict(num_inference_steps=0),
        dict(num_inference_steps=2.5),
        dict(guidance_scale=float("nan")),
        dict(prompt=None),
        dict(prompt=3),
        dict(prompt=[TARGET, 3]),
        dict(negative_prompt=["a", "b"]),
        dict(mask_image=np.full((8, 10), 7.0)),
        dict(mask_image=np.ones((3, 8, 10))),
        dict(mask_image=np.ones((9, 10))),
        dict(mask_image=None),
        dict(image_latents=None),
        dict(image_latents=np.ones((1, 3, 4, 8, 10), np.float32)),
        dict(image_latents=np.full((1, 4, 4, 8, 10), np.nan, np.float32)),
        dict(eta=2.0),
        dict(callback_steps=0),
        dict(num_images_per_prompt=0),
        dict(output_type="jpeg"),
        dict(generator="x"),
        dict(generator=[1, 2], eta=0.5),
        dict(clip_skip=99),
        dict(cross_attention_kwargs={"x": [1]}),
        dict(cross_attention_kwargs=[1]),
        dict(num_inference_steps=1000, inpaint_strength=1.0),
        dict(image_latents=[]),
        dict(prompt=None, prompt_embeds=np.zeros((1, 77, 7), np.float32)),
        dict(prompt=None, prompt_embeds=np.zeros((1, 154, 32), np.float32)),
    ],
)
def test_bad_input_to_the_edit_is_refused(ours, inverted, wrong, no_model):
    arguments = dict(prompt=TARGET, mask_image=np.ones((8, 10)), image_latents=inverted, num_inference_steps=5)
    with pytest.raises((ValueError, TypeError)) as refused:
        ours(**{**arguments, **wrong})
    assert len(str(refused.value)) > 20


@pytest.mark.parametrize(
    "wrong",
    [
        dict(image=None),
        dict(image="nowhere.png"),
        dict(mask_encode_strength=0),
        dict(num_maps_per_mask=0),
        dict(num_maps_per_mask=1.0),
        dict(mask_thresholding_ratio=-1),
        dict(source_prompt=["a", "b"]),
        dict(image=[PICTURE] * 3),
        dict(generator=[1, 2, 3]),
        dict(target_prompt=[SOURCE], source_negative_prompt=""),
        dict(num_inference_steps=1000, mask_encode_strength=1.0),
        dict(image=np.full((64, 80, 3), np.nan)),
        dict(output_type="latent"),
    ],
)
def test_bad_input_to_the_mask_is_refused(ours, wrong, no_model):
    arguments = dict(
        image=PICTURE, source_prompt=SOURCE, target_prompt=TARGET, num_inference_steps=5, num_maps_per_mask=2
    )
    with pytest.raises((ValueError, TypeError)) as refused:
        ours.generate_mask(**{**arguments, **wrong})
    assert len(str(refused.value)) > 20


def test_a_safety_checker_blackens_what_it_flags(ours, monkeypatch):
    class Checker:
        dtype = ms.float32

        def __call__(self, clip_input, images):
            assert clip_input.shape[0] == images.shape[0] == 2
            return images, ms.Tensor(np.array([True, False]))

    class Extractor:
        def __call__(self, images, return_tensors):
            class Result:
                pixel_values = np.zeros((len(images), 3, 8, 8))

            return Result

    monkeypatch.setattr(ours, "safety_checker", Checker())
    monkeypatch.setattr(ours, "feature_extractor", Extractor())
    images, flags = ours.run_safety_checker(np.ones((2, 3, 16, 16), np.float32))
    assert flags == [True, False] and images[0].max() == 0 and images[1].min() == 1
