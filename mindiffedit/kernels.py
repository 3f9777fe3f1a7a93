"""Portable kernels: mindone's Stable Diffusion models on devices where MindSpore's `mint` has gaps.

mindone's models call `mindspore.mint`, and many of mint's kernels are registered for Ascend only. Inside
`portable_kernels()` every name in `KERNELS` whose kernel is missing on the current device, or is there and
inaccurate, is replaced by an equivalent built from operators that every device has. On Ascend nothing is ever
replaced.

What is replaced, and how:

- functions (`mint.arange`): the attribute on the `mindspore.mint` modules, and the same object where a
  mindone module has bound it to a name of its own;
- layers (`mint.nn.Conv2d`): the class's `construct` only. The class, its parameters (names, shapes, initial
  values) and `isinstance` stay as they are, so checkpoints load as ever, and a layer built outside the
  context runs inside it.

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
from dataclasses import dataclass
from typing import Any, Callable

import mindspore
import numpy as np
from mindspore import mint, ops

from mindiffedit import devices

__all__ = ["KERNELS", "Kernel", "missing_kernels", "portable_kernels"]


# --- the replacements ------------------------------------------------------------------------------
#
# Signatures and results are those of the mint original. They are parsed by MindSpore's graph compiler: no
# lambda, no try, no default that is not a constant. `input` shadows a builtin because mint's argument does.


def gelu(input, *, approximate="none"):
    """Stands in for `mint.nn.functional.gelu` while MindSpore registers GeluExt for Ascend only.

    'none' is written with erf, as in torch; `ops.gelu` with 'tanh' is the other formula.
    """
    if approximate == "tanh":
        return ops.gelu(input, approximate="tanh")
    # One multiplication fewer, and no division, next to ops.gelu(approximate="none").
    return input * (ops.erf(input * 0.7071067811865476) * 0.5 + 0.5)


def silu(input, inplace=False):
    """Stands in for `mint.nn.functional.silu` where it is inaccurate, as on CPU.

    There float32 results are off by up to 2e-6 of themselves, and by 5e-8 on average: that does not cancel in
    the sums that follow. Float32 is computed in float64, the shorter types in float32.
    """
    if inplace:
        raise ValueError("silu: inplace is not supported by the portable kernel, expected False")
    if input.dtype == mindspore.float32:
        return ops.silu(input.astype(mindspore.float64)).astype(mindspore.float32)
    if input.dtype == mindspore.float64:
        return ops.silu(input)
    return ops.silu(input.astype(mindspore.float32)).astype(input.dtype)


FEW_CHANNELS = 8
"""No hidden layer has as few channels as this: latents have 4, a posterior 8, a picture 3."""


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Stands in for `mint.nn.functional.conv2d` while Conv2DExt is registered for Ascend only.

    `ops.Conv2D` with explicit padding, which is oneDNN's convolution on CPU; a few convolutions, on which the
    accuracy of a whole model hangs, in float64.
    """
    if _goes_through_float64(input, weight, stride, padding, groups):
        return _conv2d_float64(input, weight, bias, stride, padding, dilation)
    if isinstance(padding, str):
        mode, pads = padding, 0
    elif isinstance(padding, int):
        mode, pads = "pad", padding
    else:
        mode, pads = "pad", (padding[0], padding[0], padding[-1], padding[-1])
    convolve = ops.Conv2D(
        out_channel=weight.shape[0],
        kernel_size=weight.shape[2:],
        pad_mode=mode,
        pad=pads,
        stride=stride,
        dilation=dilation,
        group=groups,
    )
    output = convolve(input, weight)
    if bias is None:
        return output
    return ops.bias_add(output, bias)


def _goes_through_float64(input, weight, stride, padding, groups):
    """Whether `conv2d` computes this convolution in float64: the few cheap ones on a model's main path.

    A float32 sum of 300 products is off by 3e-7 (rms). In most convolutions that is an error of one branch of
    a residual block; the result of the ones below is all that the next layers see. They made nearly all of
    the VAE encoder's error, 3e-6 of its latents' rms, which an inversion multiplies by 30.
    """
    rows, columns = weight.shape[2:]
    if input.dtype != mindspore.float32 or groups != 1 or isinstance(padding, str) or max(rows, columns) > 3:
        return False
    # The first of a model, and the last, but for a picture's three channels: large, and nothing comes after.
    if weight.shape[1] <= FEW_CHANNELS or 3 < weight.shape[0] <= FEW_CHANNELS:
        return True
    # The VAE encoder's downsampling, which pads by itself and runs once for a picture. The UNet's runs at
    # every step, has padding, and gains too little.
    strides = stride if isinstance(stride, (tuple, list)) else (stride,)
    pads = padding if isinstance(padding, (tuple, list)) else (padding,)
    return max(strides) > 1 and max(pads) == 0


