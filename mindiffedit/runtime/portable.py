"""The replacements: what `mint` and mindone lack on some devices, built from operators that every device has.

Signatures and results are those of the original. They are parsed by MindSpore's graph compiler: no lambda, no try, no
default that is not a constant. `input` shadows a builtin because mint's argument does.
"""

from __future__ import annotations

from typing import Any

import mindspore
from mindspore import mint, ops


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


def tanh(input):
    """Stands in for `mint.tanh` where it is inaccurate, as on CPU.

    There it is 1 from 5 on, and off by up to 1e-4 about there: T5's activation is made of it. Float32 is computed in
    float64, the shorter types in float32.
    """
    if input.dtype == mindspore.float32:
        return ops.tanh(input.astype(mindspore.float64)).astype(mindspore.float32)
    if input.dtype == mindspore.float64:
        return ops.tanh(input)
    return tanh(input.astype(mindspore.float32)).astype(input.dtype)


FEW_CHANNELS = 8
"""No hidden layer has as few channels as this: latents have 4, a posterior 8, a picture 3."""


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Stands in for `mint.nn.functional.conv2d` while Conv2DExt is registered for Ascend only.

    `ops.Conv2D` with explicit padding, which is oneDNN's convolution on CPU; a few convolutions, on which the
    accuracy of a whole model hangs, in float64.
    """
    if goes_through_float64(input, weight, stride, padding, groups):
        return _conv2d_float64(input, weight, bias, stride, padding, dilation)
    if isinstance(padding, str):
        mode, rows, columns = padding, 0, 0
    else:
        mode = "pad"
        rows, columns = pair(padding)
    convolve = ops.Conv2D(
        out_channel=weight.shape[0],
        kernel_size=weight.shape[2:],
        pad_mode=mode,
        pad=(rows, rows, columns, columns),
        stride=stride,
        dilation=dilation,
        group=groups,
    )
    output = convolve(input, weight)
    if bias is None:
        return output
    return ops.bias_add(output, bias)


def goes_through_float64(input, weight, stride, padding, groups):
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
    return max(pair(stride)) > 1 and max(pair(padding)) == 0


def pair(size):
    """A convolution's stride, padding or dilation as (height, width): one int stands for both."""
    if isinstance(size, int):
        return (size, size)
    return (size[0], size[-1])


def _conv2d_float64(input, weight, bias, stride, padding, dilation):
    """The convolution as a matrix product in float64, in which there is no `ops.Conv2D`."""
    batch, filters = input.shape[0], weight.shape[0]
    kernel = weight.shape[2:]
    strides, pads, gaps = pair(stride), pair(padding), pair(dilation)
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
    normalise = ops.LayerNorm(begin_norm_axis=axis, begin_params_axis=axis, epsilon=eps)
    if input.dtype in (mindspore.float16, mindspore.bfloat16):  # too few bits for a mean and a variance
        wide = [tensor.astype(mindspore.float32) for tensor in (input, weight, bias)]
        return normalise(wide[0], wide[1], wide[2])[0].astype(input.dtype)
    return normalise(input, weight, bias)[0]


def product(input, weight):
    """Rows of `input` (..., features) times a transposed weight (outputs, features)."""
    shape = input.shape
    return ops.MatMul(transpose_b=True)(input.reshape(-1, shape[-1]), weight).reshape(*shape[:-1], -1)


def linear(input, weight, bias=None):
    """Stands in for `mint.nn.functional.linear` on a CPU, where adding the bias costs 16 bytes for each number.

    MindSpore's addition with broadcasting keeps an index of both operands, for as long as the graph lives: 5 GB
    in a UNet at 64 x 64 latents. `ops.bias_add` does not.
    """
    output = product(input, weight)
    if bias is None:
        return output
    return ops.bias_add(output.reshape(-1, output.shape[-1]), bias).reshape(output.shape)


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


def stack(tensors, dim=0):
    """Stands in for `mint.stack` while StackExt is registered for Ascend only."""
    return ops.stack(tensors, dim)


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


def convolved(layer, input, convolve):
    """What a `mint.nn.Conv2d` gives, `convolve` being the function of that signature to compute it by."""
    padding = layer.padding
    if layer.padding_mode != "zeros":
        input, padding = pad(input, layer._reversed_padding, mode=layer.padding_mode), 0
    return convolve(input, layer.weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups)


# The layers' `construct`. Classes only because the function has to be called `construct`: a layer that was
# compiled on its own in graph mode is otherwise not found again by a later `jit`.


class Conv2d:
    """For `mint.nn.Conv2d`, while Conv2DExt is registered for Ascend only."""

    def construct(self, input):
        return convolved(self, input, conv2d)


class LayerNorm:
    """For `mint.nn.LayerNorm`, while LayerNormExt does not run on CPU."""

    def construct(self: Any, input):
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class Linear:
    """For `mint.nn.Linear`, on a CPU; see `linear`."""

    def construct(self: Any, input):
        return linear(input, self.weight, self.bias)


class Embedding:
    """For `mint.nn.Embedding`, while Embedding is registered for Ascend only."""

    def construct(self: Any, input):
        return embedding(input, self.weight, self.padding_idx, self.max_norm)


