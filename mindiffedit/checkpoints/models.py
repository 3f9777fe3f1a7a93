"""Checkpoint folders and hub ids in, components out: models built, and given their weights.

Weights are given here rather than by mindone's loaders, which warn about missing and extra weights and go on with
random values. Here every parameter has exactly the file's value, or loading fails with a list of what does not fit.
Only safetensors files are read: a pickle can run code.

MindSpore and mindone are imported inside the functions: everything that can be wrong with a folder is found before they
are.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mindiffedit.checkpoints import hub, old_configs
from mindiffedit.checkpoints.layout import (
    COMPONENTS,
    INDEX_FILE,
    MODELS,
    CheckpointError,
    WeightsError,
    read_json,
    read_processor,
    small_files,
)
from mindiffedit.checkpoints.survey import Source, Survey, find_sources, place_of, text_part
from mindiffedit.checkpoints.tokenizer_files import load_clip_tokenizer
from mindiffedit.checkpoints.weight_files import FLOATS, Stored, map_file
from mindiffedit.errors import InputError, InputTypeError, Message, first_line, whole
from mindiffedit.runtime import devices
from mindiffedit.runtime.notices import say_once


def load_components(
    folder: str | os.PathLike,
    *,
    overrides: Mapping[str, Any] | None = None,
    dtype: Any = None,
    variant: str | None = None,
    weights: Any = None,
) -> dict[str, Any]:
    """Read a Stable Diffusion 1.x or 2.x checkpoint folder.

    Args:
        folder: as `hub.resolve_folder` returns it.
        overrides: components that are taken as given, None included, and neither read nor checked; and
            requires_safety_checker.
        dtype: mindspore dtype of the models' parameters; None is float32, whatever the file has. Values are the file's,
            exactly where `dtype` can hold them.
        variant: 'fp16' reads `….fp16.safetensors` where a component has it, the plain file elsewhere.
        weights: where the models' weights are instead of in the folder: an object with the attribute `file` (Path, for
            messages) and the method `tensors(component, config)`, which returns {parameter's name: where it is stored}.

    Returns:
        dict with the keys vae, text_encoder, tokenizer, unet, scheduler, inverse_scheduler, safety_checker,
        feature_extractor (the last three None where the folder has none) and requires_safety_checker (bool). Models are
        in inference mode and their parameters ask for no gradient.

    Raises:
        CheckpointError: the folder is incomplete, corrupt, or another kind of model; a ValueError.
        WeightsError: weights are missing, extra, misshapen or not finite: all of them are listed; a CheckpointError.
        TypeError: an override that is no component.
        ValueError: another dtype.
    """
    folder, overrides = Path(folder), dict(overrides or {})
    require_known(overrides)
    survey = Survey.of(folder, overrides, variant, weights)
    components = dict.fromkeys(COMPONENTS) | overrides
    for name in ("tokenizer", "feature_extractor"):
        if name in survey.classes:
            components[name] = _load_small(name, folder / name, survey.classes[name])
    survey.check_together(overrides, components["tokenizer"])
    for name in survey.schedulers:
        components[name] = _load_small(name, folder / name, survey.classes[name])
    components |= _load_models(survey.sources, dtype)
    components.setdefault("requires_safety_checker", bool(survey.index.get("requires_safety_checker", True)))
    return components


def require_known(components: Mapping[str, Any]) -> None:
    """TypeError for names that no component has."""
    unknown = sorted(components.keys() - {*COMPONENTS, "requires_safety_checker"})
    if unknown:
        raise InputTypeError(f"components: {', '.join(unknown)} is none of {', '.join(COMPONENTS)}")


def load_component(
    pretrained_model_name_or_path: str | os.PathLike,
    name: str,
    *,
    mindspore_dtype: Any = None,
    variant: str | None = None,
    **hub_options: Any,
) -> Any:
    """One component of a checkpoint alone, to take the place of another's, read as strictly as a whole checkpoint.

    Args:
        pretrained_model_name_or_path: a checkpoint folder, a folder that holds this component alone (its config.json
            and weights), or the hub id of either.
        name: 'vae', 'unet', 'text_encoder', 'tokenizer', 'scheduler', 'inverse_scheduler', 'safety_checker' or
            'feature_extractor'.
        mindspore_dtype: dtype of a model; None is float32. What the device has not becomes float32 with one warning.
        variant: 'fp16' picks ``*.fp16.safetensors`` where there is one.
        **hub_options: ``cache_dir``, ``force_download``, ``local_files_only``, ``token``, ``revision`` and ``proxies``
            as in huggingface_hub, whose environment variables count, too.

    Returns:
        The component: ``from_pretrained(..., vae=load_component(folder, "vae"))``, or ``pipeline.vae = ...``.

    Raises:
        CheckpointError: nothing of that name and kind is there, or it is incomplete or corrupt; a ValueError.
        WeightsError: weights are missing, extra, misshapen or not finite: all of them are listed; a CheckpointError.
        ValueError: ``name`` is no component.
        TypeError: an argument that is not known.
    """
    if name not in COMPONENTS:
        raise InputError(
            "{parameter} has to be one of {known}, but is {value!r}.",
            parameter="name",
            known=", ".join(COMPONENTS),
            value=name,
        )
    options = hub.HubOptions(**hub_options)
    place, class_name = _resolve_component(pretrained_model_name_or_path, name, options, variant)
    if name not in MODELS:
        return _load_small(name, place, class_name)
    sources = find_sources({name: place}, variant, place)
    return _load_models(sources, devices.loadable_dtype(mindspore_dtype))[name]


def _resolve_component(
    name_or_path: str | os.PathLike, name: str, options: hub.HubOptions, variant: str | None
) -> tuple[Path, str]:
    """Folder and class of one component, fetched from the hub where needed and with nothing beside it."""
    folder = hub.folder_here(name_or_path)
    if folder is not None:
        return place_of(folder, name)
    repository = hub.Repository(os.fspath(name_or_path), options)
    small = small_files(name)
    folder = repository.fetch([INDEX_FILE, *(f"{name}/{file}" for file in small), *small])
    repository.pin(folder)
    place, class_name = place_of(folder, name)
    if name in MODELS:
        repository.fetch_weights({name: "" if place == folder else name}, variant)
    return place, class_name


# --- what has no weights ---------------------------------------------------------------------------


def _load_small(name: str, folder: Path, class_name: str) -> Any:
    """A component without weights."""
    if name == "tokenizer":
        return load_clip_tokenizer(folder, class_name)
    if name != "feature_extractor":
        return _load_scheduler(folder, class_name)
    from transformers import CLIPImageProcessor

    config = read_processor(folder)
    try:
        return CLIPImageProcessor.from_dict(config)
    except Exception as error:  # whatever a broken config makes transformers raise
        raise CheckpointError(f"{folder}: the feature extractor cannot be made: {first_line(error)}.") from error


def _load_scheduler(folder: Path, class_name: str) -> Any:
    from mindiffedit.solvers import schedulers

    config = read_json(folder / "scheduler_config.json")
    try:
        scheduler = schedulers.make(class_name, old_configs.scheduler_names(config))
    except Exception as error:  # whatever a broken config, or a kernel that this device has not, makes it raise
        scheduler = schedulers.ddim_instead_of(class_name, config)
        if scheduler is None:
            raise CheckpointError(
                f"{folder}: no {class_name} can be made of its config: {first_line(error)}. Put a DDIMScheduler in its"
                f" place, there and in {INDEX_FILE}."
            ) from error
        say_once(
            f"{folder}: no {class_name} can be made here ({first_line(error)}), so DDIM is taken, with"
            f" timestep_spacing={scheduler.config['timestep_spacing']!r}."
        )
        return scheduler
    # Not of an inverse: the reference takes that as it is.
    changes = {} if "Inverse" in class_name else old_configs.scheduler_changes(scheduler.config, loaded=True)
    if changes:
        scheduler.register_to_config(**changes)
    return scheduler


# --- models ----------------------------------------------------------------------------------------

EAGER = {"attn_implementation": "eager"}
"""The only attention of mindone's transformers; they say so in a warning where the config asks for none."""


def _load_models(sources: Mapping[str, Source], dtype: Any) -> dict[str, Any]:
    """Build the models and give them the files' values. Nothing is read before all names and shapes fit."""
    if not sources:
        return {}
    dtype = devices.float_type("float32" if dtype is None else dtype)
    models = {name: build(source, _construct) for name, source in sources.items()}
    return give_weights(sources, models, dtype)


def build(source: Source, construct: Callable[[str, Mapping[str, Any]], Any]) -> Any:
    """The model that a source's config describes, its parameters without values; made by `construct(name, config)`.

    Raises:
        CheckpointError: the config describes none.
    """
    from mindspore.nn.utils import no_init_parameters

    from mindiffedit.runtime import quick_imports
    from mindiffedit.runtime.kernels import portable_kernels

    try:
        # The values come from the file: making random ones first takes minutes for a large model.
        with quick_imports.quickly(), portable_kernels(), no_init_parameters():
            return construct(source.name, source.config)
    except Exception as error:  # whatever a wrong config makes a model's constructor raise
        raise CheckpointError(
            f"{source.config_file}: no {source.kind.class_names[0]} can be built "
            f"from it: {type(error).__name__}: {first_line(error)}."
        ) from error


def _construct(name: str, config: Mapping[str, Any]) -> Any:
    """mindone's model of a component with weights."""
    if name == "unet":
        from mindone.diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        unet = UNet2DConditionModel.from_config(dict(config))
        _tabulate_time_frequencies(unet)
        _keep_dtype(unet)
        return unet
    if name == "vae":
        from mindone.diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        vae = AutoencoderKL.from_config(dict(config))
        _keep_dtype(vae)
        return vae
    if name == "text_encoder":
        from mindone.transformers.models.clip.modeling_clip import CLIPTextModel
        from transformers import CLIPTextConfig

        return CLIPTextModel(CLIPTextConfig.from_dict(text_part(config), **EAGER))
    from mindone.diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    return StableDiffusionSafetyChecker(CLIPConfig.from_dict(dict(config), **EAGER))


def _keep_dtype(model: Any) -> None:
    """Attention in the dtype of its model: on Ascend mindone casts float32 to float16, for a kernel of these.

    One guided step is off by 3e-5 of its rms for that, thirty times what rounding to float32 alone makes.
    """
    for _, cell in model.cells_and_names():
        if hasattr(cell, "set_flash_attention_force_cast_dtype"):
            cell.set_flash_attention_force_cast_dtype(None)


def _tabulate_time_frequencies(unet: Any) -> None:
    """Give the UNet's sinusoidal time embedding the reference's frequencies, as a table.

    mindone computes them with `mint.exp` at every step. On CPU MindSpore's float32 exp is off by up to 4e-6
    relative, which a late timestep multiplies by a thousand: the embedding is off by 1e-4, the UNet's output
    by 5e-6 of its rms, five times what rounding alone makes. A fourier embedding is left as it is.
    """
    old = unet.time_proj
    if type(old).__name__ != "Timesteps" or old.num_channels % 2:
        return
    half = old.num_channels // 2
    # The exponent is rounded to float32 where the reference rounds it; its exp is good to the last bit.
    exponent = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32)
    exponent = exponent / np.float32(half - old.downscale_freq_shift)
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    unet.time_proj = _time_embedding_class()(frequencies * np.float32(old.scale), old.flip_sin_to_cos)


