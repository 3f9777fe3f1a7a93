"""What a checkpoint folder holds, and whether that can be used: by its JSON files and the headers of its weight files.

No framework is imported, so everything that these files tell is known in milliseconds.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindiffedit.checkpoints.layout import (
    COMPONENTS,
    INDEX_FILE,
    MODELS,
    REQUIRED,
    CheckpointError,
    ModelKind,
    class_names,
    held_by,
    named_class,
    read_index,
    read_json,
    read_processor,
    small_files,
    some,
)
from mindiffedit.checkpoints.old_configs import unet_changes
from mindiffedit.checkpoints.tokenizer_files import check_tokenizer_files
from mindiffedit.checkpoints.weight_files import Stored, find_weights, no_weights, read_headers
from mindiffedit.errors import InputError


def check_folder(
    folder: str | os.PathLike, skip: Iterable[str] = (), variant: str | None = None
) -> dict[str, dict[str, Any]]:
    """Find out in milliseconds whether `models.load_components` can read a folder, as far as names and headers tell.

    What is left to `models.load_components` is whether each weight fits its model and is finite, and what the
    tokenizer's files say.

    Args:
        folder: as `hub.resolve_folder` returns it.
        skip: components that are neither read nor checked, such as 'safety_checker'.
        variant: as for `models.load_components`.

    Returns:
        {component: its config} of the components with weights, such as 'unet'.

    Raises:
        CheckpointError: the folder is incomplete, corrupt, or another kind of model.
    """
    folder = Path(folder)
    survey = Survey.of(folder, set(skip), variant)
    if "tokenizer" in survey.classes:
        check_tokenizer_files(folder / "tokenizer")
    if "feature_extractor" in survey.classes:
        read_processor(folder / "feature_extractor")
    survey.check_together()
    return survey.configs


# --- components and where their weights lie ---------------------------------------------------------


@dataclass(frozen=True)
class Survey:
    """What a folder holds of the components that were asked about.

    Attributes:
        folder: the folder.
        index: its model_index.json.
        classes: the class of every component that is there.
        sources: of the components with weights.
        schedulers: the configs of scheduler and inverse_scheduler.
    """

    folder: Path
    index: dict[str, Any]
    classes: dict[str, str]
    sources: dict[str, Source]
    schedulers: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, folder: Path, skip: Container[str], variant: str | None, weights: Any = None) -> Survey:
        """Look at all components but those in `skip`; `weights` is as for `models.load_components`.

        Raises:
            CheckpointError: one of them is missing, incomplete, corrupt or of another kind.
        """
        index = read_index(folder)
        named = {name: _class_of(index, folder, name) for name in COMPONENTS if name not in skip}
        classes = {name: class_name for name, class_name in named.items() if class_name is not None}
        places = {name: folder / name for name in MODELS if name in classes}
        if weights is None:
            sources = find_sources(places, variant, folder)
        else:
            sources = {name: Source.elsewhere(name, place, weights) for name, place in places.items()}
        schedulers: dict[str, dict[str, Any]] = {
            name: read_json(folder / name / "scheduler_config.json")
            for name in ("scheduler", "inverse_scheduler")
            if name in classes
        }
        return cls(folder, index, classes, sources, schedulers)

    @property
    def configs(self) -> dict[str, dict[str, Any]]:
        """{component: its config} of the components with weights."""
        return {name: source.config for name, source in self.sources.items()}

    def check_together(self, overrides: Mapping[str, Any] | None = None, tokenizer: Any = None) -> None:
        """CheckpointError where the components cannot work together, or a UNet asks for more; by configs alone.

        `overrides` take the place of the folder's components. `tokenizer` is the folder's or given; None is not judged.
        """
        problems = _misfits(self.configs | _configs_of(overrides or {}), tokenizer)
        if problems:
            raise CheckpointError(
                f"{self.folder} cannot be used for DiffEdit: {'; '.join(problems)}. "
                f"Expected a Stable Diffusion 1.x or 2.x text-to-image checkpoint."
            )


@dataclass(frozen=True)
class Source:
    """Where a model comes from: its config, its weight file (or index of shards) and what that holds.

    Attributes:
        name: of the model, for messages; a component is called by its name.
        kind: what is known of such models.
        config: the content of its config.json, with what is outdated put right.
        config_file: that file.
        file: the weight file, or the index of its shards.
        tensors: where each weight lies, by the parameters' names, which are diffusers' or transformers'.
    """

    name: str
    kind: ModelKind
    config: dict[str, Any]
    config_file: Path
    file: Path
    tensors: Mapping[str, Stored]

    @classmethod
    def elsewhere(cls, name: str, place: Path, weights: Any) -> Source:
        """The source of a component whose folder, `place`, has its config alone, and `weights` the rest."""
        config = _read_config(name, place)
        return cls(name, MODELS[name], config, place / "config.json", weights.file, weights.tensors(name, config))


def find_sources(places: Mapping[str, Path], variant: str | None, where: Path) -> dict[str, Source]:
    """The sources of components with weights, of the variant where there is one, and otherwise of plain files.

    Args:
        places: {component: its folder}.
        variant: such as 'fp16', or None.
        where: the folder of them all, for a message.

    Raises:
        CheckpointError: a component has no config or no weights, one of its files is damaged, or none of them has the
            variant.
    """
    sources, any_of_variant = {}, False
    for name, place in places.items():
        kind, config = MODELS[name], _read_config(name, place)
        weights = find_weights(place, kind.stem, variant)
        any_of_variant |= weights is not None
        weights = weights or find_weights(place, kind.stem)
        if weights is None:
            raise no_weights(place, kind.stem, variant)
        sources[name] = Source(name, kind, config, place / "config.json", weights, read_headers(weights))
    if sources and not any_of_variant:
        raise CheckpointError(
            "{where} has no weights of {parameter} {value!r}. Leave {parameter} out to read the plain files.",
            parameter="variant",
            where=where,
            value=variant,
        )
    return sources


def _read_config(name: str, place: Path) -> dict[str, Any]:
    config = read_json(place / "config.json")
    return config | unet_changes(config) if name == "unet" else config


def place_of(folder: Path, name: str) -> tuple[Path, str]:
    """Where component `name` lies in a folder, which may be its own, and its class.

    Raises:
        CheckpointError: it is not there, or of another kind.
    """
    if (folder / INDEX_FILE).is_file():
        class_name = _class_of(read_index(folder), folder, name)
        if class_name is None:
            raise CheckpointError(f"{folder} has no {name}: its {INDEX_FILE} lists none.")
        return folder / name, class_name
    part = folder / name if (folder / name).is_dir() else folder
    files = [part / file for file in small_files(name) if (part / file).is_file()]
    if not files:
        raise CheckpointError(
            f"{part} holds no {name}; it holds {held_by(part)}. Expected a checkpoint folder with a {INDEX_FILE}, or "
            f"the {name}'s own folder with its {small_files(name)[0]}."
        )
    file = files[0]
    if name == "tokenizer":
        config = read_json(part / "tokenizer_config.json") if part / "tokenizer_config.json" in files else {}
        stated = config.get("tokenizer_class", class_names(name)[0])
    elif name == "feature_extractor":
        config = read_processor(part)
        stated = config.get("image_processor_type", config.get("feature_extractor_type", class_names(name)[0]))
    else:
        config = read_json(file)
        stated = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
        if stated is None:
            raise CheckpointError(f"{file} does not say which class it configures.")
    return part, _class_of({name: [None, stated]}, part, name, where=file) or stated


def _class_of(index: Mapping[str, Any], folder: Path, name: str, where: Path | None = None) -> str | None:
    """Class of component `name`; None for an optional one that the folder has not. `where` is the file that says so."""
    class_name, known = named_class(index, folder, name), class_names(name)
    if class_name is None and name in REQUIRED:
        held = sorted(key for key in index if not key.startswith("_") and index[key] not in (None, [None, None]))
        raise CheckpointError(
            f"{folder} ({index.get('_class_name', 'no _class_name')}) has no {name}; {INDEX_FILE} lists "
            f"{some(held)}. Expected a Stable Diffusion checkpoint with {', '.join(REQUIRED)}."
        )
    if class_name is not None and known and class_name not in known:
        raise CheckpointError(
            f"{where or folder / INDEX_FILE}: {name} is a {class_name}, expected {' or '.join(known)}. "
            f"DiffEdit runs on Stable Diffusion 1.x and 2.x checkpoints."
        )
    return class_name


def scheduler_class(folder: str | os.PathLike) -> str | None:
    """Class of a checkpoint folder's scheduler, as its model_index.json names it."""
    folder = Path(folder)
    return named_class(read_index(folder), folder, "scheduler")


