"""What can be wrong with a command's arguments, whatever the picture and the model are. No file is read here."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mindiffedit import inputs, masks, options
from mindiffedit.cli.arguments import CORRECTIONS, MASK_NUMBERS
from mindiffedit.cli.wording import MASK_FIELDS, about, option
from mindiffedit.errors import InputError
from mindiffedit.images import writing

# Far above what any model works at, and what anyone waits for.
MAX_SIZE = 2**16
MAX_SAMPLES = 1000


def is_given(args: Namespace, name: str) -> bool:
    """Whether an option was given, be it as --no-..."""
    return getattr(args, name, None) is not None


# --- one option by itself --------------------------------------------------------------------------


def check_names(args: Namespace) -> None:
    """Names of files and models that none can have: nothing, as an unset variable of a shell makes it, or too long."""
    for name, value in vars(args).items():
        if name in ("source", "target", "caption") or name.endswith("negative") or name.startswith("sweep_"):
            continue  # texts, and lists of numbers
        parameter = name.upper() if name in ("picture", "golden", "jobs") else option(name)
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str):
                continue
            if text == "":
                raise InputError("{parameter} is empty; give it a value.", parameter)
            if "\0" in text:
                raise InputError(
                    "{parameter} has a zero character in it: {text!r}; leave it out.", parameter, text=text
                )
            if not _ADDRESS.match(text) and _is_too_long(text):
                raise InputError("{parameter} is too long to be a name: {text!r}.", parameter, text=text)


_ADDRESS = re.compile(r"\s*(https?|data|file):", re.IGNORECASE)


def _is_too_long(path: str) -> bool:
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    return False


_NUMBERS: dict[str, Callable[[Any, str], Any]] = {
    "steps": options.check_steps,
    "strength": options.check_strength,
    "guidance": options.check_guidance_scale,
    "invert_guidance": options.check_guidance_scale,
    "mask_strength": options.check_strength,
    "mask_threshold": options.check_ratio,
    "maps": lambda value, name: options.check_steps(value, name, MAX_SAMPLES),
    "size": lambda value, name: options.check_steps(value, name, MAX_SIZE),
    "iterations": lambda value, name: options.check_count(value, name, options.MAX_ITERATIONS),
    "feather": lambda value, name: options.check_at_least_zero(value, name, inputs.MAX_FEATHER),
    "outliers": lambda value, name: options.check_quantile(None if value == "none" else value, name),
}


def check_numbers(values: Mapping[str, Any]) -> None:
    """Check the numbers among `values`, by option name; None was not given."""
    for name, check in _NUMBERS.items():
        if values.get(name) is not None:
            check(values[name], option(name))


def mask_options_of(args: Namespace, mask_options: masks.MaskOptions = inputs.EDIT_MASK) -> masks.MaskOptions:
    """`edit()`'s, with what was given."""
    for name, field in MASK_FIELDS.items():
        if is_given(args, name):
            with about(name, field):
                mask_options = dataclasses.replace(mask_options, **{field: getattr(args, name)})
    return mask_options


def lora_of(text: str) -> tuple[str, float]:
    """File and weight of FILE or FILE=WEIGHT; a file whose name has a "=" is a file."""
    path, equals, weight = text.rpartition("=")
    if not equals or os.path.exists(text) or text.endswith(".safetensors"):
        return text, 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(
            "--lora {text}: the weight has to be a finite number, but is {weight!r}.", text=text, weight=weight
        )
    return path, number


def embedding_of(text: str) -> tuple[str, str | None]:
    """File and word of FILE or FILE=WORD; a file whose name has a "=" is a file."""
    match = re.fullmatch(r"(.+\.safetensors)=(.*)", text, re.IGNORECASE | re.DOTALL)
    if match is None or os.path.exists(text):
        return text, None
    if not match[2].strip():
        raise InputError(f"--embedding {text}: there is no word after the '='; give one, or leave the '=' out.")
    return match[1], match[2].strip()


def text_of(args: Namespace, name: str, may_be_empty: bool) -> str | None:
    """The text of an option, which can be encoded; None without."""
    text = getattr(args, name, None)
    if text is None:
        return None
    if not may_be_empty and not text.strip():
        raise InputError("{parameter} is empty; give a short description of the picture.", option(name))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("{parameter} is not valid UTF-8 text; check the terminal's encoding.", option(name)) from None
    return text


# --- several options together ----------------------------------------------------------------------


