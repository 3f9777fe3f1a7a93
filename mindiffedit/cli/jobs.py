"""One command's input: checked, read, fitted to the model, and at last the loaded pipeline.

Everything that can be wrong is found before a model runs, the cheapest first: numbers, options that contradict one
another, texts, output paths, the latents file, the picture and the mask, the files of models, the device. MindSpore is
imported for the last of these, so most errors answer at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib
import math
import os
import re
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from mindiffedit import demo, editing, masks, options
from mindiffedit.checkpoints import hub, survey, textual_inversion
from mindiffedit.cli.arguments import CORRECTIONS, MASK_FIELDS, MASK_NUMBERS, SCHEDULERS, defaults_of, option, told
from mindiffedit.cli.latents_file import read_latents
from mindiffedit.errors import InputError, InputTypeError, Message
from mindiffedit.images import colours, pictures, reading, writing
from mindiffedit.noise.generator import check_seed
from mindiffedit.outputs import DiffEditInversionPipelineOutput
from mindiffedit.runtime import devices
from mindiffedit.solvers import schedules

# Pictures of more than this many times the pixels that the model was made for are scaled down: far above its
# own size a model repeats objects, and memory grows with the square of the pixels.
AREA_FACTOR = 1.5

# Far above what any model works at, and what anyone waits for.
MAX_SIZE = 2**16
MAX_SAMPLES = 1000

__all__ = [
    "AREA_FACTOR",
    "Job",
    "begin",
    "check_names",
    "check_numbers",
    "check_outputs",
    "find_model",
    "fingerprint",
    "hushed",
    "load",
    "model_name",
    "read_pictures",
    "working_limits",
]


@dataclass
class Job:
    """One command's checked input, and what is learnt on the way."""

    args: Namespace
    settings: dict[str, Any]
    mask_options: masks.MaskOptions = editing.EDIT_MASK
    source: str | None = None
    target: str | None = None
    caption: str | None = None  # text of the inversion where it is not the source
    prompts: dict[str, list[str]] | None = None  # of --prompt-model, for "source" and "target"
    embeds: dict[str, Any] = field(default_factory=dict)  # of these prompts, (1, L, D)
    loras: list[tuple[str, float]] = field(default_factory=list)  # files and weights
    embeddings: list[tuple[str, str | None]] = field(default_factory=list)  # files and words; None: the file's own
    latents: np.ndarray | None = None
    clean_latents: np.ndarray | None = None  # None in an old file, too
    made: dict[str, Any] | None = None  # metadata of `latents`
    mask: PIL.Image.Image | None = None
    grid_mask: np.ndarray | None = None  # `mask` on the latents' grid, (1, h, w) in [0, 1]
    picture: PIL.Image.Image | None = None  # in its own mode and colours
    original: colours.Original | None = None  # the way back to these
    losses: list[str] = field(default_factory=list)  # sentences: what the result cannot keep of these
    folder: Path | None = None  # the model's, once it is here
    single_file: Path | None = None  # the model's, where it is one
    configs: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # of its components with weights
    factor: int = 0  # pixels per latent
    fitted: PIL.Image.Image | None = None  # the picture at the size the model works at
    device: str = ""
    scheduler: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    def note(self, text: str) -> None:
        """A sentence on stderr, unless --quiet."""
        if not self.args.quiet:
            print(f"note: {told(text, self.args.command)}", file=sys.stderr)

    @contextlib.contextmanager
    def timed(self, stage: str):
        """Adds the time of a block to `seconds`."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(self.seconds.get(stage, 0) + time.perf_counter() - start, 3)

    @property
    def computes_mask(self) -> bool:
        """Whether a mask is computed: where none was given, or one to combine with it."""
        return self.args.command != "invert" and (
            not given(self.args, "mask") or self.settings["mask_combine"] != "replace"
        )

    @property
    def inverted(self) -> DiffEditInversionPipelineOutput | None:
        """--latents as `edit()` takes them; None without."""
        if self.latents is None:
            return None
        return DiffEditInversionPipelineOutput(latents=self.latents, clean_latents=self.clean_latents)


def given(args: Namespace, name: str) -> bool:
    """Whether an option was given, be it as --no-..."""
    return getattr(args, name, None) is not None


@contextlib.contextmanager
def _as_option(parameter: str, name: str):
    """An error about a parameter of a function is one about the option, by its name in `args`, that went there."""
    try:
        yield
    except (InputError, InputTypeError) as error:
        raise error.renamed(**{parameter: option(name)}) from error


# --- checks that need no model ---------------------------------------------------------------------


def begin(args: Namespace, extensions: dict[str, Sequence[str]] | None = None, **outputs) -> Job:
    """Check numbers, texts and paths to write, read the latents file, and settle the defaults.

    `outputs` are options and their paths, `extensions` what some of these have to end in (others: any picture's).
    """
    check_names(args)
    check_numbers(vars(args))
    check_seed(args.seed, "--seed")
    job = Job(args, {}, _mask_options(args))
    job.loras = [_weighted(text) for text in getattr(args, "lora", None) or ()]
    job.embeddings = [_worded(text) for text in getattr(args, "embedding", None) or ()]
    _check_contradictions(args)
    _take_texts(job)
    if args.output is None and not given(args, "sweep"):
        raise InputError("--output is missing: give -o FILE, or --sweep FILE for a sheet to choose from.")
    check_outputs(job, outputs, extensions)
    if given(args, "latents"):
        _take_latents(job)
    if job.source is None and not given(args, "caption_model"):
        raise InputError("--source is missing: say what the picture shows.")
    _settle(job)
    guidance = job.settings["guidance"]
    if given(args, "negative") and guidance <= 1 and not given(args, "sweep"):
        raise InputError(
            "{parameter} is what guidance leads away from, and --guidance {guidance:g} is without; give --guidance above "
            "1, or leave {parameter} out.",
            parameter="--negative",
            guidance=guidance,
        )
    steps, strength = job.settings["steps"], job.settings["strength"]
    if args.command != "mask":
        options.effective_steps(steps, strength, "--strength")
    if job.computes_mask:
        options.effective_steps(steps, job.settings["mask_strength"], "--mask-strength")
        if job.source == job.target:
            raise InputError("--source and --target are the same text: there is nothing to change.")
    return job


def check_names(args: Namespace) -> None:
    """Names of files and models that none can have: nothing, as an unset variable of a shell makes it, or too long."""
    for name, value in vars(args).items():
        if name in ("source", "target", "caption") or name.endswith("negative") or name.startswith("sweep_"):
            continue  # texts, and lists of numbers
        told_as = name.upper() if name in ("picture", "golden") else option(name)
        for text in value if isinstance(value, list) else [value]:
            if text == "":
                raise InputError("{parameter} is empty; give it a value.", told_as)
            if isinstance(text, str) and "\0" in text:
                raise InputError("{parameter} has a zero character in it: {text!r}; leave it out.", told_as, text=text)
            if isinstance(text, str) and not _ADDRESS.match(text) and _is_too_long(text):
                raise InputError("{parameter} is too long to be a name: {text!r}.", told_as, text=text)


_ADDRESS = re.compile(r"\s*(https?|data|file):", re.IGNORECASE)


def _is_too_long(path: str) -> bool:
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    return False


def check_numbers(values: dict[str, Any]) -> None:
    """Check the numbers among `values`, by option name; None was not given."""
    checks = {
        "steps": options.check_steps,
        "strength": options.check_strength,
        "guidance": options.check_guidance_scale,
        "invert_guidance": options.check_guidance_scale,
        "mask_strength": options.check_strength,
        "mask_threshold": options.check_ratio,
        "maps": lambda value, name: options.check_steps(value, name, MAX_SAMPLES),
        "size": lambda value, name: options.check_steps(value, name, MAX_SIZE),
        "iterations": lambda value, name: options.check_count(value, name, options.MAX_ITERATIONS),
        "feather": lambda value, name: options.check_at_least_zero(value, name, editing.MAX_FEATHER),
        "outliers": lambda value, name: options.check_quantile(None if value == "none" else value, name),
    }
    for name, check in checks.items():
        value = values.get(name)
        if value is not None:
            check(value, option(name))


def _mask_options(args: Namespace) -> masks.MaskOptions:
    """`edit()`'s, with what was given."""
    shaped = editing.EDIT_MASK
    for name, part in MASK_FIELDS.items():
        value = getattr(args, name, None)
        if value is not None:
            with _as_option(part, name):
                shaped = dataclasses.replace(shaped, **{part: value})
    return shaped


def _weighted(text: str) -> tuple[str, float]:
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
            "{parameter} {text}: the weight has to be a finite number, but is {weight!r}.",
            parameter="--lora",
            text=text,
            weight=weight,
        )
    return path, number


