"""FreeU (arXiv 2309.11497): the UNet's decoder weighs its own features and those of the skip connections anew.

In the first two up blocks, before the two are joined: half of the channels of the features times b, and the lowest
frequencies of the skip connection times s. diffusers' ``apply_freeu`` and ``fourier_filter``.

mindone leaves it out, since it asks for a Fourier transform that MindSpore has not on every device. There is no need
of one: what the filter changes are four frequencies of a picture of features, and these are two small matrix products,

    x + (s - 1) Bᵀ B x,

with the rows of B the cosines and sines of the four, in float64 rounded once.
"""

from __future__ import annotations

import functools
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import mint, ops

from mindiffedit import options
from mindiffedit.errors import InputError

Factors = tuple[float, float, float, float]
"""s1, s2, b1, b2, as diffusers names them."""


def enable(unet: Any, s1: float, s2: float, b1: float, b2: float) -> None:
    """Switches FreeU on, or to other factors, in a mindone ``UNet2DConditionModel``.

    Args:
        s1, s2: factors of the skip connections' low frequencies in the first and the second up block, above 0.
        b1, b2: factors of half of the features there, above 0.

    Raises:
        TypeError, ValueError: a factor that is no finite number above 0, or a UNet of other blocks.
    """
    factors = dict(s1=s1, s2=s2, b1=b1, b2=b2)
    factors = {name: options.check_ratio(value, name) for name, value in factors.items()}
    blocks = _blocks(unet)
    kinds = {plain: freed for freed, plain in _classes().items()}
    for block in blocks:
        if type(block) not in kinds and type(block) not in kinds.values():
            raise InputError(
                "FreeU works on up blocks of the classes {classes}, but this UNet has a {block!t}.",
                classes=" and ".join(kind.__name__ for kind in kinds),
                block=block,
            )
    for block in blocks:
        block.__class__ = kinds.get(type(block), type(block))
        for name, value in factors.items():
            setattr(block, name, value)


def disable(unet: Any) -> None:
    """Switches FreeU off; nothing of it is left in the UNet."""
    if factors_of(unet) is None:
        return
    for block in _blocks(unet):
        block.__class__ = _classes()[type(block)]
        for name in ("s1", "s2", "b1", "b2"):
            delattr(block, name)


def factors_of(unet: Any) -> Factors | None:
    """The factors in use; None where FreeU is off."""
    for block in _blocks(unet)[:1]:
        if getattr(block, "s1", None) is not None:
            return block.s1, block.s2, block.b1, block.b2
    return None


def _blocks(unet: Any) -> list:
    return list(getattr(unet, "up_blocks", ()))[:2]


# --- the formula -------------------------------------------------------------------------------------------------


def low_frequencies(rows: int, columns: int) -> np.ndarray:
    """Cosines and sines of the frequencies 0 and -1 along both sides: (n, rows * columns) float32, unit vectors' span.

    These are the frequencies that diffusers' filter of threshold 1 scales: an even-sized box around the zero of a
    shifted spectrum, which lies one further to the negative side.
    """
    y, x = np.mgrid[0:rows, 0:columns]
    waves = []
    for vertical in sorted({0, -1 % rows}):
        for horizontal in sorted({0, -1 % columns}):
            angle = 2 * np.pi * (vertical * y / rows + horizontal * x / columns)
            waves.append(np.cos(angle))
            if vertical or horizontal:
                waves.append(np.sin(angle))
    return (np.stack(waves).reshape(len(waves), -1) / np.sqrt(rows * columns)).astype(np.float32)


@ops.constexpr
def _low_frequencies(rows, columns):
    return ms.Tensor(low_frequencies(rows, columns))


@ops.constexpr
def _half_scaled(channels, factor):
    factors = np.ones((1, channels, 1, 1), np.float32)
    factors[:, : channels // 2] = factor
    return ms.Tensor(factors)


def fourier_filter(x, scale):
    """The low frequencies of x (B, C, h, w) times ``scale``; computed in float32, returned in x's dtype."""
    batch, channels, rows, columns = x.shape
    waves = _low_frequencies(rows, columns)
    flat = x.astype(ms.float32).reshape((batch * channels, rows * columns))
    low = mint.matmul(mint.matmul(flat, waves.transpose(1, 0)), waves)
    filtered = flat + low * (scale - 1.0)
    return filtered.reshape((batch, channels, rows, columns)).astype(x.dtype)


def scaled_features(x, scale):
    """The first half of the channels of x (B, C, h, w) times ``scale``."""
    return (x.astype(ms.float32) * _half_scaled(x.shape[1], scale)).astype(x.dtype)


@functools.cache
def _classes() -> dict:
    """The up blocks with FreeU, and mindone's that they stand for; made on demand, as mindone is imported for them.

    Subclasses without anything of their own to hold, so that a block changes its class and keeps its weights' names.
    """
    from mindone.diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D

    class FreeUUpBlock2D(UpBlock2D):
        """``UpBlock2D`` with FreeU."""

        def construct(self, hidden_states, res_hidden_states_tuple, temb=None, upsample_size=None):
            scale, strength = (self.s1, self.b1) if self.resolution_idx == 0 else (self.s2, self.b2)
            for resnet in self.resnets:
                skipped = fourier_filter(res_hidden_states_tuple[-1], scale)
                res_hidden_states_tuple = res_hidden_states_tuple[:-1]
                hidden_states = mint.cat([scaled_features(hidden_states, strength), skipped], dim=1)
                hidden_states = resnet(hidden_states, temb)
            if self.upsamplers is not None:
                for upsampler in self.upsamplers:
                    hidden_states = upsampler(hidden_states, upsample_size)
            return hidden_states

    class FreeUCrossAttnUpBlock2D(CrossAttnUpBlock2D):
        """``CrossAttnUpBlock2D`` with FreeU."""

        def construct(
            self,
            hidden_states,
            res_hidden_states_tuple,
            temb=None,
            encoder_hidden_states=None,
            cross_attention_kwargs=None,
            upsample_size=None,
            attention_mask=None,
            encoder_attention_mask=None,
        ):
            scale, strength = (self.s1, self.b1) if self.resolution_idx == 0 else (self.s2, self.b2)
            for resnet, attn in zip(self.resnets, self.attentions):
                skipped = fourier_filter(res_hidden_states_tuple[-1], scale)
                res_hidden_states_tuple = res_hidden_states_tuple[:-1]
                hidden_states = mint.cat([scaled_features(hidden_states, strength), skipped], dim=1)
                hidden_states = resnet(hidden_states, temb)
                hidden_states = attn(
                    hidden_states,
                    encoder_hidden_states=encoder_hidden_states,
                    cross_attention_kwargs=cross_attention_kwargs,
                    attention_mask=attention_mask,
                    encoder_attention_mask=encoder_attention_mask,
                    return_dict=False,
                )[0]
            if self.upsamplers is not None:
                for upsampler in self.upsamplers:
                    hidden_states = upsampler(hidden_states, upsample_size)
            return hidden_states

    return {FreeUUpBlock2D: UpBlock2D, FreeUCrossAttnUpBlock2D: CrossAttnUpBlock2D}
