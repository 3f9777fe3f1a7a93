"""``StableDiffusionDiffEditPipeline``: the reference's three calls over compiled MindSpore stages.

Host work (strings, pictures, random numbers, the mask's statistics) is NumPy; models run in ``steps.Stages``. The
numbered comments follow the reference's steps. Where behaviour differs from the reference, the line carries an id
of ``docs/differences.md``.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass, fields
from typing import Any, Callable, Dict, List, Optional, Union

import numpy as np
import PIL.Image

from . import devices, models, options, pictures, randomness, regularisers

logger = logging.getLogger(__name__)

_ALREADY_SAID = set()


def _say_once(message: str) -> None:
    """A warning the first time in this process, silence afterwards."""
    if message not in _ALREADY_SAID:
        _ALREADY_SAID.add(message)
        logger.warning(message)


def _as_its_own(scheduler, timestep):
    """A timestep as the scheduler's own ``timesteps`` would give it: some refuse anything else."""
    import mindspore as ms

    return ms.Tensor(timestep.item(), scheduler.timesteps.dtype)


def _texts(prompt, batch: int) -> List[str]:
    """Prompts as a list; None is the empty text."""
    if prompt is None:
        return [""] * batch
    return [prompt] * batch if isinstance(prompt, str) else list(prompt)


