"""`mindiffedit parity record` and `mindiffedit parity check`: from arguments to golden files and verdicts.

Both begin with everything that can be wrong, before a model runs. Recording imports torch and diffusers, checking
imports MindSpore; neither needs the other's.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from mindiffedit import __version__, demo, options
from mindiffedit.checkpoints import survey
from mindiffedit.cli import checks
from mindiffedit.cli.arguments import CASE_DEFAULTS, CASE_OPTIONS, defaults_of
from mindiffedit.cli.job import working_limits
from mindiffedit.cli.loading import hushed, require_device
from mindiffedit.cli.wording import FAILED, OK, option
from mindiffedit.errors import InputError
from mindiffedit.images import colours, pictures, reading, writing
from mindiffedit.noise.generator import check_seed
from mindiffedit.parity import golden, metrics, report, tolerances
from mindiffedit.parity.case import Case
from mindiffedit.runtime import devices
from mindiffedit.runtime.machine import processor, version_of
from mindiffedit.solvers import CLASSES as SCHEDULERS

_NEGATIVES = ("negative", "invert_negative", "source_negative", "target_negative")
_PACKAGES = ("torch", "diffusers", "mindspore", "mindone", "transformers", "numpy", "safetensors")


# --- record --------------------------------------------------------------------------------------------------------


def record(args: Namespace):
    """Runs the reference on a case and writes the golden file; returns (line, result)."""
    checks.check_names(args)
    settings = _settings(args)
    writing.check_output_path(args.output, (".safetensors",))
    if settings["dtype"] != "float32" and args.no_floors:
        raise InputError(
            "--dtype {dtype} needs floors: the tolerances without them are float32's; leave --no-floors out.",
            dtype=settings["dtype"],
        )
    folder = _folder(args.model)
    if folder.resolve() in Path(args.output).resolve().parent.parents:
        raise InputError(
            "{output} is among the files of the model {folder}; give a name outside of it.",
            output=args.output,
            folder=folder,
        )
    configs = survey.check_folder(folder, ("safety_checker",))
    _check_with_model(settings, configs, folder)
    images = _fitted(args, settings, configs)
    case = _case(settings, images, folder)
    started = time.perf_counter()
    with hushed():
        try:
            import torch

            from mindiffedit.parity import floors, reference
        except (ImportError, AttributeError) as error:  # the latter where diffusers is another release
            absent = isinstance(error, ModuleNotFoundError)
            raise InputError(
                "recording runs the PyTorch reference, but {why}: pip install 'mindiffedit[parity]', in an "
                "environment of its own if you like.",
                why=f"{error.name} is not installed" if absent else f"it cannot be imported ({error})",
            ) from error
        weights = golden.hash_files(folder)
        pipe = reference.load(folder, case, getattr(torch, settings["dtype"]))
        trace = reference.run(pipe, case)
        _say(args, f"the reference ran: {len(trace)} stages.")
        measured = None
        del pipe  # the float64 models take twice its memory
        if not args.no_floors:
            measured = floors.measure_on(reference.load(folder, case, torch.float64), case, trace)
            _say(args, "its float64 run is done: floors measured.")
    manifest = {
        "arguments": settings,
        "calls": case.described(),
        "dtype": settings["dtype"],
        "floors": measured,
        "weights": weights,
        "versions": _versions(),
        "platform": _platform(),
        "recorded": _today(),
        "mended": _mended(case),
    }
    stored = {f"{golden.INPUTS}picture": np.stack([np.asarray(image) for image in images]), **trace}
    golden.write_golden(args.output, stored, manifest)
    result = {
        "command": args.command,
        "output": str(args.output),
        "stages": len(trace),
        "bytes": Path(args.output).stat().st_size,
        "model": str(folder),
        "arguments": settings,
        "seconds": round(time.perf_counter() - started, 1),
    }
    line = "{output}: {stages} stages, {megabytes:.1f} MB, {seconds:.1f} s"
    return line.format(**result, megabytes=result["bytes"] / 1e6), result


def _settings(args: Namespace) -> dict[str, Any]:
    """Every option of the case with its value, checked as far as that goes without a model."""
    defaults = {**defaults_of(args.command, True, args.model == "demo"), **CASE_DEFAULTS}
    settings = {name: getattr(args, name) for name in CASE_OPTIONS}
    settings = {name: defaults.get(name) if value is None else value for name, value in settings.items()}
    if settings["invert_guidance"] is None:
        settings["invert_guidance"] = settings["guidance"]
    settings["seed"] = settings["seed"] or [0]
    checks.check_numbers(settings)
    options.effective_steps(settings["steps"], settings["strength"], "--strength")
    options.effective_steps(settings["steps"], settings["mask_strength"], "--mask-strength")
    options.check_steps(settings["images_per_prompt"], "--images-per-prompt", checks.MAX_SAMPLES)
    # What is said of parameters of the calls, `cli` says of the options that they are given by.
    options.check_eta(settings["eta"])
    regularisation = ("lambda_auto_corr", "lambda_kl", "reg_steps", "auto_corr_rolls")
    options.check_regularisation(*(settings[name] for name in regularisation))
    if settings["solver_order"] not in (None, 1, 2):
        raise InputError(
            "{parameter} has to be 1 or 2, but is {order!r}.", "--solver-order", order=settings["solver_order"]
        )
    _check_texts(settings)
    _check_seeds(settings)
    return settings


def _check_with_model(settings: dict[str, Any], configs, folder: Path) -> None:
    """What a model's configuration says about the options, and what fails in the reference after minutes."""
    options.check_clip_skip(settings["clip_skip"], configs["text_encoder"].get("num_hidden_layers", 12))
    if settings["reg_steps"] == 0:
        return
    rolls = settings["auto_corr_rolls"] if settings["lambda_auto_corr"] > 0 else 0
    if settings["mask_seed"] is not None and rolls > 0:
        raise InputError(
            "--reg-steps fails in the reference with a generator for each prompt; give one --seed and no --mask-seed, "
            "or --lambda-auto-corr 0."
        )
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    kind = config.get("prediction_type", "epsilon")
    if kind != "epsilon" and len(settings["source"]) > 1 and settings["invert_guidance"] > 1:
        raise InputError(  # D7
            "--reg-steps with guidance and this model's prediction type {kind} works for one prompt at a time, but "
            "{count} were given; give --invert-guidance 1, or record them one by one.",
            kind=kind,
            count=len(settings["source"]),
        )


