"""Portable kernels: mindone's Stable Diffusion models on devices where MindSpore's `mint` has gaps.

mindone's models call `mindspore.mint`, and many of mint's kernels are registered for Ascend only. Inside
`portable_kernels()` every name in `KERNELS` whose kernel is missing on the current device, or is there and
inaccurate, is replaced by an equivalent built from operators that every device has. On Ascend nothing is missing: only
attention in float32, for which it has no fused kernel, is replaced for the memory that it would hold.

What is replaced, and how:

- functions (`mint.arange`): the attribute on the `mindspore.mint` modules, and the same object where a
  mindone module has bound it to a name of its own;
- layers (`mint.nn.Conv2d`): the class's `construct` only. The class, its parameters (names, shapes, initial
  values) and `isinstance` stay as they are, so checkpoints load as ever, and a layer built outside the
  context runs inside it;
- methods (`...Attention:math_attention_op`): that method of the class.

The replacements themselves are in `portable`. On a CPU for which the project's C++ operators were built
(`mindiffedit.runtime.native`), those in `NATIVE` take their place, and that of some names more: not because these are
missing, but because they are slow or hold too much memory.

Both PyNative and graph mode read these names at the moment they run or compile, so the context must be
around the construction, the eager call and the compilation of a model. A graph compiled inside it can be
run outside it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import mindspore
import numpy as np
from mindspore import mint

from mindiffedit.runtime import devices, native, portable, quick_imports, turns

__all__ = ["KERNELS", "Kernel", "eagerly", "missing_kernels", "portable_kernels"]


# --- the table -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One name that may be missing, or inaccurate, on a device.

    Attributes:
        name: dotted path of the original; 'mint' stands for 'mindspore.mint'. A class means its `construct`, a method
            stands after a colon.
        replacement: function with the signature of the original.
        probe: calls the original on tiny input; it raises where the kernel is missing or inaccurate.
        reason: what is missing or wrong, and so when this entry can go.
        improves: whether the original would do, with more memory.
        everywhere: whether it is replaced on Ascend as well.
    """

    name: str
    replacement: Callable[..., Any]
    probe: Callable[[], Any]
    reason: str
    improves: bool = False
    everywhere: bool = False


F = mint.nn.functional


def _floats(*shape: int) -> mindspore.Tensor:
    return mindspore.Tensor(np.full(shape, 0.5, np.float32))


def _indices() -> mindspore.Tensor:
    return mindspore.Tensor(np.array([1, 0], np.int32))


# Largest relative error (rms over the values) of a float32 kernel that is kept: one unit in the last place.
# Rounding the exact results alone makes 2.5e-8, torch's CPU kernels 4e-8.
MAX_ERROR = 1.2e-7


def _require_accuracy(kernel: Callable[..., Any], exact: Callable[[np.ndarray], np.ndarray]) -> None:
    """Raise ArithmeticError where a float32 `kernel` is further off than MAX_ERROR."""
    values = np.arange(-255, 256, 2) / 32  # float32 has these exactly
    result = kernel(mindspore.Tensor(values.astype(np.float32))).asnumpy().astype(np.float64)
    error = np.sqrt(np.mean((result / exact(values) - 1) ** 2))
    if not error <= MAX_ERROR:
        raise ArithmeticError(f"off by {error:.1e}, expected at most {MAX_ERROR:.1e}")


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


# Gaps of graph mode only are asked for in graph mode. Not all of them may be: compiling a kernel that is
# missing in PyNative too can end the process (Embedding does), these here raise.


def _split(tensor):
    return mint.split(tensor, (1, 1), dim=1)[1]


def _chunk(tensor):
    return mint.chunk(tensor, 2, dim=1)[1]


def _tensor_chunk(tensor):
    return tensor.chunk(2, dim=1)[1]


def _whole_bias() -> None:
    if devices.device_target() == "CPU":
        raise MemoryError("nothing is missing, but each number of the sum keeps 16 bytes")


def _mixed_product() -> None:
    if devices.device_target() != "CPU":  # where nothing is computed in half precision
        _floats() * _floats(2).astype(mindspore.float16)