def _worded(text: str) -> tuple[str, str | None]:
    """File and word of FILE or FILE=WORD; a file whose name has a "=" is a file."""
    found = re.fullmatch(r"(.+\.safetensors)=(.*)", text, re.IGNORECASE | re.DOTALL)
    if found is None or os.path.exists(text):
        return text, None
    if not found[2].strip():
        raise InputError(f"--embedding {text}: there is no word after the '='; give one, or leave the '=' out.")
    return found[1], found[2].strip()


def _check_contradictions(args: Namespace) -> None:
    """Options that make one another mean nothing, or that miss one another."""
    shaping = [name for name in MASK_FIELDS if name != "soft_mask"]
    combines = getattr(args, "mask_combine", None) not in (None, "replace")
    replaces = given(args, "mask") and not combines
    instead = "" if args.reference else ", or give --mask-combine union, subtract or intersection"
    inverts = args.command != "mask" and getattr(args, "inversion", None) != "noise"
    caption_serves = not given(args, "source") or (inverts and args.command != "invert" and not args.reference)
    # Where the condition holds, none of the options may be given.
    rules = [
        (args.reference, CORRECTIONS,
         "--reference runs the reference's own calls, which do not know {}; leave one of the two out."),
        (args.reference and args.command == "mask", ("mask",),
         "--reference runs the reference's own call, which combines no masks; leave {} or --reference out."),
        (not inverts, ("latents", "iterations", "invert_guidance", "caption"),
         "--inversion noise inverts nothing, so {} means nothing with it; leave one of the two out."),
        (given(args, "latents"),
         ("inversion", "iterations", "invert_guidance", "caption", "caption_model", "sweep_strengths"),
         "--latents is a finished inversion, so {} means nothing with it; leave one of the two out."),
        (not given(args, "mask"), ("mask_combine",),
         "{} says what becomes of --mask, which is missing; give --mask FILE."),
        (args.command == "mask" and replaces, ("mask",),
         "{} is combined with the computed mask; give --mask-combine union, subtract or intersection."),
        (replaces, (*shaping, "outliers", *MASK_NUMBERS),
         f"{{}} is for the computed mask, and with --mask none is computed; leave it out{instead}."),
        (given(args, "no_paste_back"), ("feather",),
         "{} is the seam of what --no-paste-back switches off; leave one of the two out."),
        (given(args, "caption"), ("caption_model",), "--caption is there already, so {} has nothing to do; leave one out."),
        (not caption_serves, ("caption_model",),
         "{} describes the picture, but --source does already and nothing else needs it; leave one of the two out."),
        (not given(args, "source"), ("prompt_model",),
         "{} writes prompts about the concepts --source and --target; give --source, too."),
        (args.scheduler == "dpm", ("iterations",), "{} refines DDIM's inversion, not that of --scheduler dpm."),
        (not given(args, "sweep"), ("sweep_strengths", "sweep_guidances", "sweep_thresholds"),
         "{} is for a sheet; give its file by --sweep."),
        (given(args, "sweep") and args.output is None, ("grid", "overlay", "strip", "map"),
         "{} shows the one result that --output names; give -o, too."),
        (not args.model.lower().endswith(".safetensors"), ("config",),
         "{} goes with a --model that is a .safetensors file; leave it out."),
    ]  # fmt: skip
    for holds, names, sentence in rules:
        for name in names:
            if holds and given(args, name):
                raise InputError(sentence.format(option(f"no_{name}" if getattr(args, name) is False else name)))
    for name, what in (("revision", "models on the hub"), ("variant", "folders and models on the hub")):
        here = args.model == "demo" or Path(args.model).is_file() or (name == "revision" and Path(args.model).is_dir())
        if given(args, name) and here:
            raise InputError(
                "{parameter} is for {what}, but --model is {model}; leave {parameter} out.",
                parameter=option(name),
                what=what,
                model=args.model,
            )


