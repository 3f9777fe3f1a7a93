"""The file that `mindiffedit invert` writes: a picture's latents, and how they were made.

A safetensors file with one tensor, the latents, and metadata that says all that an edit has to agree with.
"""

from __future__ import annotations

import os
from typing import Any, Dict, List, Tuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from . import options, pictures

FORMAT = "mindiffedit-latents"
VERSION = "1"
TENSOR = "image_latents"

__all__ = ["read_latents", "write_latents"]


def write_latents(path, latents: np.ndarray, made: Dict[str, Any]) -> None:
    """Write latents and how they were made as a safetensors file, whole or not at all.

    `latents` is float32 (B, T, C, h, w), noisiest first; `made` holds the values that `read_latents` returns.
    """
    options.check_finite(latents, "inversion")
    metadata = {"format": FORMAT, "format_version": VERSION}
    metadata.update({name: str(value) for name, value in made.items()})
    with pictures.atomic_path(path) as draft:
        save_file({TENSOR: np.ascontiguousarray(latents)}, str(draft), metadata=metadata)


def read_latents(path) -> Tuple[np.ndarray, Dict[str, Any]]:
    """Read what `write_latents` wrote.

    Returns
    -------
    float32 (1, T, C, h, w), and a dict: prompt, negative_prompt, scheduler, model, picture_sha256 and
    picture_size ("WxH") as text, steps and seed as int, strength and guidance as float, working_size as
    (width, height).

    Raises
    ------
    ValueError
        The file is missing, damaged, or of another kind or version, its values do not fit together, or one
        is NaN.
    """
    if not os.path.isfile(path):
        raise ValueError(f"there is no latents file {path}; make one with `mindiffedit invert`.")
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            made = _parse_metadata(path, metadata, names)
            latents = file.get_tensor(TENSOR)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {str(error).rstrip('.')}.") from error
    if latents.dtype != np.float32:
        raise ValueError(f"{path}: the latents are {latents.dtype}, expected float32; invert anew.")
    steps = options.effective_steps(made["steps"], made["strength"], f"{path}: strength")
    if latents.ndim != 5 or latents.shape[:2] != (1, steps):
        raise ValueError(
            f"{path}: the latents have shape {latents.shape}, expected (1, {steps}, channels, height, width) "
            f"for {made['steps']} steps at strength {made['strength']:g}; invert anew."
        )
    if not np.isfinite(latents).all():
        raise ValueError(f"{path}: the latents have NaN or infinite values; invert anew.")
    return latents, made


def _parse_metadata(path, metadata: Dict[str, str], names: List[str]) -> Dict[str, Any]:
    if metadata.get("format") != FORMAT or TENSOR not in names:
        raise ValueError(f"{path} was not written by `mindiffedit invert`.")
    if metadata.get("format_version") != VERSION:
        raise ValueError(
            f"{path} has format version {metadata.get('format_version')}, this program reads version "
            f"{VERSION}; invert anew."
        )
    made: Dict[str, Any] = {}
    try:
        for name in ("prompt", "negative_prompt", "scheduler", "model", "picture_sha256", "picture_size"):
            made[name] = metadata[name]
        made["steps"] = options.check_steps(int(metadata["steps"]), "steps")
        made["strength"] = options.check_strength(float(metadata["strength"]), "strength")
        made["guidance"] = options.check_guidance_scale(float(metadata["guidance"]), "guidance")
        made["seed"] = int(metadata["seed"])
        width, height = metadata["working_size"].split("x")
        made["working_size"] = (
            options.check_positive_int("working_size", int(width)),
            options.check_positive_int("working_size", int(height)),
        )
    except KeyError as error:
        raise ValueError(f"{path} does not say its {error.args[0]}; invert anew.") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({str(error).rstrip('.')}); invert anew.") from error
    return made
