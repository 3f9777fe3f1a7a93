"""The library's operators as functions of MindSpore tensors, for PyNative and graph mode.

Import this module only where `mindiffedit.runtime.native.available()` is True. All tensors are float32, as a
caller has to see to; in graph mode the type is tested while a function is compiled. Wrong shapes raise RuntimeError
when the operator runs, in PyNative perhaps at a later operator. There are no gradients.

The functions are parsed by MindSpore's graph compiler, which is why they are so plain. Numbers (eps, heads)
reach the library as a short constant tensor: its operators get tensors only.
"""

from __future__ import annotations

import mindspore
from mindspore import ops

from mindiffedit.runtime import native

__all__ = [
    "attention",
    "bias_add_residual",
    "bias_add_tokens",
    "concat_channels",
    "conv2d_precise",
    "geglu",
    "gelu",
    "group_norm",
    "group_norm_tokens",
    "image_to_tokens",
    "layer_norm",
    "silu",
    "tokens_to_image",
    "upsample_nearest_2x",
]


# --- shapes of the outputs, from those of the inputs --------------------------------------------------


def _as_first(*inputs):
    return inputs[0]


def _half(x, *rest):
    return [*x[:-1], x[-1] // 2]


def _tokens(x, *rest):
    pixels = 1
    for size in x[2:]:
        pixels = pixels * size
    return [x[0], pixels, x[1]]


def _as_second(first, second):
    return second


def _joined(first, second):
    return [first[0], first[1] + second[1], *first[2:]]


def _doubled(x):
    return [x[0], x[1], 2 * x[2], 2 * x[3]]


def _convolved(x, weight, *rest):
    # The last input's shape is (stride, padding + 1), see conv2d_precise.
    stride, padding = rest[-1][0], rest[-1][1] - 1
    rows = (x[2] + 2 * padding - weight[2]) // stride + 1
    columns = (x[3] + 2 * padding - weight[3]) // stride + 1
    return [x[0], weight[0], rows, columns]


def _operator(name, shape):
    return ops.Custom(f"{native.library_path()}:{name}", shape, _as_first, func_type="aot")


# One for each number of inputs: an operator that has been compiled keeps the number.
_attention = _operator("Attention", _as_first)
_geglu = _operator("Geglu", _half)
_geglu_bias = _operator("Geglu", _half)
_gelu = _operator("Gelu", _as_first)
_silu = _operator("Silu", _as_first)
_group_norm = _operator("GroupNorm", _as_first)
_group_norm_shift = _operator("GroupNorm", _as_first)
_group_norm_tokens = _operator("GroupNormTokens", _tokens)
_group_norm_tokens_shift = _operator("GroupNormTokens", _tokens)
_layer_norm = _operator("LayerNorm", _as_first)
_tokens_to_image = _operator("TokensToImage", _as_second)
_image_to_tokens = _operator("ImageToTokens", _tokens)
_bias_add = _operator("BiasAddResidual", _as_first)
_bias_add_residual = _operator("BiasAddResidual", _as_first)
_bias_add_tokens = _operator("BiasAddTokens", _as_first)
_bias_add_tokens_residual = _operator("BiasAddTokens", _as_first)
_concat_channels = _operator("ConcatChannels", _joined)
_upsample_nearest_2x = _operator("UpsampleNearest2x", _doubled)
_conv2d = _operator("Conv2dPrecise", _convolved)
_conv2d_bias = _operator("Conv2dPrecise", _convolved)


# --- the operators ------------------------------------------------------------------------------------


def attention(query, key, value, heads, scale):
    """softmax(scale * query key^T) value of each head, without storing the scores.

    Args:
        query: (batch, queries, heads * size); head h has the columns from h * size on.
        key, value: (batch, keys, heads * size), at least one key, size at most 1024.
        heads: int.
        scale: float other than 0, usually size ** -0.5.

    Returns:
        (batch, queries, heads * size).
    """
    return _attention(query, key, value, mindspore.tensor([heads, scale], mindspore.float32))


def geglu(x, bias=None):
    """x[..., :half] * gelu(x[..., half:]), with the exact gelu (erf), of x plus the bias of its last axis, if any.

    The last axis has even length.
    """
    if bias is None:
        return _geglu(x)
    return _geglu_bias(x, bias)


def gelu(x):
    """The exact gelu (erf), accurate relative to its own magnitude."""
    return _gelu(x)


def silu(x):
    """x * sigmoid(x)."""
    return _silu(x)


def group_norm(x, groups, weight, bias, eps=1e-5, silu=False, shift=None):
    """Group norm, with SiLU and a shift for each channel if asked for.

    Args:
        x: (batch, channels, ...).
        groups: int that divides channels.
        weight, bias: (channels,).
        eps: float, added to the variance.
        silu: whether the SiLU of the result is returned.
        shift: (batch, channels), added to x first; None for nothing.

    Returns:
        Of x's shape.
    """
    numbers = mindspore.tensor([groups, eps, 1 if silu else 0], mindspore.float32)
    if shift is None:
        return _group_norm(x, weight, bias, numbers)
    return _group_norm_shift(x, weight, bias, shift, numbers)


def group_norm_tokens(x, groups, weight, bias, eps=1e-5, silu=False, shift=None):
    """`group_norm`, with the result as tokens: (batch, pixels, channels)."""
    numbers = mindspore.tensor([groups, eps, 1 if silu else 0], mindspore.float32)
    if shift is None:
        return _group_norm_tokens(x, weight, bias, numbers)
    return _group_norm_tokens_shift(x, weight, bias, shift, numbers)


def layer_norm(x, weight, bias, eps=1e-5):
    """Layer norm over the last axis; weight and bias have its length."""
    return _layer_norm(x, weight, bias, mindspore.tensor([eps], mindspore.float32))


def tokens_to_image(tokens, residual):
    """(batch, height * width, channels) as (batch, channels, height, width), plus `residual` of that shape."""
    return _tokens_to_image(tokens, residual)


def image_to_tokens(x):
    """(batch, channels, height, width) as (batch, height * width, channels)."""
    return _image_to_tokens(x)


def conv2d_precise(x, weight, bias=None, stride=1, padding=0):
    """2-D convolution with sums in float64, rounded once.

    Args:
        x: (batch, channels, height, width).
        weight: (filters, channels, rows, columns), rows and columns at most 3.
        bias: (filters,) or None.
        stride: 1 or 2, for both directions.
        padding: 0 or 1, for both directions.

    Returns:
        (batch, filters, height', width').

    Raises:
        ValueError: another stride or padding.
    """
    if stride not in (1, 2) or padding not in (0, 1):
        raise ValueError(f"conv2d_precise: stride {stride} and padding {padding}, expected 1 or 2 and 0 or 1")
    # Passed as a shape: the shape function sees no values, and PyNative takes a kernel that has seen the same
    # shapes of inputs, whatever the output's.
    numbers = mindspore.tensor([[0.0] * (padding + 1)] * stride, mindspore.float32)
    if bias is None:
        return _conv2d(x, weight, numbers)
    return _conv2d_bias(x, weight, bias, numbers)


def bias_add_residual(x, bias, residual=None):
    """x + bias, one value per channel (axis 1), plus `residual` of x's shape unless it is None."""
    if residual is None:
        return _bias_add(x, bias)
    return _bias_add_residual(x, bias, residual)


def bias_add_tokens(x, bias, residual=None):
    """x + bias, one value for each place of the last axis, plus `residual` of x's shape unless it is None."""
    if residual is None:
        return _bias_add_tokens(x, bias)
    return _bias_add_tokens_residual(x, bias, residual)


def concat_channels(a, b):
    """Two tensors joined on axis 1."""
    return _concat_channels(a, b)


def upsample_nearest_2x(x):
    """(batch, channels, height, width) with every pixel doubled in both directions."""
    return _upsample_nearest_2x(x)