def _take_texts(job: Job) -> None:
    args = job.args
    if args.command != "invert":
        job.target = _text(args.target, "--target")
    if args.source is not None:
        # The empty text is a reference prompt, too; not to invert along, nor a concept.
        may_be_empty = args.command != "invert" and not given(args, "prompt_model")
        job.source = (_encodable if may_be_empty else _text)(args.source, "--source")
    for name in ("negative", "caption"):
        if getattr(args, name, None) is not None:
            _encodable(getattr(args, name), option(name))
    job.caption = getattr(args, "caption", None)


def _text(value: str, name: str) -> str:
    if not value.strip():
        raise InputError("{parameter} is empty; give a short description of the picture.", parameter=name)
    return _encodable(value, name)


def _encodable(value: str, name: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            "{parameter} is not valid UTF-8 text; check the terminal's encoding.", parameter=name
        ) from None
    return value


def check_outputs(job: Job, outputs: dict[str, Any], extensions=None) -> None:
    """Paths that will be written: each can be, no two are one file, none is an input."""
    args = job.args
    inputs = {"the picture": [args.picture], "--model": [args.model]}
    for name in ("mask", "latents"):
        inputs[option(name)] = [getattr(args, name, None)]
    inputs["--lora"] = [path for path, _ in job.loras]
    inputs["--embedding"] = [path for path, _ in job.embeddings]
    seen: dict[str, str] = {}
    for name, path in outputs.items():
        if path is None:
            continue
        with _as_option("path", name):
            writing.check_output_path(path, (extensions or {}).get(name))
        real = os.path.realpath(path)
        if real in seen:
            raise InputError(
                "{parameter} and --{other} are the same file {path}; give two names.",
                parameter=option(name),
                other=seen[real],
                path=path,
            )
        seen[real] = name
        for other, paths in inputs.items():
            for known in paths:
                if known is not None and os.path.realpath(known) == real:
                    raise InputError(
                        "{parameter} would overwrite {other} {known}; give another name.",
                        parameter=option(name),
                        other=other,
                        known=known,
                    )


