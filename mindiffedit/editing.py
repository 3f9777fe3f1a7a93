"""``edit``: mask, inversion and edit in one call, with the corrections of ``docs/differences.md`` switched on."""

from __future__ import annotations

import contextlib
import re
import time
import unicodedata
from dataclasses import replace
from typing import Any

import mindspore as ms
import numpy as np
from PIL.Image import Image

from mindiffedit import masks, options
from mindiffedit.arrays import to_numpy
from mindiffedit.checkpoints import step_cache
from mindiffedit.errors import InputError, InputTypeError, Message
from mindiffedit.images import colours, pictures
from mindiffedit.inputs import (
    EDIT_MAPS,
    EDIT_MASK,
    EDIT_MASK_STRENGTH,
    INVERSION_MASK,
    INVERSIONS,
    MAX_FEATHER,
    Callbacks,
    EditInputs,
    Evaluations,
    InvertInputs,
    MaskInputs,
    Prompts,
    Schedule,
    checked_rng,
)
from mindiffedit.noise import randomness
from mindiffedit.outputs import DiffEditInversionPipelineOutput, DiffEditOutput, EditReport
from mindiffedit.solvers import schedules
from mindiffedit.solvers.solver import TabulatedSolver
from mindiffedit.stages import CompiledUpdate, host, tensor

LARGE_ERROR = 1.0
"""Inversion error from which a report warns. The demo model, whose inversions lead back at 33 dB, has 0.2 to 0.4.

Twice this where the inversion goes by points, whose way between them is not meant to be led back step by step; the demo
model, whose edits are as good, has 0.6 to 0.9 there.
"""


