"""The command line: what reaches the pipeline, what comes back, what is refused before a model is loaded.

Most tests run with a pipeline that only notes what it is asked; a few with a real model, the demo's or a tiny one.
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import PIL.Image
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from mindiffedit import demo, masks, options
from mindiffedit.cli import command as cli
from mindiffedit.cli.arguments import (  # fmt: skip
    _PARAMETERS,
    CORRECTED_DEFAULTS,
    DEFAULTS,
    SCHEDULERS,
    build_parser,
    option_of,
    told,
)
from mindiffedit.cli.latents_file import read_latents
from mindiffedit.editing import EDIT_MASK
from mindiffedit.errors import Message, named
from mindiffedit.outputs import DiffEditInversionPipelineOutput, DiffEditOutput, EditReport
from mindiffedit.pipeline import StableDiffusionDiffEditPipeline

COMMANDS = ("edit", "mask", "invert", "demo", "parity record", "parity check")
SOURCE, TARGET = "a red apple on a table", "a yellow pear on a table"


class FakeScheduler:
    config = {"beta_start": 0.1}

    def __init__(self, config):
        self.config = config

    @classmethod
    def from_config(cls, config, **options):
        return cls({**config, **options})


class PNDMScheduler(FakeScheduler):
    pass


class DPMSolverMultistepScheduler(FakeScheduler):
    pass


def as_the_real_one(method):
    """A method of the fake that takes what the pipeline's method of its name takes, and nothing else."""
    real = inspect.signature(getattr(StableDiffusionDiffEditPipeline, method.__name__))

    @functools.wraps(method)
    def called(self, *args, **kwargs):
        real.bind(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    return called


class FakePipeline:
    """Notes every call in `calls`. The mask marks the left half; the edit is a flat picture."""

    calls = []
    own_scheduler = PNDMScheduler
    own_options = {"beta_start": 0.2}
    tokenizer = types.SimpleNamespace(added_tokens_encoder={"<|endoftext|>": 1})
    breaks = {}  # stage: what it does instead
    flags = None
    warnings = []
    components = {
        "unet": types.SimpleNamespace(config={"sample_size": 16}),
        "vae": types.SimpleNamespace(config={"block_out_channels": (8,) * 4, "latent_channels": 4}),
    }

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        cls.calls.append(("load", path, kwargs))
        cls.breaks.get("load", lambda: None)()
        print("a library prints")
        return cls()

    from_single_file = from_pretrained

    def __init__(self):
        self.scheduler = self.own_scheduler(self.own_options)
        self.view = lambda stage, array, step: None

    def set_progress_bar_config(self, **kwargs):
        self.calls.append(("bar", kwargs))

    @contextlib.contextmanager
    def debugging(self, view):
        self.view = view
        yield self

    def _note(self, stage, kwargs):
        print("a stage prints")
        self.calls.append((stage, kwargs, self))
        self.breaks.get(stage, lambda: None)()

    @as_the_real_one
    def load_lora_weights(self, path, **kwargs):
        self._note("lora", dict(kwargs, path=path))

    @as_the_real_one
    def set_adapters(self, names, weights):
        self._note("adapters", dict(zip(names, weights)))

    @as_the_real_one
    def load_textual_inversion(self, path, token):
        self._note("embedding", dict(path=path, token=token))

    @as_the_real_one
    def generate_mask(self, **kwargs):
        self._note("mask", kwargs)
        seen = self._map(kwargs["image"])
        mask = (seen > 1).astype(np.int64)
        return (mask, seen) if kwargs.get("return_map") else mask

    def _map(self, image):
        width, height = image.size
        seen = np.full((1, height // 8, width // 8), 0.5, np.float32)
        seen[:, :, : width // 16] = 1.5
        return seen

    def _inverted(self, stage, kwargs):
        self._note(stage, kwargs)
        steps = int(kwargs["num_inference_steps"] * kwargs["inpaint_strength"])
        width, height = kwargs["image"].size
        shape = (1, steps + 1, 4, height // 8, width // 8)
        values = np.random.default_rng(kwargs["generator"] % 2**64).normal(size=shape).astype(np.float32)
        return DiffEditInversionPipelineOutput(latents=values[:, 1:], clean_latents=values[:, 0])

    @as_the_real_one
    def invert(self, **kwargs):
        return self._inverted("invert", kwargs)

    @as_the_real_one
    def noise_image(self, **kwargs):
        return self._inverted("noise", kwargs)

    @as_the_real_one
    def __call__(self, **kwargs):
        self._note("edit", kwargs)
        height, width = kwargs["image_latents"].shape[-2:]
        image = PIL.Image.new("RGB", (width * 8, height * 8), (10, 200, 30))
        return types.SimpleNamespace(images=[image], nsfw_content_detected=self.flags)

    @as_the_real_one
    def edit(self, **kwargs):
        self._note("whole", kwargs)
        computes = kwargs["mask_image"] is None or kwargs["mask_combination"] != "replace"
        mask = self._map(kwargs["image"]) > 1
        if kwargs["mask_image"] is not None:
            mask = masks.combine(mask, kwargs["mask_image"], kwargs["mask_combination"])
        loops = ["timestep"] * computes + ["timesteps"] * (1 + ("inversion_prompt" in kwargs))
        for stage in loops:
            kwargs["debug_callback"](stage, None, None)
        report = EditReport(
            [float(mask.mean())], [0.02], None, [0.0], [3.5], {"mask": 0.1, "edit": 0.25}, list(self.warnings)
        )
        image = PIL.Image.new("RGB", kwargs["image"].size, (10, 200, 30))
        return DiffEditOutput([image], mask.astype(np.int64), None, None, None, report, self.flags)


WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


def write_model(folder, sample_size=16, levels=4):
    """A folder that looks like a checkpoint; its files of weights hold none."""
    classes = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "scheduler": "PNDMScheduler",
    }
    index = {name: ["library", of] for name, of in classes.items()}
    content = {
        "model_index.json": {"_class_name": "StableDiffusionPipeline", **index},
        "unet/config.json": {"sample_size": sample_size, "cross_attention_dim": 32},
        "vae/config.json": {"block_out_channels": [8] * levels, "latent_channels": 4},
        "text_encoder/config.json": {"hidden_size": 32},
        "scheduler/scheduler_config.json": {},
        "tokenizer/vocab.json": {},
        "tokenizer/merges.txt": "",
    }
    for part in classes:
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name, value in content.items():
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    for name in WEIGHTS:
        save_file({}, folder / name)
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a picture of 117 × 91, a model that notes its calls, and nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FakePipeline, "calls", [])
    monkeypatch.setattr(FakePipeline, "breaks", {})
    module = types.ModuleType("mindiffedit.pipeline")
    module.StableDiffusionDiffEditPipeline = FakePipeline
    monkeypatch.setitem(sys.modules, "mindiffedit.pipeline", module)
    schedulers = types.ModuleType("mindiffedit.solvers.schedulers")
    for names in SCHEDULERS.values():
        for name in names:
            setattr(schedulers, name, type(name, (FakeScheduler,), {}))
    monkeypatch.setitem(sys.modules, "mindiffedit.solvers.schedulers", schedulers)
    monkeypatch.setattr("mindiffedit.runtime.devices.require_device", lambda name: name or "CPU")
    # So that the command's own defaults do not outlive the test.
    monkeypatch.setenv("GLOG_v", "3")
    monkeypatch.setenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    monkeypatch.setenv("DIFFUSERS_NO_ADVISORY_WARNINGS", "1")

    rng = np.random.default_rng(0)
    PIL.Image.fromarray(rng.integers(0, 256, (91, 117, 3), dtype=np.uint8)).save("p.png")
    write_model(tmp_path / "model")
    monkeypatch.setattr(demo, "checkpoint_folder", lambda: tmp_path / "model")
    monkeypatch.setattr(demo, "sample_picture", lambda: tmp_path / "p.png")
    return tmp_path


def edit(*more, picture="p.png", output="out.png"):
    return ["edit", picture, "--source", SOURCE, "--target", TARGET, "-o", output, "--model", "model", *more]


def stages():
    """What ran, in order."""
    return [call[0] for call in FakePipeline.calls if call[0] != "bar"]


def arguments(stage):
    """What a stage was called with."""
    return next(call for call in FakePipeline.calls if call[0] == stage)[1]


def ran(capsys, argv):
    """(stdout, stderr) of a command that ends well."""
    code = cli.main(argv)
    out, err = capsys.readouterr()
    assert code == 0, err
    assert out.count("\n") == 1 and out.endswith("\n")
    return out.strip(), err


def refused(capsys, argv, *words):
    """The one line on stderr of a command that ends with 2, before anything is loaded or written."""
    before = sorted(os.listdir())
    code = cli.main(argv)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("note:")]
    assert code == 2, err
    assert out == "" and len(lines) == 1, err
    for word in words:
        assert word in lines[0], err
    assert stages() == []
    assert sorted(os.listdir()) == before
    return lines[0]


# --- help -----------------------------------------------------------------------------------------

HEAVY = ("mindspore", "mindone", "torch", "transformers", "diffusers", "huggingface_hub", "scipy", "tqdm")


@pytest.mark.parametrize(
    "argv, code",
    [
        (["--help"], 0),
        (["--version"], 0),
        (["edit", "--help"], 0),
        (["mask", "--help"], 0),
        (["invert", "--help"], 0),
        (["demo", "--help"], 0),
        ([], 2),
        (["edit", "missing.png", "--source", "a", "--target", "b", "-o", "out.png"], 2),
        (["demo", "--steps", "many"], 2),
        (["demo", "--strength", "2"], 2),
    ],
)
def test_help_and_argument_errors_import_nothing_heavy(argv, code, tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.abspath(cli.__file__)))
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mindiffedit", *argv],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
    )
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert done.returncode == code
    assert "mindiffedit" in imported and "numpy" in imported  # the list is really a list of imports
    assert imported.isdisjoint(HEAVY)
    if code == 0:
        assert done.stdout.startswith(("usage: mindiffedit", "mindiffedit "))
    else:
        assert done.stdout == ""
        assert [line for line in done.stderr.splitlines() if "error:" in line]
        assert "Traceback" not in done.stderr


def test_help_names_every_option(capsys):
    assert cli.main(["edit", "--help"]) == 0
    text = capsys.readouterr().out
    for option in (
        "--reference",
        "--mask-smoothing",
        "--mask-dilation",
        "--mask-erosion",
        "--fill-holes",
        "--mask-edges",
        "--edge-contrast",
        "--smallest-region",
        "--mask-level",
        "--soft-mask",
        "--mask-combine",
        "--outliers",
        "--inversion",
        "--iterations",
        "--no-paste-back",
        "--feather",
        "--caption",
        "--overlay",
        "--strip",
        "--sweep",
        "--sweep-strengths",
        "--sweep-guidances",
        "--lora",
        "--embedding",
        "--config",
        "--variant",
        "--prompt-model",
        "--caption-model",
        "--source",
        "--target",
        "--output",
        "--model",
        "--seed",
        "--steps",
        "--strength",
        "--guidance",
        "--maps",
        "--mask",
        "--grid",
        "--mode",
        "--device",
        "--json",
        "--latents",
        "--negative",
        "--mask-strength",
        "--mask-threshold",
        "--revision",
        "--offline",
        "--quiet",
    ):
        assert option in text
    steps = " ".join(text.split())
    assert "default: 50" in steps and f"demo model: {demo.SETTINGS['steps']}" in steps


