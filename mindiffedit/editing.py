"""``edit``: mask, inversion and edit in one call, with the corrections of ``docs/differences.md`` switched on."""

from __future__ import annotations

import contextlib
import re
import time
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL.Image import Image

from mindiffedit import masks, options
from mindiffedit.arrays import to_numpy
from mindiffedit.errors import InputError, InputTypeError, Message
from mindiffedit.images import colours, pictures
from mindiffedit.noise import randomness
from mindiffedit.outputs import DiffEditInversionPipelineOutput, DiffEditOutput, EditReport
from mindiffedit.runtime import turns
from mindiffedit.solvers import schedules

INVERSIONS = ("ddim", "noise")

EDIT_MASK = masks.MaskOptions(smoothing=1.5, edges=6, threshold=0.6, fill_holes=True, smallest_region=8)
"""How ``edit`` makes a mask of its map, where nothing else is said.

With a clamp at twice the mean much of the map is cut to one of two values, and the smoothing lets neighbours vote: most
of a latent's surroundings have to differ. So a few maps do what ten do without. Then the border moves to the picture's
edges. Chosen on drawn scenes, see ``docs/quality.md``.
"""

MAX_FEATHER = 10000  # pixels

LARGE_ERROR = 1.0
"""Inversion error from which a report warns. The demo model, whose inversions lead back at 33 dB, has 0.2 to 0.4."""