# --- whether components fit each other --------------------------------------------------------------


def check_fit(components: Mapping[str, Any]) -> None:
    """InputError, in one sentence, where unet, vae, text_encoder and tokenizer cannot work together.

    By their configs alone, so in no time; a component without a config is not judged.
    """
    problems = _misfits(_configs_of(components), components.get("tokenizer"))
    if problems:
        raise InputError(
            f"These components cannot work together: {'; '.join(problems)}. Take components from checkpoints of one"
            f" family, or train one to fit the other."
        )


def _configs_of(components: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The configs that have to agree, of models, as their config.json has them."""
    configs = {}
    for name in ("unet", "vae", "text_encoder"):
        config: Any = getattr(components.get(name), "config", None)
        if hasattr(config, "to_dict"):
            configs[name] = config.to_dict()
        elif isinstance(config, Mapping):
            configs[name] = dict(config)
    return configs


def _misfits(configs: Mapping[str, Mapping[str, Any]], tokenizer: Any) -> list[str]:
    unet, vae, text = (configs.get(name) for name in ("unet", "vae", "text_encoder"))
    text = None if text is None else text_part(text)
    problems = []
    if unet is not None:
        for key in ("class_embed_type", "addition_embed_type", "num_class_embeds"):
            if unet.get(key) is not None:
                problems.append(f"its UNet needs more inputs than latents, time and text ({key} {unet[key]!r})")
        takes, gives = unet.get("in_channels", 4), unet.get("out_channels", 4)
        if takes != gives:
            problems.append(f"its UNet takes {takes} channels and gives {gives} (an inpainting or instruction model?)")
        elif vae is not None and vae.get("latent_channels", 4) != takes:
            problems.append(f"the VAE has {vae.get('latent_channels', 4)} latent channels, the UNet {takes}")
        if text is not None and unet.get("encoder_hid_dim_type") is None:
            width, takes = text.get("hidden_size", 512), unet.get("cross_attention_dim", 1280)
            if any(w != width for w in (takes if isinstance(takes, (list, tuple)) else [takes])):
                problems.append(f"the text encoder is {width} wide, the UNet takes {takes}")
    if text is not None and hasattr(tokenizer, "get_vocab"):
        # Words of textual inversions may be another pipeline's: they are judged where a prompt has them.
        words = {t.content for t in getattr(tokenizer, "added_tokens_decoder", {}).values() if not t.special}
        largest = max((i for word, i in tokenizer.get_vocab().items() if word not in words), default=-1)
        size = text.get("vocab_size", 49408)
        if largest >= size:
            # Past the end of its table an embedding gives zeros on some devices, and no error.
            problems.append(f"the tokenizer has ids up to {largest}, the text encoder knows {size}")
    return problems


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text half of a config that describes a whole CLIP, else the config itself."""
    part = config.get("text_config")
    return dict(part if config.get("model_type") == "clip" and isinstance(part, dict) else config)
