"""The pipeline's components: construction, loading, saving, and the switches around them."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from mindiffedit.checkpoints import hub, models, old_configs, saving, survey
from mindiffedit.errors import InputError, Message
from mindiffedit.images import tiling
from mindiffedit.runtime import compile_cache as compile_caches
from mindiffedit.runtime import devices, turns
from mindiffedit.runtime.notices import say_once

logger = logging.getLogger(__name__)

MAX_GRAPHS = 13
"""Compiled graphs that are kept: the text encoder's, and six of an edit for each of two sizes of pictures.

Without a limit, every new size would stay. What goes comes back from the compile cache.
"""

MAX_GRAPHS_WITHOUT_CACHE = 64
"""The same where what has gone has to be compiled again."""

Observer = Callable[[str, np.ndarray, int | None], np.ndarray]
"""What ``pipeline.observer`` can be: a function called as ``observer(stage, array, step)`` with every array that
crosses from one stage to the next, a NumPy array on the host. The pipeline goes on with the array that it returns.
``step`` counts from 0 in the loops and is None elsewhere.

The stages, in order:

- in ``generate_mask``: ``timestep``, ``target_token_ids``, ``target_prompt_embeds`` and their ``negative_`` and
  ``source_`` kin, ``moments``, ``posterior_noise``, ``latents``, ``noise``, ``noised_latents``,
  ``noise_predictions``, ``negative_noise_predictions`` (only where the negatives differ), ``map``,
  ``clamp_magnitude``, ``mask``;
- in ``invert``: ``timesteps``, ``moments``, ``posterior_noise``, ``latents``, ``token_ids``, ``prompt_embeds``,
  their ``negative_`` kin, ``coefficients``, ``predictions``, ``inverted_latents``, ``decoded``;
- in the call: ``timesteps``, ``token_ids``, ``prompt_embeds``, their ``negative_`` kin, ``coefficients``,
  ``predictions``, ``step_noise``, ``edited_latents``, ``decoded``. DPM-Solver++ also shows its ``clean_predictions``.

