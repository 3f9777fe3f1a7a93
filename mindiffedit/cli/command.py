"""The command `mindiffedit`: edit, mask, invert and demo; `parity`, `ui` and `serve` have modules of their own.

What can be given is defined in `arguments` and judged in `checks` and `job`; `loading` gets the pipeline, `runs` asks
it, `sweeps` draws contact sheets, `results` is what machines are told. Here are the commands: which files are written,
and what is said in the end.

stdout carries one line (or one JSON object); progress, notes and errors go to stderr. Exit codes: 0 done,
2 for bad input (one sentence), 1 for any other failure (a sentence, or the traceback of a bug), 130 when interrupted.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mindiffedit import demo, masks
from mindiffedit.arrays import to_numpy
from mindiffedit.cli import results, runs, sweeps
from mindiffedit.cli.arguments import build_parser
from mindiffedit.cli.checks import check_outputs
from mindiffedit.cli.job import Job, begin, fingerprint, model_name
from mindiffedit.cli.latents_file import write_latents
from mindiffedit.cli.loading import load
from mindiffedit.cli.runs import Edited
from mindiffedit.cli.wording import BAD_INPUT, INTERRUPTED, OK, notes, printable, report
from mindiffedit.errors import InputError
from mindiffedit.images import strips, writing

# Frames of --strip for each way, about: every frame takes two decodings.
STRIP_FRAMES = 20


def main(argv: list[str] | None = None) -> int:
    """Run the command with the arguments `argv` (those of the process by default); returns the exit code."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said everything
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    try:
        # Libraries print; stdout is for the result alone.
        with contextlib.redirect_stdout(sys.stderr), notes(args):
            line, result, *code = _COMMANDS[args.command](args)
        line = json.dumps(result, ensure_ascii=True) if args.json else line
        if not args.command.startswith(("parity", "doctor")):  # whose tables have many
            line = " ".join(line.splitlines())  # a name may have a line break in it
        print(printable(line, sys.stdout.encoding or "utf-8"), flush=True)
        return code[0] if code else OK
    except KeyboardInterrupt:
        print("mindiffedit: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return report(error, args.command)


# --- commands: each returns (line for people, object for machines) ---------------------------------


def _edit(args):
    files = {name: getattr(args, name) for name in ("grid", "overlay", "strip")}
    job = begin(args, {"strip": strips.EXTENSIONS}, output=args.output, sweep=args.sweep, **files)
    sweep = sweeps.settled(job)
    pipe = load(job)
    edited, written = None, {}
    if args.output is not None:
        edited = _whole_edit(job, pipe, args.strip)
        written[args.output] = edited.image
        if args.grid is not None:
            written[args.grid] = edited.grid(job)
        if args.overlay is not None:
            written[args.overlay] = masks.overlay(job.picture, masks.as_picture(edited.mask, job.picture.size))
    if sweep is not None:
        written[args.sweep] = sweeps.edit_sheet(job, pipe, sweep, None if edited is None else edited.mask)
    writing.save_images_atomically(written)
    return _edit_result(job, edited, sweep, **files)


def _demo(args):
    args.picture = str(demo.sample_picture(args.example))
    for name, text in zip(("source", "target"), demo.EXAMPLES[args.example][1:]):
        if getattr(args, name) is None:
            setattr(args, name, text)
    job = begin(args)
    folder = Path(args.output)
    files = {name: folder / f"{name}.png" for name in ("edit", "original", "mask", "edited")}
    if folder.exists() and not folder.is_dir():
        raise InputError("--output {folder} is a file; give the name of a folder.", folder=folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror or error
        raise InputError(
            "--output {folder}: the folder cannot be made ({why}); give another.", folder=folder, why=why
        ) from error
    check_outputs(files, job.inputs)
    edited = _whole_edit(job, load(job))
    contents = (edited.grid(job), job.picture, masks.as_picture(edited.mask, job.picture.size), edited.image)
    writing.save_images_atomically(dict(zip(files.values(), contents)))
    args.output = str(files["edit"])
    return _edit_result(job, edited)


def _whole_edit(job: Job, pipe, strip: str | None = None) -> Edited:
    """The edit, by one call or by the reference's three; `strip` is a file for its animation."""
    watched: Any = contextlib.nullcontext()
    if strip is not None:
        every = max(1, round(job.settings["steps"] * job.settings["strength"] / STRIP_FRAMES))
        watched = strips.AnimatedStrip(pipe, strip, every=every)
    with watched:
        edited = runs.reference_edit(job, pipe) if job.args.reference else runs.edit(job, pipe)
    runs.note_warnings(edited)
    return edited


def _edit_result(job: Job, edited: Edited | None, sweep=None, **files):
    result = results.of_edit(job, edited, sweep, **files)
    if edited is None:
        return _sheet_line(job, sweep), result
    return _line(job, f"{edited.share:.0%} of it in the mask"), result


def _mask(args):
    files = {name: getattr(args, name) for name in ("overlay", "map")}
    lossless = {"output": writing.LOSSLESS_EXTENSIONS}
    job = begin(args, lossless, output=args.output, sweep=args.sweep, **files)
    sweep = sweeps.settled(job)
    pipe = load(job)
    share, written, maps = None, {}, {}
    if args.output is not None:
        mask, map_ = runs.find_mask(job, pipe)
        maps[job.settings["mask_strength"]] = map_
        mask = runs.whole_mask(job, mask)
        runs.note_emptiness(mask)
        share = float(mask.mean(dtype=np.float64))
        written[args.output] = masks.as_picture(mask, job.picture.size)
        if args.overlay is not None:
            written[args.overlay] = masks.overlay(job.picture, written[args.output])
        if args.map is not None:
            clamp = masks.clamp_of(map_, job.settings["mask_threshold"])
            written[args.map] = masks.as_picture(np.clip(map_ / clamp, 0, 1), job.picture.size)
    if sweep is not None:
        written[args.sweep] = sweeps.mask_sheet(job, pipe, sweep, maps)
    writing.save_images_atomically(written)
    result = results.common(job)
    result.update(source=job.source, target=job.target, guidance=job.settings["guidance"], mask_share=share)
    result.update(results.mask_settings(job), **files)
    if not args.reference:
        result["sweep"] = results.of_sweep(job, sweep)
    if share is None:
        return _sheet_line(job, sweep), result
    return _line(job, f"{share:.0%} white"), result


def _invert(args):
    job = begin(args, {"output": (".safetensors",)}, output=args.output)
    inverted = runs.invert(job, load(job))
    latents, clean = (to_numpy(part).astype(np.float32) for part in (inverted.latents, inverted.clean_latents))
    numbers = {name: job.settings[name] for name in ("steps", "strength", "guidance", "iterations")}
    recipe = {
        **numbers,
        "prompt": job.source,
        "negative_prompt": args.negative or "",
        "scheduler": job.scheduler,
        "model": model_name(args.model),
        "seed": args.seed,
        "picture_sha256": fingerprint(job.original.shown),
        "picture_size": "x".join(map(str, job.picture.size)),
        "working_size": "x".join(map(str, job.fitted.size)),
    }
    write_latents(args.output, latents, clean, recipe)
    result = {**results.common(job), "source": job.source, **numbers, "shape": list(latents.shape)}
    return f"{args.output}: latents {' x '.join(map(str, latents.shape))}, {_ending(job)}", result


def _doctor(args):
    from mindiffedit.cli.doctor import doctor

    return doctor(args)


def _batch(args):
    from mindiffedit.service import batch

    return batch.run(args)


def _parity(args):
    from mindiffedit.cli import parity

    return parity.record(args) if args.command == "parity record" else parity.check(args)


def _ui(args):
    from mindiffedit.cli import ui

    return ui.serve(args)


def _serve(args):
    from mindiffedit.cli import serve

    return serve.serve(args)


_COMMANDS = {
    "edit": _edit,
    "mask": _mask,
    "invert": _invert,
    "demo": _demo,
    "doctor": _doctor,
    "ui": _ui,
    "batch": _batch,
    "serve": _serve,
    "parity record": _parity,
    "parity check": _parity,
}


# --- lines for people ------------------------------------------------------------------------------


def _sheet_line(job: Job, sweep) -> str:
    size = f"{len(sweep.strengths)} strengths x {len(sweep.others)} {sweep.other}s"
    return f"{job.args.sweep}: {size}, {_ending(job)}"


def _line(job: Job, share: str) -> str:
    return f"{job.args.output}: {job.picture.width} x {job.picture.height}, {share}, {_ending(job)}"


def _ending(job: Job) -> str:
    return f"seed {job.args.seed}, {sum(job.seconds.values()):.1f} s"
