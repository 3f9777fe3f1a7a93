"""What the calls are given, checked once: frozen, and handed on to what computes.

Each class has a constructor ``checked`` that takes arguments under the names that users know, raises an ``InputError``
or ``InputTypeError`` for what does not fit, and leaves nothing to be checked again. No model runs here.

Letters in shapes: B prompts, N pictures, H x W pixels, h x w latents, C latent channels, L tokens of width D.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np

from mindiffedit import masks, options
from mindiffedit.arrays import to_numpy
from mindiffedit.errors import InputError, named
from mindiffedit.images import pictures
from mindiffedit.noise import randomness

INVERSIONS = ("ddim", "noise")

EDIT_MASK = masks.MaskOptions(smoothing=1.5, edges=4, threshold=0.6, fill_holes=True, smallest_region=8)
"""How ``edit`` makes a mask of its map, where nothing else is said.

With a clamp at twice the mean much of the map is cut to one of two values, and the smoothing lets neighbours vote: most
of a latent's surroundings have to differ. So a few maps do what ten do without. Then the border moves to the picture's
edges. Chosen on rendered scenes, see ``docs/quality.md``.
"""

INVERSION_MASK = replace(EDIT_MASK, smoothing=2.0)
"""The same for a map of an inversion's points, which holds no fresh noise and is coarser; chosen likewise."""

EDIT_MAPS, EDIT_MASK_STRENGTH = 4, 0.5
"""Of ``edit``, where its mask is made of maps of fresh noise: ``num_maps_per_mask`` and ``mask_encode_strength``."""

MAX_FEATHER = 10000  # pixels


@dataclass(frozen=True)
class Evaluations:
    """Where ``edit`` evaluates the UNet; see there.

    Attributes:
        inversion_points: levels at which the inversion predicts noise; 0: at each, by the inverse solver.
        inversion_maps: points whose predictions make the mask; 0: predictions on fresh noise do.
        guidance_start, guidance_end: shares of the edit's steps.
        unet_cache_interval: every how many steps the whole UNet runs; 1: always.
    """

    inversion_points: int = 0
    inversion_maps: int = 0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    unet_cache_interval: int = 1

    @classmethod
    def checked(
        cls,
        preset,
        *,
        inverts: bool,
        tabulated: bool,
        by_noise: bool,
        inversion_iterations: int,
        **numbers: Any,
    ) -> Evaluations:
        """Those of a preset, with the ``numbers`` that are not None in their place, under the names above.

        Args:
            preset: a name out of ``PRESETS``.
            inverts: whether there is an inversion at all; without, its points are left out.
            tabulated: whether the solver has what points need; without, likewise.
            by_noise: whether the mask is asked to be made of maps of fresh noise.
            inversion_iterations: as for ``invert``; they refine the solver's steps, so there are no points then.
        """
        options.check_output_type(preset, tuple(PRESETS), "preset")
        values = PRESETS[preset]
        if not inverts or not tabulated or inversion_iterations > 0:
            values = replace(values, inversion_points=0)
        values = replace(values, **{name: number for name, number in numbers.items() if number is not None})
        options.check_count(values.inversion_points, "inversion_points", options.MAX_STEPS)
        if numbers["inversion_maps"] is None and (by_noise or values.inversion_points == 0):
            values = replace(values, inversion_maps=0)
        options.check_count(values.inversion_maps, "inversion_maps", options.MAX_STEPS)
        options.check_interval(values.guidance_start, values.guidance_end)
        options.check_positive_int("unet_cache_interval", values.unet_cache_interval)
        if values.inversion_points > 0 and not inverts:
            raise InputError(
                "Nothing is inverted here ({inversion='noise'}, or {image_latents} were given), so {parameter} means "
                "nothing; leave it out.",
                parameter="inversion_points",
            )
        _check_points(values.inversion_points, inversion_iterations)
        if values.inversion_maps > 0 and values.inversion_points == 0:
            raise InputError(
                "{parameter} makes the mask of an inversion's points, but there are none; set {inversion_points} to 1 "
                "or more, or leave {parameter} out.",
                parameter="inversion_maps",
            )
        if values.inversion_maps > 0 and by_noise:
            raise InputError(
                "{parameter} makes the mask of the inversion's predictions, {num_maps_per_mask} and "
                "{mask_encode_strength} of others on fresh noise; give one or the other.",
                parameter="inversion_maps",
            )
        return values


def _check_points(points: int, iterations: int) -> None:
    if points > 0 and iterations > 0:
        raise InputError(
            "{parameter} and {inversion_iterations} exclude each other; set one of the two to 0.",
            parameter="inversion_points",
        )


