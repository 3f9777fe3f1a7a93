"""LoRA and textual inversion under diffusers' names: what ``StableDiffusionPipeline`` has of its loader mixins."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mindiffedit import options
from mindiffedit.checkpoints import lora, textual_inversion
from mindiffedit.checkpoints.components import PipelineComponents, warn_of_unused
from mindiffedit.checkpoints.hub import HubOptions
from mindiffedit.errors import InputError, InputTypeError
from mindiffedit.runtime import turns

logger = logging.getLogger(__name__)

_UNUSED = ("low_cpu_mem_usage", "unet_config", "mirror")  # they choose how diffusers loads, not what


class Adapters(PipelineComponents):
    """Loads, weighs, fuses and unloads LoRAs, and loads and unloads textual inversions.

    A LoRA's matrices are added to the weights in place when a model runs next, so neither loading one nor another
    scale compiles a graph again. See ``lora.Adapted`` for the rules.
    """

    _fused: frozenset[str] = frozenset()  # names of LoRAs; how each is fused is known to ``lora.Adapted``

    # --- LoRA ----------------------------------------------------------------------------------------------------

    @turns.turn()
    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict,
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs,
    ) -> None:
        """Loads a LoRA for UNet, text encoder or both; it is then the active one, at scale 1.

        Args:
            pretrained_model_name_or_path_or_dict: a safetensors file; a folder or hub id with one; or a dict from name
                to tensor. peft's, diffusers' and kohya's names, see ``lora.parse``.
            adapter_name: a name for it; default "default_0", "default_1", ...
            hotswap: put it in the place of the adapter of that name, which keeps being active or not.
            **kwargs: ``weight_name``, the file's name in the folder or repository; ``subfolder``, ``cache_dir``,
                ``force_download``, ``local_files_only``, ``token``, ``revision`` and ``proxies`` as in huggingface_hub.

        Raises:
            ValueError, TypeError: a file that is missing, pickled, no LoRA, or does not fit the models (all that does
                not fit is counted), or a name that is taken. Nothing is loaded then.
        """
        place = _place("load_lora_weights", kwargs)
        if adapter_name is not None and (not isinstance(adapter_name, str) or not adapter_name):
            raise InputTypeError(
                "{parameter} has to be a name or None, but is {name!r}.",
                parameter="adapter_name",
                name=adapter_name,
            )
        if hotswap:
            self._known_adapters(adapter_name, "adapter_name")
        elif adapter_name in self._adapter_names():
            raise InputError(
                "{parameter} {name!r} is taken; give another, or {hotswap=True}.",
                parameter="adapter_name",
                name=adapter_name,
            )
        tensors, metadata, what = lora.read(pretrained_model_name_or_path_or_dict, **place)
        targets = self._adapted()
        matrices = lora.parse(tensors, metadata, targets, what)
        swap = adapter_name if hotswap else None
        for component, adapted in targets.items():
            if component not in matrices:
                if swap is not None:
                    adapted.delete(swap)
            elif swap is not None:
                adapted.replace(swap, matrices[component])
            else:
                adapted.add(adapter_name or _free_name(adapted.layers), matrices[component])

    @turns.turn()
    def unload_lora_weights(self) -> None:
        """Takes all LoRAs out: the weights are, bit by bit, what they were. What is fused stays in them for good."""
        for adapted in self._adapted().values():
            adapted.unload()

    @turns.turn()
    def set_adapters(
        self,
        adapter_names: list[str] | str,
        adapter_weights: float | dict | list[float] | list[dict] | None = None,
    ) -> None:
        """Chooses the LoRAs to use and how strongly.

        Args:
            adapter_names: one or several; all others are left out.
            adapter_weights: a number for all, a list with one for each; None is 1. In place of a number, a dict by
                component ("unet", "text_encoder"), where the UNet's may be a dict by block, as in diffusers:
                {"down": 0.5, "mid": 1, "up": {"block_0": 0.6, "block_1": [0.4, 0.8]}}.

        Raises:
            ValueError, TypeError: names that are not loaded or are repeated, weights that are no finite numbers or do
                not match the names.
        """
        names = self._known_adapters(adapter_names)
        weights = adapter_weights if isinstance(adapter_weights, list) else [adapter_weights] * len(names)
        if len(weights) != len(names):
            raise InputError(
                "{parameter} has {count} weights for {names} adapters; give one for each, or one for all.",
                parameter="adapter_weights",
                count=len(weights),
                names=len(names),
            )
        targets = self._adapted()
        check = {"unet": self._by_block, "text_encoder": lambda weight: options.check_scale(weight, "adapter_weights")}
        strengths = {
            component: [check[component](_part(weight, component)) for weight in weights] for component in targets
        }
        for component, adapted in targets.items():
            adapted.activate(names)
            for name, strength in zip(names, strengths[component]):
                adapted.set_strength(name, strength)

    def _by_block(self, weight):
        """A UNet's weight as a number, or as a dict from module to number."""
        if not isinstance(weight, Mapping):
            return options.check_scale(weight, "adapter_weights")
        _check_numbers(weight)
        from mindone.diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

        try:
            return _maybe_expand_lora_scales(self.unet, [dict(weight)])[0]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(
                "{parameter} {weight!r} do not fit this UNet: {error}",
                parameter="adapter_weights",
                weight=weight,
                error=error,
            ) from error

    @turns.turn()
    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Forgets LoRAs; the weights are, bit by bit, what they are without them.

        Args:
            adapter_names: one or several.

        Raises:
            ValueError, TypeError: names that are not loaded or are repeated.
        """
        for name in self._known_adapters(adapter_names):
            for adapted in self._adapted().values():
                adapted.delete(name)

    @turns.turn()
    def disable_lora(self) -> None:
        """Runs without LoRAs until ``enable_lora()``; fused ones are unfused, as in diffusers."""
        for adapted in self._adapted().values():
            adapted.enable(False)

    @turns.turn()
    def enable_lora(self) -> None:
        """Uses the active LoRAs again."""
        for adapted in self._adapted().values():
            adapted.enable(True)

    @turns.turn()
    def fuse_lora(
        self,
        components: list[str] = ["unet", "text_encoder"],  # noqa: B006 (the reference's; it is not changed)
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs,
    ) -> None:
        """Fixes LoRAs at ``lora_scale`` in the weights: a call's ``scale`` no longer counts, and they are saved.

        Args:
            components: "unet", "text_encoder".
            lora_scale: factor on the strengths that ``set_adapters`` gave.
            safe_fusing: accepted; sums are always checked to be finite.
            adapter_names: default: the active ones.
            **kwargs: ignored with a warning.

        Raises:
            ValueError, TypeError: other components, names that are not loaded or are repeated, or a scale that is no
                finite number.
        """
        scale = options.check_scale(lora_scale, "lora_scale")
        names = None if adapter_names is None else self._known_adapters(adapter_names)
        warn_of_unused("fuse_lora", kwargs)
        for adapted in self._adapted(components).values():
            self._fused |= adapted.fuse(scale, names)

    @turns.turn()
    def unfuse_lora(
        self,
        components: list[str] = ["unet", "text_encoder"],  # noqa: B006 (as above)
        **kwargs,
    ) -> None:
        """Takes fused LoRAs out of the weights again, exactly; they then count at their strengths.

        Args:
            components: "unet", "text_encoder".
            **kwargs: ignored with a warning.
        """
        warn_of_unused("unfuse_lora", kwargs)
        for adapted in self._adapted(components).values():
            self._fused -= adapted.unfuse()

    @property
    def num_fused_loras(self) -> int:
        """Number of LoRAs that were fused and not unfused."""
        return len(self._fused)

    @property
    def fused_loras(self) -> set:
        """Names of the LoRAs that were fused and not unfused."""
        return set(self._fused)

    def get_active_adapters(self) -> list[str]:
        """Names of the LoRAs that the UNet uses."""
        adapted = lora.adapted(self.unet)
        return list(adapted.active) if adapted.layers else []

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all LoRAs by component, of components that have any."""
        return {component: list(adapted.layers) for component, adapted in self._adapted().items() if adapted.layers}

    def _adapter_names(self) -> set[str]:
        return {name for names in self.get_list_adapters().values() for name in names}

    def _adapted(self, components=lora.COMPONENTS) -> dict[str, lora.Adapted]:
        """The models that LoRAs can be for, with their adapters, by component."""
        names = [components] if isinstance(components, str) else list(components)
        if not names or not set(names) <= set(lora.COMPONENTS):
            raise InputError(
                "{parameter} has to name some of {known}, but is {given!r}.",
                parameter="components",
                known=list(lora.COMPONENTS),
                given=components,
            )
        models = {name: getattr(self, name) for name in names}
        return {name: lora.adapted(model) for name, model in models.items() if model is not None}

    def _known_adapters(self, adapter_names, parameter: str = "adapter_names") -> list[str]:
        """Names as a list, each of a loaded LoRA."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise InputTypeError(
                "{parameter} has to be a name or a list of names, but is {given!r}.",
                parameter=parameter,
                given=adapter_names,
            )
        loaded = self._adapter_names()
        unknown = [name for name in names if name not in loaded]
        if unknown:
            raise InputError(
                "There is no adapter {name!r}; loaded are {known}.",
                parameter=parameter,
                name=unknown[0],
                known=sorted(loaded),
            )
        if len(set(names)) < len(names):
            raise InputError("{parameter} names an adapter twice: {names!r}.", parameter=parameter, names=names)
        return list(names)

    # --- textual inversion ---------------------------------------------------------------------------------------

    @turns.turn()
    def load_textual_inversion(
        self,
        pretrained_model_name_or_path,
        token: str | list[str] | None = None,
        tokenizer=None,
        text_encoder=None,
        **kwargs,
    ) -> None:
        """Adds learned embeddings to tokenizer and text encoder, as words for prompts.

        Args:
            pretrained_model_name_or_path: a safetensors file, a folder or hub id with one, a tensor (n, width), a dict
                {token: tensor}, or a list of these. diffusers' and A1111's ("emb_params") forms.
            token: the word(s), one for each; None: as the file says, or the file's name where it says none, as A1111's
                do.
            tokenizer: default: the pipeline's.
            text_encoder: default: the pipeline's.
            **kwargs: ``weight_name``, ``subfolder``, ``cache_dir``, ``force_download``, ``local_files_only``,
                ``revision`` and ``proxies`` as for ``load_lora_weights``; ``hf_token`` is the hub's token.

        Raises:
            ValueError, TypeError: a file that is missing, pickled or of another model, or a word that is taken. Nothing
                is loaded then.
        """
        kwargs["token"] = kwargs.pop("hf_token", None)
        place = _place("load_textual_inversion", kwargs)
        parts = self._with_words(tokenizer, text_encoder)
        sources = pretrained_model_name_or_path
        sources = list(sources) if isinstance(sources, (list, tuple)) else [sources]
        tokens = list(token) if isinstance(token, (list, tuple)) else [token]
        if tokens == [None]:
            tokens *= len(sources)
        contents = [textual_inversion.read(source, **place) for source in sources]
        textual_inversion.add(*textual_inversion.check(contents, tokens, *parts), *parts)

    @turns.turn()
    def unload_textual_inversion(
        self, tokens: str | list[str] | None = None, tokenizer=None, text_encoder=None
    ) -> None:
        """Takes learned embeddings out again, with all their vectors.

        Args:
            tokens: the word or words to take out; None for all.
            tokenizer: default: the pipeline's.
            text_encoder: default: the pipeline's.
        """
        chosen = [tokens] if isinstance(tokens, str) else tokens
        textual_inversion.remove(chosen or None, *self._with_words(tokenizer, text_encoder))

    def _with_words(self, tokenizer, text_encoder):
        """Tokenizer and text encoder, the pipeline's own where none is given."""
        parts = (
            self.tokenizer if tokenizer is None else tokenizer,
            self.text_encoder if text_encoder is None else text_encoder,
        )
        if None in parts:
            raise InputError("Textual inversions need a tokenizer and a text encoder, and this pipeline has not both.")
        return parts

    def maybe_convert_prompt(self, prompt: str | list[str], tokenizer):
        """Prompts in which a word of several vectors is followed by the words of its further vectors.

        Args:
            prompt: one or several.
            tokenizer: the one that knows the words.

        Returns:
            A text for a text, a list for a list.
        """
        if isinstance(prompt, str):
            return textual_inversion.expanded(prompt, tokenizer)
        return [textual_inversion.expanded(text, tokenizer) for text in prompt]


def _place(method: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Where to look for a file, of a loading method's further arguments."""
    options = HubOptions.taken_from(kwargs)
    place = {name: kwargs.pop(name) for name in ("weight_name", "subfolder") if name in kwargs}
    warn_of_unused(method, {name: value for name, value in kwargs.items() if name not in _UNUSED})
    return place | {"options": options}


def _free_name(taken) -> str:
    number = len(taken)
    while f"default_{number}" in taken:
        number += 1
    return f"default_{number}"


def _part(weight, component: str):
    """A component's share of an adapter's weight; 1 where none is given."""
    if isinstance(weight, Mapping):
        unknown = sorted(str(name) for name in weight if name not in lora.COMPONENTS)
        if unknown:
            logger.warning("`adapter_weights` for %s are ignored: no such component.", ", ".join(unknown))
        weight = weight.get(component)
    return 1.0 if weight is None else weight


def _check_numbers(weight) -> None:
    """Every leaf of nested dicts and lists is a finite number."""
    if isinstance(weight, Mapping):
        weight = list(weight.values())
    if isinstance(weight, list):
        for part in weight:
            _check_numbers(part)
    else:
        options.check_scale(weight, "adapter_weights")
