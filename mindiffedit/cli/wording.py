"""What the command says, and how: Python's parameters by its options' names, notes and errors on stderr, exit codes."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable

from mindiffedit import __version__
from mindiffedit.errors import MAX_TEXT_LENGTH, InputError, InputTypeError, Message, cut
from mindiffedit.options import NumericalError

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
"""Exit codes."""


def option(name: str) -> str:
    """The option of a name of `args`: '--mask-strength' of 'mask_strength'."""
    return f"--{name.replace('_', '-')}"


# Fields of `MaskOptions`, and the options that say them.
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

OPTIONS = {
    **{field: option(name) for name, field in MASK_FIELDS.items()},
    **{name: option(name) for name in ("clip_skip", "config", "device", "dtype", "eta", "feather", "inversion")},
    **{name: option(name) for name in ("lambda_auto_corr", "lambda_kl", "mode", "revision", "scheduler", "variant")},
    "clean_latents": "--latents",
    "generator": "--seed",
    "guidance_scale": "--guidance",
    "image": "PICTURE",
    "image_latents": "--latents",
    "inpaint_strength": "--strength",
    "inverse_scheduler": "--scheduler",
    "inversion_guidance_scale": "--invert-guidance",
    "inversion_iterations": "--iterations",
    "inversion_prompt": "--caption",
    "local_files_only": "--offline",
    "mask_combination": "--mask-combine",
    "mask_encode_strength": "--mask-strength",
    "mask_image": "--mask",
    "mask_thresholding_ratio": "--mask-threshold",
    "mindspore_dtype": "--dtype",
    "negative_prompt": "--negative",
    "num_auto_corr_rolls": "--auto-corr-rolls",
    "num_images_per_prompt": "--images-per-prompt",
    "num_inference_steps": "--steps",
    "num_maps_per_mask": "--maps",
    "num_reg_steps": "--reg-steps",
    "outlier_quantile": "--outliers",
    "paste_back=False": "--no-paste-back",
    "preset": "--preset",
    "pretrained_model_name_or_path": "--model",
    "prompt": "--target",
    "requires_safety_checker=False": "--no-safety-checker",
    "safety_checker=None": "--no-safety-checker",
    "source_negative_prompt": "--source-negative",
    "source_prompt": "--source",
    "target_negative_prompt": "--target-negative",
    "target_prompt": "--target",
    "token": "--embedding FILE=WORD",
    "working_size": "--size",
}
"""Options by the parameters of Python that their values go to."""

# Where a command has another option for the same parameter.
_OPTIONS_OF = {
    "invert": {"prompt": "--source"},
    "parity record": {"image": "--image"},
    "parity check": {"image": "--image"},
}


def option_of(command: str) -> Callable[[str], str]:
    """How a command tells of Python's parameters, for `errors.Message.told`: `num_inference_steps` is its --steps."""
    options = {**OPTIONS, **_OPTIONS_OF.get(command, {})}

    def named(parameter: str) -> str:
        if parameter in options:
            return options[parameter]
        name, equals, value = parameter.partition("=")
        name = re.sub(r"(_embeds)?(\[.*)?$", "", name)
        if name in options:
            return " ".join([options[name], *([value.strip("'")] if equals else [])])
        return parameter if parameter.startswith("-") else name.replace("_", " ")

    return named


def told(sentence: object, command: str) -> str:
    """A sentence as the command says it, on one line: a message in the names of its options, another text as it is."""
    return on_one_line(sentence.told(option_of(command)) if isinstance(sentence, Message) else str(sentence))


def on_one_line(text: str) -> str:
    """A text of any lines as one that can be printed."""
    return " ".join(printable(text).split())


def printable(text: str, encoding: str = "utf-8") -> str:
    """A text that a stream of this encoding can carry, be there a path in it whose name is no text."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


# --- notes -----------------------------------------------------------------------------------------

_logger = logging.getLogger(__name__)


def note(sentence: str) -> None:
    """Say a sentence on stderr, once, unless --quiet; it may be a `Message`."""
    _logger.warning("%s", sentence)


@contextlib.contextmanager
def notes(args: Namespace):
    """The command's notes, and what the package warns Python's users of, on stderr; none with --quiet."""
    logger = logging.getLogger("mindiffedit")
    handler = logging.NullHandler() if args.quiet else _Notes(args.command)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Notes(logging.Handler):
    """Each sentence is said once, though every stage may log it."""

    def __init__(self, command: str):
        super().__init__(logging.WARNING)
        self.command = command
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.args[0] if record.msg == "%s" and isinstance(record.args, tuple) else record.getMessage()
        sentence = told(text, self.command)
        if sentence not in self.said:
            self.said.add(sentence)
            print(f"note: {sentence}", file=sys.stderr)


BLACKENED = "the model's safety checker blackened the result; try another text or seed."


# --- errors ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def about(name: str, *parameters: str):
    """An error about one of these parameters of a function is one about the option, by its name in `args`."""
    try:
        yield
    except (InputError, InputTypeError) as error:
        raise error.renamed(**dict.fromkeys(parameters, option(name))) from error


def kind_and_text(error: BaseException) -> str:
    """An error that was not foreseen, on one line, without a full stop."""
    return cut(on_one_line(f"{type(error).__name__}: {error}").rstrip(": ."), 2 * MAX_TEXT_LENGTH)


def report(error: Exception, command: str) -> int:
    """Say what went wrong on stderr; returns the exit code."""
    if isinstance(error, (InputError, InputTypeError, NumericalError)):
        print(f"mindiffedit: error: {told(error.message, command)}", file=sys.stderr)
        return BAD_INPUT
    what = kind_and_text(error)
    if isinstance(error, (OSError, MemoryError)):  # of the surroundings: a full disk
        print(f"mindiffedit: failed: {what}.", file=sys.stderr)
        return FAILED
    traceback.print_exception(error, file=sys.stderr)
    print(
        f"mindiffedit: failed: {what}. This is a bug of mindiffedit {__version__}: please report it to the project's "
        "issue tracker, with all of the above, the command, and what `mindiffedit --version` prints.",
        file=sys.stderr,
    )
    return FAILED
