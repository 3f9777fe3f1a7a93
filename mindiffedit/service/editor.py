"""An editor of pictures in memory: one model, loaded once, and what the commands `edit` and `mask` do with it.

The page, the server and the batch stand on it. Options are those of `mindiffedit edit`, checked by the same code, and
no option names a file: what others send can neither be read from a path nor be written to one.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image

from mindiffedit.cli import loading, results, runs
from mindiffedit.cli.arguments import MASK_NUMBERS, build_parser, options_of
from mindiffedit.cli.job import Job, begin, fingerprint, fit, read_pictures
from mindiffedit.cli.wording import MASK_FIELDS, on_one_line, option, option_of, told
from mindiffedit.errors import MAX_TEXT_LENGTH, InputError, InputTypeError, cut, whole
from mindiffedit.inputs import PRESETS

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``: at a stage's beginning, ``done`` being 0, and after each of its steps.
Stages are "mask", "inversion" and "edit", in an order that depends on the preset."""

_OF_MASK = (
    *("source", "target", "seed", "scheduler", "size", "reference", "steps", "guidance"),
    *MASK_NUMBERS,
    *MASK_FIELDS,
    "outliers",
)
OPTIONS = (
    *_OF_MASK,
    *("negative", "caption", "strength", "invert_guidance", "mask_combine", "preset", "inversion", "iterations"),
    *("no_paste_back", "feather"),
)
"""The options of an edit, by their names on the command line, with underscores."""

_FLAGS = {"reference": False, "no_paste_back": False, "fill_holes": True, "soft_mask": True}  # has it a --no-...?

_GRAPHS_OF_A_SIZE = 12
"""Graphs that edits of one size of pictures may need, over all presets."""

_OF_MODEL = (
    *("model", "config", "variant", "revision", "offline", "no_safety_checker", "lora", "embedding"),
    *("caption_model", "scheduler", "device", "dtype", "mode", "jit_level", "no_cache"),
)
"""The options that `Editor.load` takes."""


class Cancelled(Exception):
    """An edit was given up between two steps, as its `cancelled` was set."""


@dataclass
class Edited(runs.Edited):
    """What the command has of an edit, and what it says about it.

    Attributes:
        settings: everything that fixed the result, as `mindiffedit edit --json` says it, without paths: models and
            adapters are there by the last part of their names.
        seconds: by stage.
        inversion: what the inversion depends on, for `Editor.edit`'s `reuse`.
    """

    settings: dict[str, Any]
    seconds: dict[str, float]
    inversion: tuple