class _Output:
    """Attributes, and a mapping of those that are not None with access by position: diffusers' outputs."""

    def keys(self) -> List[str]:
        """Names of the values that are not None, in order."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]

    def to_tuple(self) -> tuple:
        """The values that are not None, in order."""
        return tuple(getattr(self, name) for name in self.keys())

    def __getitem__(self, key):
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __contains__(self, key) -> bool:
        return key in self.keys()

    def __iter__(self):
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


@dataclass
class DiffEditInversionPipelineOutput(_Output):
    """What ``invert`` returns.

    Attributes:
        latents: mindspore.Tensor (B, T, C, h, w), noisiest first.
        images: decoded latents (list of B * T pictures, or array (B * T, H, W, 3) in [0, 1]), or None.
    """

    latents: Any
    images: Optional[Union[List[PIL.Image.Image], np.ndarray]] = None


@dataclass
class StableDiffusionPipelineOutput(_Output):
    """What a call of the pipeline returns.

    Attributes:
        images: list of B pictures, array (B, H, W, 3) in [0, 1], or latents tensor (B, C, h, w).
        nsfw_content_detected: one bool for each picture, or None without a safety checker.
    """

    images: Any
    nsfw_content_detected: Optional[List[bool]] = None


class StableDiffusionDiffEditPipeline:
    """Text-guided image editing with DiffEdit (arXiv 2210.11427).

    Args:
        vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor: the parts of a Stable
            Diffusion 1.x or 2.x checkpoint (mindone models; a transformers tokenizer).
        inverse_scheduler: scheduler of ``invert``; None: the inverse of ``scheduler`` where it has one.
        requires_safety_checker: warn when ``safety_checker`` is None.
        mode: "graph" (every stage compiled; the default) or "pynative" (operator by operator, to debug).

    Raises:
        ValueError: for a mode that is neither, or a safety checker without feature extractor.
    """

    MODES = ("graph", "pynative")

    def __init__(
        self,
        vae,
        text_encoder,
        tokenizer,
        unet,
        scheduler,
        safety_checker,
        feature_extractor,
        inverse_scheduler,
        requires_safety_checker: bool = True,
        mode: str = "graph",
    ):
        if mode not in self.MODES:
            raise ValueError(f"`mode` has to be one of {self.MODES}, but is {mode!r}.")
        if safety_checker is not None and feature_extractor is None:
            raise ValueError(
                "A safety checker needs a feature extractor, and none was given. Give `feature_extractor`, or"
                " `safety_checker=None` to run without one."
            )
        if safety_checker is None and requires_safety_checker:
            _say_once(
                "The safety checker is off (`safety_checker=None`): pictures are returned unfiltered. Keep it on where"
                " results are shown to the public; `requires_safety_checker=False` silences this notice."
            )
        self.vae, self.text_encoder, self.tokenizer, self.unet = vae, text_encoder, tokenizer, unet
        self.safety_checker, self.feature_extractor = safety_checker, feature_extractor
        self._outdated_options_mended(scheduler)
        self.scheduler, self.inverse_scheduler = scheduler, inverse_scheduler
        self.requires_safety_checker = requires_safety_checker
        self.mode = mode
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.unet_batch_size = 8
        self._progress_bar_config: Dict[str, Any] = {}
        self._stages_built = None
        self._own_inverse = None

    @staticmethod
    def _outdated_options_mended(scheduler) -> None:
        """Options of first-generation checkpoints that the reference corrects too (steps_offset, skip_prk_steps)."""
        config = getattr(scheduler, "config", {})
        if config.get("steps_offset", 1) != 1:
            _say_once(
                f"{type(scheduler).__name__} was configured with steps_offset={config['steps_offset']}; it is set to"
                " 1, which Stable Diffusion's schedules expect. Correct scheduler_config.json to silence this."
            )
            scheduler.register_to_config(steps_offset=1)
        if config.get("skip_prk_steps", True) is False:
            _say_once(f"{type(scheduler).__name__} was configured without skip_prk_steps; it is set to True.")
            scheduler.register_to_config(skip_prk_steps=True)

    # --- loading and saving --------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *,
        mode: str = "graph",
        mindspore_dtype=None,
        use_safetensors: Optional[bool] = None,
        variant: Optional[str] = None,
        cache_dir=None,
        force_download: bool = False,
        local_files_only: Optional[bool] = None,
        token=None,
        revision: Optional[str] = None,
        proxies=None,
        **kwargs,
    ) -> "StableDiffusionDiffEditPipeline":
        """Loads a checkpoint in Stable Diffusion layout.

        Args:
            pretrained_model_name_or_path: a folder, or a model id on the hub.
            mode: "graph" or "pynative".
            mindspore_dtype: dtype of the models; default float32. What the device does not have is loaded in float32
                with one warning.
            use_safetensors: None or True; weights are only ever read from safetensors files.
            variant, cache_dir, force_download, local_files_only, token, revision, proxies: as in huggingface_hub.
            kwargs: components by name that are taken as given instead of being loaded (``safety_checker=None``), and
                ``requires_safety_checker``.

        Raises:
            ValueError: a folder that is missing, incomplete or corrupt, or weights that do not fit.
        """
        if mode not in cls.MODES:
            raise ValueError(f"`mode` has to be one of {cls.MODES}, but is {mode!r}.")
        if use_safetensors is False:
            raise ValueError(
                "`use_safetensors=False` asks for pickled weights, which can run code when they are read; only"
                " safetensors files are loaded. Leave the argument out and use a folder that holds them."
            )
        accepted = set(inspect.signature(cls.__init__).parameters) - {"self", "mode"}
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in accepted}
        if kwargs:
            logger.warning(
                "Ignored arguments of from_pretrained that mean nothing here: %s.", ", ".join(sorted(kwargs))
            )
        dtype = mindspore_dtype
        if mindspore_dtype is not None:
            dtype, reason = devices.supported_dtype(mindspore_dtype)
            if reason:
                _say_once(reason)
        requires_safety_checker = overrides.pop("requires_safety_checker", None)
        folder = models.resolve_folder(
            pretrained_model_name_or_path,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            revision=revision,
            proxies=proxies,
            variant=variant,
            skip=overrides,
        )
        parts = models.load_components(
            folder, overrides=overrides, dtype=dtype, variant=variant, use_safetensors=True
        )
        if requires_safety_checker is not None:
            parts["requires_safety_checker"] = requires_safety_checker
        return cls(**parts, mode=mode)

    def save_pretrained(self, save_directory, variant: Optional[str] = None) -> None:
        """Writes a folder that this class and diffusers load; safetensors, written whole or not at all."""
        models.save_components(
            save_directory,
            self.components,
            requires_safety_checker=self.requires_safety_checker,
            variant=variant,
        )

    @property
    def components(self) -> Dict[str, Any]:
        """The parts by name; ``StableDiffusionDiffEditPipeline(**pipe.components)`` shares them."""
        names = (
            "vae",
            "text_encoder",
            "tokenizer",
            "unet",
            "scheduler",
            "safety_checker",
            "feature_extractor",
            "inverse_scheduler",
        )
        return {name: getattr(self, name) for name in names}

    @property
    def dtype(self):
        """dtype of the UNet."""
        return self.unet.dtype

    # --- switches that users of diffusers know --------------------------------------------------------------------

    def enable_model_cpu_offload(self, *args, **kwargs) -> None:
        """Accepted for compatibility: models are not moved between host and device here (said once)."""
        if devices.device_target() != "CPU":
            _say_once("enable_model_cpu_offload() changes nothing here: all models stay on the device.")

    def enable_sequential_cpu_offload(self, *args, **kwargs) -> None:
        """Accepted for compatibility, like ``enable_model_cpu_offload``."""
        self.enable_model_cpu_offload()

    def enable_vae_slicing(self) -> None:
        """Pictures always pass the VAE one at a time here, so there is nothing to switch on."""

    def disable_vae_slicing(self) -> None:
        """Slicing cannot be switched off (said once)."""
        _say_once("disable_vae_slicing() changes nothing here: pictures always pass the VAE one at a time.")

    def enable_vae_tiling(self) -> None:
        """Encode and decode in overlapping tiles, for large pictures; runs operator by operator."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Encode and decode whole pictures again."""
        self.vae.disable_tiling()

    def enable_attention_slicing(self, slice_size="auto") -> None:
        """Accepted for compatibility (said once)."""
        _say_once("enable_attention_slicing() changes nothing here yet: attention runs whole.")

    def disable_attention_slicing(self) -> None:
        """Nothing to undo."""

    def enable_xformers_memory_efficient_attention(self, attention_op=None) -> None:
        """mindone's flash attention where the device has it; elsewhere nothing changes (said once)."""
        if devices.device_target() == "Ascend":
            self.unet.enable_xformers_memory_efficient_attention()
            if self._stages_built is not None:
                self._stages_built.forget()
        else:
            _say_once("enable_xformers_memory_efficient_attention() changes nothing on this device.")

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Back to plain attention."""
        if devices.device_target() == "Ascend":
            self.unet.disable_xformers_memory_efficient_attention()
            if self._stages_built is not None:
                self._stages_built.forget()

    def set_progress_bar_config(self, **kwargs) -> None:
        """Options of ``tqdm`` for all progress bars; ``disable=True`` silences them."""
        self._progress_bar_config = kwargs

    def progress_bar(self, iterable=None, total: Optional[int] = None):
        """A ``tqdm`` bar with the configured options."""
        from tqdm.auto import tqdm

        if (iterable is None) == (total is None):
            raise ValueError("`progress_bar` takes either `iterable` or `total`.")
        if iterable is not None:
            return tqdm(iterable, **self._progress_bar_config)
        return tqdm(total=total, **self._progress_bar_config)

    # --- small parts ---------------------------------------------------------------------------------------------

    @property
    def _stages(self):
        from .steps import Stages

        parts = (self.unet, self.vae, self.text_encoder, self.mode)
        if self._stages_built is None or not self._stages_built.serves(*parts):
            self._stages_built = Stages(*parts)
        return self._stages_built

    @staticmethod
    def _tensor(array: np.ndarray, dtype=None):
        import mindspore as ms

        tensor = ms.Tensor(np.asarray(array, order="C"))  # ascontiguousarray would make a 0-d array 1-d
        return tensor if dtype is None or tensor.dtype == dtype else tensor.astype(dtype)

    def _ready_scheduler(self):
        from .schedulers import portable

        self.scheduler = portable(self.scheduler)
        return self.scheduler

    def _ready_inverse_scheduler(self):
        """The inverse scheduler in use: the one that was set, or else the one that belongs to the scheduler."""
        from .schedulers import inverse_of, portable

        if self.inverse_scheduler is not None:
            self.inverse_scheduler = portable(self.inverse_scheduler)
            return self.inverse_scheduler
        scheduler = self._ready_scheduler()
        # Not stored as ``inverse_scheduler``: it has to follow when another scheduler is set.
        if self._own_inverse is None or self._own_inverse[0] is not scheduler:
            self._own_inverse = (scheduler, inverse_of(scheduler))
        return self._own_inverse[1]

    @staticmethod
    def _set_timesteps(scheduler, num_inference_steps: int) -> None:
        """``set_timesteps`` before any model runs, with errors that say what to do."""
        name, trained = type(scheduler).__name__, scheduler.config.num_train_timesteps
        if num_inference_steps > trained:
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps}, but the model was trained with {trained} timesteps;"
                " give fewer steps."
            )
        try:
            scheduler.set_timesteps(num_inference_steps)
        except ValueError as error:
            raise ValueError(
                f"{name} cannot make a schedule of {num_inference_steps} steps: {error}"
            ) from error

    @staticmethod
    def _check_range(scheduler, timesteps: np.ndarray, num_inference_steps: int) -> None:
        """Timesteps beyond the noise table, which an offset on a full-length schedule gives, are an error."""
        most = scheduler.config.num_train_timesteps - 1
        if timesteps.max() > most:
            raise ValueError(
                f"{num_inference_steps} steps reach timestep {int(timesteps.max())}, but the model's last is {most}; give"
                " fewer steps."
            )

    def _attention_kwargs(self, given) -> Dict[str, Any]:
        """Checked ``cross_attention_kwargs`` that the attention processors know; others are ignored with a warning."""
        given = options.check_attention_kwargs(given)
        # The weight of LoRA layers, of which there are none here.
        given.pop("scale", None)
        if not given:
            return {}
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
            logger.warning(
                "cross_attention_kwargs %r is not known to the attention processors and is ignored.", name
            )
            del given[name]
        return given

    def _tokens(self, texts: List[str], length: int):
        return self.tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="np"
        )

    def _warn_of_truncation(self, texts: List[str], token_ids: np.ndarray) -> None:
        whole = self.tokenizer(texts, padding="longest", return_tensors="np").input_ids
        if whole.shape[-1] >= token_ids.shape[-1] and not np.array_equal(whole, token_ids):
            limit = self.tokenizer.model_max_length
            removed = self.tokenizer.batch_decode(whole[:, limit - 1 : -1])
            logger.warning(
                "The text encoder reads %d tokens; this part of the prompt was cut off: %s", limit, removed
            )

    def _embed(
        self, texts: List[str], length: Optional[int] = None, skip: Optional[int] = None
    ) -> np.ndarray:
        """Prompt embeddings (B, L, D) float32 of texts, padded or cut to the tokenizer's length."""
        inputs = self._tokens(texts, length or self.tokenizer.model_max_length)
        if length is None:
            self._warn_of_truncation(texts, inputs.input_ids)
        uses_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
        return self._stages.encode_text(inputs.input_ids, inputs.attention_mask if uses_mask else None, skip)

    def encode_prompt(
        self,
        prompt,
        device,
        num_images_per_prompt,
        do_classifier_free_guidance,
        negative_prompt=None,
        prompt_embeds=None,
        negative_prompt_embeds=None,
        lora_scale: Optional[float] = None,
        clip_skip: Optional[int] = None,
    ):
        """Text to prompt embeddings, as the reference's method of that name.

        Args:
            prompt: str or list of B str; or None with ``prompt_embeds`` (B, L, D).
            device: ignored; MindSpore places tensors on its device target.
            num_images_per_prompt: each embedding is repeated this often, one after the other.
            do_classifier_free_guidance: whether to give negatives too.
            negative_prompt: str or list of B str; None means the empty text.
            negative_prompt_embeds: (B, L, D), instead of ``negative_prompt``.
            lora_scale: accepted, not used (no LoRA layers are loaded here).
            clip_skip: take the hidden state this many layers before the last; of the prompt only, like the reference.

        Returns:
            Prompt and negative embeddings, tensors (B * num_images_per_prompt, L, D) in the text encoder's dtype;
            the second is None (or what was given) without guidance.
        """
        options.check_positive_int("num_images_per_prompt", num_images_per_prompt)
        if clip_skip is not None:
            options.check_clip_skip(clip_skip, self.text_encoder.config.num_hidden_layers)
        positive, negative = self._encode_prompt_arrays(
            prompt,
            num_images_per_prompt,
            do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            clip_skip,
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
    ):
        """``encode_prompt`` on the host: float32 arrays."""
        self._check_widths(prompt_embeds, negative_prompt_embeds, is_guided, prefix)
        batch = options.check_prompt_inputs(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, prefix, guided=is_guided
        )
        if prompt_embeds is None:
            positive = self._embed([prompt] if isinstance(prompt, str) else prompt, skip=clip_skip)
        else:
            positive = pictures.to_numpy(prompt_embeds).astype(np.float32)
        options.check_finite(positive, f"{prefix}prompt embeddings")
        negative = None if negative_prompt_embeds is None else pictures.to_numpy(negative_prompt_embeds)
        if is_guided:
            if negative is None:
                if negative_prompt is None:
                    negative_prompt = ""
                texts = [negative_prompt] * batch if isinstance(negative_prompt, str) else negative_prompt
                negative = self._embed(texts, length=positive.shape[1])
            if negative.shape != positive.shape:
                raise ValueError(
                    f"The negative prompt's embeddings have the shape {negative.shape}, the prompt's {positive.shape};"
                    " they have to be the same."
                )
            options.check_finite(negative, f"{prefix}negative prompt embeddings")
            negative = np.repeat(negative.astype(np.float32), copies, axis=0)
        return np.repeat(positive, copies, axis=0), negative

    def _check_widths(self, prompt_embeds, negative_prompt_embeds, is_guided: bool, prefix: str) -> None:
        """Embeddings as wide as the UNet takes them, and no longer than a negative made of text can be."""
        width = self.unet.config.cross_attention_dim
        for name, embeds in (
            ("prompt_embeds", prompt_embeds),
            ("negative_prompt_embeds", negative_prompt_embeds),
        ):
            if embeds is not None and isinstance(width, int) and embeds.shape[-1] != width:
                raise ValueError(f"`{prefix}{name}` is {embeds.shape[-1]} wide, but this UNet takes {width}.")
        if prompt_embeds is None or negative_prompt_embeds is not None or not is_guided:
            return
        most = self.tokenizer.model_max_length
        if prompt_embeds.shape[1] > most:
            raise ValueError(
                f"`{prefix}prompt_embeds` is {prompt_embeds.shape[1]} tokens long, but the text encoder, which makes the"
                f" negative, reads {most}; give `{prefix}negative_prompt_embeds` as well."
            )

    def get_timesteps(self, num_inference_steps: int, strength: float, device=None):
        """The scheduler's timesteps (NumPy, noisiest first) that a strength leaves, and their number of steps."""
        kept = min(int(num_inference_steps * strength), num_inference_steps)
        start = max(num_inference_steps - kept, 0)
        return self.scheduler.timesteps.asnumpy()[start * self.scheduler.order :], num_inference_steps - start

    def get_inverse_timesteps(self, num_inference_steps: int, strength: float, device=None):
        """The inverse scheduler's timesteps (NumPy, cleanest first) that a strength leaves, and their number."""
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
            mean, logvar = np.split(np.repeat(moments, copies, axis=0), 2, axis=1)
            std = np.exp(np.float32(0.5) * np.clip(logvar, -30.0, 20.0))
            latents = np.float32(self.vae.config.scaling_factor) * (
                mean + std * randomness.randn(mean.shape, source)
            )
        if len(latents) != batch * copies:
            _say_once("There are fewer pictures than prompts: the pictures are repeated.")
            latents = np.concatenate([latents] * (batch * copies // len(latents)))
        return latents.astype(np.float32)

    def _pixels(self, image, batch: int) -> np.ndarray:
        """The picture(s) of a call, (N, 3, H, W) in [-1, 1], or latents (N, C, h, w); N divides the batch."""
        if image is None:
            raise ValueError(
                "`image` is missing; give a picture (PIL, array, tensor, latents) or a list of them."
            )
        pixels = pictures.preprocess_image(image, self.vae_scale_factor, self.vae.config.latent_channels)
        options.check_image_batch(len(pixels), batch)
        return pixels

    def _check_sources(self, source, pixels: np.ndarray, batch: int, copies: int) -> None:
        """A list of generators needs one for each sample, and a picture for each prompt where the VAE encodes."""
        if not isinstance(source, list) or len(source) == 1:
            return
        options.check_generators(source, batch * copies)
        if pixels.shape[1] != self.vae.config.latent_channels and len(pixels) != batch:
            raise ValueError(
                f"A list of generators needs one picture for each prompt, but {len(pixels)} pictures were given for"
                f" {batch} prompts."
            )

    @staticmethod
    def _noised(scheduler, latents: np.ndarray, noise: np.ndarray, timestep) -> np.ndarray:
        """Latents brought to a timestep's noise level; DPM-Solver++, on which the reference fails here, included."""
        if hasattr(scheduler, "noise_scale"):
            scale, spread = scheduler.noise_scale(timestep)
            return scale * latents + spread * noise
        import mindspore as ms

        from .kernels import portable_kernels

        with portable_kernels(), devices.eager():
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

        from .kernels import portable_kernels

        with portable_kernels(), devices.eager():
            return scheduler.scale_model_input(ms.Tensor(latents), _as_its_own(scheduler, timestep)).asnumpy()

    # --- generate_mask -------------------------------------------------------------------------------------------

    def generate_mask(
        self,
        image=None,
        target_prompt: Optional[Union[str, List[str]]] = None,
        target_negative_prompt: Optional[Union[str, List[str]]] = None,
        target_prompt_embeds=None,
        target_negative_prompt_embeds=None,
        source_prompt: Optional[Union[str, List[str]]] = None,
        source_negative_prompt: Optional[Union[str, List[str]]] = None,
        source_prompt_embeds=None,
        source_negative_prompt_embeds=None,
        num_maps_per_mask: Optional[int] = 10,
        mask_encode_strength: Optional[float] = 0.5,
        mask_thresholding_ratio: Optional[float] = 3.0,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        generator=None,
        output_type: Optional[str] = "np",
        cross_attention_kwargs: Optional[Dict[str, Any]] = None,
    ):
        """Where the picture has to change: the thresholded difference of noise predictions for two prompts.

        Section 3.2 of arXiv 2210.11427; the reference's method of the same name.

        Args:
            image: picture(s) (PIL, list, array (B, H, W, 3) in [0, 1], tensor (B, 3, H, W)), or latents (B, 4, h, w).
            target_prompt, source_prompt: what shall be there, what is there; str or list of B str.
            target_negative_prompt, source_negative_prompt: negatives; used with ``guidance_scale`` > 1.
            *_embeds: embeddings (B, L, D) instead of the text.
            num_maps_per_mask: noise maps averaged for a mask, at least 1.
            mask_encode_strength: noise level in (0, 1] at which the predictions are compared.
            mask_thresholding_ratio: the map is clamped to this multiple of its mean; mask where above half the clamp.
            num_inference_steps: number of steps of the schedule from which the noise level is taken.
            guidance_scale: classifier-free guidance; off at 1 and below.
            generator: int seed, numpy.random.Generator, or a list with one for each of B * num_maps_per_mask samples.
            output_type: "np" or "pil".
            cross_attention_kwargs: plain values handed to the UNet's attention.

        Returns:
            "np": int64 array (B, h, w) of 0 and 1, on the latents' grid; "pil": list of B one-channel pictures, 0/255.

        Raises:
            ValueError, TypeError: for input that does not fit, before any model runs.
            options.NumericalError: for NaN or inf in a stage, or predictions that do not differ at all.
        """
        # 1. Check inputs
        options.check_guidance_scale(guidance_scale)
        is_guided = guidance_scale > 1.0
        batch = options.check_prompt_inputs(
            target_prompt,
            target_negative_prompt,
            target_prompt_embeds,
            target_negative_prompt_embeds,
            "target_",
            is_guided,
        )
        sources = options.check_prompt_inputs(
            source_prompt,
            source_negative_prompt,
            source_prompt_embeds,
            source_negative_prompt_embeds,
            "source_",
            is_guided,
        )
        if sources != batch:
            raise ValueError(
                f"There are {sources} source prompts for {batch} target prompts; give as many of each."
            )
        options.check_positive_int("num_maps_per_mask", num_maps_per_mask)
        options.check_strength(mask_encode_strength, "mask_encode_strength")
        options.check_ratio(mask_thresholding_ratio)
        options.check_steps(num_inference_steps)
        options.effective_steps(num_inference_steps, mask_encode_strength, "mask_encode_strength")
        options.check_output_type(output_type, ("np", "pil"))
        same_negatives = _texts(target_negative_prompt, batch) == _texts(source_negative_prompt, batch) and (
            target_negative_prompt_embeds is None and source_negative_prompt_embeds is None
        )
        if (
            target_prompt is not None
            and source_prompt is not None
            and (
                _texts(target_prompt, batch) == _texts(source_prompt, batch)
                and (same_negatives or not is_guided)
            )
        ):
            raise ValueError(
                f"Source and target prompt are the same ({target_prompt!r}), so there is no difference to make a mask"
                " of; say in the target prompt what shall change."
            )
        source = randomness.resolve(generator)
        attention_kwargs = self._attention_kwargs(cross_attention_kwargs)
        scheduler = self._ready_scheduler()
        # 5. Set timesteps (before the models run, so that a bad schedule fails first)
        self._set_timesteps(scheduler, num_inference_steps)
        timestep = self.get_timesteps(num_inference_steps, mask_encode_strength)[0][0]
        self._check_range(scheduler, timestep, num_inference_steps)
        # 4. Preprocess image
        pixels = self._pixels(image, batch)
        self._check_sources(source, pixels, batch, num_maps_per_mask)

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
        )

        # 8. The mask. D4: the clamp is a mean over the whole batch, as in the reference.
        magnitude = maps.mean(dtype=np.float64).astype(np.float32) * np.float32(mask_thresholding_ratio)
        if magnitude == 0:
            raise options.NumericalError(
                "Source and target prompt give the same noise prediction everywhere, so there is no difference to"
                " make a mask of; say in the target prompt what shall change."
            )
        mask = np.where(np.clip(maps, 0, magnitude) / magnitude <= 0.5, 0, 1)

        # 9. Convert
        return pictures.mask_to_pil(mask) if output_type == "pil" else mask

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
    ) -> np.ndarray:
        """The averaged noise difference before the threshold, (B, h, w) float32, at least 0."""
        is_guided = guidance_scale > 1.0

        # 3. Encode input prompts
        def encode(texts, prefix):
            prompt, negative, embeds, negative_embeds = texts
            return self._encode_prompt_arrays(
                prompt, copies, is_guided, negative, embeds, negative_embeds, prefix=prefix
            )

        target, target_negative = encode(target_texts, "target_")
        origin, origin_negative = encode(source_texts, "source_")
        if target.shape != origin.shape:
            raise ValueError(
                f"Source and target embeddings have the shapes {origin.shape} and {target.shape}; they have to match."
            )

        # 6. Image latents, noised
        latents = self._image_latents(pixels, batch, copies, source)
        noise = randomness.randn(latents.shape, source)
        noised = self._noised(scheduler, latents, noise, timestep)
        noised = self._scaled_input(scheduler, noised, timestep)

        # 7. Predict the noise; guidance needs four predictions for each map, otherwise two
        branches = [origin_negative, origin, target_negative, target] if is_guided else [origin, target]
        predictions = self._predict_all(
            np.concatenate([noised] * len(branches)), timestep, np.concatenate(branches), attention_kwargs
        )
        if is_guided:
            on_source_negative, on_source, on_target_negative, on_target = np.split(predictions, 4)
            # D1: the reference takes the negative for the prompt and the prompt for the negative here, which turns
            # the guidance round. Kept, so that masks are the reference's.
            scale = np.float32(guidance_scale)
            source_noise = on_source + scale * (on_source_negative - on_source)
            target_noise = on_target + scale * (on_target_negative - on_target)
        else:
            source_noise, target_noise = np.split(predictions, 2)

        # 8. Mean over maps and channels of the absolute difference
        difference = np.abs(target_noise - source_noise)
        difference = difference.reshape(batch, copies, *difference.shape[1:])
        return difference.mean(axis=(1, 2), dtype=np.float64).astype(np.float32)

    def _predict_all(self, latents, timestep, embeds, attention_kwargs) -> np.ndarray:
        """Model outputs of N samples, in batches of one fixed size so that one graph serves any N."""
        size = min(self.unet_batch_size, len(latents))
        outputs = []
        with self.progress_bar(total=-(-len(latents) // size)) as bar:
            for start in range(0, len(latents), size):
                # The last batch is moved back to be full; what it computes again is left out.
                begin = min(start, len(latents) - size)
                output = self._stages.predict(
                    latents[begin : begin + size], timestep, embeds[begin : begin + size], attention_kwargs
                )
                options.check_finite(output, "mask noise prediction", start // size)
                outputs.append(output[start - begin :])
                bar.update()
        return np.concatenate(outputs)

    # --- invert --------------------------------------------------------------------------------------------------

    def invert(
        self,
        prompt: Optional[Union[str, List[str]]] = None,
        image=None,
        num_inference_steps: int = 50,
        inpaint_strength: float = 0.8,
        guidance_scale: float = 7.5,
        negative_prompt: Optional[Union[str, List[str]]] = None,
        generator=None,
        prompt_embeds=None,
        negative_prompt_embeds=None,
        decode_latents: bool = False,
        output_type: Optional[str] = "pil",
        return_dict: bool = True,
        callback: Optional[Callable[[int, int, Any], None]] = None,
        callback_steps: Optional[int] = 1,
        cross_attention_kwargs: Optional[Dict[str, Any]] = None,
        lambda_auto_corr: float = 20.0,
        lambda_kl: float = 20.0,
        num_reg_steps: int = 0,
        num_auto_corr_rolls: int = 5,
    ):
        """Latents of the picture from nearly clean to noisy, along the inverse scheduler.

        Args:
            prompt: caption(s) of the picture, str or list of B str; or ``prompt_embeds`` (B, L, D).
            image: as for ``generate_mask``.
            num_inference_steps: steps of the whole schedule.
            inpaint_strength: share of them that is run, (0, 1]; the same for the edit.
            guidance_scale, negative_prompt, negative_prompt_embeds: classifier-free guidance; off at 1 and below.
            generator: int seed or generator(s) of the VAE's posterior draw (and the regulariser's shifts).
            decode_latents: decode every latent into a picture as well.
            output_type: of those pictures, "pil" or "np".
            return_dict: False gives the tuple (latents, images).
            callback, callback_steps: ``callback(step, timestep, latents)`` every ``callback_steps`` steps.
            lambda_auto_corr, lambda_kl, num_reg_steps, num_auto_corr_rolls: regularisation of each noise prediction
                towards white noise (Pix2Pix-Zero); off with ``num_reg_steps=0``.

        Returns:
            DiffEditInversionPipelineOutput: ``latents`` (B, T, C, h, w), noisiest first, T = steps run.

        Raises:
            ValueError, TypeError: for input that does not fit, before any model runs.
            options.NumericalError: for NaN or inf, naming stage and step.
        """
        # 1. Check inputs
        options.check_guidance_scale(guidance_scale)
        is_guided = guidance_scale > 1.0
        batch = options.check_prompt_inputs(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, guided=is_guided
        )
        options.check_strength(inpaint_strength, "inpaint_strength")
        options.check_steps(num_inference_steps)
        options.effective_steps(num_inference_steps, inpaint_strength, "inpaint_strength")
        if decode_latents:
            options.check_output_type(output_type, ("pil", "np"))
        options.check_callback(callback, callback_steps)
        options.check_regularisation(lambda_auto_corr, lambda_kl, num_reg_steps, num_auto_corr_rolls)
        source = randomness.resolve(generator)
        attention_kwargs = self._attention_kwargs(cross_attention_kwargs)
        scheduler = self._ready_inverse_scheduler()
        if num_reg_steps > 0 and is_guided and batch > 1 and scheduler.config.prediction_type != "epsilon":
            raise ValueError(  # D7
                f"`num_reg_steps` with guidance and prediction type {scheduler.config.prediction_type!r} works for one"
                f" prompt at a time, but {batch} were given; set guidance_scale=1 or invert them one by one."
            )
        # 6. Prepare timesteps (before the models run, so that a bad schedule fails first)
        self._set_timesteps(scheduler, num_inference_steps)
        timesteps, steps = self.get_inverse_timesteps(num_inference_steps, inpaint_strength)
        self._check_range(scheduler, timesteps, num_inference_steps)

        # 2. to 4. Picture to latents
        pixels = self._pixels(image, batch)
        self._check_sources(source, pixels, batch, 1)
        latents = self._image_latents(pixels, batch, 1, source)

        # 5. Encode input prompt
        embeds = self._joined_embeds(
            prompt, 1, is_guided, negative_prompt, prompt_embeds, negative_prompt_embeds
        )

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

        inverted = self._run(
            "inversion",
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
        return DiffEditInversionPipelineOutput(latents=result, images=images)

    def _joined_embeds(
        self, prompt, copies, is_guided, negative_prompt, prompt_embeds, negative_prompt_embeds, skip=None
    ):
        """Embeddings as the step takes them: negatives first with guidance."""
        positive, negative = self._encode_prompt_arrays(
            prompt, copies, is_guided, negative_prompt, prompt_embeds, negative_prompt_embeds, skip
        )
        return np.concatenate([negative, positive]) if is_guided else positive

    def _decoded(self, latents: np.ndarray) -> np.ndarray:
        images = self._stages.decode_latents(latents / np.float32(self.vae.config.scaling_factor))
        options.check_finite(images, "VAE decoding")
        return images

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
    ) -> List[np.ndarray]:
        """The loop of ``invert`` (no mask) and of the edit: latents after every step, each (B, C, h, w) float32."""
        is_guided = guidance_scale > 1.0
        plan = None
        if regularise is None and hasattr(scheduler, "plan"):
            accepts_eta = "eta" in inspect.signature(scheduler.plan).parameters
            plan = scheduler.plan(timesteps, eta) if accepts_eta else scheduler.plan(timesteps)
        if plan is not None:
            advance = self._fused_advance(
                plan, embeds, guidance_scale, attention_kwargs, latents, mask, backgrounds, source
            )
        else:
            advance = self._stepwise_advance(
                scheduler,
                embeds,
                guidance_scale,
                is_guided,
                attention_kwargs,
                mask,
                backgrounds,
                eta,
                source,
                regularise,
            )
        warmup = len(timesteps) - steps * scheduler.order
        results = []
        with self.progress_bar(total=steps) as bar:
            for i, t in enumerate(timesteps):
                latents = advance(i, t, latents)
                options.check_finite(latents, stage, i)
                results.append(latents)
                if i == len(timesteps) - 1 or ((i + 1) > warmup and (i + 1) % scheduler.order == 0):
                    bar.update()
                    if callback is not None and i % callback_steps == 0:
                        callback(i // scheduler.order, t, self._tensor(latents, self.unet.dtype))
        return results

    def _fused_advance(self, plan, embeds, guidance_scale, attention_kwargs, like, mask, backgrounds, source):
        """One compiled call for each step. Without a mask everything is inside it."""
        run = self._stages.step(plan, guidance_scale > 1.0, attention_kwargs)
        zeros = self._tensor(np.zeros(like.shape, np.float32))
        ones = np.ones((like.shape[0], 1, *like.shape[2:]), np.float32)
        inside = self._tensor(ones if mask is None else mask)
        prompt_embeds = self._tensor(embeds, self.unet.dtype)
        guidance = self._tensor(np.float32(guidance_scale))
        previous_clean = zeros

        def advance(i, t, latents):
            nonlocal previous_clean
            noise = self._tensor(randomness.randn(like.shape, source)) if plan.noisy else zeros
            background = zeros if backgrounds is None else self._tensor(backgrounds[i])
            updated, previous_clean = run(
                self._tensor(latents),
                previous_clean,
                self._tensor(np.float32(t)),
                prompt_embeds,
                guidance,
                self._tensor(plan.coefficients[i]),
                inside,
                background,
                noise,
            )
            return updated.asnumpy()

        return advance

    def _stepwise_advance(
        self,
        scheduler,
        embeds,
        guidance_scale,
        is_guided,
        attention_kwargs,
        mask,
        backgrounds,
        eta,
        source,
        regularise,
    ):
        """The compiled UNet with guidance, then the scheduler's own ``step``: any scheduler, any option."""
        import mindspore as ms

        from .kernels import portable_kernels

        embeds = self._tensor(embeds, self.unet.dtype)
        accepted = inspect.signature(scheduler.step).parameters
        extra = {"eta": eta} if "eta" in accepted else {}
        wants_noise = "variance_noise" in accepted
        stochastic = (eta > 0 and "eta" in accepted) or "sde" in str(
            scheduler.config.get("algorithm_type", "")
        )
        if not wants_noise and "generator" in accepted:
            extra["generator"] = randomness.Draws(source)

        def advance(i, t, latents):
            model_input = self._scaled_input(scheduler, latents, t)
            output = self._stages.guided(
                self._tensor(model_input), t, embeds, guidance_scale, is_guided, attention_kwargs
            )
            if regularise is not None:
                doubled = np.concatenate([model_input] * 2) if is_guided else model_input
                output = ms.Tensor(regularise(output.asnumpy(), doubled, t))
            if wants_noise and stochastic:
                extra["variance_noise"] = ms.Tensor(randomness.randn(latents.shape, source))
            with portable_kernels(), devices.eager():
                updated = scheduler.step(
                    output, _as_its_own(scheduler, t), ms.Tensor(latents), **extra, return_dict=False
                )[0].asnumpy()
            if mask is None:
                return updated
            return updated * mask + backgrounds[i] * (1 - mask)

        return advance

    # --- the edit ------------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompt: Optional[Union[str, List[str]]] = None,
        mask_image=None,
        image_latents=None,
        inpaint_strength: Optional[float] = 0.8,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: Optional[Union[str, List[str]]] = None,
        num_images_per_prompt: Optional[int] = 1,
        eta: float = 0.0,
        generator=None,
        latents=None,
        prompt_embeds=None,
        negative_prompt_embeds=None,
        output_type: Optional[str] = "pil",
        return_dict: bool = True,
        callback: Optional[Callable[[int, int, Any], None]] = None,
        callback_steps: int = 1,
        cross_attention_kwargs: Optional[Dict[str, Any]] = None,
        clip_skip: int = None,
    ):
        """Denoise toward ``prompt`` inside the mask, keep the inverted latents outside.

        Args:
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds: what shall be there and what not; B of each.
            mask_image: (B or 1, h, w) on the latents' grid, 0 = keep, 1 = change; PIL, array, tensor or list.
            image_latents: from ``invert``: (B, T, C, h, w), noisiest first, or (B * T, C, h, w).
            inpaint_strength, num_inference_steps: as given to ``invert``.
            guidance_scale: classifier-free guidance; off at 1 and below.
            num_images_per_prompt: results for each prompt (they differ only with ``eta`` > 0).
            eta: DDIM's eta in [0, 1]; other schedulers ignore it.
            generator: int seed or generator(s) of the noise that ``eta`` > 0 adds.
            latents: ignored, as in the reference; the edit starts from ``image_latents``.
            output_type: "pil", "np" or "latent".
            return_dict: False gives the tuple (images, nsfw_content_detected).
            callback, callback_steps, cross_attention_kwargs: as for ``invert``.
            clip_skip: take the prompt's embeddings this many layers before the text encoder's last.

        Returns:
            StableDiffusionPipelineOutput: B * num_images_per_prompt pictures.

        Raises:
            ValueError, TypeError: for input that does not fit, before any model runs.
            options.NumericalError: for NaN or inf, naming stage and step.
        """
        # 1. Check inputs
        options.check_guidance_scale(guidance_scale)
        is_guided = guidance_scale > 1.0
        batch = options.check_prompt_inputs(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, guided=is_guided
        )
        options.check_strength(inpaint_strength, "inpaint_strength")
        options.check_steps(num_inference_steps)
        options.effective_steps(num_inference_steps, inpaint_strength, "inpaint_strength")
        options.check_positive_int("num_images_per_prompt", num_images_per_prompt)
        options.check_eta(eta)
        options.check_output_type(output_type, ("pil", "np", "latent"))
        options.check_callback(callback, callback_steps)
        if clip_skip is not None:
            options.check_clip_skip(clip_skip, self.text_encoder.config.num_hidden_layers)
        if mask_image is None:
            raise ValueError("`mask_image` is missing; `generate_mask()` computes one from two prompts.")
        if image_latents is None:
            raise ValueError("`image_latents` is missing; `invert()` computes them from a picture.")
        source = randomness.resolve(generator)
        if isinstance(source, list) and len(source) > 1 and eta > 0:
            options.check_generators(source, batch * num_images_per_prompt)
        attention_kwargs = self._attention_kwargs(cross_attention_kwargs)
        scheduler = self._ready_scheduler()

        # 4. Preprocess mask (before the prompts are encoded, so that bad input fails first)
        mask = pictures.preprocess_mask(mask_image, batch)
        latent_shape = (self.vae.config.latent_channels, *mask.shape[-2:])
        # D2: the reference repeats the batch of masks as a whole but each picture's latents one after the other, so
        # that with several prompts and several images for each the masks change places. Kept.
        mask = np.concatenate([np.broadcast_to(mask, (batch, *mask.shape[1:]))] * num_images_per_prompt)

        # 5. Set timesteps
        self._set_timesteps(scheduler, num_inference_steps)
        timesteps, steps = self.get_timesteps(num_inference_steps, inpaint_strength)
        self._check_range(scheduler, timesteps, num_inference_steps)

        # 6. Preprocess image latents
        array = options.check_image_latents(
            self._latents_array(image_latents), batch, len(timesteps), latent_shape
        )
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
        )

        # 8. Denoising loop. D3: the background of step i is image_latents[i], one noise level late, as in the reference.
        edited = self._run(
            "edit",
            scheduler,
            timesteps,
            steps,
            backgrounds[0],
            embeds,
            guidance_scale,
            attention_kwargs,
            callback,
            callback_steps,
            mask=mask,
            backgrounds=backgrounds,
            eta=eta,
            source=source,
        )[-1]

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

    @staticmethod
    def _latents_array(image_latents) -> np.ndarray:
        if isinstance(image_latents, (list, tuple)):
            parts = [pictures.to_numpy(part) for part in image_latents]
            parts = [part[None] if part.ndim == 3 else part for part in parts]
            if not parts or len({part.shape[1:] for part in parts}) > 1:
                shapes = [part.shape for part in parts]
                raise ValueError(
                    f"`image_latents` has to be a list of latents of one shape, but has {shapes}."
                )
            return np.concatenate(parts)
        array = pictures.to_numpy(image_latents)
        return array[None] if array.ndim == 3 else array

    def run_safety_checker(self, images: np.ndarray):
        """Pictures (B, 3, H, W) in [-1, 1] with flagged ones zeroed, and the flags; (pictures, None) without a checker."""
        if self.safety_checker is None:
            return images, None
        import mindspore as ms

        from .kernels import portable_kernels

        inputs = self.feature_extractor(pictures.postprocess_image(images, "pil"), return_tensors="np")
        with portable_kernels(), devices.eager():
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
