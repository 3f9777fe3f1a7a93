"""What the commands ask of a loaded pipeline: the corrected way, in one call or in parts, and the reference's calls."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image

from mindiffedit import masks
from mindiffedit.arrays import to_numpy
from mindiffedit.cli.jobs import Job
from mindiffedit.editing import MAX_FEATHER, change_outside
from mindiffedit.images import pictures, sheets
from mindiffedit.outputs import DiffEditInversionPipelineOutput, EditReport

__all__ = [
    "Edited",
    "edit",
    "find_mask",
    "invert",
    "mask_picture",
    "negative",
    "note_emptiness",
    "note_warnings",
    "reference_edit",
    "whole_mask",
]


@dataclass
class Edited:
    """Results at the picture's own size.

    `grid_mask` is the mask on the latents' grid, (1, h, w); `report` is None for the reference's calls.
    """

    original: PIL.Image.Image
    mask: PIL.Image.Image
    edited: PIL.Image.Image
    grid_mask: np.ndarray
    flagged: bool | None
    report: EditReport | None = None

    @property
    def share(self) -> float:
        """The part of the latents that the mask marks."""
        return float(self.grid_mask.mean(dtype=np.float64))

    def grid(self, job: Job) -> PIL.Image.Image:
        """Original, mask and edited picture side by side."""
        return sheets.labelled_grid(
            [
                (f"original: {job.source}", self.original),
                ("mask", self.mask),
                (f"edited: {job.target}", self.edited),
            ]
        )


def mask_picture(job: Job, mask: np.ndarray) -> PIL.Image.Image:
    """A mask or map (1, h, w) in [0, 1] as a grey picture of the picture's size, each pixel with its latent's value."""
    width, height = job.picture.size
    return pictures.mask_to_pil(masks.enlarged(mask, (height, width)))[0]


def negative(job: Job) -> str | None:
    """What the edit moves away from: --negative or the source."""
    return job.source if job.args.negative is None else job.args.negative


def note_emptiness(job: Job, mask: np.ndarray) -> None:
    """Says so where a mask has no edge."""
    if not mask.any():
        job.note("the mask is empty: nothing is going to change.")
    elif mask.all():
        job.note("the mask covers the whole picture: all of it may change.")


# --- what goes to the pipeline ---------------------------------------------------------------------


def _progress(job: Job, pipe, stage: str) -> None:
    pipe.set_progress_bar_config(disable=job.args.quiet, file=sys.stderr, desc=stage)


def _prompt(job: Job, which: str, name: str) -> dict[str, Any]:
    """The source's or the target's text as the parameter `name`, or the embeddings of the prompts written about it."""
    if which in job.embeds:
        return {f"{name}_embeds": job.embeds[which]}
    return {name: getattr(job, which)}


def _mask_settings(job: Job) -> dict[str, Any]:
    """What edit() and generate_mask() have in common."""
    settings = job.settings
    return dict(
        image=job.fitted,
        **_prompt(job, "target", "target_prompt"),
        **_prompt(job, "source", "source_prompt"),
        num_maps_per_mask=settings["maps"],
        mask_encode_strength=settings["mask_strength"],
        mask_thresholding_ratio=settings["mask_threshold"],
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance"],
        generator=job.args.seed,
    )


# --- in parts --------------------------------------------------------------------------------------


def find_mask(job: Job, pipe, strength: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The computed mask, (1, h, w), and the map that it was made of, float32 (1, h, w).

    `strength` stands in for --mask-strength. With --reference the reference's, else the one that edit() makes.
    """
    given = _mask_settings(job)
    if strength is not None:
        given["mask_encode_strength"] = strength
    if not job.args.reference:
        given.update(
            per_image_clamp=True,
            corrected_guidance=True,
            outlier_quantile=job.settings["outliers"],
            mask_options=job.mask_options,
        )
    _progress(job, pipe, "mask" if strength is None else f"mask, strength {strength:g}")
    with job.timed("mask"):
        return pipe.generate_mask(**given, output_type="np", return_map=True)


def whole_mask(job: Job, mask: np.ndarray) -> np.ndarray:
    """A computed mask, combined with --mask where that is asked for."""
    if job.grid_mask is None:
        return mask
    return masks.combine(mask, job.grid_mask, job.settings["mask_combine"])


def invert(job: Job, pipe, strength: float | None = None) -> DiffEditInversionPipelineOutput:
    """The background of every step of an edit; `strength` stands in for --strength."""
    settings, alone = job.settings, job.args.command == "invert"
    given = dict(
        image=job.fitted,
        num_inference_steps=settings["steps"],
        inpaint_strength=settings["strength"] if strength is None else strength,
        generator=job.args.seed,
    )
    _progress(job, pipe, "invert" if strength is None else f"invert, strength {strength:g}")
    with job.timed("invert"):
        if settings["inversion"] == "noise":
            return pipe.noise_image(**given)
        if settings["iterations"]:
            given["inversion_iterations"] = settings["iterations"]
        captioned = not alone and not job.args.reference and job.caption is not None
        return pipe.invert(
            **({"prompt": job.caption} if captioned else _prompt(job, "source", "prompt")),
            guidance_scale=settings["guidance" if alone else "invert_guidance"],
            negative_prompt=job.args.negative if alone else None,
            **given,
        )


