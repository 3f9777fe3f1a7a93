"""The command `mindiffedit`: edit, mask, invert and demo; `parity` has a module of its own.

What can be given is defined in `arguments` and judged in `jobs`; `runs` asks the pipeline, `sweeps` draws contact sheets.
Here are the commands: which files are written, and what is said in the end.

stdout carries one line (or one JSON object); progress, notes and errors go to stderr. Exit codes: 0 done,
2 for bad input (one sentence), 1 for any other failure (a sentence, or the traceback of a bug), 130 when interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from mindiffedit import __version__, demo, masks
from mindiffedit.arrays import to_numpy
from mindiffedit.cli import jobs, runs, sweeps
from mindiffedit.cli.arguments import BAD_INPUT, MASK_FIELDS, MASK_NUMBERS, build_parser, on_one_line, printable, told
from mindiffedit.cli.jobs import Job
from mindiffedit.cli.latents_file import write_latents
from mindiffedit.cli.runs import Edited
from mindiffedit.errors import MAX_TEXT_LENGTH, InputError, InputTypeError, cut
from mindiffedit.images import strips, writing
from mindiffedit.options import NumericalError

OK, FAILED, INTERRUPTED = 0, 1, 130

# Frames of --strip for each way, about: every frame takes two decodings.
STRIP_FRAMES = 20

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Run the command with the arguments `argv` (those of the process by default); returns the exit code."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said everything
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    try:
        # Libraries print; stdout is for the result alone.
        with contextlib.redirect_stdout(sys.stderr), _warnings_as_notes(args):
            line, result, *code = _COMMANDS[args.command](args)
        line = json.dumps(result, ensure_ascii=True) if args.json else line
        if not args.command.startswith("parity"):  # whose tables have many
            line = " ".join(line.splitlines())  # a name may have a line break in it
        print(printable(line, sys.stdout.encoding or "utf-8"), flush=True)
        return code[0] if code else OK
    except KeyboardInterrupt:
        print("mindiffedit: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return _report(error, args.command)


def _report(error: Exception, command: str) -> int:
    """Say what went wrong on stderr; returns the exit code."""
    if isinstance(error, (InputError, InputTypeError, NumericalError)):
        print(f"mindiffedit: error: {told(error.message, command)}", file=sys.stderr)
        return BAD_INPUT
    what = cut(on_one_line(f"{type(error).__name__}: {error}").rstrip(": ."), 2 * MAX_TEXT_LENGTH)
    if isinstance(error, (OSError, MemoryError)):  # of the surroundings: a full disk
        print(f"mindiffedit: failed: {what}.", file=sys.stderr)
        return FAILED
    traceback.print_exception(type(error), error, error.__traceback__, file=sys.stderr)
    print(
        f"mindiffedit: failed: {what}. This is a bug of mindiffedit {__version__}: please report it to the project's issue "
        "tracker, with all of the above, the command, and what `mindiffedit --version` prints.",
        file=sys.stderr,
    )
    return FAILED


class _Notes(logging.Handler):
    """What the package logs, as notes of a command; each is said once, though every stage may log it."""

    def __init__(self, command: str):
        super().__init__(logging.WARNING)
        self.command = command
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.args[0] if record.msg == "%s" and len(record.args) == 1 else record.getMessage()
        note = told(text, self.command)
        if note not in self.said:
            self.said.add(note)
            print(f"note: {note}", file=sys.stderr)


@contextlib.contextmanager
def _warnings_as_notes(args):
    """Warnings of this package, which are for Python's users, in the command line's words; none with --quiet."""
    logger, handler = logging.getLogger("mindiffedit"), (logging.NullHandler() if args.quiet else _Notes(args.command))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


# --- commands: each returns (line for people, object for machines) ---------------------------------


def _edit(args):
    job = jobs.begin(
        args,
        {"strip": strips.EXTENSIONS},
        output=args.output,
        grid=args.grid,
        overlay=args.overlay,
        strip=args.strip,
        sweep=args.sweep,
    )
    sweep = None if args.sweep is None else sweeps.settled(job)
    jobs.read_pictures(job)
    jobs.find_model(job)
    pipe = jobs.load(job)
    done, files = None, {}
    if args.output is not None:
        done = _whole_edit(job, pipe, args.strip)
        files[args.output] = done.edited
        if args.grid is not None:
            files[args.grid] = done.grid(job)
        if args.overlay is not None:
            files[args.overlay] = masks.overlay(job.picture, done.mask)
    if sweep is not None:
        files[args.sweep] = sweeps.edit_sheet(job, pipe, sweep, None if done is None else done.grid_mask)
    writing.save_images_atomically(files)
    files_of = {name: getattr(args, name) for name in ("grid", "overlay", "strip")}
    return _edit_result(job, done, sweep, **files_of)


def _demo(args):
    args.picture = str(demo.sample_picture())
    job = jobs.begin(args)
    folder = Path(args.output)
    names = {name: folder / f"{name}.png" for name in ("edit", "original", "mask", "edited")}
    if folder.exists() and not folder.is_dir():
        raise InputError("{parameter} {folder} is a file; give the name of a folder.", "--output", folder=folder)
    jobs.read_pictures(job)
    jobs.find_model(job)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            "{parameter} {folder}: the folder cannot be made ({why}); give another.",
            parameter="--output",
            folder=folder,
            why=error.strerror or error,
        ) from error
    jobs.check_outputs(job, names)
    done = _whole_edit(job, jobs.load(job))
    writing.save_images_atomically(
        {
            names["edit"]: done.grid(job),
            names["original"]: done.original,
            names["mask"]: done.mask,
            names["edited"]: done.edited,
        }
    )
    args.output = str(names["edit"])
    return _edit_result(job, done)


def _whole_edit(job: Job, pipe, strip=None) -> Edited:
    """The edit, by one call or by the reference's three; `strip` is a file for its animation."""
    watched: Any = contextlib.nullcontext()
    if strip is not None:
        every = max(1, round(job.settings["steps"] * job.settings["strength"] / STRIP_FRAMES))
        watched = strips.AnimatedStrip(pipe, strip, every=every)
    with watched:
        done = runs.reference_edit(job, pipe) if job.args.reference else runs.edit(job, pipe)
    runs.note_warnings(job, done)
    return done