def test_help_says_the_defaults_that_count(capsys):
    def said(command, option):
        assert cli.main([command, "--help"]) == 0
        text = " ".join(capsys.readouterr().out.partition("options:")[2].split())
        return re.search(rf"{option} \w .*?\(default: (.*?)\)", text)[1]

    assert said("edit", "--maps") == "4, 10 with --reference; demo model: 2, 10 with --reference"
    assert said("edit", "--mask-strength") == "0.5; demo model: 0.7, 0.8 with --reference"
    assert said("edit", "--invert-guidance") == "1, that of --guidance with --reference; demo model: 1"
    assert said("invert", "--guidance") == "1, 7.5 with --reference; demo model: 1, 5 with --reference"
    assert said("demo", "--steps") == "20"  # the demo has one model


def test_the_parser_says_which_command():
    for name in ("edit", "mask", "invert"):
        texts = ["--source", SOURCE, *(["--target", TARGET] if name != "invert" else [])]
        assert build_parser().parse_args([name, "p.png", *texts, "-o", "out"]).command == name
    assert build_parser().parse_args(["demo"]).command == "demo"


# --- edit in one call ------------------------------------------------------------------------------


def test_edit_is_one_call(work, capsys):
    line, err = ran(capsys, edit("--seed", "5", "--steps", "10", "--strength", "0.7", "--guidance", "3"))
    assert stages() == ["load", "whole"]
    asked = dict(arguments("whole"))
    assert asked.pop("image").size == (112, 88) and callable(asked.pop("debug_callback"))
    assert asked == dict(
        source_prompt=SOURCE, target_prompt=TARGET, negative_prompt=None, num_inference_steps=10,
        inpaint_strength=0.7, guidance_scale=3.0, num_maps_per_mask=4, mask_encode_strength=0.5,
        mask_thresholding_ratio=2.0, mask_options=EDIT_MASK, mask_image=None, mask_combination="replace",
        outlier_quantile=0.99, inversion="ddim", inversion_prompt=None, inversion_guidance_scale=1.0,
        inversion_iterations=0, image_latents=None, paste_back=False, feather=None, generator=5,
        output_type="pil",
    )  # fmt: skip
    assert sorted(os.listdir()) == ["model", "out.png", "p.png"]
    assert line.startswith("out.png: 117 x 91, 50% of it in the mask") and "seed 5" in line
    assert "117 x 91" in err and "112 x 88" in err


def test_outside_the_mask_the_result_is_the_picture(work, capsys):
    """The model works at 112 x 88; what is not edited has every pixel of the 117 x 91 that were given."""
    line, _ = ran(capsys, edit("--json"))
    report = json.loads(line)["report"]
    original, result = (np.asarray(PIL.Image.open(name)) for name in ("p.png", "out.png"))
    edge = 59 + 9  # of the mask at this size, and the seam of one latent
    np.testing.assert_array_equal(result[:, edge:], original[:, edge:])
    assert (result[:, :58] == [10, 200, 30]).all()
    assert report["change_outside"] == 0 and report["change_outside_before_paste_back"] > 50
    assert not np.array_equal(result[:, 60:edge], original[:, 60:edge])
    FakePipeline.calls.clear()
    line, _ = ran(capsys, edit("--json", "--feather", "0"))
    np.testing.assert_array_equal(np.asarray(PIL.Image.open("out.png"))[:, 59:], original[:, 59:])
    FakePipeline.calls.clear()
    line, _ = ran(capsys, edit("--json", "--no-paste-back"))
    assert (np.asarray(PIL.Image.open("out.png")) == [10, 200, 30]).all()
    assert json.loads(line)["report"]["change_outside"] > 50


def test_a_picture_of_a_size_that_fits_is_left_to_the_call(work, capsys):
    PIL.Image.open("p.png").resize((96, 64)).save("fits.png")
    line, _ = ran(capsys, edit("--json", "--feather", "3", picture="fits.png"))
    asked = arguments("whole")
    assert asked["paste_back"] is True and asked["feather"] == 3
    assert (np.asarray(PIL.Image.open("out.png")) == [10, 200, 30]).all()
    assert json.loads(line)["report"]["change_outside_before_paste_back"] == 3.5
    FakePipeline.calls.clear()
    ran(capsys, edit("--no-paste-back", picture="fits.png"))
    assert arguments("whole")["paste_back"] is False


def test_what_the_checker_blackened_is_not_pasted_into(work, capsys, monkeypatch):
    monkeypatch.setattr(FakePipeline, "flags", [True])
    _, err = ran(capsys, edit())
    assert (np.asarray(PIL.Image.open("out.png")) == [10, 200, 30]).all()
    assert "safety checker" in err


def test_every_correction_reaches_the_call(work, capsys):
    line, _ = ran(capsys, edit(
        "--mask-smoothing", "1.5", "--mask-dilation", "2", "--mask-erosion", "1", "--fill-holes",
        "--mask-edges", "3", "--edge-contrast", "0.1", "--smallest-region", "4", "--mask-level", "0.4", "--soft-mask", "--outliers", "0.9", "--iterations", "3",
        "--invert-guidance", "2", "--caption", "a table", "--negative", "blurred", "--json",
    ))  # fmt: skip
    asked = arguments("whole")
    assert asked["mask_options"] == masks.MaskOptions(
        threshold=0.4, smoothing=1.5, erosion=1, dilation=2, fill_holes=True, smallest_region=4, soft=True,
        edges=3, edge_contrast=0.1,
    )  # fmt: skip
    assert (asked["outlier_quantile"], asked["inversion_iterations"]) == (0.9, 3)
    assert (asked["inversion_guidance_scale"], asked["inversion_prompt"]) == (2, "a table")
    assert asked["negative_prompt"] == "blurred"
    expected = dict(
        mask_smoothing=1.5, mask_dilation=2, mask_erosion=1, fill_holes=True, smallest_region=4, mask_level=0.4,
        mask_edges=3, edge_contrast=0.1, soft_mask=True, outliers=0.9, iterations=3, invert_guidance=2, caption="a table", inversion="ddim",
        reference=False, paste_back=True, negative="blurred", mask_combine=None,
    )  # fmt: skip
    result = json.loads(line)
    assert {name: result[name] for name in expected} == expected
    FakePipeline.calls.clear()
    ran(capsys, edit("--outliers", "none", "--inversion", "noise", "--no-soft-mask", "--no-fill-holes"))
    asked = arguments("whole")
    assert asked["outlier_quantile"] is None and asked["inversion"] == "noise"
    assert "inversion_iterations" not in asked
    assert asked["mask_options"].soft is asked["mask_options"].fill_holes is False


def test_defaults_of_the_corrections_are_the_call_s():
    call = inspect.signature(StableDiffusionDiffEditPipeline.edit).parameters
    names = dict(
        steps="num_inference_steps", strength="inpaint_strength", guidance="guidance_scale",
        invert_guidance="inversion_guidance_scale", maps="num_maps_per_mask", mask_strength="mask_encode_strength",
        mask_threshold="mask_thresholding_ratio", outliers="outlier_quantile", inversion="inversion",
        iterations="inversion_iterations", mask_combine="mask_combination", feather="feather",
    )  # fmt: skip
    defaults = {**DEFAULTS, **CORRECTED_DEFAULTS, "mask_combine": "replace"}
    assert {name: call[given].default for name, given in names.items()} == {n: defaults[n] for n in names}


def test_the_report_is_told(work, capsys, monkeypatch):
    warning = Message("the mask is empty; lower {mask_thresholding_ratio} or raise {num_maps_per_mask}.")
    monkeypatch.setattr(FakePipeline, "warnings", [warning])
    line, err = ran(capsys, edit("--json"))
    said = "the mask is empty; lower --mask-threshold or raise --maps."
    assert f"note: {said}" in err
    result = json.loads(line)
    assert result["report"]["warnings"] == [said]
    assert (result["report"]["mask_coverage"], result["report"]["inversion_error"]) == (0.5, 0.02)
    assert result["report"]["seconds"] == {"mask": 0.1, "edit": 0.25}
    assert result["seconds"]["edit"] == 0.25 and "load" in result["seconds"]
    FakePipeline.calls.clear()
    _, err = ran(capsys, edit("--quiet"))
    assert err.count("note") == 0


def test_parameters_are_told_as_the_options_of_the_command():
    names = ("inpaint_strength", "threshold", "prompt", "image", "target_prompt_embeds", "cross_attention_kwargs[1]")
    said = {command: [told(Message("{x}", x=named(name)), command) for name in names] for command in COMMANDS}
    others = ["--strength", "--mask-level"], ["--target", "cross attention kwargs"]
    assert said["edit"] == [*others[0], "--target", "PICTURE", *others[1]]
    assert said["invert"] == [*others[0], "--source", "PICTURE", *others[1]]
    assert said["parity check"] == [*others[0], "--target", "--image", *others[1]]
    message = Message("give {guidance_scale=1}, {variant='fp16'} or {safety_checker=None}, not `this` or prompt.")
    assert message == "give `guidance_scale=1`, `variant='fp16'` or `safety_checker=None`, not `this` or prompt."
    assert told(message, "edit") == "give --guidance 1, --variant fp16 or --no-safety-checker, not `this` or prompt."
    assert told("`prompt` in a text", "edit") == "`prompt` in a text"


def test_every_option_that_messages_name_is_one(capsys):
    for command in COMMANDS:
        assert cli.main([*command.split(), "--help"]) == 0
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    named_ones = {option_of(command)(name).split()[0] for command in COMMANDS for name in _PARAMETERS}
    assert named_ones - {"PICTURE"} <= known and len(named_ones) > 30


def test_errors_of_the_call_are_said_with_options(work, capsys):
    FakePipeline.breaks["whole"] = lambda: options.effective_steps(10, 0.01)
    assert cli.main(edit()) == 2
    err = capsys.readouterr().err
    assert "--strength 0.01 of 10 steps" in err and "inpaint" not in err


def test_an_empty_source_is_a_source(work, capsys):
    line, _ = ran(capsys, edit("--source", "", "--json"))
    assert arguments("whole")["source_prompt"] == "" and json.loads(line)["source"] == ""
    FakePipeline.calls.clear()
    ran(capsys, ["mask", "p.png", "--source", "", "--target", TARGET, "-o", "m.png", "--model", "model"])
    assert arguments("mask")["source_prompt"] == ""