class GEGLU:
    """For mindone's GEGLU, while `Tensor.chunk` has no CPU kernel in graph mode.

    A Tensor method cannot be replaced for the graph compiler, so the one layer that needs it is.
    """

    def construct(self: Any, hidden_states):
        hidden_states = self.proj(hidden_states)
        hidden_states, gate = ops.split(hidden_states, hidden_states.shape[-1] // 2, axis=-1)
        return hidden_states * self.gelu(gate)


class NewGELUActivation:
    """For mindone's GELU of a tanh, which multiplies float32 and float16: only Ascend's kernels take both."""

    def construct(self: Any, input):
        x = input.astype(mindspore.float32)
        inner = 0.7978845608028654 * (x + 0.044715 * ops.pow(x, 3.0))  # the root of 2 / pi
        return (0.5 * x * (1.0 + mint.tanh(inner))).astype(input.dtype)


def attended(attn, hidden_states, text, attention_mask, temb, keys_and_values, attention, to_tokens, to_image):
    """What mindone's `AttnProcessor2_0` computes, by other functions where there is no mask and no norm of queries.

    Args:
        attn, hidden_states, text, attention_mask, temb: the processor's own.
        keys_and_values: (attn, tokens) -> a pair of what ``attention`` takes.
        attention: (attn, query, key, value) -> (batch, tokens, heads * size).
        to_tokens: (batch, channels, height, width) -> (batch, height * width, channels).
        to_image: the other way, (tokens, residual) -> their sum as an image.
    """
    residual = hidden_states
    if attn.spatial_norm is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    is_image = hidden_states.ndim == 4
    shape = hidden_states.shape
    if is_image:
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.reshape(shape[0], shape[1], shape[2] * shape[3]))
        hidden_states = to_tokens(hidden_states.reshape(shape))
    elif attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.swapaxes(1, 2)).swapaxes(1, 2)

    query = attn.to_q(hidden_states)
    if text is None:
        text = hidden_states
    elif attn.norm_cross:
        text = attn.norm_encoder_hidden_states(text)
    if attention_mask is None and attn.norm_q is None and attn.norm_k is None:
        key, value = keys_and_values(attn, text)
        hidden_states = attention(attn, query, key, value)
    else:
        batch, count = query.shape[0], query.shape[1]
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, text.shape[1], batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        query, key = _heads_apart(query, attn.heads), _heads_apart(attn.to_k(text), attn.heads)
        value = _heads_apart(attn.to_v(text), attn.heads)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        hidden_states = attn.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        hidden_states = hidden_states.swapaxes(1, 2).reshape(batch, count, -1)

    hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
    if is_image:
        if attn.residual_connection:
            hidden_states = to_image(hidden_states, residual)
        else:
            hidden_states = hidden_states.swapaxes(-1, -2).reshape(shape)
    elif attn.residual_connection:
        hidden_states = hidden_states + residual
    return hidden_states if attn.rescale_output_factor == 1.0 else hidden_states / attn.rescale_output_factor


def _heads_apart(tokens, heads):
    """(batch, tokens, heads * size) as (batch, heads, tokens, size)."""
    return tokens.reshape(tokens.shape[0], tokens.shape[1], heads, -1).swapaxes(1, 2)


SCORES = 1 << 25
"""Numbers of an attention's scores that are held at once: 128 MB in float32, and as many after the softmax."""


class Attention:
    """For mindone's `Attention`, whose plain attention holds the scores of all tokens with all tokens at once.

    At 64 x 64 latents these are 1 GB, at 96 x 96 5.4 GB, for each picture and of both halves of a guided step.
    """

    def math_attention_op(self: Any, query, key, value, attn_mask=None):
        """softmax(scale * query key^T + mask) value, some rows of the scores after the others.

        Args:
            query: (..., tokens, size).
            key, value: (..., keys, size).
            attn_mask: None or additive, (..., tokens or 1, keys); a boolean one is True where to look.

        Returns:
            (..., tokens, size), of `value`'s dtype.
        """
        shape = query.shape
        if attn_mask is not None and attn_mask.dtype == mindspore.bool_:
            attn_mask = ops.logical_not(attn_mask).astype(query.dtype) * -1e4
        if attn_mask is not None and attn_mask.ndim > 3:
            attn_mask = ops.broadcast_to(attn_mask, (*shape[:-2], *attn_mask.shape[-2:]))
            attn_mask = attn_mask.reshape(-1, *attn_mask.shape[-2:])
        query = query.reshape(-1, *shape[-2:])
        key = key.reshape(-1, *key.shape[-2:])
        value = value.reshape(-1, *value.shape[-2:])
        heads, tokens, keys = query.shape[0], query.shape[1], key.shape[1]
        key = key.swapaxes(-2, -1)
        if self.upcast_attention:
            query, key = query.astype(mindspore.float32), key.astype(mindspore.float32)
        rows = max(1, min(tokens, SCORES // (heads * keys)))
        parts = []
        for start in range(0, tokens, rows):
            some = query if rows == tokens else query[:, start : start + rows]
            scores = mint.bmm(some, key) * self.scale
            scores = scores.astype(mindspore.float32)  # 16 bits are too few for the softmax
            if attn_mask is not None:
                mask = attn_mask
                if attn_mask.shape[1] == tokens and rows < tokens:
                    mask = attn_mask[:, start : start + rows]
                scores = scores + mask
            parts.append(mint.bmm(ops.softmax(scores, -1).astype(value.dtype), value))
        output = parts[0] if len(parts) == 1 else ops.cat(parts, 1)
        return output.reshape(*shape[:-1], -1)
