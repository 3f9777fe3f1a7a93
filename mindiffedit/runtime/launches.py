"""Layers of mindone's models in fewer launches: what `kernels` puts in their place on a GPU and on Ascend.

There every operator is a kernel that the host has to start, which takes longer than many of them run. Each function
stands in for the method or function of mindone or MindSpore that its comment names, with its formula and results;
halves are rounded at fewer places. All of it is parsed by MindSpore's graph compiler: conditions are decided while it
compiles.
"""

from __future__ import annotations

from typing import Any

import mindspore
from mindspore import mint, ops

from mindiffedit.runtime import devices, portable

_HALVES = (mindspore.float16, mindspore.bfloat16)


@ops.constexpr
def _is_fused(dtype) -> bool:
    """Whether there is one kernel for all of attention: on Ascend, in half precision."""
    return devices.device_target() == "Ascend" and dtype in _HALVES


def scores_at_once() -> int:
    """Numbers of an attention's scores to hold at once: of a device's own memory an eighth, at 4 bytes for each."""
    return max(portable.SCORES, (devices.device_memory() or 0) // 32)


_scores_at_once = ops.constexpr(scores_at_once)


# --- attention -----------------------------------------------------------------------------------------------------


class AttnProcessor2_0:
    """For mindone's processor of that name.

    The keys and values of a text may come ready, as a tuple of all layers' (see ``text_layers``).
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        return portable.attended(
            attn,
            hidden_states,
            encoder_hidden_states,
            attention_mask,
            temb,
            keys_and_values,
            attention,
            _tokens_of_image,
            _image_of_tokens,
        )


def keys_and_values(attn, tokens):
    """The keys and values that a layer makes of tokens (batch, keys, size), as its ``attention`` takes them."""
    if isinstance(tokens, tuple):  # of all layers
        return tokens[2 * attn.text_index], tokens[2 * attn.text_index + 1]
    key, value = attn.to_k(tokens), attn.to_v(tokens)
    if _is_fused(key.dtype):
        return key, value
    key = _by_heads(key * attn.scale, attn.heads)
    return key.astype(mindspore.float32) if attn.upcast_attention else key, _by_heads(value, attn.heads)


def attention(attn, query, key, value):
    """softmax(scale * query key^T) value of ``keys_and_values``; query and result are (batch, tokens, heads * size)."""
    if _is_fused(query.dtype):
        fused = ops.operations.nn_ops.FlashAttentionScore(
            head_num=attn.heads, scale_value=attn.scale, input_layout="BSH"
        )
        return fused(query, key, value, None, None, None, None)[3]
    batch, tokens, size = query.shape
    query = _by_heads(query, attn.heads).astype(key.dtype)
    heads = query.shape[0]
    rows = max(1, min(tokens, _scores_at_once() // (heads * key.shape[1])))
    parts = []
    for start in range(0, tokens, rows):
        some = query if rows == tokens else query[:, start : start + rows]
        scores = ops.BatchMatMul(transpose_b=True)(some, key)
        parts.append(ops.BatchMatMul()(ops.softmax(scores, -1).astype(value.dtype), value))
    output = parts[0] if len(parts) == 1 else ops.cat(parts, 1)
    if attn.heads > 1:
        output = output.reshape(batch, attn.heads, tokens, -1).swapaxes(1, 2)
    return output.reshape(batch, tokens, size)


def _by_heads(tokens, heads):
    """(batch, tokens, heads * size) as (batch * heads, tokens, size)."""
    if heads == 1:
        return tokens
    batch, count, size = tokens.shape
    return tokens.reshape(batch, count, heads, size // heads).swapaxes(1, 2).reshape(batch * heads, count, -1)


def _tokens_of_image(image):
    batch, channels, rows, columns = image.shape
    return image.reshape(batch, channels, rows * columns).swapaxes(1, 2)


def _image_of_tokens(tokens, residual):
    return tokens.swapaxes(1, 2).reshape(residual.shape) + residual


def text_layers(unet: Any) -> list[Any]:
    """The layers of a UNet that attend to the text, if their keys and values may be computed apart; [] otherwise.

    They do not change from step to step. Each gets the number of its own as ``text_index``. Not on a CPU, where it
    saves less time than compiling one more graph takes, and not for layers that do anything else with the text.
    """
    from mindone.diffusers.models.attention_processor import Attention, AttnProcessor2_0
    from mindone.diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    if devices.device_target() == "CPU" or getattr(type(unet), "construct", None) is not UNet2DConditionModel.construct:
        return []
    cells = [cell for _, cell in unet.cells_and_names()]
    layers = [cell for cell in cells if isinstance(cell, Attention) and cell.is_cross_attention]
    others = ("norm_cross", "norm_q", "norm_k", "add_k_proj")
    plain = all(
        type(layer.processor) is AttnProcessor2_0 and all(getattr(layer, name) is None for name in others)
        for layer in layers
    )
    if not plain or unet.encoder_hid_proj is not None or unet.addition_embed_type not in (None, "text_time"):
        return []
    for index, layer in enumerate(layers):
        layer.text_index = index
    return layers


def text_of(tensors):
    """The text as a UNet takes it: the only tensor, its embeddings, or the tuple of its layers' keys and values."""
    return tensors[0] if len(tensors) == 1 else tensors


# --- other layers --------------------------------------------------------------------------------------------------


class ResnetBlock2D:
    """For mindone's residual block: a sum that is to be divided by 1 is not."""

    def construct(self: Any, input_tensor, temb):
        hidden_states = self.nonlinearity(self.norm1(input_tensor))
        if self.upsample is not None:
            input_tensor, hidden_states = self.upsample(input_tensor), self.upsample(hidden_states)
        elif self.downsample is not None:
            input_tensor, hidden_states = self.downsample(input_tensor), self.downsample(hidden_states)
        hidden_states = self.conv1(hidden_states)
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
            temb = temb.reshape(*temb.shape, 1, 1)
        if self.time_embedding_norm == "scale_shift":
            scale, shift = mint.chunk(temb, 2, dim=1)
            hidden_states = self.norm2(hidden_states) * (1 + scale) + shift
        else:
            hidden_states = self.norm2(hidden_states if temb is None else hidden_states + temb)
        hidden_states = self.conv2(self.nonlinearity(hidden_states))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        output = input_tensor + hidden_states
        return output if self.output_scale_factor == 1.0 else output / self.output_scale_factor


class Transformer2DModel:
    """For mindone's transformer: the transposed tokens are contiguous as they are."""

    def _get_output_for_continuous_inputs(self: Any, hidden_states, residual, batch_size, height, width, inner_dim):
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        hidden_states = hidden_states.reshape(batch_size, height, width, -1).permute(0, 3, 1, 2)
        if not self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        return hidden_states + residual


# --- GPU: halves that a kernel computes in float32 by itself -------------------------------------------------------


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """For `mint.nn.functional.layer_norm`: CUDA's kernel sums and normalises halves in float32."""
    if weight is None or bias is None:
        return portable.layer_norm(input, normalized_shape, weight, bias, eps)
    axis = input.ndim - len(normalized_shape)
    return ops.LayerNorm(begin_norm_axis=axis, begin_params_axis=axis, epsilon=eps)(input, weight, bias)[0]


class LayerNorm:
    """For `mint.nn.LayerNorm`."""

    def construct(self: Any, input):
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class GEGLU:
    """For mindone's GEGLU, its gate by the complement of erf, which is as exact in halves for negative numbers."""

    def construct(self: Any, hidden_states):
        hidden_states, gate = ops.split(self.proj(hidden_states), self.proj.weight.shape[0] // 2, axis=-1)
        return hidden_states * (gate * 0.5 * ops.erfc(gate * -0.7071067811865476))


# --- Ascend: MindSpore's own layers, of which CLIP is made, by kernels of aclnn ------------------------------------


class Dense:
    """For `nn.Dense`."""

    def construct(self: Any, x):
        x = mint.nn.functional.linear(x, self.weight, self.bias)
        return self.activation(x) if self.activation_flag else x


class WholeLayerNorm:
    """For `nn.LayerNorm` over the last dimensions."""

    def construct(self: Any, input_x):
        gamma, beta = self.gamma.astype(input_x.dtype), self.beta.astype(input_x.dtype)
        return mint.nn.functional.layer_norm(input_x, self.gamma.shape, gamma, beta, self.epsilon)


class Embedding:
    """For `nn.Embedding`."""

    def construct(self: Any, ids):
        return mint.nn.functional.embedding(ids, self.embedding_table)