def _take_latents(job: Job) -> None:
    """Read --latents and compare what it was made with to what the edit is asked for."""
    args = job.args
    path = args.latents
    job.latents, job.clean_latents, job.made = read_latents(path)
    if job.made["scheduler"] not in SCHEDULERS:
        raise InputError(
            "{path} is damaged (the scheduler {scheduler!r} is unknown); invert anew.",
            path=path,
            scheduler=job.made["scheduler"],
        )
    if job.clean_latents is None and not args.reference:
        raise InputError(
            "{path} was written by an older version, without the clean latents that the edit ends with; invert anew, "
            "or give --reference.",
            path=path,
        )
    for name in ("steps", "strength", "scheduler"):
        asked = getattr(args, name)
        if asked is not None and asked != job.made[name]:
            raise InputError(
                "{path} was made with {parameter} {made}, but {parameter} is {asked}; leave it out or invert anew.",
                parameter=option(name),
                path=path,
                made=job.made[name],
                asked=asked,
            )
    if args.size is not None:
        raise InputError(
            "{parameter} cannot be given with --latents: {path} says the size; leave it out.",
            "--size",
            path=path,
        )
    if job.made["model"] != model_name(args.model):
        where = Message(
            "{path} was made with the model {made}, not with {asked}",
            path=path,
            made=job.made["model"],
            asked=model_name(args.model),
        )
        if os.path.isdir(args.model) and os.path.isabs(job.made["model"]):
            job.note(f"{where}; this is right only if the folder was moved.")
        else:
            raise InputError("{where}; give that {parameter} or invert anew.", "--model", where=where)
    if job.source is None:
        job.source = job.made["prompt"]


