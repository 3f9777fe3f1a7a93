"""``StableDiffusionDiffEditPipeline``: diffusers' three calls, and ``edit``, over the algorithm of ``diffedit``.

Each call checks what it is given once, into the frozen classes of ``inputs``; prepares what a loop needs, on the host,
with NumPy; runs the loop, in which latents stay on the device; and wraps the results as diffusers does. Models run in
``stages``, solvers come from ``solvers``. Where behaviour differs from the reference, the line carries an id of
``docs/differences.md``.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import ops

from mindiffedit import diffedit, editing, masks, options
from mindiffedit.arrays import to_numpy
from mindiffedit.checkpoints import textual_inversion
from mindiffedit.checkpoints.adapters import Adapters
from mindiffedit.errors import InputError, InputTypeError, named
from mindiffedit.images import edges, pictures
from mindiffedit.inputs import (
    Callbacks,
    EditInputs,
    InvertInputs,
    MaskInputs,
    ModelLimits,
    Prompts,
    Regularisation,
    Schedule,
    checked_rng,
)
from mindiffedit.noise import randomness, regularisers
from mindiffedit.outputs import DiffEditInversionPipelineOutput, DiffEditOutput, StableDiffusionPipelineOutput
from mindiffedit.runtime import turns
from mindiffedit.runtime.graphs import JIT_LEVELS
from mindiffedit.runtime.kernels import eagerly
from mindiffedit.runtime.notices import say_once
from mindiffedit.solvers import schedules
from mindiffedit.solvers.schedulers import inverse_of
from mindiffedit.solvers.solver import Solver, TabulatedSolver, checked_inverse, invertible, ready, remaining, solver_of
from mindiffedit.stages import (
    CompiledUpdate,
    EagerUpdate,
    IntervalPredictor,
    Predictor,
    Stages,
    host,
    is_finite,
    tensor,
)

logger = logging.getLogger(__name__)

Observer = Callable[[str, np.ndarray, "int | None"], "np.ndarray | None"]
"""What ``pipeline.observer`` and ``pipeline.debugging`` take: called as ``observer(stage, array, step)`` with every
array that crosses from one stage to the next, a NumPy array on the host. The pipeline goes on with the array that
``pipeline.observer`` returns, or as it was where that is None. ``step`` counts from 0 in loops and is None elsewhere.

The stages, in order:

- in ``generate_mask``: ``timestep``, ``target_token_ids``, ``target_prompt_embeds`` and their ``negative_`` and
  ``source_`` kin, ``moments``, ``posterior_noise``, ``latents``, ``noise``, ``noised_latents``,
  ``noise_predictions``, ``negative_noise_predictions`` (only where the negatives differ), ``map``,
  ``clamp_magnitude``, ``mask``;