@pytest.mark.parametrize("size", [(117, 91), (351, 273), (14, 11)])
def test_a_mask_of_any_size(work, capsys, size):
    drawn = np.zeros((size[1], size[0]), np.uint8)
    drawn[size[1] // 2, :] = 255  # thin, and not lost
    PIL.Image.fromarray(drawn).save("mask.png")
    ran(capsys, edit("--mask", "mask.png"))
    own = arguments("whole")["mask_image"]
    assert own.shape == (1, 11, 14) and arguments("whole")["mask_combination"] == "replace"
    assert own[0, 5].all() and own.sum() == 14


def test_soft_values_of_a_mask_are_kept_for_soft_masks_alone(work, capsys):
    PIL.Image.new("L", (117, 91), 153).save("mask.png")
    ran(capsys, edit("--mask", "mask.png"))
    assert (arguments("whole")["mask_image"] == 1).all()
    FakePipeline.calls.clear()
    line, _ = ran(capsys, edit("--mask", "mask.png", "--soft-mask", "--json"))
    np.testing.assert_allclose(arguments("whole")["mask_image"], 0.6)
    result = json.loads(line)
    assert "mask_threshold" not in result  # nothing was computed with it


def test_a_mask_combined_with_the_computed_one(work, capsys):
    drawn = np.zeros((91, 117), np.uint8)
    drawn[:, 80:] = 255
    PIL.Image.fromarray(drawn).save("mask.png")
    line, _ = ran(capsys, edit("--mask", "mask.png", "--mask-combine", "union", "--mask-smoothing", "1", "--json"))
    asked, result = arguments("whole"), json.loads(line)
    assert asked["mask_combination"] == "union" and asked["mask_image"].sum() > 0
    assert (result["mask_combine"], result["mask_smoothing"], result["mask_share"] > 0.7) == ("union", 1.0, True)
    FakePipeline.calls.clear()
    line, _ = ran(capsys, ["mask", "p.png", "--source", SOURCE, "--target", TARGET, "-o", "m.png", "--model", "model",
                           "--mask", "mask.png", "--mask-combine", "union"])  # fmt: skip
    assert stages() == ["load", "mask"]
    written = np.asarray(PIL.Image.open("m.png"))
    assert (written[:, :58] == 255).all() and (written[:, 84:] == 255).all() and not written[:, 59:75].any()


def test_overlays(work, capsys):
    ran(capsys, edit("--overlay", "over.png"))
    over, original = (np.asarray(PIL.Image.open(name)).astype(int) for name in ("over.png", "p.png"))
    np.testing.assert_array_equal(over[:, 60:], original[:, 60:])
    assert (over[:, :57, 0] >= original[:, :57, 0]).all() and not np.array_equal(over[:, :57], original[:, :57])
    FakePipeline.calls.clear()
    ran(capsys, edit("--reference", "--overlay", "again.png"))
    np.testing.assert_array_equal(np.asarray(PIL.Image.open("again.png")), over)


@pytest.mark.parametrize("more", [[], ["--reference"]])
def test_a_strip_watches_the_edit(work, capsys, monkeypatch, more):
    watched = []

    class Strip:
        def __init__(self, pipe, path, **how):
            watched.append((type(pipe), path, how))

        def __enter__(self):
            watched.append(stages())

        def __exit__(self, *error):
            watched.append(stages())

    monkeypatch.setattr("mindiffedit.images.strips.AnimatedStrip", Strip)
    ran(capsys, edit("--strip", "strip.gif", *more))
    assert watched[0] == (FakePipeline, "strip.gif", {"every": 2})  # 40 steps that run, about 20 frames
    assert watched[1] == ["load"] and len(watched[2]) > 1


# --- models beside the model -----------------------------------------------------------------------


def weights(name):
    save_file({"w": np.zeros(1, np.float32)}, name)
    return name


def test_loras(work, capsys):
    for name in ("a.safetensors", "b=2.safetensors", "c.safetensors"):
        weights(name)
    line, _ = ran(capsys, edit("--lora", "a.safetensors=0.5", "--lora", "b=2.safetensors", "--lora",
                               "c.safetensors=-1", "--json"))  # fmt: skip
    assert stages() == ["load", "lora", "lora", "lora", "adapters", "whole"]
    loras = [call[1] for call in FakePipeline.calls if call[0] == "lora"]
    assert [lora["path"] for lora in loras] == ["a.safetensors", "b=2.safetensors", "c.safetensors"]
    assert arguments("adapters") == dict(zip([lora["adapter_name"] for lora in loras], [0.5, 1.0, -1.0]))
    assert json.loads(line)["loras"][0] == {"file": "a.safetensors", "weight": 0.5}


def embedding(name, key="emb_params", **more):
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    save_file({key: np.ones((2, 32), np.float32), **more}, name)
    return name


def test_words_of_embeddings(work, capsys):
    """The file's word, or its name where it says none, or the one that is given."""
    cases = {
        embedding("EasyNegative.safetensors"): ("EasyNegative.safetensors", "EasyNegative"),
        embedding("bad hands v1.2.safetensors"): ("bad hands v1.2.safetensors", "bad hands v1.2"),
        embedding("toy.safetensors", "<cat-toy>"): ("toy.safetensors", "<cat-toy>"),
        embedding("xl.safetensors", "clip_l"): ("xl.safetensors", "xl"),
        embedding("a=b.safetensors"): ("a=b.safetensors", "a=b"),
        embedding("a.safetensors") + "=<a> b": ("a.safetensors", "<a> b"),
        embedding("c.SAFETENSORS") + "=d=e": ("c.SAFETENSORS", "d=e"),
        embedding("other/EasyNegative.safetensors") + "=again": ("other/EasyNegative.safetensors", "again"),
    }
    prompt = ", ".join(word for _, word in cases.values())
    line, err = ran(capsys, edit(*sum((["--embedding", text] for text in cases), []), "--negative", prompt, "--json"))
    loaded = [(call[1]["path"], call[1]["token"]) for call in FakePipeline.calls if call[0] == "embedding"]
    assert loaded == list(cases.values()) and "--embedding" not in err
    assert json.loads(line)["embeddings"][0] == {"file": "EasyNegative.safetensors", "word": "EasyNegative"}
    assert stages()[:2] == ["load", "embedding"]
    FakePipeline.calls.clear()
    xl = embedding("XL2.safetensors", "clip_l", clip_g=np.ones((2, 48), np.float32))
    refused(capsys, edit("--embedding", xl), "XL2.safetensors", "Stable Diffusion XL")
    refused(capsys, edit("--embedding", weights("lora.safetensors") + "="), "no word after the '='")
    same = ["--embedding", "EasyNegative.safetensors", "--embedding"]
    refused(capsys, edit(*same, "other/EasyNegative.safetensors"), "same word 'EasyNegative'", "FILE=WORD")
    refused(capsys, edit("--embedding", "no.safetensors=word"), "--embedding no.safetensors: there is no such file")
    ran(capsys, edit(*same, "other/EasyNegative.safetensors=other"))


def test_words_that_were_meant_are_not_ignored_in_silence(work, capsys):
    bad, worse = embedding("badhand.safetensors"), embedding("badhand4.safetensors")
    toy = embedding("my-toy.safetensors", "<toy>")

    def notes(*more):
        _, err = ran(capsys, edit(*more))
        FakePipeline.calls.clear()
        return [line for line in err.splitlines() if "--embedding" in line or "--lora" in line]

    assert notes("--embedding", bad, "--negative", "a (badhand:1.2)") == []
    assert notes("--embedding", bad, "--embedding", worse, "--negative", "badhand4, badhand") == []
    (note,) = notes("--embedding", bad, "--embedding", worse, "--negative", "badhand4")
    assert "'badhand'" in note and bad in note and "in no prompt" in note
    (note,) = notes("--embedding", bad, "--negative", "ugly, BadHand")
    assert "'BadHand'" in note and "'badhand'" in note
    (note,) = notes("--embedding", toy, "--negative", "my-toy")
    assert "'my-toy' is, which has to be written '<toy>'" in note
    (note,) = notes("--negative", "a <cat-toy> <|endoftext|>")
    assert "<cat-toy>" in note and "--embedding FILE" in note
    (note,) = notes("--negative", "apple <lora:more detail:0.8>")
    assert "<lora:more detail:0.8>" in note and "--lora FILE" in note
    assert notes("--negative", "a < b > c <3") == notes() == notes("--embedding", bad, "--quiet") == []


def test_a_model_that_is_one_file(work, capsys):
    argv = [*edit(), "--model", weights("sd.safetensors"), "--config", "model", "--no-safety-checker"]
    _, err = ran(capsys, argv)
    stage, path, kwargs = FakePipeline.calls[0]
    assert (stage, path, kwargs["config"], kwargs["safety_checker"]) == ("load", "sd.safetensors", "model", None)
    assert arguments("whole")["image"].size == (112, 88)  # fitted to what the loaded components say
    assert "117 x 91" in err
    refused_after = [*argv, "--config", "missing/folder/of/config"]
    FakePipeline.calls.clear()
    refused(capsys, refused_after, "--config")
    refused(capsys, [*argv, "--variant", "fp16"], "--variant")
    refused(capsys, [*argv, "--revision", "main"], "--revision")


def test_variants(work, capsys):
    for name in WEIGHTS:
        (work / "model" / name).rename((work / "model" / name).with_suffix(".fp16.safetensors"))
    assert "--variant fp16" in refused(capsys, edit())
    ran(capsys, edit("--variant", "fp16"))
    assert FakePipeline.calls[0][2]["variant"] == "fp16"


class Writer:
    """Stands for the models that write: notes how it was loaded and what it was asked."""

    asked = []

    @classmethod
    def from_pretrained(cls, path, **how):
        cls.asked.append((cls.__name__, path, how))
        return cls()


class Captioner(Writer):
    def caption(self, image):
        self.asked.append(("caption", image.size))
        return "a red apple"


class PromptGenerator(Writer):
    def prompts_for(self, concept, *, generator):
        self.asked.append(("prompts", concept, generator))
        return [f"one {concept}", f"another {concept}"]


@pytest.fixture
def writers(work, monkeypatch):
    module = types.ModuleType("mindiffedit.text.prompts")
    module.Captioner, module.PromptGenerator = Captioner, PromptGenerator
    module.average_embeddings = lambda pipe, texts: ("mean", type(pipe), tuple(texts))
    monkeypatch.setitem(sys.modules, "mindiffedit.text.prompts", module)
    monkeypatch.setattr(Writer, "asked", [])
    return Writer.asked


def test_prompts_about_concepts(work, capsys, writers):
    words = ["--source", "bowl", "--target", "basket", "--prompt-model", "maker/t5"]
    line, err = ran(capsys, edit(*words, "--seed", "3", "--json", "--offline"))
    assert writers[0][:2] == ("PromptGenerator", "maker/t5") and writers[0][2]["local_files_only"] is True
    assert writers[1:] == [("prompts", "bowl", 3), ("prompts", "basket", 3)]
    means = [("mean", FakePipeline, (f"one {word}", f"another {word}")) for word in ("bowl", "basket")]
    asked = arguments("whole")
    assert [asked["source_prompt_embeds"], asked["target_prompt_embeds"]] == means
    assert not {"source_prompt", "target_prompt"} & set(asked)
    assert json.loads(line)["prompts"] == {"source": ["one bowl", "another bowl"],
                                           "target": ["one basket", "another basket"]}  # fmt: skip
    assert "2 prompts about the source 'bowl', such as 'one bowl'" in err

    FakePipeline.calls.clear()
    ran(capsys, edit(*words, "--reference"))
    assert arguments("mask")["target_prompt_embeds"] == means[1]
    assert arguments("invert")["prompt_embeds"] == means[0]
    assert (arguments("edit")["prompt_embeds"], arguments("edit")["negative_prompt_embeds"]) == (means[1], means[0])
    FakePipeline.calls.clear()
    ran(capsys, ["mask", "p.png", *words, "-o", "m.png", "--model", "model"])
    assert arguments("mask")["source_prompt_embeds"] == means[0]


def test_captions(work, capsys, writers):
    line, err = ran(capsys, edit("--caption-model", "maker/blip", "--json"))
    assert [entry[:2] for entry in writers] == [("Captioner", "maker/blip"), ("caption", (117, 91))]
    asked = arguments("whole")
    assert (asked["inversion_prompt"], asked["source_prompt"]) == ("a red apple", SOURCE)
    assert "note: the picture's caption: a red apple" in err and json.loads(line)["caption"] == "a red apple"

    FakePipeline.calls.clear()
    bare = ["p.png", "--target", TARGET, "--model", "model", "--caption-model", "maker/blip"]
    line, _ = ran(capsys, ["edit", *bare, "-o", "out.png", "--json"])
    assert arguments("whole")["source_prompt"] == "a red apple" == json.loads(line)["source"]
    FakePipeline.calls.clear()
    ran(capsys, ["mask", *bare, "-o", "m.png"])
    assert arguments("mask")["source_prompt"] == "a red apple"
    FakePipeline.calls.clear()
    ran(capsys, ["invert", "p.png", "--caption-model", "maker/blip", "--model", "model", "-o", "l.safetensors"])
    assert arguments("invert")["prompt"] == "a red apple" == read_latents("l.safetensors")[2]["prompt"]


def test_captions_are_written_before_the_large_model_is_loaded(work, capsys, writers):
    writers.clear()
    FakePipeline.breaks["load"] = lambda: writers.append("load")
    ran(capsys, edit("--caption-model", "maker/blip"))
    assert [entry if isinstance(entry, str) else entry[0] for entry in writers] == ["Captioner", "caption", "load"]


# --- edit by the reference's calls -----------------------------------------------------------------


def test_the_reference_s_edit_is_the_three_stages_of_the_guide(work, capsys):
    line, err = ran(capsys, edit("--reference", "--seed", "5", "--steps", "10", "--strength", "0.7", "--guidance", "3"))
    assert stages() == ["load", "mask", "invert", "edit"]
    _, path, kwargs = FakePipeline.calls[0]
    assert path == "model" and kwargs["mode"] == "graph" and "safety_checker" not in kwargs

    mask, invert, change = arguments("mask"), arguments("invert"), arguments("edit")
    image = mask.pop("image")
    assert image.size == (112, 88) and invert.pop("image") is image
    assert mask == dict(
        target_prompt=TARGET,
        source_prompt=SOURCE,
        num_maps_per_mask=10,
        mask_encode_strength=0.5,
        mask_thresholding_ratio=3.0,
        num_inference_steps=10,
        guidance_scale=3.0,
        generator=5,
        output_type="np",
        return_map=True,
    )
    assert invert == dict(
        prompt=SOURCE,
        num_inference_steps=10,
        inpaint_strength=0.7,
        guidance_scale=3.0,
        negative_prompt=None,
        generator=5,
    )
    assert change.pop("mask_image").shape == (1, 11, 14)
    latents = change.pop("image_latents")
    assert latents.shape == (1, 7, 4, 11, 14) and latents.dtype == np.float32
    assert change == dict(
        prompt=TARGET,
        negative_prompt=SOURCE,
        inpaint_strength=0.7,
        num_inference_steps=10,
        guidance_scale=3.0,
        generator=5,
        output_type="pil",
    )

    assert sorted(os.listdir()) == ["model", "out.png", "p.png"]
    result = PIL.Image.open("out.png")
    assert result.size == (117, 91)
    assert np.asarray(result)[40, 40].tolist() == [10, 200, 30]
    assert line.startswith("out.png: 117 x 91, 50% ") and "seed 5" in line
    assert "117 x 91" in err and "112 x 88" in err


def test_the_picture_itself_reaches_the_model(work, capsys):
    PIL.Image.open("p.png").resize((96, 64)).save("fits.png")
    _, err = ran(capsys, edit(picture="fits.png"))
    given = np.asarray(arguments("whole")["image"])
    np.testing.assert_array_equal(given, np.asarray(PIL.Image.open("fits.png")))
    assert err.count("note: ") == err.count("note: the model's PNDMScheduler") == 1


def test_defaults_are_the_reference_s_and_the_demo_model_has_its_own(work, capsys, monkeypatch):
    ran(capsys, edit("--reference"))
    assert arguments("invert")["num_inference_steps"] == 50
    assert (arguments("mask")["num_maps_per_mask"], arguments("edit")["inpaint_strength"]) == (10, 0.8)
    FakePipeline.calls.clear()
    own = dict(steps=12, strength=0.5, guidance=2.0, maps=3, mask_strength=0.4, mask_threshold=2.5, invert_guidance=1.0)
    monkeypatch.setattr(demo, "SETTINGS", own)
    ran(capsys, [word if word != "model" else "demo" for word in edit("--maps", "4", "--reference")])
    assert arguments("load") == str(work / "model")
    mask, invert, change = arguments("mask"), arguments("invert"), arguments("edit")
    assert (mask["num_inference_steps"], mask["num_maps_per_mask"]) == (12, 4)
    assert (mask["mask_encode_strength"], mask["mask_thresholding_ratio"]) == (0.4, 2.5)
    assert (invert["guidance_scale"], change["guidance_scale"]) == (1.0, 2.0)
    assert invert["inpaint_strength"] == change["inpaint_strength"] == 0.5


def test_json_is_one_object_with_the_reference_s_whole_story(work, capsys):
    line, err = ran(
        capsys,
        edit(
            "--reference",
            "--json",
            "--grid",
            "grid.png",
            "--negative",
            "",
            "--invert-guidance",
            "1",
            "--device",
            "cpu",
            "--mode",
            "pynative",
            "--dtype",
            "float16",
        ),
    )
    result = json.loads(line)
    expected = dict(
        command="edit",
        output="out.png",
        grid="grid.png",
        picture="p.png",
        width=117,
        height=91,
        working_width=112,
        working_height=88,
        source=SOURCE,
        target=TARGET,
        negative="",
        seed=0,
        steps=50,
        strength=0.8,
        guidance=7.5,
        invert_guidance=1.0,
        maps=10,
        mask_strength=0.5,
        mask_threshold=3.0,
        mask_share=0.5,
        device="CPU",
        mode="pynative",
        scheduler="ddim",
        model=str(work / "model"),
        safety_checker_flagged=None,
        reference=True,
    )
    assert {name: result[name] for name in expected} == expected
    assert set(result["seconds"]) == {"load", "mask", "invert", "edit"}
    assert arguments("edit")["negative_prompt"] == ""
    assert arguments("invert")["guidance_scale"] == 1.0
    kwargs = FakePipeline.calls[0][2]
    assert (kwargs["mode"], kwargs["mindspore_dtype"]) == ("pynative", "float16")
    assert "a stage prints" in err


def test_the_grid_shows_all_three(work, capsys):
    ran(capsys, edit("--grid", "grid.png", "--reference"))
    grid = np.asarray(PIL.Image.open("grid.png"))
    assert grid.shape[1] > 3 * 117
    third = grid.shape[1] // 3
    flat = (np.abs(grid.astype(int) - [10, 200, 30]).sum(-1) < 5).mean(0)
    assert flat[2 * third + 20 : -20].min() > 0.5 and flat[: 2 * third - 20].max() < 0.1


def test_quiet_says_nothing_but_the_result(work, capsys):
    _, err = ran(capsys, edit("--quiet"))
    assert "note" not in err
    bars = [call[1] for call in FakePipeline.calls if call[0] == "bar"]
    assert len(bars) == 3 and all(bar["disable"] for bar in bars)
    FakePipeline.calls.clear()
    ran(capsys, edit())
    bars = [call[1] for call in FakePipeline.calls if call[0] == "bar"]
    assert [bar["desc"] for bar in bars] == ["mask", "invert", "edit"]
    assert not any(bar["disable"] for bar in bars) and all(bar["file"] is not sys.stdout for bar in bars)


@pytest.mark.parametrize("library", ["TRANSFORMERS", "DIFFUSERS"])
def test_advice_of_libraries_is_off_when_they_are_loaded(work, capsys, monkeypatch, library):
    name = f"{library}_NO_ADVISORY_WARNINGS"
    seen = []
    FakePipeline.breaks["load"] = lambda: seen.append(os.environ[name])
    monkeypatch.delenv(name)
    ran(capsys, edit())
    monkeypatch.setenv(name, "")  # the user wants to see it
    ran(capsys, edit())
    assert seen == ["1", ""]


@pytest.fixture
def solver(capsys, monkeypatch):
    """The solver of a command, its options and its notes, for a model with a scheduler of a class."""

    def of(scheduler, options, argv):
        options = {"beta_start": 0.2, **options}
        FakePipeline.calls.clear()
        monkeypatch.setattr(FakePipeline, "own_scheduler", type(scheduler, (FakeScheduler,), {}))
        monkeypatch.setattr(FakePipeline, "own_options", options)
        line, err = ran(capsys, [*argv, "--json"])
        pipe = [call for call in FakePipeline.calls if len(call) == 3 and call[0] != "load"][-1][2]
        assert type(pipe.inverse_scheduler).__name__ == type(pipe.scheduler).__name__.replace("Sch", "InverseSch")
        assert pipe.scheduler.config == pipe.inverse_scheduler.config
        assert SCHEDULERS[json.loads(line)["scheduler"]][0] == type(pipe.scheduler).__name__
        notes = [note for note in err.splitlines() if "scheduler" in note]
        changed = {name: value for name, value in pipe.scheduler.config.items() if options.get(name) != value}
        return json.loads(line)["scheduler"], changed, notes

    return of


DDIM, DPM = "DDIMScheduler", "DPMSolverMultistepScheduler"


def test_the_scheduler_has_an_inverse(work, solver):
    plain = {"beta_start": 0.2}
    assert solver(DDIM, plain, edit()) == ("ddim", {}, [])
    assert solver(DPM, plain, edit()) == ("dpm", {}, [])
    suited = {"clip_sample": False, "steps_offset": 1, "timestep_spacing": "leading"}
    assert solver(DPM, plain, edit("--scheduler", "ddim")) == ("ddim", suited, [])
    assert solver(DPM, {**plain, "timestep_spacing": "trailing"}, edit("--scheduler", "ddim"))[1] == {
        "clip_sample": False, "steps_offset": 1}  # fmt: skip
    for own in ("PNDMScheduler", "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler"):
        name, changed, notes = solver(own, {"timestep_spacing": "linspace", "algorithm_type": "deis"}, edit())
        assert (name, changed, len(notes)) == ("ddim", suited, 1)
        assert own in notes[0] and "'leading'" in notes[0] and "--scheduler" in notes[0]
        name, changed, notes = solver(own, {"algorithm_type": "deis"}, edit("--scheduler", "dpm"))
        assert (name, changed, notes) == ("dpm", {"algorithm_type": "dpmsolver++"}, [])
    # As diffusers has it.
    assert solver("PNDMScheduler", plain, edit("--reference"))[:2] == ("ddim", {})


def test_a_solver_that_cannot_be_inverted(work, solver, capsys, monkeypatch):
    monkeypatch.setattr(FakePipeline, "own_scheduler", type(DPM, (FakeScheduler,), {}))
    for options_ in (
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
        {"thresholding": True},
        {"use_flow_sigmas": True},
        {"variance_type": "learned_range"},
    ):
        option = next(iter(options_))
        name, _, notes = solver(DPM, options_, edit())
        assert name == "ddim" and len(notes) == 1 and option in notes[0] and "--scheduler" in notes[0]
        # Refused where it is asked for, before a model runs; the advice helps.
        FakePipeline.calls.clear()
        assert cli.main(edit("--scheduler", "dpm")) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert stages() == ["load"] and option in err and DPM in err
        assert err.endswith("give --scheduler ddim.")
        assert solver(DPM, options_, edit("--scheduler", "ddim"))[0] == "ddim"
        # Nothing is inverted.
        assert solver(DPM, options_, edit("--scheduler", "dpm", "--inversion", "noise"))[0] == "dpm"
    for kind in ({"algorithm_type": "dpmsolver"}, {"solver_order": 3}, {"use_karras_sigmas": True}):
        assert solver(DPM, kind, edit()) == ("dpm", {}, [])
    FakePipeline.calls.clear()
    assert cli.main(edit("--iterations", "2")) == 2 and stages() == ["load"]
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"the model's solver is {DPM}; give --scheduler ddim.")
    assert solver(DPM, kind, edit("--iterations", "2", "--scheduler", "ddim"))[0] == "ddim"


