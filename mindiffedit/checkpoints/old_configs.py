"""What is outdated in the configs of older checkpoints, and what stands in its place.

The reference corrects the same when it loads a checkpoint, wherever no other source is named. Everything here takes a
config and returns the options that change, so that it serves files and components that were made by hand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mindiffedit.runtime.notices import say_once


def unet_changes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The right values of a UNet's outdated options; said once.

    Before 0.9 diffusers wrote ``sample_size`` 32, its default, for models that are made for 64 (512 pixels).
    """
    size, version = config.get("sample_size"), re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version", "")))
    if version is None or (int(version[1]), int(version[2])) >= (0, 9) or not isinstance(size, int) or size >= 64:
        return {}
    say_once(
        f"The UNet's config says sample_size {size}, which diffusers wrote before version 0.9 for models of 64 (512"
        " pixels); it is taken for 64. Correct unet/config.json to silence this."
    )
    return {"sample_size": 64}


def scheduler_changes(config: Mapping[str, Any], loaded: bool = False) -> dict[str, Any]:
    """The right values of a scheduler's outdated options; each said once.

    Args:
        config: of the scheduler as it is, with its defaults: a default can be as wrong as what a file says.
        loaded: whether it comes from a checkpoint. One that was made by hand clips where it is asked to.
    """
    changes = {}
    if config.get("steps_offset", 1) != 1:
        changes["steps_offset"] = 1
    if config.get("skip_prk_steps", True) is False:
        changes["skip_prk_steps"] = True
    # W12: StableDiffusionPipeline of the reference corrects this one; its DiffEdit does not, and clips latents.
    if loaded and config.get("clip_sample", False) is True:
        changes["clip_sample"] = False
    for name, value in changes.items():
        say_once(
            f"The scheduler was configured with {name}={config[name]}; it is set to {value}, which Stable Diffusion's"
            " models expect. Correct scheduler_config.json to silence this."
        )
    return changes


def scheduler_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's config from a file under the names, and with the defaults, that its options have now."""
    config = dict(config)
    # DDIM's inverse called it so up to 0.17, when the pipeline came.
    old_end = config.pop("set_alpha_to_zero", None)
    if old_end is not None:
        config["set_alpha_to_one"] = old_end
    # Written before there was a choice. W13: the reference takes its new default, which these solvers refuse.
    if config.get("algorithm_type") in ("dpmsolver", "sde-dpmsolver", "deis"):
        config.setdefault("final_sigmas_type", "sigma_min")
    return config
