"""LoRA: files to low-rank matrices, and these matrices added to a model's weights, in place.

The reference adds a branch to each layer, ``W x + s B (A x)``. Here the sum ``W + s B A`` is written into the weight
itself: the model keeps its structure, so a graph that was compiled for it, in memory or on disk, serves every LoRA at
every strength, and none costs time while it runs. The original weights are kept beside, and come back bit by bit.

What a file says is read as the reference reads it, by mindone's conversions of names and ranks.
"""

from __future__ import annotations

import json
import logging
import math
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mindiffedit import options
from mindiffedit.arrays import to_numpy
from mindiffedit.checkpoints.hub import resolve_file
from mindiffedit.checkpoints.layout import CheckpointError, WeightsError, some
from mindiffedit.checkpoints.models import parameters_by_name
from mindiffedit.checkpoints.weight_files import read_tensors
from mindiffedit.runtime import devices, turns
from mindiffedit.runtime.reuse import digest, same_places

logger = logging.getLogger(__name__)

COMPONENTS = ("unet", "text_encoder")
"""Parts of a pipeline that a LoRA can be for, by the prefixes of their names in files."""

FILE_NAME = "pytorch_lora_weights.safetensors"

_METADATA = "lora_adapter_metadata"
"""Entry of a safetensors file's metadata that holds peft's configuration, if the file was saved with it."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """What a LoRA adds to one weight: ``ratio * up @ down``. Equal only to itself.

    Attributes:
        down: (r, n) float32, n the product of the weight's dimensions but the first.
        up: (m, r) float32, m the weight's first dimension.
        ratio: alpha / rank.
    """

    down: np.ndarray
    up: np.ndarray
    ratio: float


_Term = tuple[float, LowRank]
"""Matrices and the factor that they count with."""


# --- reading ---------------------------------------------------------------------------------------------------------


def read(source, **place) -> tuple[dict[str, np.ndarray], dict[str, Any] | None, str]:
    """The tensors of a LoRA, peft's configuration if there is one, and what to call it in messages.

    ``source`` is a file, folder or hub id, for which ``place`` has further arguments of ``hub.resolve_file``; or a
    dict from name to array or tensor.
    """
    if isinstance(source, Mapping):
        tensors = {name: to_numpy(value) for name, value in source.items()}
        others = [f"{name} ({value.dtype})" for name, value in tensors.items() if value.dtype.kind not in "fiu"]
        if others:
            raise CheckpointError(f"The given LoRA holds values that are no numbers: {some(others)}.")
        return tensors, None, "the given LoRA"
    path = resolve_file(source, default=FILE_NAME, **place)
    tensors, notes = read_tensors(path)
    if _METADATA not in notes:
        return tensors, None, str(path)
    try:
        return tensors, dict(json.loads(notes[_METADATA])), str(path)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: its {_METADATA} is no JSON object: {error}.") from error


def parse(
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any] | None,
    targets: Mapping[str, Adapted],
    what: str = "the given LoRA",
) -> dict[str, dict[str, LowRank]]:
    """The matrices of a LoRA by component and module, with everything checked against the models.

    Formats, told apart by their names as the reference does it: peft's ("unet.….to_q.lora_A.weight"), the older ones of
    diffusers ("….lora.down.weight", "….processor.to_q_lora.down.weight", the latter also without "unet."), and that of
    kohya's scripts ("lora_unet_….lora_down.weight", with "….alpha").

    Args:
        tensors: by name.
        metadata: peft's configuration, its keys with the component in front; it decides ranks and alphas then.
        targets: the models, with their adapters, by component.
        what: the file, for messages.

    Raises:
        WeightsError: it is no LoRA, or does not fit the models; all misfits are counted, the first are named.
    """
    tensors, alphas = _diffusers_names(tensors, what)
    parts: dict[str, dict[str, np.ndarray]] = {component: {} for component in COMPONENTS}
    misfits = []
    for name, value in tensors.items():
        component, _, rest = name.partition(".")
        if component in parts:
            parts[component][rest] = value
        elif ".processor." in name and not any(key.startswith("unet.") for key in tensors):
            parts["unet"][name] = value
        else:
            misfits.append(f"{name} belongs to neither {' nor '.join(COMPONENTS)}")
    matrices = {}
    for component, part in parts.items():
        if part and component not in targets:
            raise WeightsError(
                f"{what} has weights for the {component}, which this pipeline has not; load it as a dict without them."
            )
        if part:
            weights = targets[component].weights
            matrices[component], problems = _matrices(component, part, alphas, metadata, weights, what)
            misfits += [f"{component}.{problem}" for problem in problems]
    if misfits:
        raise WeightsError(
            f"{what} does not fit this pipeline, and nothing of it was loaded; {len(misfits)} misfits:"
            f" {some(misfits, 8, '; ')}. It was made for another model, or is of a kind that is not supported."
        )
    return matrices


def _diffusers_names(tensors: Mapping[str, np.ndarray], what: str):
    """The tensors under names with the component in front, and the alphas, if the file has any."""
    from mindone.diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers

    if any("dora_scale" in name for name in tensors):
        logger.warning("%s is a DoRA; its dora_scale weights are left out, as in diffusers.", what)
        tensors = {name: value for name, value in tensors.items() if "dora_scale" not in name}
    # Trained with transformers 5.6 or later, whose text encoder has no model inside.
    tensors = {
        re.sub(r"^(text_encoder|lora_te1?)([._])encoder(?=[._])", r"\1\2text_model\2encoder", name): value
        for name, value in tensors.items()
    }
    # Of any number type: kohya's extraction and merging scripts write whole numbers.
    alphas: dict[str, float] = {}
    bad = [
        name
        for name, value in tensors.items()
        if name.endswith(".alpha") and (value.size != 1 or not np.isfinite(value).all())
    ]
    if bad:  # E15
        raise WeightsError(
            f"{what} has alphas that are not one finite number each: {some(bad)}. The file is damaged; use another."
        )
    if tensors and all(name.startswith(("lora_te_", "lora_unet_", "lora_te1_", "lora_te2_")) for name in tensors):
        left, outer, outer_alphas = _without_outer(tensors)
        try:
            tensors, alphas = _convert_non_diffusers_lora_to_diffusers(left)
            tensors, alphas = {**tensors, **outer}, {**alphas, **outer_alphas}
        except (KeyError, ValueError) as error:  # what is left over cannot be converted
            missing = [str(error.args[0])] if isinstance(error, KeyError) else []
            raise WeightsError(
                f"{what} has weights that belong to no plain LoRA ({some(missing or sorted(left))}): of kohya's"
                " formats lora_down, lora_up and alpha can be loaded; LoHa, LoKr and others have to be converted first."
            ) from error
    others = [name for name in tensors if "lora" not in name]
    if others or not tensors:
        raise WeightsError(
            f"{what} is no LoRA: {some(others) if others else 'it holds nothing'}. Expected weights such as"
            " unet.….lora_A.weight or lora_unet_….lora_down.weight."
        )
    return tensors, alphas


_OUTER = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
"""Layers outside the UNet's blocks. W9: the conversion, as the reference's, takes their names apart and loses them."""


def _without_outer(tensors: Mapping[str, np.ndarray]):
    """kohya's tensors without those of the outer layers; these under diffusers' names; and their alphas."""
    left, outer, alphas = dict(tensors), {}, {}
    for module in _OUTER:
        name = f"lora_unet_{module.replace('.', '_')}"
        if {f"{name}.lora_down.weight", f"{name}.lora_up.weight"} <= left.keys():
            for side in ("down", "up"):
                outer[f"unet.{module}.lora.{side}.weight"] = left.pop(f"{name}.lora_{side}.weight")
            if f"{name}.alpha" in left:
                alphas[f"unet.{module}.alpha"] = float(left.pop(f"{name}.alpha").item())
    return left, outer, alphas


def _matrices(component, part, alphas, metadata, weights, what) -> tuple[dict[str, LowRank], list[str]]:
    """One component's matrices by module, and lines about what does not fit."""
    from mindone.peft.utils.other import get_pattern_key

    part = _peft_names(component, part, what)
    config = _config(component, part, alphas, metadata, weights)
    matrices, problems, used = {}, [], set()
    for module in dict.fromkeys(name.partition(".lora_")[0] for name in part):
        down, up = (part.get(f"{module}.lora_{side}.weight") for side in "AB")
        if down is None or up is None:
            continue
        used |= {f"{module}.lora_A.weight", f"{module}.lora_B.weight"}
        shape = tuple(weights[module].shape) if module in weights else None
        problem = _misfit(down, up, shape)
        if problem:
            problems.append(f"{module} {problem}")
            continue
        rank = len(down)
        alpha = config["alpha_pattern"].get(get_pattern_key(config["alpha_pattern"].keys(), module))
        alpha = config["lora_alpha"] if alpha is None else alpha
        ratio = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        down, up = np.asarray(down, np.float32), np.asarray(up, np.float32)
        matrices[module] = LowRank(down.reshape(rank, -1), up.reshape(-1, rank), ratio)
    problems += [f"{name} has no counterpart, or is not supported" for name in part if name not in used]
    return matrices, problems