def _check_texts(settings: dict[str, Any]) -> None:
    for name in ("source", "target", *_NEGATIVES):
        for text in settings[name] or ():
            if name in ("source", "target") and not text.strip():
                raise InputError("{parameter} is empty; give a short description of the picture.", option(name))
            if text.encode("utf-8", "replace").decode("utf-8") != text:
                raise InputError("{parameter} is not valid UTF-8 text; check the terminal's encoding.", option(name))
    batch = len(settings["source"])
    if len(settings["target"]) != batch:
        raise InputError(
            "{batch} --source and {count} --target were given; give as many of each.",
            batch=batch,
            count=len(settings["target"]),
        )
    for name in ("image", *_NEGATIVES):
        values = settings[name]
        if values is not None and len(values) != batch and not (name == "image" and len(values) == 1):
            raise InputError(
                "{count} {parameter} were given for {prompts}; give one for each{more}.",
                parameter=option(name),
                count=len(values),
                prompts=_prompts(batch),
                more=", or one for all" if name == "image" else "",
            )
    if settings["source"] == settings["target"]:
        raise InputError("--source and --target are the same text: there is nothing to change.")


def _prompts(count: int) -> str:
    return "1 prompt" if count == 1 else f"{count} prompts"


def _check_seeds(settings: dict[str, Any]) -> None:
    for name in ("seed", "mask_seed"):
        for seed in settings[name] or ():
            check_seed(seed, f"--{name.replace('_', '-')}")
    batch, seeds, mask_seeds = len(settings["source"]), settings["seed"], settings["mask_seed"]
    if len(seeds) == 1 and mask_seeds is None:
        return
    samples = batch * settings["maps"]
    if mask_seeds is None or len(mask_seeds) != samples or len(seeds) != batch:
        raise InputError(
            "with a generator for each prompt and each of its maps, {prompts} of {maps} maps take {batch} --seed and "
            "{samples} --mask-seed, but {seeds} and {mask_seeds} were given; for one generator give one --seed alone.",
            prompts=_prompts(batch),
            maps=settings["maps"],
            batch=batch,
            samples=samples,
            seeds=len(seeds),
            mask_seeds=len(mask_seeds or ()),
        )


