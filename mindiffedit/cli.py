"""The command `mindiffedit`: edit, mask, invert and demo; `parity` has a module of its own.

Everything that can be wrong with the input is found before a model runs, the cheapest first: numbers and
texts, output paths, the latents file, the picture and the mask, the model folder, the device. MindSpore is
imported for the last of these, so `--help` and most errors answer at once. What can be given is defined in
`arguments`, the file between `invert` and `edit` in `latents_file`.

stdout carries one line (or one JSON object); progress, notes and errors go to stderr. Exit codes: 0 done,
2 for bad input (one sentence), 1 for any other failure, 130 when interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import sys
import time
import warnings
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import PIL.Image

from . import demo, devices, models, options, pictures
from .arguments import BAD_INPUT, DEFAULTS, MASK_NUMBERS, SCHEDULERS, build_parser
from .generator import check_seed
from .latents_file import read_latents, write_latents

# Pictures of more than this many times the pixels that the model was made for are scaled down: far above its
# own size a model repeats objects, and memory grows with the square of the pixels.
AREA_FACTOR = 1.5

OK, FAILED, INTERRUPTED = 0, 1, 130

__all__ = ["main"]


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command with the arguments `argv` (those of the process by default); returns the exit code."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said everything
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    try:
        # Libraries print; stdout is for the result alone.
        with contextlib.redirect_stdout(sys.stderr):
            line, result, *code = _COMMANDS[args.command](args)
        print(json.dumps(result, ensure_ascii=True) if args.json else line, flush=True)
        return code[0] if code else OK
    except KeyboardInterrupt:
        print("mindiffedit: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return _report(error)


def _report(error: Exception) -> int:
    """Say what went wrong on stderr; returns the exit code."""
    if isinstance(error, (ValueError, FileNotFoundError)) and _raised_here(error):
        print(f"mindiffedit: error: {_one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    if not isinstance(error, OSError):  # a full disk needs no traceback
        import traceback

        traceback.print_exception(type(error), error, error.__traceback__, file=sys.stderr)
    print(f"mindiffedit: failed: {type(error).__name__}: {_one_line(error)}", file=sys.stderr)
    return FAILED


def _raised_here(error: BaseException) -> bool:
    """True where the exception was raised by this package: then its message is a sentence for the user."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0] == __name__.partition(".")[0]


def _one_line(error) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- checks that need no model ---------------------------------------------------------------------


@dataclass
class _Job:
    """One command's checked input, and what is learnt on the way."""

    args: Namespace
    settings: Dict[str, Any]
    source: Optional[str] = None
    target: Optional[str] = None
    latents: Optional[np.ndarray] = None
    made: Optional[Dict[str, Any]] = None  # metadata of `latents`
    mask: Optional[PIL.Image.Image] = None
    grid_mask: Optional[np.ndarray] = None  # `mask` on the latents' grid, (1, h, w) of 0 and 1
    picture: Optional[PIL.Image.Image] = None
    folder: Optional[Path] = None  # the model's, once it is here
    configs: Dict[str, Dict[str, Any]] = field(default_factory=dict)  # of its components with weights
    factor: int = 0  # pixels per latent
    fitted: Optional[PIL.Image.Image] = None  # the picture at the size the model works at
    device: str = ""
    scheduler: str = ""
    seconds: Dict[str, float] = field(default_factory=dict)

    def note(self, text: str) -> None:
        if not self.args.quiet:
            print(f"note: {text}", file=sys.stderr)

    @contextlib.contextmanager
    def timed(self, stage: str):
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)


def _begin(args, extensions=None, **outputs) -> _Job:
    """Check numbers, texts and paths to write, read the latents file, and settle the defaults.

    `outputs` are options and their paths, `extensions` what these may end in (None: any picture's).
    """
    job = _Job(args, {})
    check_numbers(vars(args))
    check_seed(args.seed, "--seed")
    if args.command != "invert":
        job.target = _text(args.target, "--target")
    if args.source is not None:
        job.source = _text(args.source, "--source")
    if getattr(args, "negative", None) is not None:
        _encodable(args.negative, "--negative")
    if args.revision is not None and (args.model == "demo" or Path(args.model).is_dir()):
        raise ValueError(f"--revision is for models on the hub, but --model is {args.model}; leave it out.")
    _check_outputs(args, extensions, outputs)
    if getattr(args, "latents", None) is not None:
        _take_latents(job)
    if args.command == "edit" and job.source is None:
        raise ValueError("--source is missing: say what the picture shows.")
    suited = demo.SETTINGS if args.model == "demo" else {}
    for name, default in DEFAULTS.items():
        given = getattr(args, name, None)
        if given is None and job.made is not None and name in ("steps", "strength"):
            given = job.made[name]
        job.settings[name] = suited.get(name, default) if given is None else given
    if job.settings["invert_guidance"] is None:
        job.settings["invert_guidance"] = job.settings["guidance"]
    steps = job.settings["steps"]
    if args.command != "mask":
        options.effective_steps(steps, job.settings["strength"], "--strength")
    if args.command != "invert" and getattr(args, "mask", None) is None:
        options.effective_steps(steps, job.settings["mask_strength"], "--mask-strength")
        if job.source == job.target:
            raise ValueError("--source and --target are the same text: there is nothing to change.")
    return job


