"""The step cache: on most steps of a run only the last layer of the UNet is computed anew.

From one step to the next the deep part of a UNet changes little (DeepCache, arXiv 2312.00858). A full evaluation keeps
the hidden state that enters the last layer of the last up block: its last resnet, with the attention that follows it,
if any. A shallow evaluation puts that hidden state beside the skip connection of this step, which for that layer is
what ``conv_in`` returns, and runs from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mindspore import mint

from mindiffedit.checkpoints import freeu
from mindiffedit.errors import InputError
from mindiffedit.runtime import launches


def check_supported(unet: Any) -> None:
    """Sees to it that ``evaluations`` can run a UNet.

    Raises:
        ValueError: it is no mindone ``UNet2DConditionModel``, it has embeddings of more than timestep and text, its
            last up block is of another class than Stable Diffusion's, or FreeU weighs that block's features.
    """
    from mindone.diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
    from mindone.diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    if getattr(type(unet), "construct", None) is not UNet2DConditionModel.construct:
        raise InputError(
            "The step cache runs mindone's UNet2DConditionModel, but this UNet is a {unet!t}; set "
            "{unet_cache_interval=1}.",
            parameter="unet_cache_interval",
            unet=unet,
        )
    extras = [name for name in launches.EXTRAS if getattr(unet, name, None) is not None]
    if extras:
        raise InputError(
            "The step cache does not know of this UNet's {extras}; set {unet_cache_interval=1}.",
            parameter="unet_cache_interval",
            extras=" and ".join(extras),
        )
    block = unet.up_blocks[-1]
    if freeu.factors_of(unet) is not None and len(unet.up_blocks) <= 2:
        raise InputError(
            "FreeU weighs the features of this UNet's last up block, which the step cache runs without; switch FreeU "
            "off, or set {unet_cache_interval=1}.",
            parameter="unet_cache_interval",
        )
    if type(block) not in (UpBlock2D, CrossAttnUpBlock2D):
        raise InputError(
            "The step cache needs a last up block of the class UpBlock2D or CrossAttnUpBlock2D, but this UNet has a "
            "{block!t}; set {unet_cache_interval=1}.",
            parameter="unet_cache_interval",
            block=block,
        )


def evaluations(unet: Any, attention_kwargs: Mapping[str, Any]) -> tuple[Callable, Callable]:
    """Two pure functions of tensors, over the layers of one UNet and with its numbers.

    - ``full(latents, *others) -> (output, hidden)``
    - ``shallow(hidden, latents, *others) -> output``

    ``latents`` and ``output`` are (N, C, h, w), ``hidden`` is (N, C', h, w) in the UNet's dtype, and ``others`` are a
    timestep, 0-d, and embeddings (N, L, D), or what ``launches.conditions_of`` makes these of. ``full``'s output has
    the bits of the UNet's own, and so has ``shallow``'s with the ``hidden`` of the same latents and others.

    Args:
        unet: a mindone ``UNet2DConditionModel``.
        attention_kwargs: the constants among the UNet's ``cross_attention_kwargs``.

    Raises:
        ValueError: see ``check_supported``.
    """
    check_supported(unet)
    constants, conditions = dict(attention_kwargs) or None, launches.conditions_of(unet)
    last_block = len(unet.up_blocks) - 1
    last_layer = len(unet.up_blocks[-1].resnets) - 1
    whole = 2**unet.num_upsamplers

    def entry(latents, timestep):
        """What ``conv_in`` returns, (N, C', h, w), and the timestep's embeddings."""
        embeds = unet.time_embedding(unet.get_time_embed(latents, timestep))
        return unet.conv_in(2 * latents - 1.0 if unet.center_input_sample else latents), embeds

    def layer(index, hidden, skip, embeds, prompt_embeds):
        """A layer of the last up block."""
        block = unet.up_blocks[last_block]
        hidden = block.resnets[index](mint.cat([hidden, skip], dim=1), embeds)
        if block.has_cross_attention:
            hidden = block.attentions[index](
                hidden,
                encoder_hidden_states=prompt_embeds,
                cross_attention_kwargs=constants,
                return_dict=False,
            )[0]
        return hidden

    def deep(first, embeds, prompt_embeds):
        """All between ``conv_in`` and the last layer, as in ``UNet2DConditionModel.construct``."""
        hidden, skips = first, (first,)
        for block in unet.down_blocks:
            if block.has_cross_attention:
                hidden, block_skips = block(
                    hidden, embeds, encoder_hidden_states=prompt_embeds, cross_attention_kwargs=constants
                )
            else:
                hidden, block_skips = block(hidden, embeds)
            skips += block_skips
        if unet.mid_block is not None:
            if unet.mid_block.has_cross_attention:
                hidden = unet.mid_block(
                    hidden, embeds, encoder_hidden_states=prompt_embeds, cross_attention_kwargs=constants
                )
            else:
                hidden = unet.mid_block(hidden, embeds)
        # Sizes that cannot be halved so often are told to the upsamplers.
        is_uneven = first.shape[2] % whole != 0 or first.shape[3] % whole != 0
        for i in range(last_block):
            block = unet.up_blocks[i]
            count = len(block.resnets)
            block_skips, skips = skips[-count:], skips[:-count]
            size = skips[-1].shape[2:] if is_uneven else None
            if block.has_cross_attention:
                hidden = block(
                    hidden,
                    block_skips,
                    embeds,
                    encoder_hidden_states=prompt_embeds,
                    cross_attention_kwargs=constants,
                    upsample_size=size,
                )
            else:
                hidden = block(hidden, block_skips, embeds, upsample_size=size)
        for i in range(last_layer):
            hidden = layer(i, hidden, skips[last_layer - i], embeds, prompt_embeds)
        return hidden

    def end(hidden, first, embeds, prompt_embeds):
        """The last layer, and what comes after the blocks."""
        hidden = layer(last_layer, hidden, first, embeds, prompt_embeds)
        if unet.conv_norm_out is not None:
            hidden = unet.conv_act(unet.conv_norm_out(hidden))
        return unet.conv_out(hidden)

    def full(latents, *others):
        timestep, prompt_embeds = conditions(others)
        first, embeds = entry(latents, timestep)
        hidden = deep(first, embeds, prompt_embeds)
        return end(hidden, first, embeds, prompt_embeds), hidden

    def shallow(hidden, latents, *others):
        timestep, prompt_embeds = conditions(others)
        first, embeds = entry(latents, timestep)
        return end(hidden, first, embeds, prompt_embeds)

    return full, shallow