@functools.cache
def _time_embedding_class() -> type:
    """The cell class; made on demand because this module imports without MindSpore."""
    import mindspore
    from mindspore import mint, nn

    class TimeEmbedding(nn.Cell):
        """sin and cos, or cos and sin if `cos_first`, of timestep × frequency.

        Called with timesteps, (N,) integers or floats; returns (N, 2 × frequencies) float32.
        """

        def __init__(self, frequencies: np.ndarray, cos_first: bool) -> None:
            super().__init__()
            self.frequencies = mindspore.Tensor(frequencies.reshape(1, -1))
            self.cos_first = cos_first

        def construct(self, timesteps):
            angles = timesteps.expand_dims(1).astype(mindspore.float32) * self.frequencies
            if self.cos_first:
                return mint.cat([mint.cos(angles), mint.sin(angles)], dim=-1)
            return mint.cat([mint.sin(angles), mint.cos(angles)], dim=-1)

    return TimeEmbedding


# --- their weights ---------------------------------------------------------------------------------


def parameters_by_name(model: Any) -> dict[str, Any]:
    """Parameters of a mindone model by the name torch gives them, which is the name in the files.

    MindSpore's own layers say embedding_table, gamma and beta; mindone's text encoder is made of these.
    """
    from mindspore import nn

    renamed = {}
    for path, cell in model.cells_and_names():
        if isinstance(cell, nn.Embedding):
            renamed[f"{path}.embedding_table"] = f"{path}.weight"
        elif isinstance(cell, (nn.LayerNorm, nn.GroupNorm)):
            renamed[f"{path}.gamma"] = f"{path}.weight"
            renamed[f"{path}.beta"] = f"{path}.bias"
    return {renamed.get(name, name): parameter for name, parameter in model.parameters_and_names()}


