"""The pipeline's components: construction, loading, saving, and the switches around them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

from mindiffedit.checkpoints import hub, lora, models, old_configs, saving, survey
from mindiffedit.checkpoints.layout import COMPONENTS
from mindiffedit.errors import InputError, Message
from mindiffedit.images import tiling
from mindiffedit.runtime import compile_cache as compile_caches
from mindiffedit.runtime import devices, turns
from mindiffedit.runtime.notices import say_once

logger = logging.getLogger(__name__)


class PipelineComponents:
    """Holds the components and the mode; loads and saves them; the switches that users of diffusers know.

    No switch raises, so that programs written for diffusers run as they are.

    The constructor's arguments are documented at ``StableDiffusionDiffEditPipeline``.
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
        compile_cache=None,
    ):
        from mindiffedit.runtime import graphs

        self._check_mode(mode)
        if safety_checker is not None and feature_extractor is None:
            raise InputError(
                "A safety checker needs a feature extractor, and none was given. Give {parameter}, or "
                "{safety_checker=None} to run without one.",
                parameter="feature_extractor",
            )
        if safety_checker is None and requires_safety_checker:
            say_once(
                Message(
                    "The safety checker is off ({safety_checker=None}): pictures are returned unfiltered. Keep it on"
                    " where results are shown to the public; {requires_safety_checker=False} silences this notice."
                )
            )
        self.vae, self.text_encoder, self.tokenizer, self.unet = vae, text_encoder, tokenizer, unet
        self.safety_checker, self.feature_extractor = safety_checker, feature_extractor
        changes = old_configs.unet_changes(getattr(unet, "config", {}))
        if changes:
            unet.register_to_config(**changes)  # as the reference does; a UNet's config is no part of its graph
        changes = old_configs.scheduler_changes(getattr(scheduler, "config", {}))
        if changes:
            scheduler = copy.copy(scheduler)  # the caller's own may serve other pipelines
            scheduler.register_to_config(**changes)
        self.scheduler, self.inverse_scheduler = scheduler, inverse_scheduler
        self.requires_safety_checker = requires_safety_checker
        self.mode = mode
        self._fitting: tuple = ()
        self.check_components()
        self.observer: Callable | None = None
        self._viewers: dict[int, Callable] = {}  # by thread
        self.compile_cache = compile_caches.open_cache(compile_cache) if mode == "graph" else None
        self.unet_batch_size = 2  # samples in one UNet evaluation: a guided step of one picture
        self.max_graphs = graphs.max_graphs(self.compile_cache)
        self.jit_level = graphs.JIT_LEVELS[0]
        self._progress_bar_config: dict[str, Any] = {}
        self._stages_built: Any = None
        self._own_inverse: tuple[Any, ...] | None = None

    @classmethod
    def _check_mode(cls, mode: str) -> None:
        if mode not in cls.MODES:
            raise InputError(
                "{parameter} has to be one of {modes}, but is {mode!r}.", "mode", modes=cls.MODES, mode=mode
            )

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name; ``StableDiffusionDiffEditPipeline(**pipe.components)`` shares them."""
        return {name: getattr(self, name) for name in COMPONENTS}

    def check_components(self) -> None:
        """ValueError where the components cannot work together; asked before every call, since each can be replaced."""
        parts = (self.unet, self.vae, self.text_encoder, self.tokenizer)
        if len(self._fitting) != len(parts) or any(a is not b for a, b in zip(parts, self._fitting)):
            survey.check_fit(self.components)
            self._fitting = parts

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of a latent, along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def dtype(self):
        """dtype of the UNet."""
        return self.unet.dtype

    # --- loading and saving --------------------------------------------------------------------------------------

    @classmethod
    @turns.turn()
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *,
        mode: str = "graph",
        compile_cache=None,
        mindspore_dtype=None,
        variant: str | None = None,
        **kwargs,
    ) -> PipelineComponents:
        """Loads a checkpoint in Stable Diffusion layout.

        A folder is refused when it is missing, incomplete, damaged or of another kind of model. Weights that are
        missing, extra or of the wrong shape are all listed in one error; nothing is left at random values. Float32
        weights stay in their files (but on Windows), which may be replaced or deleted, but not written into meanwhile.

        Args:
            pretrained_model_name_or_path: a folder in diffusers' layout, a model id on the Hugging Face hub, or "demo",
                the small model that comes with the package (a folder of that name is "./demo").
            mode: "graph" compiles every stage the first time it runs; "pynative" runs operator by operator, to debug.
            compile_cache: where compiled graphs are kept for the next process. None is the folder that the
                environment variable ``MINDIFFEDIT_CACHE`` names, or one in the user's cache folder; False is nowhere;
                or a folder.
            mindspore_dtype: dtype of the models; None is ``mindspore.float32``. What the device cannot compute in
                (float16 on a CPU) is loaded in float32, with one warning.
            variant: "fp16" picks ``*.fp16.safetensors`` where there is one.
            **kwargs: components by name that are taken as given instead of being loaded (``safety_checker=None``,
                ``scheduler=...``), and ``requires_safety_checker``; ``cache_dir``, ``force_download``,
                ``local_files_only``, ``token``, ``revision`` and ``proxies`` as in huggingface_hub, whose environment
                variables count, too; ``use_safetensors``, which cannot be False: pickled weights are never read, since
                reading one can run code. Others are ignored with a warning.

        Returns:
            The pipeline.

        Raises:
            ValueError: for a folder that is missing, incomplete or corrupt, or weights that do not fit
                (``CheckpointError``, ``WeightsError``).
        """
        options, overrides, dtype = cls._loading("from_pretrained", mode, mindspore_dtype, kwargs)
        folder = hub.resolve_folder(pretrained_model_name_or_path, options, variant=variant, skip=overrides)
        parts = models.load_components(folder, overrides=overrides, dtype=dtype, variant=variant)
        return cls(**parts, mode=mode, compile_cache=compile_cache)

    @classmethod
    @turns.turn()
    def from_single_file(
        cls,
        pretrained_model_link_or_path,
        *,
        config=None,
        mode: str = "graph",
        compile_cache=None,
        mindspore_dtype=None,
        **kwargs,
    ) -> PipelineComponents:
        """Loads a checkpoint that is one ``.safetensors`` file in the original layout of Stable Diffusion 1.x or 2.x.

        Args:
            pretrained_model_link_or_path: the file, or its address on the hub,
                ``https://huggingface.co/<owner>/<name>/blob/main/<file>.safetensors``.
            config: where the configs of the models, the tokenizer and the scheduler come from: a folder in diffusers'
                layout, or a hub id; weights there are not read. None: the usual one of the file's kind, from the hub.
                It decides what the UNet predicts: the file of a 2.x model does not say whether that is v or epsilon.
            mode: as for ``from_pretrained``.
            compile_cache: as for ``from_pretrained``.
            mindspore_dtype: as for ``from_pretrained``.
            **kwargs: as for ``from_pretrained``; ``revision`` is the file's. There is no safety checker unless one is
                given.

        Raises:
            ValueError: a file that is missing, pickled, corrupt or of another kind, no configuration for it, or weights
                that do not fit it.
        """
        for name in ("original_config", "original_config_file"):
            if kwargs.get(name) is not None:
                raise InputError(
                    "{parameter} is not read; give {config}, a folder or hub id in diffusers' layout, instead.",
                    parameter=name,
                )
        from mindiffedit.checkpoints import single_file

        options, overrides, dtype = cls._loading("from_single_file", mode, mindspore_dtype, kwargs)
        parts = single_file.load_components(
            pretrained_model_link_or_path, config=config, overrides=overrides, dtype=dtype, options=options
        )
        return cls(**parts, mode=mode, compile_cache=compile_cache)

    @classmethod
    def _loading(cls, method: str, mode: str, mindspore_dtype, kwargs: dict[str, Any]) -> tuple:
        """What loading begins with: how the hub is asked, the components that are given, and the dtype to load in."""
        cls._check_mode(mode)
        options = hub.HubOptions.taken_from(kwargs)
        overrides = {name: kwargs.pop(name) for name in COMPONENTS if name in kwargs}
        requires_safety_checker = kwargs.pop("requires_safety_checker", None)
        if requires_safety_checker is not None:
            overrides["requires_safety_checker"] = requires_safety_checker
        warn_of_unused(method, kwargs)
        return options, overrides, devices.loadable_dtype(mindspore_dtype)

    @turns.turn()
    def save_pretrained(self, save_directory, variant: str | None = None) -> None:
        """Writes a folder that this class and diffusers load; safetensors, written whole or not at all.

        Without LoRAs that are loaded and not fused (their file is the place for these), with textual inversions.

        Args:
            save_directory: the folder to write. A checkpoint that is there already is replaced.
            variant: "fp16" writes ``*.fp16.safetensors``.

        Raises:
            ValueError: for a folder that holds something other than a checkpoint.
        """
        for model in (self.unet, self.text_encoder):
            if model is not None:
                lora.adapted(model).write(0.0)
        parts = self.components | {"requires_safety_checker": self.requires_safety_checker}
        saving.save_components(save_directory, parts, variant)

    # --- switches that users of diffusers know --------------------------------------------------------------------

    def enable_model_cpu_offload(self, *args, **kwargs) -> None:
        """Accepted for compatibility: models are not moved between host and device here (said once on an accelerator).

        Args:
            *args: not used.
            **kwargs: not used.
        """
        if devices.device_target() != "CPU":
            say_once("enable_model_cpu_offload() changes nothing here: all models stay on the device.")

    def enable_sequential_cpu_offload(self, *args, **kwargs) -> None:
        """Accepted for compatibility, like ``enable_model_cpu_offload``.

        Args:
            *args: not used.
            **kwargs: not used.
        """
        self.enable_model_cpu_offload()

    def enable_vae_slicing(self) -> None:
        """Pictures always pass the VAE one at a time here, so there is nothing to switch on."""

    def disable_vae_slicing(self) -> None:
        """Slicing cannot be switched off (said once)."""
        say_once("disable_vae_slicing() changes nothing here: pictures always pass the VAE one at a time.")

    def enable_vae_tiling(self) -> None:
        """Encode and decode what is larger than a tile in overlapping tiles, which bounds the memory it takes.

        The tiles, and so the results, are the reference's: ``vae.tile_sample_min_size`` pixels or
        ``vae.tile_latent_min_size`` latents, of which neighbours share ``vae.tile_overlap_factor``. Each shape of
        tile is compiled once: up to nine for each half of the VAE, four for most sizes (``tiling`` says why).

        Raises:
            ValueError: the VAE's tile sizes do not fit together.
        """
        tiling.tiles_of(self.vae)
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Encode and decode whole pictures again."""
        self.vae.disable_tiling()

    def enable_attention_slicing(self, slice_size="auto") -> None:
        """Accepted for compatibility: nothing changes, attention never holds all its scores (said once).

        Args:
            slice_size: not used.
        """
        say_once("enable_attention_slicing() changes nothing: attention never holds all its scores anyway.")

    def disable_attention_slicing(self) -> None:
        """Nothing to undo."""

    def enable_xformers_memory_efficient_attention(self, attention_op=None) -> None:
        """mindone's flash attention on Ascend; elsewhere nothing changes (said once).

        Args:
            attention_op: not used.
        """
        if devices.device_target() != "Ascend":
            say_once("enable_xformers_memory_efficient_attention() changes nothing on this device.")
            return
        self.unet.enable_xformers_memory_efficient_attention()
        if self._stages_built is not None:
            self._stages_built.forget()

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Back to plain attention."""
        if devices.device_target() == "Ascend":
            self.unet.disable_xformers_memory_efficient_attention()
            if self._stages_built is not None:
                self._stages_built.forget()

    @turns.turn()
    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """FreeU (arXiv 2309.11497): other weights for what the UNet's decoder joins. For all three calls.

        For SD 1.x the paper's authors give s1=0.9, s2=0.2, b1=1.5, b2=1.6; for SD 2.1 s1=0.9, s2=0.2, b1=1.4, b2=1.6.

        Args:
            s1: factor of the skip connections' low frequencies in the first up block, above 0.
            s2: the same in the second up block.
            b1: factor of half of the features in the first up block, above 0.
            b2: the same in the second up block.

        Raises:
            TypeError, ValueError: a factor that is no finite number above 0.
        """
        from mindiffedit.checkpoints import freeu

        freeu.enable(self.unet, s1, s2, b1, b2)

    @turns.turn()
    def disable_freeu(self) -> None:
        """Switches FreeU off; results are again the same bits as before it was switched on."""
        from mindiffedit.checkpoints import freeu

        freeu.disable(self.unet)

    def set_progress_bar_config(self, **kwargs) -> None:
        """Options of all progress bars.

        Args:
            **kwargs: what ``tqdm`` takes; ``disable=True`` silences them.
        """
        self._progress_bar_config = kwargs


def warn_of_unused(method: str, arguments: dict[str, Any]) -> None:
    """Say which further arguments of a method are ignored, if any."""
    if arguments:
        logger.warning("Ignored arguments of %s that mean nothing here: %s.", method, ", ".join(sorted(arguments)))