def _misfit(down: np.ndarray, up: np.ndarray, shape: tuple[int, ...] | None) -> str:
    """What is wrong with a pair of matrices for a weight of this shape; empty where they fit."""
    if shape is None:
        return "is no linear or convolutional layer here"
    rank = len(down) if down.size else 0
    if not rank or down.shape != (rank, *shape[1:]) or up.shape != (shape[0], rank, *[1] * (len(shape) - 2)):
        return f"has matrices {down.shape} and {up.shape} for a weight {shape}"
    if not (np.isfinite(down).all() and np.isfinite(up).all()):
        return "has NaN or infinite values"
    return ""


def _peft_names(component: str, part: Mapping[str, np.ndarray], what: str) -> dict[str, np.ndarray]:
    """Names as peft has them: module, then lora_A or lora_B, then weight."""
    from mindone.diffusers.utils import state_dict_utils as convert

    if component == "unet":
        return dict(part) if "lora_A" in next(iter(part)) else convert.convert_unet_state_dict_to_peft(part)
    try:
        return convert.convert_state_dict_to_peft(convert.convert_state_dict_to_diffusers(part))
    except ValueError as error:
        raise WeightsError(
            f"{what} has names for the text encoder that are of no known format, such as {next(iter(part))}."
        ) from error


def _config(component, part, alphas, metadata, weights) -> dict[str, Any]:
    """peft's configuration: lora_alpha and alpha_pattern, at least."""
    from mindone.diffusers.utils.peft_utils import get_peft_kwargs

    prefix = f"{component}."
    stored = {key.removeprefix(prefix): value for key, value in (metadata or {}).items() if key.startswith(prefix)}
    if stored:
        return {"alpha_pattern": {}, "lora_alpha": 8, **stored}  # peft's defaults
    ups = {name: value.shape[1] for name, value in part.items() if "lora_B" in name and value.ndim > 1}
    if component == "text_encoder":
        # In the model's order. D8: where ranks differ and there is no alpha, the first rank is all modules' alpha.
        ends = (".q_proj", ".k_proj", ".v_proj", ".out_proj", ".fc1", ".fc2")
        names = (f"{module}.lora_B.weight" for module in weights if module.endswith(ends))
        ranks = {name: ups[name] for name in names if name in ups}
    else:
        ranks = {f"^{name}": rank for name, rank in ups.items()}
    alphas = {key.removeprefix(prefix): value for key, value in alphas.items() if key.startswith(prefix)}
    return get_peft_kwargs(ranks or {"": 1}, alphas or None, part, is_unet=component == "unet")