def _folder(model: str) -> Path:
    if model == "demo":
        return demo.checkpoint_folder()
    if not Path(model).is_dir():
        raise InputError(
            "{parameter} {model}: there is no such folder; parity works on 'demo' or a local folder.",
            parameter="--model",
            model=model,
        )
    return Path(model)


def _fitted(args: Namespace, settings: dict[str, Any], configs) -> list[PIL.Image.Image]:
    """The pictures at the size that the models work at, all the same."""
    fitted = []
    for path in settings["image"]:
        picture = colours.to_srgb(reading.load_image(path))  # B12: both sides are to see the same
        picture, notice = pictures.fit_picture(picture, *working_limits(configs, settings["size"]))
        if notice is not None:
            _say(args, f"{path}: {notice}")
        fitted.append(picture)
    if len({picture.size for picture in fitted}) > 1:
        sizes = ", ".join(f"{picture.width} x {picture.height}" for picture in fitted)
        raise InputError(
            "the pictures of a batch have to be of one size, but the models would work at {sizes}.", sizes=sizes
        )
    return fitted


# Parameters of the three calls, each with the option that it comes from.
_CALLS = {
    "mask": {
        "target_prompt": "target",
        "source_prompt": "source",
        "target_negative_prompt": "target_negative",
        "source_negative_prompt": "source_negative",
        "num_maps_per_mask": "maps",
        "mask_encode_strength": "mask_strength",
        "mask_thresholding_ratio": "mask_threshold",
        "num_inference_steps": "steps",
        "guidance_scale": "guidance",
    },
    "invert": {
        "prompt": "source",
        "negative_prompt": "invert_negative",
        "num_inference_steps": "steps",
        "inpaint_strength": "strength",
        "guidance_scale": "invert_guidance",
        "decode_latents": "decode_latents",
        "num_reg_steps": "reg_steps",
        "lambda_auto_corr": "lambda_auto_corr",
        "lambda_kl": "lambda_kl",
        "num_auto_corr_rolls": "auto_corr_rolls",
    },
    "edit": {
        "prompt": "target",
        "negative_prompt": "negative",
        "num_inference_steps": "steps",
        "inpaint_strength": "strength",
        "guidance_scale": "guidance",
        "num_images_per_prompt": "images_per_prompt",
        "eta": "eta",
        "clip_skip": "clip_skip",
    },
}


def _case(settings: dict[str, Any], images: list[PIL.Image.Image], folder: Path) -> Case:
    """The calls as `mindiffedit edit` makes them, with the options that only `parity` has."""
    if settings["scheduler"] is None:  # the model's own where the command line has a name for it
        own = survey.scheduler_class(folder)
        settings["scheduler"] = next((name for name, (forward, _) in SCHEDULERS.items() if forward == own), "ddim")
    order = settings["solver_order"]
    if order is not None and settings["scheduler"] != "dpm":
        raise InputError(
            "{parameter} is an option of --scheduler dpm, but the scheduler is {scheduler}.",
            parameter="--solver-order",
            scheduler=settings["scheduler"],
        )
    values = {**settings, "negative": settings["source"] if settings["negative"] is None else settings["negative"]}
    if len(settings["source"]) == 1:
        values = _alone(values)
    calls = {call: {name: values[given] for name, given in names.items()} for call, names in _CALLS.items()}
    seeds = dict.fromkeys(_CALLS, settings["seed"][0])
    if settings["mask_seed"] is not None:
        copies = settings["images_per_prompt"]
        seeds = {"mask": settings["mask_seed"], "invert": settings["seed"]}
        seeds["edit"] = [seed for seed in settings["seed"] for _ in range(copies)]
    return Case(
        image=images if len(images) > 1 else images[0],
        **calls,
        seeds=seeds,
        scheduler=SCHEDULERS[settings["scheduler"]][0],
        scheduler_options={} if order is None else {"solver_order": order},
    )


