"""Components out to a checkpoint folder that this package and diffusers load."""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mindiffedit.checkpoints.layout import COMPONENTS, INDEX_FILE, MODELS, REQUIRED, CheckpointError, held_by
from mindiffedit.checkpoints.models import parameters_by_name, require_known
from mindiffedit.checkpoints.weight_files import SIZES, file_name


def save_components(
    folder: str | os.PathLike,
    components: Mapping[str, Any],
    variant: str | None = None,
) -> Path:
    """Write a checkpoint folder that this package and diffusers load, with the components' exact weights.

    The folder appears whole or not at all: it is written beside its place and then moved. A checkpoint that
    is already there is replaced; files in it that are no part of a checkpoint (a README) are kept.

    Args:
        folder: the folder to write.
        components: as `models.load_components` returns them; those that are not required may be None or absent.
        variant: 'fp16' writes `….fp16.safetensors`.

    Returns:
        The folder.

    Raises:
        CheckpointError: a component is missing, or `folder` is a file or holds something other than a checkpoint.
        TypeError: a component that is none.
    """
    require_known(components)
    missing = [name for name in REQUIRED if components.get(name) is None]
    if missing:
        raise CheckpointError(f"{', '.join(missing)} is None: a checkpoint needs {', '.join(REQUIRED)}")
    # The place itself, were `folder` a link to it: the link should stay one.
    folder = Path(os.path.realpath(Path(folder).expanduser()))
    _require_replaceable(folder)

    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.part"
    building.mkdir()
    try:
        _write_checkpoint(building, components, variant)
        _move_into_place(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return folder


def _require_replaceable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, expected the name of a folder to write")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / INDEX_FILE).is_file():
        raise CheckpointError(
            f"{folder} exists and is no checkpoint folder; it holds {held_by(folder)}. It is left alone: "
            f"give a new or empty folder."
        )


def _move_into_place(building: Path, folder: Path) -> None:
    if not folder.exists():
        building.rename(folder)
        return
    old = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.old"
    folder.rename(old)
    try:
        building.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    for entry in list(old.iterdir()):
        if entry.name not in {INDEX_FILE, *COMPONENTS}:
            entry.rename(folder / entry.name)
    shutil.rmtree(old, ignore_errors=True)


_LIBRARIES = dict.fromkeys(("text_encoder", "tokenizer", "feature_extractor"), "transformers")
_LIBRARIES |= {"safety_checker": "stable_diffusion"}


def _write_checkpoint(folder: Path, components: Mapping[str, Any], variant: str | None) -> None:
    import mindone.diffusers

    index: dict[str, Any] = {
        "_class_name": "StableDiffusionDiffEditPipeline",
        # The version of diffusers whose layout and config keys mindone follows.
        "_diffusers_version": mindone.diffusers.__version__,
        "requires_safety_checker": bool(components.get("requires_safety_checker", True)),
    }
    for name in COMPONENTS:
        component = components.get(name)
        if component is None:
            index[name] = [None, None]
            continue
        class_of = type(component).__name__
        part = folder / name
        part.mkdir()
        if name in MODELS:
            class_of = MODELS[name].class_names[0]
            config = _diffusers_config if name in ("unet", "vae") else _transformers_config
            _write_json(part / "config.json", config(component, class_of))
            _write_weights(part / file_name(MODELS[name].stem, variant), component)
        elif name in ("scheduler", "inverse_scheduler"):
            _write_json(part / "scheduler_config.json", _diffusers_config(component, class_of))
        else:
            component.save_pretrained(str(part))
        index[name] = [_LIBRARIES.get(name, "diffusers"), class_of]
    _write_json(folder / INDEX_FILE, index)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _diffusers_config(component: Any, class_name: str) -> dict[str, Any]:
    """Config of a mindone model or scheduler with the keys diffusers writes."""
    import mindone.diffusers

    # Where it was loaded from, which arguments were defaults: notes to itself, no part of the model.
    config = {key: value for key, value in dict(component.config).items() if not key.startswith("_")}
    config["_class_name"] = class_name
    config["_diffusers_version"] = mindone.diffusers.__version__
    return {key: _plain(value) for key, value in config.items()}


def _transformers_config(component: Any, class_name: str) -> dict[str, Any]:
    """Config of a mindone CLIP model with the keys transformers writes."""
    config = json.loads(component.config.to_json_string(use_diff=True))
    for key in ("_name_or_path", "_attn_implementation", "_attn_implementation_autoset", "mindspore_dtype"):
        config.pop(key, None)
    config.pop("torch_dtype", None)
    config["dtype"] = _dtype_name(next(iter(component.get_parameters())))
    config["architectures"] = [class_name]
    return config


def _plain(value: Any) -> Any:
    """`value` as JSON has it: arrays and tuples become lists."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _dtype_name(parameter: Any) -> str:
    return str(parameter.dtype).lower().removeprefix("mindspore.")


_STORED_AS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


def _write_weights(path: Path, model: Any) -> None:
    """Write a model's parameters under torch's names, one at a time: a second copy of all is never held."""
    parameters = sorted(parameters_by_name(model).items())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, parameter in parameters:
        stored = _STORED_AS.get(_dtype_name(parameter))
        if stored is None:
            raise CheckpointError(f"{name} is {parameter.dtype}, which cannot be saved; expected a float type")
        start, end = end, end + math.prod(parameter.shape) * SIZES[stored]
        header[name] = {"dtype": stored, "shape": list(parameter.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # so that the values start at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in _blocks(parameter for _, parameter in parameters):
            file.write(block)


def _blocks(parameters: Iterable[Any]) -> Iterator[bytes]:
    import mindspore

    for parameter in parameters:
        if parameter.dtype == mindspore.bfloat16:
            # NumPy has no bfloat16: it is the upper half of the float32 of the same value.
            values = (parameter.astype(mindspore.float32).asnumpy().view(np.uint32) >> 16).astype("<u2")
        else:
            values = parameter.asnumpy()
            values = values.astype(values.dtype.newbyteorder("<"), copy=False)
        yield np.ascontiguousarray(values).tobytes()
