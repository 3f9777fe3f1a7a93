"""Validation of everything a user can pass, before any model runs.

Every function says in one sentence what was given, what was expected and what to do. Where the reference
checks a value itself, the exception has the reference's type; elsewhere a wrong type is a TypeError and a
wrong value a ValueError. Booleans are not numbers, NumPy scalars are, NaN and infinity never are. Checked
values come back as plain Python numbers.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import numpy as np

from mindiffedit.arrays import to_numpy
from mindiffedit.errors import InputError, InputTypeError, Message, named, shown

MAX_STEPS = 1000
MAX_ITERATIONS = 100  # of one step of an inversion; two or three are of use

__all__ = [
    "MAX_STEPS",
    "NumericalError",
    "check_at_least_zero",
    "check_callback",
    "check_clean_latents",
    "check_clip_skip",
    "check_count",
    "check_eta",
    "check_finite",
    "check_generators",
    "check_guidance_scale",
    "check_image_batch",
    "check_image_latents",
    "check_output_type",
    "check_overlap",
    "check_positive_int",
    "check_prompt_inputs",
    "check_quantile",
    "check_ratio",
    "check_regularisation",
    "check_step_callback",
    "check_scale",
    "check_steps",
    "check_strength",
    "check_switch",
    "check_threshold",
    "check_viewer",
    "check_temperature",
    "check_text",
    "check_top_k",
    "effective_steps",
]


class NumericalError(ArithmeticError, ValueError):
    """A stage produced NaN or infinity. `stage` (str) and `step` (int or None) say where; `message` is the sentence."""

    trace: dict[str, np.ndarray]  # of a replay for parity: what there was before

    def __init__(self, message: str, stage: str | None = None, step: int | None = None):
        super().__init__(message)
        self.message = message
        self.stage = stage
        self.step = step


# --- numbers ---------------------------------------------------------------------------------------


def _real(value, name: str, expected: str) -> float:
    """`value` as a finite float. None is a ValueError, as in the reference; other types are TypeErrors."""
    if value is None:
        raise InputError("{parameter} is None; give {expected}.", parameter=name, expected=expected)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise _wrong_type(value, name, expected)
    try:
        number = float(value)
    except OverflowError:  # a whole number of more than 308 digits
        number = math.inf
    if not math.isfinite(number):
        raise InputError("{parameter} has to be {expected}, but is {value!r}.", name, expected=expected, value=value)
    return number


def _wrong_type(value, name: str, expected: str) -> InputTypeError:
    return InputTypeError(
        "{parameter} has to be {expected}, but is {value!r} of type {value!t}.",
        parameter=name,
        expected=expected,
        value=value,
    )


def _is_int(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_))


def _int(value, name: str, expected: str) -> int:
    if not _is_int(value):
        raise _wrong_type(value, name, expected)
    return int(value)


def check_positive_int(name: str, value) -> int:
    """A whole number of at least 1. Anything else, of any type, is a ValueError, as in the reference."""
    if not _is_int(value) or value <= 0:
        raise InputError(
            "{parameter} has to be a positive integer but is {value!r} of type {value!t}.",
            parameter=name,
            value=value,
        )
    return int(value)


def check_strength(value, name: str = "inpaint_strength") -> float:
    """A number in [0, 1]."""
    strength = _real(value, name, "a number from 0 to 1")
    if not 0 <= strength <= 1:
        raise InputError(
            "The value of {parameter} should be in [0.0, 1.0] but is {value!r}.", parameter=name, value=value
        )
    return strength


def check_steps(value, name: str = "num_inference_steps", most: int = MAX_STEPS) -> int:
    """A whole number from 1 to `most`, the number of steps the model was trained with."""
    steps = _int(value, name, f"a whole number from 1 to {most}")
    if not 1 <= steps <= most:
        raise InputError(
            "{parameter} has to be from 1 to {most}, but is {steps!r}.",
            parameter=name,
            most=most,
            steps=steps,
        )
    return steps


def effective_steps(num_inference_steps: int, strength: float, name: str = "inpaint_strength") -> int:
    """Number of steps that really run: int(steps · strength), as in the reference.

    Raises:
        ValueError: no step would run. The message names a strength and a number of steps that work.
    """
    steps = min(int(num_inference_steps * strength), num_inference_steps)
    if steps >= 1:
        return steps
    least = math.ceil(10000 / num_inference_steps) / 10000
    remedy = Message("give at least {least:g}", least=least)
    if int(MAX_STEPS * strength) >= 1:
        needed = math.ceil(1 / strength)
        while int(needed * strength) < 1:
            needed += 1
        remedy = Message("{remedy}, or {num_inference_steps} of at least {needed}", remedy=remedy, needed=needed)
    raise InputError(
        "{parameter} {strength:g} of {steps} steps leaves no step to run: {remedy}.",
        parameter=name,
        strength=strength,
        steps=num_inference_steps,
        remedy=remedy,
    )


def check_guidance_scale(value, name: str = "guidance_scale") -> float:
    """A finite number of at least 0; up to 1 it means no guidance."""
    guidance = _real(value, name, "a number of at least 0")
    if guidance < 0:
        raise InputError(
            "{parameter} has to be at least 0, but is {value!r}; 1 or less means no guidance.",
            parameter=name,
            value=value,
        )
    return guidance


def check_ratio(value, name: str = "mask_thresholding_ratio") -> float:
    """A finite number above 0."""
    ratio = _real(value, name, "a number above 0")
    if ratio <= 0:
        raise InputError("{parameter} has to be positive but is {value!r}.", parameter=name, value=value)
    return ratio


def check_threshold(value, name: str = "threshold") -> float:
    """A number above 0 and below 1."""
    threshold = _real(value, name, "a number above 0 and below 1")
    if not 0 < threshold < 1:
        raise InputError(
            "{parameter} has to be above 0 and below 1 (or 'auto'), but is {value!r}; 0.5 is the paper's.",
            parameter=name,
            value=value,
        )
    return threshold


def check_at_least_zero(value, name: str, most: float) -> float:
    """A number from 0 to `most`; 0 switches something off."""
    number = _real(value, name, f"a number from 0 to {most:g}")
    if not 0 <= number <= most:
        raise InputError(
            "{parameter} has to be from 0 to {most:g}, but is {value!r}; 0 switches it off.",
            parameter=name,
            most=most,
            value=value,
        )
    return number


def check_count(value, name: str, most: int) -> int:
    """A whole number from 0 to `most`; 0 switches something off."""
    count = _int(value, name, f"a whole number from 0 to {most}")
    if not 0 <= count <= most:
        raise InputError(
            "{parameter} has to be from 0 to {most}, but is {count!r}; 0 switches it off.",
            parameter=name,
            most=most,
            count=count,
        )
    return count


def check_interval(start, end) -> tuple[float, float]:
    """`guidance_start` and `guidance_end`: shares of an edit's steps, from 0 to 1, the end after the start."""
    for name, value in (("guidance_start", start), ("guidance_end", end)):
        share = _real(value, name, "a number from 0 to 1")
        if not 0 <= share <= 1:
            raise InputError("{parameter} has to be from 0 to 1, but is {share!r}.", parameter=name, share=value)
    if not start < end:
        raise InputError(
            "{parameter} has to be above {guidance_start} ({start!r}), but is {end!r}; {guidance_scale=1} is without "
            "guidance.",
            parameter="guidance_end",
            start=start,
            end=end,
        )
    return float(start), float(end)