def _whole_scores() -> None:
    raise MemoryError("nothing is missing, but 9216 tokens of 8 heads, twice, take 5.4 GB")


_MODELS = "mindone.diffusers.models"


def _layers(name: str, function: Callable, layer: Any, probe: Callable[[], Any], reason: str) -> tuple[Kernel, Kernel]:
    """The entries of a function of `mint.nn.functional` and of the layer that is made of it."""
    return (
        Kernel(f"mint.nn.functional.{name}", function, probe, reason),
        Kernel(f"mint.nn.{layer.__name__}", layer.construct, probe, reason),
    )


KERNELS: tuple[Kernel, ...] = (
    Kernel("mint.nn.functional.gelu", portable.gelu, lambda: F.gelu(_floats(2)), "GeluExt is unregistered"),
    Kernel(
        "mint.nn.functional.silu",
        portable.silu,
        lambda: _require_accuracy(F.silu, _silu),
        "Sigmoid is inaccurate in float32",
    ),
    Kernel("mint.tanh", portable.tanh, lambda: _require_accuracy(mint.tanh, np.tanh), "Tanh is inaccurate in float32"),
    *_layers(
        "conv2d",
        portable.conv2d,
        portable.Conv2d,
        lambda: F.conv2d(_floats(1, 1, 2, 2), _floats(1, 1, 1, 1)),
        "Conv2DExt is unregistered",
    ),
    *_layers(
        "layer_norm",
        portable.layer_norm,
        portable.LayerNorm,
        lambda: F.layer_norm(_floats(1, 2), (2,)),
        "LayerNormExt cannot be created",
    ),
    *_layers(
        "embedding",
        portable.embedding,
        portable.Embedding,
        lambda: F.embedding(_indices(), _floats(2, 2)),
        "Embedding is unregistered",
    ),
    Kernel(
        "mint.nn.Linear", portable.Linear.construct, _whole_bias, "adding a bias holds memory on a CPU", improves=True
    ),
    Kernel(
        "mint.nn.functional.pad",
        portable.pad,
        lambda: F.pad(_floats(1, 1, 2, 2), (0, 1, 0, 1)),
        "ConstantPadND is unregistered",
    ),
    Kernel(
        "mint.nn.functional.normalize",
        portable.normalize,
        lambda: F.normalize(_floats(2, 2)),
        "LinalgVectorNorm is unregistered",
    ),
    Kernel("mint.arange", portable.arange, lambda: mint.arange(2), "Arange is unregistered"),
    Kernel("mint.zeros_like", portable.zeros_like, lambda: mint.zeros_like(_floats(2)), "ZerosLikeExt is unregistered"),
    Kernel("mint.mm", portable.mm, lambda: mint.mm(_floats(2, 2), _floats(2, 2)), "Mm is unregistered"),
    Kernel("mint.stack", portable.stack, lambda: mint.stack([_floats(2), _floats(2)]), "StackExt is unregistered"),
    Kernel("mint.round", portable.round, lambda: mint.round(_floats(2), decimals=3), "Round takes decimals=0 only"),
    Kernel(
        "mint.split",
        portable.split,
        lambda: mindspore.jit(_split)(_floats(1, 2)),
        "SplitWithSize is unsupported in graph mode (MindSpore 2.7)",
    ),
    Kernel(
        "mint.chunk",
        portable.chunk,
        lambda: mindspore.jit(_chunk)(_floats(1, 2)),
        "Chunk is unsupported in graph mode (MindSpore 2.7)",
    ),
    Kernel(
        f"{_MODELS}.activations.GEGLU",
        portable.GEGLU.construct,
        lambda: mindspore.jit(_tensor_chunk)(_floats(1, 2)),
        "Chunk, to which graph mode turns Tensor.chunk, is unsupported there",
    ),
    Kernel(
        "mindone.transformers.activations.NewGELUActivation",
        portable.NewGELUActivation.construct,
        _mixed_product,
        "Mul takes two numbers of one type",
    ),
    Kernel(
        f"{_MODELS}.attention_processor.Attention:math_attention_op",
        portable.Attention.math_attention_op,
        _whole_scores,
        "it holds the scores of all tokens with all tokens",
        improves=True,
        everywhere=True,
    ),
)

