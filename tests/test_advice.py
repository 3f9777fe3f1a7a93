"""Errors about input: the right kind, the right parameter, the words of the call, and advice that works."""

import argparse
import ast
import functools
import itertools
import json
import logging
import re
import string
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import save_file
from test_cli import INVERT, SOURCE, TARGET, FakePipeline, edit, ran, refused, stages, work  # noqa: F401

import mindiffedit
import mindiffedit.parity
from mindiffedit import InputError, InputTypeError, MaskOptions, masks, options
from mindiffedit.cli import command as cli
from mindiffedit.cli.arguments import build_parser
from mindiffedit.cli.latents_file import read_latents
from mindiffedit.cli.wording import OPTIONS
from mindiffedit.editing import _warnings
from mindiffedit.errors import MAX_TEXT_LENGTH, Message
from mindiffedit.noise.generator import Generator
from mindiffedit.outputs import EditReport

PACKAGE = Path(mindiffedit.__file__).parent

# --- Python: an error, and what it advises ---------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(sd1_folder):
    pipe = mindiffedit.StableDiffusionDiffEditPipeline.from_pretrained(
        sd1_folder, mode="pynative", safety_checker=None, requires_safety_checker=False
    )
    pipe.scheduler = mindiffedit.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.inverse_scheduler = None
    pipe.set_progress_bar_config(disable=True)
    return pipe


PICTURE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
QUICK = dict(num_inference_steps=2, generator=0)


def noised(pipe, image=PICTURE, **kwargs):
    return pipe.noise_image(image, **{**QUICK, **kwargs})


def map_of(pipe, **kwargs):
    given = dict(image=PICTURE, source_prompt="a cat", target_prompt="a dog", num_maps_per_mask=1, **QUICK)
    return pipe.generate_mask(**{**given, **kwargs})


def edited(pipe, **kwargs):
    given = dict(image=PICTURE, source_prompt="a cat", target_prompt="a dog", inversion="noise", output_type="latent")
    given.update(mask_image=PIL.Image.new("L", (32, 24), 255), guidance_scale=1, **QUICK)
    return pipe.edit(**{**given, **kwargs})


def inverted(pipe, **kwargs):
    return pipe.invert(**{**dict(prompt="a cat", image=PICTURE, guidance_scale=1, **QUICK), **kwargs})


# call, what is wrong, the parameter it is about, words of the sentence, what it advises (in place of what is wrong)
ADVICE = [
    (noised, dict(inpaint_strength=0.1), "inpaint_strength", "give at least 0.5", dict(inpaint_strength=0.5)),
    (noised, dict(inpaint_strength=0.1), "inpaint_strength", "`num_inference_steps` of at least 10",
     dict(inpaint_strength=0.1, num_inference_steps=10)),
    (noised, dict(inpaint_strength=5e-324), "inpaint_strength", "give at least 0.5", dict(inpaint_strength=0.5)),
    (noised, dict(inpaint_strength=None), "inpaint_strength", "give a number from 0 to 1", dict(inpaint_strength=1)),
    (noised, dict(num_inference_steps=10**400), "num_inference_steps", "characters", dict(num_inference_steps=2)),
    (noised, dict(batch_size=0), "batch_size", "positive integer", dict(batch_size=1)),
    (noised, dict(image=[PICTURE] * 2, batch_size=3), "image", "one for all", dict(image=PICTURE, batch_size=3)),
    (noised, dict(generator=[]), "generator", "or None", dict(generator=None)),
    (noised, dict(generator=[0, 1]), "generator", "matches the length", dict(generator=[0])),
    (noised, dict(generator=2**64), "generator", "2**64 - 1", dict(generator=2**64 - 1)),
    (map_of, dict(mask_encode_strength=0.2), "mask_encode_strength", "at least 0.5", dict(mask_encode_strength=0.5)),
    (map_of, dict(target_prompt="a cat"), "target_prompt", "say in the target prompt", dict(target_prompt="a pig")),
    (map_of, dict(target_prompt=["a dog"] * 2), "source_prompt", "as many of each",
     dict(target_prompt=["a dog"] * 2, source_prompt=["a cat"] * 2)),
    (map_of, dict(outlier_quantile=0), "outlier_quantile", "None switches it off", dict(outlier_quantile=None)),
    (map_of, dict(mask_options={}), "mask_options", "MaskOptions(smoothing=1.0)",
     dict(mask_options=MaskOptions(smoothing=1.0))),
    (map_of, dict(guidance_scale="7"), "guidance_scale", "'7' of type str", dict(guidance_scale=7)),
    (map_of, dict(target_prompt=None), "target_prompt", "Provide either `target_prompt` or `target_prompt_embeds`",
     dict(target_prompt="a dog")),
    (inverted, dict(image=None), "image", "give a picture", dict(image=PICTURE)),
    (inverted, dict(inversion_iterations=1, num_reg_steps=1), "inversion_iterations", "one of the two to 0",
     dict(inversion_iterations=1, num_reg_steps=0)),
    (inverted, dict(cross_attention_kwargs={"scale": [1]}), "cross_attention_kwargs",
     "`cross_attention_kwargs['scale']` is list", dict(cross_attention_kwargs={"scale": 1.0})),
    (edited, dict(mask_image=None, mask_combination="union"), "mask_combination", "no `mask_image`",
     dict(mask_combination="replace")),
    (edited, dict(inversion_iterations=2), "inversion_iterations", "leave them out", {}),
    (edited, dict(feather=-1), "feather", "0 switches it off", dict(feather=0)),
    (edited, dict(callback_on_step_end_tensor_inputs="latents"), "callback_on_step_end_tensor_inputs", "['latents']",
     dict(callback_on_step_end_tensor_inputs=["latents"])),
]  # fmt: skip