def _edit_result(job: Job, done: Edited | None, sweep=None, **extra):
    args, settings = job.args, job.settings
    result = _common_result(job)
    result.update(
        source=job.source,
        target=job.target,
        negative=runs.negative(job),
        strength=settings["strength"],
        guidance=settings["guidance"],
        mask_share=None if done is None else done.share,
        safety_checker_flagged=None if done is None else done.flagged,
        **extra,
    )
    if job.latents is None:
        result["invert_guidance"] = settings["invert_guidance"]
    if job.computes_mask:
        result.update(_mask_settings(job))
    if not args.reference:
        result.update(
            inversion=settings["inversion"],
            iterations=settings["iterations"],
            paste_back=not args.no_paste_back,
            report=None if done is None else _report_of(done.report, job.losses, args.command),
            sweep=None if sweep is None else _sweep_result(job, sweep),
        )
    if done is None:
        return _sheet_line(job, sweep), result
    width, height = job.picture.size
    return f"{args.output}: {width} x {height}, {done.share:.0%} of it in the mask, {_took(job)}", result


def _report_of(report, losses: list[str], command: str) -> dict[str, Any]:
    """The report of an edit of one picture: lists with an entry for each picture are that entry."""
    values = dataclasses.asdict(report)
    for name, value in values.items():
        if name != "warnings" and isinstance(value, list):
            values[name] = value[0]
    values["warnings"] = [told(warning, command) for warning in (*losses, *report.warnings)]
    values["seconds"] = {name: round(seconds, 3) for name, seconds in report.seconds.items()}
    return values


def _mask(args):
    job = jobs.begin(
        args,
        {"output": writing.LOSSLESS_EXTENSIONS},
        output=args.output,
        overlay=args.overlay,
        map=args.map,
        sweep=args.sweep,
    )
    sweep = None if args.sweep is None else sweeps.settled(job)
    jobs.read_pictures(job)
    jobs.find_model(job)
    pipe = jobs.load(job)
    share, files, known = None, {}, {}
    if args.output is not None:
        mask, seen = runs.find_mask(job, pipe)
        known[job.settings["mask_strength"]] = seen
        mask = runs.whole_mask(job, mask)
        runs.note_emptiness(job, mask)
        share = float(mask.mean(dtype=np.float64))
        files[args.output] = runs.mask_picture(job, mask)
        if args.overlay is not None:
            files[args.overlay] = masks.overlay(job.picture, files[args.output])
        if args.map is not None:
            clamp = masks.clamp_of(seen, job.settings["mask_threshold"])
            files[args.map] = runs.mask_picture(job, np.clip(seen / clamp, 0, 1))
    if sweep is not None:
        files[args.sweep] = sweeps.mask_sheet(job, pipe, sweep, known)
    writing.save_images_atomically(files)
    result = _common_result(job)
    result.update(source=job.source, target=job.target, guidance=job.settings["guidance"], mask_share=share)
    result.update(_mask_settings(job), overlay=args.overlay, map=args.map)
    if not args.reference:
        result["sweep"] = None if sweep is None else _sweep_result(job, sweep)
    if share is None:
        return _sheet_line(job, sweep), result
    width, height = job.picture.size
    return f"{args.output}: {width} x {height}, {share:.0%} white, {_took(job)}", result