def check_switch(value, name: str) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise _wrong_type(value, name, "True or False")
    return bool(value)


def check_scale(value, name: str = "scale") -> float:
    """A LoRA's strength: any finite number."""
    return _real(value, name, "a finite number")


def check_eta(value) -> float:
    """DDIM's η, in [0, 1]: 0 is deterministic, 1 is as random as DDPM."""
    eta = _real(value, "eta", "a number from 0 to 1")
    if not 0 <= eta <= 1:
        raise InputError("{parameter} has to be in [0, 1], but is {value!r}.", parameter="eta", value=value)
    return eta


def check_quantile(value, name: str = "outlier_quantile") -> float | None:
    """None, or a number above 0 and up to 1."""
    if value is None:
        return None
    quantile = _real(value, name, "None or a number above 0 and up to 1")
    if not 0 < quantile <= 1:
        raise InputError(
            "{parameter} has to be above 0 and at most 1, but is {value!r}; None switches it off.",
            parameter=name,
            value=value,
        )
    return quantile


def check_overlap(value, name: str) -> float:
    """The part of a tile's side that its neighbour shares: from 0 up to, not including, 1."""
    overlap = _real(value, name, "a number from 0 up to, not including, 1")
    if not 0 <= overlap < 1:
        raise InputError("{parameter} has to be in [0, 1), but is {value!r}.", parameter=name, value=value)
    return overlap


