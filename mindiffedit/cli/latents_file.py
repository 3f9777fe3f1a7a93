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
from mindiffedit.solvers import SOLVERS

FORMAT = "mindiffedit-latents"
VERSION = "2"
WITHOUT_CLEAN = "1"  # the version before
TENSOR = "image_latents"
CLEAN = "clean_latents"


def write_latents(path, latents: np.ndarray, clean: np.ndarray, recipe: dict[str, Any]) -> None:
    """Write latents and how they were made as a safetensors file, whole or not at all.

    Args:
        latents: float32 (1, T, C, h, w), noisiest first.
        clean: float32 (1, C, h, w), where the inversion began.
        recipe: the values that `read_latents` returns.

    Raises:
        NumericalError: NaN or infinity in one of the two.
    """
    for values in (latents, clean):
        options.check_finite(values, "inversion")
    metadata = {"format": FORMAT, "format_version": VERSION}
    metadata.update({name: str(value) for name, value in recipe.items()})
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
        InputError: the file is missing, damaged, or of another kind or version, its values do not fit together, or
            one is NaN or infinite.
    """
    if not os.path.isfile(path):
        raise InputError("there is no latents file {path}; make one with `mindiffedit invert`.", path=path)
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            if metadata.get("format") != FORMAT or TENSOR not in names:
                raise InputError("{path} was not written by `mindiffedit invert`; give a file that was.", path=path)
            recipe = _recipe(path, metadata, names)
            latents = file.get_tensor(TENSOR)
            clean = file.get_tensor(CLEAN) if metadata["format_version"] != WITHOUT_CLEAN else None
    except (SafetensorError, OSError) as error:
        why = str(error).rstrip(".")
        raise InputError("{path} is not a whole safetensors file: {why}.", path=path, why=why) from error
    misfit = _misfit(latents, clean, recipe)
    if misfit is not None:
        raise InputError("{path}: {misfit}; invert anew.", path=path, misfit=misfit)
    return latents, clean, recipe


def _misfit(latents: np.ndarray, clean: np.ndarray | None, recipe: dict[str, Any]) -> str | None:
    """What is wrong with the tensors of a file, or None."""
    steps = options.effective_steps(recipe["steps"], recipe["strength"])
    tensors = [latents] if clean is None else [latents, clean]
    for values in tensors:
        if values.dtype != np.float32:
            return f"the latents are {values.dtype}, expected float32"
    if latents.ndim != 5 or latents.shape[:2] != (1, steps):
        schedule = f"{recipe['steps']} steps at strength {recipe['strength']:g}"
        return f"the latents have shape {latents.shape}, expected (1, {steps}, channels, height, width) for {schedule}"
    expected = latents.shape[:1] + latents.shape[2:]
    if clean is not None and clean.shape != expected:
        return f"the clean latents have shape {clean.shape}, expected {expected} as the others"
    if not all(np.isfinite(values).all() for values in tensors):
        return "the latents have NaN or infinite values"
    return None


def _recipe(path, metadata: dict[str, str], names: list[str]) -> dict[str, Any]:
    version = metadata.get("format_version")
    if version not in (VERSION, WITHOUT_CLEAN):
        raise InputError(
            "{path} has format version {version}, this program reads versions {oldest} and {newest}; invert anew.",
            path=path,
            version=version,
            oldest=WITHOUT_CLEAN,
            newest=VERSION,
        )
    texts = ("prompt", "negative_prompt", "scheduler", "model", "picture_sha256", "picture_size")
    try:
        if version == VERSION and CLEAN not in names:
            raise ValueError("it has no clean latents")
        recipe: dict[str, Any] = {name: metadata[name] for name in texts}
        if recipe["scheduler"] not in SOLVERS:
            raise ValueError(f"the scheduler {recipe['scheduler']!r} is unknown")
        recipe["steps"] = options.check_steps(int(metadata["steps"]), "steps")
        recipe["strength"] = options.check_strength(float(metadata["strength"]), "strength")
        recipe["guidance"] = options.check_guidance_scale(float(metadata["guidance"]), "guidance")
        recipe["seed"] = int(metadata["seed"])
        width, height = (int(side) for side in metadata["working_size"].split("x"))
        recipe["working_size"] = tuple(options.check_positive_int("working_size", side) for side in (width, height))
        options.effective_steps(recipe["steps"], recipe["strength"], "strength")
    except KeyError as error:
        raise InputError("{path} does not say its {what}; invert anew.", path=path, what=error.args[0]) from None
    except ValueError as error:
        raise InputError("{path} is damaged ({why}); invert anew.", path=path, why=str(error).rstrip(".")) from error
    return recipe