class Editing:
    """The one call and what it is made of, over the three mirrored ones."""

    @turns.turn()
    def edit(
        self,
        image,
        source_prompt: str | list[str] | None = None,
        target_prompt: str | list[str] | None = None,
        *,
        negative_prompt: str | list[str] | None = None,
        source_prompt_embeds=None,
        target_prompt_embeds=None,
        negative_prompt_embeds=None,
        num_inference_steps: int = 50,
        inpaint_strength: float = 0.8,
        guidance_scale: float = 7.5,
        num_maps_per_mask: int = 4,
        mask_encode_strength: float = 0.5,
        mask_thresholding_ratio: float = 2.0,
        mask_options: masks.MaskOptions | None = None,
        mask_image=None,
        mask_combination: str = "replace",
        per_image_clamp: bool = True,
        corrected_guidance: bool = True,
        outlier_quantile: float | None = 0.99,
        inversion: str = "ddim",
        inversion_prompt: str | list[str] | None = None,
        inversion_guidance_scale: float = 1.0,
        inversion_iterations: int = 0,
        aligned_background: bool = True,
        image_latents: DiffEditInversionPipelineOutput | None = None,
        paste_back: bool = True,
        feather: int | None = None,
        eta: float = 0.0,
        generator=None,
        output_type: str = "pil",
        measure_reconstruction: bool = False,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        debug_callback: Callable | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
    ) -> DiffEditOutput:
        """Changes what the two prompts disagree about, and nothing else.

        The three calls, one after the other, with their work shared and with what the reference has otherwise than the
        paper put right. Every correction is an option, here and in the three calls.

        Args:
            image: picture(s) of one size, or latents (B, C, h, w), as for ``generate_mask``.
            source_prompt: what is there, str or list of B str.
            target_prompt: what shall be there, str or list of B str.
            negative_prompt: what the edit moves away from; None is the source prompt.
            source_prompt_embeds: embeddings (B, L, D) instead of ``source_prompt``.
            target_prompt_embeds: embeddings (B, L, D) instead of ``target_prompt``.
            negative_prompt_embeds: embeddings (B, L, D) instead of ``negative_prompt``.
            num_inference_steps: steps of the whole schedule, 1 to 1000.
            inpaint_strength: share of them that runs, in (0, 1].
            guidance_scale: classifier-free guidance of mask and edit, at least 0; 1 or less is without.
            num_maps_per_mask: as for ``generate_mask``.
            mask_encode_strength: as for ``generate_mask``.
            mask_thresholding_ratio: as for ``generate_mask``.
            mask_options: how the map becomes a mask; None: ``mindiffedit.editing.EDIT_MASK``.
            mask_image: own mask(s) of any size, white (1) where the picture may change.
            mask_combination: what becomes of it and the computed mask: "replace" (nothing is computed), "union",
                "subtract" (computed without own) or "intersection".
            per_image_clamp: as for ``generate_mask``.
            corrected_guidance: as for ``generate_mask``.
            outlier_quantile: as for ``generate_mask``.
            inversion: "ddim" inverts the picture; "noise" noises it freshly for every step, which needs no model and
                leaves what is inside the mask to chance.
            inversion_prompt: caption(s) for the inversion; None: the source prompt.
            inversion_guidance_scale: 1 inverts without guidance, as the paper does, at half the cost.
            inversion_iterations: as for ``invert``.
            aligned_background: take each step's background at the noise level that the step arrives at; otherwise it is
                one level late, as in the reference.
            image_latents: what ``invert`` or ``noise_image`` returned for the same picture and steps; ``inversion`` and
                its options are then not used.
            paste_back: outside the feathered mask return the picture's own pixels. Not for latents.
            feather: width of the seam in pixels; None: one latent.
            eta: DDIM's eta in [0, 1].
            generator: as for the other calls; a list has one for each of B pictures. A seed begins anew in each call.
            output_type: "pil", "np" or "latent".
            measure_reconstruction: denoise the inverted latents with the source prompt, too, and say in the report how
                near that comes; costs as much as an inversion.
            callback_on_step_end: as for ``invert``; of the edit's steps.
            callback_on_step_end_tensor_inputs: as for ``invert``.
            debug_callback: ``callback(stage, array, step)`` sees every intermediate, see ``debugging``.
            cross_attention_kwargs: as for the other calls.
            clip_skip: as for the call.

        Returns:
            DiffEditOutput: pictures have the size of those that were given. With ``output_type`` "pil", results of PIL
                pictures have their mode, profile and transparency, too; ``report.warnings`` says what could not be
                kept. Arrays are in sRGB.

        Raises:
            ValueError: for a value that does not fit, before any model runs.
            TypeError: for a wrong type, before any model runs.
            NumericalError: for NaN or inf, naming stage and step.
        """
        # 1. What can be wrong, before any model runs
        if negative_prompt is None and negative_prompt_embeds is None:
            negative_prompt, negative_prompt_embeds = source_prompt, source_prompt_embeds
        caption = dict(prompt=inversion_prompt, prompt_embeds=None)
        if inversion_prompt is None:
            caption = dict(prompt=source_prompt, prompt_embeds=source_prompt_embeds)
        options.check_guidance_scale(guidance_scale)
        options.check_guidance_scale(inversion_guidance_scale, "inversion_guidance_scale")
        batch = self._count_prompts(
            (source_prompt, source_prompt_embeds),
            (target_prompt, target_prompt_embeds),
            tuple(caption.values()),
            (negative_prompt, negative_prompt_embeds),
            guidance_scale > 1.0,
        )
        schedule = dict(num_inference_steps=num_inference_steps, inpaint_strength=inpaint_strength)
        options.check_steps(num_inference_steps)
        options.check_strength(inpaint_strength, "inpaint_strength")
        options.effective_steps(num_inference_steps, inpaint_strength)
        options.check_eta(eta)
        options.check_output_type(output_type, ("pil", "np", "latent"))
        options.check_output_type(inversion, INVERSIONS, "inversion")
        options.check_count(inversion_iterations, "inversion_iterations", options.MAX_ITERATIONS)
        options.check_output_type(mask_combination, masks.COMBINATIONS, "mask_combination")
        for name, flag in (
            ("aligned_background", aligned_background),
            ("paste_back", paste_back),
            ("measure_reconstruction", measure_reconstruction),
        ):
            options.check_switch(flag, name)
        options.check_step_callback(
            callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        )
        options.check_viewer(debug_callback)
        mask_options = EDIT_MASK if mask_options is None else masks.checked_options(mask_options)
        feather = (
            self.vae_scale_factor if feather is None else options.check_at_least_zero(feather, "feather", MAX_FEATHER)
        )
        _check_inversion(inversion, inversion_iterations, image_latents, measure_reconstruction)
        randomness.resolve(generator)
        pixels = self._pixels(image, batch)
        of_pixels = pixels.shape[1] != self.vae.config.latent_channels
        originals = _originals(image, batch) if of_pixels else None
        factor = self.vae_scale_factor if of_pixels else 1
        grid = tuple(side // factor for side in pixels.shape[2:])
        own = self._own_mask(mask_image, mask_combination, mask_options, grid, batch)
        if image_latents is not None:
            timesteps, _ = self._schedule(self._ready_scheduler(), self.get_timesteps, *schedule.values())
            self._check_inverted(image_latents, (batch, len(timesteps), self.vae.config.latent_channels, *grid))
        elif inversion == "ddim":
            self._ready_inverse_scheduler()  # before the mask, which has to be at the noise levels of the same solver

        seconds: dict[str, float] = {}
        with contextlib.nullcontext() if debug_callback is None else self.debugging(debug_callback):
            # 2. The mask
            with _timed(seconds, "mask"):
                mask, mask_map = own, None
                if own is None or mask_combination != "replace":
                    mask, mask_map = self.generate_mask(
                        image=image,
                        target_prompt=target_prompt,
                        target_prompt_embeds=target_prompt_embeds,
                        source_prompt=source_prompt,
                        source_prompt_embeds=source_prompt_embeds,
                        num_maps_per_mask=num_maps_per_mask,
                        mask_encode_strength=mask_encode_strength,
                        mask_thresholding_ratio=mask_thresholding_ratio,
                        num_inference_steps=num_inference_steps,
                        guidance_scale=guidance_scale,
                        generator=_for_each_map(generator, num_maps_per_mask),
                        cross_attention_kwargs=cross_attention_kwargs,
                        per_image_clamp=per_image_clamp,
                        corrected_guidance=corrected_guidance,
                        outlier_quantile=outlier_quantile,
                        mask_options=mask_options,
                        return_map=True,
                    )
                if own is not None and mask is not own:
                    mask = masks.combine(mask, own, mask_combination)
            # 3. The background of every step
            inverted = image_latents
            with _timed(seconds, "inversion"):
                if inverted is None and inversion == "noise":
                    inverted = self.noise_image(image, batch_size=batch, generator=generator, **schedule)
                elif inverted is None:
                    inverted = self.invert(
                        **caption,
                        image=image,
                        guidance_scale=inversion_guidance_scale,
                        generator=generator,
                        cross_attention_kwargs=cross_attention_kwargs,
                        inversion_iterations=inversion_iterations,
                        **schedule,
                    )
            # 4. The edit
            latents = dict(
                image_latents=inverted.latents,
                clean_latents=inverted.clean_latents if aligned_background else None,
                cross_attention_kwargs=cross_attention_kwargs,
                **schedule,
            )
            decoded = flags = None
            with _timed(seconds, "edit"):
                edited, first_predictions = self._edited_latents(
                    prompt=target_prompt,
                    prompt_embeds=target_prompt_embeds,
                    negative_prompt=negative_prompt,
                    negative_prompt_embeds=negative_prompt_embeds,
                    guidance_scale=guidance_scale,
                    eta=eta,
                    generator=generator,
                    mask_image=mask,
                    soft_mask=mask_options.soft,
                    clip_skip=clip_skip,
                    callback_on_step_end=callback_on_step_end,
                    callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                    **latents,
                )
                if output_type != "latent":
                    decoded, flags = self.run_safety_checker(self._decoded(edited))

        # 5. The pictures, and what can be said about them
        report = EditReport(mask_coverage=masks.mask_coverage(mask), seconds=seconds)
        images = edited = self._tensor(edited, self.unet.dtype)
        if decoded is not None:
            given = pictures.originals(image, batch) if of_pixels else None
            as_pictures = originals if output_type == "pil" else None
            images = _finished(decoded, flags, given, mask, feather, paste_back, report, as_pictures)
            images = pictures.of_arrays(images) if isinstance(images, np.ndarray) and output_type == "pil" else images
        if image_latents is None and inversion == "ddim":
            # The edit's first step has predicted what the inversion's way back would, where its negative is the caption.
            free = guidance_scale > 1.0 >= inversion_guidance_scale and callback_on_step_end is None
            free = free and negative_prompt == caption["prompt"]
            free = free and negative_prompt_embeds is caption["prompt_embeds"]
            with _timed(seconds, "report"):
                report.inversion_error = self._inversion_error(
                    inverted,
                    first_predictions[:batch] if free and first_predictions is not None else None,
                    caption,
                    inversion_guidance_scale,
                    cross_attention_kwargs,
                    schedule,
                )
            if measure_reconstruction:
                with _timed(seconds, "reconstruction"):
                    everywhere = np.ones((batch, *grid), np.float32)
                    rebuilt, _ = self._edited_latents(
                        **caption, guidance_scale=inversion_guidance_scale, mask_image=everywhere, **latents
                    )
                    rebuilt = self._decoded(rebuilt)
                report.reconstruction_psnr = _psnr(rebuilt, pixels) if of_pixels else None
        report.warnings = _warnings(report, source_prompt, target_prompt, own is not None)
        if originals and output_type == "pil":
            report.warnings += dict.fromkeys(loss for original in originals for loss in original.losses)
        return DiffEditOutput(images, mask, mask_map, inverted.latents, edited, report, flags)

    @turns.turn()
    def noise_image(
        self,
        image,
        num_inference_steps: int = 50,
        inpaint_strength: float = 0.8,
        generator=None,
        batch_size: int | None = None,
    ) -> DiffEditInversionPipelineOutput:
        """The picture noised afresh at every level of the edit: a background without an inversion.

        What it returns goes where ``invert``'s goes, and keeps the outside of the mask as well. Inside, nothing of the
        picture is kept but its noised start, so that a high strength draws anew what an inversion would turn round.

        Args:
            image: picture(s) or latents, as for ``invert``.
            num_inference_steps: as given to the edit.
            inpaint_strength: as given to the edit; it says at which noise level the edit begins.
            generator: int seed or generator(s) of the posterior draw and of all noise.
            batch_size: number of prompts, B; None: of pictures.

        Returns:
            DiffEditInversionPipelineOutput: ``latents`` (B, T, C, h, w), noisiest first, and ``clean_latents``.

        Raises:
            ValueError: for a value that does not fit, before any model runs.
            TypeError: for a wrong type, before any model runs.
        """
        options.check_strength(inpaint_strength, "inpaint_strength")
        options.check_steps(num_inference_steps)
        options.effective_steps(num_inference_steps, inpaint_strength)
        if batch_size is not None:
            options.check_positive_int("batch_size", batch_size)
        source = randomness.resolve(generator)
        scheduler = self._ready_scheduler()
        timesteps, _ = self._schedule(scheduler, self.get_timesteps, num_inference_steps, inpaint_strength)
        pixels = self._pixels(image, batch_size)
        batch_size = batch_size or len(pixels)
        self._check_sources(source, pixels, batch_size, 1)
        clean = self._image_latents(pixels, batch_size, 1, source)
        noised = [self._noised(scheduler, clean, self._noise(clean.shape, source), t) for t in timesteps]
        return DiffEditInversionPipelineOutput(
            latents=self._tensor(np.stack(noised, axis=1), self.unet.dtype),
            clean_latents=self._tensor(clean, self.unet.dtype),
        )

    def _count_prompts(self, source, target, caption, negative, is_guided: bool) -> int:
        """The number of source prompts, B, as many as there are of each; all are (texts, embeddings), one of them None."""
        batch = self._check_prompts(source[0], None, source[1], None, False, "source_")
        counts = {
            "target": self._check_prompts(target[0], None, target[1], None, False, "target_"),
            "inversion": self._check_prompts(caption[0], None, caption[1], None, False),
        }
        for name, count in counts.items():
            if count != batch:
                raise InputError(
                    "There are {count} {which} prompts for {batch} source prompts; give as many of each.",
                    parameter=f"{name}_prompt",
                    count=count,
                    which=name,
                    batch=batch,
                )
        self._check_prompts(target[0], negative[0], target[1], negative[1], is_guided)
        return batch

    def _own_mask(self, mask_image, combination, mask_options, grid, batch) -> np.ndarray | None:
        """The user's mask on the latents' grid, (B, h, w) float32; 0 and 1 unless masks are soft."""
        if mask_image is None:
            if combination != "replace":
                raise InputError(
                    "{parameter} is {combination!r}, but there is no {mask_image} to combine with.",
                    parameter="mask_combination",
                    combination=combination,
                )
            return None
        return np.broadcast_to(
            masks.user_mask(mask_image, grid, batch, "mask_image", mask_options.soft), (batch, *grid)
        )

    @staticmethod
    def _check_inverted(given, shape) -> None:
        if not isinstance(given, DiffEditInversionPipelineOutput) or given.clean_latents is None:
            raise InputTypeError(
                "{parameter} has to be what `invert` or `noise_image` returned, with its clean latents, but is "
                "{given!t}; pass the whole output, not its latents.",
                parameter="image_latents",
                given=given,
            )
        batch, steps, *one = shape
        options.check_image_latents(given.latents, batch, steps, one)
        options.check_clean_latents(given.clean_latents, (batch, *one))

    def _inversion_error(self, inverted, predictions, caption, guidance_scale, attention_kwargs, schedule):
        """How far a step back from the noisiest latents misses the next ones, for all steps; for each picture.

        The step back is DDIM's between the two noise levels. ``predictions``: without guidance, at the noisiest latents;
        None: made here.
        """
        scheduler = self._ready_scheduler()
        if not hasattr(scheduler, "noise_scale"):
            return None
        timesteps, _ = self._schedule(scheduler, self.get_timesteps, *schedule.values())
        latents = to_numpy(inverted.latents).astype(np.float32)
        clean = to_numpy(inverted.clean_latents).astype(np.float32)
        here, there = latents[:, 0], latents[:, 1] if len(timesteps) > 1 else clean
        is_guided = predictions is None and guidance_scale > 1.0
        if predictions is None:
            attention_kwargs = self._attention_kwargs(attention_kwargs)
            embeds = self._joined_embeds(
                caption["prompt"], 1, is_guided, None, caption["prompt_embeds"], None,
                lora_scale=attention_kwargs.get("scale", 1.0),
            )  # fmt: skip
            predict = self._stages.predictor(embeds, attention_kwargs, self.unet_batch_size)
            predictions = predict(np.concatenate([here, here]) if is_guided else here, timesteps[0])
        alphas = [scheduler.noise_scale(t)[0] ** 2 for t in timesteps[:2]]
        row = schedules.ddim_row(alphas[0], alphas[1] if len(alphas) > 1 else np.float32(1))
        plan = schedules.StepPlan("ddim", scheduler.config.prediction_type, None, row[None])
        everywhere, zeros = np.ones((len(here), 1, *here.shape[2:]), np.float32), np.zeros_like(clean)
        back, _ = self._stages.update(plan, is_guided)(
            here, zeros, predictions, guidance_scale, row, everywhere, zeros, zeros
        )
        return [float(error) * len(timesteps) for error in _rms(back - there) / _rms(there)]


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
    return [source for source in randomness.resolve(generator) for _ in range(copies)]


def _originals(image, batch: int) -> list[colours.Original] | None:
    """For each prompt the PIL picture that it is about; None where others than PIL pictures were given."""
    given = list(image) if isinstance(image, (list, tuple)) else [image]
    if not all(isinstance(picture, Image) for picture in given):
        return None
    pictures.check_sizes(given)
    return [colours.Original(picture) for picture in given] * (batch // len(given))


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
    drawn = pictures.of_arrays(images) if as_pictures else None
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


def _warnings(report: EditReport, source_prompt, target_prompt, own_mask: bool) -> list[Message]:
    """What looks wrong, and what to turn."""
    found = []
    for i, share in enumerate(report.mask_coverage):
        which = f"picture {i}: " if len(report.mask_coverage) > 1 else ""
        if share == 0:
            remedy = Message("lower {mask_thresholding_ratio} or raise {num_maps_per_mask}")
            if own_mask:
                remedy = "draw more of it"
            found.append(
                Message("{which}the mask is empty, so nothing has changed; {remedy}.", which=which, remedy=remedy)
            )
        elif share > 0.9:
            remedy = Message(
                "raise {mask_thresholding_ratio}, or say in both prompts what should stay, in the same words"
            )
            if own_mask:
                remedy = "draw less of it"
            found.append(
                Message(
                    "{which}the mask covers {share:.0%} of the picture; {remedy}.",
                    which=which,
                    share=share,
                    remedy=remedy,
                )
            )
        if report.inversion_error is not None and report.inversion_error[i] > LARGE_ERROR:
            found.append(
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
            found.append(
                Message(
                    "the prompts {source!r} and {target!r} have no word in common, so that the mask may take in "
                    "everything; repeat in the target prompt what should stay.",
                    source=source,
                    target=target,
                )
            )
    return found


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