def _conv2d_float64(input, weight, bias, stride, padding, dilation):
    """The convolution as a matrix product in float64, in which there is no `ops.Conv2D`."""
    batch, filters = input.shape[0], weight.shape[0]
    kernel = weight.shape[2:]
    strides = (stride, stride) if isinstance(stride, int) else stride
    pads = (padding, padding) if isinstance(padding, int) else padding
    gaps = (dilation, dilation) if isinstance(dilation, int) else dilation
    height = (input.shape[2] + 2 * pads[0] - gaps[0] * (kernel[0] - 1) - 1) // strides[0] + 1
    width = (input.shape[3] + 2 * pads[1] - gaps[1] * (kernel[1] - 1) - 1) // strides[1] + 1
    patches = ops.unfold(input, kernel, gaps, pads, strides).astype(mindspore.float64)
    output = ops.matmul(weight.reshape(1, filters, -1).astype(mindspore.float64), patches)
    if bias is not None:
        output = output + bias.astype(mindspore.float64).reshape(1, filters, 1)
    return output.reshape(batch, filters, height, width).astype(mindspore.float32)


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """Stands in for `mint.nn.functional.layer_norm` while LayerNormExt does not run on CPU."""
    if weight is None:
        weight = ops.ones(normalized_shape, input.dtype)
    if bias is None:
        bias = ops.zeros(normalized_shape, input.dtype)
    axis = input.ndim - len(normalized_shape)
    return ops.LayerNorm(begin_norm_axis=axis, begin_params_axis=axis, epsilon=eps)(input, weight, bias)[0]


def embedding(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False):
    """Stands in for `mint.nn.functional.embedding` while Embedding is registered for Ascend only.

    `padding_idx` and `scale_grad_by_freq` change gradients only. `max_norm` rewrites the table: refused.
    """
    if max_norm is not None:
        raise ValueError("embedding: max_norm is not supported by the portable kernel, expected None")
    return ops.gather(weight, input, 0)


def pad(input, pad, mode="constant", value=None):
    """Stands in for `mint.nn.functional.pad` while ConstantPadND and its kin are Ascend only."""
    if mode == "constant":
        return ops.pad(input, tuple(pad), "constant", 0 if value is None else value)
    return ops.pad(input, tuple(pad), mode)


def arange(start=0, end=None, step=1, *, dtype=None):
    """Stands in for `mint.arange` while Arange is registered for Ascend only."""
    if end is None:
        return ops.arange(0, start, step, dtype=dtype)
    return ops.arange(start, end, step, dtype=dtype)


def zeros_like(input, *, dtype=None):
    """Stands in for `mint.zeros_like` while ZerosLikeExt is registered for Ascend only."""
    return ops.zeros_like(input, dtype=dtype)


def mm(input, mat2):
    """Stands in for `mint.mm` while Mm is registered for Ascend only."""
    return ops.matmul(input, mat2)


def normalize(input, p=2.0, dim=1, eps=1e-12):
    """Stands in for `mint.nn.functional.normalize` while LinalgVectorNorm is registered for Ascend only."""
    if p == 2.0:
        length = ops.sqrt(ops.sum(ops.square(input), dim, True))
    else:
        length = ops.pow(ops.sum(ops.pow(ops.abs(input), p), dim, True), 1.0 / p)
    return input / ops.clamp(length, eps)


def round(input, *, decimals=0):
    """Stands in for `mint.round` while its CPU kernel takes `decimals=0` only."""
    if decimals == 0:
        return ops.round(input)
    scale = 10.0**decimals
    return ops.round(input * scale) / scale


def split(tensor, split_size_or_sections, dim=0):
    """Stands in for `mint.split` while SplitWithSize has no CPU kernel in graph mode (MindSpore 2.7)."""
    return ops.split(tensor, split_size_or_sections, dim)


def chunk(input, chunks, dim=0):
    """Stands in for `mint.chunk` while Chunk has no CPU kernel in graph mode (MindSpore 2.7)."""
    return ops.chunk(input, chunks, dim)


# The layers' `construct`. Classes only because the function has to be called `construct`: a layer that was
# compiled on its own in graph mode is otherwise not found again by a later `jit`.


class Conv2d:
    """For `mint.nn.Conv2d`, while Conv2DExt is registered for Ascend only."""

    def construct(self, input):
        if self.padding_mode == "zeros":
            return conv2d(
                input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
            )
        padded = pad(input, self._reversed_padding, mode=self.padding_mode)
        return conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class LayerNorm:
    """For `mint.nn.LayerNorm`, while LayerNormExt does not run on CPU."""

    def construct(self, input):
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class Embedding:
    """For `mint.nn.Embedding`, while Embedding is registered for Ascend only."""

    def construct(self, input):
        return embedding(input, self.weight, self.padding_idx, self.max_norm)