# --- a model with adapters -----------------------------------------------------------------------------------------

_ADAPTED: weakref.WeakKeyDictionary[Any, Adapted] = weakref.WeakKeyDictionary()


def adapted(model) -> Adapted:
    """The adapters of a model. They belong to the model, so that pipelines that share it share them.

    Kept beside the model and not in it: what is in a cell decides, by ``compile_cache``, which stored graph it gets.
    """
    if model not in _ADAPTED:
        _ADAPTED[model] = Adapted(model)
    return _ADAPTED[model]


@dataclass
class _Written:
    """What is in one weight now.

    Attributes:
        original: the weight's values without any adapter.
        terms: what was added to them; None where somebody has put another parameter or memory in its place.
        digest: of the values that were written.
        place: the parameter, and where its values lay.
    """

    original: np.ndarray
    terms: tuple[_Term, ...] | None
    digest: tuple
    place: list


class Adapted:
    """A model's adapters, which of them are in use and how strongly, and what of them is in its weights now.

    The rules are peft's: adapters that are fused are alone in a layer; a strength is a factor on alpha / rank.

    Attributes:
        layers: matrices by adapter and module.
        active: names of the adapters in use.
        enabled: False while they are switched off.
        fused: by module, the fused adapters with what they were fused as.
    """

    def __init__(self, model):
        self._model: Callable[[], Any] = weakref.ref(model)
        self.layers: dict[str, dict[str, LowRank]] = {}
        self.active: list[str] = []
        self.enabled = True
        self.fused: dict[str, dict[str, _Term]] = {}
        self._strengths: dict[tuple[str, str], float] = {}
        self._written: dict[str, _Written] = {}
        self._changes = 0  # so often has something changed of what should be in the weights
        self._state: Any = None  # of the weights as they are; None where it has to be found out

    @property
    def weights(self) -> dict[str, Any]:
        """The parameters that LoRA can be added to, of linear layers and convolutions, by module."""
        from mindspore import nn

        model = self._model()
        tables = {f"{name}.weight" for name, cell in model.cells_and_names() if isinstance(cell, nn.Embedding)}
        return {
            name.removesuffix(".weight"): parameter
            for name, parameter in parameters_by_name(model).items()
            if name.endswith(".weight") and name not in tables and len(parameter.shape) in (2, 4)
        }

    # --- which, and how strongly ---------------------------------------------------------------------------------

    def add(self, name: str, layers: Mapping[str, LowRank]) -> None:
        """Another adapter, which is then the only active one. Fused ones are unfused, as peft does it."""
        self.replace(name, layers)
        self.activate([name])
        self.unfuse()

    def replace(self, name: str, layers: Mapping[str, LowRank]) -> None:
        """Other matrices under a name, at strength 1; what is active stays active."""
        self.layers[name] = dict(layers)
        self.set_strength(name, 1.0)

    def activate(self, names: Sequence[str]) -> None:
        """These adapters are in use and no others; names of adapters of other models are allowed."""
        self.active = list(names)
        self._changed()

    def set_strength(self, name: str, strength) -> None:
        """A number for all modules of an adapter, or a dict with numbers for attention blocks, see ``_of_block``."""
        for module in self.layers.get(name, ()):
            value = _of_block(strength, module) if isinstance(strength, Mapping) else strength
            self._strengths[name, module] = float(value)
        self._changed()

    def enable(self, on: bool) -> None:
        """Switches all adapters on or off; fused ones are unfused by the latter, as peft does it."""
        self.enabled = on
        if not on:
            self.unfuse()
        self._changed()

    def fuse(self, lora_scale: float, names: Sequence[str] | None = None) -> set[str]:
        """Fixes adapters, by default the active ones, in the weights; returns the names of all that are fused."""
        if lora_scale != 1:
            for name in self.active:
                for module in self.layers.get(name, ()):
                    # D9: the scale stays with the adapter after it is unfused.
                    self._strengths[name, module] *= lora_scale
        for name in self.active if names is None else names:
            for module in self.layers.get(name, ()):
                self.fused.setdefault(module, {}).setdefault(name, self._term(name, module))
        self._changed()
        return {name for terms in self.fused.values() for name in terms}

    def unfuse(self) -> set[str]:
        """Takes all fused adapters out again; returns their names."""
        names = {name for terms in self.fused.values() for name in terms}
        self.fused.clear()
        self._changed()
        return names

    def delete(self, name: str) -> None:
        """Forgets an adapter. Where it is fused, the weights stay as they are with all that is fused."""
        if name not in self.layers:
            return
        self._settle([module for module, terms in self.fused.items() if name in terms])
        del self.layers[name]
        if name in self.active:
            self.active = [other for other in self.active if other != name] or sorted(self.layers)[:1]

    def unload(self) -> None:
        """Forgets all adapters: the weights are the original ones, with what is fused."""
        self._settle(list(self.fused))
        self.layers.clear()
        self._strengths.clear()
        self.active, self.enabled = [], True

    def _settle(self, modules: Sequence[str]) -> None:
        """What is fused in these weights is their own from now on; nothing but what is fused is in any weight."""
        self.write(0.0)
        for module in modules:
            self.fused.pop(module)
            self._written.pop(module, None)
        self._changed()

    def _changed(self) -> None:
        self._changes, self._state = self._changes + 1, None

    # --- into the weights ----------------------------------------------------------------------------------------

    def write(self, scale: float = 1.0) -> None:
        """Brings the weights up to date: every active adapter at its strength times ``scale``, and what is fused.

        Nothing happens where they are already.

        Raises:
            options.NumericalError: a sum is beyond the weights' dtype; no weight is changed then.
        """
        if not self.layers:
            return
        turns.once((Adapted.write, id(self)), self._look)
        if self._state == (self._changes, scale):
            return
        weights, before, after = self.weights, {}, {}
        for module in dict.fromkeys([*self._written, *(m for layers in self.layers.values() for m in layers)]):
            now = self._written[module].terms if module in self._written else ()
            terms = self._terms(module, scale)
            if terms != now:
                before[module], after[module] = now or (), terms
        try:
            for module, terms in after.items():
                self._add(module, weights[module], terms)
        except options.NumericalError:
            for module, terms in before.items():
                self._add(module, weights[module], terms)
            raise
        self._state = (self._changes, scale)

    @property
    def written(self) -> Any:
        """What of the adapters is in the weights, for comparing with another time; None where there are none."""
        return self._state if self.layers else None

    def _look(self) -> None:
        """Weights that somebody has put in the place of those that were written have to be written as well."""
        weights = self.weights
        for module, written in self._written.items():
            if not same_places(written.place, [weights[module], weights[module].data_ptr()]):
                written.terms = None  # what is in it is not known
                self._changed()

    def _term(self, name: str, module: str, scale: float = 1.0) -> _Term:
        matrices = self.layers[name][module]
        return matrices.ratio * self._strengths[name, module] * scale, matrices

    def _terms(self, module: str, scale: float) -> tuple[_Term, ...]:
        """What counts for a module; nothing with a factor of 0."""
        if module in self.fused:
            terms: Iterable[_Term] = self.fused[module].values()
        elif not self.enabled:
            terms = ()
        else:
            active = (name for name in self.active if module in self.layers.get(name, ()))
            terms = [self._term(name, module, scale) for name in active]
        return tuple(term for term in terms if term[0] != 0)

    def _add(self, module: str, parameter, terms: tuple[_Term, ...]) -> None:
        """Writes original + terms into a weight; the original itself, bit by bit, where there are none.

        A weight that is not as it was written last has been given other values by somebody: they are the original now.
        """
        written, original = self._written.get(module), _values(parameter)
        if written is not None and digest(original) == written.digest:
            original = written.original
        if not terms:
            if written is not None:
                _put(parameter, original)
                del self._written[module]
            return
        total = original.astype(np.float32).reshape(len(original), -1)
        for factor, matrices in terms:
            total += (np.float32(factor) * matrices.up) @ matrices.down
        with np.errstate(over="ignore"):
            total = total.astype(original.dtype, copy=False).reshape(original.shape)
        if not np.isfinite(total).all():
            raise options.NumericalError(
                f"{module} and its LoRA add up to more than {parameter.dtype} can hold; lower the LoRA's scale, or load"
                " the models in float32."
            )
        values = _put(parameter, total)
        self._written[module] = _Written(original, terms, digest(values), [parameter, parameter.data_ptr()])


