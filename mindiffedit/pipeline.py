"""``StableDiffusionDiffEditPipeline``: the reference's three calls over compiled MindSpore stages.

Host work (strings, pictures, random numbers, the mask's statistics) is NumPy; models run in ``steps.Stages``. The
numbered comments follow the reference's steps. Where behaviour differs from the reference, the line carries an id
of ``docs/differences.md``.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mindiffedit import masks, options
from mindiffedit.arrays import to_numpy
from mindiffedit.editing import Editing
from mindiffedit.errors import InputError, InputTypeError, named
from mindiffedit.images import edges, pictures
from mindiffedit.noise import randomness, regularisers
from mindiffedit.outputs import DiffEditInversionPipelineOutput, StableDiffusionPipelineOutput
from mindiffedit.preparation import Preparation, as_its_own
from mindiffedit.runtime import turns
from mindiffedit.solvers import schedules

logger = logging.getLogger(__name__)


def _texts(prompt, batch: int) -> list[str]:
    """Prompts as a list; None is the empty text."""
    if prompt is None:
        return [""] * batch
    return [prompt] * batch if isinstance(prompt, str) else list(prompt)


class StableDiffusionDiffEditPipeline(Editing, Preparation):
    """Text-guided image editing with DiffEdit (arXiv 2210.11427), with the methods of diffusers' class of this name.

    Parameter names, order, defaults and results are diffusers'; ``docs/differences.md`` lists what differs. Tensors
    are MindSpore tensors; where a tensor is accepted, a NumPy array or a PyTorch tensor is too.

    Letters in shapes: B prompts, H x W pixels, h x w latents (H / 8 and W / 8 for Stable Diffusion), C latent
    channels (4), T steps that run, L tokens (77), D width of the text embeddings (768 or 1024).

    Input is checked before any model runs: a wrong value is a ValueError, a wrong type a TypeError. A NaN that
    arises on the way is a ``NumericalError`` that names stage and step.

    Any number of threads may call pipelines, of the same models too: their calls run one after the other, as if each
    were alone, and a callback may wait for another thread's call. A process that was forked after models were loaded
    cannot use them; every call there is a RuntimeError.

    Args:
        vae: mindone's AutoencoderKL of a Stable Diffusion 1.x or 2.x checkpoint.
        text_encoder: mindone's CLIPTextModel.
        tokenizer: a transformers tokenizer.
        unet: mindone's UNet2DConditionModel.
        scheduler: scheduler of ``generate_mask`` and of the edit.
        safety_checker: mindone's StableDiffusionSafetyChecker, or None, which is warned of once.
        feature_extractor: image processor of the safety checker, or None.
        inverse_scheduler: scheduler of ``invert``; None is the inverse of ``scheduler`` where it has one.
        requires_safety_checker: warn when ``safety_checker`` is None.
        mode: "graph" compiles every stage the first time it runs; "pynative" runs operator by operator, to debug.
        compile_cache: where compiled graphs are kept, see ``from_pretrained``.

    Attributes:
        scheduler: can be replaced at any time by another scheduler.
        inverse_scheduler: likewise. One that is None follows ``scheduler``.
        observer: None, or a function that sees and may replace every array between the stages, see ``Observer``.
        unet_batch_size (int): samples that the UNet is given at once, in all three calls; 2 at first. 1 saves memory,
            more can be faster on a large device. Each value compiles the UNet once.
        max_graphs (int): compiled graphs kept in memory, six or so for each size of pictures and one for texts; 13 at
            first, 64 without a compile cache. More keep more sizes at hand.
        vae_scale_factor (int): pixels per latent, 8 for Stable Diffusion.

    Raises:
        ValueError: for a mode that is neither, or a safety checker without feature extractor.
    """

    _callback_tensor_inputs = ("latents", "prompt_embeds", "pred_original_sample")

    # --- generate_mask -------------------------------------------------------------------------------------------

    @turns.turn()
    def generate_mask(
        self,
        image=None,
        target_prompt: str | list[str] | None = None,
        target_negative_prompt: str | list[str] | None = None,
        target_prompt_embeds=None,
        target_negative_prompt_embeds=None,
        source_prompt: str | list[str] | None = None,
        source_negative_prompt: str | list[str] | None = None,
        source_prompt_embeds=None,
        source_negative_prompt_embeds=None,
        num_maps_per_mask: int | None = 10,
        mask_encode_strength: float | None = 0.5,
        mask_thresholding_ratio: float | None = 3.0,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        generator=None,
        output_type: str | None = "np",
        cross_attention_kwargs: dict[str, Any] | None = None,
        *,
        per_image_clamp: bool = False,
        corrected_guidance: bool = False,
        outlier_quantile: float | None = None,
        mask_options: masks.MaskOptions | None = None,
        return_map: bool = False,
    ):
        """Where the picture has to change: the thresholded difference of noise predictions for two prompts.

        Section 3.2 of arXiv 2210.11427; the reference's method of the same name. The clamp is a mean over the whole
        batch, as there, so a picture's mask depends on which others are in the batch; ``per_image_clamp`` undoes that.

        Args:
            image: what to edit: a PIL picture, an array (H, W, 3) or (B, H, W, 3) in [0, 1] or uint8, a tensor
                (3, H, W) or (B, 3, H, W), or a list of one of these; or latents (B, C, h, w), which skip the VAE.
                Sizes go down to the next multiple of 8 (of ``vae_scale_factor``). One picture serves any number of
                prompts.
            target_prompt: what it shall show, str or list of B str.
            target_negative_prompt: what the target is guided away from, of the same type; None is the empty text.
                Without guidance it has no effect.
            target_prompt_embeds: embeddings (B, L, D) instead of ``target_prompt``.
            target_negative_prompt_embeds: embeddings (B, L, D) instead of ``target_negative_prompt``.
            source_prompt: what it shows now, str or list of B str.
            source_negative_prompt: what the source is guided away from, as ``target_negative_prompt``.
            source_prompt_embeds: embeddings (B, L, D) instead of ``source_prompt``.
            source_negative_prompt_embeds: embeddings (B, L, D) instead of ``source_negative_prompt``.
            num_maps_per_mask: over how many noises the map is averaged, at least 1. More is steadier and takes
                longer in proportion.
            mask_encode_strength: noise level at which the predictions are compared, in (0, 1]; 0.5 is the middle of
                the schedule.
            mask_thresholding_ratio: above 0. The map is clamped to this multiple of its mean, and the mask is where
                it exceeds half the clamp: a higher ratio makes a smaller mask.
            num_inference_steps: 1 to 1000; only decides how finely ``mask_encode_strength`` picks the noise level.
            guidance_scale: weight of the prompts over the negatives, at least 0; 1 or less switches guidance off. As
                long as source and target have the same negative, the mask hardly depends on it.
            generator: None (different each time), an int seed (PyTorch's noise of that seed), a
                ``mindiffedit.Generator`` or ``numpy.random.Generator`` (whose position moves on), or a list with one
                of these for each of B * num_maps_per_mask samples, which makes a sample independent of its
                batch-mates. All noise is drawn on the host: a seed gives the same on every device.
            output_type: "np" or "pil".
            cross_attention_kwargs: {"scale": s} weighs LoRAs, of the UNet only; other plain values (numbers, str, bool,
                None) are handed to the UNet's attention.
            per_image_clamp: clamp each map at a multiple of its own mean, not of the batch's (C4).
            corrected_guidance: guide away from the negatives, not towards them (C1).
            outlier_quantile: before the mean over maps, bring each map's values beyond this quantile of them, in
                (0, 1], down to it (section 3.2 of the paper: extreme values are removed); None leaves them.
            mask_options: how the map becomes a mask (``MaskOptions``); None is the reference's threshold.
            return_map: return the pair of the mask and the map that it was made of, float32 (B, h, w), at least 0.

        Returns:
            With "np" an int64 array (B, h, w) of 0 and 1 on the latents' grid, float32 in [0, 1] with soft masks; with
            "pil" a list of B one-channel pictures, 0 to 255.

        Raises:
            ValueError: for a value that does not fit, before any model runs; also for equal source and target
                prompts, which leave no difference to make a mask of.
            TypeError: for a wrong type, before any model runs.
            NumericalError: for NaN or inf in a stage, or predictions that do not differ at all.
        """
        # 1. Check inputs
        options.check_guidance_scale(guidance_scale)
        is_guided = guidance_scale > 1.0
        batch = self._check_prompts(
            target_prompt,
            target_negative_prompt,
            target_prompt_embeds,
            target_negative_prompt_embeds,
            is_guided,
            "target_",
        )
        sources = self._check_prompts(
            source_prompt,
            source_negative_prompt,
            source_prompt_embeds,
            source_negative_prompt_embeds,
            is_guided,
            "source_",
        )
        if sources != batch:
            raise InputError(
                "There are {sources} source prompts for {batch} target prompts; give as many of each.",
                parameter="source_prompt",
                sources=sources,
                batch=batch,
            )
        options.check_positive_int("num_maps_per_mask", num_maps_per_mask)
        options.check_strength(mask_encode_strength, "mask_encode_strength")
        options.check_ratio(mask_thresholding_ratio)
        options.check_steps(num_inference_steps)
        options.effective_steps(num_inference_steps, mask_encode_strength, "mask_encode_strength")
        options.check_output_type(output_type, ("np", "pil"))
        options.check_switch(per_image_clamp, "per_image_clamp")
        options.check_switch(corrected_guidance, "corrected_guidance")
        options.check_switch(return_map, "return_map")
        options.check_quantile(outlier_quantile)
        mask_options = masks.checked_options(mask_options)
        same_negatives = _texts(target_negative_prompt, batch) == _texts(source_negative_prompt, batch) and (
            target_negative_prompt_embeds is None and source_negative_prompt_embeds is None
        )
        if (
            target_prompt is not None
            and source_prompt is not None
            and (_texts(target_prompt, batch) == _texts(source_prompt, batch) and (same_negatives or not is_guided))
        ):
            raise InputError(
                "Source and target prompt are the same ({text!r}), so there is no difference to make a mask of; say in "
                "the target prompt what should change.",
                parameter="target_prompt",
                text=target_prompt,
            )
        source = randomness.resolve(generator)
        attention_kwargs = self._attention_kwargs(cross_attention_kwargs)
        scheduler = self._ready_scheduler()
        # 4. Preprocess image
        pixels = self._pixels(image, batch)
        self._check_sources(source, pixels, batch, num_maps_per_mask)
        # 5. Set timesteps (before the models run, so that a bad schedule fails first)
        timesteps, _ = self._schedule(scheduler, self.get_timesteps, num_inference_steps, mask_encode_strength)
        timestep = self._crosses("timestep", np.asarray(timesteps[0]))

        # 2. to 8., up to the map
        maps = self._mask_map(
            pixels,
            batch,
            num_maps_per_mask,
            timestep,
            guidance_scale,
            source,
            scheduler,
            (target_prompt, target_negative_prompt, target_prompt_embeds, target_negative_prompt_embeds),
            (source_prompt, source_negative_prompt, source_prompt_embeds, source_negative_prompt_embeds),
            attention_kwargs,
            corrected_guidance,
            outlier_quantile,
        )

        maps = self._crosses("map", maps)

        # 8. The mask. D4: without `per_image_clamp` the clamp is a mean over the whole batch, as in the reference.
        clamp = self._crosses("clamp_magnitude", masks.clamp_of(maps, mask_thresholding_ratio, per_image_clamp))
        guides = None
        if mask_options.edges:
            guides = edges.guides_of(pixels, maps.shape[1:])
            guides = np.concatenate([guides] * (batch // len(guides)))
        mask = self._crosses("mask", masks.mask_of(maps, options=mask_options, clamp=clamp, guides=guides))

        # 9. Convert
        converted = pictures.mask_to_pil(mask) if output_type == "pil" else mask
        return (converted, maps) if return_map else converted

    def _mask_map(
        self,
        pixels,
        batch,
        copies,
        timestep,
        guidance_scale,
        source,
        scheduler,
        target_texts,
        source_texts,
        attention_kwargs,
        corrected_guidance=False,
        outlier_quantile=None,
    ) -> np.ndarray:
        """The averaged noise difference before the threshold, (B, h, w) float32, at least 0."""
        is_guided = guidance_scale > 1.0

        # 3. Encode input prompts. D10: `scale` does not reach the text encoder's LoRAs here, nor in `invert`.
        def encode(texts, prefix):
            prompt, negative, embeds, negative_embeds = texts
            return self._encode_prompt_arrays(
                prompt, copies, is_guided, negative, embeds, negative_embeds, prefix=prefix
            )

        target, target_negative = encode(target_texts, "target_")
        origin, origin_negative = encode(source_texts, "source_")
        if target.shape != origin.shape:
            raise InputError(
                "Source and target embeddings have the shapes {source} and {target}; they have to match.",
                parameter="target_prompt_embeds",
                source=origin.shape,
                target=target.shape,
            )

        # 6. Image latents, noised
        latents = self._image_latents(pixels, batch, copies, source)
        noise = self._crosses("noise", self._noise(latents.shape, source))
        noised = self._crosses("noised_latents", self._noised(scheduler, latents, noise, timestep))
        noised = self._scaled_input(scheduler, noised, timestep)

        # 7. Predict the noise for both prompts and, where their negatives differ, for these
        on_source, on_target = np.split(
            self._noise_predictions("noise_predictions", noised, timestep, [origin, target], attention_kwargs),
            2,
        )
        difference = on_target - on_source
        # D1: the reference takes the negative for the prompt and the prompt for the negative here, which turns the
        # guidance round: each prediction is p + scale * (negative - p). Kept, unless the correction is asked for.
        scale = np.float32(guidance_scale)
        if is_guided and np.array_equal(origin_negative, target_negative):
            # B9: one negative's prediction, twice, cancels: what remains of the reference's four is this.
            difference *= scale if corrected_guidance else np.float32(1) - scale
        elif is_guided:
            negatives = self._noise_predictions(
                "negative_noise_predictions",
                noised,
                timestep,
                [origin_negative, target_negative],
                attention_kwargs,
            )
            on_source_negative, on_target_negative = np.split(negatives, 2)
            pairs = [(on_source, on_source_negative), (on_target, on_target_negative)]
            if corrected_guidance:
                pairs = [(negative, positive) for positive, negative in pairs]
            source_noise, target_noise = (start + scale * (end - start) for start, end in pairs)
            difference = target_noise - source_noise

        # 8. Mean over maps and channels of the absolute difference
        difference = np.abs(difference)
        difference = difference.reshape(batch, copies, *difference.shape[1:])
        if outlier_quantile is not None:
            most = np.quantile(difference, outlier_quantile, axis=(2, 3, 4), keepdims=True)
            difference = np.minimum(difference, most.astype(np.float32))
        return difference.mean(axis=(1, 2), dtype=np.float64).astype(np.float32)

    def _noise_predictions(self, stage, noised, timestep, branches, attention_kwargs) -> np.ndarray:
        """Model outputs of the same latents for several embeddings, one branch after the other."""
        predict = self._stages.predictor(np.concatenate(branches), attention_kwargs, self.unet_batch_size)
        outputs = []
        with self.progress_bar(total=len(predict)) as bar:
            for output in predict.stream(np.concatenate([noised] * len(branches)), timestep):
                options.check_finite(output, "mask noise prediction", len(outputs))
                outputs.append(output)
                bar.update()
        return self._crosses(stage, np.concatenate(outputs))

    # --- invert --------------------------------------------------------------------------------------------------

    @turns.turn()
    def invert(
        self,
        prompt: str | list[str] | None = None,
        image=None,
        num_inference_steps: int = 50,
        inpaint_strength: float = 0.8,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        generator=None,
        prompt_embeds=None,
        negative_prompt_embeds=None,
        decode_latents: bool = False,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback: Callable[[int, int, Any], None] | None = None,
        callback_steps: int | None = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        lambda_auto_corr: float = 20.0,
        lambda_kl: float = 20.0,
        num_reg_steps: int = 0,
        num_auto_corr_rolls: int = 5,
        *,
        inversion_iterations: int = 0,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ):
        """Latents of the picture, step by step from nearly clean to noisy, along the inverse scheduler.

        The reference's method of the same name; for DDIM, the encoding of section 3.2 of arXiv 2210.11427.

        Args:
            prompt: what the picture shows, str or list of B str.
            image: as for ``generate_mask``.
            num_inference_steps: steps of the whole schedule, 1 to 1000.
            inpaint_strength: share of them that runs, in (0, 1]: T = floor(steps * strength). Give the edit the same
                two numbers.
            guidance_scale: weight of the prompt over the negative; 1 or less is without guidance, which is what the
                paper does here and what reconstructs best. The default is the reference's.
            negative_prompt: what to guide away from, of ``prompt``'s type; None is the empty text.
            generator: of the VAE's posterior draw and the regulariser's shifts, as for ``generate_mask``; a list has
                B entries.
            prompt_embeds: embeddings (B, L, D) instead of ``prompt``.
            negative_prompt_embeds: embeddings (B, L, D) instead of ``negative_prompt``.
            decode_latents: also decode the latents of every step into pictures.
            output_type: of those pictures: "pil", or "np" for an array (B * T, H, W, 3) in [0, 1].
            return_dict: False returns the tuple (latents, images).
            callback: called as ``callback(step, timestep, latents)``.
            callback_steps: every how many steps, at least 1.
            cross_attention_kwargs: as for ``generate_mask``.
            lambda_auto_corr: weight of the regulariser's pull against correlated neighbours, at least 0; 0 is off.
            lambda_kl: weight of its pull towards mean 0 and variance 1, at least 0; 0 is off.
            num_reg_steps: how often each noise prediction is pulled towards white noise before it is used
                (Pix2Pix-Zero, arXiv 2302.03027); 0 is off. Slower, since the step is then not one graph.
            num_auto_corr_rolls: over how many random shifts the first pull is taken, at least 0.
            inversion_iterations: so many more UNet evaluations for each step of DDIM, which bring its result nearer to
                what a step of the edit leads back from (fixed-point iteration of the implicit update); 0 is off.
            callback_on_step_end: called after every step as ``callback(pipeline, step, timestep, tensors)`` with a dict
                of the tensors named; "latents" and "prompt_embeds" in a dict that it returns replace these.
            callback_on_step_end_tensor_inputs: names of these tensors, out of "latents", "prompt_embeds" (as the UNet
                takes them: negatives first with guidance) and "pred_original_sample" (None where the solver gives
                none).

        Returns:
            DiffEditInversionPipelineOutput: ``latents``, a tensor (B, T, C, h, w) with the noisiest first; ``images``,
            None without ``decode_latents``; and ``clean_latents`` (B, C, h, w), where it began.

        Raises:
            ValueError: for a value that does not fit, before any model runs; also for a scheduler without inverse.
            TypeError: for a wrong type, before any model runs.
            NumericalError: for NaN or inf, naming stage and step.
        """
        # 1. Check inputs
        options.check_guidance_scale(guidance_scale)
        is_guided = guidance_scale > 1.0
        batch = self._check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, is_guided)
        options.check_strength(inpaint_strength, "inpaint_strength")
        options.check_steps(num_inference_steps)
        options.effective_steps(num_inference_steps, inpaint_strength, "inpaint_strength")
        if decode_latents:
            options.check_output_type(output_type, ("pil", "np"))
        options.check_callback(callback, callback_steps)
        options.check_regularisation(lambda_auto_corr, lambda_kl, num_reg_steps, num_auto_corr_rolls)
        options.check_count(inversion_iterations, "inversion_iterations", options.MAX_ITERATIONS)
        tensor_inputs = options.check_step_callback(
            callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        )
        source = randomness.resolve(generator)
        attention_kwargs = self._attention_kwargs(cross_attention_kwargs)
        scheduler = self._ready_inverse_scheduler()
        if inversion_iterations > 0 and type(scheduler).__name__ != "DDIMInverseScheduler":
            raise InputError(
                "{parameter} refines DDIM's inversion, but that of this {scheduler} is {inverse!t}; set it to 0, or choose "
                "DDIM as {scheduler}.",
                parameter="inversion_iterations",
                inverse=scheduler,
            )
        if inversion_iterations > 0 and num_reg_steps > 0:
            raise InputError(
                "{parameter} and {num_reg_steps} exclude each other; set one of the two to 0.",
                parameter="inversion_iterations",
            )
        if num_reg_steps > 0 and is_guided and batch > 1 and scheduler.config.prediction_type != "epsilon":
            raise InputError(  # D7
                "{parameter} with guidance and prediction type {kind!r} works for one prompt at a time, but {batch} were "
                "given; set {guidance_scale=1} or invert them one by one.",
                parameter="num_reg_steps",
                kind=scheduler.config.prediction_type,
                batch=batch,
            )
        pixels = self._pixels(image, batch)
        self._check_sources(source, pixels, batch, 1)
        # 6. Prepare timesteps (before the models run, so that a bad schedule fails first)
        timesteps, steps = self._schedule(scheduler, self.get_inverse_timesteps, num_inference_steps, inpaint_strength)
        timesteps = self._crosses("timesteps", timesteps)

        # 2. to 4. Picture to latents
        latents = self._image_latents(pixels, batch, 1, source)

        # 5. Encode input prompt
        embeds = self._joined_embeds(prompt, 1, is_guided, negative_prompt, prompt_embeds, negative_prompt_embeds)

        # 7. Noising loop
        def regularised(noise_pred, model_input, t):
            return regularisers.regularise(
                noise_pred,
                model_input,
                scheduler.alphas_cumprod.asnumpy()[int(t)],
                scheduler.config.prediction_type,
                lambda n: randomness.randint(n, source),
                lambda_auto_corr,
                lambda_kl,
                num_reg_steps,
                num_auto_corr_rolls,
            )

        inverted, _ = self._run(
            "inverted_latents",
            scheduler,
            timesteps,
            steps,
            latents,
            embeds,
            guidance_scale,
            attention_kwargs,
            callback,
            callback_steps,
            source=source,
            regularise=regularised if num_reg_steps > 0 else None,
            iterations=inversion_iterations,
            step_callback=callback_on_step_end,
            tensor_inputs=tensor_inputs,
        )
        stacked = np.stack(inverted[::-1], axis=1)

        # 8. and 9. Post-processing
        images = None
        if decode_latents:
            images = self._decoded(stacked.reshape(-1, *stacked.shape[2:]))
            images = pictures.postprocess_image(images, output_type)
        result = self._tensor(stacked, self.unet.dtype)
        if not return_dict:
            return result, images
        clean = self._tensor(latents, self.unet.dtype)
        return DiffEditInversionPipelineOutput(latents=result, images=images, clean_latents=clean)

    def _joined_embeds(
        self,
        prompt,
        copies,
        is_guided,
        negative_prompt,
        prompt_embeds,
        negative_prompt_embeds,
        skip=None,
        lora_scale=1.0,
    ):
        """Embeddings as the step takes them: negatives first with guidance."""
        positive, negative = self._encode_prompt_arrays(
            prompt,
            copies,
            is_guided,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            skip,
            lora_scale=lora_scale,
        )
        return np.concatenate([negative, positive]) if is_guided else positive

    def _decoded(self, latents: np.ndarray) -> np.ndarray:
        images = self._stages.decode_latents(latents / np.float32(self.vae.config.scaling_factor))
        options.check_finite(images, "VAE decoding")
        return self._crosses("decoded", images)

    def _run(
        self,
        stage,
        scheduler,
        timesteps,
        steps,
        latents,
        embeds,
        guidance_scale,
        attention_kwargs,
        callback,
        callback_steps,
        *,
        mask=None,
        backgrounds=None,
        eta=0.0,
        source=None,
        regularise=None,
        iterations=0,
        step_callback=None,
        tensor_inputs=(),
    ) -> tuple[list[np.ndarray], np.ndarray | None]:
        """The loop of ``invert`` (no mask) and of the edit.

        Args:
            stage: "inverted_latents" or "edited_latents".

        Returns:
            The latents after every step, each (B, C, h, w) float32; and the UNet's outputs in the first step, negatives
            first with guidance, None where it ran with the scheduler's own ``step``.
        """
        is_guided = guidance_scale > 1.0
        predict = self._stages.predictor(embeds, attention_kwargs, self.unet_batch_size)
        plan = None
        if hasattr(scheduler, "plan"):
            accepts_eta = "eta" in inspect.signature(scheduler.plan).parameters
            plan = scheduler.plan(timesteps, eta) if accepts_eta else scheduler.plan(timesteps)
        if plan is not None:
            plan = dataclasses.replace(plan, coefficients=self._crosses("coefficients", plan.coefficients))
        if plan is not None and regularise is None:
            refine = self._refinement(scheduler, predict, is_guided, iterations)
            advance = self._fused_advance(plan, predict, guidance_scale, latents, mask, source, refine, backgrounds)
        else:
            advance = self._stepwise_advance(
                scheduler,
                predict,
                guidance_scale,
                is_guided,
                mask,
                backgrounds,
                eta,
                source,
                regularise,
            )
        warmup = len(timesteps) - steps * scheduler.order
        results, first_predictions = [], None
        with self.progress_bar(total=steps) as bar:
            for i, t in enumerate(timesteps):
                latents, clean, predictions = advance(i, t, latents)
                first_predictions = predictions if i == 0 else first_predictions
                options.check_finite(latents, "edit" if stage == "edited_latents" else "inversion", i)
                latents = self._crosses(stage, latents, i)
                if step_callback is not None:
                    tensors = {"latents": latents, "prompt_embeds": embeds, "pred_original_sample": clean}
                    latents, embeds = self._step_ended(
                        step_callback, i, t, tensors, tensor_inputs, latents, embeds, predict
                    )
                results.append(latents)
                if i == len(timesteps) - 1 or ((i + 1) > warmup and (i + 1) % scheduler.order == 0):
                    bar.update()
                    if callback is not None and i % callback_steps == 0:
                        given = self._tensor(latents, self.unet.dtype)
                        with turns.turn_given_up():
                            callback(i // scheduler.order, t, given)
        return results, first_predictions

    def _step_ended(self, callback, i, t, tensors, names, latents, embeds, predict):
        """Calls ``callback_on_step_end``; returns the latents and embeddings to go on with."""
        given = {
            name: None if tensors[name] is None else self._tensor(tensors[name], self.unet.dtype) for name in names
        }
        with turns.turn_given_up():
            changed = callback(self, i, t, given)
        if changed is None:
            return latents, embeds
        if not isinstance(changed, dict):
            raise InputTypeError(
                "{parameter} has to return a dict or None, but returned {changed!t}.",
                parameter="callback_on_step_end",
                changed=changed,
            )
        found = []
        for name, before in (("latents", latents), ("prompt_embeds", embeds)):
            after = before
            if changed.get(name) is not None and changed[name] is not given.get(name):
                after = to_numpy(changed[name]).astype(np.float32)
                if after.shape != before.shape:
                    raise InputError(
                        "{parameter} returned {what} of shape {shape}; it has to stay {expected}.",
                        parameter="callback_on_step_end",
                        what=named(name),
                        shape=after.shape,
                        expected=before.shape,
                    )
                options.check_finite(after, f"`{name}` returned by callback_on_step_end", i)
            found.append(after)
        if found[1] is not embeds:
            predict.replace(found[1])
        return tuple(found)

    def _fused_advance(self, plan, predict, guidance_scale, like, mask, source, refine, backgrounds):
        """The compiled UNet, then everything else of the step in a second graph."""
        is_guided = guidance_scale > 1.0
        update = self._stages.update(plan, is_guided)
        zeros = np.zeros(like.shape, np.float32)
        inside = np.ones((like.shape[0], 1, *like.shape[2:]), np.float32) if mask is None else mask
        previous_clean = zeros

        def advance(i, t, latents):
            nonlocal previous_clean
            predictions = predict(np.concatenate([latents, latents]) if is_guided else latents, t)
            self._shows("predictions", predictions, i)
            rest = (
                guidance_scale,
                plan.coefficients[i],
                inside,
                zeros if backgrounds is None else backgrounds[i],
                self._crosses("step_noise", self._noise(like.shape, source), i) if plan.noisy else zeros,
            )
            updated, previous_clean = update(latents, previous_clean, predictions, *rest)
            if refine is not None:
                updated, previous_clean = refine(t, latents, updated, rest)
            if plan.solver == "dpm":
                # The one other thing that a step hands to the next.
                previous_clean = self._crosses("clean_predictions", previous_clean, i)
            else:
                self._shows("clean_predictions", previous_clean, i)
            return updated, previous_clean, predictions

        return advance

    def _refinement(self, scheduler, predict, is_guided, iterations):
        """The fixed-point iteration of an inverse DDIM step, or None.

        The step back from x' predicts the noise at x', the inverse step at x, before it. The x' that is led back to x
        exactly solves x' = a x + b epsilon(x', t), which is iterated, from the inverse step's result on.
        """
        if iterations == 0:
            return None
        kind = scheduler.config.prediction_type
        update = self._stages.update(
            schedules.StepPlan("ddim", "epsilon", None, np.zeros((0, 5), np.float32)), is_guided
        )

        def refine(t, latents, updated, rest):
            scale, spread = scheduler.noise_scale(t)
            for _ in range(iterations):
                arrived = np.concatenate([updated, updated]) if is_guided else updated
                output = predict(arrived, t)
                if kind == "v_prediction":
                    output = scale * output + spread * arrived
                elif kind == "sample":
                    output = (arrived - scale * output) / spread
                updated, clean = update(latents, np.zeros_like(latents), output, *rest)
            return updated, clean

        return refine

    def _stepwise_advance(
        self,
        scheduler,
        predict,
        guidance_scale,
        is_guided,
        mask,
        backgrounds,
        eta,
        source,
        regularise,
    ):
        """The compiled UNet with guidance, then the scheduler's own ``step``: any scheduler, any option."""
        import mindspore as ms

        from mindiffedit.runtime.kernels import eagerly
        from mindiffedit.stages import guided

        scheduler = copy.deepcopy(scheduler)  # it keeps what it has seen from step to step, and may be shared
        accepted = inspect.signature(scheduler.step).parameters
        extra = {"eta": eta} if "eta" in accepted else {}
        wants_noise = "variance_noise" in accepted
        stochastic = (eta > 0 and "eta" in accepted) or "sde" in str(scheduler.config.get("algorithm_type", ""))

        def draw(shape):
            return self._crosses("step_noise", self._noise(shape, source), step)

        if not wants_noise and "generator" in accepted:
            extra["generator"] = randomness.Draws(draw)
        step = 0

        def advance(i, t, latents):
            nonlocal step
            step = i
            model_input = self._scaled_input(scheduler, latents, t)
            doubled = np.concatenate([model_input] * 2) if is_guided else model_input
            output = predict(doubled, t)
            if is_guided:
                output = guided(output, np.float32(guidance_scale))
            if regularise is not None:
                output = regularise(output, doubled, t)
            if wants_noise and stochastic:
                extra["variance_noise"] = ms.Tensor(draw(latents.shape))
            with eagerly():
                done = scheduler.step(
                    ms.Tensor(output),
                    as_its_own(scheduler, t),
                    ms.Tensor(latents),
                    **extra,
                    return_dict=True,
                )
            updated = done["prev_sample"].asnumpy()
            clean = done["pred_original_sample"].asnumpy() if "pred_original_sample" in done else None
            if clean is not None:
                self._shows("clean_predictions", clean, i)
            if mask is not None:
                updated = updated * mask + backgrounds[i] * (1 - mask)
            return updated, clean, None

        return advance

    # --- the edit ------------------------------------------------------------------------------------------------

    @turns.turn()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        mask_image=None,
        image_latents=None,
        inpaint_strength: float | None = 0.8,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator=None,
        latents=None,
        prompt_embeds=None,
        negative_prompt_embeds=None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback: Callable[[int, int, Any], None] | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int = None,
        *,
        clean_latents=None,
        soft_mask: bool = False,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ):
        """The edit: denoise towards ``prompt`` inside the mask, keep the inverted latents outside.

        Section 3.2 of arXiv 2210.11427, step 3; the reference's call.

        Args:
            prompt: what the picture shall show, str or list of B str.
            mask_image: where it may change, on the latents' grid: (h, w), (B, h, w) or (B, 1, h, w) in [0, 1], as
                array, tensor or PIL picture (white changes), or a list of one of these; or of the size of the picture
                that the latents are of (W10). From 0.5 on a value counts as 1. One mask serves all B.
            image_latents: from ``invert``: (B, T, C, h, w), noisiest first, or (B * T, C, h, w) with the steps of one
                picture in a row.
            inpaint_strength: as given to ``invert``.
            num_inference_steps: as given to ``invert``.
            guidance_scale: how strongly to follow the prompt, at least 0; 1 or less is without guidance.
            negative_prompt: what to move away from, of ``prompt``'s type, usually the source prompt; None is the
                empty text.
            num_images_per_prompt: results for each prompt, at least 1. They differ only with ``eta`` above 0.
            eta: noise added in each DDIM step, in [0, 1]: 0 none, 1 as much as DDPM. DPM-Solver++ ignores it.
            generator: of that noise, as for ``generate_mask``; a list has B * num_images_per_prompt entries.
            latents: accepted and not used, as in the reference: the edit starts from ``image_latents``.
            prompt_embeds: embeddings (B, L, D) instead of ``prompt``.
            negative_prompt_embeds: embeddings (B, L, D) instead of ``negative_prompt``.
            output_type: "pil", "np" for an array (B, H, W, 3) in [0, 1], or "latent" for a tensor (B, C, h, w).
            return_dict: False returns the tuple (images, nsfw_content_detected).
            callback: called as ``callback(step, timestep, latents)``.
            callback_steps: every how many steps, at least 1.
            cross_attention_kwargs: {"scale": s} weighs LoRAs, of UNet and text encoder; others as for
                ``generate_mask``.
            clip_skip: leave out this many of the text encoder's last layers; for the prompt only, as in the
                reference.
            clean_latents: (B, C, h, w), ``invert``'s of that name: each step's background is then taken at the noise
                level that the step arrives at, and the last is these; None is one level late, as in the reference (C3).
            soft_mask: whether values between 0 and 1 blend; otherwise they are rounded, as in the reference.
            callback_on_step_end: as for ``invert``.
            callback_on_step_end_tensor_inputs: as for ``invert``.

        Returns:
            StableDiffusionPipelineOutput: ``images``, B * num_images_per_prompt of them, and
                ``nsfw_content_detected``, a list of bool from the safety checker or None without one. A flagged
                picture comes back black.

        Raises:
            ValueError: for a value that does not fit, before any model runs.
            TypeError: for a wrong type, before any model runs.
            NumericalError: for NaN or inf, naming stage and step.
        """
        options.check_output_type(output_type, ("pil", "np", "latent"))
        edited, _ = self._edited_latents(
            prompt,
            mask_image,
            image_latents,
            inpaint_strength,
            num_inference_steps,
            guidance_scale,
            negative_prompt,
            num_images_per_prompt,
            eta,
            generator,
            prompt_embeds,
            negative_prompt_embeds,
            callback,
            callback_steps,
            cross_attention_kwargs,
            clip_skip,
            clean_latents,
            soft_mask,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )

        # 9. Decode, check, convert
        flags = None
        if output_type == "latent":
            images = self._tensor(edited, self.unet.dtype)
        else:
            images, flags = self.run_safety_checker(self._decoded(edited))
            normalised = None if flags is None else [not flag for flag in flags]
            images = pictures.postprocess_image(images, output_type, normalised)
        if not return_dict:
            return images, flags
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flags)

    def _edited_latents(
        self,
        prompt=None,
        mask_image=None,
        image_latents=None,
        inpaint_strength=0.8,
        num_inference_steps=50,
        guidance_scale=7.5,
        negative_prompt=None,
        num_images_per_prompt=1,
        eta=0.0,
        generator=None,
        prompt_embeds=None,
        negative_prompt_embeds=None,
        callback=None,
        callback_steps=1,
        cross_attention_kwargs=None,
        clip_skip=None,
        clean_latents=None,
        soft_mask=False,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs=("latents",),
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The call up to its latents, (B, C, h, w) float32; and the UNet's outputs in the first step, see ``_run``."""
        # 1. Check inputs
        options.check_guidance_scale(guidance_scale)
        is_guided = guidance_scale > 1.0
        batch = self._check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, is_guided)
        options.check_strength(inpaint_strength, "inpaint_strength")
        options.check_steps(num_inference_steps)
        options.effective_steps(num_inference_steps, inpaint_strength, "inpaint_strength")
        options.check_positive_int("num_images_per_prompt", num_images_per_prompt)
        options.check_eta(eta)
        options.check_callback(callback, callback_steps)
        if clip_skip is not None:
            options.check_clip_skip(clip_skip, self.text_encoder.config.num_hidden_layers)
        if mask_image is None:
            raise InputError(
                "{parameter} is missing; `generate_mask` computes one from two prompts.",
                parameter="mask_image",
            )
        if image_latents is None:
            raise InputError(
                "{parameter} is missing; `invert` computes them from a picture.", parameter="image_latents"
            )
        options.check_switch(soft_mask, "soft_mask")
        tensor_inputs = options.check_step_callback(
            callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        )
        source = randomness.resolve(generator)
        if isinstance(source, list) and len(source) > 1 and eta > 0:
            options.check_generators(source, batch * num_images_per_prompt)
        attention_kwargs = self._attention_kwargs(cross_attention_kwargs)
        scheduler = self._ready_scheduler()

        # 4. Preprocess mask (before the prompts are encoded, so that bad input fails first)
        mask = masks.preprocess_mask(mask_image, batch, soft=soft_mask)
        array = self._latents_array(image_latents)
        latent_shape = (self.vae.config.latent_channels, *array.shape[-2:])
        if array.ndim >= 4 and mask.shape[-2:] != array.shape[-2:]:
            mask = masks.on_latents(mask_image, array.shape[-2:], self.vae_scale_factor, batch, soft_mask)
        # D2: the reference repeats the batch of masks as a whole but each picture's latents one after the other, so
        # that with several prompts and several images for each the masks change places. Kept.
        mask = np.concatenate([np.broadcast_to(mask, (batch, *mask.shape[1:]))] * num_images_per_prompt)

        # 5. Set timesteps
        timesteps, steps = self._schedule(scheduler, self.get_timesteps, num_inference_steps, inpaint_strength)
        timesteps = self._crosses("timesteps", timesteps)

        # 6. Preprocess image latents
        array = options.check_image_latents(array, batch, len(timesteps), latent_shape)
        start = array[:, 0]
        if clean_latents is not None:
            # C3: what step i arrives at is where step i + 1 begins, and the last arrives at the clean latents.
            clean = options.check_clean_latents(clean_latents, (batch, *latent_shape))
            array = np.concatenate([array[:, 1:], clean[:, None]], axis=1)
        start = np.repeat(start, num_images_per_prompt, axis=0).astype(np.float32)
        backgrounds = np.repeat(np.swapaxes(array, 0, 1), num_images_per_prompt, axis=1).astype(np.float32)

        # 3. Encode input prompt
        embeds = self._joined_embeds(
            prompt,
            num_images_per_prompt,
            is_guided,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            clip_skip,
            attention_kwargs.get("scale", 1.0),
        )

        # 8. Denoising loop. D3: without clean latents the background of step i is image_latents[i], one noise level late,
        # as in the reference.
        edited, first_predictions = self._run(
            "edited_latents",
            scheduler,
            timesteps,
            steps,
            start,
            embeds,
            guidance_scale,
            attention_kwargs,
            callback,
            callback_steps,
            mask=mask,
            backgrounds=backgrounds,
            eta=eta,
            source=source,
            step_callback=callback_on_step_end,
            tensor_inputs=tensor_inputs,
        )
        return edited[-1], first_predictions

    @staticmethod
    def _latents_array(image_latents) -> np.ndarray:
        if isinstance(image_latents, (list, tuple)):
            parts = [to_numpy(part) for part in image_latents]
            parts = [part[None] if part.ndim == 3 else part for part in parts]
            if not parts or len({part.shape[1:] for part in parts}) > 1:
                shapes = [part.shape for part in parts]
                raise InputError(
                    "{parameter} has to be a list of latents of one shape, but has {shapes!r}.",
                    parameter="image_latents",
                    shapes=shapes,
                )
            return np.concatenate(parts)
        array = to_numpy(image_latents)
        return array[None] if array.ndim == 3 else array

    @turns.turn()
    def run_safety_checker(self, images: np.ndarray):
        """Blackens the pictures that the safety checker flags.

        Args:
            images: float array (B, 3, H, W) in [-1, 1].

        Returns:
            The pictures with flagged ones zeroed, and a list of B bool; (images, None) without a checker.
        """
        if self.safety_checker is None:
            return images, None
        import mindspore as ms

        from mindiffedit.runtime.kernels import eagerly

        inputs = self.feature_extractor(pictures.postprocess_image(images, "pil"), return_tensors="np")
        with eagerly():
            # The checker blackens its second argument; only its flags are used, so a token array does.
            flags = (
                self.safety_checker(
                    ms.Tensor(inputs.pixel_values.astype(np.float32)).astype(self.safety_checker.dtype),
                    ms.Tensor(np.ones((len(images), 1), np.float32)),
                )[1]
                .asnumpy()
                .tolist()
            )
        if any(flags):
            logger.warning(
                "The safety checker blackened %d of %d pictures; try another prompt.", sum(flags), len(flags)
            )
            images = np.where(np.array(flags)[:, None, None, None], np.float32(0), images)
        return images, [bool(flag) for flag in flags]
