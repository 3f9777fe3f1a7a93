"""What comes before the models run: prompts to embeddings, pictures to latents, schedules, noise."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import numpy as np

from mindiffedit import options
from mindiffedit.arrays import to_numpy
from mindiffedit.checkpoints import textual_inversion
from mindiffedit.checkpoints.adapters import Adapters
from mindiffedit.errors import InputError, named
from mindiffedit.images import pictures
from mindiffedit.noise import randomness
from mindiffedit.runtime import turns
from mindiffedit.runtime.notices import say_once
from mindiffedit.solvers import schedules

logger = logging.getLogger(__name__)


def as_its_own(scheduler, timestep):
    """A timestep as the scheduler's own ``timesteps`` would give it: some refuse anything else."""
    import mindspore as ms

    return ms.Tensor(timestep.item(), scheduler.timesteps.dtype)


class Preparation(Adapters):
    """Everything that the three calls share before their loops."""

    def _ready_scheduler(self):
        from mindiffedit.solvers.schedulers import portable

        self.scheduler = portable(self.scheduler)
        config = self.scheduler.config
        if config.get("clip_sample") and "clip_sample" in config.get("_use_default_values", ()):
            say_once(
                f"{type(self.scheduler).__name__} clips latents, as it does by default where a configuration says nothing"
                " of it; one with clip_sample=False does not."
            )
        return self.scheduler

    def _ready_inverse_scheduler(self):
        """The inverse scheduler in use: the one that was set, or else the one that belongs to the scheduler.

        A scheduler that has none gives way to DDIM (W14), for the mask and the edit too: the three have to be at the
        same noise levels.
        """
        from mindiffedit.solvers.schedulers import INVERSES, DDIMScheduler, check_invertible, inverse_of, portable

        scheduler, inverse = self._ready_scheduler(), self.inverse_scheduler
        belonging = INVERSES.get(type(scheduler).__name__)
        if inverse is not None:
            inverse = self.inverse_scheduler = portable(inverse)
            check_invertible(inverse)
            if belonging is None or belonging.__name__ != type(inverse).__name__:
                say_once(
                    f"{type(inverse).__name__} is not the inverse of {type(scheduler).__name__}, so the edit does not"
                    " lead back from what it inverts; `pipeline.inverse_scheduler = None` takes the one that is."
                )
            return inverse
        if belonging is None:
            options_ = schedules.suited("DDIMScheduler", scheduler.config)
            say_once(
                f"{type(scheduler).__name__} has no inverse, so the pipeline takes DDIM in its place from now on, with"
                f" timestep_spacing={options_['timestep_spacing']!r}; to choose yourself, set `pipeline.scheduler` to a"
                " DDIMScheduler or DPMSolverMultistepScheduler."
            )
            scheduler = self.scheduler = DDIMScheduler.from_config(scheduler.config, **options_)
        # Not stored as ``inverse_scheduler``: it has to follow when another scheduler is set, or its options change.
        made_for = (scheduler, scheduler.config)
        if self._own_inverse is None or any(a is not b for a, b in zip(self._own_inverse, made_for)):
            self._own_inverse = (*made_for, inverse_of(scheduler))
        return self._own_inverse[2]

    def _schedule(self, scheduler, chosen, num_inference_steps: int, strength: float):
        """Sets the scheduler's timesteps and returns what ``chosen`` (a ``get_…timesteps``) leaves of them.

        Before any model runs, with errors that say what to do; timesteps beyond the noise table, which an offset on a
        full-length schedule gives, are one.
        """
        name, trained = type(scheduler).__name__, scheduler.config.num_train_timesteps
        if num_inference_steps > trained:
            raise InputError(
                "{parameter} is {steps}, but the model was trained with {trained} timesteps; give fewer steps.",
                parameter="num_inference_steps",
                steps=num_inference_steps,
                trained=trained,
            )
        try:
            scheduler.set_timesteps(num_inference_steps)
        except ValueError as error:
            raise InputError(
                "{name} cannot make a schedule of {steps} steps: {error}",
                parameter="num_inference_steps",
                name=name,
                steps=num_inference_steps,
                error=error,
            ) from error
        timesteps, steps = chosen(num_inference_steps, strength)
        if timesteps.max() > trained - 1:
            raise InputError(
                "{steps} steps reach timestep {reached}, but the model's last is {last}; give fewer steps.",
                parameter="num_inference_steps",
                steps=num_inference_steps,
                reached=int(timesteps.max()),
                last=trained - 1,
            )
        return timesteps, steps

    def _attention_kwargs(self, given) -> dict[str, Any]:
        """Checked ``cross_attention_kwargs``: the LoRAs' ``scale``, and what the attention processors know.

        Others are ignored with a warning.
        """
        given = options.check_attention_kwargs(given)
        scale = {}
        if "scale" in given:
            scale["scale"] = options.check_scale(given.pop("scale"), "cross_attention_kwargs['scale']")
        if not given:
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
        for name in [name for name in given if name not in known]:
            logger.warning("cross_attention_kwargs %r is not known to the attention processors and is ignored.", name)
            del given[name]
        return {**given, **scale}

    @property
    def _tokens_read(self) -> int:
        """Tokens of a prompt: the tokenizer's length, and never more than the text encoder has positions for.

        A tokenizer whose config says no length has one of 10**30.
        """
        length = self.tokenizer.model_max_length
        return min(length, getattr(self.text_encoder.config, "max_position_embeddings", length))

    def _tokens(self, texts: list[str], length: int):
        return self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="np")

    def _warn_of_truncation(self, texts: list[str], token_ids: np.ndarray) -> None:
        whole = self.tokenizer(texts, padding="longest", return_tensors="np").input_ids
        if whole.shape[-1] >= token_ids.shape[-1] and not np.array_equal(whole, token_ids):
            limit = self._tokens_read
            removed = self.tokenizer.batch_decode(whole[:, limit - 1 : -1])
            logger.warning("The text encoder reads %d tokens; this part of the prompt was cut off: %s", limit, removed)

    def _embed(
        self,
        texts: list[str],
        stage: str,
        length: int | None = None,
        skip: int | None = None,
        lora_scale: float = 1.0,
    ) -> np.ndarray:
        """Prompt embeddings (B, L, D) float32 of texts, padded or cut to the length that is read.

        ``stage`` is the name that the token ids are observed under.
        """
        texts = self.maybe_convert_prompt(texts, self.tokenizer)
        inputs = self._tokens(texts, length or self._tokens_read)
        if length is None:
            self._warn_of_truncation(texts, inputs.input_ids)
        textual_inversion.check_ids(inputs.input_ids, self.tokenizer, self.text_encoder)
        uses_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
        token_ids = self._crosses(stage, inputs.input_ids)
        mask = inputs.attention_mask if uses_mask else None
        return self._stages.encode_text(token_ids, mask, skip, lora_scale)

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
        positive, negative = self._encode_prompt_arrays(
            prompt,
            num_images_per_prompt,
            do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            clip_skip,
            lora_scale=1.0 if lora_scale is None else lora_scale,
        )
        dtype = self.text_encoder.dtype if self.text_encoder is not None else self.unet.dtype
        return self._tensor(positive, dtype), None if negative is None else self._tensor(negative, dtype)

    def _encode_prompt_arrays(
        self,
        prompt,
        copies,
        is_guided,
        negative_prompt=None,
        prompt_embeds=None,
        negative_prompt_embeds=None,
        clip_skip=None,
        prefix="",
        lora_scale=1.0,
    ):
        """``encode_prompt`` on the host: float32 arrays."""
        batch = self._check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, is_guided, prefix)
        if prompt_embeds is None:
            texts = [prompt] if isinstance(prompt, str) else prompt
            positive = self._embed(texts, f"{prefix}token_ids", skip=clip_skip, lora_scale=lora_scale)
        else:
            positive = to_numpy(prompt_embeds).astype(np.float32)
        options.check_finite(positive, f"{prefix}prompt embeddings")
        positive = self._crosses(f"{prefix}prompt_embeds", positive)
        negative = None if negative_prompt_embeds is None else to_numpy(negative_prompt_embeds)
        if is_guided:
            if negative is None:
                if negative_prompt is None:
                    negative_prompt = ""
                texts = [negative_prompt] * batch if isinstance(negative_prompt, str) else negative_prompt
                negative = self._embed(
                    texts, f"{prefix}negative_token_ids", length=positive.shape[1], lora_scale=lora_scale
                )
            if negative.shape != positive.shape:
                raise InputError(
                    "The negative prompt's embeddings have the shape {shape}, the prompt's {expected}; they have to "
                    "be the same.",
                    parameter=f"{prefix}negative_prompt_embeds",
                    shape=negative.shape,
                    expected=positive.shape,
                )
            options.check_finite(negative, f"{prefix}negative prompt embeddings")
            negative = self._crosses(f"{prefix}negative_prompt_embeds", negative.astype(np.float32))
            negative = np.repeat(negative, copies, axis=0)
        return np.repeat(positive, copies, axis=0), negative

    def _check_prompts(
        self,
        prompt,
        negative_prompt,
        prompt_embeds,
        negative_prompt_embeds,
        is_guided: bool,
        prefix: str = "",
    ) -> int:
        """All that can be wrong with prompts or embeddings, before a model runs; returns the batch size.

        Embeddings have to be as wide as the UNet takes them, and no longer than a negative made of text can be.
        """
        self.check_components()
        batch = options.check_prompt_inputs(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, prefix, guided=is_guided
        )
        width = self.unet.config.cross_attention_dim
        for name, embeds in (
            ("prompt_embeds", prompt_embeds),
            ("negative_prompt_embeds", negative_prompt_embeds),
        ):
            if embeds is not None and isinstance(width, int) and embeds.shape[-1] != width:
                raise InputError(
                    "{parameter} is {given} wide, but this UNet takes {width}.",
                    parameter=f"{prefix}{name}",
                    given=embeds.shape[-1],
                    width=width,
                )
        if prompt_embeds is None or negative_prompt_embeds is not None or not is_guided:
            return batch
        most = self._tokens_read
        if prompt_embeds.shape[1] > most:
            raise InputError(
                "{parameter} is {length} tokens long, but the text encoder, which makes the negative, reads {most}; give "
                "{negative} as well.",
                parameter=f"{prefix}prompt_embeds",
                length=prompt_embeds.shape[1],
                most=most,
                negative=named(f"{prefix}negative_prompt_embeds"),
            )
        return batch

    def get_timesteps(self, num_inference_steps: int, strength: float, device=None):
        """The scheduler's timesteps that a strength leaves.

        Args:
            num_inference_steps: steps of the whole schedule, already set on the scheduler.
            strength: share of them that runs, in [0, 1].
            device: not used.

        Returns:
            Timesteps as NumPy array, noisiest first, and their number of steps.
        """
        kept = min(int(num_inference_steps * strength), num_inference_steps)
        start = max(num_inference_steps - kept, 0)
        return self.scheduler.timesteps.asnumpy()[start * self.scheduler.order :], num_inference_steps - start

    def get_inverse_timesteps(self, num_inference_steps: int, strength: float, device=None):
        """The inverse scheduler's timesteps that a strength leaves.

        Args:
            num_inference_steps: steps of the whole schedule, already set on the inverse scheduler.
            strength: share of them that runs, in [0, 1].
            device: not used.

        Returns:
            Timesteps as NumPy array, cleanest first, and their number of steps.
        """
        kept = min(int(num_inference_steps * strength), num_inference_steps)
        start = max(num_inference_steps - kept, 0)
        timesteps = self._ready_inverse_scheduler().timesteps.asnumpy()
        return (timesteps if start == 0 else timesteps[:-start]), num_inference_steps - start

    def _image_latents(self, pixels: np.ndarray, batch: int, copies: int, source) -> np.ndarray:
        """Clean scaled latents (batch * copies, C, h, w) with a posterior draw for each copy of each picture.

        Each picture is encoded once; the reference encodes every copy, with the same result, since the copies differ
        in the draw only.
        """
        if pixels.shape[1] == self.vae.config.latent_channels:
            latents = np.repeat(pixels.astype(np.float32), copies, axis=0)
        else:
            moments = self._stages.encode_image(pixels.astype(np.float32))
            options.check_finite(moments, "VAE encoding")
            moments = np.repeat(self._crosses("moments", moments), copies, axis=0)
            mean, logvar = np.split(moments, 2, axis=1)
            std = np.exp(np.float32(0.5) * np.clip(logvar, -30.0, 20.0))
            drawn = self._crosses("posterior_noise", self._noise(mean.shape, source))
            latents = np.float32(self.vae.config.scaling_factor) * (mean + std * drawn)
        if len(latents) != batch * copies:
            say_once("There are fewer pictures than prompts: the pictures are repeated.")
            latents = np.concatenate([latents] * (batch * copies // len(latents)))
        return self._crosses("latents", latents.astype(np.float32))

    def _noise(self, shape, source) -> np.ndarray:
        """Standard normal noise, float32, drawn as the reference draws it for models of this dtype."""
        return randomness.randn(shape, source, str(self.vae.dtype).rpartition(".")[2].lower())

    def _pixels(self, image, batch: int | None = None) -> np.ndarray:
        """The picture(s) of a call, (N, 3, H, W) in [-1, 1], or latents (N, C, h, w); N divides the batch, if given."""
        if image is None:
            raise InputError(
                "{parameter} is missing; give a picture (PIL, array, tensor, latents) or a list of them.",
                parameter="image",
            )
        pixels = pictures.preprocess_image(image, self.vae_scale_factor, self.vae.config.latent_channels)
        if batch is not None:
            options.check_image_batch(len(pixels), batch)
        return pixels

    def _check_sources(self, source, pixels: np.ndarray, batch: int, copies: int) -> None:
        """A list of generators needs one for each sample, and a picture for each prompt where the VAE encodes."""
        if not isinstance(source, list) or len(source) == 1:
            return
        options.check_generators(source, batch * copies)
        if pixels.shape[1] != self.vae.config.latent_channels and len(pixels) != batch:
            raise InputError(
                "A list of generators needs one picture for each prompt, but {count} pictures were given for {batch} "
                "prompts; give as many of each, or one generator.",
                parameter="generator",
                count=len(pixels),
                batch=batch,
            )

    @staticmethod
    def _noised(scheduler, latents: np.ndarray, noise: np.ndarray, timestep) -> np.ndarray:
        """Latents brought to a timestep's noise level; DPM-Solver++, on which the reference fails here, included."""
        if hasattr(scheduler, "noise_scale"):
            scale, spread = scheduler.noise_scale(timestep)
            return scale * latents + spread * noise
        import mindspore as ms

        from mindiffedit.runtime.kernels import eagerly

        with eagerly():
            result = scheduler.add_noise(
                ms.Tensor(latents), ms.Tensor(noise), ms.Tensor(np.repeat(timestep, len(latents)))
            )
        return result.asnumpy()

    @staticmethod
    def _scaled_input(scheduler, latents, timestep):
        """``scale_model_input`` of schedulers that have more than an identity there; array in, array out."""
        if hasattr(scheduler, "noise_scale"):
            return latents
        import mindspore as ms

        from mindiffedit.runtime.kernels import eagerly

        with eagerly():
            return scheduler.scale_model_input(ms.Tensor(latents), as_its_own(scheduler, timestep)).asnumpy()
