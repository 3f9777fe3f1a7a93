"""One command's input: checked, read, and fitted to the model.

Everything that can be wrong is found before a model runs, the cheapest first: numbers, options that contradict one
another, texts, output paths, the latents file (`begin`); the picture and the mask (`read_pictures`); the files of
models and the device (`loading`). MindSpore is imported for the last of these, so most errors answer at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from mindiffedit import inputs, masks, options
from mindiffedit.cli import checks
from mindiffedit.cli.arguments import defaults_of
from mindiffedit.cli.checks import is_given
from mindiffedit.cli.latents_file import read_latents
from mindiffedit.cli.wording import about, note, option
from mindiffedit.errors import InputError, Message
from mindiffedit.images import colours, pictures, reading, writing
from mindiffedit.noise.generator import check_seed
from mindiffedit.outputs import DiffEditInversionPipelineOutput

# Pictures of more than this many times the pixels that the model was made for are scaled down: far above its
# own size a model repeats objects, and memory grows with the square of the pixels.
AREA_FACTOR = 1.5


@dataclass
class Job:
    """One command's checked input, and what is learnt on the way."""

    args: Namespace
    settings: dict[str, Any] = field(default_factory=dict)
    mask_options: masks.MaskOptions = inputs.EDIT_MASK
    source: str | None = None
    target: str | None = None
    caption: str | None = None  # text of the inversion where it is not the source
    prompts: dict[str, list[str]] | None = None  # of --prompt-model, for "source" and "target"
    embeds: dict[str, Any] = field(default_factory=dict)  # of these prompts, (1, L, D)
    loras: list[tuple[str, float]] = field(default_factory=list)  # files and weights
    embeddings: list[tuple[str, str | None]] = field(default_factory=list)  # files and words; None: the file's own
    latents: np.ndarray | None = None
    clean_latents: np.ndarray | None = None  # None in an old file, too
    recipe: dict[str, Any] | None = None  # how `latents` were made
    mask: PIL.Image.Image | None = None
    grid_mask: np.ndarray | None = None  # `mask` on the latents' grid, (1, h, w) in [0, 1]
    picture: PIL.Image.Image = field(init=False)  # in its own mode and colours
    original: colours.Original = field(init=False)  # the way back to these
    losses: list[str] = field(default_factory=list)  # sentences: what the result cannot keep of these
    folder: Path | None = None  # the model's, once it is here
    single_file: Path | None = None  # the model's, where it is one
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of its components with weights
    factor: int = 0  # pixels per latent
    fitted: PIL.Image.Image = field(init=False)  # the picture at the size the model works at
    device: str = ""
    scheduler: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self, stage: str):
        """Adds the time of a block to `seconds`."""
        start = time.perf_counter()
        yield
        self.add_seconds(stage, time.perf_counter() - start)

    def add_seconds(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = round(self.seconds.get(stage, 0) + seconds, 3)

    @property
    def computes_mask(self) -> bool:
        """Whether a mask is computed: where none was given, or one to combine with it."""
        return self.args.command != "invert" and (
            not is_given(self.args, "mask") or self.settings["mask_combine"] != "replace"
        )

    @property
    def inverts(self) -> bool:
        """Whether the solver is run backwards, now or when --latents were made."""
        return self.args.command != "mask" and self.settings["inversion"] != "noise"

    @property
    def masked_by_inversion(self) -> bool:
        """Whether `edit()` makes the mask of its inversion: by its preset, where no maps of noise are asked for."""
        args = self.args
        if args.command not in ("edit", "demo") or args.reference or is_given(args, "sweep") or not self.computes_mask:
            return False
        evaluations = inputs.Evaluations.checked(
            self.settings["preset"],
            inverts=self.inverts and self.latents is None,
            tabulated=True,  # as all of --scheduler's are
            by_noise=is_given(args, "maps") or is_given(args, "mask_strength"),
            inversion_iterations=self.settings["iterations"],
            inversion_maps=None,
        )
        return evaluations.inversion_maps > 0

    @property
    def inverted(self) -> DiffEditInversionPipelineOutput | None:
        """--latents as `edit()` takes them; None without."""
        if self.latents is None:
            return None
        return DiffEditInversionPipelineOutput(latents=self.latents, clean_latents=self.clean_latents)

    @property
    def inputs(self) -> list[tuple[str, str | None]]:
        """What the paths that are read are called, and these paths."""
        args = self.args
        paths = [("the picture", args.picture), ("--model", args.model)]
        paths += [(option(name), getattr(args, name, None)) for name in ("mask", "latents")]
        paths += [("--lora", path) for path, _ in self.loras]
        return paths + [("--embedding", path) for path, _ in self.embeddings]


# --- checks that need no picture -------------------------------------------------------------------


def begin(args: Namespace, extensions: Mapping[str, Sequence[str]] | None = None, **outputs) -> Job:
    """Check numbers, texts and paths to write, read the latents file, and settle the defaults.

    `outputs` are options and their paths, `extensions` what some of these have to end in (others: any picture's).
    Without an `output` among them the result stays in memory.
    """
    checks.check_names(args)
    checks.check_numbers(vars(args))
    check_seed(args.seed, "--seed")
    job = Job(args, mask_options=checks.mask_options_of(args))
    job.loras = [checks.lora_of(text) for text in getattr(args, "lora", None) or ()]
    job.embeddings = [checks.embedding_of(text) for text in getattr(args, "embedding", None) or ()]
    checks.check_contradictions(args)
    job.target = checks.text_of(args, "target", may_be_empty=False)
    # The empty text is a reference prompt, too; not to invert along, nor a concept.
    job.source = checks.text_of(args, "source", args.command != "invert" and not is_given(args, "prompt_model"))
    checks.text_of(args, "negative", may_be_empty=True)
    job.caption = checks.text_of(args, "caption", may_be_empty=True)
    if "output" in outputs and args.output is None and not is_given(args, "sweep"):
        raise InputError("--output is missing: give -o FILE, or --sweep FILE for a sheet to choose from.")
    checks.check_outputs(outputs, job.inputs, extensions)
    if is_given(args, "latents"):
        _take_latents(job)
    if job.source is None and not is_given(args, "caption_model"):
        raise InputError("--source is missing: say what the picture shows.")
    _settle(job)
    return job


def _take_latents(job: Job) -> None:
    """Read --latents and compare what it was made with to what the edit is asked for."""
    args, path = job.args, job.args.latents
    job.latents, job.clean_latents, job.recipe = read_latents(path)
    if job.clean_latents is None and not args.reference:
        raise InputError(
            "{path} was written by an older version, without the clean latents that the edit ends with; invert anew, "
            "or give --reference.",
            path=path,
        )
    for name in ("steps", "strength", "scheduler"):
        value = getattr(args, name)
        if value is not None and value != job.recipe[name]:
            raise InputError(
                "{path} was made with {parameter} {recipe}, but {parameter} is {value}; leave it out or invert anew.",
                option(name),
                path=path,
                recipe=job.recipe[name],
                value=value,
            )
    if args.size is not None:
        raise InputError(
            "{parameter} cannot be given with --latents: {path} says the size; leave it out.", "--size", path=path
        )
    model, name = job.recipe["model"], model_name(args.model)
    if model != name:
        where = Message("{path} was made with the model {model}, not with {name}", path=path, model=model, name=name)
        if not os.path.isdir(args.model) or not os.path.isabs(model):
            raise InputError("{where}; give that {parameter} or invert anew.", "--model", where=where)
        note(f"{where}; this is right only if the folder was moved.")
    if job.source is None:
        job.source = job.recipe["prompt"]


def model_name(model: str) -> str:
    """'demo', the absolute path of a folder or file, or a hub id."""
    return os.path.abspath(model) if model != "demo" and os.path.exists(model) else model


def _settle(job: Job) -> None:
    """Settings: what was given, what the latents were made with, the demo model's, the defaults."""
    args, settings = job.args, job.settings
    recipe = {name: job.recipe[name] for name in ("steps", "strength")} if job.recipe is not None else {}
    for name, default in {**defaults_of(args.command, args.reference, args.model == "demo"), **recipe}.items():
        settings[name] = getattr(args, name) if is_given(args, name) else default
    if job.masked_by_inversion:
        job.mask_options = checks.mask_options_of(args, inputs.INVERSION_MASK)
    if settings["invert_guidance"] is None:
        settings["invert_guidance"] = settings["guidance"]
    if settings["outliers"] == "none":
        settings["outliers"] = None
    if is_given(args, "negative") and settings["guidance"] <= 1 and not is_given(args, "sweep"):
        raise InputError(
            "{parameter} is what guidance leads away from, and --guidance {guidance:g} is without; give --guidance "
            "above 1, or leave {parameter} out.",
            parameter="--negative",
            guidance=settings["guidance"],
        )
    if args.command != "mask":
        options.effective_steps(settings["steps"], settings["strength"], "--strength")
    if job.computes_mask:
        options.effective_steps(settings["steps"], settings["mask_strength"], "--mask-strength")
        if job.source == job.target:
            raise InputError("--source and --target are the same text: there is nothing to change.")


# --- pictures --------------------------------------------------------------------------------------


def read_pictures(job: Job) -> None:
    """The picture and --mask, from paths or in memory, and what can be said about them without the model."""
    args = job.args
    job.picture = reading.load_as_is(args.picture)
    job.original = colours.Original(job.picture)
    if args.command == "edit" and args.output is not None:
        result = job.original.rewritten(job.original.shown)
        job.losses = job.original.losses + colours.fit_format(result, writing.format_of(args.output))[1]
        for loss in job.losses:
            note(loss)
    if job.recipe is not None and job.recipe["picture_sha256"] != fingerprint(job.original.shown):
        raise InputError(
            "{latents} was made from another picture (of {size} pixels) than {picture}; invert this one.",
            latents=args.latents,
            size=job.recipe["picture_size"],
            picture=args.picture,
        )
    if is_given(args, "mask"):
        with about("mask", "image"):
            job.mask = reading.load_as_is(args.mask)
        if args.reference:
            masks.preprocess_mask(job.mask)
        else:
            _user_mask(job, (1, 1))


def fingerprint(picture: PIL.Image.Image) -> str:
    """Of the colours shown, in RGB, not of the file: the same picture in another file is the same picture."""
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


def fit(job: Job) -> None:
    """Bring the picture to a size the model can work at, by its `configs`, and judge --mask and --latents by it."""
    job.factor, max_pixels = working_limits(job.configs, job.settings["size"])
    if job.recipe is not None:
        size = job.recipe["working_size"]
        if any(side % job.factor for side in size):
            raise InputError(
                "{latents} was made at {width} x {height}, which is not a multiple of {factor}, the pixels per latent "
                "of this model; invert anew.",
                latents=job.args.latents,
                width=size[0],
                height=size[1],
                factor=job.factor,
            )
        job.fitted = pictures.restore_size(job.original.shown, size)
    else:
        job.fitted, notice = pictures.fit_picture(job.original.shown, job.factor, max_pixels)
        if notice is not None:
            note(notice)
    grid = job.fitted.width // job.factor, job.fitted.height // job.factor
    if job.mask is not None:
        job.grid_mask = _mask_on_grid(job, job.mask, grid)
    if job.latents is not None:
        channels = job.configs["vae"].get("latent_channels", 4)
        steps = options.effective_steps(job.settings["steps"], job.settings["strength"], "--strength")
        options.check_image_latents(job.latents, 1, steps, (channels, grid[1], grid[0]), "--latents")


def _mask_on_grid(job: Job, mask: PIL.Image.Image, grid: tuple[int, int]) -> np.ndarray:
    """--mask as it goes to the edit: (1, h, w), of 0 and 1 unless masks are soft."""
    if job.args.reference:
        return masks.fit_mask(mask, job.picture.size, grid, job.factor)[:, 0]
    # Its shape is judged by the picture's, which the grid may cut by some pixels.
    width, height = job.picture.size
    if abs(mask.width * height / mask.height - width) > 1 + 0.05 * width:
        note(
            f"--mask is {mask.width} x {mask.height}, not of the shape of the picture, {width} x {height}; it "
            f"is stretched."
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