def model_name(model: str) -> str:
    """'demo', the absolute path of a folder or file, or a hub id."""
    return os.path.abspath(model) if model != "demo" and os.path.exists(model) else model


def _settle(job: Job) -> None:
    """Settings: what was given, what the latents were made with, the demo model's, the defaults."""
    args = job.args
    for name, default in defaults_of(args.command, args.reference, args.model == "demo").items():
        value = getattr(args, name, None)
        if value is None and job.made is not None and name in ("steps", "strength"):
            value = job.made[name]
        job.settings[name] = default if value is None else value
    if job.settings["invert_guidance"] is None:
        job.settings["invert_guidance"] = job.settings["guidance"]
    if job.settings["outliers"] == "none":
        job.settings["outliers"] = None


def read_pictures(job: Job) -> None:
    """The picture and --mask, and what can be said about them without the model."""
    args = job.args
    # Not made RGB on the way: the result has the picture's own mode and colours.
    job.picture = reading.load_image(args.picture, convert_method=lambda picture: picture)
    job.original = colours.Original(job.picture)
    if args.command == "edit" and args.output is not None:
        result = job.original.rewritten(job.original.shown)
        job.losses = job.original.losses + colours.fit_format(result, writing.format_of(args.output))[1]
        for loss in job.losses:
            job.note(loss)
    if job.made is not None and job.made["picture_sha256"] != fingerprint(job.original.shown):
        raise InputError(
            "{latents} was made from another picture (of {size} pixels) than {picture}; invert this one.",
            latents=args.latents,
            size=job.made["picture_size"],
            picture=args.picture,
        )
    if given(args, "mask"):
        # No conversion to RGB on the way: transparency and the luminance of wide greyscale are kept.
        with _as_option("image", "mask"):
            job.mask = reading.load_image(args.mask, convert_method=lambda mask: mask)
        if args.reference:
            masks.preprocess_mask(job.mask)
        else:
            _user_mask(job, (1, 1))


def fingerprint(picture: PIL.Image.Image) -> str:
    """Of the colours shown, in RGB, not of the file: the same picture in another file is the same picture."""
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


# --- the model -------------------------------------------------------------------------------------


def find_model(job: Job) -> None:
    """Judge the files of models on this machine; a hub id is only looked at."""
    args = job.args
    for name, paths in (
        ("--lora", [path for path, _ in job.loras]),
        ("--embedding", [path for path, _ in job.embeddings]),
    ):
        for path in paths:
            _check_weights_file(path, name)
    _take_words(job)
    for name in ("config", "prompt_model", "caption_model"):
        if given(args, name):
            _check_name(getattr(args, name), option(name))
    model = args.model
    if model == "demo":
        job.folder = demo.checkpoint_folder()
    elif model.lower().endswith(".safetensors") and not os.path.isdir(model):
        _check_weights_file(model, "--model")
        job.single_file = Path(model)
        return
    elif _check_name(model, "--model"):
        job.folder = Path(model)
    else:
        return
    _check_folder(job)


def _take_words(job: Job) -> None:
    """The words of embeddings, each of another one."""
    files: dict[str, str] = {}
    for path, word in job.embeddings:
        word = textual_inversion.word_of(path) if word is None else word
        if word in files:
            raise InputError(
                f"--embedding {files[word]} and {path} have the same word {word!r}; give one another by FILE=WORD."
            )
        files[word] = path
    job.embeddings = [(path, word) for word, path in files.items()]