def check_output_type(value, allowed: Sequence[str], name: str = "output_type") -> str:
    """One of the names in `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise InputError(
            "{parameter} has to be {either}, but is {value!r}.",
            parameter=name,
            either=_either(allowed),
            value=value,
        )
    return value


def _either(names: Sequence[str]) -> str:
    quoted = [repr(name) for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def check_callback(callback, callback_steps) -> int:
    """`callback` is None or callable; returns `callback_steps`, a whole number of at least 1."""
    if callback is not None and not callable(callback):
        raise InputTypeError(
            "{parameter} has to be None or callable as callback(step, timestep, latents), but is {callback!t}.",
            parameter="callback",
            callback=callback,
        )
    return check_positive_int("callback_steps", callback_steps)


def check_step_callback(callback, tensor_inputs, allowed: Sequence[str]) -> tuple[str, ...]:
    """`callback_on_step_end` is None or callable; returns the names of the tensors that it gets, from `allowed`."""
    if callback is not None and not callable(callback):
        raise InputTypeError(
            "{parameter} has to be None or callable as callback(pipeline, step, timestep, tensors), but is "
            "{callback!t}.",
            parameter="callback_on_step_end",
            callback=callback,
        )
    if isinstance(tensor_inputs, str) or not isinstance(tensor_inputs, (list, tuple)):
        raise InputTypeError(
            "{parameter} has to be a list of names, but is {tensor_inputs!t}; give for example ['latents'].",
            parameter="callback_on_step_end_tensor_inputs",
            tensor_inputs=tensor_inputs,
        )
    for name in tensor_inputs:
        if name not in allowed:
            raise InputError(
                "{parameter} has to be in {known}, but {name!r} was given.",
                parameter="callback_on_step_end_tensor_inputs",
                known=list(allowed),
                name=name,
            )
    return tuple(tensor_inputs)


def check_viewer(callback) -> None:
    """`debug_callback` is None or callable."""
    if callback is not None and not callable(callback):
        raise InputTypeError(
            "{parameter} has to be None or callable as callback(stage, array, step), but is {callback!t}.",
            parameter="debug_callback",
            callback=callback,
        )


def check_clip_skip(value, number_of_layers: int) -> int | None:
    """None, or how many of the text encoder's last layers are left out: 0 to `number_of_layers`."""
    if value is None:
        return None
    skip = _int(value, "clip_skip", f"None or a whole number from 0 to {number_of_layers}")
    if not 0 <= skip <= number_of_layers:
        raise InputError(
            "{parameter} has to be from 0 to {number_of_layers}, the layers of this text encoder, but is {skip!r}.",
            parameter="clip_skip",
            number_of_layers=number_of_layers,
            skip=skip,
        )
    return skip


def check_regularisation(
    lambda_auto_corr, lambda_kl, num_reg_steps, num_auto_corr_rolls
) -> tuple[float, float, int, int]:
    """The four options of the inversion's regularisers: weights of at least 0, counts of at least 0.

    A weight or a count of 0 switches its regulariser off.
    """
    weights = []
    for name, value in (("lambda_auto_corr", lambda_auto_corr), ("lambda_kl", lambda_kl)):
        weight = _real(value, name, "a number of at least 0")
        if weight < 0:
            raise InputError(
                "{parameter} has to be at least 0, but is {value!r}; 0 switches it off.",
                parameter=name,
                value=value,
            )
        weights.append(weight)
    counts = []
    for name, value in (("num_reg_steps", num_reg_steps), ("num_auto_corr_rolls", num_auto_corr_rolls)):
        count = _int(value, name, "a whole number of at least 0")
        if count < 0:
            raise InputError(
                "{parameter} has to be at least 0, but is {value!r}; 0 switches it off.",
                parameter=name,
                value=value,
            )
        counts.append(count)
    return weights[0], weights[1], counts[0], counts[1]


