"""Models that write text, each a folder or hub repository of its own in the layout of transformers: Flan-T5 and BLIP.

MindSpore and mindone are imported when a model is loaded, and not before.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mindiffedit.checkpoints.hub import HubOptions, Repository, folder_here
from mindiffedit.checkpoints.layout import (
    INDEX_FILE,
    POSITION_IDS,
    CheckpointError,
    ModelKind,
    WeightsError,
    read_json,
    read_processor,
    some,
)
from mindiffedit.checkpoints.models import EAGER, build, give_weights
from mindiffedit.checkpoints.survey import Source
from mindiffedit.checkpoints.weight_files import Stored, find_weights, no_weights, read_headers, weight_patterns
from mindiffedit.runtime import devices

__all__ = ["find", "load", "resolve_folder"]


@dataclass(frozen=True)
class _LanguageModel(ModelKind):
    """A kind of model that writes text.

    Attributes:
        model_type: what its config.json says it is.
        vocabulary: the files that its tokenizer can be made of, any of them is enough.
        example: hub id of a known one.
    """

    model_type: str = ""
    vocabulary: tuple[str, ...] = ()
    example: str = ""


_KINDS = {
    "prompt model": _LanguageModel(
        ("T5ForConditionalGeneration",),
        "model",
        # Older transformers wrote it, and no attention reads it.
        extra=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        # What these layers give does not fit in float16.
        wide=r".*\.DenseReluDense\.wo\.weight",
        model_type="t5",
        vocabulary=("tokenizer.json", "spiece.model"),
        example="google/flan-t5-large",
    ),
    "caption model": _LanguageModel(
        ("BlipForConditionalGeneration",),
        "model",
        extra=POSITION_IDS,
        model_type="blip",
        vocabulary=("tokenizer.json", "vocab.txt"),
        example="Salesforce/blip-image-captioning-base",
    ),
}

_AS_WRITTEN = "as save_pretrained of transformers writes it"

_SMALL_FILES = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "vocab.txt"),
)


def resolve_folder(kind: str, name_or_path: str | os.PathLike, options: HubOptions) -> Path:
    """Folder of the language model called `name_or_path`, downloaded from the hub where needed.

    Args:
        kind: 'prompt model' (T5) or 'caption model' (BLIP).
        name_or_path: a folder or a hub id.
        options: how the hub is asked.

    Raises:
        TypeError: `name_or_path` is not a string or path.
        CheckpointError: neither a folder here nor to be had from the hub, or a repository of another kind of model.
    """
    known = _KINDS[kind]
    expected = f"a folder with config.json and the weights of a {known.class_names[0]}, {_AS_WRITTEN}"
    folder = folder_here(name_or_path, kind, expected=expected, example=known.example)
    if folder is not None:
        return folder
    repository = Repository(os.fspath(name_or_path), options)
    folder = repository.fetch(_SMALL_FILES)
    _read_config(kind, folder)
    repository.pin(folder)
    folder = repository.fetch(weight_patterns(known.stem))
    if find_weights(folder, known.stem) is None:
        raise repository.without_weights(look_for="a revision with safetensors, such as a pull request's (refs/pr/1)")
    return folder


def find(kind: str, folder: str | os.PathLike) -> Source:
    """What `load` is going to read; no framework is imported, and of the weights the headers.

    Args:
        kind: 'prompt model' (T5) or 'caption model' (BLIP).
        folder: as `resolve_folder` returns it.

    Raises:
        CheckpointError: the folder is incomplete, corrupt, or holds another kind of model.
    """
    folder, known = Path(folder), _KINDS[kind]
    config = _read_config(kind, folder)
    if not any((folder / file).is_file() for file in known.vocabulary):
        raise CheckpointError(
            f"{folder} has no tokenizer: expected {' or '.join(known.vocabulary)}. Copy or download it again."
        )
    if kind == "caption model":
        read_processor(folder)
    file = find_weights(folder, known.stem)
    if file is None:
        raise no_weights(folder, known.stem, None, "transformers: model")
    return Source(kind, known, config, folder / "config.json", file, read_headers(file))


def _read_config(kind: str, folder: Path) -> dict[str, Any]:
    """config.json, checked to be of that kind, with the token ids that a generation_config.json beside it gives."""
    expected, model_type = _KINDS[kind].class_names[0], _KINDS[kind].model_type
    if not (folder / "config.json").is_file():
        names = sorted(entry.name for entry in folder.iterdir())
        what = "is a Stable Diffusion checkpoint" if INDEX_FILE in names else f"holds {some(names)}"
        raise CheckpointError(f"{folder} has no config.json and {what}. Expected a {expected}, {_AS_WRITTEN}.")
    config = read_json(folder / "config.json")
    classes = config.get("architectures") or []
    if config.get("model_type") != model_type or (classes and expected not in classes):
        what = " or ".join(map(str, classes)) or f"model of type {config.get('model_type')!r}"
        raise CheckpointError(f"{folder} holds a {what}, expected a {expected} as the {kind}.")
    if (folder / "generation_config.json").is_file():
        generation = read_json(folder / "generation_config.json")
        keys = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
        config |= {key: generation[key] for key in keys if generation.get(key) is not None}
    return config


def load(source: Source, *, dtype: Any = None) -> Any:
    """The model of mindone that `find` found, every parameter with exactly the file's value.

    A weight that several layers share may be in the file under one of its names or several.

    Args:
        source: as `find` returns it.
        dtype: of the parameters: float32 (or None), float16 or bfloat16, of mindspore or by name.

    Raises:
        ValueError: another dtype.
        WeightsError: weights are missing, extra, misshapen, not finite, or differ though they are one: all of them are
            listed.
    """
    dtype = devices.float_type("float32" if dtype is None else dtype)
    model = build(source, _construct)
    canonical = _shared_names(model)
    tensors: dict[str, Stored] = {}
    torn = []
    for name, stored in sorted(source.tensors.items(), key=lambda item: item[0] != canonical.get(item[0])):
        known = tensors.setdefault(canonical.get(name, name), stored)
        if known is not stored and not (known.shape == stored.shape and np.array_equal(known.read(), stored.read())):
            torn.append(f"  {name} differs from {canonical[name]}, with which it is one weight")
    if torn:
        raise WeightsError(f"Weights do not fit their model:\n{source.name}, from {source.file}:\n" + "\n".join(torn))
    source = replace(source, tensors=tensors)
    return give_weights({source.name: source}, {source.name: model}, dtype)[source.name]


def _construct(kind: str, config: Mapping[str, Any]) -> Any:
    """mindone's model of a kind."""
    if kind == "prompt model":
        from mindone.transformers.models.t5.modeling_t5 import T5ForConditionalGeneration
        from transformers import T5Config

        return T5ForConditionalGeneration(T5Config.from_dict(dict(config), **EAGER))
    from mindone.transformers.models.blip.modeling_blip import BlipForConditionalGeneration
    from transformers import BlipConfig

    return BlipForConditionalGeneration(BlipConfig.from_dict(dict(config), **EAGER))


def _shared_names(model: Any) -> dict[str, str]:
    """{every name of a parameter: the one that the model has for it}; they differ where layers share weights."""
    first = {id(parameter): name for name, parameter in model.parameters_and_names()}
    names: dict[str, str] = {}

    def visit(cell: Any, path: str) -> None:
        for name, parameter in cell.parameters_and_names(expand=False):
            names[path + name] = first.setdefault(id(parameter), path + name)
        for name, child in cell.name_cells().items():
            visit(child, f"{path}{name}.")

    visit(model, "")
    return names