PRESETS = {
    "exact": Evaluations(),
    "balanced": Evaluations(inversion_points=3, inversion_maps=2, guidance_end=0.4),
    "fast": Evaluations(inversion_points=2, inversion_maps=2, guidance_end=0.2, unet_cache_interval=3),
}
"""How many evaluations ``edit`` spends; measured in docs/quality.md."""

DEFAULT_PRESET = "balanced"


@dataclass(frozen=True)
class ModelLimits:
    """What the components of a pipeline say about its input.

    Attributes:
        vae_scale_factor: pixels of a latent, along one side.
        latent_channels: C.
        embed_width: D, or None where the UNet does not say.
        max_tokens: the most tokens that the text encoder reads; None where there is none, or no tokenizer.
        text_layers: of the text encoder.
    """

    vae_scale_factor: int
    latent_channels: int
    embed_width: int | None
    max_tokens: int | None
    text_layers: int

    def pixels(self, image) -> np.ndarray:
        """Picture(s), float32 (N, 3, H, W) in [-1, 1], or latents (N, C, h, w), of what a user gave as ``image``."""
        if image is None:
            raise InputError(
                "{parameter} is missing; give a picture (PIL, array, tensor, latents) or a list of them.",
                parameter="image",
            )
        return pictures.preprocess_image(image, self.vae_scale_factor, self.latent_channels)

    def are_latents(self, pixels: np.ndarray) -> bool:
        """Whether these skip the VAE."""
        return pixels.shape[1] == self.latent_channels


@dataclass(frozen=True)
class Prompts:
    """B prompts as texts or as embeddings, and what guidance leads away from.

    Attributes:
        texts: B of them; none with ``embeds``.
        negatives: B texts; None is the empty text, or that ``negative_embeds`` were given.
        embeds, negative_embeds: float32 (B, L, D), or None.
        batch: B.
        is_guided: whether the negatives count.
        prefix: before their names in messages and stages, such as "target_".
    """

    texts: list[str]
    negatives: list[str] | None
    embeds: np.ndarray | None
    negative_embeds: np.ndarray | None
    batch: int
    is_guided: bool
    prefix: str = ""

    @classmethod
    def checked(
        cls,
        model: ModelLimits,
        prompt,
        negative_prompt,
        prompt_embeds,
        negative_prompt_embeds,
        is_guided: bool,
        prefix: str = "",
    ) -> Prompts:
        """Embeddings have to be as wide as the UNet takes them, and no longer than a negative made of text can be."""
        batch = options.check_prompt_inputs(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, prefix, guided=is_guided
        )
        for name, embeds in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
            if embeds is not None and model.embed_width is not None and embeds.shape[-1] != model.embed_width:
                raise InputError(
                    "{parameter} is {given} wide, but this UNet takes {width}.",
                    parameter=f"{prefix}{name}",
                    given=embeds.shape[-1],
                    width=model.embed_width,
                )
        makes_negative = prompt_embeds is not None and negative_prompt_embeds is None and is_guided
        if model.max_tokens is None and (prompt is not None or makes_negative):
            raise InputError(
                "There is no text encoder or no tokenizer here; give {parameter} (and {negative}, with guidance).",
                parameter=f"{prefix}prompt_embeds",
                negative=named(f"{prefix}negative_prompt_embeds"),
            )
        if makes_negative and prompt_embeds.shape[1] > model.max_tokens:
            raise InputError(
                "{parameter} is {length} tokens long, but the text encoder, which makes the negative, reads {most}; "
                "give {negative} as well.",
                parameter=f"{prefix}prompt_embeds",
                length=prompt_embeds.shape[1],
                most=model.max_tokens,
                negative=named(f"{prefix}negative_prompt_embeds"),
            )
        embeds, negative_embeds = (
            None if value is None else to_numpy(value).astype(np.float32)
            for value in (prompt_embeds, negative_prompt_embeds)
        )
        negatives = _listed(negative_prompt, batch) if is_guided else None
        return cls(_listed(prompt, batch) or [], negatives, embeds, negative_embeds, batch, is_guided, prefix)

    def same_prompts(self, other: Prompts) -> bool:
        """Whether both are the same texts or the same embeddings, whatever their negatives are."""
        if self.embeds is not None or other.embeds is not None:
            return self.embeds is not None and other.embeds is not None and np.array_equal(self.embeds, other.embeds)
        return self.texts == other.texts

    def same_as(self, other: Prompts) -> bool:
        """Whether both are the same texts, with the same negatives as far as these count."""
        if not self.texts or self.texts != other.texts:
            return False
        return not self.is_guided or self.same_negatives(other)

    def same_negatives(self, other: Prompts) -> bool:
        """Whether guidance leads both away from the same texts."""
        of_texts = self.negative_embeds is None and other.negative_embeds is None
        return of_texts and (self.negatives or [""] * self.batch) == (other.negatives or [""] * other.batch)