def check_numbers(given: Dict[str, Any]) -> None:
    """Check the numbers among `given`, by option name; None was not given."""
    checks = {
        "steps": options.check_steps,
        "strength": options.check_strength,
        "guidance": options.check_guidance_scale,
        "invert_guidance": options.check_guidance_scale,
        "mask_strength": options.check_strength,
        "mask_threshold": options.check_ratio,
        "maps": lambda value, name: options.check_positive_int(name, value),
        "size": lambda value, name: options.check_positive_int(name, value),
    }
    for name, check in checks.items():
        value = given.get(name)
        if value is not None:
            check(value, f"--{name.replace('_', '-')}")


def _text(value: str, name: str) -> str:
    if not value.strip():
        raise ValueError(f"{name} is empty; give a short description of the picture.")
    return _encodable(value, name)


def _encodable(value: str, name: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} is not valid UTF-8 text; check the terminal's encoding.") from None
    return value


def _take_latents(job: _Job) -> None:
    """Read --latents and compare what it was made with to what the edit is asked for."""
    args = job.args
    path = args.latents
    job.latents, job.made = read_latents(path)
    if job.made["scheduler"] not in SCHEDULERS:
        raise ValueError(
            f"{path} is damaged (the scheduler {job.made['scheduler']!r} is unknown); invert anew."
        )
    for name in ("steps", "strength", "scheduler"):
        given = getattr(args, name)
        if given is not None and given != job.made[name]:
            raise ValueError(
                f"{path} was made with --{name} {job.made[name]}, but --{name} is {given}; leave it out or "
                f"invert anew."
            )
    if args.size is not None:
        raise ValueError(f"--size cannot be given with --latents: {path} says the size; leave it out.")
    if job.made["model"] != _model_name(args.model):
        where = f"{path} was made with the model {job.made['model']}, not with {_model_name(args.model)}"
        if os.path.isdir(args.model) and os.path.isabs(job.made["model"]):
            job.note(f"{where}; this is right only if the folder was moved.")
        else:
            raise ValueError(f"{where}; give that --model or invert anew.")
    if job.source is None:
        job.source = job.made["prompt"]


def _model_name(model: str) -> str:
    """'demo', the absolute path of a folder, or a hub id."""
    return os.path.abspath(model) if model != "demo" and os.path.isdir(model) else model


def _check_outputs(args, extensions, outputs: Dict[str, Any]) -> None:
    """Paths that will be written: each can be, no two are one file, none is an input."""
    inputs = {"the picture": args.picture, "--mask": getattr(args, "mask", None),
              "--latents": getattr(args, "latents", None)}
    seen: Dict[str, str] = {}
    for name, path in outputs.items():
        if path is None:
            continue
        pictures.check_output_path(path, extensions)
        real = os.path.realpath(path)
        if real in seen:
            raise ValueError(f"--{name} and --{seen[real]} are the same file {path}; give two names.")
        seen[real] = name
        for other, given in inputs.items():
            if given is not None and os.path.realpath(given) == real:
                raise ValueError(f"--{name} would overwrite {other} {given}; give another name.")


def _read_pictures(job: _Job) -> None:
    """The picture and --mask, and what can be said about them without the model."""
    args = job.args
    job.picture = pictures.load_image(args.picture)
    if job.made is not None and job.made["picture_sha256"] != _fingerprint(job.picture):
        raise ValueError(
            f"{args.latents} was made from another picture (of {job.made['picture_size']} pixels) than "
            f"{args.picture}; invert this one."
        )
    if getattr(args, "mask", None) is not None:
        # No conversion to RGB on the way: luminance of wide greyscale is kept.
        job.mask = pictures.load_image(args.mask, convert_method=lambda mask: mask)
        pictures.preprocess_mask(job.mask)