def test_advice_of_the_pipeline(pipe):
    for call, wrong, parameter, words, right in ADVICE:
        before = dict(pipe._stages.calls)
        with pytest.raises((InputError, InputTypeError)) as caught:
            call(pipe, **wrong)
        said = str(caught.value)
        assert caught.value.parameter == parameter and words in said, said
        assert len(said) < 500 and "\n" not in said and "--" not in said
        assert dict(pipe._stages.calls) == before  # no model ran
        call(pipe, **right)


def test_latents_that_do_not_fit_are_told_how_to(pipe):
    latents = noised(pipe, inpaint_strength=1.0)
    with pytest.raises(InputError, match="the same `num_inference_steps` and `inpaint_strength`") as caught:
        edited(pipe, inversion="ddim", image_latents=latents, inpaint_strength=0.5)
    assert caught.value.parameter == "image_latents"
    edited(pipe, inversion="ddim", image_latents=latents, inpaint_strength=1.0)
    with pytest.raises(InputError, match="`inversion='noise'` and `image_latents` exclude each other"):
        edited(pipe, image_latents=latents, inpaint_strength=1.0)


def test_iterations_with_another_solver(pipe, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "scheduler", mindiffedit.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config))
        with pytest.raises(InputError, match="set it to 0, or choose DDIM as `scheduler`") as caught:
            inverted(pipe, inversion_iterations=1)
        inverted(pipe, inversion_iterations=0)
    assert caught.value.parameter == "inversion_iterations"
    inverted(pipe, inversion_iterations=1)


# call without a pipeline, arguments that are wrong, parameter, words, arguments that are advised
PARTS = [
    (MaskOptions, dict(threshold=1), "threshold", "0.5 is the paper's", dict(threshold=0.5)),
    (MaskOptions, dict(erosion=-1), "erosion", "0 switches it off", dict(erosion=0)),
    (masks.combine, dict(automatic=None, own=np.ones((1, 2, 2)), how="union"), "automatic", "`how` of 'replace'",
     dict(automatic=None, own=np.ones((1, 2, 2)), how="replace")),
    (masks.user_mask, dict(mask=[[0, 1], [1]], size=(2, 2)), "mask", "each row as many",
     dict(mask=[[0, 1], [1, 0]], size=(2, 2))),
    (options.check_temperature, dict(value=0), "temperature", "`do_sample=False`", dict(value=1)),
    (options.check_top_k, dict(value=-1), "top_k", "None or 0", dict(value=0)),
    (Generator, dict(device="cpu", multiprocessors=3), "multiprocessors", "`device='cuda'`",
     dict(device="cuda", multiprocessors=3)),
]  # fmt: skip