def _listed(prompt, batch: int) -> list[str] | None:
    if prompt is None:
        return None
    return [prompt] * batch if isinstance(prompt, str) else list(prompt)


class Schedule(NamedTuple):
    """How many steps a whole schedule has, and which share of them runs."""

    num_inference_steps: int
    strength: float

    @classmethod
    def checked(cls, num_inference_steps, strength, name: str = "inpaint_strength") -> Schedule:
        """``name`` is the strength's, in messages."""
        options.check_strength(strength, name)
        options.check_steps(num_inference_steps)
        options.effective_steps(num_inference_steps, strength, name)
        return cls(num_inference_steps, strength)


@dataclass(frozen=True)
class Callbacks:
    """The functions of a user that a loop calls, with diffusers' arguments; see ``invert``."""

    callback: Callable | None = None
    callback_steps: int = 1
    on_step_end: Callable | None = None
    tensor_inputs: Sequence[str] = ("latents",)

    TENSOR_INPUTS: ClassVar = ("latents", "prompt_embeds", "pred_original_sample")

    @classmethod
    def checked(cls, callback, callback_steps, on_step_end, tensor_inputs) -> Callbacks:
        """``tensor_inputs`` are names out of ``TENSOR_INPUTS``."""
        options.check_callback(callback, callback_steps)
        tensor_inputs = options.check_step_callback(on_step_end, tensor_inputs, cls.TENSOR_INPUTS)
        return cls(callback, callback_steps, on_step_end, tensor_inputs)


def checked_rng(generator, model: ModelLimits, pixels: np.ndarray, batch: int, copies: int = 1):
    """The random stream(s) of a call that encodes pictures.

    A list needs one for each sample, and a picture for each prompt where the VAE encodes.
    """
    rng = randomness.resolve(generator)
    if isinstance(rng, list) and len(rng) > 1:
        options.check_generators(rng, batch * copies)
        if not model.are_latents(pixels) and len(pixels) != batch:
            raise InputError(
                "A list of generators needs one picture for each prompt, but {count} pictures were given for {batch} "
                "prompts; give as many of each, or one generator.",
                parameter="generator",
                count=len(pixels),
                batch=batch,
            )
    return rng


@dataclass(frozen=True)
class MaskInputs:
    """Of ``generate_mask``: its arguments; ``pixels`` and ``rng`` are what its picture and generator became.

    ``cache_interval`` is the step cache's, as ``Stages.predictor`` takes it; 1 where the edit has one in use.
    """

    pixels: np.ndarray
    source: Prompts
    target: Prompts
    num_maps_per_mask: int
    schedule: Schedule
    mask_thresholding_ratio: float
    guidance_scale: float
    rng: Any
    attention_kwargs: Mapping[str, Any]
    per_image_clamp: bool
    corrected_guidance: bool
    outlier_quantile: float | None
    mask_options: masks.MaskOptions
    cache_interval: int | None = None

    @property
    def batch(self) -> int:
        """B."""
        return self.target.batch

    @classmethod
    def checked(
        cls,
        model: ModelLimits,
        pixels: np.ndarray,
        source: Prompts,
        target: Prompts,
        *,
        num_maps_per_mask,
        mask_encode_strength,
        mask_thresholding_ratio,
        num_inference_steps,
        guidance_scale: float,
        generator,
        attention_kwargs: Mapping[str, Any],
        per_image_clamp,
        corrected_guidance,
        outlier_quantile,
        mask_options,
        cache_interval: int | None = None,
    ) -> MaskInputs:
        """Prompts, ``pixels``, guidance scale and ``attention_kwargs`` come checked, by what stands above."""
        if source.batch != target.batch:
            raise InputError(
                "There are {sources} source prompts for {batch} target prompts; give as many of each.",
                parameter="source_prompt",
                sources=source.batch,
                batch=target.batch,
            )
        options.check_positive_int("num_maps_per_mask", num_maps_per_mask)
        options.check_ratio(mask_thresholding_ratio)
        schedule = Schedule.checked(num_inference_steps, mask_encode_strength, "mask_encode_strength")
        options.check_switch(per_image_clamp, "per_image_clamp")
        options.check_switch(corrected_guidance, "corrected_guidance")
        options.check_quantile(outlier_quantile)
        mask_options = masks.checked_options(mask_options)
        if target.same_as(source):
            raise InputError(
                "Source and target prompt are the same ({text!r}), so there is no difference to make a mask of; say in "
                "the target prompt what should change.",
                parameter="target_prompt",
                text=target.texts[0] if target.batch == 1 else target.texts,
            )
        options.check_image_batch(len(pixels), target.batch)
        return cls(
            pixels,
            source,
            target,
            num_maps_per_mask,
            schedule,
            mask_thresholding_ratio,
            guidance_scale,
            checked_rng(generator, model, pixels, target.batch, num_maps_per_mask),
            attention_kwargs,
            per_image_clamp,
            corrected_guidance,
            outlier_quantile,
            mask_options,
            cache_interval,
        )