def _of_block(strengths: Mapping[str, float], module: str) -> float:
    """A module's number: its attention block's, or that of the attention block of its place; 1 where there is none."""
    for block, strength in strengths.items():
        if block in module:
            return strength
    parts = module.split(".")
    # A residual block or sampler goes with the attention of its number, as in the reference.
    return strengths.get(f"{parts[0]}.{parts[1]}.attentions.{parts[3]}", 1.0) if len(parts) > 3 else 1.0


def _values(tensor) -> np.ndarray:
    """A copy of a tensor's values: float32, or float16 where that is its dtype. bfloat16 becomes float32, exactly."""
    import mindspore

    return (tensor.astype(mindspore.float32) if tensor.dtype == mindspore.bfloat16 else tensor).asnumpy().copy()


def _put(parameter, values: np.ndarray) -> np.ndarray:
    """Writes values into a parameter's own memory; returns them as its dtype holds them.

    ``set_data`` gives the parameter other memory, of which a graph that has run knows nothing: it goes on with the old
    values, while eager code sees the new ones.
    """
    import mindspore
    from mindspore import ops

    tensor = mindspore.Tensor(values)
    with devices.eager():
        if tensor.dtype != parameter.dtype:
            tensor = tensor.astype(parameter.dtype)
            values = _values(tensor)
        ops.assign(parameter, tensor)
    return values