def give_weights(sources: Mapping[str, Source], models: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """The models with the files' values, in inference mode.

    Args:
        sources: where they come from, by name.
        models: as `build` returns them, by name.
        dtype: mindspore dtype of the parameters.

    Raises:
        WeightsError: weights are missing, extra, misshapen, not finite or too large for the dtype: all are listed.
    """
    plans, misfits = {}, []
    for name, source in sources.items():
        plans[name], lines = _match(source, models[name])
        misfits += lines
    if misfits:
        one_file = any(source.file.parent != source.config_file.parent for source in sources.values())
        hint = _hint(misfits, one_file)
        raise WeightsError(
            "Weights do not fit their models:\n{misfits}\n{hint}", misfits=whole("\n".join(misfits)), hint=hint
        )
    for name, source in sources.items():
        _fill(source, plans[name], dtype)
        models[name].set_train(False)
    return models


# Attention of VAEs that were saved before diffusers 0.18.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _match(source: Source, model: Any) -> tuple[dict[str, tuple[Stored, Any]], list[str]]:
    """Pair every weight of the file with its parameter.

    Returns:
        {name in the file: (stored, parameter)}, and lines that name what has no pair.
    """
    parameters = parameters_by_name(model)
    lines = []
    pairs: dict[str, tuple[Stored, Any]] = {}
    left = dict(parameters)
    for name, stored in source.tensors.items():
        target = _current_name(name, left, source.kind.inner)
        if target is None:
            pattern = source.kind.extra
            if pattern is None or not re.fullmatch(pattern, name):
                lines.append(f"  extra: {name} {stored.shape}")
            continue
        parameter = left.pop(target)
        shape = tuple(parameter.shape)
        if stored.shape != shape:
            lines.append(f"  misshapen: {name} is {stored.shape}, the model has {shape}")
        if stored.dtype not in FLOATS:
            lines.append(f"  of the wrong type: {name} is {stored.dtype}, expected one of {', '.join(FLOATS)}")
        pairs[name] = (stored, parameter)
    lines += [f"  missing: {name} {tuple(parameter.shape)}" for name, parameter in left.items()]
    if lines:
        lines.insert(0, f"{source.name}, from {source.file}:")
    return pairs, lines


# mindone's own save_pretrained keeps MindSpore's names.
_MINDSPORE_ENDINGS = {"embedding_table": "weight", "gamma": "weight", "beta": "bias"}


def _current_name(name: str, parameters: Mapping[str, Any], inner: str) -> str | None:
    """Key of `parameters` that a weight called `name` in a file is for; None where there is none."""
    *path, ending = name.split(".")
    candidates = [name, ".".join([*path, _MINDSPORE_ENDINGS.get(ending, ending)])]
    if len(path) > 1 and path[-1] in _OLD_ATTENTION:
        candidates.append(".".join([*path[:-1], _OLD_ATTENTION[path[-1]], ending]))
    candidates += [inner + candidate for candidate in candidates]
    return next((candidate for candidate in candidates if candidate in parameters), None)


def _hint(misfits: list[str], one_file: bool) -> Message:
    extra = [line for line in misfits if line.startswith("  extra")]
    if any("lora" in line.lower() for line in extra):
        return whole("Some are LoRA weights: fuse them into the model before saving it (fuse_lora in diffusers).")
    if one_file:
        return Message(
            "The file belongs to another configuration: give {config}, a folder or hub id whose models are these."
        )
    if extra and any(line.startswith("  missing") for line in misfits):
        return whole("The file holds another model, or an original checkpoint not converted to diffusers' names.")
    return whole("The config.json beside the file belongs to another model, or the file is damaged.")


def _fill(source: Source, pairs: Mapping[str, tuple[Stored, Any]], dtype: Any) -> None:
    """Give every parameter its value from the file, in `dtype`."""
    import mindspore

    bad = []
    wide = source.kind.wide if dtype == mindspore.float16 else None
    mapping = functools.cache(map_file)
    for name, (stored, parameter) in pairs.items():
        kind = mindspore.float32 if wide is not None and re.fullmatch(wide, name) else dtype
        number = np.dtype(np.float16 if kind == mindspore.float16 else np.float32)
        with np.errstate(over="ignore"):
            values = stored.load(number, mapping(stored.file))
        if not np.isfinite(values).all():
            count = values.size - int(np.isfinite(stored.read()).sum())
            what = f"{count} of {values.size} values are NaN or infinite"
            bad.append(f"  {name}: {what if count else f'holds values too large for {kind}'}")
            continue
        tensor = mindspore.Tensor.from_numpy(values)  # without a copy
        parameter.set_dtype(kind)
        parameter.set_data(tensor if tensor.dtype == kind else tensor.astype(kind))
        parameter.requires_grad = False
    if bad:
        raise WeightsError(
            f"{source.name}, from {source.file}, holds weights that cannot be used:\n" + "\n".join(bad) + "\n"
            "The file is damaged, or was saved from a training that had diverged. Use another copy."
        )