def test_the_fake_pipeline_takes_what_the_real_one_takes():
    pipe = FakePipeline()
    image = dict(image=None)
    for method, given in (
        *((pipe, {}), (pipe.generate_mask, image), (pipe.invert, image)),
        *((pipe.noise_image, image), (pipe.edit, image)),
    ):
        with pytest.raises(TypeError, match="unexpected keyword argument 'number_of_steps'"):
            method(**given, number_of_steps=5)
    with pytest.raises(TypeError, match="word"):
        pipe.load_textual_inversion("e.safetensors", word="e")


def test_large_pictures_are_worked_on_near_the_model_s_size(work, capsys):
    PIL.Image.open("p.png").resize((1200, 800)).save("large.png")
    _, err = ran(capsys, edit(picture="large.png"))
    width, height = arguments("whole")["image"].size
    assert 0.7 * 1.5 < width * height / (16 * 8) ** 2 <= 1.5
    assert abs(width / height - 1.5) < 0.1 and "1200 x 800" in err
    assert PIL.Image.open("out.png").size == (1200, 800)
    FakePipeline.calls.clear()
    ran(capsys, edit("--size", "300", picture="large.png"))
    width, height = arguments("whole")["image"].size
    assert 0.9 < width * height / 300**2 <= 1


def test_small_pictures_are_noted_as_large_ones_are(work, capsys):
    """The model of these tests was made for 128 x 128."""
    PIL.Image.open("p.png").resize((64, 48)).save("small.png")
    _, err = ran(capsys, edit(picture="small.png"))
    assert "64 x 48" in err and "far below what it was made for" in err
    width, height = map(int, re.search(r"enlarge the picture first, to about (\d+) x (\d+)", err).groups())
    PIL.Image.open("small.png").resize((width, height)).save("larger.png")
    _, err = ran(capsys, edit(picture="larger.png"))
    assert "far below" not in err
    _, err = ran(capsys, edit("--size", "64", picture="small.png"))  # what is asked for is not spoken against
    assert "far below" not in err