def edit(
    pipeline,
    *,
    image,
    source_prompt,
    target_prompt,
    negative_prompt,
    source_prompt_embeds,
    target_prompt_embeds,
    negative_prompt_embeds,
    preset,
    num_inference_steps,
    inpaint_strength,
    guidance_scale,
    guidance_start,
    guidance_end,
    unet_cache_interval,
    num_maps_per_mask,
    mask_encode_strength,
    mask_thresholding_ratio,
    mask_options,
    mask_image,
    mask_combination,
    per_image_clamp,
    corrected_guidance,
    outlier_quantile,
    inversion,
    inversion_prompt,
    inversion_guidance_scale,
    inversion_iterations,
    inversion_points,
    inversion_maps,
    aligned_background,
    image_latents,
    paste_back,
    feather,
    working_size,
    eta,
    generator,
    output_type,
    measure_reconstruction,
    callback_on_step_end,
    callback_on_step_end_tensor_inputs,
    debug_callback,
    cross_attention_kwargs,
    clip_skip,
) -> DiffEditOutput:
    """``StableDiffusionDiffEditPipeline.edit``, where the arguments are described."""
    # 1. What can be wrong, before any model runs
    if negative_prompt is None and negative_prompt_embeds is None:
        negative_prompt, negative_prompt_embeds = source_prompt, source_prompt_embeds
    caption = (inversion_prompt, None) if inversion_prompt is not None else (source_prompt, source_prompt_embeds)
    pipeline.check_components()
    model = pipeline._limits
    is_guided = options.check_guidance_scale(guidance_scale) > 1.0
    inverts_guided = options.check_guidance_scale(inversion_guidance_scale, "inversion_guidance_scale") > 1.0

    def prompts(text, embeds, prefix="", negative=(None, None), *, guided=False):
        return Prompts.checked(model, text, negative[0], embeds, negative[1], guided, prefix)

    source = prompts(source_prompt, source_prompt_embeds, "source_")
    target = prompts(target_prompt, target_prompt_embeds, "target_")
    captions = prompts(*caption)
    batch = source.batch
    for name, count in (("target", target.batch), ("inversion", captions.batch)):
        if count != batch:
            raise InputError(
                "There are {count} {which} prompts for {batch} source prompts; give as many of each.",
                parameter=f"{name}_prompt",
                count=count,
                which=name,
                batch=batch,
            )
    negative = (negative_prompt, negative_prompt_embeds)
    edited_prompts = prompts(target_prompt, target_prompt_embeds, negative=negative, guided=is_guided)
    schedule = Schedule.checked(num_inference_steps, inpaint_strength)
    options.check_output_type(output_type, ("pil", "np", "latent"))
    options.check_output_type(inversion, INVERSIONS, "inversion")
    options.check_output_type(mask_combination, masks.COMBINATIONS, "mask_combination")
    for name, flag in (
        ("aligned_background", aligned_background),
        ("paste_back", paste_back),
        ("measure_reconstruction", measure_reconstruction),
    ):
        options.check_switch(flag, name)
    options.check_viewer(debug_callback)
    inverts = image_latents is None and inversion == "ddim"
    if inverts:
        pipeline._solver(inverse=True)  # takes DDIM in place of a scheduler that has no inverse
    evaluations = _evaluations(
        pipeline,
        preset,
        inverts=inverts,
        by_noise=num_maps_per_mask is not None or mask_encode_strength is not None,
        inversion_iterations=options.check_count(inversion_iterations, "inversion_iterations", options.MAX_ITERATIONS),
        inversion_points=inversion_points,
        inversion_maps=inversion_maps,
        guidance_start=guidance_start,
        guidance_end=guidance_end,
        unet_cache_interval=unet_cache_interval,
    )
    cache_interval = 1 if evaluations.unet_cache_interval > 1 else None  # of mask and inversion, by the edit's graphs
    by_inversion = evaluations.inversion_maps > 0
    num_maps = (
        evaluations.inversion_maps if by_inversion else EDIT_MAPS if num_maps_per_mask is None else num_maps_per_mask
    )
    if mask_options is None:
        mask_options = INVERSION_MASK if by_inversion else EDIT_MASK
    masks.checked_options(mask_options)
    if feather is not None:
        options.check_at_least_zero(feather, "feather", MAX_FEATHER)
    attention_kwargs = pipeline._attention_kwargs(cross_attention_kwargs)
    pixels = model.pixels(image if working_size is None else _scaled(image, working_size))
    options.check_image_batch(len(pixels), batch)
    of_pixels = not model.are_latents(pixels)
    originals = _originals(image, batch) if of_pixels else None
    if feather is None:
        feather = model.vae_scale_factor
        if originals and working_size is not None:
            feather *= originals[0].shown.width / working_size[0]
    factor = model.vae_scale_factor if of_pixels else 1
    grid = tuple(side // factor for side in pixels.shape[2:])
    own_mask = _own_mask(mask_image, mask_combination, mask_options, grid, batch)
    mask_inputs = None
    if own_mask is None or mask_combination != "replace":
        mask_inputs = MaskInputs.checked(
            model,
            pixels,
            prompts(source_prompt, source_prompt_embeds, "source_", guided=is_guided),
            prompts(target_prompt, target_prompt_embeds, "target_", guided=is_guided),
            num_maps_per_mask=num_maps,
            mask_encode_strength=EDIT_MASK_STRENGTH if mask_encode_strength is None else mask_encode_strength,
            mask_thresholding_ratio=mask_thresholding_ratio,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=_for_each_map(generator, num_maps),
            attention_kwargs=attention_kwargs,
            per_image_clamp=per_image_clamp,
            corrected_guidance=corrected_guidance,
            outlier_quantile=outlier_quantile,
            mask_options=mask_options,
            cache_interval=cache_interval,
        )
    invert_inputs = InvertInputs.checked(
        model,
        pixels,
        prompts(*caption, guided=inverts_guided),
        schedule,
        guidance_scale=inversion_guidance_scale,
        generator=generator if image_latents is None else None,  # a list has to fit the pictures if they are encoded
        attention_kwargs=attention_kwargs,
        inversion_iterations=inversion_iterations,
        inversion_points=evaluations.inversion_points,
        cache_interval=cache_interval,
    )
    edit_inputs = EditInputs.checked(
        model,
        edited_prompts,
        schedule,
        guidance_scale=guidance_scale,
        generator=generator,
        attention_kwargs=attention_kwargs,
        eta=eta,
        clip_skip=clip_skip,
        callbacks=Callbacks.checked(None, 1, callback_on_step_end, callback_on_step_end_tensor_inputs),
        evaluations=evaluations,
    )
    _check_inversion(inversion, inversion_iterations, image_latents, measure_reconstruction)
    if inverts:
        # Before the mask, which has to be at the noise levels of the same solver.
        pipeline._inverse_solver(invert_inputs).schedule(*schedule)
    steps = len(pipeline._solver().schedule(*schedule)[0])
    if image_latents is not None:
        _check_inverted(image_latents, (batch, steps, model.latent_channels, *grid))

    seconds: dict[str, float] = {}
    with contextlib.nullcontext() if debug_callback is None else pipeline.debugging(debug_callback):
        # 2. The mask, unless the inversion gives it
        mask, mask_map = own_mask, None
        if mask_inputs is not None and not by_inversion:
            with _timed(seconds, "mask"):
                mask, mask_map = pipeline._mask(mask_inputs)
        # 3. The background of every step
        with _timed(seconds, "inversion"):
            if image_latents is None:
                if inverts:
                    clean, inverted, visits = pipeline._inverted(invert_inputs)
                else:
                    rng = checked_rng(generator, model, pixels, batch)
                    clean, inverted = pipeline._noised(pixels, batch, schedule, rng)
                image_latents = DiffEditInversionPipelineOutput(
                    pipeline._stacked(inverted), clean_latents=pipeline._result(clean)
                )
        if mask_inputs is not None and by_inversion:
            with _timed(seconds, "mask"):
                mask, mask_map = pipeline._mask_of_inversion(mask_inputs, visits, invert_inputs.prompts)
        if own_mask is not None and mask is not own_mask:
            mask = masks.combine(mask, own_mask, mask_combination)
        # 4. The edit
        noisy, clean = _on_device(image_latents, batch)
        backgrounds = [*noisy[1:], clean] if aligned_background else noisy
        decoded = flags = None
        with _timed(seconds, "edit"):
            region = masks.preprocess_mask(mask, batch, soft=mask_options.soft)
            edited, first_prediction = pipeline._denoised(edit_inputs, region, noisy[0], backgrounds)
            if output_type != "latent":
                decoded, flags = pipeline.run_safety_checker(pipeline._decoded(host(edited)))

    # 5. The pictures, and what can be said about them
    report = EditReport(mask_coverage=masks.mask_coverage(mask), seconds=seconds)
    latents = images = pipeline._result(edited)
    if decoded is not None:
        original_pixels = pictures.originals(image, batch) if of_pixels else None
        as_pictures = originals if output_type == "pil" else None
        images = _finished(decoded, flags, original_pixels, mask, feather, paste_back, report, as_pictures)
        images = pictures.of_arrays(images) if isinstance(images, np.ndarray) and output_type == "pil" else images
    if inverts:
        # The edit's first step has predicted what the inversion's way back would, where its negative is the caption.
        free = len(first_prediction) == 2 * batch and not inverts_guided and callback_on_step_end is None
        free = free and negative[0] == caption[0] and negative[1] is caption[1]
        if free or not evaluations.inversion_points:  # whoever saves evaluations does not want one for the report
            with _timed(seconds, "report"):
                prediction = first_prediction[:batch] if free else None
                report.inversion_error = _inversion_error(pipeline, invert_inputs, noisy, clean, prediction)
        if measure_reconstruction:
            with _timed(seconds, "reconstruction"):
                rebuilt = _reconstruction(pipeline, invert_inputs, noisy[0], backgrounds)
            report.reconstruction_psnr = _psnr(rebuilt, pixels) if of_pixels else None
    large_error = LARGE_ERROR * (2 if evaluations.inversion_points else 1)
    report.warnings = _warnings(report, source_prompt, target_prompt, own_mask is not None, large_error)
    if originals and output_type == "pil":
        report.warnings += dict.fromkeys(loss for original in originals for loss in original.losses)
    return DiffEditOutput(
        images, mask, mask_map, image_latents.latents, latents, report, flags, image_latents.clean_latents
    )


def _evaluations(pipeline, preset, *, unet_cache_interval, **choices) -> Evaluations:
    """What preset and arguments choose; no step cache of a preset for a UNet that cannot have it."""
    tabulated = isinstance(pipeline._solver(), TabulatedSolver)
    evaluations = Evaluations.checked(preset, tabulated=tabulated, unet_cache_interval=unet_cache_interval, **choices)
    if evaluations.unet_cache_interval > 1:
        try:
            step_cache.check_supported(pipeline.unet)
        except InputError:
            if unet_cache_interval is not None:
                raise
            return replace(evaluations, unet_cache_interval=1)
    return evaluations


def _own_mask(mask_image, combination, mask_options, grid, batch) -> Any:
    """The user's mask on the latents' grid, (B, h, w) float32, or None; 0 and 1 unless masks are soft."""
    if mask_image is None:
        if combination != "replace":
            raise InputError(
                "{parameter} is {combination!r}, but there is no {mask_image} to combine with.",
                parameter="mask_combination",
                combination=combination,
            )
        return None
    return np.broadcast_to(masks.user_mask(mask_image, grid, batch, "mask_image", mask_options.soft), (batch, *grid))


def _check_inverted(value, shape) -> None:
    if not isinstance(value, DiffEditInversionPipelineOutput) or value.clean_latents is None:
        raise InputTypeError(
            "{parameter} has to be what `invert` or `noise_image` returned, with its clean latents, but is "
            "{value!t}; pass the whole output, not its latents.",
            parameter="image_latents",
            value=value,
        )
    batch, steps, *latent_shape = shape
    options.check_image_latents(value.latents, batch, steps, latent_shape)
    options.check_clean_latents(value.clean_latents, (batch, *latent_shape))


def _on_device(inverted: DiffEditInversionPipelineOutput, batch: int):
    """Latents of an inversion, float32 tensors (B, C, h, w): of each level, noisiest first, and the clean ones."""
    latents, clean = (
        value.astype(ms.float32) if isinstance(value, ms.Tensor) else tensor(to_numpy(value))
        for value in (inverted.latents, inverted.clean_latents)
    )
    latents = latents.reshape(batch, -1, *clean.shape[1:])  # a user's may be (B * T, C, h, w)
    return [latents[:, i] for i in range(latents.shape[1])], clean


def _inversion_error(pipeline, inputs: InvertInputs, noisy, clean, prediction) -> list[float] | None:
    """How far a step back from the noisiest latents misses the next ones, for all steps; for each picture.

    The step back is DDIM's between the two noise levels. ``prediction``: without guidance, at the noisiest latents;
    None: made here.
    """
    solver = pipeline._solver()
    timesteps, _ = solver.schedule(*inputs.schedule)
    levels = [solver.noise_levels(timestep) for timestep in timesteps[:2]]
    if levels[0] is None:
        return None
    here, there = noisy[0], noisy[1] if len(timesteps) > 1 else clean
    guidance_scale = 1.0
    if prediction is None:
        guidance_scale = inputs.guidance_scale
        embeds = pipeline._joined_embeddings(inputs.prompts, 1, lora_scale=inputs.attention_kwargs.get("scale", 1.0))
        predict = pipeline._predictor(embeds, inputs, inputs.prompts.batch)
        prediction = predict(here, timesteps[0])
    alphas = [sqrt_alpha**2 for sqrt_alpha, _ in levels]
    row = schedules.ddim_row(alphas[0], alphas[1] if len(alphas) > 1 else np.float32(1))
    plan = schedules.StepPlan("ddim", solver.prediction_type, None, row[None])
    back, _ = CompiledUpdate(pipeline._stages, plan, guidance_scale, here.shape)(0, here, prediction)
    back, there = host(back), host(there)
    return [float(error) * len(timesteps) for error in _rms(back - there) / _rms(there)]


def _reconstruction(pipeline, inputs: InvertInputs, noisiest, backgrounds) -> np.ndarray:
    """Pixels (B, 3, H, W) that the inversion's own prompts lead back to from its end, with no outside to keep."""
    back = EditInputs(
        inputs.prompts, inputs.schedule, inputs.guidance_scale, randomness.resolve(None), inputs.attention_kwargs
    )
    batch, _, *grid = noisiest.shape
    latents, _ = pipeline._denoised(back, np.ones((batch, 1, *grid), np.float32), noisiest, backgrounds)
    return pipeline._decoded(host(latents))


def _check_inversion(inversion, iterations, image_latents, measure_reconstruction) -> None:
    nothing = inversion == "noise" or image_latents is not None
    if nothing and (iterations > 0 or measure_reconstruction):
        raise InputError(
            "Nothing is inverted here ({inversion='noise'}, or {image_latents} were given), so "
            "{inversion_iterations} and {measure_reconstruction} mean nothing; leave them out.",
            parameter="inversion_iterations" if iterations > 0 else "measure_reconstruction",
        )
    if inversion == "noise" and image_latents is not None:
        raise InputError(
            "{inversion='noise'} and {parameter} exclude each other; give one of them.",
            parameter="image_latents",
        )


def _for_each_map(generator, copies: int):
    """A list of generators, one for each picture, as ``generate_mask`` takes it: one for each of the maps."""
    if not isinstance(generator, (list, tuple)) or len(generator) == 1:
        return generator
    streams: Any = randomness.resolve(generator)
    return [stream for stream in streams for _ in range(copies)]


def _originals(image, batch: int) -> list[colours.Original] | None:
    """For each prompt the PIL picture that it is about; None where others than PIL pictures were given."""
    listed = list(image) if isinstance(image, (list, tuple)) else [image]
    if not all(isinstance(picture, Image) for picture in listed):
        return None
    pictures.check_sizes(listed)
    return [colours.Original(picture) for picture in listed] * (batch // len(listed))


def _scaled(image, size) -> list[Image]:
    """PIL picture(s) as the model sees them, at another size."""
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise InputTypeError(
            "{parameter} has to be (width, height) in pixels, but is {size!r}.", "working_size", size=size
        )
    width, height = (options.check_positive_int("working_size", side) for side in size)
    listed = list(image) if isinstance(image, (list, tuple)) else [image]
    if not listed or not all(isinstance(picture, Image) for picture in listed):
        raise InputTypeError(
            "{parameter} is for PIL pictures, but {image} is or holds something else; resize that yourself, and leave "
            "{parameter} out.",
            "working_size",
        )
    pictures.check_sizes(listed)
    return [pictures.restore_size(colours.to_srgb(picture), (width, height)) for picture in listed]


def _finished(decoded, flags, originals, mask, feather, paste_back, report, as_pictures):
    """Pictures (B, H, W, 3) in [0, 1] of what the decoder gave, (B, 3, H, W) in [-1, 1]; fills in the report.

    ``originals`` (B, H, W, 3) or None. With ``as_pictures``, B of them, the results are a list of PIL pictures, each
    with its original's mode, profile and transparency.
    """
    normalised = None if flags is None else [not flag for flag in flags]
    images = pictures.postprocess_image(decoded, "np", normalised)
    if originals is None:
        return images
    images = pictures.resized_arrays(images, originals.shape[1:3])
    weights = masks.feathered(mask, originals.shape[1:3], feather)
    report.change_outside_before_paste_back = change_outside(images, originals, weights)
    drawn = pictures.of_arrays(images) if as_pictures else []
    # What the safety checker blackened stays black.
    kept = [i for i in range(len(images)) if paste_back and not (flags and flags[i])]
    if kept:
        images[kept] = masks.paste_back(originals[kept], images[kept], weights[kept])
    report.change_outside = change_outside(images, originals, weights)
    if as_pictures:
        return [
            original.rewritten(picture, weights[i] if i in kept else None)
            for i, (original, picture) in enumerate(zip(as_pictures, drawn))
        ]
    return images


def change_outside(images, originals, weights) -> list[float]:
    """Rms difference of pictures (B, H, W, 3) in [0, 1], in levels of 255, where the weights (B, H, W) are 0.

    0 where they never are.
    """
    changes = []
    for image, original, weight in zip(images, originals, weights):
        outside = weight == 0
        changes.append(255 * float(_rms((image - original)[outside][None])[0]) if outside.any() else 0.0)
    return changes


def _rms(arrays: np.ndarray) -> np.ndarray:
    """Root mean square of each array of a batch, in float64."""
    return np.sqrt(np.square(arrays, dtype=np.float64).mean(axis=tuple(range(1, arrays.ndim))))


def _psnr(decoded: np.ndarray, pixels: np.ndarray) -> list[float]:
    """dB between pictures (B, 3, H, W) in [-1, 1]."""
    error = _rms(np.clip(decoded, -1, 1) - np.concatenate([pixels] * (len(decoded) // len(pixels)))) / 2
    return [float(value) for value in -20 * np.log10(np.maximum(error, 1e-5))]


def _warnings(report: EditReport, source_prompt, target_prompt, own_mask: bool, large_error=LARGE_ERROR) -> list[str]:
    """What looks wrong, and what to turn."""
    warnings: list[str] = []
    for i, share in enumerate(report.mask_coverage):
        which = f"picture {i}: " if len(report.mask_coverage) > 1 else ""
        if share == 0:
            remedy: str = Message("lower {mask_thresholding_ratio} or raise {num_maps_per_mask}")
            if own_mask:
                remedy = "draw more of it"
            warnings.append(
                Message("{which}the mask is empty, so nothing has changed; {remedy}.", which=which, remedy=remedy)
            )
        elif share > 0.9:
            remedy = Message(
                "raise {mask_thresholding_ratio}, or say in both prompts what should stay, in the same words"
            )
            if own_mask:
                remedy = "draw less of it"
            warnings.append(
                Message(
                    "{which}the mask covers {share:.0%} of the picture; {remedy}.",
                    which=which,
                    share=share,
                    remedy=remedy,
                )
            )
        if report.inversion_error is not None and report.inversion_error[i] > large_error:
            warnings.append(
                Message(
                    "{which}the inversion does not lead back to the picture (error {error:.0%}); raise "
                    "{num_inference_steps} or {inversion_iterations}, lower {inpaint_strength}, or say in the source "
                    "prompt what the picture shows.",
                    which=which,
                    error=report.inversion_error[i],
                )
            )
    for source, target in zip(_listed(source_prompt), _listed(target_prompt)):
        words = [_words(text) for text in (source, target)]
        if all(words) and not words[0] & words[1]:
            warnings.append(
                Message(
                    "the prompts {source!r} and {target!r} have no word in common, so that the mask may take in "
                    "everything; repeat in the target prompt what should stay.",
                    source=source,
                    target=target,
                )
            )
    return warnings


# Tibetan, and from Thai to Khmer; Javanese and its kin; kana, Chinese characters, Hangul and their extensions.
_WITHOUT_SPACES = re.compile("[\u0e00-\u109f\u1100-\u11ff\u1780-\u1aaf\u2e80-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff]")


def _words(text: str) -> set:
    """The words of a text; none of one in a script that does not set spaces between words, or joins endings to them."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return set() if _WITHOUT_SPACES.search(text) else set(re.findall(r"\w+", text))


def _listed(prompt) -> list[str]:
    return [prompt] if isinstance(prompt, str) else list(prompt or [])


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str):
    begun = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - begun