# --- text that models write ------------------------------------------------------------------------


def check_temperature(value) -> float:
    """A finite number above 0, by which logits are divided before a token is drawn."""
    temperature = _real(value, "temperature", "a number above 0")
    if temperature <= 0:
        raise InputError(
            "{parameter} has to be above 0, but is {value!r}; {do_sample=False} takes the likeliest token.",
            parameter="temperature",
            value=value,
        )
    return temperature


def check_top_k(value) -> int | None:
    """How many of the likeliest tokens are drawn from: at least 1, or None for all of them (as 0, in transformers)."""
    if value is None:
        return None
    count = _int(value, "top_k", "None or a whole number of at least 0")
    if count < 0:
        raise InputError(
            "{parameter} has to be at least 0, but is {count!r}; None or 0 draws from all tokens.",
            parameter="top_k",
            count=count,
        )
    return count or None


def check_text(value, name: str = "text") -> str:
    """A string with more than white space in it."""
    if not isinstance(value, str):
        raise _wrong_type(value, name, "a string")
    if not value.strip():
        raise InputError("{parameter} is empty; give a text with words in it.", parameter=name)
    return value


# --- prompts ---------------------------------------------------------------------------------------


def check_prompt_inputs(
    prompt=None,
    negative_prompt=None,
    prompt_embeds=None,
    negative_prompt_embeds=None,
    prefix: str = "",
    guided: bool = True,
) -> int:
    """Check one prompt, given as text or as embeddings, and its negative.

    Args:
        prompt: str or list of str; the empty string is a prompt.
        negative_prompt: None, or of the same type and length as `prompt`.
        prompt_embeds, negative_prompt_embeds: None, or float (B, tokens, width); in place of the texts.
        prefix: what the names of the four have in front in messages, such as "target_".
        guided: False where there is no guidance and negatives are ignored, as the reference ignores them; then only
            what cannot be meant at all is an error.

    Returns:
        The batch size.

    Raises:
        ValueError: both or neither of text and embeddings, an empty list, a prompt or an entry that is no string,
            counts or shapes that do not fit, NaN or inf.
        TypeError: `negative_prompt` is not of `prompt`'s type; embeddings are not floating-point numbers.
    """
    if prefix and not prefix.endswith("_"):
        prefix += "_"
    text, negative = f"{prefix}prompt", f"{prefix}negative_prompt"
    if prompt is not None and prompt_embeds is not None:
        raise InputError(
            "Cannot forward both {parameter} and {embeds}; give one of the two.",
            parameter=text,
            embeds=named(f"{text}_embeds"),
        )
    if prompt is None and prompt_embeds is None:
        raise InputError(
            "Provide either {parameter} or {embeds}; both are None.",
            parameter=text,
            embeds=named(f"{text}_embeds"),
        )
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise InputError(
            "Cannot forward both {parameter} and {embeds}; give one of the two.",
            parameter=negative,
            embeds=named(f"{negative}_embeds"),
        )

    shape = None
    if prompt is not None:
        batch_size = _check_texts(prompt, text)
    else:
        shape = _check_embeds(prompt_embeds, f"{text}_embeds")
        batch_size = shape[0]
    if negative_prompt_embeds is not None:
        negative_shape = _check_embeds(negative_prompt_embeds, f"{negative}_embeds")
        if shape is not None and negative_shape != shape:
            raise InputError(
                "{embeds} and {parameter} must have the same shape when passed directly, but got: {shape} != "
                "{negative_shape}.",
                parameter=f"{negative}_embeds",
                embeds=named(f"{text}_embeds"),
                shape=shape,
                negative_shape=negative_shape,
            )
        if guided and negative_shape[0] != batch_size:
            raise InputError(
                "{parameter} has batch size {count}, but {text} has batch size {batch_size}; give one negative for "
                "each prompt.",
                parameter=f"{negative}_embeds",
                count=negative_shape[0],
                text=named(text),
                batch_size=batch_size,
            )
    if negative_prompt is not None and guided:
        _check_negative(prompt, negative_prompt, batch_size, text, negative)
    return batch_size