def test_the_safety_checker(work, capsys, monkeypatch):
    monkeypatch.setattr(FakePipeline, "flags", [True])
    line, err = ran(capsys, edit("--json"))
    assert json.loads(line)["safety_checker_flagged"] is True and "safety checker" in err
    FakePipeline.calls.clear()
    ran(capsys, edit("--no-safety-checker"))
    assert FakePipeline.calls[0][2]["safety_checker"] is None


@pytest.mark.parametrize("size", [(117, 91), (112, 88), (14, 11)])
def test_a_mask_of_one_s_own_for_the_reference(work, capsys, size):
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[: size[1] // 2] = 255
    PIL.Image.fromarray(mask).save("mask.png")
    ran(capsys, edit("--mask", "mask.png", "--reference"))
    assert stages() == ["load", "invert", "edit"]
    given = arguments("edit")["mask_image"]
    assert given.shape == (1, 11, 14)
    assert given[0, :5].all() and not given[0, 6:].any()


@pytest.mark.parametrize("value, words", [(0, "mask is empty"), (255, "covers the whole")])
def test_a_mask_without_an_edge_is_said(work, capsys, value, words):
    PIL.Image.new("L", (117, 91), value).save("mask.png")
    _, err = ran(capsys, edit("--mask", "mask.png", "--reference"))
    assert words in err


# --- mask, invert, latents -------------------------------------------------------------------------


def test_mask_writes_white_where_the_picture_changes(work, capsys):
    line, _ = ran(
        capsys,
        [
            "mask",
            "p.png",
            "--source",
            SOURCE,
            "--target",
            TARGET,
            "-o",
            "m.png",
            "--model",
            "model",
            "--maps",
            "2",
            "--mask-strength",
            "0.3",
            "--mask-threshold",
            "2",
        ],
    )
    assert stages() == ["load", "mask"]
    asked = arguments("mask")
    assert (asked["num_maps_per_mask"], asked["mask_encode_strength"]) == (2, 0.3)
    assert asked["mask_thresholding_ratio"] == 2
    mask = np.asarray(PIL.Image.open("m.png"))
    assert mask.shape == (91, 117) and set(np.unique(mask)) == {0, 255}
    assert (mask[:, :58] == 255).all() and (mask[:, 59:] == 0).all()
    assert line.startswith("m.png: 117 x 91, 50% white")
    assert (asked["per_image_clamp"], asked["corrected_guidance"], asked["outlier_quantile"]) == (True, True, 0.99)
    assert asked["mask_options"] == EDIT_MASK


def test_the_reference_s_mask(work, capsys):
    line, _ = ran(capsys, ["mask", "p.png", "--source", SOURCE, "--target", TARGET, "-o", "m.png", "--model",
                           "model", "--reference", "--json"])  # fmt: skip
    asked = dict(arguments("mask"))
    assert asked.pop("image").size == (112, 88)
    assert asked == dict(
        target_prompt=TARGET, source_prompt=SOURCE, num_maps_per_mask=10, mask_encode_strength=0.5,
        mask_thresholding_ratio=3.0, num_inference_steps=50, guidance_scale=7.5, generator=0, output_type="np",
        return_map=True,
    )  # fmt: skip
    assert not {"outliers", "mask_level", "sweep"} & set(json.loads(line))


def test_mask_options_overlay_and_map(work, capsys):
    line, _ = ran(capsys, ["mask", "p.png", "--source", SOURCE, "--target", TARGET, "-o", "m.png", "--model",
                           "model", "--mask-dilation", "2", "--outliers", "none", "--overlay", "over.png", "--map",
                           "map.png", "--mask-threshold", "2", "--json"])  # fmt: skip
    asked = arguments("mask")
    assert asked["mask_options"] == dataclasses.replace(EDIT_MASK, dilation=2) and asked["outlier_quantile"] is None
    seen = np.asarray(PIL.Image.open("map.png"))
    assert seen.shape == (91, 117)
    # 0.5 and 1.5, with a mean of 1 and so a clamp of 2.
    assert set(np.unique(seen)) == {round(255 / 4), round(255 * 3 / 4)} and seen[0, 0] == round(255 * 3 / 4)
    assert PIL.Image.open("over.png").size == (117, 91)
    result = json.loads(line)
    assert (result["mask_dilation"], result["outliers"], result["map"]) == (2, None, "map.png")


def invert(capsys, *more, output="l.safetensors"):
    line, _ = ran(capsys, ["invert", "p.png", "--source", SOURCE, "-o", output, "--model", "model", *more])
    return line


def edit_with_latents(*more):
    return [
        "edit",
        "p.png",
        "--latents",
        "l.safetensors",
        "--target",
        TARGET,
        "-o",
        "out.png",
        "--model",
        "model",
        *more,
    ]


def test_invert_writes_what_edit_reads(work, capsys):
    line = invert(
        capsys,
        "--steps",
        "10",
        "--strength",
        "0.6",
        "--guidance",
        "2",
        "--seed",
        "9",
        "--scheduler",
        "dpm",
        "--negative",
        "blurred",
    )
    assert "1 x 6 x 4 x 11 x 14" in line and "seed 9" in line
    asked = arguments("invert")
    assert (asked["guidance_scale"], asked["negative_prompt"], asked["generator"]) == (2.0, "blurred", 9)
    latents, clean, made = read_latents("l.safetensors")
    assert (made["prompt"], made["negative_prompt"], made["working_size"]) == (SOURCE, "blurred", (112, 88))
    assert (made["steps"], made["strength"], made["scheduler"], made["seed"]) == (10, 0.6, "dpm", 9)

    FakePipeline.calls.clear()
    line, _ = ran(capsys, edit_with_latents("--json"))
    assert stages() == ["load", "whole"]
    change = arguments("whole")
    assert isinstance(change["image_latents"], DiffEditInversionPipelineOutput)
    np.testing.assert_array_equal(change["image_latents"].latents, latents)
    np.testing.assert_array_equal(change["image_latents"].clean_latents, clean)
    assert clean.shape == (1, 4, 11, 14) and not np.array_equal(clean, latents[:, -1])
    assert not {"inversion", "inversion_prompt", "inversion_iterations"} & set(change)
    assert (change["num_inference_steps"], change["inpaint_strength"]) == (10, 0.6)
    # Guidance is the edit's own affair; the source is the text of the inversion.
    assert change["guidance_scale"] == 7.5 and change["source_prompt"] == SOURCE
    assert change["image"].size == (112, 88) and "invert_guidance" not in json.loads(line)
    pipe = next(call for call in FakePipeline.calls if call[0] == "whole")[2]
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"

    FakePipeline.calls.clear()
    ran(capsys, edit_with_latents("--reference"))
    assert stages() == ["load", "mask", "edit"]
    change = arguments("edit")
    np.testing.assert_array_equal(change["image_latents"], latents)
    assert change["guidance_scale"] == 7.5 and change["negative_prompt"] == SOURCE
    assert arguments("mask")["source_prompt"] == SOURCE and arguments("mask")["image"].size == (112, 88)
    pipe = next(call for call in FakePipeline.calls if call[0] == "edit")[2]
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"


@pytest.mark.parametrize("seed", [-9, -(2**63), 2**64 - 1])
def test_every_seed_of_torch_is_taken_and_kept(work, capsys, seed):
    assert f"seed {seed}" in invert(capsys, "--seed", str(seed))
    assert arguments("invert")["generator"] == seed
    assert read_latents("l.safetensors")[2]["seed"] == seed


def test_invert_inverts_as_edit_does(work, capsys, monkeypatch):
    invert(capsys, "--iterations", "2")
    asked = arguments("invert")
    assert (asked["guidance_scale"], asked["inversion_iterations"]) == (1.0, 2)
    FakePipeline.calls.clear()
    invert(capsys, "--reference")
    asked = arguments("invert")
    assert asked["guidance_scale"] == 7.5 and "inversion_iterations" not in asked
    for settings in ("SETTINGS", "EDIT_SETTINGS"):
        monkeypatch.setattr(demo, settings, dict(demo.SETTINGS, guidance=4.0, invert_guidance=0.5))
    for more, guidance in ((), 0.5), (("--reference",), 4.0):
        FakePipeline.calls.clear()
        invert(capsys, *more, "--model", "demo")
        assert arguments("invert")["guidance_scale"] == guidance


def test_latents_keep_their_size(work, capsys):
    invert(capsys, "--size", "64")
    *_, made = read_latents("l.safetensors")
    assert made["working_size"] != (112, 88)
    FakePipeline.calls.clear()
    ran(capsys, edit_with_latents())
    assert arguments("whole")["image"].size == made["working_size"]
    FakePipeline.calls.clear()
    refused(capsys, edit_with_latents("--size", "64"), "--size")


def test_the_same_pixels_in_another_file_are_the_same_picture(work, capsys):
    invert(capsys)
    PIL.Image.open("p.png").save("again.bmp")
    argv = edit_with_latents()
    argv[1] = "again.bmp"
    ran(capsys, argv)


def test_latents_that_do_not_belong(work, capsys):
    invert(capsys, "--steps", "10", "--strength", "0.6")
    write_model(work / "vast", levels=6)
    FakePipeline.calls.clear()
    refused(capsys, edit_with_latents("--steps", "11"), "--steps 10", "11")
    refused(capsys, edit_with_latents("--strength", "0.7"), "--strength 0.6", "0.7")
    refused(capsys, edit_with_latents("--scheduler", "dpm"), "--scheduler ddim")
    refused(capsys, edit_with_latents("--latents", "no.safetensors"), "no latents file")
    refused(capsys, edit_with_latents("--model", "demo"), "made with the model")
    refused(capsys, edit_with_latents("--model", "vast"), "pixels per latent")
    PIL.Image.new("RGB", (117, 91)).save("p.png")
    refused(capsys, edit_with_latents(), "another picture", "117x91")


def rewrite(change, values=None):
    """Write l.safetensors again with changed metadata or values."""
    with safe_open("l.safetensors", "numpy") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    if values is not None:
        tensors = values(tensors)
    metadata.update(change)
    save_file(tensors, "l.safetensors", {k: v for k, v in metadata.items() if v is not None})


@pytest.mark.parametrize(
    "change, values, words",
    [
        ({"format": "other"}, None, "not written by"),
        ({"format_version": "3"}, None, "version 3"),
        ({"steps": "ten"}, None, "damaged"),
        ({"steps": "0"}, None, "damaged"),
        ({"strength": "nan"}, None, "damaged"),
        ({"strength": "0.0"}, None, "strength"),
        ({"steps": "20"}, None, "expected (1, 12,"),
        ({"scheduler": "euler"}, None, "euler"),
        ({"working_size": "112"}, None, "damaged"),
        ({"working_size": "104x88"}, None, "(4, 11, 13)"),
        ({"picture_sha256": None}, None, "picture_sha256"),
        ({}, lambda t: {"other": t["image_latents"]}, "not written by"),
        ({}, lambda t: {"image_latents": t["image_latents"]}, "no clean latents"),
        ({"format_version": "1"}, lambda t: {"image_latents": t["image_latents"]}, "older version"),
        ({}, lambda t: dict(t, image_latents=t["image_latents"].astype(np.float64)), "float64"),
        ({}, lambda t: dict(t, clean_latents=t["clean_latents"].astype(np.float64)), "float64"),
        ({}, lambda t: dict(t, image_latents=t["image_latents"][:, :5].copy()), "(1, 5, 4, 11, 14)"),
        ({}, lambda t: dict(t, image_latents=t["image_latents"][0]), "(6, 4, 11, 14)"),
        ({}, lambda t: dict(t, image_latents=np.concatenate([t["image_latents"]] * 2)), "(2, 6, 4, 11, 14)"),
        ({}, lambda t: dict(t, clean_latents=t["clean_latents"][..., :13].copy()), "(1, 4, 11, 13)"),
        ({}, lambda t: {name: values[..., :13].copy() for name, values in t.items()}, "(4, 11, 14)"),
        ({}, lambda t: dict(t, image_latents=t["image_latents"] * np.float32("nan")), "NaN"),
        ({}, lambda t: dict(t, clean_latents=t["clean_latents"] * np.float32("nan")), "NaN"),
    ],
)
def test_damaged_latents(work, capsys, change, values, words):
    invert(capsys, "--steps", "10", "--strength", "0.6")
    FakePipeline.calls.clear()
    rewrite(change, values)
    refused(capsys, edit_with_latents(), words)


def test_latents_of_the_version_before_serve_the_reference(work, capsys):
    invert(capsys, "--steps", "10")
    rewrite({"format_version": "1"}, lambda t: {"image_latents": t["image_latents"]})
    latents, clean, _ = read_latents("l.safetensors")
    assert clean is None
    FakePipeline.calls.clear()
    ran(capsys, edit_with_latents("--reference"))
    np.testing.assert_array_equal(arguments("edit")["image_latents"], latents)


def test_files_that_are_no_latents(work, capsys):
    invert(capsys)
    FakePipeline.calls.clear()
    whole = open("l.safetensors", "rb").read()
    for data in (b"", b"text " * 100, whole[: len(whole) // 2], whole[:-1]):
        open("l.safetensors", "wb").write(data)
        refused(capsys, edit_with_latents(), "not a whole safetensors file")


def test_inverted_nan_is_not_written(work, capsys, monkeypatch):
    nan = DiffEditInversionPipelineOutput(
        np.full((1, 40, 4, 11, 14), np.nan, np.float32), clean_latents=np.zeros((1, 4, 11, 14), np.float32)
    )
    monkeypatch.setattr(FakePipeline, "invert", lambda self, **_: nan)
    code = cli.main(["invert", "p.png", "--source", SOURCE, "-o", "l.safetensors", "--model", "model"])
    assert code == 2 and "inversion" in capsys.readouterr().err
    assert not os.path.exists("l.safetensors")


# --- demo -----------------------------------------------------------------------------------------


def test_demo_writes_four_pictures(work, capsys):
    line, _ = ran(capsys, ["demo", "-o", "a/b"])
    assert sorted(os.listdir("a/b")) == ["edit.png", "edited.png", "mask.png", "original.png"]
    assert line.startswith(os.path.join("a", "b", "edit.png"))
    np.testing.assert_array_equal(np.asarray(PIL.Image.open("a/b/original.png")), np.asarray(PIL.Image.open("p.png")))
    asked = arguments("whole")
    assert asked["source_prompt"] == demo.SAMPLE_PROMPTS["source"]
    assert asked["target_prompt"] == demo.SAMPLE_PROMPTS["target"]
    assert asked["num_inference_steps"] == demo.EDIT_SETTINGS["steps"]
    assert asked["inversion_guidance_scale"] == demo.EDIT_SETTINGS["invert_guidance"]
    assert asked["mask_encode_strength"] == demo.EDIT_SETTINGS["mask_strength"]
    # Again, over the first.
    FakePipeline.calls.clear()
    ran(capsys, ["demo", "-o", "a/b", "--json", "--reference"])
    assert stages() == ["load", "mask", "invert", "edit"]
    assert arguments("edit")["num_inference_steps"] == demo.SETTINGS["steps"]


def test_empty_names_are_refused(work, capsys):
    refused(capsys, ["demo", "-o", ""], "--output is empty")
    refused(capsys, edit(picture=""), "PICTURE is empty")
    assert not os.path.exists("edited.png")


def test_demo_refuses_a_file_as_its_folder(work, capsys):
    refused(capsys, ["demo", "-o", "p.png"], "is a file")
    refused(capsys, ["demo", "-o", "p.png/sub"], "cannot be made")


def test_an_incomplete_installation_is_said(work, capsys, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(work)
    monkeypatch.setattr(demo, "_HERE", work / "nowhere")
    assert cli.main(["demo", "-o", "d"]) == 1
    assert re.fullmatch(r"mindiffedit: failed: .*missing from this installation.*\n", capsys.readouterr().err)


# --- bad input: one sentence, 2, before anything is loaded -----------------------------------------


@pytest.mark.parametrize(
    "more, words",
    [
        (["--steps", "0"], "--steps"),
        (["--steps", "1001"], "1000"),
        (["--steps", "1.5"], "--steps"),
        (["--strength", "1.1"], "--strength"),
        (["--strength", "nan"], "--strength"),
        (["--strength", "0"], "leaves no step"),
        (["--strength", "0.01"], "at least 0.02"),
        (["--guidance", "-1"], "--guidance"),
        (["--guidance", "inf"], "--guidance"),
        (["--invert-guidance", "-1"], "--invert-guidance"),
        (["--maps", "0"], "--maps"),
        (["--maps", "x"], "--maps"),
        (["--mask-strength", "0"], "--mask-strength"),
        (["--mask-strength", "-0.1"], "--mask-strength"),
        (["--mask-threshold", "0"], "--mask-threshold"),
        (["--size", "0"], "--size"),
        (["--seed", "-9223372036854775809"], "--seed"),
        (["--seed", "18446744073709551616"], "--seed"),
        (["--seed", "1.0"], "--seed"),
        (["--mode", "fast"], "--mode"),
        (["--device", "TPU"], "TPU"),
        (["--dtype", "int8"], "--dtype"),
        (["--scheduler", "euler"], "--scheduler"),
        (["--target", ""], "--target is empty"),
        (["--target", "  "], "--target is empty"),
        (["--target", SOURCE], "same text"),
        (["--target", "\udcff"], "UTF-8"),
        (["--unknown"], "--unknown"),
        (["--stren", "0.5"], "--stren"),
        (["-o", ""], "--output is empty"),
        (["--lora", ""], "--lora is empty"),
        (["-o", "out.xyz"], "out.xyz"),
        (["-o", "nowhere/out.png"], "nowhere"),
        (["-o", "model"], "folder"),
        (["-o", "p.png"], "overwrite"),
        (["--grid", "grid.txt"], "grid.txt"),
        (["--grid", "out.png"], "same file"),
        (["--mask", "missing.png"], "missing.png"),
        (["--mask", "model/model_index.json"], "not a picture"),
        (["--revision", "main"], "--revision"),
        (["--model", "missing-folder"], "no such folder"),
        (["--model", "./missing/folder"], "no such folder"),
        (["--model", "p.png"], "is a file"),
        (["--model", "missing.safetensors"], "no such file"),
        (["--outliers", "some"], "--outliers"),
        (["--outliers", "0"], "--outliers"),
        (["--outliers", "nan"], "--outliers"),
        (["--mask-level", "1"], "--mask-level"),
        (["--mask-smoothing", "-1"], "--mask-smoothing"),
        (["--mask-smoothing", "inf"], "--mask-smoothing"),
        (["--mask-edges", "-1"], "--mask-edges"),
        (["--edge-contrast", "0"], "--edge-contrast"),
        (["--mask-erosion", "-1"], "--mask-erosion"),
        (["--mask-dilation", "1.5"], "--mask-dilation"),
        (["--smallest-region", "-2"], "--smallest-region"),
        (["--iterations", "-1"], "--iterations"),
        (["--iterations", "101"], "100"),
        (["--feather", "-1"], "--feather"),
        (["--inversion", "other"], "--inversion"),
        (["--mask-combine", "xor"], "--mask-combine"),
        (["--caption", "\udcff"], "--caption"),
        (["--strip", "strip.jpg"], ".gif"),
        (["--overlay", "out.png"], "same file"),
        (["--sweep", "sheet.txt"], "sheet.txt"),
        (["--sweep", "p.png"], "overwrite"),
        (["--variant", "fp16", "--model", "demo"], "--variant"),
        (["--config", "model"], "--config"),
        (["--lora", "missing.safetensors"], "--lora missing.safetensors: there is no such file"),
        (["--lora", "p.png"], "only .safetensors"),
        (["--lora", "a.safetensors=x"], "finite number"),
        (["--lora", "a.safetensors=nan"], "finite number"),
        (["--lora", "a.safetensors="], "finite number"),
        (["--lora", "missing.safetensors=0.5"], "--lora missing.safetensors: there is no such file"),
        (["--embedding", "e.bin"], "only .safetensors"),
        (["--embedding", "e.safetensors"], "no such file"),
        (["--prompt-model", "missing"], "--prompt-model missing: there is no such folder"),
        (["--caption-model", "p.png"], "--caption-model p.png is a file"),
        (["--prompt-model", "model", "--source", " "], "--source is empty"),
    ],
)
def test_bad_options(work, capsys, more, words):
    # MindSpore is not even looked for.
    refused(capsys, edit(*more), words)


CORRECTED = [
    *(["--mask-smoothing", "1"], ["--mask-dilation", "1"], ["--mask-erosion", "1"], ["--fill-holes"]),
    *(["--no-fill-holes"], ["--no-soft-mask"]),
    *(["--mask-edges", "2"], ["--edge-contrast", "0.1"]),
    *(["--smallest-region", "2"], ["--mask-level", "0.4"], ["--soft-mask"], ["--outliers", "none"]),
    *(["--inversion", "noise"], ["--iterations", "0"], ["--no-paste-back"], ["--feather", "2"]),
    *(["--caption", "a picture"], ["--sweep", "sheet.png"]),
]


@pytest.mark.parametrize("more", CORRECTED, ids=lambda words: words[0])
def test_the_reference_knows_no_corrections(work, capsys, more):
    refused(capsys, edit("--reference", *more), "--reference", more[0])
    if more[0] not in ("--sweep",):
        refused(capsys, ["demo", "-o", "d", "--reference", *more], "--reference", more[0])


NOISE, LATENTS, MASK = ["--inversion", "noise"], ["--latents", "l.safetensors"], ["--mask", "p.png"]


@pytest.mark.parametrize(
    "more, words",
    [
        ([*NOISE, *LATENTS], ["--inversion noise", "--latents"]),
        ([*NOISE, "--iterations", "2"], ["--inversion noise", "--iterations"]),
        ([*NOISE, "--invert-guidance", "2"], ["--inversion noise", "--invert-guidance"]),
        ([*NOISE, "--caption", "a"], ["--inversion noise", "--caption"]),
        ([*NOISE, "--caption-model", "model"], ["--caption-model", "--source"]),
        ([*LATENTS, "--inversion", "ddim"], ["--latents", "--inversion"]),
        ([*LATENTS, "--iterations", "1"], ["--latents", "--iterations"]),
        ([*LATENTS, "--invert-guidance", "2"], ["--latents", "--invert-guidance"]),
        ([*LATENTS, "--caption-model", "model"], ["--latents", "--caption-model"]),
        ([*LATENTS, "--sweep", "s.png", "--sweep-strengths", "0.5"], ["--latents", "--sweep-strengths"]),
        (["--mask-combine", "union"], ["--mask-combine", "--mask FILE"]),
        ([*MASK, "--mask-smoothing", "1"], ["--mask-smoothing", "--mask-combine union"]),
        ([*MASK, "--mask-combine", "replace", "--outliers", "0.9"], ["--outliers"]),
        ([*MASK, "--maps", "2"], ["--maps", "--mask-combine union"]),
        ([*MASK, "--mask-strength", "0.5"], ["--mask-strength"]),
        ([*MASK, "--mask-threshold", "2", "--reference"], ["--mask-threshold", "leave it out."]),
        ([*LATENTS, "--invert-guidance", "2", "--reference"], ["--latents", "--invert-guidance"]),
        (["--guidance", "1", "--negative", "blurred"], ["--negative", "--guidance 1"]),
        (["--no-paste-back", "--feather", "3"], ["--feather", "--no-paste-back"]),
        (["--caption", "a", "--caption-model", "model"], ["--caption", "--caption-model"]),
        (["--reference", "--caption-model", "model"], ["--caption-model", "--source"]),
        (["--scheduler", "dpm", "--iterations", "1"], ["--iterations", "dpm"]),
        (["--sweep-guidances", "1,2"], ["--sweep-guidances", "--sweep"]),
        (["--sweep", "s.png", "--sweep-guidances", "1,two"], ["--sweep-guidances", "'two'"]),
        (["--sweep", "s.png", "--sweep-strengths", "0.5,2"], ["--sweep-strengths", "[0.0, 1.0]"]),
        (["--sweep", "s.png", "--sweep-strengths", "0.01"], ["--sweep-strengths", "no step"]),
        (["--sweep", "s.png", "--sweep-strengths", ""], ["--sweep-strengths"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_contradictions(work, capsys, more, words):
    refused(capsys, edit(*more), *words)


def test_contradictions_of_the_other_commands(work, capsys):
    texts = ["--source", SOURCE, "--target", TARGET, "--model", "model"]
    refused(capsys, ["mask", "p.png", *texts, "-o", "m.png", *MASK], "--mask-combine")
    refused(capsys, ["mask", "p.png", *texts, "-o", "m.png", *MASK, "--reference"], "leave --mask or --reference out")
    refused(capsys, ["mask", "p.png", *texts, "-o", "m.png", "--caption-model", "model"], "--source does already")
    refused(capsys, ["mask", "p.png", *texts, "--sweep", "s.png", "--map", "map.png"], "--map", "-o")
    refused(capsys, ["mask", "p.png", *texts], "--output", "--sweep")
    refused(capsys, ["mask", "p.png", *texts, "--sweep", "s.png", "--sweep-thresholds", "0,1"],
            "--sweep-thresholds")  # fmt: skip
    refused(capsys, ["edit", "p.png", *texts, "--sweep", "s.png", "--grid", "grid.png"], "--grid", "-o")
    refused(capsys, ["edit", "p.png", "--target", TARGET, "--prompt-model", "model", "--caption-model", "model",
                     "-o", "out.png", "--model", "model"], "--prompt-model", "--source")  # fmt: skip
    invert = ["invert", "p.png", "--source", SOURCE, "-o", "l.safetensors", "--model", "model"]
    refused(capsys, [*invert, "--caption-model", "model"], "--source does already")
    refused(capsys, [*invert, "--reference", "--iterations", "1"], "--reference", "--iterations")
    refused(capsys, [*invert, "--source", ""], "--source is empty")
    refused(capsys, [*invert, "--negative", "blurred"], "--negative", "--guidance 1")
    (work / "lora.safetensors").touch()
    for lora in ("lora.safetensors", "lora.safetensors=0.5"):
        refused(capsys, [*invert, "--lora", lora, "-o", "lora.safetensors"], "overwrite --lora lora.safetensors")


def test_source_is_needed_without_latents(work, capsys):
    refused(capsys, ["edit", "p.png", "--target", TARGET, "-o", "out.png", "--model", "model"], "--source")
    refused(capsys, ["mask", "p.png", "--target", TARGET, "-o", "out.png", "--model", "model"], "--source")
    refused(capsys, ["invert", "p.png", "-o", "out.safetensors", "--model", "model"], "--source")


def test_the_same_texts_are_fine_where_no_mask_is_computed(work, capsys):
    PIL.Image.new("L", (117, 91), 255).save("mask.png")
    ran(capsys, edit("--target", SOURCE, "--mask", "mask.png"))


def test_outputs_of_the_other_commands(work, capsys):
    texts = ["--source", SOURCE, "--target", TARGET, "--model", "model"]
    refused(capsys, ["mask", "p.png", *texts, "-o", "mask.jpg"], "mask.jpg")
    refused(capsys, ["invert", "p.png", "--source", SOURCE, "-o", "l.npz"], "safetensors")


def test_bad_pictures(work, capsys):
    PIL.Image.new("RGB", (7, 50)).save("small.png")
    frames = [PIL.Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save("moving.gif", save_all=True, append_images=frames[1:])
    open("cut.png", "wb").write(open("p.png", "rb").read()[:3000])
    open("empty.png", "wb").close()
    open("text.png", "w").write("hello")
    for name, words in (
        ("missing.png", "there is no picture"),
        ("small.png", "too small"),
        ("moving.gif", "animated"),
        ("cut.png", "truncated"),
        ("empty.png", "empty"),
        ("text.png", "not a picture"),
        (".", "is a folder"),
        ("http://127.0.0.1:9/p.png", "cannot be fetched"),
    ):
        refused(capsys, edit(picture=name), words)


def test_bad_masks(work, capsys):
    PIL.Image.new("L", (91, 117), 255).save("turned.png")
    PIL.Image.fromarray(np.ones((91, 117), np.float32)).save("float.tif")
    PIL.Image.fromarray(np.full((91, 117), 2, np.float32)).save("range.tif")
    refused(capsys, edit("--mask", "turned.png", "--reference"), "91 x 117", "117 x 91")
    refused(capsys, edit("--mask", "float.tif", "--reference"), "mode F")
    refused(capsys, edit("--mask", "range.tif"), "--mask", "[0, 1]")
    _, err = ran(capsys, edit("--mask", "turned.png"))
    assert "91 x 117" in err and "stretched" in err


def test_bad_model_folders(work, capsys):
    def broken(change, *words):
        shutil.rmtree("bad", ignore_errors=True)
        write_model(work / "bad")
        change(work / "bad")
        refused(capsys, edit("--model", "bad"), *words)

    unet, vae, text_encoder = WEIGHTS
    # One of each kind: tests/test_survey.py has them all.
    broken(lambda f: (f / "model_index.json").unlink(), "has no model_index.json")
    broken(lambda f: (f / "vae" / "config.json").unlink(), "vae/config.json is missing")
    broken(lambda f: (f / "vae" / "config.json").write_text("{"), "vae/config.json", "JSON")
    broken(lambda f: (f / "unet" / "config.json").write_text("[]"), "JSON object")
    broken(lambda f: (f / unet).rename(f / "unet" / "model.bin"), "only pickle weights", "unet")
    broken(lambda f: (f / unet).unlink(), "no weights", "unet")
    broken(lambda f: (f / vae).write_bytes(b""), vae, "is empty")
    broken(lambda f: (f / text_encoder).write_bytes(b"text " * 100), text_encoder, "not a safetensors file")
    broken(lambda f: (f / "tokenizer" / "merges.txt").unlink(), "tokenizer lacks merges.txt")
    broken(lambda f: (f / "unet" / "config.json").write_text('{"in_channels": 9}'), "takes 9 channels")


def test_the_cheapest_is_looked_at_first(work, capsys):
    """Everything is wrong; each repair uncovers the next dearer fault."""
    PIL.Image.new("L", (3, 3)).save("mask3.png")
    bad = {
        "--steps": "0",
        "--target": "",
        "-o": "nowhere/out.png",
        "--mask": "no-mask.png",
        "--model": "missing",
        "picture": "no-picture.png",
    }
    repairs = [
        ("--steps", "10", "--target"),
        ("--target", TARGET, "nowhere"),
        ("-o", "out.png", "no-picture.png"),
        ("picture", "p.png", "no-mask.png"),
        ("--mask", "mask3.png", "no such folder"),
        ("--model", "model", "3 x 3"),
    ]

    def argv():
        words = ["edit", bad["picture"], "--source", SOURCE, "--reference"]
        return words + [word for name, value in bad.items() if name != "picture" for word in (name, value)]

    refused(capsys, argv(), "--steps")
    for name, value, next_fault in repairs:
        bad[name] = value
        refused(capsys, argv(), next_fault)


def test_an_absent_device_is_an_error(work, capsys, monkeypatch):
    def absent(name):
        raise RuntimeError(f"device {name} was asked for\nand is not here")

    monkeypatch.setattr("mindiffedit.runtime.devices.require_device", absent)
    refused(capsys, edit("--device", "ascend"), "device Ascend was asked for and is not here")


# --- failures on the way --------------------------------------------------------------------------


def nan_found():
    options.check_finite(np.array([np.nan]), "inversion", 3)


def foreign(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize("stage", ["load", "mask", "invert", "edit", "whole"])
@pytest.mark.parametrize(
    "failure, code, words",
    [
        (nan_found, 2, "inversion, step 3"),
        (foreign(RuntimeError("out of\nmemory")), 1, "failed: RuntimeError: out of memory"),
        (foreign(ValueError("some library's own")), 1, "failed: ValueError"),
        (foreign(KeyboardInterrupt()), 130, "interrupted"),
    ],
)
def test_failures_leave_no_file(work, capsys, stage, failure, code, words):
    FakePipeline.breaks[stage] = failure
    more = ["--overlay", "over.png"] if stage == "whole" else ["--reference"]
    assert cli.main(edit("--grid", "grid.png", *more)) == code
    out, err = capsys.readouterr()
    assert out == "" and words in err.splitlines()[-1]
    assert ("Traceback" in err) == (code == 1)
    assert sorted(os.listdir()) == ["model", "p.png"]
    assert sys.stdout is not sys.stderr


def test_a_full_disk_leaves_no_file(work, capsys, monkeypatch):
    save = PIL.Image.Image.save

    def full(self, path, **kwargs):
        if "grid" in str(path):
            raise OSError(28, "No space left on device")
        save(self, path, **kwargs)

    monkeypatch.setattr(PIL.Image.Image, "save", full)
    assert cli.main(edit("--grid", "grid.png")) == 1
    err = capsys.readouterr().err
    assert "No space left" in err and "Traceback" not in err
    assert sorted(os.listdir()) == ["model", "p.png"]


# --- the hub --------------------------------------------------------------------------------------


def test_hub_models_are_fetched_after_the_cheap_checks(work, capsys, monkeypatch):
    asked = []

    def resolve(name, options, **kwargs):
        asked.append((name, options, kwargs))
        return work / "model"

    monkeypatch.setattr("mindiffedit.checkpoints.hub.resolve_folder", resolve)
    hub = [word if word != "model" else "maker/model" for word in edit("--revision", "v1", "--offline")]
    refused(capsys, [*hub, "--steps", "0"])
    assert asked == []
    line, _ = ran(capsys, [*hub, "--json", "--no-safety-checker"])
    ((name, options, kwargs),) = asked
    assert name == "maker/model" and options.revision == "v1" and options.local_files_only is True
    assert kwargs["skip"] == ("safety_checker",)
    assert arguments("load") == str(work / "model")
    assert json.loads(line)["model"] == "maker/model"
    # What a folder of one's own is looked at for, a fetched one is too.
    (work / "model" / WEIGHTS[0]).unlink()
    FakePipeline.calls.clear()
    refused(capsys, hub, "no weights")


def test_a_safety_checker_that_is_not_wanted_is_not_looked_at(work, capsys):
    index = json.loads((work / "model" / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (work / "model" / "model_index.json").write_text(json.dumps(index))
    refused(capsys, edit(), "safety_checker/config.json is missing")
    ran(capsys, edit("--no-safety-checker"))


# --- the page --------------------------------------------------------------------------------------


def test_the_page_s_examples_run_one_after_the_other(work, capsys, monkeypatch):
    from test_guide import ROOT, command_lines

    class Strip(contextlib.nullcontext):
        def __init__(self, *_, **__):
            super().__init__()

    monkeypatch.setattr("mindiffedit.images.strips.AnimatedStrip", Strip)
    page = ROOT / "docs" / "cli.md"
    text = page.read_text(encoding="utf-8")
    (work / "page.md").write_text(text[: text.index("## Models")])  # what comes then needs other models
    commands = list(command_lines(work / "page.md"))
    assert {words[0] for words in commands} == {"demo", "edit", "mask", "invert"} and len(commands) > 10
    for words in commands:
        ran(capsys, words)
        FakePipeline.calls.clear()
    for name in ("masks.png", "edits.png", "second.png", "union.png", "grid.png", "overlay.png", "map.png"):
        assert (work / name).exists()


def test_the_page_names_every_option():
    from test_guide import ROOT

    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    parsers = build_parser()._subparsers._group_actions[0].choices
    missing = [
        name
        for command in ("edit", "mask", "invert")
        for action in parsers[command]._actions
        for name in action.option_strings
        if name.startswith("--") and not name.startswith("--no-") and name not in text
    ]
    assert set(missing) <= {"--output"}


# --- with real models -------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_reference_s_edit_by_a_real_model_is_the_pipeline_s_own(sd2_folder, tmp_path, monkeypatch, capfd):
    """The command in parts and the command as a whole give the same pixels as three calls of the pipeline."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(2)
    picture = PIL.Image.fromarray(rng.integers(0, 256, (56, 72, 3), dtype=np.uint8))
    picture.save("p.png")
    numbers = ["--steps", "5", "--model", str(sd2_folder), "--seed", "4"]
    numbers.append("--reference")
    texts = ["--source", SOURCE, "--target", TARGET]
    assert cli.main(["edit", "p.png", *texts, "-o", "whole.png", "--maps", "2", *numbers]) == 0
    out = capfd.readouterr().out
    assert re.fullmatch(r"whole\.png: 72 x 56, \d+% of it in the mask, seed 4, [\d.]+ s\n", out)

    assert cli.main(["mask", "p.png", *texts, "-o", "mask.png", "--maps", "2", *numbers]) == 0
    assert cli.main(["invert", "p.png", "--source", SOURCE, "-o", "l.safetensors", *numbers]) == 0
    assert (
        cli.main(
            [
                "edit",
                "p.png",
                "--target",
                TARGET,
                "--mask",
                "mask.png",
                "--latents",
                "l.safetensors",
                "-o",
                "parts.png",
                "--model",
                str(sd2_folder),
                "--seed",
                "4",
                "--reference",
            ]
        )
        == 0
    )
    whole, parts = np.asarray(PIL.Image.open("whole.png")), np.asarray(PIL.Image.open("parts.png"))
    np.testing.assert_array_equal(whole, parts)

    from mindiffedit import DDIMInverseScheduler, DDIMScheduler, StableDiffusionDiffEditPipeline

    pipe = StableDiffusionDiffEditPipeline.from_pretrained(str(sd2_folder), requires_safety_checker=False)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.inverse_scheduler = DDIMInverseScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    same = dict(num_inference_steps=5, generator=4)
    mask = pipe.generate_mask(picture, TARGET, source_prompt=SOURCE, num_maps_per_mask=2, **same)
    inverted = pipe.invert(SOURCE, picture, **same).latents
    result = pipe(TARGET, mask, inverted, negative_prompt=SOURCE, **same).images[0]
    np.testing.assert_array_equal(whole, np.asarray(result))
    assert 0 < np.asarray(mask).mean() < 1
    written = masks.preprocess_mask(PIL.Image.open("mask.png").resize((9, 7), PIL.Image.Resampling.BOX))
    np.testing.assert_array_equal(written[0, 0], mask[0])


def test_the_parts_of_an_edit_are_the_whole(tmp_path, monkeypatch, capfd):
    """On the demo model, and on a picture that it works on at another size: `mask` and `invert`, then `edit` with what
    these wrote, gives the same pixels as `edit` alone; and so does a cell of a sheet with the same settings."""
    monkeypatch.chdir(tmp_path)
    sheets = []
    original = masks.contact_sheet
    monkeypatch.setattr("mindiffedit.images.sheets.contact_sheet", lambda rows, *rest, **more: sheets.append(rows) or original(
        rows, *rest, **more))  # fmt: skip
    PIL.Image.open(demo.sample_picture()).convert("RGB").resize((150, 131)).save("p.png")
    source, target = demo.SAMPLE_PROMPTS.values()
    common = ["--steps", "6", "--seed", "4", "--quiet"]
    masked = ["--source", source, "--target", target, "--maps", "2", "--mask-smoothing", "1"]
    assert cli.main(["edit", "p.png", *masked, *common, "-o", "whole.png", "--strip", "strip.png", "--json",
                     "--sweep", "sheet.png", "--sweep-strengths", "0.9", "--sweep-guidances", "5"]) == 0  # fmt: skip
    result = json.loads(capfd.readouterr().out)
    assert cli.main(["mask", "p.png", *masked, *common, "-o", "mask.png"]) == 0
    assert cli.main(["invert", "p.png", "--source", source, *common, "-o", "l.safetensors"]) == 0
    assert cli.main(["edit", "p.png", "--target", target, "--mask", "mask.png", "--latents", "l.safetensors",
                     "--seed", "4", "--quiet", "-o", "parts.png"]) == 0  # fmt: skip
    given, whole, parts = (np.asarray(PIL.Image.open(name)) for name in ("p.png", "whole.png", "parts.png"))
    np.testing.assert_array_equal(whole, parts)
    np.testing.assert_array_equal(np.asarray(sheets[0][0][0]), whole)

    mask = np.asarray(PIL.Image.open("mask.png"))
    assert result["mask_share"] == pytest.approx(mask.mean() / 255, abs=0.01) and 0.02 < result["mask_share"] < 0.5
    seam = masks.feathered((mask > 0).astype(np.float32), mask.shape, 6)[0]
    np.testing.assert_array_equal(whole[seam == 0], given[seam == 0])
    assert np.abs(whole.astype(int) - given)[mask > 0].mean() > 10
    report = result["report"]
    assert report["change_outside"] == 0 < report["change_outside_before_paste_back"]
    assert report["inversion_error"] > 0 and set(report["seconds"]) >= {"mask", "inversion", "edit"}
    assert PIL.Image.open("strip.png").n_frames == 2 * 5  # 5 of 6 steps run, each way
