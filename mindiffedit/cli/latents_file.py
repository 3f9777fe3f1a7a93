"""The file that `mindiffedit invert` writes: a picture's latents, and how they were made.

A safetensors file with two tensors, the latents of every step and the clean ones that the inversion began with, and
metadata that says all that an edit has to agree with. Files of version 1 have no clean latents; they are read.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mindiffedit import options
from mindiffedit.errors import InputError
from mindiffedit.images import writing

FORMAT = "mindiffedit-latents"
VERSION = "2"
WITHOUT_CLEAN = "1"  # the version before
TENSOR = "image_latents"
CLEAN = "clean_latents"

__all__ = ["read_latents", "write_latents"]


def write_latents(path, latents: np.ndarray, clean: np.ndarray, made: dict[str, Any]) -> None:
    """Write latents and how they were made as a safetensors file, whole or not at all.

    Args:
        latents: float32 (1, T, C, h, w), noisiest first.
        clean: float32 (1, C, h, w), where the inversion began.
        made: the values that `read_latents` returns.

    Raises:
        NumericalError: NaN or infinity in one of the two.
    """
    for values in (latents, clean):
        options.check_finite(values, "inversion")
    metadata = {"format": FORMAT, "format_version": VERSION}
    metadata.update({name: str(value) for name, value in made.items()})
    tensors = {TENSOR: np.ascontiguousarray(latents), CLEAN: np.ascontiguousarray(clean)}
    with writing.atomic_path(path) as draft:
        save_file(tensors, str(draft), metadata=metadata)


def read_latents(path) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]]:
    """Read what `write_latents` wrote, in this version or the one before.

    Returns:
        float32 (1, T, C, h, w); the clean latents, float32 (1, C, h, w), or None in a file of version 1; and a dict:
        prompt, negative_prompt, scheduler, model, picture_sha256 and picture_size ("WxH") as text, steps and seed as
        int, strength and guidance as float, working_size as (width, height).

    Raises:
        ValueError: the file is missing, damaged, or of another kind or version, its values do not fit together, or
            one is NaN or infinite.
    """
    if not os.path.isfile(path):
        raise InputError(
            "there is no latents file {path}; make one with `mindiffedit invert`.",
            parameter="path",
            path=path,
        )
    clean = None
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            made = _parse_metadata(path, metadata, names)
            latents = file.get_tensor(TENSOR)
            if metadata["format_version"] != WITHOUT_CLEAN:
                clean = file.get_tensor(CLEAN)
    except (SafetensorError, OSError) as error:
        raise InputError(
            "{path} is not a whole safetensors file: {why}.",
            parameter="path",
            path=path,
            why=str(error).rstrip("."),
        ) from error
    for values in (latents, clean):
        if values is not None and values.dtype != np.float32:
            raise InputError(
                "{path}: the latents are {dtype}, expected float32; invert anew.",
                parameter="path",
                path=path,
                dtype=values.dtype,
            )
    steps = options.effective_steps(made["steps"], made["strength"], f"{path}: strength")
    if latents.ndim != 5 or latents.shape[:2] != (1, steps):
        raise InputError(
            "{path}: the latents have shape {shape}, expected (1, {steps}, channels, height, width) for {all} steps "
            "at strength {strength:g}; invert anew.",
            parameter="path",
            path=path,
            shape=latents.shape,
            steps=steps,
            all=made["steps"],
            strength=made["strength"],
        )
    if clean is not None and clean.shape != latents.shape[:1] + latents.shape[2:]:
        raise InputError(
            "{path}: the clean latents have shape {shape}, expected {expected} as the others; invert anew.",
            parameter="path",
            path=path,
            shape=clean.shape,
            expected=latents.shape[:1] + latents.shape[2:],
        )
    for values in (latents, clean):
        if values is not None and not np.isfinite(values).all():
            raise InputError(
                "{path}: the latents have NaN or infinite values; invert anew.", parameter="path", path=path
            )
    return latents, clean, made


def _parse_metadata(path, metadata: dict[str, str], names: list[str]) -> dict[str, Any]:
    if metadata.get("format") != FORMAT or TENSOR not in names:
        raise InputError(
            "{path} was not written by `mindiffedit invert`; give a file that was.",
            parameter="path",
            path=path,
        )
    version = metadata.get("format_version")
    if version not in (VERSION, WITHOUT_CLEAN):
        raise InputError(
            "{path} has format version {version}, this program reads versions {oldest} and {newest}; invert anew.",
            parameter="path",
            path=path,
            version=version,
            oldest=WITHOUT_CLEAN,
            newest=VERSION,
        )
    if version == VERSION and CLEAN not in names:
        raise InputError("{path} is damaged (it has no clean latents); invert anew.", parameter="path", path=path)
    made: dict[str, Any] = {}
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
        raise InputError(
            "{path} does not say its {what}; invert anew.", parameter="path", path=path, what=error.args[0]
        ) from None
    except ValueError as error:
        raise InputError(
            "{path} is damaged ({why}); invert anew.", parameter="path", path=path, why=str(error).rstrip(".")
        ) from error
    return made