def _check_texts(value, name: str) -> int:
    """`value` is a str or a list of them; returns how many."""
    if isinstance(value, str):
        return 1
    if not isinstance(value, list):
        raise InputError("{parameter} has to be of type `str` or `list` but is {value!t}.", parameter=name, value=value)
    if len(value) == 0:
        raise InputError("{parameter} is an empty list; give one text for each picture.", parameter=name)
    for i, entry in enumerate(value):
        if not isinstance(entry, str):
            raise InputError(
                "{part} has to be of type `str` but is {entry!r}.",
                parameter=name,
                part=named(f"{name}[{i}]"),
                entry=entry,
            )
    return len(value)


def _check_negative(prompt, negative_prompt, batch_size: int, text: str, negative: str) -> None:
    if not isinstance(negative_prompt, (str, list)) or (
        prompt is not None and isinstance(prompt, str) != isinstance(negative_prompt, str)
    ):
        raise InputTypeError(
            "{parameter} should be the same type to {text}, but got {negative!t} != {expected}.",
            parameter=negative,
            text=named(text),
            negative=negative_prompt,
            expected="`str` or `list`" if prompt is None else type(prompt).__name__,
        )
    count = _check_texts(negative_prompt, negative)
    if count != batch_size:
        raise InputError(
            "{parameter} has batch size {count}, but {text} has batch size {batch_size}; give one negative for each "
            "prompt.",
            parameter=negative,
            count=count,
            text=named(text),
            batch_size=batch_size,
        )


def _check_embeds(value, name: str) -> tuple[int, ...]:
    """`value` holds finite floats (B, tokens, width); returns the shape."""
    array = to_numpy(value)
    if array.dtype.kind != "f":
        raise InputTypeError(
            "{parameter} has to hold floating-point numbers, but is of dtype {dtype}.",
            parameter=name,
            dtype=array.dtype,
        )
    if array.ndim != 3 or array.size == 0:
        raise InputError(
            "{parameter} has to be (batch, tokens, width), but has shape {shape}.",
            parameter=name,
            shape=array.shape,
        )
    if not np.isfinite(array).all():
        raise InputError("{parameter} has NaN or infinite values; every value has to be finite.", parameter=name)
    return array.shape


# --- batches, latents, random numbers --------------------------------------------------------------


def check_image_batch(number_of_images: int, batch_size: int) -> int:
    """How many times the pictures are repeated to fill the batch of prompts.

    Raises ValueError where `number_of_images` does not divide `batch_size`.
    """
    if number_of_images < 1 or batch_size % number_of_images != 0:
        raise InputError(
            "Cannot duplicate {parameter} of batch size {number_of_images} to {batch_size} text prompts; give one "
            "picture for each prompt, or one for all.",
            parameter="image",
            number_of_images=number_of_images,
            batch_size=batch_size,
        )
    return batch_size // number_of_images