def test_advice_of_the_parts():
    for call, wrong, parameter, words, right in PARTS:
        with pytest.raises((InputError, InputTypeError)) as caught:
            call(**wrong)
        assert caught.value.parameter == parameter and words in str(caught.value), caught.value
        call(**right)


# --- the command line ------------------------------------------------------------------------------

MODEL = ["--model", "model"]

# What is wrong with an edit, words of the sentence, and what it advises.
EDITS = [
    ("--strength 0.01", "give at least 0.02", "--strength 0.02"),
    ("--strength 0.01", "or --steps of at least 100", "--strength 0.01 --steps 100"),
    ("--mask-strength 0", "give at least 0.02", "--mask-strength 0.02"),
    ("--guidance 1 --negative x", "give --guidance above 1", "--guidance 1.5 --negative x"),
    ("--guidance 1 --negative x", "leave --negative out", "--guidance 1"),
    ("--guidance -1", "1 or less means no guidance", "--guidance 0"),
    ("--outliers 0", "None switches it off", "--outliers None"),
    ("--mask-level 1", "0.5 is the paper's", "--mask-level 0.5"),
    ("--smallest-region -1", "0 switches it off", "--smallest-region 0"),
    ("--inversion noise --iterations 2", "leave one of the two out", "--iterations 2"),
    ("--mask p.png --maps 2", "give --mask-combine union", "--mask p.png --maps 2 --mask-combine union"),
    ("--mask-combine union", "give --mask FILE", "--mask-combine union --mask p.png"),
    ("--reference --caption x", "leave one of the two out", "--reference"),
    ("--sweep-guidances 1,2", "give its file by --sweep", "--sweep-guidances 1,2 --sweep s.png"),
    ("--sweep s.png --sweep-guidances 1;2", "as 0.3,0.5,0.7", "--sweep s.png --sweep-guidances 0.3,0.5,0.7"),
    ("--sweep s.png --sweep-guidances 2,2", "each value once", "--sweep s.png --sweep-guidances 2"),
    ("--sweep s.png --sweep-strengths 0.01", "at least 0.02", "--sweep s.png --sweep-strengths 0.02"),
    (f"--sweep s.png --sweep-guidances {','.join(map(str, range(1, 900)))}", "at most 12", "--sweep s.png"),
    ("--variant fp16 --model demo", "leave --variant out", "--model demo"),
    ("--grid out.png", "give two names", "--grid grid.png"),
    ("--grid p.png", "give another name", "--grid grid.png"),
    ("--size 0", "from 1 to 65536", "--size 64"),
    ("--seed 18446744073709551616", "2**64 - 1", "--seed 18446744073709551615"),
    ("--scheduler dpm --iterations 1", "refines DDIM's inversion", "--scheduler ddim --iterations 1"),
]


def test_advice_of_the_command(work, capsys):  # noqa: F811
    for wrong, words, right in EDITS:
        refused(capsys, edit(*wrong.split()), words)
        ran(capsys, edit(*right.split()))
        assert stages()
        for path in {*Path().glob("*.png")} - {Path("p.png")}:
            path.unlink()


def test_advice_about_latents(work, capsys):  # noqa: F811
    with_latents, model = ["edit", "p.png", "--target", TARGET, "-o", "out.png", "--latents", "l.safetensors"], MODEL
    refused(capsys, with_latents, "make one with `mindiffedit invert`")
    refused(capsys, [*INVERT, "--negative", "x"], "give --guidance above 1")
    ran(capsys, [*INVERT, "--negative", "x", "--guidance", "2"])
    ran(capsys, [*INVERT, "--steps", "10"])
    assert read_latents("l.safetensors")[2]["steps"] == 10
    refused(capsys, [*with_latents, *model, "--steps", "20"], "with --steps 10, but --steps is 20; leave it out")
    refused(capsys, [*with_latents, *model, "--size", "64"], "leave it out")
    refused(capsys, with_latents, "give that --model")
    ran(capsys, [*with_latents, *model])


