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
from mindiffedit.cli.job import Job
from mindiffedit.cli.wording import BLACKENED, note
from mindiffedit.images import pictures, sheets
from mindiffedit.inputs import MAX_FEATHER
from mindiffedit.outputs import DiffEditInversionPipelineOutput, EditReport


@dataclass
class Edited:
    """A result at the picture's own size.

    Attributes:
        image: with the mode, profile and transparency of the picture.
        mask: (1, h, w) on the latents' grid, 1 where the picture may change; soft masks are in [0, 1].
        flagged: whether the safety checker blackened it; None without a checker.
        report: what the edit says about itself.
        map: float32 (1, h, w) that the mask was made of; None with a mask that was given, too.
        latents: the inversion.

    The last three are None with the reference's calls.
    """

    image: PIL.Image.Image
    mask: np.ndarray
    flagged: bool | None
    report: EditReport | None
    map: np.ndarray | None
    latents: DiffEditInversionPipelineOutput | None

    @property
    def share(self) -> float:
        """The part of the latents that the mask marks."""
        return float(self.mask.mean(dtype=np.float64))

    def grid(self, job: Job) -> PIL.Image.Image:
        """Original, mask and edited picture side by side."""
        return sheets.labelled_grid(
            [
                (f"original: {job.source}", job.picture),
                ("mask", masks.as_picture(self.mask, job.picture.size)),
                (f"edited: {job.target}", self.image),
            ]
        )


def note_emptiness(mask: np.ndarray) -> None:
    """Says so where a mask has no edge."""
    if not mask.any():
        note("the mask is empty: nothing is going to change.")
    elif mask.all():
        note("the mask covers the whole picture: all of it may change.")


# --- what goes to the pipeline ---------------------------------------------------------------------


def _progress(job: Job, pipe, stage: str) -> None:
    pipe.set_progress_bar_config(disable=job.args.quiet, file=sys.stderr, desc=stage)


def _prompt(job: Job, which: str, name: str) -> dict[str, Any]:
    """The source's or the target's text as the parameter `name`, or the embeddings of the prompts written about it."""
    if which in job.embeds:
        return {f"{name}_embeds": job.embeds[which]}
    return {name: getattr(job, which)}


def _mask_arguments(job: Job) -> dict[str, Any]:
    """What edit() and generate_mask() have in common."""
    settings = job.settings
    return dict(
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
    arguments = dict(_mask_arguments(job), image=job.fitted)
    if strength is not None:
        arguments["mask_encode_strength"] = strength
    if not job.args.reference:
        arguments.update(
            per_image_clamp=True,
            corrected_guidance=True,
            outlier_quantile=job.settings["outliers"],
            mask_options=job.mask_options,
        )
    _progress(job, pipe, "mask" if strength is None else f"mask, strength {strength:g}")
    with job.timed("mask"):
        return pipe.generate_mask(**arguments, output_type="np", return_map=True)


def whole_mask(job: Job, mask: np.ndarray) -> np.ndarray:
    """A computed mask, combined with --mask where that is asked for."""
    if job.grid_mask is None:
        return mask
    return masks.combine(mask, job.grid_mask, job.settings["mask_combine"])


def invert(job: Job, pipe, strength: float | None = None) -> DiffEditInversionPipelineOutput:
    """The background of every step of an edit; `strength` stands in for --strength."""
    settings, alone = job.settings, job.args.command == "invert"
    arguments = dict(
        image=job.fitted,
        num_inference_steps=settings["steps"],
        inpaint_strength=settings["strength"] if strength is None else strength,
        generator=job.args.seed,
    )
    _progress(job, pipe, "invert" if strength is None else f"invert, strength {strength:g}")
    with job.timed("invert"):
        if settings["inversion"] == "noise":
            return pipe.noise_image(**arguments)
        if settings["iterations"]:
            arguments["inversion_iterations"] = settings["iterations"]
        captioned = not alone and not job.args.reference and job.caption is not None
        return pipe.invert(
            **({"prompt": job.caption} if captioned else _prompt(job, "source", "prompt")),
            guidance_scale=settings["guidance" if alone else "invert_guidance"],
            negative_prompt=job.args.negative if alone else None,
            **arguments,
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
    inverts = inverted is None and settings["inversion"] == "ddim"
    feather = settings["feather"]
    if feather is not None:  # in pixels of the model's size
        feather = min(feather * job.picture.width / job.fitted.width, MAX_FEATHER)
    arguments = dict(
        _mask_arguments(job),
        image=job.picture,
        working_size=job.fitted.size,
        negative_prompt=args.negative,
        inpaint_strength=settings["strength"] if strength is None else strength,
        mask_options=job.mask_options,
        mask_image=job.grid_mask if mask is None else mask,
        mask_combination=settings["mask_combine"] if mask is None else "replace",
        outlier_quantile=settings["outliers"],
        image_latents=inverted,
        paste_back=not args.no_paste_back,
        feather=feather,
        output_type="pil",
        debug_callback=_bar_names(job, pipe, (["invert"] if inverts else []) + [stage]),
    )
    arguments["preset"] = settings["preset"]
    if job.masked_by_inversion:
        del arguments["num_maps_per_mask"], arguments["mask_encode_strength"]
    if guidance is not None:
        arguments["guidance_scale"] = guidance
    if inverted is None:
        arguments["inversion"] = settings["inversion"]
    if inverts:
        arguments.update(
            inversion_prompt=job.caption,
            inversion_guidance_scale=settings["invert_guidance"],
            inversion_iterations=settings["iterations"],
        )
    done = pipe.edit(**arguments)
    for name, seconds in done.report.seconds.items():
        job.add_seconds(name, seconds)
    inverted = DiffEditInversionPipelineOutput(done.image_latents, clean_latents=done.clean_latents)
    return Edited(done.images[0], done.mask_image, _flag(done), done.report, done.mask_map, inverted)


def _bar_names(job: Job, pipe, loops: Iterable[str]):
    """A debugging callback that names the progress bars: each stage begins with its schedule."""
    names = iter(loops)

    def callback(stage, array, step):
        if stage == "timestep":
            _progress(job, pipe, "mask")
        elif stage == "timesteps":
            _progress(job, pipe, next(names, "edit"))

    return callback


def note_warnings(edited: Edited) -> None:
    """What the edit says about itself, and about its safety checker."""
    for warning in edited.report.warnings if edited.report is not None else []:
        note(warning)
    if edited.flagged:
        note(BLACKENED)


def reference_edit(job: Job, pipe) -> Edited:
    """The reference's three calls, one after the other."""
    mask = job.grid_mask if job.grid_mask is not None else find_mask(job, pipe)[0]
    note_emptiness(mask)
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
    image = job.original.rewritten(pictures.restore_size(done.images[0], job.picture.size))
    return Edited(image, mask, _flag(done), report=None, map=None, latents=None)


def _flag(output) -> bool | None:
    flags = output.nsfw_content_detected
    return None if flags is None else bool(flags[0])