class Editor:
    """One model on one device. Any thread may call it; one edit runs at a time, the others wait for it.

    Args:
        pipe: the pipeline.
        job: what it was loaded by.
        captioner: says what is on a picture where no `source` is given; None: `source` has to be.
    """

    def __init__(self, pipe, job: Job, captioner=None):
        self.pipe, self._job, self._captioner = pipe, job, captioner
        self._model_scheduler = pipe.scheduler
        self._turn = threading.Lock()

    @classmethod
    def load(cls, args: Namespace) -> Editor:
        """Load a model.

        Args:
            args: options of the model, under the names of `mindiffedit edit`: model, config, variant, revision,
                offline, no_safety_checker, lora, embedding, caption_model, scheduler, device, dtype, mode,
                jit_level, no_cache. One that is not there has its default. The captioner stays in memory.

        Raises:
            InputError: a file or option of the model that does not fit; the sentence names `--options`.
        """
        job = job_of_model(args)
        pipe = loading.load_model(job)
        editor = cls(pipe, job)
        editor._choose_solver(job)  # one that cannot be taken is refused here
        caption_model = getattr(args, "caption_model", None)
        if caption_model is not None:
            with loading.hushed():
                editor._captioner = loading.load_captioner(job, caption_model)
        return editor

    @property
    def model(self) -> str:
        """The last part of the model's name: 'demo', of a folder, a file or a hub id."""
        return _last_part(self._job.args.model)

    @property
    def device(self) -> str:
        """'CPU', 'GPU' or 'Ascend'."""
        return self._job.device

    @property
    def captions(self) -> bool:
        """Whether `source` may be missing."""
        return self._captioner is not None

    @property
    def graphs_made(self) -> int:
        """Graphs that were compiled, or read from the cache, since the model was loaded."""
        return self.pipe._stages.graphs.made

    def keep_sizes(self, count: int) -> None:
        """Keep the graphs of so many sizes of pictures, and of another one that comes between."""
        self.pipe.max_graphs = max(self.pipe.max_graphs, 1 + _GRAPHS_OF_A_SIZE * (count + 1))

    def check(self, picture: PIL.Image.Image, options: Mapping[str, Any], mask=None, *, command: str = "edit") -> None:
        """Raises the InputError that `edit` (or `find_mask`, the command "mask") would, without waiting for a turn."""
        with _as_given():
            self._begun(command, picture, options, mask)

    def edit(
        self,
        picture: PIL.Image.Image,
        options: Mapping[str, Any],
        *,
        mask: PIL.Image.Image | np.ndarray | None = None,
        reuse: Edited | None = None,
        progress: Progress | None = None,
        cancelled: threading.Event | None = None,
    ) -> Edited:
        """What `mindiffedit edit` does.

        Args:
            picture: of any mode and size.
            options: see `OPTIONS`; numbers may be text, as may "true" and "false"; None is not given.
            mask: what may change is white; a picture of any size, or an array (h, w) or (1, h, w) in [0, 1], which is
                taken in 255 levels. With `mask_combine` one to combine the computed one with.
            reuse: an earlier result. Its inversion is taken again where this edit would make the same one and does not
                make its mask of it, as with a painted mask; elsewhere it changes nothing. So the pixels are those that
                there would be without.
            progress: see `Progress`; called in this thread.
            cancelled: looked at after every step.

        Raises:
            InputError: an option is unknown, has a bad value or contradicts another one; the sentence names options
                as they are given here, in backticks.
            NumericalError: the model computed NaN or infinity.
            Cancelled: `cancelled` was set.
        """
        with _as_given(), self._turn:
            job = self._begun("edit", picture, options, mask)
            with self._watched(job, progress, cancelled):
                if job.args.reference:
                    done = runs.reference_edit(job, self.pipe)
                else:
                    inverted = None
                    if reuse is not None and reuse.inversion == _inversion_of(job) and not job.masked_by_inversion:
                        inverted = reuse.latents
                    done = runs.edit(job, self.pipe, inverted=inverted)
            settings = results.of_edit(job, done)
            for name in ("output", "picture", "sweep"):
                settings.pop(name, None)
            settings["model"] = self.model
            if settings.get("report") is not None:
                settings["report"]["warnings"] = [*map(_by_given_names, settings["report"]["warnings"])]
            for adapter in settings.get("loras", []) + settings.get("embeddings", []):
                adapter["file"] = _last_part(adapter["file"])
            return Edited(**vars(done), settings=settings, seconds=job.seconds, inversion=_inversion_of(job))

    def find_mask(
        self,
        picture: PIL.Image.Image,
        options: Mapping[str, Any],
        *,
        progress: Progress | None = None,
        cancelled: threading.Event | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """What `mindiffedit mask` does: the mask that `edit` makes with the preset "exact".

        Args:
            picture, options, progress, cancelled: as for `edit`. Options that only an edit has are left out.

        Returns:
            The mask (1, h, w) of 0 and 1, float32 in [0, 1] with `soft_mask`, and the map that it was made of, float32
            (1, h, w).

        Raises:
            As `edit`.
        """
        with _as_given(), self._turn:
            job = self._begun("mask", picture, options, None)
            with self._watched(job, progress, cancelled):
                return runs.find_mask(job, self.pipe)

    # --- a job ------------------------------------------------------------------------------------

    def _begun(self, command: str, picture, options: Mapping[str, Any], mask) -> Job:
        """A job with checked options and pictures, fitted to the model; no model has run for it."""
        args, model = _parsed(command, options), self._job
        for name in _OF_MODEL:
            if name != "scheduler" or args.scheduler is None:
                setattr(args, name, getattr(model.args, name))
        describes = args.source is None and getattr(args, "caption", None) is None and self._captioner is not None
        args.caption_model = "the captioner" if describes else None
        args.picture, args.mask = picture, _mask_picture(mask)
        job = begin(args)
        read_pictures(job)
        job.folder, job.configs, job.device = model.folder, model.configs, model.device
        fit(job)
        return job

    @contextlib.contextmanager
    def _watched(self, job: Job, progress: Progress | None, cancelled: threading.Event | None) -> Iterator[None]:
        """The pipeline made ready for a job, its steps told to `progress`."""
        steps = _Steps(job, progress or (lambda stage, done, total: None), cancelled or threading.Event())
        steps.go_on()
        if job.args.caption_model is not None:
            with job.timed("caption"):
                job.source = job.caption = self._captioner.caption(job.original.shown)
        self._choose_solver(job)
        pipe = self.pipe
        pipe.progress_bar, pipe.set_progress_bar_config = steps.bar, steps.name
        try:
            with pipe.debugging(steps.seen):
                yield
        finally:
            del pipe.progress_bar, pipe.set_progress_bar_config

    def _choose_solver(self, job: Job) -> None:
        """As each command does for itself: whether the model's own can be taken depends on the job."""
        self.pipe.scheduler = self._model_scheduler
        loading.choose_solver(job, self.pipe)


def job_of_model(args: Namespace) -> Job:
    """The job that a model is loaded by, without a picture and a captioner; `args` as for `Editor.load`."""
    own = _parsed("edit", {"source": "before", "target": "after"})
    for name in set(_OF_MODEL) & vars(args).keys():
        setattr(own, name, getattr(args, name))
    own.caption_model = None
    return begin(own)


class _Steps:
    """Stands in for the pipeline's progress bars: tells of every step, and ends the edit where it is to be given up."""

    def __init__(self, job: Job, progress: Progress, cancelled: threading.Event):
        self._progress, self._cancelled = progress, cancelled
        self._maps = PRESETS[job.settings["preset"]].inversion_maps
        self._stage, self._done, self._total = "mask", 0, 0

    def go_on(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled

    def name(self, desc: str, **_) -> None:
        """`set_progress_bar_config`."""
        self._stage = {"invert": "inversion"}.get(desc, desc)

    @contextlib.contextmanager
    def bar(self, iterable=None, total: int = 0):
        """`progress_bar`."""
        self._done, self._total = 0, total
        self.update(0)
        yield self

    def update(self, count: int = 1) -> None:
        self.go_on()
        self._done += count
        self._progress(self._stage, self._done, self._total)

    def seen(self, stage: str, array, step: int | None) -> None:
        """A viewer of what crosses the stages; a mask that is made of the inversion has no bar."""
        self.go_on()
        if stage == "noise_predictions" and step is not None:
            self._progress("mask", step + 1, max(step + 1, self._maps))


def _inversion_of(job: Job) -> tuple:
    """All that the inversion depends on, beside the model."""
    names = ("steps", "strength", "invert_guidance", "inversion", "iterations", "preset")
    values = (job.settings[name] for name in names)
    text = job.source if job.caption is None else job.caption
    return fingerprint(job.original.shown), job.fitted.size, text, job.args.seed, job.scheduler, *values


def _mask_picture(mask: PIL.Image.Image | np.ndarray | None) -> PIL.Image.Image | None:
    if mask is None or isinstance(mask, PIL.Image.Image):
        return mask
    values = np.asarray(mask, np.float32)
    values = values[0] if values.ndim == 3 and len(values) == 1 else values
    if values.ndim != 2 or not ((values >= 0) & (values <= 1)).all():
        raise InputError(
            "{parameter} has to be a picture or an array (h, w) in [0, 1], but is one of shape {shape}; give one.",
            "--mask",
            shape=values.shape,
        )
    return PIL.Image.fromarray(np.rint(values * 255).astype(np.uint8))


def _last_part(name: str) -> str:
    return os.path.basename(name.rstrip("/\\")) or name


# --- options ---------------------------------------------------------------------------------------


def option_schemas(command: str = "edit") -> dict[str, dict[str, Any]]:
    """The options of `edit` or `mask` as JSON schemas: type, choices, and the help of the command line."""
    kinds: dict[Any, Any] = {int: "integer", float: "number", None: "string"}
    actions, schemas = options_of(command), {}
    for name in OPTIONS if command == "edit" else _OF_MASK:
        action = actions[name]
        kind = "boolean" if name in _FLAGS else kinds.get(action.type, ["number", "string"])
        schemas[name] = {"type": kind, "description": str(action.help)}
        if action.choices is not None:
            schemas[name]["enum"] = [*action.choices]
    return schemas


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        found = re.fullmatch("argument (--[a-z-]+): (.*)", cut(on_one_line(message), 2 * MAX_TEXT_LENGTH))
        if found is None:
            raise InputError(cut(on_one_line(message), 2 * MAX_TEXT_LENGTH) + ".")
        raise InputError("{parameter}: {what}.", found[1], what=whole(found[2]))


_parser = functools.cache(functools.partial(build_parser, _Parser))


def _parsed(command: str, options: Mapping[str, Any]) -> Namespace:
    """What the command line makes of these options."""
    if unknown := [name for name in options if name not in OPTIONS]:
        name = str(unknown[0])
        raise InputError(
            "{name!r} is no option of an edit; there are {names}.", name, name=name, names=whole(", ".join(OPTIONS))
        )
    if options.get("target") is None:
        raise InputError("{parameter} is missing: say what the picture should show.", "--target")
    taken = OPTIONS if command == "edit" else _OF_MASK
    words = [_word(name, options[name]) for name in taken if options.get(name) is not None]
    return _parser().parse_args([command, "PICTURE", "--quiet", *filter(None, words)])


def _word(name: str, value: Any) -> str | None:
    """An option as it stands on the command line; None for a flag that is off without it."""
    if name in _FLAGS:
        truth = {"true": True, "false": False}.get(str(value).lower())
        if truth is None:
            raise InputError("{parameter} has to be true or false, but is {value!r}.", option(name), value=value)
        return option(name) if truth else option(f"no_{name}") if _FLAGS[name] else None
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise InputError("{parameter} has to be a text or a number, but is {value!r}.", option(name), value=value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # what a slider or JSON gives for a whole number
    return f"{option(name)}={value}"


@contextlib.contextmanager
def _as_given() -> Iterator[None]:
    """Errors about options name them as they are given here."""
    try:
        yield
    except (InputError, InputTypeError) as error:
        renamed = InputError(whole(_by_given_names(told(error.message, "edit"))))
        if error.parameter is not None:
            renamed.parameter = _by_given_names(option_of("edit")(error.parameter)).strip("`")
        raise renamed from error


def _by_given_names(sentence: str) -> str:
    """`mask_level` for --mask-level and --no-mask-level."""

    def given(found: re.Match) -> str:
        name = found[1].replace("-", "_")
        return f"`{name if name in OPTIONS else name.removeprefix('no_')}`"

    return re.sub(r"--([a-z]+(?:-[a-z]+)*)", given, sentence.replace("PICTURE", "the picture"))