def check_contradictions(args: Namespace) -> None:
    """Options that make one another mean nothing, or that miss one another."""
    shaping = [name for name in MASK_FIELDS if name != "soft_mask"]
    combines = getattr(args, "mask_combine", None) not in (None, "replace")
    replaces = is_given(args, "mask") and not combines
    instead = "" if args.reference else ", or give --mask-combine union, subtract or intersection"
    inverts = args.command != "mask" and getattr(args, "inversion", None) != "noise"
    caption_serves = not is_given(args, "source") or (inverts and args.command != "invert" and not args.reference)
    # Where the condition holds, none of the options may be given.
    rules = [
        (args.reference, CORRECTIONS,
         "--reference runs the reference's own calls, which do not know {}; leave one of the two out."),
        (args.reference and args.command == "mask", ("mask",),
         "--reference runs the reference's own call, which combines no masks; leave {} or --reference out."),
        (not inverts, ("latents", "iterations", "invert_guidance", "caption"),
         "--inversion noise inverts nothing, so {} means nothing with it; leave one of the two out."),
        (is_given(args, "latents"),
         ("inversion", "iterations", "invert_guidance", "caption", "caption_model", "sweep_strengths"),
         "--latents is a finished inversion, so {} means nothing with it; leave one of the two out."),
        (not is_given(args, "mask"), ("mask_combine",),
         "{} says what becomes of --mask, which is missing; give --mask FILE."),
        (args.command == "mask" and replaces, ("mask",),
         "{} is combined with the computed mask; give --mask-combine union, subtract or intersection."),
        (replaces, (*shaping, "outliers", *MASK_NUMBERS),
         f"{{}} is for the computed mask, and with --mask none is computed; leave it out{instead}."),
        (is_given(args, "no_paste_back"), ("feather",),
         "{} is the seam of what --no-paste-back switches off; leave one of the two out."),
        (is_given(args, "caption"), ("caption_model",),
         "--caption is there already, so {} has nothing to do; leave one out."),
        (not caption_serves, ("caption_model",),
         "{} describes the picture, but --source does already and nothing else needs it; leave one of the two out."),
        (not is_given(args, "source"), ("prompt_model",),
         "{} writes prompts about the concepts --source and --target; give --source, too."),
        (args.scheduler == "dpm", ("iterations",), "{} refines DDIM's inversion, not that of --scheduler dpm."),
        (not is_given(args, "sweep"), ("sweep_strengths", "sweep_guidances", "sweep_thresholds"),
         "{} is for a sheet; give its file by --sweep."),
        (is_given(args, "sweep") and args.output is None, ("grid", "overlay", "strip", "map"),
         "{} shows the one result that --output names; give -o, too."),
        (not args.model.lower().endswith(".safetensors"), ("config",),
         "{} goes with a --model that is a .safetensors file; leave it out."),
    ]  # fmt: skip
    for holds, names, sentence in rules:
        for name in names:
            if holds and is_given(args, name):
                raise InputError(sentence.format(option(f"no_{name}" if getattr(args, name) is False else name)))
    for name, what in (("revision", "models on the hub"), ("variant", "folders and models on the hub")):
        is_here = args.model == "demo" or Path(args.model).is_file() or name == "revision" and Path(args.model).is_dir()
        if is_given(args, name) and is_here:
            raise InputError(
                "{parameter} is for {what}, but --model is {model}; leave {parameter} out.",
                parameter=option(name),
                what=what,
                model=args.model,
            )


def check_outputs(
    outputs: Mapping[str, Any],
    inputs: Iterable[tuple[str, str | None]],
    extensions: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Paths that will be written: each can be, no two are one file, none is an input.

    Args:
        outputs: paths, or None, by the names in `args` of their options.
        inputs: what paths that are read are called, and these paths or None.
        extensions: what an output has to end in, by the same names; without, any picture's.
    """
    seen: dict[str, str] = {}
    for name, path in outputs.items():
        if path is None:
            continue
        writing.check_output_path(path, (extensions or {}).get(name))
        real = os.path.realpath(path)
        if real in seen:
            raise InputError(
                "{parameter} and --{other} are the same file {path}; give two names.",
                option(name),
                other=seen[real],
                path=path,
            )
        seen[real] = name
        for what, known in inputs:
            if known is not None and os.path.realpath(known) == real:
                raise InputError(
                    "{parameter} would overwrite {what} {known}; give another name.",
                    option(name),
                    what=what,
                    known=known,
                )