def _check_weights_file(path: str, name: str) -> None:
    if not path.lower().endswith(".safetensors"):
        raise InputError(
            "{parameter} {path}: only .safetensors files are read, since others can run code; {remedy}.",
            parameter=name,
            path=path,
            # As prompts of other programs have it.
            remedy="a weight or a word follows after '='" if ".safetensors:" in path.lower() else "convert it",
        )
    if not os.path.isfile(path):
        raise InputError("{parameter} {path}: there is no such file.", parameter=name, path=path)


def _check_name(model: str, name: str) -> bool:
    """Whether the model is a folder on this machine, or else may be a hub id."""
    if os.path.isdir(model):
        return True
    if os.path.exists(model):
        also = " or a .safetensors file" if name == "--model" else ""
        raise InputError(
            "{parameter} {model} is a file; give a folder in its library's layout{also}.",
            parameter=name,
            model=model,
            also=also,
        )
    parts = model.split("/")
    if len(parts) != 2 or not all(parts) or model.startswith((".", "~")):
        raise InputError(
            "{parameter} {model}: there is no such folder, and a hub id is organisation/name.",
            parameter=name,
            model=model,
        )
    return False


def _check_folder(job: Job) -> None:
    """Find an unusable folder before MindSpore is imported, and fit the pictures to what it says."""
    job.configs = survey.check_folder(job.folder, _skipped(job.args), getattr(job.args, "variant", None))
    _fit(job)


def _skipped(args: Namespace) -> tuple[str, ...]:
    """Components of the model that are not wanted."""
    return ("safety_checker",) if args.no_safety_checker else ()


