"""Layers of mindone's models in fewer launches: what `kernels` puts in their place on a GPU and on Ascend.

There every operator is a kernel that the host has to start, which takes longer than many of them run. Each function
stands in for the method or function of mindone or MindSpore that its comment names, with its formula and results;
halves are rounded at fewer places. All of it is parsed by MindSpore's graph compiler: conditions are decided while it
compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mindspore
from mindspore import mint, ops

from mindiffedit.runtime import devices, portable, turns

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

    The keys and values of a text may come ready, as a tuple of all layers' (see ``apart``).
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


# --- what a loop need not compute in every step --------------------------------------------------------------------

TIMESTEPS = 50
"""Timesteps that one graph takes at once, so that it serves loops of any length."""


@dataclass(frozen=True)
class Apart:
    """Layers of a UNet whose part in the text or in the timestep is computed before the loop.

    Attributes:
        attentions: the layers that attend to the text. Each has the number of its own as ``text_index``.
        resnets: those that add the timestep's embedding, in groups of as many channels. Each has its number, through
            all groups, as ``time_index``.
    """

    attentions: tuple
    resnets: tuple[tuple, ...]


def computes_apart() -> bool:
    """Whether anything is: not on a CPU, where it saves less time than compiling two more graphs takes."""
    return devices.device_target() != "CPU"


def apart(unet: Any) -> Apart | None:
    """What of a UNet is computed before the loop.

    None where all is a part of each step, as of a UNet that does anything else with text or timestep than Stable
    Diffusion's.
    """
    if not computes_apart():
        return None
    return turns.once((apart, id(unet)), lambda: _found_apart(unet))


def _found_apart(unet: Any) -> Apart | None:
    from mindone.diffusers.models.attention_processor import Attention, AttnProcessor2_0
    from mindone.diffusers.models.resnet import ResnetBlock2D
    from mindone.diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    cells = [cell for _, cell in unet.cells_and_names()]
    attentions = [cell for cell in cells if isinstance(cell, Attention) and cell.is_cross_attention]
    resnets = [cell for cell in cells if isinstance(cell, ResnetBlock2D)]
    plain = (
        getattr(type(unet), "construct", None) is UNet2DConditionModel.construct
        and all(getattr(unet, name) is None for name in EXTRAS)
        and all(type(layer.processor) is AttnProcessor2_0 for layer in attentions)
        and all(getattr(layer, name) is None for layer in attentions for name in _NORMS)
        and all(layer.time_emb_proj is not None and layer.time_embedding_norm == "default" for layer in resnets)
    )
    if not (plain and attentions and resnets):
        return None
    groups: dict[int, list] = {}
    for layer in resnets:
        groups.setdefault(layer.out_channels, []).append(layer)
    for index, layer in enumerate(attentions):
        layer.text_index = index
    for index, layer in enumerate(layer for group in groups.values() for layer in group):
        layer.time_index = index
    return Apart(tuple(attentions), tuple(map(tuple, groups.values())))


EXTRAS = ("class_embedding", "addition_embed_type", "encoder_hid_proj", "time_embed_act")
"""Attributes of a UNet that are None where nothing but timestep and text comes into its embeddings."""

_NORMS = ("norm_cross", "norm_q", "norm_k", "add_k_proj")


def text_stage(unet: Any) -> Callable:
    """A function of embeddings (N, L, D): keys and values of all layers of ``apart``, one after the other."""
    layers = apart(unet)
    attentions = () if layers is None else layers.attentions

    def text(prompt_embeds):
        tensors = ()
        for layer in attentions:
            tensors += keys_and_values(layer, prompt_embeds)
        return tensors

    return text


def time_stage(unet: Any) -> Callable:
    """A function of timesteps (``TIMESTEPS``,): for each, what the groups of ``apart`` add, (1, layers, channels).

    The bias of the convolution before is in it.
    """
    layers = apart(unet)
    groups = () if layers is None else layers.resnets

    def times(timesteps):
        embeds = unet.get_time_embed(timesteps.reshape(-1, 1).astype(unet.dtype), timesteps)
        embeds = unet.time_embedding(embeds)
        tables = []
        for group in groups:
            parts = []
            for layer in group:
                part = layer.time_emb_proj(embeds if layer.skip_time_act else layer.nonlinearity(embeds))
                parts.append((part + layer.conv1.bias).reshape(TIMESTEPS, 1, -1))
            tables.append(mint.split(ops.cat(parts, 1), 1))
        rows: tuple = ()
        for index in range(TIMESTEPS):
            for table in tables:
                rows += (table[index],)
        return rows

    return times


def conditions_of(unet: Any) -> Callable:
    """A function of what a graph of the UNet takes beside the latents, by which it becomes the UNet's arguments.

    That is the timestep and the embeddings, or a timestep's results of ``time_stage`` and those of ``text_stage``.
    """
    layers = apart(unet)
    groups = 0 if layers is None else len(layers.resnets)

    def conditions(tensors):
        if groups == 0:
            return tensors
        times: tuple = ()
        for group in tensors[:groups]:
            rows = (group,) if group.shape[1] == 1 else mint.split(group, 1, 1)
            for row in rows:
                times += (row.reshape(1, -1, 1, 1),)
        return times, tensors[groups:]

    return conditions


class UNet2DConditionModel:
    """For mindone's UNet: a timestep may come as a tuple of what its layers add."""

    def get_time_embed(self: Any, sample, timestep):
        if isinstance(timestep, tuple):
            return timestep
        timesteps = timestep.reshape(-1)
        if timesteps.shape[0] == 1:
            timesteps = timesteps.tile((sample.shape[0],))
        return self.time_proj(timesteps).astype(sample.dtype)


class TimestepEmbedding:
    """For mindone's, likewise."""

    def construct(self: Any, sample, condition=None):
        if isinstance(sample, tuple):
            return sample
        if condition is not None:
            sample = sample + self.cond_proj(condition)
        sample = self.linear_1(sample)
        sample = self.linear_2(sample if self.act is None else self.act(sample))
        return sample if self.post_act is None else self.post_act(sample)


# --- other layers --------------------------------------------------------------------------------------------------


class ResnetBlock2D:
    """For mindone's residual block: a sum that is to be divided by 1 is not."""

    def construct(self: Any, input_tensor, temb):
        hidden_states = self.nonlinearity(self.norm1(input_tensor))
        if self.upsample is not None:
            input_tensor, hidden_states = self.upsample(input_tensor), self.upsample(hidden_states)
        elif self.downsample is not None:
            input_tensor, hidden_states = self.downsample(input_tensor), self.downsample(hidden_states)
        if isinstance(temb, tuple):  # of all layers, with the convolution's bias
            temb = temb[self.time_index]
            conv = self.conv1
            hidden_states = mint.nn.functional.conv2d(hidden_states, conv.weight, None, conv.stride, conv.padding)
        else:
            hidden_states = self.conv1(hidden_states)
        if self.time_emb_proj is not None and temb.ndim == 2:
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
    """For `mint.nn.functional.layer_norm`: MindSpore's kernel for GPUs sums and normalises halves in float32."""
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


def split(tensor, split_size_or_sections, dim=0):
    """For `mint.split`, which gives views: here each part has its own memory, as what comes after takes it."""
    if isinstance(split_size_or_sections, int):
        return ops.auto_generate.SplitTensor()(tensor, split_size_or_sections, dim)
    return ops.split(tensor, split_size_or_sections, dim)


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