class GEGLU:
    """For mindone's GEGLU, while `Tensor.chunk` has no CPU kernel in graph mode.

    A Tensor method cannot be replaced for the graph compiler, so the one layer that needs it is.
    """

    def construct(self, hidden_states):
        hidden_states = self.proj(hidden_states)
        hidden_states, gate = ops.split(hidden_states, hidden_states.shape[-1] // 2, axis=-1)
        return hidden_states * self.gelu(gate)


# --- the table -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One name that may be missing, or inaccurate, on a device.

    name : dotted path of the original; 'mint' stands for 'mindspore.mint'. A class means its `construct`.
    replacement : function with the signature of the original.
    probe : calls the original on tiny input; it raises where the kernel is missing or inaccurate.
    reason : what is missing or wrong, and so when this entry can go.
    """

    name: str
    replacement: Callable[..., Any]
    probe: Callable[[], Any]
    reason: str


def _floats(*shape: int) -> mindspore.Tensor:
    return mindspore.Tensor(np.full(shape, 0.5, np.float32))


# Largest relative error (rms over the values) of a float32 kernel that is kept: one unit in the last place.
# Rounding the exact results alone makes 2.5e-8, torch's CPU kernels 4e-8.
ACCURACY = 1.2e-7


def _require_accuracy(kernel: Callable[..., Any], values: np.ndarray, expected: np.ndarray) -> None:
    """Raise ArithmeticError where `kernel` of float32 `values` is further off than ACCURACY."""
    got = kernel(mindspore.Tensor(values.astype(np.float32))).asnumpy().astype(np.float64)
    error = np.sqrt(np.mean((got / expected - 1) ** 2))
    if not error <= ACCURACY:
        raise ArithmeticError(f"off by {error:.1e}, expected at most {ACCURACY:.1e}")


def _indices() -> mindspore.Tensor:
    return mindspore.Tensor(np.array([1, 0], np.int32))


def _gelu() -> Any:
    return mint.nn.functional.gelu(_floats(2))


def _silu() -> None:
    values = np.arange(-255, 256, 2) / 32  # float32 has these exactly
    _require_accuracy(mint.nn.functional.silu, values, values / (1 + np.exp(-values)))


def _conv2d() -> Any:
    return mint.nn.functional.conv2d(_floats(1, 1, 2, 2), _floats(1, 1, 1, 1))


def _layer_norm() -> Any:
    return mint.nn.functional.layer_norm(_floats(1, 2), (2,))


def _embedding() -> Any:
    return mint.nn.functional.embedding(_indices(), _floats(2, 2))


def _pad() -> Any:
    return mint.nn.functional.pad(_floats(1, 1, 2, 2), (0, 1, 0, 1))


def _normalize() -> Any:
    return mint.nn.functional.normalize(_floats(2, 2))


def _arange() -> Any:
    return mint.arange(2)


def _zeros_like() -> Any:
    return mint.zeros_like(_floats(2))


def _mm() -> Any:
    return mint.mm(_floats(2, 2), _floats(2, 2))


def _round() -> Any:
    return mint.round(_floats(2), decimals=3)


# Gaps of graph mode only are asked for in graph mode. Not all of them may be: compiling a kernel that is
# missing in PyNative too can end the process (Embedding does), these here raise.


def _split() -> Any:
    return mindspore.jit(_split_sizes)(_floats(1, 2))


def _chunk() -> Any:
    return mindspore.jit(_chunk_function)(_floats(1, 2))


def _tensor_chunk() -> Any:
    return mindspore.jit(_chunk_method)(_floats(1, 2))


def _split_sizes(tensor):
    return mint.split(tensor, (1, 1), dim=1)[1]


def _chunk_function(tensor):
    return mint.chunk(tensor, 2, dim=1)[1]


def _chunk_method(tensor):
    return tensor.chunk(2, dim=1)[1]


KERNELS: tuple[Kernel, ...] = (
    Kernel("mint.nn.functional.gelu", gelu, _gelu, "GeluExt is unregistered"),
    Kernel("mint.nn.functional.silu", silu, _silu, "Sigmoid is inaccurate in float32"),
    Kernel("mint.nn.functional.conv2d", conv2d, _conv2d, "Conv2DExt is unregistered"),
    Kernel("mint.nn.Conv2d", Conv2d.construct, _conv2d, "Conv2DExt is unregistered"),
    Kernel("mint.nn.functional.layer_norm", layer_norm, _layer_norm, "LayerNormExt cannot be created"),
    Kernel("mint.nn.LayerNorm", LayerNorm.construct, _layer_norm, "LayerNormExt cannot be created"),
    Kernel("mint.nn.functional.embedding", embedding, _embedding, "Embedding is unregistered"),
    Kernel("mint.nn.Embedding", Embedding.construct, _embedding, "Embedding is unregistered"),
    Kernel("mint.nn.functional.pad", pad, _pad, "ConstantPadND is unregistered"),
    Kernel("mint.nn.functional.normalize", normalize, _normalize, "LinalgVectorNorm is unregistered"),
    Kernel("mint.arange", arange, _arange, "Arange is unregistered"),
    Kernel("mint.zeros_like", zeros_like, _zeros_like, "ZerosLikeExt is unregistered"),
    Kernel("mint.mm", mm, _mm, "Mm is unregistered"),
    Kernel("mint.round", round, _round, "Round takes decimals=0 only"),
    Kernel("mint.split", split, _split, "SplitWithSize is unsupported in graph mode (MindSpore 2.7)"),
    Kernel("mint.chunk", chunk, _chunk, "Chunk is unsupported in graph mode (MindSpore 2.7)"),
    Kernel(
        "mindone.diffusers.models.activations.GEGLU",
        GEGLU.construct,
        _tensor_chunk,
        "Chunk, to which graph mode turns Tensor.chunk, is unsupported there",
    ),
)


# --- what is missing -------------------------------------------------------------------------------

_lock = threading.RLock()
_missing: dict[str, tuple[Kernel, ...]] = {}


def missing_kernels() -> list[str]:
    """Names in `KERNELS` whose kernel the current device has not, or not accurately. Empty on Ascend.

    The first call for a device runs each original once on tiny input (about 0.2 s on CPU).
    """
    return [kernel.name for kernel in _missing_here()]


def _missing_here() -> tuple[Kernel, ...]:
    target = devices.device_target()
    if target == "Ascend":
        return ()
    with _lock:
        if target not in _missing:
            # An error of an operator launched earlier is the caller's: raised here, not taken for ours.
            devices.synchronize()
            with devices.eager(), devices._not_counted():
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
_plan_key: tuple[str, int] | None = None
_originals: dict[str, Any] = {}


@contextlib.contextmanager
def portable_kernels():
    """Replace the missing kernels for the length of the block; see the module's docstring.

    Reentrant, and safe in threads: the originals come back when the last block that is open in any thread
    is left, by an exception too. Until then the other threads of the process see the replacements as well.
    On Ascend it does nothing. Elsewhere the first block imports mindone's activation layers (2 s).
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _depth
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
    loaded = [kernel for kernel in KERNELS if kernel.name in _originals]
    back = {id(kernel.replacement): _originals[kernel.name] for kernel in loaded if not _is_layer(kernel)}
    for module in _modules():
        for attribute, value in list(vars(module).items()):
            if id(value) in back:
                setattr(module, attribute, back[id(value)])


def _current_plan() -> list[_Patch]:
    """The patches for the modules that are loaded now; made anew only when another module has come."""
    global _plan, _plan_key
    missing = _missing_here()
    if _plan_key == (devices.device_target(), len(sys.modules)):
        return _plan
    plan: list[_Patch] = []
    functions: dict[int, Kernel] = {}
    for kernel in missing:
        original = _original(kernel.name)
        if original is None:
            continue
        if _is_layer(kernel):
            plan.append(_Patch(original, "construct", original.construct, kernel.replacement))
        else:
            functions[id(original)] = kernel
    if functions:
        for module in _modules():
            for attribute, value in list(vars(module).items()):
                kernel = functions.get(id(value))
                if kernel is not None:
                    plan.append(_Patch(module, attribute, value, kernel.replacement))
    _plan, _plan_key = plan, (devices.device_target(), len(sys.modules))
    return plan


def _modules() -> list[Any]:
    """The loaded modules whose names are replaced: mint's own, and mindone's, which may hold copies."""
    return [
        module
        for name, module in list(sys.modules.items())
        if module is not None and (name.partition(".")[0] == "mindone" or name.startswith("mindspore.mint"))
    ]


def _is_layer(kernel: Kernel) -> bool:
    return isinstance(_originals[kernel.name], type)


def _original(name: str) -> Any:
    """What `name` named before anything was replaced, or None where mindone is not installed."""
    if name not in _originals:
        path, _, attribute = name.rpartition(".")
        if path.partition(".")[0] == "mint":
            path = f"mindspore.{path}"
        if importlib.util.find_spec(path.partition(".")[0]) is None:
            return None
        _originals[name] = getattr(importlib.import_module(path), attribute)
    return _originals[name]