def test_warnings_are_told_in_the_command_s_words(work, capsys, monkeypatch):  # noqa: F811
    warnings = _warnings(EditReport([0.0], [2.0]), SOURCE, "pears", False)
    monkeypatch.setattr(FakePipeline, "warnings", warnings)
    line, err = ran(capsys, edit("--json"))
    said = json.loads(line)["report"]["warnings"]
    assert len(said) == 3 and all(f"note: {sentence}" in err for sentence in said)
    assert "lower --mask-threshold or raise --maps" in said[0] and "raise --steps or --iterations" in said[1]
    assert "`mask_thresholding_ratio`" in warnings[0] and all(isinstance(each, Message) for each in warnings)


def test_a_name_of_two_lines_leaves_the_result_on_one(work, capsys):  # noqa: F811
    line, _ = ran(capsys, [*edit(), "-o", "a\nb.png"])
    assert line.startswith("a b.png: ") and Path("a\nb.png").exists()


def test_a_note_is_said_once_a_command(work, capsys, monkeypatch):  # noqa: F811
    logger = logging.getLogger("mindiffedit.text.prompts")
    FakePipeline.breaks["whole"] = lambda: [logger.warning("%s was cut off", text) for text in ("a", "b", "a")]
    for _ in range(2):
        _, err = ran(capsys, edit())
        assert err.count("note: a was cut off") == err.count("note: b was cut off") == 1


def test_words_in_common():
    for source, target, warned in (
        ("a bowl of fruit", "pears", True),
        ("a bowl of fruit", "a bowl of pears", False),
        ("一碗水果", "一碗梨", False),
        ("りんごの写真", "バナナ", False),
        ("ชามผลไม้", "ชามลูกแพร์", False),
        ("사과 한 그릇", "배 한 그릇", False),
        ("Un CAFÉ", "cafe\u0301 noir", False),
        ("", "pears", False),
    ):
        warnings = _warnings(EditReport([0.5], [0.1]), source, target, False)
        assert any("no word in common" in each for each in warnings) is warned and len(warnings) == warned, source


def test_our_own_faults_are_no_bad_input(work, capsys, monkeypatch):  # noqa: F811
    """An exception of a library inside this package, or one of ours that is no InputError, is a bug."""
    for fault in (
        lambda: np.concatenate([np.zeros(2), np.zeros((2, 2))]),
        lambda: {}["some key"],
        lambda: options.check_steps(),
    ):
        FakePipeline.breaks["whole"] = fault
        assert cli.main(edit("--json")) == 1
        out, err = capsys.readouterr()
        last = err.splitlines()[-1]
        assert out == "" and "Traceback (most recent call last)" in err
        assert re.match(r"mindiffedit: failed: \w+Error: ", last), last
        assert f"a bug of mindiffedit {mindiffedit.__version__}" in last and "report it" in last
    FakePipeline.breaks.clear()
    # Inside the package itself.
    full = OSError(28, "No space left on device", "x" * 5000)
    for error, is_bug in (ValueError("need an array"), True), (full, False), (MemoryError(), False):
        monkeypatch.setattr(masks, "as_picture", Mock(side_effect=error))
        assert cli.main(edit("--grid", "grid.png")) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
        assert ("a bug" in line) == is_bug and len(line) < 600


def test_errors_of_the_calls_are_told_as_options(work, capsys):  # noqa: F811
    advice = "{parameter}: give {guidance_scale=1}, {variant='fp16'} or {cross_attention_kwargs}."
    for error, start, end in (
        (InputError("{parameter} is {x!r}.", parameter="num_inference_steps", x="y" * 5000),
         "--steps is 'yyy", "(5002 characters)."),
        (InputTypeError(advice, parameter="prompt"),
         "--target: give --guidance 1, --variant fp16 or ", "cross attention kwargs."),
    ):  # fmt: skip
        FakePipeline.breaks["whole"] = Mock(side_effect=error)
        assert cli.main(edit()) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"mindiffedit: error: {start}") and said.endswith(end)


# --- any option, any value -------------------------------------------------------------------------