def _invert(args):
    job = jobs.begin(args, {"output": (".safetensors",)}, output=args.output)
    jobs.read_pictures(job)
    jobs.find_model(job)
    inverted = runs.invert(job, jobs.load(job))
    latents, clean = (to_numpy(part).astype(np.float32) for part in (inverted.latents, inverted.clean_latents))
    made = {
        "prompt": job.source,
        "negative_prompt": args.negative or "",
        "steps": job.settings["steps"],
        "strength": job.settings["strength"],
        "guidance": job.settings["guidance"],
        "iterations": job.settings["iterations"],
        "scheduler": job.scheduler,
        "model": jobs.model_name(args.model),
        "seed": args.seed,
        "picture_sha256": jobs.fingerprint(job.original.shown),
        "picture_size": "x".join(map(str, job.picture.size)),
        "working_size": "x".join(map(str, job.fitted.size)),
    }
    write_latents(args.output, latents, clean, made)
    result = _common_result(job)
    result.update(
        source=job.source,
        strength=made["strength"],
        guidance=made["guidance"],
        iterations=made["iterations"],
        shape=list(latents.shape),
    )
    return f"{args.output}: latents {' x '.join(map(str, latents.shape))}, {_took(job)}", result


def _parity(args):
    # Imported when asked for: it imports this module.
    command = importlib.import_module("mindiffedit.cli.parity")
    return command.record(args) if args.command == "parity record" else command.check(args)


_COMMANDS = {
    "edit": _edit,
    "mask": _mask,
    "invert": _invert,
    "demo": _demo,
    "parity record": _parity,
    "parity check": _parity,
}


# --- parts of what they return ---------------------------------------------------------------------


def _mask_settings(job: Job) -> dict[str, Any]:
    found = {name: job.settings[name] for name in MASK_NUMBERS}
    if not job.args.reference:
        found["outliers"] = job.settings["outliers"]
        found["mask_combine"] = None if job.grid_mask is None else job.settings["mask_combine"]
        found.update({name: getattr(job.mask_options, part) for name, part in MASK_FIELDS.items()})
    return found


def _sweep_result(job: Job, sweep) -> dict[str, Any]:
    return {"file": job.args.sweep, "strengths": sweep.strengths, f"{sweep.other}s": sweep.others}


def _sheet_line(job: Job, sweep) -> str:
    size = f"{len(sweep.strengths)} strengths x {len(sweep.others)} {sweep.other}s"
    return f"{job.args.sweep}: {size}, {_took(job)}"


def _took(job: Job) -> str:
    return f"seed {job.args.seed}, {sum(job.seconds.values()):.1f} s"


def _common_result(job: Job) -> dict[str, Any]:
    args = job.args
    result = {
        "command": args.command,
        "output": None if args.output is None else str(args.output),
        "picture": args.picture,
        "width": job.picture.width,
        "height": job.picture.height,
        "working_width": job.fitted.width,
        "working_height": job.fitted.height,
        "model": jobs.model_name(args.model),
        "device": job.device,
        "mode": args.mode,
        "reference": args.reference,
        "scheduler": job.scheduler,
        "seed": args.seed,
        "steps": job.settings["steps"],
        "seconds": job.seconds,
    }
    if job.caption is not None:
        result["caption"] = job.caption
    if job.prompts is not None:
        result["prompts"] = job.prompts
    if job.loras:
        result["loras"] = [{"file": path, "weight": weight} for path, weight in job.loras]
    if job.embeddings:
        result["embeddings"] = [{"file": path, "word": word} for path, word in job.embeddings]
    return result