``predictions`` are the UNet's outputs in a step, before guidance: (2 B, C, h, w), negatives first, with guidance,
(B, C, h, w) without.
"""

Viewer = Callable[[str, np.ndarray, int | None], None]
"""Called as ``viewer(stage, array, step)`` with the same arrays, and with each step's predicted clean latents, stage
"clean_predictions"; it only looks on."""


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
        if mode not in self.MODES:
            raise InputError(
                "{parameter} has to be one of {modes}, but is {mode!r}.", "mode", modes=self.MODES, mode=mode
            )
        if safety_checker is not None and feature_extractor is None:
            raise InputError(
                "A safety checker needs a feature extractor, and none was given. Give {parameter}, or "
                "{safety_checker=None} to run without one.",
                parameter="feature_extractor",
            )
        if safety_checker is None and requires_safety_checker:
            say_once(
                Message(
                    "The safety checker is off ({safety_checker=None}): pictures are returned unfiltered. Keep it on where"
                    " results are shown to the public; {requires_safety_checker=False} silences this notice."
                )
            )
        self.vae, self.text_encoder, self.tokenizer, self.unet = vae, text_encoder, tokenizer, unet
        self.safety_checker, self.feature_extractor = safety_checker, feature_extractor
        changes = old_configs.unet_changes(getattr(unet, "config", {}))
        if changes:
            unet.register_to_config(**changes)  # as the reference does; a UNet's config is no part of its graph
        self.scheduler, self.inverse_scheduler = self._outdated_options_mended(scheduler), inverse_scheduler
        self.requires_safety_checker = requires_safety_checker
        self.mode = mode
        self._fitting: tuple = ()
        self.check_components()
        self.observer: Observer | None = None
        self._viewers: dict[int, Viewer] = {}  # by thread
        self.compile_cache = compile_caches.open_cache(compile_cache) if mode == "graph" else None
        self.unet_batch_size = 2  # samples in one UNet evaluation: a guided step of one picture
        self.max_graphs = MAX_GRAPHS if self.compile_cache is not None else MAX_GRAPHS_WITHOUT_CACHE
        self._progress_bar_config: dict[str, Any] = {}
        self._stages_built = None
        self._own_inverse = None

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of a latent, along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def check_components(self) -> None:
        """ValueError where the components cannot work together; asked before every call, since each can be replaced."""
        parts = (self.unet, self.vae, self.text_encoder, self.tokenizer)
        if len(self._fitting) != len(parts) or any(a is not b for a, b in zip(parts, self._fitting)):
            survey.check_fit(self.components)
            self._fitting = parts

    @staticmethod
    def _outdated_options_mended(scheduler):
        """The scheduler, or a copy of it without what first-generation checkpoints have wrong."""
        changes = old_configs.scheduler_changes(getattr(scheduler, "config", {}))
        if changes:
            scheduler = copy.copy(scheduler)  # the caller's own may serve other pipelines
            scheduler.register_to_config(**changes)
        return scheduler

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
        use_safetensors: bool | None = None,
        variant: str | None = None,
        cache_dir=None,
        force_download: bool = False,
        local_files_only: bool | None = None,
        token=None,
        revision: str | None = None,
        proxies=None,
        **kwargs,
    ) -> PipelineComponents:
        """Loads a checkpoint in Stable Diffusion layout.

        A folder is refused when it is missing, incomplete, damaged or of another kind of model. Weights that are
        missing, extra or of the wrong shape are all listed in one error; nothing is left at random values.

        Args:
            pretrained_model_name_or_path: a folder in diffusers' layout, a model id on the Hugging Face hub, or "demo",
                the small model that comes with the package (a folder of that name is "./demo").
            mode: "graph" compiles every stage the first time it runs; "pynative" runs operator by operator, to debug.
            compile_cache: where compiled graphs are kept for the next process. None is the folder that the
                environment variable ``MINDIFFEDIT_CACHE`` names, or one in the user's cache folder; False is nowhere;
                or a folder.
            mindspore_dtype: dtype of the models; None is ``mindspore.float32``. What the device cannot compute in
                (float16 on a CPU) is loaded in float32, with one warning.
            use_safetensors: None or True. Pickled weights are never read, since reading one can run code.
            variant: "fp16" picks ``*.fp16.safetensors`` where there is one.
            cache_dir: as in huggingface_hub, whose environment variables count, too.
            force_download: as in huggingface_hub.
            local_files_only: as in huggingface_hub.
            token: as in huggingface_hub.
            revision: as in huggingface_hub.
            proxies: as in huggingface_hub.
            **kwargs: components by name that are taken as given instead of being loaded (``safety_checker=None``,
                ``scheduler=...``), and ``requires_safety_checker``. Others are ignored with a warning.

        Returns:
            The pipeline.

        Raises:
            ValueError: for a folder that is missing, incomplete or corrupt, or weights that do not fit
                (``CheckpointError``, ``WeightsError``).
        """
        if use_safetensors is False:
            raise InputError(
                "{use_safetensors=False} asks for pickled weights, which can run code when they are read; only "
                "safetensors files are loaded. Leave the argument out and use a folder that holds them.",
                parameter="use_safetensors",
            )
        overrides, own, dtype = cls._loading("from_pretrained", mode, mindspore_dtype, kwargs)
        options = hub.HubOptions(cache_dir, force_download, local_files_only, token, revision, proxies)
        folder = hub.resolve_folder(pretrained_model_name_or_path, options, variant=variant, skip=overrides)
        parts = models.load_components(folder, overrides=overrides, dtype=dtype, variant=variant, use_safetensors=True)
        return cls(**{**parts, **own}, mode=mode, compile_cache=compile_cache)

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
        cache_dir=None,
        force_download: bool = False,
        local_files_only: bool | None = None,
        token=None,
        revision: str | None = None,
        proxies=None,
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
            cache_dir: as for ``from_pretrained``.
            force_download: as for ``from_pretrained``.
            local_files_only: as for ``from_pretrained``.
            token: as for ``from_pretrained``.
            revision: of the file on the hub.
            proxies: as for ``from_pretrained``.
            **kwargs: components by name that are taken as given, and ``requires_safety_checker``. There is no safety
                checker unless one is given.

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
        overrides, own, dtype = cls._loading("from_single_file", mode, mindspore_dtype, kwargs)
        from mindiffedit.checkpoints import single_file

        parts = single_file.load_components(
            pretrained_model_link_or_path,
            config=config,
            overrides=overrides,
            dtype=dtype,
            options=hub.HubOptions(cache_dir, force_download, local_files_only, token, revision, proxies),
        )
        return cls(**{**parts, **own}, mode=mode, compile_cache=compile_cache)

    @classmethod
    def _loading(cls, method: str, mode: str, mindspore_dtype, kwargs: dict[str, Any]) -> tuple:
        """The checks that loading begins with: components given, other arguments given, and the dtype to load in."""
        if mode not in cls.MODES:
            raise InputError(
                "{parameter} has to be one of {modes}, but is {mode!r}.", "mode", modes=cls.MODES, mode=mode
            )
        accepted = set(inspect.signature(cls.__init__).parameters) - {"self", "mode", "compile_cache"}
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in accepted}
        if kwargs:
            logger.warning("Ignored arguments of %s that mean nothing here: %s.", method, ", ".join(sorted(kwargs)))
        dtype = devices.loadable_dtype(mindspore_dtype)
        requires_safety_checker = overrides.pop("requires_safety_checker", None)
        own = {} if requires_safety_checker is None else {"requires_safety_checker": requires_safety_checker}
        return overrides, own, dtype

    @turns.turn()
    def save_pretrained(self, save_directory, variant: str | None = None) -> None:
        """Writes a folder that this class and diffusers load; safetensors, written whole or not at all.

        Args:
            save_directory: the folder to write. A checkpoint that is there already is replaced.
            variant: "fp16" writes ``*.fp16.safetensors``.

        Raises:
            ValueError: for a folder that holds something other than a checkpoint.
        """
        saving.save_components(
            save_directory,
            self.components,
            requires_safety_checker=self.requires_safety_checker,
            variant=variant,
        )

    @property
    def components(self) -> dict[str, Any]:
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
        if devices.device_target() == "Ascend":
            self.unet.enable_xformers_memory_efficient_attention()
            if self._stages_built is not None:
                self._stages_built.forget()
        else:
            say_once("enable_xformers_memory_efficient_attention() changes nothing on this device.")

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

    @property
    def _stages(self):
        from mindiffedit.stages import Stages

        parts = (self.unet, self.vae, self.text_encoder, self.mode)
        if self._stages_built is None or not self._stages_built.serves(*parts):
            self._stages_built = Stages(*parts, cache=self.compile_cache)
        self._stages_built.graphs.limit = self.max_graphs
        return self._stages_built

    def _crosses(self, stage: str, array: np.ndarray, step: int | None = None) -> np.ndarray:
        """Shows an array that crosses a stage to the observer, if there is one; returns what to go on with."""
        if self.observer is not None:
            with turns.turn_given_up():
                array = self.observer(stage, array, step)
        self._shows(stage, array, step)
        return array

    def _shows(self, stage: str, array: np.ndarray, step: int | None = None) -> None:
        viewer = self._viewers.get(threading.get_ident())
        if viewer is not None:
            with turns.turn_given_up():
                viewer(stage, array, step)

    @contextlib.contextmanager
    def debugging(self, callback: Viewer):
        """While this context is open ``callback(stage, array, step)`` sees every intermediate of this thread's calls.

        Arrays are float32 on the host, not to be written to; ``step`` counts from 0 within a loop and is None outside.
        Stages, in the order of their coming: "map" (B, h, w), "mask" (B, h, w), "inverted_latents" and
        "edited_latents" (B, C, h, w) after each step, with "clean_predictions" (B, C, h, w), the step's prediction of
        the noiseless latents, before each of them; others are those of ``Observer``. Contexts may be nested.

        Args:
            callback: a ``Viewer``.
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

    @staticmethod
    def _tensor(array: np.ndarray, dtype=None):
        import mindspore as ms

        tensor = ms.Tensor(np.asarray(array, order="C"))  # ascontiguousarray would make a 0-d array 1-d
        return tensor if dtype is None or tensor.dtype == dtype else tensor.astype(dtype)