def check_image_latents(
    array, batch_size: int, steps: int, latent_shape: Sequence[int], name: str = "image_latents"
) -> np.ndarray:
    """Check the latents of an inversion against what the edit needs.

    Args:
        array: float (B, T, C, h, w), or (B · T, C, h, w) with the steps of one picture in a row, as array or tensor.
        batch_size: number of prompts, B.
        steps: number of steps that the edit runs, T.
        latent_shape: (C, h, w), with h and w those of the mask.

    Returns:
        float array (B, T, C, h, w).

    Raises:
        ValueError: rank, shape, batch or length do not fit, or a value is NaN or infinite.
        TypeError: the values are not floating-point numbers.
    """
    array = to_numpy(array)
    latent_shape = tuple(int(n) for n in latent_shape)
    if array.dtype.kind != "f":
        raise InputTypeError(
            "{parameter} has to hold floating-point numbers, but is of dtype {dtype}.",
            parameter=name,
            dtype=array.dtype,
        )
    if array.ndim not in (4, 5):
        raise InputError(
            "{parameter} has to be (batch, steps, channels, height, width), but has shape {shape}; give the latents "
            "of `invert`.",
            parameter=name,
            shape=array.shape,
        )
    if array.shape[-3:] != latent_shape:
        raise InputError(
            "Each latent image in {parameter} must have shape {latent_shape}, but has shape {shape}; invert the "
            "picture that the mask was made for, with the same model.",
            parameter=name,
            latent_shape=latent_shape,
            shape=array.shape[-3:],
        )
    if array.ndim == 4:
        if len(array) != batch_size * steps:
            got = f"holds {len(array)} latent images in all"
            raise _wrong_count(name, batch_size, steps, got)
        array = array.reshape(batch_size, steps, *latent_shape)
    if array.shape[:2] != (batch_size, steps):
        got = f"has batch size {array.shape[0]} with latent images from {array.shape[1]} timesteps"
        raise _wrong_count(name, batch_size, steps, got)
    if not np.isfinite(array).all():
        raise InputError("{parameter} has NaN or infinite values; every value has to be finite.", parameter=name)
    return array


def check_clean_latents(array, shape: Sequence[int], name: str = "clean_latents") -> np.ndarray:
    """Latents of the pictures without noise, of exactly this shape (B, C, h, w); finite floats."""
    array = to_numpy(array)
    if array.dtype.kind != "f":
        raise InputTypeError(
            "{parameter} has to hold floating-point numbers, but is of dtype {dtype}.",
            parameter=name,
            dtype=array.dtype,
        )
    if array.shape != tuple(shape):
        raise InputError(
            "{parameter} has to be of shape {expected}, but is {shape}; give what `invert` returned with the other "
            "latents.",
            parameter=name,
            expected=tuple(shape),
            shape=array.shape,
        )
    if not np.isfinite(array).all():
        raise InputError("{parameter} has NaN or infinite values; every value has to be finite.", parameter=name)
    return array


def _wrong_count(name: str, batch_size: int, steps: int, got: str) -> InputError:
    return InputError(
        "{parameter} must have batch size {batch_size} with latent images from {steps} timesteps, but {got}; give as "
        "many prompts, and the same {num_inference_steps} and {inpaint_strength}, to the inversion and the edit.",
        parameter=name,
        batch_size=batch_size,
        steps=steps,
        got=got,
    )


def check_attention_kwargs(given) -> dict:
    """`cross_attention_kwargs` as a dict of plain values, which can be compiled into a graph.

    Raises:
        TypeError: not a dict, or a value that is no number, string, boolean or None.
    """
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise InputTypeError(
            "{parameter} has to be a dict or None, but is {given!t}.",
            parameter="cross_attention_kwargs",
            given=given,
        )
    for name, value in given.items():
        if value is not None and not isinstance(value, (bool, int, float, str)):
            raise InputTypeError(
                "{entry} is {value!t}; only numbers, strings, booleans and None can be compiled into the UNet. Pass a "
                "plain value.",
                parameter="cross_attention_kwargs",
                entry=named(f"cross_attention_kwargs[{shown(name)}]"),
                value=value,
            )
    return dict(given)


def check_generators(generator, count: int) -> None:
    """A list of generators has one for each of `count` samples; anything else is left to the random door."""
    if isinstance(generator, (list, tuple)) and len(generator) != count:
        raise InputError(
            "You have passed a list of generators of length {length}, but requested an effective batch size of "
            "{count}. Make sure the batch size matches the length of the generators.",
            parameter="generator",
            length=len(generator),
            count=count,
        )


def check_finite(array, stage: str, step: int | None = None) -> None:
    """Raise NumericalError, naming the stage (and the step, counted from 0) that produced NaN or infinity."""
    array = to_numpy(array)
    finite = np.isfinite(array)
    if finite.all():
        return
    where = stage if step is None else f"{stage}, step {step}"
    bad = int(array.size - np.count_nonzero(finite))
    raise NumericalError(
        f"{where}: {bad} of {array.size} values are NaN or infinite; try float32, a lower guidance scale, or "
        f"check the model's weights.",
        stage,
        step,
    )
