"""Layers of mindone's models on the library's operators: what `runtime.kernels` puts in their place on a CPU.

Each stands in for the method or function of mindone or `mindspore.mint` that its comment names, with its arguments and
results. What the operators do not cover (another type, a mask, an option that Stable Diffusion does not use) takes the
plain way. All of it is parsed by MindSpore's graph compiler: conditions are decided while it compiles.
"""

from __future__ import annotations

from typing import Any

import mindspore
from mindspore import ops

from mindiffedit.runtime import portable
from mindiffedit.runtime.native import operators


def silu(input, inplace=False):
    """For `mint.nn.functional.silu`."""
    if inplace or input.dtype != mindspore.float32:
        return portable.silu(input, inplace)
    return operators.silu(input)


def gelu(input, *, approximate="none"):
    """For `mint.nn.functional.gelu`."""
    if approximate != "none" or input.dtype != mindspore.float32:
        return portable.gelu(input, approximate=approximate)
    return operators.gelu(input)


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """For `mint.nn.functional.layer_norm`."""
    if weight is None or bias is None or len(normalized_shape) != 1 or input.dtype != mindspore.float32:
        return portable.layer_norm(input, normalized_shape, weight, bias, eps)
    return operators.layer_norm(input, weight, bias, eps)


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """For `mint.nn.functional.conv2d`: the same convolutions as elsewhere in float64, biases added in parallel."""
    if input.dtype != mindspore.float32:
        return portable.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if portable.goes_through_float64(input, weight, stride, padding, groups):
        step, pad, gap = _both_ways(stride), _both_ways(padding), _both_ways(dilation)
        if gap == 1 and step in (1, 2) and pad in (0, 1):
            return operators.conv2d_precise(input, weight, bias, step, pad)
    output = portable.conv2d(input, weight, None, stride, padding, dilation, groups)
    if bias is None:
        return output
    return operators.bias_add_residual(output, bias)


def _both_ways(size):
    """One number for height and width; -1 where they differ."""
    rows, columns = portable.pair(size)
    return rows if rows == columns else -1


def cat(tensors, dim=0):
    """For `mint.cat`: channels of two feature maps side by side."""
    if len(tensors) == 2 and dim == 1:
        a, b = tensors
        if a.ndim == 4 and a.dtype == mindspore.float32 and b.dtype == mindspore.float32:
            return operators.concat_channels(a, b)
    return ops.cat(tensors, dim)


def interpolate(input, size=None, scale_factor=None, mode="nearest", align_corners=None, recompute_scale_factor=None):
    """For `mint.nn.functional.interpolate`: every pixel doubled."""
    if size is not None and mode == "nearest" and input.ndim == 4 and input.dtype == mindspore.float32:
        if size[0] == 2 * input.shape[2] and size[1] == 2 * input.shape[3]:
            return operators.upsample_nearest_2x(input)
    return ops.interpolate(input, size, scale_factor, mode, align_corners, recompute_scale_factor)


class LayerNorm:
    """For `mint.nn.LayerNorm`."""

    def construct(self: Any, input):
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class GroupNorm:
    """For `mint.nn.GroupNorm`."""

    def construct(self: Any, input):
        if input.dtype != mindspore.float32:
            return ops.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
        return operators.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class Conv2d:
    """For `mint.nn.Conv2d`."""

    def construct(self, input):
        return portable.convolved(self, input, conv2d)