def _fit(job: Job) -> None:
    """Bring the picture to a size the model can work at, and judge --mask and --latents by it."""
    job.factor, most_pixels = working_limits(job.configs, job.settings["size"])
    if job.made is not None:
        working = job.made["working_size"]
        if any(side % job.factor for side in working):
            raise InputError(
                "{latents} was made at {width} x {height}, which is not a multiple of {factor}, the pixels per latent "
                "of this model; invert anew.",
                latents=job.args.latents,
                width=working[0],
                height=working[1],
                factor=job.factor,
            )
        job.fitted = pictures.restore_size(job.original.shown, working)
    else:
        job.fitted, notice = pictures.fit_picture(job.original.shown, job.factor, most_pixels)
        if notice is not None:
            job.note(notice)
    grid = tuple(side // job.factor for side in job.fitted.size)
    if job.mask is not None:
        job.grid_mask = _on_grid(job, grid)
    if job.latents is not None:
        channels = job.configs["vae"].get("latent_channels", 4)
        steps = options.effective_steps(job.settings["steps"], job.settings["strength"], "--strength")
        options.check_image_latents(job.latents, 1, steps, (channels, grid[1], grid[0]), "--latents")


def _on_grid(job: Job, grid: tuple[int, int]) -> np.ndarray:
    """--mask as it goes to the edit: (1, h, w), of 0 and 1 unless masks are soft."""
    if job.args.reference:
        return masks.fit_mask(job.mask, job.picture.size, grid, job.factor)[:, 0]
    # Its shape is judged by the picture's, which the grid may cut by some pixels.
    width, height = job.picture.size
    if abs(job.mask.width * height / job.mask.height - width) > 1 + 0.05 * width:
        job.note(
            f"--mask is {job.mask.width} x {job.mask.height}, not of the shape of the picture, {width} x {height}; it is "
            f"stretched."
        )
    return _user_mask(job, (grid[1], grid[0]))


def _user_mask(job: Job, size: tuple[int, int]) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of its shape, which is judged by the picture's
        return masks.user_mask(job.mask, size, name="--mask", soft=job.mask_options.soft)


def working_limits(configs: Mapping[str, Mapping[str, Any]], size: int | None) -> tuple[int, int]:
    """Pixels per latent of a model, and the most pixels that it works at; `size` is --size."""
    levels = configs["vae"].get("block_out_channels")
    factor = 2 ** (len(levels) - 1) if isinstance(levels, (list, tuple)) and levels else 8
    if size is not None:
        return factor, size**2
    native = configs["unet"].get("sample_size") or 64
    height, width = native if isinstance(native, (list, tuple)) else (native, native)
    return factor, int(AREA_FACTOR * height * width * factor**2)


@contextlib.contextmanager
def hushed():
    """Hold back what libraries print and deprecate while they are imported; it says nothing to our user."""
    if "mindspore" not in sys.modules:
        os.environ.setdefault("GLOG_v", "3")  # errors only: its warnings are for MindSpore's developers
    # transformers advises to install torch; only its tokenizer and configs are used here. When mindone is
    # imported it puts its own switch in place of that of transformers, and the advice comes once more.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("DIFFUSERS_NO_ADVISORY_WARNINGS", "1")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def load(job: Job):
    """The pipeline, on the device asked for. From here on MindSpore is imported."""
    with job.timed("load"), hushed():
        try:
            job.device = devices.require_device(job.args.device)
        except RuntimeError as error:
            raise InputError(" ".join(str(error).split())) from error
    # These models first, so that they are gone when the large one comes.
    _write_caption(job)
    _write_prompts(job)
    with job.timed("load"), hushed():
        pipe = _load_pipeline(job)
        _choose_scheduler(job, pipe)
        _load_adapters(job, pipe)
    if job.single_file is not None:
        job.configs = {name: pipe.components[name].config for name in ("vae", "unet")}
        _fit(job)
    if job.prompts is not None:
        with job.timed("prompts"):
            average = importlib.import_module("mindiffedit.text.prompts").average_embeddings
            job.embeds = {which: average(pipe, texts) for which, texts in job.prompts.items()}
    _note_idle_words(job, pipe)
    return pipe


def _load_pipeline(job: Job):
    args = job.args
    variant = {} if getattr(args, "variant", None) is None else {"variant": args.variant}
    how = dict(
        mode=args.mode,
        compile_cache=False if args.no_cache else None,
        mindspore_dtype=args.dtype,
    )
    if args.no_safety_checker:
        how.update(safety_checker=None, requires_safety_checker=False)
    pipeline = importlib.import_module("mindiffedit.pipeline").StableDiffusionDiffEditPipeline
    if job.single_file is not None:
        return pipeline.from_single_file(
            str(job.single_file), config=args.config, local_files_only=True if args.offline else None, **how
        )
    if job.folder is None:
        options = hub.HubOptions(revision=args.revision, local_files_only=args.offline)
        job.folder = hub.resolve_folder(args.model, options, skip=_skipped(args), **variant)
        _check_folder(job)
    return pipeline.from_pretrained(str(job.folder), local_files_only=True, **how, **variant)


def _choose_scheduler(job: Job, pipe) -> None:
    """The solver asked for, or the model's own where it can be inverted, or DDIM; with its inverse."""
    args = job.args
    own, config = type(pipe.scheduler).__name__, pipe.scheduler.config
    wanted = args.scheduler or (job.made["scheduler"] if job.made is not None else None)
    known = next((name for name, (forward, _) in SCHEDULERS.items() if forward == own), None)
    inverts = args.command != "mask" and job.settings["inversion"] != "noise"
    why_not = schedules.why_not(config) if inverts else ""
    if wanted == "dpm" and why_not:
        raise InputError(
            f"--scheduler dpm: the model's {own} cannot be inverted with {why_not}; give --scheduler ddim."
        )
    if known == "dpm" and why_not:
        known = None
    job.scheduler = wanted or known or "ddim"
    if job.scheduler == "dpm" and inverts and job.settings["iterations"]:
        raise InputError(
            f"--iterations refines DDIM's inversion, and the model's solver is {own}; give --scheduler ddim."
        )
    forward, inverse = SCHEDULERS[job.scheduler]
    as_there = job.scheduler == known or (args.reference and job.scheduler == "ddim")
    options_ = {} if as_there else schedules.suited(forward, config)
    if wanted is None and known is None:
        spacing = options_.get("timestep_spacing")
        job.note(
            f"the model's {own} cannot be inverted{f' with {why_not}' if why_not else ''}, so DDIM is taken"
            f"{f', its timesteps spaced as {spacing!r}' if spacing else ''}; --scheduler chooses."
        )
    schedulers = importlib.import_module("mindiffedit.solvers.schedulers")
    pipe.scheduler = getattr(schedulers, forward).from_config(config, **options_)
    pipe.inverse_scheduler = getattr(schedulers, inverse).from_config(config, **options_)


def _note_idle_words(job: Job, pipe) -> None:
    """Say which embeddings are in no prompt, and which words of prompts look like ones that were to be loaded."""
    texts = [job.source, job.target, job.caption, getattr(job.args, "negative", None)]
    texts += sum((job.prompts or {}).values(), [])
    text = "\n".join(filter(None, texts))
    words = [word for _, word in job.embeddings]
    used = textual_inversion.occurring(words, text)
    for path, word in job.embeddings:
        if word not in used:
            near = textual_inversion.occurring([word, Path(path).stem], text, re.IGNORECASE)
            job.note(
                f"the word {word!r} of --embedding {path} is in no prompt, so it changes nothing; "
                + (f"{near[0]!r} is, which has to be written {word!r}." if near else "write it there just so.")
            )
    for word in sorted([*words, *pipe.tokenizer.added_tokens_encoder], key=len, reverse=True):
        text = text.replace(word, " ")
    for word in sorted(set(re.findall(r"<lora:[^<>\n]+>|<[^<>\s]+>", text))):
        what, name = ("LoRA", "--lora") if word.startswith("<lora:") else ("embedding", "--embedding")
        job.note(f"{word} in a prompt stands for no {what} that is loaded and is read as plain text; give {name} FILE.")


def _load_adapters(job: Job, pipe) -> None:
    for path, word in job.embeddings:
        pipe.load_textual_inversion(path, token=word)
    names = [f"lora_{i}" for i in range(len(job.loras))]
    for name, (path, _) in zip(names, job.loras):
        pipe.load_lora_weights(path, adapter_name=name)
    if names:
        pipe.set_adapters(names, [weight for _, weight in job.loras])


def _writers(job: Job) -> tuple[Any, dict[str, Any]]:
    """The module of the models that write, and how they are loaded."""
    args = job.args
    return importlib.import_module("mindiffedit.text.prompts"), dict(
        mode=args.mode,
        compile_cache=False if args.no_cache else None,
        local_files_only=True if args.offline else None,
    )


def _write_caption(job: Job) -> None:
    """--caption-model: what the picture shows, for the inversion, and as the source where that is missing."""
    if not given(job.args, "caption_model"):
        return
    with job.timed("caption"), hushed():
        module, how = _writers(job)
        captioner = module.Captioner.from_pretrained(job.args.caption_model, **how)
        job.caption = captioner.caption(job.original.shown)
    job.note(f"the picture's caption: {job.caption}")
    if job.source is None:
        job.source = job.caption


def _write_prompts(job: Job) -> None:
    """--prompt-model: prompts about the source and about the target."""
    if not given(job.args, "prompt_model"):
        return
    with job.timed("prompts"), hushed():
        module, how = _writers(job)
        writer = module.PromptGenerator.from_pretrained(job.args.prompt_model, **how)
        concepts = {"source": job.source, "target": job.target}
        job.prompts = {}
        for which, concept in concepts.items():
            with _as_option("text", which), _as_option("concept", which):
                job.prompts[which] = writer.prompts_for(concept, generator=job.args.seed)
    for which, texts in job.prompts.items():
        job.note(f"{len(texts)} prompts about the {which} {concepts[which]!r}, such as {texts[0]!r}.")