NATIVE: dict[str, str] = {
    "mint.nn.functional.gelu": "gelu",
    "mint.nn.functional.silu": "silu",
    "mint.nn.functional.conv2d": "conv2d",
    "mint.nn.functional.layer_norm": "layer_norm",
    "mint.nn.functional.interpolate": "interpolate",
    "mint.cat": "cat",
    "mint.nn.Conv2d": "Conv2d.construct",
    "mint.nn.LayerNorm": "LayerNorm.construct",
    "mint.nn.Linear": "Linear.construct",
    f"{_MODELS}.resnet.ResnetBlock2D": "ResnetBlock2D.construct",
    "mint.nn.GroupNorm": "GroupNorm.construct",
    f"{_MODELS}.activations.GEGLU": "GEGLU.construct",
    f"{_MODELS}.attention_processor.AttnProcessor2_0:__call__": "AttnProcessor2_0.__call__",
    **{
        f"{_MODELS}.transformers.transformer_2d.Transformer2DModel:{method}": f"Transformer2DModel.{method}"
        for method in ("_operate_on_continuous_inputs", "_get_output_for_continuous_inputs")
    },
}
"""What the C++ operators replace, and by which member of `native.layers`."""

_LAUNCHES = {
    f"{_MODELS}.attention_processor.AttnProcessor2_0:__call__": "AttnProcessor2_0.__call__",
    f"{_MODELS}.resnet.ResnetBlock2D": "ResnetBlock2D.construct",
    f"{_MODELS}.transformers.transformer_2d.Transformer2DModel:_get_output_for_continuous_inputs": (
        "Transformer2DModel._get_output_for_continuous_inputs"
    ),
    f"{_MODELS}.unets.unet_2d_condition.UNet2DConditionModel:get_time_embed": "UNet2DConditionModel.get_time_embed",
    f"{_MODELS}.embeddings.TimestepEmbedding": "TimestepEmbedding.construct",
}

LAUNCHES: dict[str, dict[str, str]] = {
    "CPU": {},
    "GPU": _LAUNCHES
    | {
        "mint.nn.functional.layer_norm": "layer_norm",
        "mint.nn.LayerNorm": "LayerNorm.construct",
        f"{_MODELS}.activations.GEGLU": "GEGLU.construct",
    },
    "Ascend": _LAUNCHES
    | {
        "mint.split": "split",
        "mindspore.nn.Dense": "Dense.construct",
        "mindspore.nn.LayerNorm": "WholeLayerNorm.construct",
        "mindspore.nn.Embedding": "Embedding.construct",
    },
}
"""What is replaced for fewer launches, by device, and by which member of `launches`."""


# --- what is missing -------------------------------------------------------------------------------

_lock = threading.RLock()
_missing: dict[str, tuple[Kernel, ...]] = {}


def missing_kernels() -> list[str]:
    """Names in `KERNELS` whose kernel the current device has not, or not accurately, or only with too much memory.

    The first call for a device runs each original once on tiny input (about 0.2 s on CPU).
    """
    return [kernel.name for kernel in _missing_here()]


def _missing_here() -> tuple[Kernel, ...]:
    target = devices.device_target()
    if target == "Ascend":
        return tuple(kernel for kernel in KERNELS if kernel.everywhere)
    with _lock:
        if target not in _missing:
            # An error of an operator launched earlier is the caller's: raised here, not taken for ours.
            devices.synchronize()
            with devices.eager(), devices.not_counted():
                _missing[target] = tuple(kernel for kernel in KERNELS if _fails(kernel.probe))
        return _missing[target]


def _fails(probe: Callable[[], Any]) -> bool:
    # PyNative launches kernels from another thread: an error may come only with the next synchronisation,
    # and one that is left there would be raised from an innocent operator later.
    failed = False
    try:
        probe()
        devices.synchronize()
    except Exception:
        failed = True
        with contextlib.suppress(Exception):
            devices.synchronize()
    return failed


# --- the context -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Patch:
    """`owner.attribute` is `original` outside the context and `replacement` inside it."""

    owner: Any
    attribute: str
    original: Any
    replacement: Any