- in ``invert``: ``timesteps``, ``moments``, ``posterior_noise``, ``latents``, ``token_ids``, ``prompt_embeds``,
  their ``negative_`` kin, ``coefficients``, and in each step ``predictions`` (the UNet's outputs, negatives first),
  ``clean_predictions`` (the clean latents that they predict) and ``inverted_latents``; ``decoded``;
- in the call: ``timesteps``, ``token_ids``, ``prompt_embeds``, their ``negative_`` kin, ``coefficients``, and in each
  step ``predictions``, ``step_noise`` (with eta above 0), ``clean_predictions`` and ``edited_latents``; ``decoded``.
"""


class Visit(NamedTuple):
    """An evaluation of the UNet in an inversion: ``outputs`` of it at ``latents``; negatives first with guidance."""

    timestep: Any
    latents: ms.Tensor
    outputs: ms.Tensor


class StableDiffusionDiffEditPipeline(Adapters):
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
        max_graphs (int): compiled graphs kept in memory, eight or so for each size of pictures and one for texts; 17 at
            first, 64 without a compile cache. More keep more sizes at hand.
        jit_level (str): "O0" at first; "O1" has MindSpore fuse operators, on Ascend, for what is compiled from then on.
        vae_scale_factor (int): pixels per latent, 8 for Stable Diffusion.

    Raises:
        ValueError: for a mode that is neither, or a safety checker without feature extractor.
    """

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
        output_type: str = "np",
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
            target_prompt: what it should show, str or list of B str.
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
        self.check_components()
        model, is_guided = self._limits, options.check_guidance_scale(guidance_scale) > 1.0
        target = Prompts.checked(
            model,
            target_prompt,
            target_negative_prompt,
            target_prompt_embeds,
            target_negative_prompt_embeds,
            is_guided,
            "target_",
        )
        source = Prompts.checked(
            model,
            source_prompt,
            source_negative_prompt,
            source_prompt_embeds,
            source_negative_prompt_embeds,
            is_guided,
            "source_",
        )
        options.check_output_type(output_type, ("np", "pil"))
        options.check_switch(return_map, "return_map")
        inputs = MaskInputs.checked(
            model,
            model.pixels(image),
            source,
            target,
            num_maps_per_mask=num_maps_per_mask,
            mask_encode_strength=mask_encode_strength,
            mask_thresholding_ratio=mask_thresholding_ratio,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
            attention_kwargs=self._attention_kwargs(cross_attention_kwargs),
            per_image_clamp=per_image_clamp,
            corrected_guidance=corrected_guidance,
            outlier_quantile=outlier_quantile,
            mask_options=mask_options,
        )
        mask, maps = self._mask(inputs)
        converted = pictures.mask_to_pil(mask) if output_type == "pil" else mask
        return (converted, maps) if return_map else converted

    def _mask(self, inputs: MaskInputs) -> tuple[np.ndarray, np.ndarray]:
        """The mask (B, h, w), and the map (B, h, w) float32 that it was made of."""
        batch, num_maps, guidance_scale = inputs.batch, inputs.num_maps_per_mask, inputs.guidance_scale
        solver = self._solver()
        timestep = self._crosses("timestep", np.asarray(solver.schedule(*inputs.schedule)[0][0]))
        # D10: `scale` does not reach the text encoder's LoRAs here, nor in `invert`.
        target, target_negative = self._embeddings(inputs.target, num_maps)
        source, source_negative = self._embeddings(inputs.source, num_maps)
        if target.shape != source.shape:
            raise InputError(
                "Source and target embeddings have the shapes {source} and {target}; they have to match.",
                parameter="target_prompt_embeds",
                source=source.shape,
                target=target.shape,
            )
        latents = self._image_latents(inputs.pixels, batch, num_maps, inputs.rng)
        noise = self._crosses("noise", self._noise(latents.shape, inputs.rng))
        noised = self._crosses("noised_latents", solver.add_noise(latents, noise, timestep))
        noised = solver.scale_input(tensor(noised), timestep)

        predictions = partial(self._noise_predictions, noised, timestep, inputs)
        on_source, on_target = predictions("noise_predictions", source, target)
        negatives = None
        if guidance_scale > 1.0 and not np.array_equal(source_negative, target_negative):
            negatives = predictions("negative_noise_predictions", source_negative, target_negative)
        difference = diffedit.difference(on_source, on_target, guidance_scale, inputs.corrected_guidance, negatives)
        return self._mask_of(difference, num_maps, inputs)

    def _mask_of_inversion(
        self, inputs: MaskInputs, points: list[Visit], captions: Prompts
    ) -> tuple[np.ndarray, np.ndarray]:
        """What ``_mask`` gives, of the predictions of an inversion where it evaluated the UNet (C11).

        ``captions`` are what it was led by. Where they are the source prompts, without guidance, only the target's
        predictions are missing.
        """
        count = min(inputs.num_maps_per_mask, len(points))
        chosen = points[:: -(len(points) // count)][:count]  # evenly spread, from the noisiest on

        def predictor(prompts: Prompts):
            embeds, _ = self._embeddings(replace(prompts, is_guided=False), 1)
            return self._predictor(embeds, inputs, inputs.batch, [visit.timestep for visit in chosen])

        on_target, on_source = predictor(inputs.target), None
        if captions.is_guided or not captions.same_prompts(inputs.source):
            on_source = predictor(inputs.source)
        differences: list[np.ndarray] = []
        for visit in chosen:
            outputs = visit.outputs if on_source is None else on_source(visit.latents, visit.timestep)
            predictions = [host(outputs), host(on_target(visit.latents, visit.timestep))]
            for output in predictions:
                options.check_finite(output, "mask noise prediction", len(differences))
            both = self._crosses("noise_predictions", np.concatenate(predictions), len(differences))
            source, target = np.split(both, 2)
            differences.append(diffedit.difference(source, target, inputs.guidance_scale, inputs.corrected_guidance))
        return self._mask_of(np.concatenate(np.stack(differences, 1)), count, inputs)

    def _mask_of(self, difference: np.ndarray, num_maps: int, inputs: MaskInputs) -> tuple[np.ndarray, np.ndarray]:
        """Mask and map (B, h, w) of the differences (B N, C, h, w) of noise predictions."""
        maps = self._crosses("map", diffedit.difference_map(difference, num_maps, inputs.outlier_quantile))

        # D4: without `per_image_clamp` the clamp is a mean over the whole batch, as in the reference.
        ratio = inputs.mask_options.clamp_ratio(inputs.mask_thresholding_ratio)
        clamp = masks.clamp_of(maps, ratio, inputs.per_image_clamp)
        clamp = self._crosses("clamp_magnitude", clamp)
        guides = None
        if inputs.mask_options.edges:
            guides = edges.guides_of(inputs.pixels, maps.shape[1:])
            guides = np.concatenate([guides] * (inputs.batch // len(guides)))
        mask = masks.mask_of(maps, options=inputs.mask_options, clamp=clamp, guides=guides)
        return self._crosses("mask", mask), maps

    def _noise_predictions(self, noised: ms.Tensor, timestep, inputs: MaskInputs, stage: str, *embeddings):
        """The UNet's outputs for the same latents with several embeddings: for each an array (B N, C, h, w)."""
        embeds = np.concatenate(embeddings)
        predict = self._predictor(embeds, inputs, inputs.batch, [timestep])
        outputs: list[np.ndarray] = []
        with self.progress_bar(total=len(predict)) as bar:
            for output in map(host, predict.stream(noised, timestep)):
                options.check_finite(output, "mask noise prediction", len(outputs))
                outputs.append(output)
                bar.update()
        return np.split(self._crosses(stage, np.concatenate(outputs)), len(embeddings))

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
        output_type: str = "pil",
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
        inversion_points: int = 0,
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
            inversion_points: evaluate the UNet at so many of the T noise levels only, evenly spread, each with the
                latents that are expected there, and reach the levels between with predictions between (C10); T or more
                is at every level, 0 is off: the inverse scheduler's own steps.
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
        self.check_components()
        model, is_guided = self._limits, options.check_guidance_scale(guidance_scale) > 1.0
        prompts = Prompts.checked(model, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, is_guided)
        if decode_latents:
            options.check_output_type(output_type, ("pil", "np"))
        inputs = InvertInputs.checked(
            model,
            model.pixels(image),
            prompts,
            Schedule.checked(num_inference_steps, inpaint_strength),
            guidance_scale=guidance_scale,
            generator=generator,
            attention_kwargs=self._attention_kwargs(cross_attention_kwargs),
            inversion_iterations=inversion_iterations,
            inversion_points=inversion_points,
            regularisation=Regularisation.checked(lambda_auto_corr, lambda_kl, num_reg_steps, num_auto_corr_rolls),
            callbacks=Callbacks.checked(
                callback, callback_steps, callback_on_step_end, callback_on_step_end_tensor_inputs
            ),
        )
        clean, inverted, _ = self._inverted(inputs)
        latents = self._stacked(inverted)
        images = None
        if decode_latents:
            every = np.swapaxes([host(step) for step in reversed(inverted)], 0, 1)  # float32 whatever the models are
            images = pictures.postprocess_image(self._decoded(every.reshape(-1, *every.shape[2:])), output_type)
        if not return_dict:
            return latents, images
        return DiffEditInversionPipelineOutput(latents, images, self._result(clean))

    def _inverse_solver(self, inputs: InvertInputs) -> Solver:
        """The inverse scheduler in use, if it can do what is asked for."""
        solver = self._solver(inverse=True)
        if inputs.inversion_iterations > 0 and not solver.refines_inversion:
            raise InputError(
                "{parameter} refines DDIM's inversion, but that of this {scheduler} is {inverse}; set it to 0, or "
                "choose DDIM as {scheduler}.",
                parameter="inversion_iterations",
                inverse=solver.name,
            )
        regularised_guided = inputs.regularisation.num_reg_steps > 0 and inputs.guidance_scale > 1.0
        if regularised_guided and inputs.prompts.batch > 1 and solver.prediction_type != "epsilon":
            raise InputError(  # D7
                "{parameter} with guidance and prediction type {kind!r} works for one prompt at a time, but {batch} "
                "were given; set {guidance_scale=1} or invert them one by one.",
                parameter="num_reg_steps",
                kind=solver.prediction_type,
                batch=inputs.prompts.batch,
            )
        return solver

    def _inverted(self, inputs: InvertInputs) -> tuple[ms.Tensor, list[ms.Tensor], list[Visit]]:
        """The clean latents, and those after each step, cleanest first; all (B, C, h, w) float32.

        And with ``inversion_points`` the evaluations of the UNet at these.
        """
        solver, guidance_scale = self._inverse_solver(inputs), inputs.guidance_scale
        if inputs.inversion_points > 0:
            # The levels are the edit's, whatever its solver: each point is reached along the path, not by a step.
            solver = self._solver()
        timesteps, steps = solver.schedule(*inputs.schedule)
        timesteps = self._crosses("timesteps", timesteps[::-1] if inputs.inversion_points > 0 else timesteps)
        clean = tensor(self._image_latents(inputs.pixels, inputs.prompts.batch, 1, inputs.rng))
        embeds = self._joined_embeddings(inputs.prompts, 1)
        predictor = self._predictor(embeds, inputs, inputs.prompts.batch, timesteps)
        visits: list[Visit] = []
        if inputs.inversion_points > 0:
            loop = self._by_points(solver, predictor, clean, timesteps, inputs, visits)
        else:
            refine = regularise = None
            if inputs.inversion_iterations > 0:
                refine = self._refinement(solver, predictor, timesteps, guidance_scale, inputs.inversion_iterations)
            if inputs.regularisation.num_reg_steps > 0:
                regularise = self._regularisation(solver, timesteps, inputs)
            update = self._update(
                solver, timesteps, guidance_scale, clean.shape, rng=inputs.rng, refine=refine, regularise=regularise
            )
            loop = diffedit.invert(self._predict(predictor, solver), update, clean, timesteps)
        watched = self._watched(loop, "inverted_latents", len(timesteps), steps, solver, predictor, embeds, inputs)
        return clean, [step.latents for step in watched], visits

    def _by_points(self, solver: Solver, predictor, clean, timesteps, inputs: InvertInputs, visits: list[Visit]):
        """``diffedit.invert_by_points`` with compiled functions; adds to ``visits`` where the UNet was evaluated."""
        if not isinstance(solver, TabulatedSolver):
            raise InputError(
                "{parameter} needs a {scheduler} whose noise levels are known, DDIM or DPM-Solver++, but this is "
                "{name}; set it to 0, or choose another {scheduler}.",
                parameter="inversion_points",
                name=solver.name,
            )
        levels = [solver.noise_levels(timestep) for timestep in timesteps]
        noise, move = self._stages.noise(solver.prediction_type, inputs.prompts.is_guided), self._stages.move()
        scale, predict = tensor(inputs.guidance_scale), self._predict(predictor, solver)
        level_of = dict(zip(timesteps.tolist(), map(tensor, levels)))
        alphas = [sqrt_alpha**2 for sqrt_alpha, _ in levels] + [np.float32(1)]  # the last, -1, is the clean level

        def predict_noise(latents, timestep):
            outputs = predict(latents, timestep)
            visits.append(Visit(timestep, latents, outputs))
            return noise(latents, outputs, scale, level_of[timestep.item()])

        def moved(latents, start, end, first, later, share):
            row = schedules.ddim_row(alphas[start], alphas[end])
            return move(latents, first, later, tensor(share), tensor(row))

        points = diffedit.points_of(len(timesteps), inputs.inversion_points)
        return diffedit.invert_by_points(predict_noise, moved, clean, timesteps, points, tensor(np.zeros(clean.shape)))

    def _refinement(self, solver: Solver, predictor: Predictor, timesteps, guidance_scale, iterations: int) -> Callable:
        """The fixed-point iteration of inverse DDIM steps, see ``stages``."""
        refined = self._stages.refinement(solver.prediction_type, guidance_scale > 1.0)
        scale, levels = tensor(guidance_scale), [tensor(solver.noise_levels(t)) for t in timesteps]

        def refine(index, latents, arrived, coefficients):
            for _ in range(iterations):
                output = predictor(arrived, timesteps[index])
                arrived, pred_x0 = refined(latents, arrived, output, scale, levels[index], coefficients)
            return arrived, pred_x0

        return refine

    @staticmethod
    def _regularisation(solver: Solver, timesteps, inputs: InvertInputs) -> Callable:
        """The regularisers as ``EagerUpdate`` takes them; on the host."""
        options_ = inputs.regularisation

        def regularise(noise_prediction, latents, index):
            model_input = host(solver.scale_input(latents, timesteps[index]))
            return regularisers.regularise(
                noise_prediction,
                np.concatenate([model_input] * 2) if inputs.guidance_scale > 1.0 else model_input,
                solver.alpha_cumprod(timesteps[index]),
                solver.prediction_type,
                lambda count: randomness.randint(count, inputs.rng),
                options_.lambda_auto_corr,
                options_.lambda_kl,
                options_.num_reg_steps,
                options_.num_auto_corr_rolls,
            )

        return regularise

    def _predictor(
        self, embeds: np.ndarray, inputs: MaskInputs | InvertInputs | EditInputs, batch: int, timesteps=()
    ) -> Predictor:
        """The UNet with some embeddings for a call with these inputs; see ``Stages.predictor``."""
        rows = self.unet_batch_size
        if inputs.cache_interval is not None:  # groups of one size, so that there are two graphs of the UNet (C13)
            rows = min(rows, batch)
        return self._stages.predictor(embeds, inputs.attention_kwargs, rows, timesteps, inputs.cache_interval)

    # --- what both loops are made of -----------------------------------------------------------------------------

    def _update(
        self, solver, timesteps, guidance_scale, shape, *, mask=None, eta=0.0, rng=None, refine=None, regularise=None
    ) -> Callable:
        """What a step does with the UNet's predictions: compiled where the solver has a plan, else its own step."""

        def draw(shape, index):
            return self._crosses("step_noise", self._noise(shape, rng), index)

        plan = solver.plan(timesteps, eta)
        if plan is not None:
            plan = replace(plan, coefficients=self._crosses("coefficients", plan.coefficients))
        if plan is not None and regularise is None:
            return CompiledUpdate(self._stages, plan, guidance_scale, shape, mask, draw, refine)
        return EagerUpdate(solver.stepper(timesteps, eta, draw), guidance_scale, mask, regularise)

    def _predict(self, predictor: Callable, solver: Solver) -> Callable:
        """The UNet as a loop calls it, once in a step."""
        steps = itertools.count()

        def predict(latents, timestep):
            outputs = predictor(solver.scale_input(latents, timestep), timestep)
            return self._crosses("predictions", outputs, next(steps))

        return predict

    def _watched(
        self, loop, stage: str, count: int, steps: int, solver: Solver, predictor, embeds, inputs
    ) -> Iterator[diffedit.Step]:
        """A loop of ``count`` timesteps with all that looks on: check of numbers, observer, progress bar, callbacks."""
        callbacks, name = inputs.callbacks, "edit" if stage == "edited_latents" else "inversion"
        warmup = count - steps * solver.order
        with self.progress_bar(total=steps) as bar:
            for step in loop:
                if not is_finite(step.latents):
                    options.check_finite(host(step.latents), name, step.index)
                if step.pred_x0 is not None:
                    step.pred_x0 = self._crosses("clean_predictions", step.pred_x0, step.index)
                step.latents = self._crosses(stage, step.latents, step.index)
                embeds = self._step_ended(step, callbacks, embeds, predictor)
                yield step
                i = step.index
                if i == count - 1 or ((i + 1) > warmup and (i + 1) % solver.order == 0):
                    bar.update()
                    if callbacks.callback is not None and i % callbacks.callback_steps == 0:
                        with turns.turn_given_up():
                            callbacks.callback(i // solver.order, step.timestep, self._result(step.latents).copy())

    def _step_ended(self, step: diffedit.Step, callbacks: Callbacks, embeds, predictor) -> np.ndarray:
        """Calls ``callback_on_step_end``; returns the embeddings to go on with, and puts the latents into the step."""
        if callbacks.on_step_end is None:
            return embeds
        values = {"latents": step.latents, "prompt_embeds": embeds, "pred_original_sample": step.pred_x0}
        tensors = {
            name: None if values[name] is None else self._result(values[name]).copy()
            for name in callbacks.tensor_inputs
        }
        with turns.turn_given_up():
            changed = callbacks.on_step_end(self, step.index, step.timestep, tensors)
        if changed is None:
            return embeds
        if not isinstance(changed, dict):
            raise InputTypeError(
                "{parameter} has to return a dict or None, but returned {changed!t}.",
                parameter="callback_on_step_end",
                changed=changed,
            )

        def replacement(name):
            """What was returned in a tensor's place, float32; None where it is the same."""
            if changed.get(name) is None or changed[name] is tensors.get(name):
                return None
            value, shape = to_numpy(changed[name]).astype(np.float32), tuple(values[name].shape)
            if value.shape != shape:
                raise InputError(
                    "{parameter} returned {what} of shape {shape}; it has to stay {expected}.",
                    parameter="callback_on_step_end",
                    what=named(name),
                    shape=value.shape,
                    expected=shape,
                )
            options.check_finite(value, f"`{name}` returned by callback_on_step_end", step.index)
            return value

        latents, other_embeds = replacement("latents"), replacement("prompt_embeds")
        if latents is not None:
            step.latents = tensor(latents)
        if other_embeds is not None:
            predictor.replace(other_embeds)
            return other_embeds
        return embeds

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
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[[int, int, Any], None] | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        *,
        clean_latents=None,
        soft_mask: bool = False,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ):
        """The edit: denoise towards ``prompt`` inside the mask, keep the inverted latents outside.

        Section 3.2 of arXiv 2210.11427, step 3; the reference's call.

        Args:
            prompt: what the picture should show, str or list of B str.
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
        self.check_components()
        model, is_guided = self._limits, options.check_guidance_scale(guidance_scale) > 1.0
        options.check_output_type(output_type, ("pil", "np", "latent"))
        prompts = Prompts.checked(model, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, is_guided)
        inputs = EditInputs.checked(
            model,
            prompts,
            Schedule.checked(num_inference_steps, inpaint_strength),
            guidance_scale=guidance_scale,
            generator=generator,
            attention_kwargs=self._attention_kwargs(cross_attention_kwargs),
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            clip_skip=clip_skip,
            callbacks=Callbacks.checked(
                callback, callback_steps, callback_on_step_end, callback_on_step_end_tensor_inputs
            ),
        )
        options.check_switch(soft_mask, "soft_mask")
        solver = self._solver()
        timesteps, _ = solver.schedule(*inputs.schedule)
        mask, start, backgrounds = self._edited_region(
            mask_image, image_latents, clean_latents, soft_mask, prompts.batch, len(timesteps)
        )
        edited, _ = self._denoised(inputs, mask, start, backgrounds)

        flags = None
        if output_type == "latent":
            images = self._result(edited)
        else:
            images, flags = self.run_safety_checker(self._decoded(host(edited)))
            images = pictures.postprocess_image(images, output_type, flags and [not flag for flag in flags])
        if not return_dict:
            return images, flags
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flags)

    def _edited_region(self, mask_image, image_latents, clean_latents, soft: bool, batch: int, steps: int):
        """Mask (B, 1, h, w), first latents, and each step's background (B, C, h, w), of what the call was given."""
        if mask_image is None:
            raise InputError(
                "{parameter} is missing; `generate_mask` computes one from two prompts.", parameter="mask_image"
            )
        if image_latents is None:
            raise InputError(
                "{parameter} is missing; `invert` computes them from a picture.", parameter="image_latents"
            )
        mask = masks.preprocess_mask(mask_image, batch, soft=soft)
        array = _joined_latents(image_latents)
        shape = (self.vae.config.latent_channels, *array.shape[-2:])
        if array.ndim >= 4 and mask.shape[-2:] != array.shape[-2:]:
            mask = masks.on_latents(mask_image, array.shape[-2:], self.vae_scale_factor, batch, soft)
        array = options.check_image_latents(array, batch, steps, shape)
        clean = None if clean_latents is None else options.check_clean_latents(clean_latents, (batch, *shape))
        noisy = [tensor(latents) for latents in np.swapaxes(array, 0, 1)]
        # C3: what step i arrives at is where step i + 1 begins, and the last arrives at the clean latents.
        # D3: without these the background of step i is image_latents[i], one noise level late, as in the reference.
        return mask, noisy[0], noisy if clean is None else [*noisy[1:], tensor(clean)]

    def _denoised(
        self, inputs: EditInputs, mask: np.ndarray, start: ms.Tensor, backgrounds: list[ms.Tensor]
    ) -> tuple[ms.Tensor, ms.Tensor]:
        """The edited latents, (B, C, h, w) float32; and the UNet's outputs in the first step, negatives first."""
        copies, guidance_scale, solver = inputs.num_images_per_prompt, inputs.guidance_scale, self._solver()
        timesteps, steps = solver.schedule(*inputs.schedule)
        timesteps = self._crosses("timesteps", timesteps)
        # D2: the reference repeats the batch of masks as a whole but each picture's latents one after the other, so
        # that with several prompts and several images for each the masks change places. Kept.
        mask = np.concatenate([np.broadcast_to(mask, (inputs.prompts.batch, *mask.shape[1:]))] * copies)
        if copies > 1:
            start, *backgrounds = (ops.repeat_interleave(latents, copies, 0) for latents in (start, *backgrounds))
        lora_scale = inputs.attention_kwargs.get("scale", 1.0)
        embeds = self._joined_embeddings(inputs.prompts, copies, inputs.clip_skip, lora_scale)
        predictor = self._edit_predictor(embeds, inputs, timesteps)

        update = self._update(solver, timesteps, guidance_scale, start.shape, mask=mask, eta=inputs.eta, rng=inputs.rng)
        loop = diffedit.denoise(self._predict(predictor, solver), update, start, timesteps, backgrounds)
        first_prediction = None
        for step in self._watched(loop, "edited_latents", len(timesteps), steps, solver, predictor, embeds, inputs):
            first_prediction = step.noise_prediction if step.index == 0 else first_prediction
        return step.latents, first_prediction

    def _edit_predictor(self, embeds: np.ndarray, inputs: EditInputs, timesteps) -> Predictor | IntervalPredictor:
        """The UNet for the edit's steps, guided in those that the interval of guidance says (C12)."""
        guided = inputs.guided_steps(len(timesteps))
        batch = len(embeds) // 2 if inputs.prompts.is_guided else len(embeds)
        predictor = self._predictor(embeds, inputs, batch, timesteps)
        if len(guided) in (0, len(timesteps)):
            return predictor
        return IntervalPredictor(predictor, self._predictor(embeds[batch:], inputs, batch, timesteps), guided)

    # --- in one call ---------------------------------------------------------------------------------------------

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
        preset: str = "balanced",
        num_inference_steps: int = 50,
        inpaint_strength: float = 0.8,
        guidance_scale: float = 7.5,
        guidance_start: float | None = None,
        guidance_end: float | None = None,
        unet_cache_interval: int | None = None,
        num_maps_per_mask: int | None = None,
        mask_encode_strength: float | None = None,
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
        inversion_points: int | None = None,
        inversion_maps: int | None = None,
        aligned_background: bool = True,
        image_latents: DiffEditInversionPipelineOutput | None = None,
        paste_back: bool = True,
        feather: int | None = None,
        working_size: tuple[int, int] | None = None,
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
            target_prompt: what should be there, str or list of B str.
            negative_prompt: what the edit moves away from; None is the source prompt.
            source_prompt_embeds: embeddings (B, L, D) instead of ``source_prompt``.
            target_prompt_embeds: embeddings (B, L, D) instead of ``target_prompt``.
            negative_prompt_embeds: embeddings (B, L, D) instead of ``negative_prompt``.
            preset: "exact", "balanced" or "fast": how many evaluations of the UNet are spent. It says what the options
                are that are None here: ``guidance_start`` and ``guidance_end``, ``unet_cache_interval``,
                ``inversion_points`` and ``inversion_maps``. Rows of the UNet for T steps with guidance, and on 200
                drawn scenes with the demo model (T = 18) rows, mask IoU and target seen (docs/quality.md):

                - "exact": 8 + 3 T; 58 rows (4 for a mask of two maps), 0.790, 87.5 %;
                - "balanced": 5 + 1.4 T; 30 rows, 0.806, 81.2 %;
                - "fast": 4 + T / 2 or so, and as many of the step cache; 13 rows and 13, 0.810, 71.9 %.
            num_inference_steps: steps of the whole schedule, 1 to 1000.
            inpaint_strength: share of them that runs, in (0, 1].
            guidance_scale: classifier-free guidance of mask and edit, at least 0; 1 or less is without.
            guidance_start: share of the edit's steps, in [0, 1], from which on there is guidance; a step without it is
                one evaluation instead of two (C12).
            guidance_end: share of the steps, in [0, 1] and above ``guidance_start``, after which there is none.
            unet_cache_interval: of the edit's steps, each one of so many runs the whole UNet, and those between only
                its last layer, on what the deep ones gave before (C13); 1 is without.
            num_maps_per_mask: as for ``generate_mask``; None: 4, or maps of the inversion by the preset.
            mask_encode_strength: as for ``generate_mask``; None: 0.5, likewise.
            mask_thresholding_ratio: as for ``generate_mask``.
            mask_options: how the map becomes a mask; None: ``mindiffedit.inputs.EDIT_MASK``, or ``INVERSION_MASK``
                for a map of the inversion.
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
            inversion_points: as for ``invert``.
            inversion_maps: make the mask of so many of the inversion's points, the noisiest among them: the source's
                predictions are there, the target's are added (C11). 0 makes it of maps of fresh noise.
            aligned_background: take each step's background at the noise level that the step arrives at; otherwise it is
                one level late, as in the reference.
            image_latents: what ``invert`` or ``noise_image`` returned for the same picture and steps; ``inversion`` and
                its options are then not used.
            paste_back: outside the feathered mask return the picture's own pixels. Not for latents.
            feather: width of the seam in pixels; None: one latent.
            working_size: (width, height) that PIL pictures are scaled to for the model; results come back at the
                pictures' own size, pasted back there, and that is what the seam is measured in. None: the own size.
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
        arguments = dict(locals())  # all of them, under the same names
        del arguments["self"]
        return editing.edit(self, **arguments)

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
        schedule = Schedule.checked(num_inference_steps, inpaint_strength)
        if batch_size is not None:
            options.check_positive_int("batch_size", batch_size)
        self.check_components()
        pixels = self._limits.pixels(image)
        batch = batch_size or len(pixels)
        options.check_image_batch(len(pixels), batch)
        clean, noised = self._noised(pixels, batch, schedule, checked_rng(generator, self._limits, pixels, batch))
        return DiffEditInversionPipelineOutput(self._stacked(noised), clean_latents=self._result(clean))

    def _noised(self, pixels, batch: int, schedule: Schedule, rng) -> tuple[ms.Tensor, list[ms.Tensor]]:
        """What ``_inverted`` gives, by fresh noise: clean latents, and those of each level, cleanest first."""
        solver = self._solver()
        timesteps, _ = solver.schedule(*schedule)
        clean = self._image_latents(pixels, batch, 1, rng)
        noised = [tensor(solver.add_noise(clean, self._noise(clean.shape, rng), t)) for t in timesteps]
        return tensor(clean), noised[::-1]

    # --- prompts -------------------------------------------------------------------------------------------------

    @turns.turn()
    def encode_prompt(
        self,
        prompt,
        device,
        num_images_per_prompt,
        do_classifier_free_guidance,
        negative_prompt=None,
        prompt_embeds=None,
        negative_prompt_embeds=None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ):
        """Text to prompt embeddings, as the reference's method of that name.

        What is longer than the text encoder reads is cut off, with a warning that says which words.

        Args:
            prompt: str or list of B str; or None with ``prompt_embeds``.
            device: not used; MindSpore places tensors on its device target.
            num_images_per_prompt: each embedding is repeated this often, one after the other; at least 1.
            do_classifier_free_guidance: whether to give negatives too.
            negative_prompt: str or list of B str; None is the empty text.
            prompt_embeds: embeddings (B, L, D) instead of ``prompt``.
            negative_prompt_embeds: embeddings (B, L, D) instead of ``negative_prompt``.
            lora_scale: factor on the strengths of the text encoder's LoRAs; None is 1.
            clip_skip: take the hidden state this many layers before the last; of the prompt only, as in the
                reference.

        Returns:
            Prompt and negative embeddings, tensors (B * num_images_per_prompt, L, D) in the text encoder's dtype;
            the second is None (or what was given) without guidance.

        Raises:
            ValueError: for a value that does not fit.
            TypeError: for a wrong type.
        """
        options.check_positive_int("num_images_per_prompt", num_images_per_prompt)
        if clip_skip is not None:
            options.check_clip_skip(clip_skip, self.text_encoder.config.num_hidden_layers)
        if lora_scale is not None:
            options.check_scale(lora_scale, "lora_scale")
        self.check_components()
        prompts = Prompts.checked(
            self._limits,
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            do_classifier_free_guidance,
        )
        scale = 1.0 if lora_scale is None else lora_scale
        positive, negative = self._embeddings(prompts, num_images_per_prompt, clip_skip, scale)
        dtype = self.text_encoder.dtype if self.text_encoder is not None else self.unet.dtype
        return self._result(positive, dtype), None if negative is None else self._result(negative, dtype)

    def _embeddings(self, prompts: Prompts, copies: int, skip: int | None = None, lora_scale: float = 1.0):
        """Embeddings of prompts and of their negatives, float32 arrays (B * copies, L, D); None without negatives."""
        prefix, positive, negative = prompts.prefix, prompts.embeds, prompts.negative_embeds
        if positive is None:
            positive = self._embed(prompts.texts, f"{prefix}token_ids", skip=skip, lora_scale=lora_scale)
        options.check_finite(positive, f"{prefix}prompt embeddings")
        positive = self._crosses(f"{prefix}prompt_embeds", positive)
        if prompts.is_guided:
            if negative is None:
                texts = prompts.negatives or [""] * prompts.batch
                negative = self._embed(texts, f"{prefix}negative_token_ids", positive.shape[1], lora_scale=lora_scale)
            if negative.shape != positive.shape:
                raise InputError(
                    "The negative prompt's embeddings have the shape {shape}, the prompt's {expected}; they have to "
                    "be the same.",
                    parameter=f"{prefix}negative_prompt_embeds",
                    shape=negative.shape,
                    expected=positive.shape,
                )
            options.check_finite(negative, f"{prefix}negative prompt embeddings")
            negative = self._crosses(f"{prefix}negative_prompt_embeds", negative)
            negative = np.repeat(negative, copies, axis=0)
        return np.repeat(positive, copies, axis=0), negative

    def _joined_embeddings(self, prompts: Prompts, copies: int, skip=None, lora_scale: float = 1.0) -> np.ndarray:
        """Embeddings as the loops take them: negatives first with guidance."""
        positive, negative = self._embeddings(prompts, copies, skip, lora_scale)
        return np.concatenate([negative, positive]) if prompts.is_guided else positive

    def _embed(
        self, texts: list[str], stage: str, length: int | None = None, skip: int | None = None, lora_scale: float = 1.0
    ) -> np.ndarray:
        """Prompt embeddings (B, L, D) float32 of texts, padded or cut to the length that is read.

        ``stage`` is the name that the token ids are observed under.
        """
        texts = self.maybe_convert_prompt(texts, self.tokenizer)
        inputs = self.tokenizer(
            texts, padding="max_length", max_length=length or self._tokens_read, truncation=True, return_tensors="np"
        )
        if length is None:
            self._warn_of_truncation(texts, inputs.input_ids)
        textual_inversion.check_ids(inputs.input_ids, self.tokenizer, self.text_encoder)
        token_ids = self._crosses(stage, inputs.input_ids)
        uses_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
        return self._stages.encode_text(token_ids, inputs.attention_mask if uses_mask else None, skip, lora_scale)

    def _warn_of_truncation(self, texts: list[str], token_ids: np.ndarray) -> None:
        whole = self.tokenizer(texts, padding="longest", return_tensors="np").input_ids
        if whole.shape[-1] >= token_ids.shape[-1] and not np.array_equal(whole, token_ids):
            limit = self._tokens_read
            removed = self.tokenizer.batch_decode(whole[:, limit - 1 : -1])
            logger.warning("The text encoder reads %d tokens; this part of the prompt was cut off: %s", limit, removed)

    @property
    def _tokens_read(self) -> int:
        """Tokens of a prompt: the tokenizer's length, and never more than the text encoder has positions for.

        A tokenizer whose config says no length has one of 10**30.
        """
        length = self.tokenizer.model_max_length
        return min(length, getattr(self.text_encoder.config, "max_position_embeddings", length))

    # --- models, latents, noise ----------------------------------------------------------------------------------

    @property
    def _limits(self) -> ModelLimits:
        width = self.unet.config.cross_attention_dim
        reads_text = self.text_encoder is not None and self.tokenizer is not None  # embeddings do without
        return ModelLimits(
            self.vae_scale_factor,
            self.vae.config.latent_channels,
            width if isinstance(width, int) else None,
            self._tokens_read if reads_text else None,
            self.text_encoder.config.num_hidden_layers if reads_text else 0,
        )

    @property
    def _stages(self) -> Stages:
        parts = (self.unet, self.vae, self.text_encoder, self.mode)
        if self._stages_built is None or not self._stages_built.serves(*parts):
            self._stages_built = Stages(*parts, cache=self.compile_cache)
        if self.jit_level not in JIT_LEVELS:
            raise InputError(
                "{parameter} has to be one of {levels}, but is {value!r}.",
                parameter="jit_level",
                levels=JIT_LEVELS,
                value=self.jit_level,
            )
        self._stages_built.graphs.limit, self._stages_built.graphs.jit_level = self.max_graphs, self.jit_level
        return self._stages_built

    def _solver(self, inverse: bool = False) -> Solver:
        """The scheduler in use; or the inverse one: that which was set, or else that which belongs to the scheduler."""
        self.scheduler = ready(self.scheduler)
        if not inverse:
            return solver_of(self.scheduler)
        if self.inverse_scheduler is not None:
            self.inverse_scheduler = checked_inverse(self.inverse_scheduler, self.scheduler)
            return solver_of(self.inverse_scheduler, inverse=True)
        self.scheduler = invertible(self.scheduler)
        # Not stored as ``inverse_scheduler``: it has to follow when another scheduler is set, or its options change.
        made_for = (self.scheduler, self.scheduler.config)
        if self._own_inverse is None or any(a is not b for a, b in zip(self._own_inverse, made_for)):
            self._own_inverse = (*made_for, inverse_of(self.scheduler))
        return solver_of(self._own_inverse[2], inverse=True)

    def get_timesteps(self, num_inference_steps: int, strength: float, device=None):
        """The scheduler's timesteps that a strength leaves.

        Args:
            num_inference_steps: steps of the whole schedule, already set on the scheduler.
            strength: share of them that runs, in [0, 1].
            device: not used.

        Returns:
            Timesteps as NumPy array, noisiest first, and their number of steps.
        """
        return remaining(self.scheduler, num_inference_steps, strength, inverse=False)

    def get_inverse_timesteps(self, num_inference_steps: int, strength: float, device=None):
        """The inverse scheduler's timesteps that a strength leaves.

        Args:
            num_inference_steps: steps of the whole schedule, already set on the inverse scheduler.
            strength: share of them that runs, in [0, 1].
            device: not used.

        Returns:
            Timesteps as NumPy array, cleanest first, and their number of steps.
        """
        return remaining(self._solver(inverse=True).scheduler, num_inference_steps, strength, inverse=True)

    def _attention_kwargs(self, kwargs) -> dict[str, Any]:
        """Checked ``cross_attention_kwargs``: the LoRAs' ``scale``, and what the attention processors know.

        Others are ignored with a warning.
        """
        kwargs = options.check_attention_kwargs(kwargs)
        scale = {}
        if "scale" in kwargs:
            scale["scale"] = options.check_scale(kwargs.pop("scale"), "cross_attention_kwargs['scale']")
        if not kwargs:
            return scale
        known = set()
        for processor in self.unet.attn_processors.values():
            method = getattr(processor, "construct", None) or processor.__call__
            known |= set(inspect.signature(method).parameters)
        known -= {
            "self",
            "attn",
            "hidden_states",
            "encoder_hidden_states",
            "attention_mask",
            "temb",
            "args",
            "kwargs",
        }
        for name in [name for name in kwargs if name not in known]:
            logger.warning("cross_attention_kwargs %r is not known to the attention processors and is ignored.", name)
            del kwargs[name]
        return {**kwargs, **scale}

    def _image_latents(self, pixels: np.ndarray, batch: int, copies: int, rng) -> np.ndarray:
        """Clean scaled latents (batch * copies, C, h, w) with a posterior draw for each copy of each picture.

        Each picture is encoded once; the reference encodes every copy, with the same result, since the copies differ
        in the draw only.
        """
        if self._limits.are_latents(pixels):
            latents = np.repeat(pixels.astype(np.float32), copies, axis=0)
        else:
            moments = self._stages.encode_image(pixels.astype(np.float32))
            options.check_finite(moments, "VAE encoding")
            moments = np.repeat(self._crosses("moments", moments), copies, axis=0)
            mean, logvar = np.split(moments, 2, axis=1)
            std = np.exp(np.float32(0.5) * np.clip(logvar, -30.0, 20.0))
            noise = self._crosses("posterior_noise", self._noise(mean.shape, rng))
            latents = np.float32(self.vae.config.scaling_factor) * (mean + std * noise)
        if len(latents) != batch * copies:
            say_once("There are fewer pictures than prompts: the pictures are repeated.")
            latents = np.concatenate([latents] * (batch * copies // len(latents)))
        return self._crosses("latents", latents.astype(np.float32))

    def _decoded(self, latents: np.ndarray) -> np.ndarray:
        """Pixels (B, 3, H, W) float32, about [-1, 1], of scaled latents."""
        images = self._stages.decode_latents(latents / np.float32(self.vae.config.scaling_factor))
        options.check_finite(images, "VAE decoding")
        return self._crosses("decoded", images)

    def _noise(self, shape, rng) -> np.ndarray:
        """Standard normal noise, float32, drawn as the reference draws it for models of this dtype."""
        return randomness.randn(shape, rng, str(self.vae.dtype).rpartition(".")[2].lower())

    def _stacked(self, inverted: list[ms.Tensor]) -> ms.Tensor:
        """Latents of all steps, cleanest first, as ``invert`` returns them: (B, T, C, h, w), noisiest first."""
        return self._result(ops.stack(inverted[::-1], 1))

    def _result(self, values, dtype=None) -> ms.Tensor:
        """A tensor, or an array as a tensor, in the UNet's dtype or another."""
        values = values if isinstance(values, ms.Tensor) else tensor(values)
        dtype = dtype or self.unet.dtype
        return values if values.dtype == dtype else values.astype(dtype)

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

    # --- observers -----------------------------------------------------------------------------------------------

    def _crosses(self, stage: str, value, step: int | None = None):
        """Shows what crosses a stage to those who observe, if there are any; returns what to go on with.

        ``value``: an array, or a float32 tensor on the device, which comes to the host only where somebody looks on.
        """
        observer, viewer = self.observer, self._viewers.get(threading.get_ident())
        if observer is None and viewer is None:
            return value
        array = host(value) if isinstance(value, ms.Tensor) else value
        with turns.turn_given_up():
            replacement = None if observer is None else observer(stage, array, step)
            array = array if replacement is None else replacement
            if viewer is not None:
                viewer(stage, array, step)
        if observer is None:
            return value
        # Also where the same array comes back: the observer may have written into it, a copy of what is on the device.
        return tensor(array) if isinstance(value, ms.Tensor) else array

    @contextlib.contextmanager
    def debugging(self, callback: Observer):
        """While this context is open ``callback(stage, array, step)`` sees every intermediate of this thread's calls.

        Arrays are float32 on the host, not to be written to; ``step`` counts from 0 within a loop and is None outside.
        Stages, in the order of their coming: "map" (B, h, w), "mask" (B, h, w), "inverted_latents" and
        "edited_latents" (B, C, h, w) after each step, with "clean_predictions" (B, C, h, w), the step's prediction of
        the noiseless latents, before each of them; others are those of ``Observer``. Contexts may be nested.

        Args:
            callback: an ``Observer``; what it returns is not used.
        """
        thread = threading.get_ident()
        outer = self._viewers.get(thread)

        def both(stage, array, step):
            if outer is not None:
                outer(stage, array, step)
            callback(stage, array, step)

        self._viewers[thread] = both
        try:
            yield self
        finally:
            self._viewers.pop(thread)
            if outer is not None:
                self._viewers[thread] = outer

    def progress_bar(self, iterable=None, total: int | None = None):
        """A ``tqdm`` bar with the configured options, over one of the two.

        Args:
            iterable: what to go through.
            total: how many updates there will be.

        Raises:
            ValueError: when both or neither are given.
        """
        from tqdm.auto import tqdm

        if (iterable is None) == (total is None):
            raise InputError("`progress_bar` takes either {iterable} or {total}; give one of the two.")
        if iterable is not None:
            return tqdm(iterable, **self._progress_bar_config)
        return tqdm(total=total, **self._progress_bar_config)


def _joined_latents(image_latents) -> np.ndarray:
    """Latents as one array, of whatever holds them."""
    if not isinstance(image_latents, (list, tuple)):
        array = to_numpy(image_latents)
        return array[None] if array.ndim == 3 else array
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