@dataclass(frozen=True)
class Regularisation:
    """How ``invert`` pulls noise predictions towards white noise; off with no steps."""

    lambda_auto_corr: float = 20.0
    lambda_kl: float = 20.0
    num_reg_steps: int = 0
    num_auto_corr_rolls: int = 5

    @classmethod
    def checked(cls, lambda_auto_corr, lambda_kl, num_reg_steps, num_auto_corr_rolls) -> Regularisation:
        """Weights and counts of at least 0."""
        return cls(*options.check_regularisation(lambda_auto_corr, lambda_kl, num_reg_steps, num_auto_corr_rolls))


@dataclass(frozen=True)
class InvertInputs:
    """Of ``invert``: its arguments; ``pixels`` and ``rng`` are what its picture and generator became.

    ``cache_interval`` is as for ``MaskInputs``.
    """

    pixels: np.ndarray
    prompts: Prompts
    schedule: Schedule
    guidance_scale: float
    rng: Any
    attention_kwargs: Mapping[str, Any]
    inversion_iterations: int = 0
    inversion_points: int = 0
    regularisation: Regularisation = Regularisation()
    callbacks: Callbacks = Callbacks()
    cache_interval: int | None = None

    @classmethod
    def checked(
        cls,
        model: ModelLimits,
        pixels: np.ndarray,
        prompts: Prompts,
        schedule: Schedule,
        *,
        guidance_scale: float,
        generator,
        attention_kwargs: Mapping[str, Any],
        inversion_iterations,
        inversion_points=0,
        regularisation: Regularisation = Regularisation(),
        callbacks: Callbacks = Callbacks(),
        cache_interval: int | None = None,
    ) -> InvertInputs:
        """Prompts, pixels, schedule, guidance scale, regularisation, callbacks come checked, by what stands above."""
        options.check_count(inversion_iterations, "inversion_iterations", options.MAX_ITERATIONS)
        options.check_count(inversion_points, "inversion_points", options.MAX_STEPS)
        _check_points(inversion_points, inversion_iterations)
        for name, count in (("inversion_iterations", inversion_iterations), ("inversion_points", inversion_points)):
            if count > 0 and regularisation.num_reg_steps > 0:
                raise InputError(
                    "{parameter} and {num_reg_steps} exclude each other; set one of the two to 0.", parameter=name
                )
        options.check_image_batch(len(pixels), prompts.batch)
        rng = checked_rng(generator, model, pixels, prompts.batch)
        return cls(
            pixels,
            prompts,
            schedule,
            guidance_scale,
            rng,
            attention_kwargs,
            inversion_iterations,
            inversion_points,
            regularisation,
            callbacks,
            cache_interval,
        )


@dataclass(frozen=True)
class EditInputs:
    """Of the pipeline's call: its arguments, but for mask and latents."""

    prompts: Prompts
    schedule: Schedule
    guidance_scale: float
    rng: Any
    attention_kwargs: Mapping[str, Any]
    num_images_per_prompt: int = 1
    eta: float = 0.0
    clip_skip: int | None = None
    callbacks: Callbacks = Callbacks()
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    cache_interval: int | None = None

    def guided_steps(self, count: int) -> range:
        """Which of so many steps are guided; at least one, where any is."""
        if not self.prompts.is_guided:
            return range(0)
        start = min(round(self.guidance_start * count), count - 1)
        return range(start, max(round(self.guidance_end * count), start + 1))

    @classmethod
    def checked(
        cls,
        model: ModelLimits,
        prompts: Prompts,
        schedule: Schedule,
        *,
        guidance_scale: float,
        generator,
        attention_kwargs: Mapping[str, Any],
        num_images_per_prompt=1,
        eta=0.0,
        clip_skip=None,
        callbacks: Callbacks = Callbacks(),
        evaluations: Evaluations = Evaluations(),
    ) -> EditInputs:
        """Prompts, schedule, guidance scale, callbacks and evaluations come checked, by what stands above."""
        options.check_positive_int("num_images_per_prompt", num_images_per_prompt)
        options.check_eta(eta)
        options.check_clip_skip(clip_skip, model.text_layers)
        rng = randomness.resolve(generator)
        if isinstance(rng, list) and len(rng) > 1 and eta > 0:
            options.check_generators(rng, prompts.batch * num_images_per_prompt)
        return cls(
            prompts,
            schedule,
            guidance_scale,
            rng,
            attention_kwargs,
            num_images_per_prompt,
            eta,
            clip_skip,
            callbacks,
            evaluations.guidance_start,
            evaluations.guidance_end,
            evaluations.unet_cache_interval if evaluations.unet_cache_interval > 1 else None,
        )