# --- whole edits -----------------------------------------------------------------------------------


def edit(
    job: Job,
    pipe,
    mask: np.ndarray | None = None,
    inverted: DiffEditInversionPipelineOutput | None = None,
    strength: float | None = None,
    guidance: float | None = None,
    stage: str = "edit",
) -> Edited:
    """`edit()` with everything that was given; what is given here stands in for it.

    `mask` is a finished one, which nothing is combined with; `stage` names the edit's progress bar.
    """
    settings, args = job.settings, job.args
    inverted = job.inverted if inverted is None else inverted
    own = job.grid_mask if mask is None else mask
    # Other sizes, and what the call does not see of the picture, are put right here.
    own_size = job.fitted.size == job.picture.size and job.original.plain
    inverts = inverted is None and settings["inversion"] == "ddim"
    given = dict(
        _mask_settings(job),
        negative_prompt=args.negative,
        inpaint_strength=settings["strength"] if strength is None else strength,
        mask_options=job.mask_options,
        mask_image=own,
        mask_combination=settings["mask_combine"] if mask is None else "replace",
        outlier_quantile=settings["outliers"],
        image_latents=inverted,
        paste_back=own_size and not args.no_paste_back,
        feather=settings["feather"],
        output_type="pil",
        debug_callback=_bar_names(job, pipe, (["invert"] if inverts else []) + [stage]),
    )
    if guidance is not None:
        given["guidance_scale"] = guidance
    if inverted is None:
        given["inversion"] = settings["inversion"]
    if inverts:
        given.update(
            inversion_prompt=job.caption,
            inversion_guidance_scale=settings["invert_guidance"],
            inversion_iterations=settings["iterations"],
        )
    done = pipe.edit(**given)
    for name, seconds in done.report.seconds.items():
        job.seconds[name] = round(job.seconds.get(name, 0) + seconds, 3)
    flags = done.nsfw_content_detected
    flagged = None if not flags else bool(flags[0])
    edited = job.original.rewritten(done.images[0]) if own_size else _at_own_size(job, done, bool(flagged))
    return Edited(job.picture, mask_picture(job, done.mask_image), edited, done.mask_image, flagged, done.report)


def _bar_names(job: Job, pipe, loops: Iterable[str]):
    """A debugging callback that names the progress bars: each stage begins with its schedule."""
    names = iter(loops)

    def callback(stage, array, step):
        if stage == "timestep":
            _progress(job, pipe, "mask")
        elif stage == "timesteps":
            _progress(job, pipe, next(names, "edit"))

    return callback


def _at_own_size(job: Job, done, flagged: bool) -> PIL.Image.Image:
    """A result at the size and in the colours of its picture: outside the mask the picture's pixels.

    What the report says about the outside is then said of this size.
    """
    edited = pictures.restore_size(done.images[0], job.picture.size)
    feather = job.factor if job.settings["feather"] is None else job.settings["feather"]
    feather = min(feather * job.picture.width / job.fitted.width, MAX_FEATHER)
    weights = masks.feathered(done.mask_image, (job.picture.height, job.picture.width), feather)
    original, result = (np.asarray(picture)[None] for picture in (job.original.shown, edited))
    change = change_outside(result.astype(np.float32) / 255, original.astype(np.float32) / 255, weights)
    pasted = not job.args.no_paste_back and not flagged
    done.report.change_outside_before_paste_back = change
    done.report.change_outside = [0.0] if pasted else change
    return job.original.rewritten(edited, weights[0] if pasted else None)


def note_warnings(job: Job, done: Edited) -> None:
    """What the edit says about itself, and about its safety checker."""
    if done.report is not None:
        for warning in done.report.warnings:
            job.note(warning)
    if done.flagged:
        job.note("the model's safety checker blackened the result; try another text or seed.")


def reference_edit(job: Job, pipe) -> Edited:
    """The reference's three calls, one after the other."""
    mask = job.grid_mask if job.grid_mask is not None else find_mask(job, pipe)[0]
    note_emptiness(job, mask)
    latents = job.latents
    if latents is None:
        latents = to_numpy(invert(job, pipe).latents).astype(np.float32)
    settings = job.settings
    away = _prompt(job, "source", "negative_prompt")
    if job.args.negative is not None:
        away = {"negative_prompt": job.args.negative}
    _progress(job, pipe, "edit")
    with job.timed("edit"):
        done = pipe(
            **_prompt(job, "target", "prompt"),
            **away,
            mask_image=mask,
            image_latents=latents,
            inpaint_strength=settings["strength"],
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance"],
            generator=job.args.seed,
            output_type="pil",
        )
    flags = getattr(done, "nsfw_content_detected", None)
    edited = job.original.rewritten(pictures.restore_size(done.images[0], job.picture.size))
    return Edited(job.picture, mask_picture(job, mask), edited, mask, None if not flags else bool(flags[0]))