class GEGLU:
    """For mindone's GEGLU."""

    def construct(self: Any, hidden_states):
        if hidden_states.dtype == mindspore.float32 and self.proj.bias is not None:
            return operators.geglu(portable.product(hidden_states, self.proj.weight), self.proj.bias)
        hidden_states = self.proj(hidden_states)
        hidden_states, gate = ops.split(hidden_states, hidden_states.shape[-1] // 2, axis=-1)
        return hidden_states * self.gelu(gate)


class Linear:
    """For `mint.nn.Linear`."""

    def construct(self: Any, input):
        if self.bias is None or input.dtype != mindspore.float32:
            return portable.linear(input, self.weight, self.bias)
        return operators.bias_add_tokens(portable.product(input, self.weight), self.bias)


class ResnetBlock2D:
    """For mindone's residual block: activations with the norms, biases and additions with what is next to them."""

    def construct(self: Any, input_tensor, temb):
        fused = input_tensor.dtype == mindspore.float32 and self.nonlinearity.cls_name == "SiLU"
        hidden_states = _norm_and_activation(self.norm1, self.nonlinearity, input_tensor, fused)
        if self.upsample is not None:
            input_tensor, hidden_states = self.upsample(input_tensor), self.upsample(hidden_states)
        elif self.downsample is not None:
            input_tensor, hidden_states = self.downsample(input_tensor), self.downsample(hidden_states)

        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if fused and self.time_embedding_norm == "default" and temb is not None:
            hidden_states = _without_bias(self.conv1, hidden_states)
            shift = operators.bias_add_tokens(temb, self.conv1.bias)
            hidden_states = _norm_and_silu(self.norm2, hidden_states, shift)
        else:
            hidden_states = self.conv1(hidden_states)
            scale = None
            if self.time_embedding_norm == "scale_shift":
                scale, temb = ops.chunk(temb, 2, 1)
            elif temb is not None:
                hidden_states = hidden_states + temb.reshape(*temb.shape, 1, 1)
            if scale is None:
                hidden_states = _norm_and_activation(self.norm2, self.nonlinearity, hidden_states, fused)
            else:
                hidden_states = self.norm2(hidden_states) * (1 + scale.reshape(*scale.shape, 1, 1))
                hidden_states = self.nonlinearity(hidden_states + temb.reshape(*temb.shape, 1, 1))

        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        if fused:
            hidden_states = _without_bias(self.conv2, hidden_states)
            output = operators.bias_add_residual(hidden_states, self.conv2.bias, input_tensor)
        else:
            output = self.conv2(hidden_states) + input_tensor
        return output if self.output_scale_factor == 1.0 else output / self.output_scale_factor


def _norm_and_activation(norm, activation, x, fused):
    """The group norm of a cell and the activation after it, SiLU where they are fused."""
    return _norm_and_silu(norm, x) if fused else activation(norm(x))


def _norm_and_silu(norm, x, shift=None):
    return operators.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, True, shift)


def _without_bias(cell, x):
    """A convolution's result before its bias is added."""
    return conv2d(x, cell.weight, None, cell.stride, cell.padding, cell.dilation, cell.groups)


class AttnProcessor2_0:
    """For mindone's processor of that name: scores are never stored, and heads not moved to an axis of their own."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        return portable.attended(
            attn,
            hidden_states,
            encoder_hidden_states,
            attention_mask,
            temb,
            _keys_and_values,
            _attention,
            operators.image_to_tokens,
            operators.tokens_to_image,
        )


def _keys_and_values(attn, tokens):
    return attn.to_k(tokens), attn.to_v(tokens)


def _attention(attn, query, key, value):
    return operators.attention(query, key, value, attn.heads, attn.scale)


class Transformer2DModel:
    """For mindone's transformer: images to tokens and back."""

    def _operate_on_continuous_inputs(self: Any, hidden_states):
        norm = self.norm
        tokens = operators.group_norm_tokens(hidden_states, norm.num_groups, norm.weight, norm.bias, norm.eps, False)
        tokens = _projected(self.proj_in, tokens)
        return tokens, tokens.shape[2]

    def _get_output_for_continuous_inputs(self: Any, hidden_states, residual, batch_size, height, width, inner_dim):
        return operators.tokens_to_image(_projected(self.proj_out, hidden_states), residual)


def _projected(cell, tokens):
    """A linear layer, or a 1 x 1 convolution as the product that it is."""
    weight = cell.weight.reshape(cell.weight.shape[0], cell.weight.shape[1])
    return operators.bias_add_tokens(portable.product(tokens, weight), cell.bias)