HOSTILE = [
    *("", "0", "-1", "nan", "inf", "-inf", "1e400", "9" * 400, "5e-324", "1,", "=", "{", "{parameter}", "\n"),
    *("x" * 10_000, "a b " * 2500, "\udcff", "model", "p.png", "p.png=", "missing.png", "`prompt`"),
]


def options_of(command):
    """Those that take a value; of the other commands only what `edit`, or `parity record`, has not."""
    parser = build_parser()
    for word in command.split():
        parser = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices[word]
    valueless = (argparse._HelpAction, argparse.BooleanOptionalAction)
    taken = [a for a in parser._actions if a.nargs != 0 and not isinstance(a, valueless)]
    like = {"edit": None, "parity record": None, "parity check": "parity record"}.get(command, "edit")
    known = [] if like is None else [a.dest for a in options_of(like) if a.dest not in ("output", "guidance")]
    return [a for a in taken if a.dest not in known]


@pytest.mark.parametrize("command", ["edit", "mask", "invert", "demo", "parity record", "parity check"])
def test_hostile_values_of_every_option(work, capsys, monkeypatch, command):  # noqa: F811
    texts, model = ["--source", SOURCE, "--target", TARGET], ["--model", "model"]
    usual = {
        "edit": ["p.png", *texts, "-o", "out.png", *model],
        "mask": ["p.png", *texts, "-o", "mask.png", *model],
        "invert": ["p.png", "--source", SOURCE, "-o", "latents.safetensors", *model],
        "demo": ["-o", "folder"],
        "parity record": ["--image", "p.png", *texts, "-o", "golden.safetensors", *model],
        "parity check": ["golden.safetensors", *model],
    }[command]
    monkeypatch.setattr(cli, "build_parser", functools.cache(build_parser))  # most of the time of a refused call
    monkeypatch.setitem(sys.modules, "mindiffedit.parity.reference", None)  # it would compute for long
    monkeypatch.delattr(mindiffedit.parity, "reference", raising=False)  # imported by another test
    save_file({}, work / "golden.safetensors")
    python = "|".join(f"`{name}`" for name in OPTIONS)
    for action, value in itertools.product(options_of(command), HOSTILE):
        given = [f"{action.option_strings[-1]}={value}"] if action.option_strings else []
        argv = [*command.split(), *(usual if given else [value, *usual[1:]]), *given]
        code = cli.main(argv)
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith("note: ") and "prints" not in line]
        assert code in (0, 2) and "Traceback" not in err, (argv, err)
        assert len(lines) == (code == 2) and (out == "") == (code == 2), (argv, err)
        assert all(len(line) < 3 * MAX_TEXT_LENGTH for line in err.splitlines()), (argv, err)
        assert not re.search(python, err.replace("`prompt`", "") if "`prompt`" in value else err), (argv, err)


# --- the sources -----------------------------------------------------------------------------------


def test_sentences_with_fields_are_literals():
    """A text of the user's would otherwise be read for fields; and each value has a field."""
    found = 0
    for path in PACKAGE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        texts = {node.targets[0].id: node.value for node in nodes
                 if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}  # fmt: skip
        for call in nodes:
            name = isinstance(call, ast.Call) and getattr(call.func, "id", getattr(call.func, "attr", None))
            if name not in ("InputError", "InputTypeError", "Message", "CheckpointError", "WeightsError"):
                continue
            given = {keyword.arg for keyword in call.keywords}
            if path.name == "errors.py" or not given and len(call.args) == 1 and name != "Message":
                continue
            where = f"{path.name}:{call.lineno}"
            template = texts.get(getattr(call.args[0], "id", None), call.args[0])
            if isinstance(template, ast.Attribute) and template.attr == "message":
                continue  # that of another error
            assert isinstance(template, ast.Constant) and isinstance(template.value, str), where
            fields = {field for _, field, _, _ in string.Formatter().parse(template.value) if field is not None}
            assert given - {"parameter"} <= fields, where
            for field in fields - given - {"parameter"}:
                assert re.fullmatch(r"[a-z_]\w*(=[\w']+)?", field), where
            assert "parameter" not in fields or "parameter" in given or len(call.args) > 1, where
            found += 1
    assert found > 150