_depth = 0
_applied: list[_Patch] = []
_plan: list[_Patch] = []
_plan_key: tuple[str, int, bool] | None = None
_originals: dict[str, Any] = {}


@contextlib.contextmanager
def portable_kernels():
    """Replace the kernels that mindone's models ask for and the device lacks, for the length of the block.

    What is missing or inaccurate here has an equivalent of operators that every device has put in its place, while a
    model is built, loaded, compiled or run eagerly; a graph that was compiled inside can run outside.

    Reentrant, and safe in threads: the originals come back when the last block that is open in any thread
    is left, by an exception too. Until then the other threads of the process see the replacements as well.
    The first block imports mindone's layers of activation and attention (2 s).
    """
    _enter()
    try:
        yield
    finally:
        _leave()


@contextlib.contextmanager
def eagerly():
    """What runs a model operator by operator: the thread's turn, MindSpore's PyNative mode, the portable kernels."""
    with turns.turn(), portable_kernels(), devices.eager():
        yield


def _enter() -> None:
    global _depth
    turns.require_own_process()
    with _lock:
        if _depth == 0:
            try:
                for patch in _current_plan():
                    _applied.append(patch)
                    setattr(patch.owner, patch.attribute, patch.replacement)
            except BaseException:
                _restore()
                raise
        _depth += 1


def _leave() -> None:
    global _depth
    with _lock:
        _depth -= 1
        if _depth == 0:
            _restore()


def _restore() -> None:
    while _applied:
        patch = _applied.pop()
        setattr(patch.owner, patch.attribute, patch.original)
    if _plan_key is None or _plan_key[1] == len(sys.modules):
        return
    # A module that was imported inside the block may have bound a replacement to a name of its own.
    back = {
        id(replacement): original
        for name, replacement in _replacements().items()
        if callable(original := _originals.get(name)) and not isinstance(original, type) and ":" not in name
    }
    for module in _modules():
        for attribute, value in list(vars(module).items()):
            if id(value) in back:
                setattr(module, attribute, back[id(value)])


def _current_plan() -> list[_Patch]:
    """The patches for the modules that are loaded now; made anew only when another module has come."""
    global _plan, _plan_key
    key = (devices.device_target(), len(sys.modules), native.available())
    if _plan_key == key:
        return _plan
    plan: list[_Patch] = []
    functions: dict[int, Callable[..., Any]] = {}
    for name, replacement in _replacements().items():
        original = _original(name)
        if original is None:
            continue
        _, _, method = name.partition(":")
        if method or isinstance(original, type):
            method = method or "construct"
            plan.append(_Patch(original, method, getattr(original, method), replacement))
        else:
            functions[id(original)] = replacement
    if functions:
        for module in _modules():
            for attribute, value in list(vars(module).items()):
                if id(value) in functions:
                    plan.append(_Patch(module, attribute, value, functions[id(value)]))
    _plan, _plan_key = plan, (key[0], len(sys.modules), key[2])
    return plan


def _replacements() -> dict[str, Callable[..., Any]]:
    """What takes the place of each name here."""
    found = {kernel.name: kernel.replacement for kernel in _missing_here()}
    if native.available():
        from mindiffedit.runtime.native import layers

        found |= {name: attrgetter(path)(layers) for name, path in NATIVE.items()}
    if names := LAUNCHES[devices.device_target()]:
        from mindiffedit.runtime import launches

        found |= {name: attrgetter(path)(launches) for name, path in names.items()}
    return found


def _modules() -> list[Any]:
    """The loaded modules whose names are replaced: mint's own, and mindone's, which may hold copies."""
    return [
        module
        for name, module in list(sys.modules.items())
        if module is not None and (name.partition(".")[0] == "mindone" or name.startswith("mindspore.mint"))
    ]


def _original(name: str) -> Any:
    """What `name` named before anything was replaced, of a method its class; None where mindone is not installed."""
    if name not in _originals:
        path, _, attribute = name.partition(":")[0].rpartition(".")
        if path.partition(".")[0] == "mint":
            path = f"mindspore.{path}"
        if importlib.util.find_spec(path.partition(".")[0]) is None:
            return None
        with quick_imports.quickly():
            _originals[name] = getattr(importlib.import_module(path), attribute)
    return _originals[name]
