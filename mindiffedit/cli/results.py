"""What a command says to machines of its job: the settings that fix the result, its report, the seconds."""

from __future__ import annotations

import dataclasses
from typing import Any

from mindiffedit.cli.arguments import MASK_NUMBERS
from mindiffedit.cli.job import Job, model_name
from mindiffedit.cli.runs import Edited
from mindiffedit.cli.wording import MASK_FIELDS, told
from mindiffedit.inputs import PRESETS


def of_edit(job: Job, edited: Edited | None, sweep=None, **files: str | None) -> dict[str, Any]:
    """Of `edit` and `demo`; `edited` is None where only a sheet is drawn, `files` are what else is written."""
    args, settings = job.args, job.settings
    result = common(job)
    result.update(
        source=job.source,
        target=job.target,
        negative=job.source if args.negative is None else args.negative,
        strength=settings["strength"],
        guidance=settings["guidance"],
        mask_share=None if edited is None else edited.share,
        safety_checker_flagged=None if edited is None else edited.flagged,
        **files,
    )
    if job.latents is None:
        result["invert_guidance"] = settings["invert_guidance"]
    if job.computes_mask:
        result.update(mask_settings(job))
    if not args.reference:
        result.update(
            preset=settings["preset"],
            inversion=settings["inversion"],
            iterations=settings["iterations"],
            paste_back=not args.no_paste_back,
            report=None if edited is None else _report_of(edited.report, job),
            sweep=of_sweep(job, sweep),
        )
    return result


def _report_of(of_edit, job: Job) -> dict[str, Any]:
    """The report of an edit of one picture: lists with an entry for each picture are that entry."""
    values = dataclasses.asdict(of_edit)
    for name, value in values.items():
        if isinstance(value, list) and name != "warnings":
            values[name] = value[0]
    # What the file cannot keep; of what the picture loses the report has said some already.
    values["warnings"] = [told(text, job.args.command) for text in dict.fromkeys((*job.losses, *of_edit.warnings))]
    values["seconds"] = {name: round(seconds, 3) for name, seconds in of_edit.seconds.items()}
    return values


def common(job: Job) -> dict[str, Any]:
    """Of every command."""
    args = job.args
    result = {
        "command": args.command,
        "output": args.output,
        "picture": args.picture,
        "width": job.picture.width,
        "height": job.picture.height,
        "working_width": job.fitted.width,
        "working_height": job.fitted.height,
        "model": model_name(args.model),
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


def mask_settings(job: Job) -> dict[str, Any]:
    """How a computed mask was made."""
    settings = {name: job.settings[name] for name in MASK_NUMBERS}
    if job.masked_by_inversion:
        settings.update(maps=PRESETS[job.settings["preset"]].inversion_maps, mask_strength=None)
    if not job.args.reference:
        settings["outliers"] = job.settings["outliers"]
        settings["mask_combine"] = None if job.grid_mask is None else job.settings["mask_combine"]
        settings.update({name: getattr(job.mask_options, field) for name, field in MASK_FIELDS.items()})
    return settings


def of_sweep(job: Job, sweep) -> dict[str, Any] | None:
    """A sheet's file and values; None without one."""
    if sweep is None:
        return None
    return {"file": job.args.sweep, "strengths": sweep.strengths, f"{sweep.other}s": sweep.others}