def _fingerprint(picture: PIL.Image.Image) -> str:
    """Of the pixels, not of the file: the same picture in another file is the same picture."""
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


# --- the model -------------------------------------------------------------------------------------


def _find_model(job: _Job) -> None:
    """Judge a model folder on this machine; a hub id is only looked at."""
    model = job.args.model
    if model == "demo":
        job.folder = demo.checkpoint_folder()
    elif os.path.exists(model):
        job.folder = Path(model)
        if not job.folder.is_dir():
            raise ValueError(f"--model {model} is a file; give a folder in diffusers' layout.")
    else:
        parts = model.split("/")
        if len(parts) != 2 or not all(parts) or model.startswith((".", "~")):
            raise ValueError(f"--model {model}: there is no such folder, and a hub id is organisation/name.")
        return
    _check_folder(job)


def _check_folder(job: _Job) -> None:
    """Find an unusable folder before MindSpore is imported, and fit the pictures to what it says."""
    job.configs = models.check_folder(job.folder, _skipped(job.args))
    _fit(job)


def _skipped(args) -> Tuple[str, ...]:
    """Components of the model that are not wanted."""
    return ("safety_checker",) if args.no_safety_checker else ()


def _fit(job: _Job) -> None:
    """Bring the picture to a size the model can work at, and judge --mask and --latents by it."""
    job.factor, most_pixels = working_limits(job.configs, job.settings["size"])
    if job.made is not None:
        working = job.made["working_size"]
        if any(side % job.factor for side in working):
            raise ValueError(
                f"{job.args.latents} was made at {working[0]} x {working[1]}, which is not a multiple of "
                f"{job.factor}, the pixels per latent of this model; invert anew."
            )
        job.fitted = pictures.restore_size(job.picture, working)
    else:
        job.fitted, notice = pictures.fit_picture(job.picture, job.factor, most_pixels)
        if notice is not None:
            job.note(notice)
    grid = tuple(side // job.factor for side in job.fitted.size)
    if job.mask is not None:
        job.grid_mask = pictures.fit_mask(job.mask, job.picture.size, grid, job.factor)[:, 0]
    if job.latents is not None:
        channels = job.configs["vae"].get("latent_channels", 4)
        steps = options.effective_steps(job.settings["steps"], job.settings["strength"], "--strength")
        options.check_image_latents(job.latents, 1, steps, (channels, grid[1], grid[0]), "--latents")


def working_limits(configs: Dict[str, Dict[str, Any]], size: Optional[int]) -> Tuple[int, int]:
    """Pixels per latent of a model, and the most pixels that it works at; `size` is --size."""
    levels = configs["vae"].get("block_out_channels")
    factor = 2 ** (len(levels) - 1) if isinstance(levels, list) and levels else 8
    if size is not None:
        return factor, size**2
    native = configs["unet"].get("sample_size") or 64
    height, width = native if isinstance(native, list) else (native, native)
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


def _load(job: _Job):
    """The pipeline, on the device asked for. From here on MindSpore is imported."""
    args = job.args
    with job.timed("load"), hushed():
        try:
            job.device = devices.require_device(args.device)
        except RuntimeError as error:
            raise ValueError(_one_line(error)) from error
        if job.folder is None:
            job.folder = models.resolve_folder(
                args.model, revision=args.revision, local_files_only=args.offline, skip=_skipped(args)
            )
            _check_folder(job)
        unchecked = dict(safety_checker=None, requires_safety_checker=False) if args.no_safety_checker else {}
        pipeline = importlib.import_module("mindiffedit.pipeline").StableDiffusionDiffEditPipeline
        pipe = pipeline.from_pretrained(
            str(job.folder),
            mode=args.mode,
            compile_cache=False if args.no_cache else None,
            mindspore_dtype=args.dtype,
            local_files_only=True,
            **unchecked,
        )
        _choose_scheduler(job, pipe)
    return pipe


def _choose_scheduler(job: _Job, pipe) -> None:
    """The solver asked for, or the model's own where it has an inverse, or DDIM; with its inverse."""
    own = type(pipe.scheduler).__name__
    known = [name for name, (forward, _) in SCHEDULERS.items() if forward == own]
    wanted = job.args.scheduler or (job.made["scheduler"] if job.made is not None else None)
    job.scheduler = wanted or (known[0] if known else "ddim")
    schedulers = importlib.import_module("mindiffedit.schedulers")
    forward, inverse = (getattr(schedulers, name) for name in SCHEDULERS[job.scheduler])
    config = pipe.scheduler.config
    pipe.scheduler, pipe.inverse_scheduler = forward.from_config(config), inverse.from_config(config)


def _progress(job: _Job, pipe, stage: str) -> None:
    pipe.set_progress_bar_config(disable=job.args.quiet, file=sys.stderr, desc=stage)


# --- the three stages ------------------------------------------------------------------------------


def _make_mask(job: _Job, pipe) -> np.ndarray:
    """(1, h, w) of 0 and 1 on the latents' grid, given or computed."""
    if job.grid_mask is not None:
        mask = job.grid_mask
    else:
        _progress(job, pipe, "mask")
        with job.timed("mask"):
            mask = pipe.generate_mask(
                image=job.fitted,
                target_prompt=job.target,
                source_prompt=job.source,
                num_maps_per_mask=job.settings["maps"],
                mask_encode_strength=job.settings["mask_strength"],
                mask_thresholding_ratio=job.settings["mask_threshold"],
                num_inference_steps=job.settings["steps"],
                guidance_scale=job.settings["guidance"],
                generator=job.args.seed,
                output_type="np",
            )
    if not mask.any():
        job.note("the mask is empty: nothing is going to change.")
    elif mask.all():
        job.note("the mask covers the whole picture: all of it may change.")
    return mask


def _make_latents(job: _Job, pipe) -> np.ndarray:
    """float32 (1, T, C, h, w), noisiest first, read or computed."""
    if job.latents is not None:
        return job.latents
    alone = job.args.command == "invert"
    _progress(job, pipe, "invert")
    with job.timed("invert"):
        inverted = pipe.invert(
            prompt=job.source,
            image=job.fitted,
            num_inference_steps=job.settings["steps"],
            inpaint_strength=job.settings["strength"],
            guidance_scale=job.settings["guidance" if alone else "invert_guidance"],
            negative_prompt=job.args.negative if alone else None,
            generator=job.args.seed,
        )
    return pictures.to_numpy(inverted.latents).astype(np.float32)


def _make_edit(
    job: _Job, pipe, mask: np.ndarray, latents: np.ndarray
) -> Tuple[PIL.Image.Image, Optional[bool]]:
    """The edited picture, and whether a safety checker blackened it (None without one)."""
    _progress(job, pipe, "edit")
    with job.timed("edit"):
        done = pipe(
            prompt=job.target,
            mask_image=mask,
            image_latents=latents,
            negative_prompt=_negative(job),
            inpaint_strength=job.settings["strength"],
            num_inference_steps=job.settings["steps"],
            guidance_scale=job.settings["guidance"],
            generator=job.args.seed,
            output_type="pil",
        )
    flags = getattr(done, "nsfw_content_detected", None)
    return done.images[0], None if not flags else bool(flags[0])


def _negative(job: _Job) -> str:
    return job.source if job.args.negative is None else job.args.negative


@dataclass
class _Edited:
    """Results at the picture's own size. `share` is the part of the latents that the mask marks."""

    original: PIL.Image.Image
    mask: PIL.Image.Image
    edited: PIL.Image.Image
    share: float
    flagged: Optional[bool]

    def grid(self, job: _Job) -> PIL.Image.Image:
        return pictures.labelled_grid(
            [
                (f"original: {job.source}", self.original),
                ("mask", self.mask),
                (f"edited: {job.target}", self.edited),
            ]
        )


def _whole_edit(job: _Job) -> _Edited:
    """Load, mask, invert, edit; everything at the picture's own size in the end."""
    pipe = _load(job)
    mask = _make_mask(job, pipe)
    latents = _make_latents(job, pipe)
    edited, flagged = _make_edit(job, pipe, mask, latents)
    if flagged:
        job.note("the model's safety checker blackened the result; try another text or seed.")
    return _Edited(
        job.picture,
        _mask_picture(job, mask),
        pictures.restore_size(edited, job.picture.size),
        _share(mask),
        flagged,
    )


def _mask_picture(job: _Job, mask: np.ndarray) -> PIL.Image.Image:
    return pictures.restore_size(pictures.mask_to_pil(mask)[0], job.picture.size)


def _share(mask: np.ndarray) -> float:
    return float(mask.mean(dtype=np.float64))


# --- commands: each returns (line for people, object for machines) ---------------------------------


def _edit(args):
    job = _begin(args, output=args.output, grid=args.grid)
    _read_pictures(job)
    _find_model(job)
    done = _whole_edit(job)
    files = {args.output: done.edited}
    if args.grid is not None:
        files[args.grid] = done.grid(job)
    pictures.save_images_atomically(files)
    return _edit_result(job, done, grid=args.grid)


def _demo(args):
    args.picture = str(demo.sample_picture())
    job = _begin(args)
    folder = Path(args.output)
    names = {name: folder / f"{name}.png" for name in ("edit", "original", "mask", "edited")}
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file; give the name of a folder.")
    _read_pictures(job)
    _find_model(job)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the folder {folder} cannot be made: {error.strerror or error}.") from error
    _check_outputs(args, None, names)
    done = _whole_edit(job)
    pictures.save_images_atomically(
        {
            names["edit"]: done.grid(job),
            names["original"]: done.original,
            names["mask"]: done.mask,
            names["edited"]: done.edited,
        }
    )
    args.output = str(names["edit"])
    return _edit_result(job, done)


def _edit_result(job: _Job, done: _Edited, **extra):
    args, settings = job.args, job.settings
    result = _common_result(job)
    result.update(
        source=job.source,
        target=job.target,
        negative=_negative(job),
        strength=settings["strength"],
        guidance=settings["guidance"],
        mask_share=done.share,
        safety_checker_flagged=done.flagged,
        **extra,
    )
    if job.latents is None:
        result["invert_guidance"] = settings["invert_guidance"]
    if job.mask is None:
        result.update(_mask_settings(job))
    width, height = job.picture.size
    line = f"{args.output}: {width} x {height}, {done.share:.0%} of it in the mask, {_took(job)}"
    return line, result


def _mask(args):
    job = _begin(args, pictures.LOSSLESS_EXTENSIONS, output=args.output)
    _read_pictures(job)
    _find_model(job)
    mask = _make_mask(job, _load(job))
    picture = _mask_picture(job, mask)
    pictures.save_image_atomically(picture, args.output)
    share = _share(mask)
    result = _common_result(job)
    result.update(source=job.source, target=job.target, guidance=job.settings["guidance"], mask_share=share)
    result.update(_mask_settings(job))
    return f"{args.output}: {picture.width} x {picture.height}, {share:.0%} white, {_took(job)}", result


def _invert(args):
    job = _begin(args, (".safetensors",), output=args.output)
    _read_pictures(job)
    _find_model(job)
    latents = _make_latents(job, _load(job))
    made = {
        "prompt": job.source,
        "negative_prompt": args.negative or "",
        "steps": job.settings["steps"],
        "strength": job.settings["strength"],
        "guidance": job.settings["guidance"],
        "scheduler": job.scheduler,
        "model": _model_name(args.model),
        "seed": args.seed,
        "picture_sha256": _fingerprint(job.picture),
        "picture_size": "x".join(map(str, job.picture.size)),
        "working_size": "x".join(map(str, job.fitted.size)),
    }
    write_latents(args.output, latents, made)
    result = _common_result(job)
    result.update(
        source=job.source, strength=made["strength"], guidance=made["guidance"], shape=list(latents.shape)
    )
    return f"{args.output}: latents {' x '.join(map(str, latents.shape))}, {_took(job)}", result


def _mask_settings(job: _Job) -> Dict[str, Any]:
    return {name: job.settings[name] for name in MASK_NUMBERS}


def _took(job: _Job) -> str:
    return f"seed {job.args.seed}, {sum(job.seconds.values()):.1f} s"


def _common_result(job: _Job) -> Dict[str, Any]:
    args = job.args
    return {
        "command": args.command,
        "output": str(args.output),
        "picture": args.picture,
        "width": job.picture.width,
        "height": job.picture.height,
        "working_width": job.fitted.width,
        "working_height": job.fitted.height,
        "model": _model_name(args.model),
        "device": job.device,
        "mode": args.mode,
        "scheduler": job.scheduler,
        "seed": args.seed,
        "steps": job.settings["steps"],
        "seconds": job.seconds,
    }


def _parity(args):
    # Imported when asked for: it imports this module.
    command = importlib.import_module("mindiffedit.parity.command")
    return command.record(args) if args.command == "parity record" else command.check(args)


_COMMANDS = {
    "edit": _edit,
    "mask": _mask,
    "invert": _invert,
    "demo": _demo,
    "parity record": _parity,
    "parity check": _parity,
}