def _mended(case: Case) -> list[str]:
    """Ids in docs/differences.md of crashes of the reference that were mended to record this case."""
    unguided = case.mask is not None and case.mask["guidance_scale"] <= 1
    return ["W1"] * unguided + ["W3"] * (case.scheduler != SCHEDULERS["ddim"][0])


# --- check ---------------------------------------------------------------------------------------------------------


def check(args: Namespace):
    """Replays a golden file; returns (table and verdict, result, exit code)."""
    checks.check_names(args)
    _check_outputs(args)
    recording = golden.read_golden(args.golden)
    manifest = recording.manifest
    settings, case, floors = _recorded(args.golden, recording)
    limits = _limits(settings, recording.trace, (floors or {}).get("isolated" if args.isolate else "chained"))
    given = {name: getattr(args, name) for name in CASE_OPTIONS if name != "image"}
    golden.check_arguments(_alone(settings), _alone(given))
    folder = _folder(args.model)
    golden.check_files(folder, manifest["weights"])
    if args.image is not None:
        _check_pictures(args, settings, survey.check_folder(folder, ("safety_checker",)), recording)

    started = time.perf_counter()
    with hushed():
        device = require_device(args.device)
        if settings["dtype"] != "float32" and devices.supported_dtype(settings["dtype"])[1] is not None:
            raise InputError(
                "{golden} was recorded in {dtype}, for which {device} computes in float32; record anew in float32, or "
                "check where there is a device for it.",
                golden=args.golden,
                dtype=settings["dtype"],
                device=device,
            )
        from mindiffedit.parity import replay

        precision = devices.exact_float32() if settings["dtype"] == "float32" else None
        pipe = replay.load(folder, case, args.mode, settings["dtype"], compile_cache=False if args.no_cache else None)
        pipe.jit_level = args.jit_level
        _say(args, f"replaying on {device}, mode {args.mode}.")
        ended = None
        try:
            ours = replay.run(pipe, case, recording.trace, isolate=args.isolate)
        except options.NumericalError as error:
            # Not bad input: the recorded run has none of it. What is missing from here on is out of tolerance.
            ended, ours = str(error), error.trace
            _say(args, f"the replay ended early: {ended}")
    # Of recordings from before the UNet's outputs were among the stages, the others are compared.
    unknown = {f"{call}/predictions" for call in _CALLS} - set(recording.trace)
    comparisons = metrics.compare_traces(
        {name: array for name, array in ours.items() if name not in unknown}, recording.trace, limits
    )
    context = {
        "golden file": str(args.golden),
        "recorded": f"{manifest['recorded']} with {_said(manifest['versions'], ('torch', 'diffusers'))}",
        "model": str(folder),
        "device": device,
        "mode": args.mode,
        "dtype": settings["dtype"],
        "inputs of each stage": (
            "the reference's (isolated)" if args.isolate else "those of the stage before (chained)"
        ),
        "tolerances": "multiples of the recorded floors" if floors else "the table's, no floors recorded",
        "versions": _said(_versions(), ("mindspore", "mindone", "numpy")),
        "platform": _platform()["system"],
        "date": _today(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    if precision is not None:
        context["precision"] = precision
    if ended is not None:
        context["ended early"] = ended
    if args.report is not None:
        report.write_report(args.report, comparisons, context)
    drawings = []
    if args.save_diff is not None:
        drawings = [str(path) for path in report.save_diff(args.save_diff, comparisons, ours, recording.trace)]
    result = {
        "command": args.command,
        "golden": str(args.golden),
        "ok": metrics.passed(comparisons),
        "verdict": report.verdict(comparisons),
        "report": args.report,
        "heat_maps": drawings,
        **{name: context[name] for name in ("model", "device", "mode", "dtype", "seconds")},
        "isolated": args.isolate,
        "ended_early": ended,
        "stages": report.as_plain(comparisons),
    }
    line = f"{report.table_text(comparisons)}\n{result['verdict']}"
    return line, result, OK if result["ok"] else FAILED


def _check_outputs(args: Namespace) -> None:
    """Whether the report and the pictures can be written."""
    if args.report is not None:
        report.check_report_path(args.report)
        if os.path.realpath(args.report) == os.path.realpath(args.golden):
            raise InputError(
                "{parameter} would overwrite the golden file {golden}; give another name.",
                parameter="--report",
                golden=args.golden,
            )
    if args.save_diff is not None:
        folder = Path(args.save_diff)
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise InputError(
                "{parameter} {folder}: {there} is a file; give the name of a folder.",
                parameter="--save-diff",
                folder=folder,
                there=there,
            )
        writing.check_writable(there, f"--save-diff {folder}")


def _alone(given: dict[str, Any]) -> dict[str, Any]:
    """Options that may be given several times but were once, as that one value: messages are read by people."""
    return {name: value[0] if isinstance(value, list) and len(value) == 1 else value for name, value in given.items()}


def _limits(settings: dict[str, Any], trace: dict[str, np.ndarray], floors) -> dict[str, metrics.Limit]:
    """The table's tolerances; half precision moves pixels as far as what is decoded may move."""
    limits = tolerances.limits(trace, floors)
    if settings["dtype"] != "float32" and {"edit/decoded", "edit/picture"} <= set(limits):
        size = np.sqrt(np.mean(np.square(trace["edit/decoded"], dtype=np.float64)))
        levels = math.ceil(255 / 2 * size * limits["edit/decoded"].value)  # -1 to 1 becomes 0 to 255
        limits["edit/picture"] = metrics.Limit("levels", max(1, levels))
    return limits


def _recorded(path, recording: golden.Golden):
    """Arguments, case and floors of a golden file; one that lacks any was not made by `parity record`."""
    manifest = recording.manifest
    try:
        settings = {name: manifest["arguments"][name] for name in CASE_OPTIONS}
        images = [PIL.Image.fromarray(pixels) for pixels in recording.inputs["picture"]]
        case = Case(image=images if len(images) > 1 else images[0], **manifest["calls"])
        return settings, case, manifest["floors"]
    except (KeyError, TypeError) as error:
        raise InputError(
            "{path} does not say all that a replay needs ({error}); record it anew with `mindiffedit parity record`.",
            path=path,
            error=error,
        ) from error


def _check_pictures(args, settings, configs, recording: golden.Golden) -> None:
    """--image, if it is given again, has to show the recorded pixels."""
    again = _fitted(args, {**settings, "image": args.image}, configs)
    if not np.array_equal(np.stack([np.asarray(image) for image in again]), recording.inputs["picture"]):
        raise InputError(
            "{golden} was recorded with another picture than --image {given}; leave it out or record anew.",
            golden=args.golden,
            given=", ".join(args.image),
        )


# --- both ----------------------------------------------------------------------------------------------------------


def _say(args: Namespace, text: str) -> None:
    if not args.quiet:
        print(f"note: {text}", file=sys.stderr)


def _today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())


def _versions() -> dict[str, str]:
    versions = {package: version_of(package) for package in _PACKAGES}
    there = {package: version for package, version in versions.items() if version is not None}
    return {"mindiffedit": __version__, "python": platform.python_version(), **there}


def _platform() -> dict[str, str]:
    """What the last bits of the reference depend on besides its versions: its vector library looks at the processor."""
    return {"system": f"{platform.system()} {platform.machine()}", "processor": processor()}


def _said(versions: dict[str, Any], names) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name))
