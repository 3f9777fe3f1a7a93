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
import subprocess
import sys
import types
from unittest.mock import Mock

import numpy as np
import PIL.Image
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from mindiffedit import __main__, demo, masks, options
from mindiffedit.cli import command as cli
from mindiffedit.cli.arguments import CORRECTED_DEFAULTS, DEFAULTS, build_parser
from mindiffedit.cli.latents_file import read_latents
from mindiffedit.cli.wording import OPTIONS, option_of, told
from mindiffedit.editing import EDIT_MASK, INVERSION_MASK
from mindiffedit.errors import Message, named
from mindiffedit.images import sheets
from mindiffedit.images.colours import Original
from mindiffedit.outputs import DiffEditInversionPipelineOutput, DiffEditOutput, EditReport
from mindiffedit.pipeline import StableDiffusionDiffEditPipeline

COMMANDS = ("edit", "mask", "invert", "demo", "doctor", "ui", "serve", "batch", "parity record", "parity check")
SOURCE, TARGET = "a red apple on a table", "a yellow pear on a table"
FLAT = (10, 200, 30)
"""The colour of every edited picture of the fake."""


class FakeScheduler:
    """One of a class and a solver's name that the test says."""

    def __init__(self, name, config):
        self.name, self.config = name, dict(config)


def scheduler_of(class_name, name, config):
    return type(class_name, (FakeScheduler,), {})(name, config)


def fake_solver(name, config, as_there):
    config = dict(config) if as_there else {**config, "timestep_spacing": "leading"}
    return FakeScheduler(name, config), FakeScheduler(f"inverse {name}", config)


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
    own_scheduler = scheduler_of("PNDMScheduler", None, {"beta_start": 0.2})
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
        self.scheduler = self.own_scheduler

    def set_progress_bar_config(self, **kwargs):
        self.calls.append(("bar", kwargs))

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
        map_ = self._map(kwargs["image"].size)
        return (map_ > 1).astype(np.int64), map_

    def _map(self, size):
        map_ = np.full((1, size[1] // 8, size[0] // 8), 0.5, np.float32)
        map_[:, :, : size[0] // 16] = 1.5
        return map_

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
        image = PIL.Image.new("RGB", (width * 8, height * 8), FLAT)
        return types.SimpleNamespace(images=[image], nsfw_content_detected=self.flags)

    @as_the_real_one
    def edit(self, **kwargs):
        self._note("whole", kwargs)
        computes = kwargs["mask_image"] is None or kwargs["mask_combination"] != "replace"
        mask = self._map(kwargs["working_size"]) > 1
        if kwargs["mask_image"] is not None:
            mask = masks.combine(mask, kwargs["mask_image"], kwargs["mask_combination"])
        for stage in ["timestep"] * computes + ["timesteps"] * (1 + ("inversion_prompt" in kwargs)):
            kwargs["debug_callback"](stage, None, None)
        original, weights = Original(kwargs["image"]), None
        if kwargs["paste_back"] and not self.flags:
            feather = 8 if kwargs["feather"] is None else kwargs["feather"]
            weights = masks.feathered(mask, original.shown.size[::-1], feather)[0]
        image = original.rewritten(PIL.Image.new("RGB", original.shown.size, FLAT), weights)
        warnings = [*self.warnings, *original.losses]
        report = EditReport([float(mask.mean())], [0.02], None, [0.0], [3.5], {"mask": 0.1, "edit": 0.25}, warnings)
        return DiffEditOutput([image], mask.astype(np.int64), None, None, None, report, self.flags)


WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


def write_model(folder, sample_size=16, levels=4):
    """A folder that looks like a checkpoint; its files of weights hold none."""
    index = dict(unet="UNet2DConditionModel", vae="AutoencoderKL", text_encoder="CLIPTextModel",
                 tokenizer="CLIPTokenizer", scheduler="PNDMScheduler")  # fmt: skip
    index = {name: ["library", of] for name, of in index.items()}
    content = {
        "model_index.json": {"_class_name": "StableDiffusionPipeline", **index},
        "unet/config.json": {"sample_size": sample_size, "cross_attention_dim": 32},
        "vae/config.json": {"block_out_channels": [8] * levels, "latent_channels": 4},
        "text_encoder/config.json": {"hidden_size": 32},
        **{"scheduler/scheduler_config.json": {}, "tokenizer/vocab.json": {}, "tokenizer/merges.txt": {}},
    }
    for name, value in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    for name in WEIGHTS:
        save_file({}, folder / name)
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a picture of 117 × 91, a model that notes its calls, and nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FakePipeline, "calls", [])
    monkeypatch.setattr(FakePipeline, "breaks", {})
    monkeypatch.setattr("mindiffedit.pipeline.StableDiffusionDiffEditPipeline", FakePipeline)
    monkeypatch.setattr("mindiffedit.solvers.solver_name", lambda scheduler: scheduler.name)
    monkeypatch.setattr("mindiffedit.solvers.made", fake_solver)
    monkeypatch.setattr("mindiffedit.runtime.devices.require_device", lambda name: name or "CPU")
    rng = np.random.default_rng(0)
    PIL.Image.fromarray(rng.integers(0, 256, (91, 117, 3), dtype=np.uint8)).save("p.png")
    write_model(tmp_path / "model")
    monkeypatch.setattr(demo, "checkpoint_folder", lambda: tmp_path / "model")
    monkeypatch.setattr(demo, "sample_picture", lambda example: tmp_path / "p.png")
    return tmp_path


TEXTS = ["--source", SOURCE, "--target", TARGET, "--model", "model"]
MASK = ["mask", "p.png", *TEXTS, "-o", "m.png"]
INVERT = ["invert", "p.png", "--source", SOURCE, "--model", "model", "-o", "l.safetensors"]


def edit(*more, picture="p.png", output="out.png"):
    return ["edit", picture, *TEXTS, "-o", output, *more]


def edit_with_latents(*more):
    latents = ["--latents", "l.safetensors"]
    return ["edit", "p.png", *latents, "--target", TARGET, "-o", "out.png", "--model", "model", *more]


def invert(capsys, *more):
    return ran(capsys, [*INVERT, *more])[0]


def stages():
    """What the last command ran, in order."""
    return [call[0] for call in FakePipeline.calls if call[0] != "bar"]


def arguments(stage):
    """What a stage of the last command was called with."""
    return next(call for call in FakePipeline.calls if call[0] == stage)[1]


def ran(capsys, argv):
    """(stdout, stderr) of a command that ends well."""
    FakePipeline.calls.clear()
    code = cli.main(argv)
    out, err = capsys.readouterr()
    assert code == 0, err
    assert out.count("\n") == 1 and out.endswith("\n")
    return out.strip(), err


def result_of(capsys, argv):
    return json.loads(ran(capsys, [*argv, "--json"])[0])


def refused(capsys, argv, *words):
    """The one line on stderr of a command that ends with 2, before anything is loaded or written."""
    FakePipeline.calls.clear()
    before = sorted(os.listdir())
    code = cli.main(argv)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("note:")]
    assert code == 2, (argv, err)
    assert out == "" and len(lines) == 1, (argv, err)
    for word in words:
        assert word in lines[0], (argv, err)
    assert stages() == [], argv
    assert sorted(os.listdir()) == before, argv
    return lines[0]


def levels(name):
    return np.asarray(PIL.Image.open(name))


# --- help -----------------------------------------------------------------------------------------


def test_help_and_argument_errors_import_nothing_heavy(tmp_path):
    """All in one process, so that what one of them imports is there in the end."""
    program = """
import sys
from mindiffedit.__main__ import program
for line in sys.stdin:
    sys.argv[1:] = line.split()
    print("\\ncode", program())
print("modules", *{name.partition(".")[0] for name in sys.modules})
"""
    cases = {
        **{f"{command} --help": 0 for command in ("", *COMMANDS)},
        **{"--version": 0, "": 2, "demo --steps many": 2, "demo --strength 2": 2},
        **{"edit missing.png --source a --target b -o out.png": 2, "parity check missing.safetensors": 2},
    }
    done = subprocess.run(
        [sys.executable, "-c", program], input="\n".join(cases) + "\n", capture_output=True, text=True,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes = re.findall(r"^code (\d)$", done.stdout, re.MULTILINE)
    assert codes == [str(code) for code in cases.values()]
    assert done.stdout.count("usage: mindiffedit") == len(COMMANDS) + 1 and done.stderr.count("error:") == 5
    loaded = set(done.stdout.splitlines()[-1].split())
    heavy = {"mindspore", "mindone", "torch", "transformers", "diffusers", "huggingface_hub", "scipy", "tqdm"}
    assert {"modules", "mindiffedit", "numpy"} <= loaded and loaded.isdisjoint(heavy)


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


# --- edit in one call ------------------------------------------------------------------------------


def test_edit_is_one_call(work, capsys):
    """With the picture as it is; the model works at 112 x 88."""
    line, err = ran(capsys, edit("--seed", "5", "--steps", "10", "--strength", "0.7", "--guidance", "3"))
    assert stages() == ["load", "whole"]
    asked = dict(arguments("whole"))
    assert np.array_equal(asked.pop("image"), levels("p.png")) and callable(asked.pop("debug_callback"))
    assert asked == dict(
        source_prompt=SOURCE, target_prompt=TARGET, negative_prompt=None, num_inference_steps=10,
        inpaint_strength=0.7, guidance_scale=3.0, preset="balanced",
        mask_thresholding_ratio=2.0, mask_options=INVERSION_MASK, mask_image=None, mask_combination="replace",
        outlier_quantile=0.99, inversion="ddim", inversion_prompt=None, inversion_guidance_scale=1.0,
        inversion_iterations=0, image_latents=None, paste_back=True, feather=None, generator=5,
        output_type="pil", working_size=(112, 88),
    )  # fmt: skip
    assert sorted(os.listdir()) == ["model", "out.png", "p.png"]
    assert line.startswith("out.png: 117 x 91, 50% of it in the mask") and "seed 5" in line
    # Maps of fresh noise: by a preset, or because they are asked for.
    for more, maps in ((["--preset", "exact"], 4), (["--preset", "fast", "--maps", "2"], 2)):
        ran(capsys, edit(*more))
        asked = arguments("whole")
        assert (asked["preset"], asked["num_maps_per_mask"]) == (more[1], maps) and asked["mask_options"] == EDIT_MASK
    assert "117 x 91" in err and "112 x 88" in err
    # A picture that fits is not spoken of, but the model's scheduler is.
    PIL.Image.open("p.png").resize((96, 64)).save("fits.png")
    _, err = ran(capsys, edit(picture="fits.png"))
    assert arguments("whole")["working_size"] == (96, 64)
    assert err.count("note: ") == err.count("note: the model's PNDMScheduler") == 1


def test_pasting_back(work, capsys):
    ran(capsys, edit("--no-paste-back"))
    assert arguments("whole")["paste_back"] is False
    ran(capsys, edit("--feather", "3"))  # in pixels of the model's size
    assert arguments("whole")["feather"] == pytest.approx(3 * 117 / 112)
    PIL.Image.new("RGB", (4000, 20)).save("wide.png")
    ran(capsys, edit("--feather", "10000", "--size", "128", picture="wide.png"))
    assert arguments("whole")["feather"] == 10000


def test_what_the_safety_checker_blackened(work, capsys, monkeypatch):
    assert result_of(capsys, edit())["safety_checker_flagged"] is None
    monkeypatch.setattr(FakePipeline, "flags", [True])
    for more in ([], ["--reference"]):
        line, err = ran(capsys, edit("--json", *more))
        assert json.loads(line)["safety_checker_flagged"] is True and "safety checker" in err
        assert (levels("out.png") == FLAT).all()
    ran(capsys, edit("--no-safety-checker"))
    assert FakePipeline.calls[0][2]["safety_checker"] is None


def test_every_correction_reaches_the_call(work, capsys):
    knobs = dict(smoothing=1.5, dilation=2, erosion=1)
    told = dict(
        **{f"mask_{name}": value for name, value in knobs.items()}, mask_edges=3, edge_contrast=0.1, smallest_region=4,
        mask_level=0.4, outliers=0.9, iterations=3, invert_guidance=2, caption="a table", negative="blurred",
    )  # fmt: skip
    more = [word for name, value in told.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    result = result_of(capsys, edit("--fill-holes", "--soft-mask", *more))
    asked = arguments("whole")
    assert asked["mask_options"] == masks.MaskOptions(
        threshold=0.4, fill_holes=True, smallest_region=4, soft=True, edges=3, edge_contrast=0.1, **knobs
    )
    names = "outlier_quantile", "inversion_iterations", "inversion_guidance_scale", "inversion_prompt"
    assert [asked[name] for name in names] == [0.9, 3, 2, "a table"] and asked["negative_prompt"] == "blurred"
    told |= dict(fill_holes=True, soft_mask=True, inversion="ddim", reference=False, paste_back=True, mask_combine=None)
    assert {name: result[name] for name in told} == told
    ran(capsys, edit("--outliers", "none", "--inversion", "noise", "--no-soft-mask", "--no-fill-holes"))
    asked = arguments("whole")
    assert asked["outlier_quantile"] is None and asked["inversion"] == "noise"
    assert "inversion_iterations" not in asked
    assert asked["mask_options"].soft is asked["mask_options"].fill_holes is False


def test_defaults_of_the_corrections_are_the_call_s():
    call = inspect.signature(StableDiffusionDiffEditPipeline.edit).parameters
    names = dict(
        steps="num_inference_steps", strength="inpaint_strength", guidance="guidance_scale",
        invert_guidance="inversion_guidance_scale", preset="preset",
        mask_threshold="mask_thresholding_ratio", outliers="outlier_quantile", inversion="inversion",
        iterations="inversion_iterations", mask_combine="mask_combination", feather="feather",
    )  # fmt: skip
    defaults = {**DEFAULTS, **CORRECTED_DEFAULTS}
    assert {name: call[given].default for name, given in names.items()} == {name: defaults[name] for name in names}


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
    # What is lost of a picture is known before the edit, and said once.
    PIL.Image.open("p.png").convert("L").save("grey.png")
    line, err = ran(capsys, edit("--json", picture="grey.png"))
    assert err.count("made grey") == 1 and [text == said for text in json.loads(line)["report"]["warnings"]] == [0, 1]


def test_parameters_are_told_as_the_options_of_the_command():
    names = ("inpaint_strength", "prompt", "image", "cross_attention_kwargs[1]")
    for command, prompt, image in (
        ("edit", "--target", "PICTURE"),
        ("invert", "--source", "PICTURE"),
        ("parity check", "--target", "--image"),
    ):
        said = [told(Message("{x}", x=named(name)), command) for name in names]
        assert said == ["--strength", prompt, image, "cross attention kwargs"]
    message = Message("give {guidance_scale=1}, {variant='fp16'} or {safety_checker=None}, not `this` or prompt.")
    assert message == "give `guidance_scale=1`, `variant='fp16'` or `safety_checker=None`, not `this` or prompt."
    assert told(message, "edit") == "give --guidance 1, --variant fp16 or --no-safety-checker, not `this` or prompt."
    assert told("`prompt` in a text", "edit") == "`prompt` in a text"


def test_every_option_that_messages_name_is_one(capsys):
    for command in COMMANDS:
        assert cli.main([*command.split(), "--help"]) == 0
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    named_ones = {option_of(command)(name).split()[0] for command in COMMANDS for name in OPTIONS}
    assert named_ones - {"PICTURE"} <= known and len(named_ones) > 30


def test_an_empty_source_is_a_source(work, capsys):
    assert result_of(capsys, edit("--source", ""))["source"] == "" == arguments("whole")["source_prompt"]


def test_a_mask_of_any_size(work, capsys):
    for width, height in (117, 91), (351, 273), (14, 11):
        drawn = np.zeros((height, width), np.uint8)
        drawn[height // 2, :] = 255  # thin, and not lost
        PIL.Image.fromarray(drawn).save("mask.png")
        ran(capsys, edit("--mask", "mask.png"))
        mask = arguments("whole")["mask_image"]
        assert mask.shape == (1, 11, 14) and arguments("whole")["mask_combination"] == "replace"
        assert mask[0, 5].all() and mask.sum() == 14
    PIL.Image.new("L", (117, 91), 153).save("mask.png")
    ran(capsys, edit("--mask", "mask.png"))
    assert (arguments("whole")["mask_image"] == 1).all()
    result = result_of(capsys, edit("--mask", "mask.png", "--soft-mask"))  # which alone keeps soft values
    np.testing.assert_allclose(arguments("whole")["mask_image"], 0.6)
    assert "mask_threshold" not in result  # nothing was computed with it
    for size in (117, 91), (112, 88), (14, 11):  # those that the reference takes
        for value, words in (0, "mask is empty"), (255, "covers the whole"):
            PIL.Image.new("L", size, value).save("mask.png")
            assert words in ran(capsys, edit("--mask", "mask.png", "--reference"))[1]
            assert stages() == ["load", "invert", "edit"]
            mask = arguments("edit")["mask_image"]
            assert mask.shape == (1, 11, 14) and (mask == value / 255).all()


def test_a_mask_combined_with_the_computed_one(work, capsys):
    drawn = np.zeros((91, 117), np.uint8)
    drawn[:, 80:] = 255
    PIL.Image.fromarray(drawn).save("mask.png")
    both = ["--mask", "mask.png", "--mask-combine", "union"]
    result = result_of(capsys, edit(*both, "--mask-smoothing", "1"))
    assert arguments("whole")["mask_combination"] == "union" and arguments("whole")["mask_image"].sum() > 0
    assert (result["mask_combine"], result["mask_smoothing"], result["mask_share"] > 0.7) == ("union", 1.0, True)
    ran(capsys, [*MASK, *both])
    assert stages() == ["load", "mask"]
    written = levels("m.png")
    assert (written[:, :58] == 255).all() and (written[:, 84:] == 255).all() and not written[:, 59:75].any()


def test_overlays_and_grids(work, capsys):
    ran(capsys, edit("--overlay", "over.png"))
    over, original = (levels(name).astype(int) for name in ("over.png", "p.png"))
    np.testing.assert_array_equal(over[:, 60:], original[:, 60:])
    assert (over[:, :57, 0] >= original[:, :57, 0]).all() and not np.array_equal(over[:, :57], original[:, :57])
    ran(capsys, edit("--reference", "--overlay", "again.png", "--grid", "grid.png"))
    np.testing.assert_array_equal(levels("again.png"), over)
    grid = levels("grid.png")
    third = grid.shape[1] // 3
    flat = (np.abs(grid.astype(int) - FLAT).sum(-1) < 5).mean(0)
    assert third > 117 and flat[2 * third + 20 : -20].min() > 0.5 and flat[: 2 * third - 20].max() < 0.1


def test_a_strip_watches_the_edit(work, capsys, monkeypatch):
    watched = []

    @contextlib.contextmanager
    def strip(pipe, path, **how):
        watched.extend([(type(pipe), path, how), stages()])
        yield
        watched.append(stages())

    monkeypatch.setattr("mindiffedit.images.strips.AnimatedStrip", strip)
    for more in [], ["--reference"]:
        watched.clear()
        ran(capsys, edit("--strip", "strip.gif", *more))
        assert watched[0] == (FakePipeline, "strip.gif", {"every": 2})  # 40 steps that run, about 20 frames
        assert watched[1] == ["load"] and len(watched[2]) > 1


# --- models beside the model -----------------------------------------------------------------------


def weights(name):
    save_file({"w": np.zeros(1, np.float32)}, name)
    return name


def test_loras(work, capsys):
    names = [weights(name) for name in ("a.safetensors", "b=2.safetensors", "c.safetensors")]
    given = zip(names, ("=0.5", "", "=-1"))
    result = result_of(capsys, edit(*sum((["--lora", name + weight] for name, weight in given), [])))
    assert stages() == ["load", "lora", "lora", "lora", "adapters", "whole"]
    loras = [call[1] for call in FakePipeline.calls if call[0] == "lora"]
    assert [lora["path"] for lora in loras] == names
    assert arguments("adapters") == dict(zip([lora["adapter_name"] for lora in loras], [0.5, 1.0, -1.0]))
    assert result["loras"][0] == {"file": "a.safetensors", "weight": 0.5}


def embedding(name, key="emb_params", **more):
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    save_file({key: np.ones((2, 32), np.float32), **more}, name)
    return name


def test_words_of_embeddings(work, capsys):
    """The file's word, or its name where it says none, or the one that is given."""
    cases = {
        embedding("bad hands v1.2.safetensors"): ("bad hands v1.2.safetensors", "bad hands v1.2"),
        embedding("toy.safetensors", "<cat-toy>"): ("toy.safetensors", "<cat-toy>"),
        embedding("xl.safetensors", "clip_l"): ("xl.safetensors", "xl"),
        embedding("a=b.safetensors"): ("a=b.safetensors", "a=b"),
        embedding("c.SAFETENSORS") + "=d=e": ("c.SAFETENSORS", "d=e"),
        embedding("other/toy.safetensors", "<cat-toy>") + "=<again> x": ("other/toy.safetensors", "<again> x"),
    }
    prompt = ", ".join(word for _, word in cases.values())
    line, err = ran(capsys, edit(*sum((["--embedding", text] for text in cases), []), "--negative", prompt, "--json"))
    loaded = [(call[1]["path"], call[1]["token"]) for call in FakePipeline.calls if call[0] == "embedding"]
    assert loaded == list(cases.values()) and "--embedding" not in err
    assert json.loads(line)["embeddings"][1] == {"file": "toy.safetensors", "word": "<cat-toy>"}
    assert stages()[:2] == ["load", "embedding"]
    xl = embedding("XL2.safetensors", "clip_l", clip_g=np.ones((2, 48), np.float32))
    refused(capsys, edit("--embedding", xl), "XL2.safetensors", "Stable Diffusion XL")
    refused(capsys, edit("--embedding", weights("lora.safetensors") + "="), "no word after the '='")
    same = ["--embedding", "toy.safetensors", "--embedding", "other/toy.safetensors"]
    refused(capsys, edit(*same), "same word '<cat-toy>'", "FILE=WORD")
    refused(capsys, edit("--embedding", "no.safetensors=word"), "--embedding no.safetensors: there is no such file")


def test_words_that_were_meant_are_not_ignored_in_silence(work, capsys):
    bad = ["--embedding", embedding("badhand.safetensors")]
    both = [*bad, "--embedding", embedding("badhand4.safetensors")]
    toy = ["--embedding", embedding("my-toy.safetensors", "<toy>")]
    for more, negative, *words in (
        (bad, "a (badhand:1.2)"),
        (both, "badhand4, badhand"),
        (both, "badhand4", "'badhand'", "badhand.safetensors", "in no prompt"),
        (bad, "ugly, BadHand", "'BadHand'", "'badhand'"),
        (toy, "my-toy", "'my-toy' is, which has to be written '<toy>'"),
        ([], "a <cat-toy> <|endoftext|>", "<cat-toy>", "--embedding FILE"),
        ([], "apple <lora:more detail:0.8>", "<lora:more detail:0.8>", "--lora FILE"),
        ([], "a < b > c <3"),
        ([*bad, "--quiet"], "none"),
    ):
        _, err = ran(capsys, edit(*more, "--negative", negative))
        notes = [line for line in err.splitlines() if "--embedding" in line or "--lora" in line]
        assert len(notes) == bool(words) and all(word in notes[0] for word in words), (negative, notes)


def test_a_model_that_is_one_file(work, capsys):
    argv = edit("--model", weights("sd.safetensors"), "--config", "model", "--no-safety-checker")
    _, err = ran(capsys, argv)
    stage, path, kwargs = FakePipeline.calls[0]
    assert (stage, path, kwargs["config"], kwargs["safety_checker"]) == ("load", "sd.safetensors", "model", None)
    assert arguments("whole")["working_size"] == (112, 88)  # fitted to what the loaded components say
    assert "117 x 91" in err
    for more in (["--config", "missing/folder/of/config"], ["--variant", "fp16"], ["--revision", "main"]):
        refused(capsys, [*argv, *more], more[0])


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
    prompts = "mindiffedit.text.prompts"
    monkeypatch.setattr(f"{prompts}.Captioner", Captioner)
    monkeypatch.setattr(f"{prompts}.PromptGenerator", PromptGenerator)
    monkeypatch.setattr(f"{prompts}.average_embeddings", lambda pipe, texts: ("mean", type(pipe), tuple(texts)))
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
    ran(capsys, edit(*words, "--reference"))
    assert arguments("mask")["target_prompt_embeds"] == means[1]
    assert arguments("invert")["prompt_embeds"] == means[0]
    assert (arguments("edit")["prompt_embeds"], arguments("edit")["negative_prompt_embeds"]) == (means[1], means[0])
    ran(capsys, [*MASK, *words])
    assert arguments("mask")["source_prompt_embeds"] == means[0]


def test_captions(work, capsys, writers):
    FakePipeline.breaks["load"] = lambda: writers.append(("load", ""))
    line, err = ran(capsys, edit("--caption-model", "maker/blip", "--json"))
    # Before the large model is loaded.
    assert [entry[:2] for entry in writers] == [("Captioner", "maker/blip"), ("caption", (117, 91)), ("load", "")]
    asked = arguments("whole")
    assert (asked["inversion_prompt"], asked["source_prompt"]) == ("a red apple", SOURCE)
    assert "note: the picture's caption: a red apple" in err and json.loads(line)["caption"] == "a red apple"

    model = ["--caption-model", "maker/blip", "--model", "model", "-o"]
    bare = ["p.png", "--target", TARGET, *model]
    result = result_of(capsys, ["edit", *bare, "out.png"])
    assert arguments("whole")["source_prompt"] == "a red apple" == result["source"]
    ran(capsys, ["mask", *bare, "m.png"])
    assert arguments("mask")["source_prompt"] == "a red apple"
    ran(capsys, ["invert", "p.png", *model, "l.safetensors"])
    assert arguments("invert")["prompt"] == "a red apple" == read_latents("l.safetensors")[2]["prompt"]


# --- edit by the reference's calls -----------------------------------------------------------------


def test_the_reference_s_edit_is_the_three_stages_of_the_guide(work, capsys):
    line, _ = ran(capsys, edit("--reference", "--seed", "5", "--steps", "10", "--strength", "0.7", "--guidance", "3"))
    assert stages() == ["load", "mask", "invert", "edit"]
    _, path, kwargs = FakePipeline.calls[0]
    assert path == "model" and kwargs["mode"] == "graph" and "safety_checker" not in kwargs
    mask, invert, change = arguments("mask"), arguments("invert"), arguments("edit")
    image = mask.pop("image")
    assert image.size == (112, 88) and invert.pop("image") is image
    shared = dict(num_inference_steps=10, guidance_scale=3.0, generator=5)
    assert mask == dict(
        target_prompt=TARGET, source_prompt=SOURCE, num_maps_per_mask=10, mask_encode_strength=0.5,
        mask_thresholding_ratio=3.0, output_type="np", return_map=True, **shared,
    )  # fmt: skip
    assert invert == dict(prompt=SOURCE, inpaint_strength=0.7, negative_prompt=None, **shared)
    assert change.pop("mask_image").shape == (1, 11, 14)
    latents = change.pop("image_latents")
    assert latents.shape == (1, 7, 4, 11, 14) and latents.dtype == np.float32
    assert change == dict(prompt=TARGET, negative_prompt=SOURCE, inpaint_strength=0.7, output_type="pil", **shared)
    assert sorted(os.listdir()) == ["model", "out.png", "p.png"]
    assert levels("out.png").shape == (91, 117, 3) and levels("out.png")[40, 40].tolist() == [*FLAT]
    assert line.startswith("out.png: 117 x 91, 50% ") and "seed 5" in line


def test_defaults_are_the_reference_s_and_the_demo_model_has_its_own(work, capsys, monkeypatch):
    ran(capsys, edit("--reference"))
    assert arguments("invert")["num_inference_steps"] == 50
    assert (arguments("mask")["num_maps_per_mask"], arguments("edit")["inpaint_strength"]) == (10, 0.8)
    settings = dict(steps=12, strength=0.5, guidance=2.0, maps=3, mask_strength=0.4, mask_threshold=2.5)
    monkeypatch.setattr(demo, "SETTINGS", dict(settings, invert_guidance=1.0))
    ran(capsys, edit("--model", "demo", "--maps", "4", "--reference"))
    assert arguments("load") == str(work / "model")
    mask, invert, change = arguments("mask"), arguments("invert"), arguments("edit")
    assert (mask["num_inference_steps"], mask["num_maps_per_mask"]) == (12, 4)
    assert (mask["mask_encode_strength"], mask["mask_thresholding_ratio"]) == (0.4, 2.5)
    assert (invert["guidance_scale"], change["guidance_scale"]) == (1.0, 2.0)
    assert invert["inpaint_strength"] == change["inpaint_strength"] == 0.5


def test_json_is_one_object_with_the_reference_s_whole_story(work, capsys):
    line, err = ran(capsys, edit("--reference", "--json", "--grid", "grid.png", "--negative", "", "--invert-guidance",
                                 "1", "--device", "cpu", "--mode", "pynative", "--dtype", "float16"))  # fmt: skip
    expected = dict(
        command="edit", output="out.png", grid="grid.png", picture="p.png", width=117, height=91, working_width=112,
        working_height=88, source=SOURCE, target=TARGET, negative="", seed=0, steps=50, strength=0.8, guidance=7.5,
        invert_guidance=1.0, maps=10, mask_strength=0.5, mask_threshold=3.0, mask_share=0.5, device="CPU",
        mode="pynative", scheduler="ddim", model=str(work / "model"), safety_checker_flagged=None, reference=True,
    )  # fmt: skip
    result = json.loads(line)
    assert {name: result[name] for name in expected} == expected and "a stage prints" in err
    assert set(result["seconds"]) == {"load", "mask", "invert", "edit"}
    assert arguments("edit")["negative_prompt"] == "" and arguments("invert")["guidance_scale"] == 1.0
    kwargs = FakePipeline.calls[0][2]
    assert (kwargs["mode"], kwargs["mindspore_dtype"]) == ("pynative", "float16")


def test_quiet_says_nothing_but_the_result(work, capsys):
    for quiet in [], ["--quiet"]:
        _, err = ran(capsys, edit(*quiet))
        assert ("note" not in err) == bool(quiet)
        bars = [call[1] for call in FakePipeline.calls if call[0] == "bar"]
        assert [bar["desc"] for bar in bars] == ["mask", "invert", "edit"]
        assert all(bar["disable"] == bool(quiet) and bar["file"] is not sys.stdout for bar in bars)


def test_advice_of_libraries_is_off_in_the_program(monkeypatch):
    names = ("GLOG_v", "TRANSFORMERS_NO_ADVISORY_WARNINGS", "DIFFUSERS_NO_ADVISORY_WARNINGS")
    environment = {"GLOG_v": "1"}  # the user wants to see it
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(__main__, "main", lambda: [environment[name] for name in names])
    monkeypatch.setattr(__main__, "_end", lambda code: code)  # of this process
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:])
    assert __main__.program() == ["1", "1", "1"]
    environment.clear()
    assert __main__.program() == ["3", "1", "1"]


@pytest.fixture
def solver(work, capsys, monkeypatch):
    """The solver of a command and its notes, for a model with a scheduler of a class, or the line that refuses it."""

    def of(class_name, name, config, *more):
        scheduler = scheduler_of(class_name, name, {"beta_start": 0.2, **config})
        monkeypatch.setattr(FakePipeline, "own_scheduler", scheduler)
        FakePipeline.calls.clear()
        code = cli.main(edit("--json", *more))
        out, err = capsys.readouterr()
        if code == 2:
            assert stages() == ["load"]  # before a model runs
            return err.splitlines()[-1]
        pipe = next(call[2] for call in FakePipeline.calls if call[0] in ("whole", "edit"))
        chosen = json.loads(out)["scheduler"]
        assert (pipe.scheduler.name, pipe.inverse_scheduler.name) == (chosen, f"inverse {chosen}")
        as_there = pipe.scheduler.config == scheduler.config
        return chosen, as_there, [line for line in err.splitlines() if "scheduler" in line]

    return of


DDIM, DPM = ("DDIMScheduler", "ddim"), ("DPMSolverMultistepScheduler", "dpm")


def test_the_scheduler_has_an_inverse(solver):
    """Of every class, and of every solver that cannot be inverted: tests/test_solvers.py."""
    assert solver(*DDIM, {}) == ("ddim", True, [])
    assert solver(*DPM, {}) == ("dpm", True, [])
    assert solver(*DPM, {}, "--scheduler", "ddim") == ("ddim", False, [])
    other = "UniPCMultistepScheduler"
    name, as_there, (note,) = solver(other, None, {"timestep_spacing": "linspace"})
    assert (name, as_there) == ("ddim", False) and all(word in note for word in (other, "'leading'", "--scheduler"))
    assert solver(other, None, {}, "--scheduler", "dpm") == ("dpm", False, [])
    # As diffusers has it.
    name, as_there, (note,) = solver("PNDMScheduler", None, {}, "--reference")
    assert (name, as_there) == ("ddim", True) and "spaced" not in note
    # Refused where it is asked for; the advice helps, and so does an edit that inverts nothing.
    for config, more in ({"thresholding": True}, ["--scheduler", "dpm"]), ({}, ["--iterations", "2"]):
        refusal = solver(*DPM, config, *more)
        assert DPM[0] in refusal and refusal.endswith("; give --scheduler ddim.")
        assert solver(*DPM, config, *more, "--scheduler", "ddim")[0] == "ddim"
    assert solver(*DPM, {"thresholding": True}, "--scheduler", "dpm", "--inversion", "noise")[0] == "dpm"


def test_large_and_small_pictures(work, capsys):
    """The model of these tests was made for 128 x 128."""
    PIL.Image.open("p.png").resize((1200, 800)).save("large.png")
    _, err = ran(capsys, edit(picture="large.png"))
    width, height = arguments("whole")["working_size"]
    assert 0.7 * 1.5 < width * height / (16 * 8) ** 2 <= 1.5
    assert abs(width / height - 1.5) < 0.1 and "1200 x 800" in err
    assert PIL.Image.open("out.png").size == (1200, 800)
    ran(capsys, edit("--size", "300", picture="large.png"))
    width, height = arguments("whole")["working_size"]
    assert 0.9 < width * height / 300**2 <= 1

    PIL.Image.open("p.png").resize((64, 48)).save("small.png")
    _, err = ran(capsys, edit(picture="small.png"))
    assert "64 x 48" in err and "far below what it was made for" in err
    width, height = map(int, re.search(r"enlarge the picture first, to about (\d+) x (\d+)", err).groups())
    PIL.Image.open("small.png").resize((width, height)).save("larger.png")
    assert "far below" not in ran(capsys, edit(picture="larger.png"))[1]
    assert "far below" not in ran(capsys, edit("--size", "64", picture="small.png"))[1]  # as was asked for


# --- mask, invert, latents -------------------------------------------------------------------------


def test_mask_writes_white_where_the_picture_changes(work, capsys):
    line, _ = ran(capsys, [*MASK, "--maps", "2", "--mask-strength", "0.3", "--mask-threshold", "2"])
    assert stages() == ["load", "mask"]
    asked = arguments("mask")
    assert (asked["num_maps_per_mask"], asked["mask_encode_strength"]) == (2, 0.3)
    assert asked["mask_thresholding_ratio"] == 2
    mask = levels("m.png")
    assert mask.shape == (91, 117) and set(np.unique(mask)) == {0, 255}
    assert (mask[:, :58] == 255).all() and (mask[:, 59:] == 0).all()
    assert line.startswith("m.png: 117 x 91, 50% white")
    assert (asked["per_image_clamp"], asked["corrected_guidance"], asked["outlier_quantile"]) == (True, True, 0.99)
    assert asked["mask_options"] == EDIT_MASK

    result = result_of(capsys, [*MASK, "--reference"])
    asked = dict(arguments("mask"))
    assert asked.pop("image").size == (112, 88)
    assert asked == dict(
        target_prompt=TARGET, source_prompt=SOURCE, num_maps_per_mask=10, mask_encode_strength=0.5,
        mask_thresholding_ratio=3.0, num_inference_steps=50, guidance_scale=7.5, generator=0, output_type="np",
        return_map=True,
    )  # fmt: skip
    assert not {"outliers", "mask_level", "sweep"} & set(result)


def test_mask_options_overlay_and_map(work, capsys):
    result = result_of(capsys, [*MASK, "--mask-dilation", "2", "--outliers", "none", "--overlay", "over.png", "--map",
                                "map.png", "--mask-threshold", "2"])  # fmt: skip
    asked = arguments("mask")
    assert asked["mask_options"] == dataclasses.replace(EDIT_MASK, dilation=2) and asked["outlier_quantile"] is None
    map_ = levels("map.png")
    assert map_.shape == (91, 117)
    # 0.5 and 1.5, with a mean of 1 and so a clamp of 2.
    assert set(np.unique(map_)) == {round(255 / 4), round(255 * 3 / 4)} and map_[0, 0] == round(255 * 3 / 4)
    assert PIL.Image.open("over.png").size == (117, 91)
    assert (result["mask_dilation"], result["outliers"], result["map"]) == (2, None, "map.png")


def test_invert_writes_what_edit_reads(work, capsys):
    line = invert(capsys, "--steps", "10", "--strength", "0.6", "--guidance", "2", "--seed", "9", "--scheduler", "dpm",
                  "--negative", "blurred")  # fmt: skip
    assert "1 x 6 x 4 x 11 x 14" in line and "seed 9" in line
    asked = arguments("invert")
    assert (asked["guidance_scale"], asked["negative_prompt"], asked["generator"]) == (2.0, "blurred", 9)
    latents, clean, recipe = read_latents("l.safetensors")
    assert (recipe["prompt"], recipe["negative_prompt"], recipe["working_size"]) == (SOURCE, "blurred", (112, 88))
    assert (recipe["steps"], recipe["strength"], recipe["scheduler"], recipe["seed"]) == (10, 0.6, "dpm", 9)

    result = result_of(capsys, edit_with_latents())
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
    assert change["working_size"] == (112, 88) and "invert_guidance" not in result
    assert result["scheduler"] == "dpm"

    assert result_of(capsys, edit_with_latents("--reference"))["scheduler"] == "dpm"
    assert stages() == ["load", "mask", "edit"]
    change = arguments("edit")
    np.testing.assert_array_equal(change["image_latents"], latents)
    assert change["guidance_scale"] == 7.5 and change["negative_prompt"] == SOURCE
    assert arguments("mask")["source_prompt"] == SOURCE and arguments("mask")["image"].size == (112, 88)


def test_every_seed_of_torch_is_taken_and_kept(work, capsys):
    for seed in -9, -(2**63), 2**64 - 1:
        assert f"seed {seed}" in invert(capsys, "--seed", str(seed))
        assert arguments("invert")["generator"] == seed == read_latents("l.safetensors")[2]["seed"]


def test_invert_inverts_as_edit_does(work, capsys, monkeypatch):
    invert(capsys, "--iterations", "2")
    asked = arguments("invert")
    assert (asked["guidance_scale"], asked["inversion_iterations"]) == (1.0, 2)
    invert(capsys, "--reference")
    asked = arguments("invert")
    assert asked["guidance_scale"] == 7.5 and "inversion_iterations" not in asked
    for settings in ("SETTINGS", "EDIT_SETTINGS"):
        monkeypatch.setattr(demo, settings, dict(demo.SETTINGS, guidance=4.0, invert_guidance=0.5))
    for more, guidance in ((), 0.5), (("--reference",), 4.0):
        invert(capsys, *more, "--model", "demo")
        assert arguments("invert")["guidance_scale"] == guidance


def test_latents_belong_to_a_size_and_to_pixels(work, capsys):
    invert(capsys, "--size", "64")
    *_, recipe = read_latents("l.safetensors")
    assert recipe["working_size"] != (112, 88)
    ran(capsys, edit_with_latents())
    assert arguments("whole")["working_size"] == recipe["working_size"]
    refused(capsys, edit_with_latents("--size", "64"), "--size")
    PIL.Image.open("p.png").save("again.bmp")
    ran(capsys, ["edit", "again.bmp", *edit_with_latents()[2:]])  # the same pixels, so the same picture


def test_latents_that_do_not_belong(work, capsys):
    invert(capsys, "--steps", "10", "--strength", "0.6")
    write_model(work / "vast", levels=6)
    for more, *words in (
        (["--steps", "11"], "--steps 10", "11"),
        (["--strength", "0.7"], "--strength 0.6", "0.7"),
        (["--scheduler", "dpm"], "--scheduler ddim"),
        (["--latents", "no.safetensors"], "no latents file"),
        (["--model", "demo"], "made with the model"),
        (["--model", "vast"], "pixels per latent"),
    ):
        refused(capsys, edit_with_latents(*more), *words)
    PIL.Image.new("RGB", (117, 91)).save("p.png")
    refused(capsys, edit_with_latents(), "another picture", "117x91")


def rewrite(metadata, change=lambda tensors: {}, without=None):
    """Write l.safetensors again with other metadata or tensors, or without one of either."""
    with safe_open("l.safetensors", "numpy") as file:
        before, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    parts = {**tensors, **change(tensors)}, {**before, **metadata}
    tensors, metadata = ({name: value for name, value in part.items() if name != without} for part in parts)
    save_file({name: value.copy() for name, value in tensors.items()}, "l.safetensors", metadata)


def test_damaged_latents(work, capsys):
    invert(capsys, "--steps", "10", "--strength", "0.6")
    whole, (latents, _, _) = (work / "l.safetensors").read_bytes(), read_latents("l.safetensors")
    for metadata, words in (
        (dict(format="other"), "not written by"),
        (dict(format_version="3"), "version 3"),
        (dict(steps="ten"), "damaged"),
        (dict(strength="nan"), "damaged"),
        (dict(strength="0.0"), "strength"),
        (dict(steps="20"), "expected (1, 12,"),
        (dict(scheduler="euler"), "euler"),
        (dict(working_size="112"), "damaged"),
        (dict(working_size="104x88"), "(4, 11, 13)"),
    ):
        (work / "l.safetensors").write_bytes(whole)
        rewrite(metadata)
        refused(capsys, edit_with_latents(), words)
    for name, change, words in (
        ("picture_sha256", None, "picture_sha256"),
        ("image_latents", None, "not written by"),
        ("clean_latents", None, "no clean latents"),
        ("image_latents", lambda t: t.astype(np.float64), "float64"),
        ("clean_latents", lambda t: t.astype(np.float64), "float64"),
        ("image_latents", lambda t: t[:, :5], "(1, 5, 4, 11, 14)"),
        ("image_latents", lambda t: t[0], "(6, 4, 11, 14)"),
        ("image_latents", lambda t: np.concatenate([t] * 2), "(2, 6, 4, 11, 14)"),
        ("clean_latents", lambda t: t[..., :13], "(1, 4, 11, 13)"),
        ("image_latents", lambda t: t * np.float32("nan"), "NaN"),
        ("clean_latents", lambda t: t * np.float32("nan"), "NaN"),
    ):
        (work / "l.safetensors").write_bytes(whole)
        if change is None:
            rewrite({}, without=name)
        else:
            rewrite({}, lambda tensors, name=name, change=change: {name: change(tensors[name])})
        refused(capsys, edit_with_latents(), words)
    for data in (b"", b"text " * 100, whole[: len(whole) // 2], whole[:-1]):
        (work / "l.safetensors").write_bytes(data)
        refused(capsys, edit_with_latents(), "not a whole safetensors file")
    # Those of the version before serve the reference.
    (work / "l.safetensors").write_bytes(whole)
    rewrite({"format_version": "1"}, without="clean_latents")
    refused(capsys, edit_with_latents(), "older version")
    ran(capsys, edit_with_latents("--reference"))
    np.testing.assert_array_equal(arguments("edit")["image_latents"], latents)


def test_inverted_nan_is_not_written(work, capsys, monkeypatch):
    latents, clean = np.full((1, 40, 4, 11, 14), np.nan, np.float32), np.zeros((1, 4, 11, 14), np.float32)
    nan = DiffEditInversionPipelineOutput(latents, clean_latents=clean)
    monkeypatch.setattr(FakePipeline, "invert", lambda self, **_: nan)
    assert cli.main(INVERT) == 2 and "inversion" in capsys.readouterr().err
    assert not os.path.exists("l.safetensors")


# --- demo -----------------------------------------------------------------------------------------


def test_demo_writes_four_pictures(work, capsys):
    line, _ = ran(capsys, ["demo", "-o", "a/b"])
    assert sorted(os.listdir("a/b")) == ["edit.png", "edited.png", "mask.png", "original.png"]
    assert line.startswith(os.path.join("a", "b", "edit.png"))
    np.testing.assert_array_equal(levels("a/b/original.png"), levels("p.png"))
    assert set(np.unique(levels("a/b/mask.png"))) == {0, 255} and (levels("a/b/edited.png")[:, :58] == FLAT).all()
    asked = arguments("whole")
    assert {name: asked[f"{name}_prompt"] for name in ("source", "target")} == demo.SAMPLE_PROMPTS
    assert asked["num_inference_steps"] == demo.EDIT_SETTINGS["steps"]
    assert asked["inversion_guidance_scale"] == demo.EDIT_SETTINGS["invert_guidance"]
    # Again, over the first.
    ran(capsys, ["demo", "-o", "a/b", "--json", "--reference"])
    assert stages() == ["load", "mask", "invert", "edit"]
    assert arguments("edit")["num_inference_steps"] == demo.SETTINGS["steps"]

    refused(capsys, ["demo", "-o", ""], "--output is empty")
    refused(capsys, ["demo", "-o", "p.png"], "is a file")
    refused(capsys, ["demo", "-o", "p.png/sub"], "cannot be made")


def test_an_incomplete_installation_is_said(work, capsys, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(work)
    monkeypatch.setattr(demo, "_HERE", work / "nowhere")
    assert cli.main(["demo", "-o", "d"]) == 1
    assert re.fullmatch(r"mindiffedit: failed: .*missing from this installation.*\n", capsys.readouterr().err)


# --- bad input: one sentence, 2, before anything is loaded -----------------------------------------


NAMED = """
--steps 0 | --steps 1.5 | --strength 1.1 | --strength nan | --guidance -1 | --guidance inf | --invert-guidance -1
--maps 0 | --maps x | --mask-strength 0 | --mask-strength -0.1 | --mask-threshold 0 | --size 0
--seed -9223372036854775809 | --seed 18446744073709551616 | --seed 1.0 | --mode fast | --dtype int8
--scheduler euler | --unknown | --stren 0.5 | --revision main | --outliers some | --outliers 0 | --outliers nan
--mask-level 1 | --mask-smoothing -1 | --mask-smoothing inf | --mask-edges -1 | --edge-contrast 0 | --mask-erosion -1
--mask-dilation 1.5 | --smallest-region -2 | --iterations -1 | --feather -1 | --inversion other | --mask-combine xor
--variant fp16 --model demo | --config model
"""
"""Refused by a sentence that names the option."""

SAID = """
--steps 1001 | 1000 || --strength 0 | leaves no step || --device TPU | TPU || -o out.xyz | out.xyz
-o nowhere/out.png | nowhere || -o model | folder || -o p.png | overwrite || --grid grid.txt | grid.txt
--grid out.png | same file || --mask missing.png | missing.png || --mask model/model_index.json | not a picture
--model missing-folder | no such folder || --model ./missing/folder | no such folder || --model p.png | is a file
--model missing.safetensors | no such file || --iterations 101 | 100 || --strip strip.jpg | .gif
--overlay out.png | same file || --sweep sheet.txt | sheet.txt || --sweep p.png | overwrite
--lora missing.safetensors | --lora missing.safetensors: there is no such file || --lora p.png | only .safetensors
--lora a.safetensors=x | finite number || --lora a.safetensors=nan | finite number
--lora a.safetensors= | finite number || --lora missing.safetensors=0.5 | --lora missing.safetensors: there is no
--embedding e.bin | only .safetensors || --embedding e.safetensors | no such file
--prompt-model missing | --prompt-model missing: there is no such || --caption-model p.png | p.png is a file
"""


def test_bad_options(work, capsys):
    for row in NAMED.strip().replace("\n", " | ").split(" | "):
        refused(capsys, edit(*row.split()), row.split()[0])
    for row in SAID.strip().replace("\n", " || ").split(" || "):
        given, words = row.split(" | ")
        refused(capsys, edit(*given.split()), words)
    for option, value, words in (
        ("--target", "  ", "--target is empty"),
        ("--target", SOURCE, "same text"),
        ("--target", "\udcff", "UTF-8"),
        ("--caption", "\udcff", "--caption"),
        ("-o", "", "--output is empty"),
        ("--lora", "", "--lora is empty"),
        ("--lora", "x" * 5000, "too long"),
        ("--mask", "a\0b", "zero character"),
    ):
        refused(capsys, edit(option, value), words)
    refused(capsys, edit("--prompt-model", "model", "--source", " "), "--source is empty")
    refused(capsys, edit(picture=""), "PICTURE is empty")
    PIL.Image.new("L", (117, 91), 255).save("mask.png")
    ran(capsys, edit("--target", SOURCE, "--mask", "mask.png"))  # no mask is computed of the two texts


CORRECTIONS = """
--mask-smoothing 1 | --mask-dilation 1 | --mask-erosion 1 | --fill-holes | --no-fill-holes | --no-soft-mask
--mask-edges 2 | --edge-contrast 0.1 | --smallest-region 2 | --mask-level 0.4 | --soft-mask | --outliers none
--inversion noise | --iterations 0 | --no-paste-back | --feather 2 | --caption text | --sweep sheet.png
"""


def test_the_reference_knows_no_corrections(work, capsys):
    for text in CORRECTIONS.strip().replace("\n", " | ").split(" | "):
        more = text.split()
        refused(capsys, edit("--reference", *more), "--reference", more[0])
        if more[0] != "--sweep":
            refused(capsys, ["demo", "-o", "d", "--reference", *more], "--reference", more[0])


NOISE, LATENTS, DRAWN = "--inversion noise", "--latents l.safetensors", "--mask p.png"
CONTRADICTIONS = f"""
{NOISE} {LATENTS} || {NOISE} --iterations 2 || {NOISE} --invert-guidance 2 || {NOISE} --caption a
{LATENTS} --inversion ddim || {LATENTS} --iterations 1 || {LATENTS} --invert-guidance 2
{LATENTS} --caption-model model || {LATENTS} --sweep s.png --sweep-strengths 0.5 || --mask-combine union
{DRAWN} --mask-smoothing 1 || {DRAWN} --maps 2 || {DRAWN} --mask-strength 0.5 || --guidance 1 --negative blurred
--no-paste-back --feather 3 || --caption a --caption-model model || --scheduler dpm --iterations 1
"""
"""Refused by a sentence that names every option."""


def test_contradictions(work, capsys):
    for row in CONTRADICTIONS.strip().replace("\n", " || ").split(" || "):
        refused(capsys, edit(*row.split()), *(word for word in row.split() if word.startswith("--")))
    for row in (
        f"{NOISE} --caption-model model | --caption-model | --source",
        f"{LATENTS} --invert-guidance 2 --reference | --latents | --invert-guidance",
        f"{DRAWN} --mask-combine replace --outliers 0.9 | --outliers",
        f"{DRAWN} --mask-threshold 2 --reference | --mask-threshold | leave it out.",
        "--reference --caption-model model | --caption-model | --source",
        "--sweep-guidances 1,2 | --sweep-guidances | by --sweep.",
        "--sweep s.png --sweep-guidances 1,two | --sweep-guidances | 'two'",
        "--sweep s.png --sweep-strengths 0.5,2 | --sweep-strengths | [0.0, 1.0]",
        "--sweep s.png --sweep-strengths 0.01 | --sweep-strengths | no step",
        "--sweep s.png --sweep-strengths= | --sweep-strengths",
    ):
        given, *words = row.split(" | ")
        refused(capsys, edit(*given.split()), *words)
    mask, (drawn, bare) = MASK[:-2], (DRAWN.split(), ["p.png", "--target", TARGET, "--model", "model"])
    for argv, *words in (
        ([*MASK, *drawn], "--mask-combine"),
        ([*MASK, *drawn, "--reference"], "leave --mask or --reference out"),
        ([*MASK, "--caption-model", "model"], "--source does already"),
        ([*mask, "--sweep", "s.png", "--map", "map.png"], "--map", "-o"),
        (mask, "--output", "--sweep"),
        ([*mask, "--sweep", "s.png", "--sweep-thresholds", "0,1"], "--sweep-thresholds"),
        ([*mask, "-o", "mask.jpg"], "mask.jpg"),
        (["edit", "p.png", *TEXTS, "--sweep", "s.png", "--grid", "grid.png"], "--grid", "-o"),
        (["edit", *bare, "--prompt-model", "model", "--caption-model", "model", "-o", "out.png"], "--prompt-model"),
        (["edit", *bare, "-o", "out.png"], "--source"),
        (["mask", *bare, "-o", "out.png"], "--source"),
        (["invert", "p.png", "-o", "out.safetensors", "--model", "model"], "--source"),
        ([*INVERT, "-o", "l.npz"], "safetensors"),
        ([*INVERT, "--reference", "--iterations", "1"], "--reference", "--iterations"),
        ([*INVERT, "--source", ""], "--source is empty"),
    ):
        refused(capsys, argv, *words)
    (work / "lora.safetensors").touch()
    for lora in ("lora.safetensors", "lora.safetensors=0.5"):
        refused(capsys, [*INVERT, "--lora", lora, "-o", "lora.safetensors"], "overwrite --lora lora.safetensors")


def test_bad_pictures(work, capsys):
    """One of each kind: tests/test_pictures.py has them all."""
    PIL.Image.new("RGB", (7, 50)).save("small.png")
    open("text.png", "w").write("hello")
    for name, words in (
        ("missing.png", "there is no picture"),
        ("small.png", "too small"),
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
    """One of them: tests/test_survey.py has them all."""
    write_model(work / "bad")
    (work / "bad" / WEIGHTS[0]).rename(work / "bad" / "unet" / "model.bin")
    refused(capsys, edit("--model", "bad"), "only pickle weights", "unet")
    # A safety checker that is not wanted is not looked at.
    index = json.loads((work / "model" / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (work / "model" / "model_index.json").write_text(json.dumps(index))
    refused(capsys, edit(), "safety_checker/config.json is missing")
    ran(capsys, edit("--no-safety-checker"))


def test_the_cheapest_is_looked_at_first(work, capsys):
    """Everything is wrong; each repair uncovers the next dearer fault."""
    PIL.Image.new("L", (3, 3)).save("mask3.png")
    argv = ["edit", "no-picture.png", "--source", SOURCE, "--reference", "--steps", "0", "--target", "",
            "-o", "nowhere/out.png", "--mask", "no-mask.png", "--model", "missing"]  # fmt: skip
    for name, value, fault in (
        (None, None, "--steps"),
        ("--steps", "10", "--target"),
        ("--target", TARGET, "nowhere"),
        ("-o", "out.png", "no-picture.png"),
        ("edit", "p.png", "no-mask.png"),
        ("--mask", "mask3.png", "no such folder"),
        ("--model", "model", "3 x 3"),
    ):
        if name:
            argv[argv.index(name) + 1] = value
        refused(capsys, argv, fault)


def test_an_absent_device_is_an_error(work, capsys, monkeypatch):
    def absent(name):
        raise RuntimeError(f"device {name} was asked for\nand is not here")

    monkeypatch.setattr("mindiffedit.runtime.devices.require_device", absent)
    refused(capsys, edit("--device", "ascend"), "device Ascend was asked for and is not here")


# --- failures on the way --------------------------------------------------------------------------


def test_failures_leave_no_file(work, capsys):
    def raising(error):
        return Mock(side_effect=error)

    for stage in ("load", "mask", "invert", "edit", "whole"):
        more = ["--overlay", "over.png"] if stage == "whole" else ["--reference"]
        for failure, code, words in (
            (raising(options.NumericalError("NaN in inversion, step 3")), 2, "inversion, step 3"),
            (lambda: options.effective_steps(10, 0.01), 2, "error: --strength 0.01 of 10 steps"),
            (raising(RuntimeError("out of\nmemory")), 1, "failed: RuntimeError: out of memory"),
            (raising(KeyboardInterrupt()), 130, "interrupted"),
        ):
            FakePipeline.breaks = {stage: failure}
            assert cli.main(edit("--grid", "grid.png", *more)) == code
            out, err = capsys.readouterr()
            assert out == "" and words in err.splitlines()[-1]
            assert ("Traceback" in err) == (code == 1)
            assert sorted(os.listdir()) == ["model", "p.png"]
            assert sys.stdout is not sys.stderr


def test_a_full_disk_leaves_no_file(work, capsys, monkeypatch):
    save = PIL.Image.Image.save
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(
        PIL.Image.Image, "save", lambda self, path, **how: (full if "grid" in str(path) else save)(self, path, **how)
    )
    assert cli.main(edit("--grid", "grid.png")) == 1
    err = capsys.readouterr().err
    assert "No space left" in err and "Traceback" not in err
    assert sorted(os.listdir()) == ["model", "p.png"]


def test_hub_models_are_fetched_after_the_cheap_checks(work, capsys, monkeypatch):
    asked = []

    def resolve(name, options, **kwargs):
        asked.append((name, options, kwargs))
        return work / "model"

    monkeypatch.setattr("mindiffedit.checkpoints.hub.resolve_folder", resolve)
    hub = edit("--model", "maker/model", "--revision", "v1", "--offline")
    refused(capsys, [*hub, "--steps", "0"])
    assert asked == []
    result = result_of(capsys, [*hub, "--no-safety-checker"])
    ((name, options, kwargs),) = asked
    assert name == "maker/model" and options.revision == "v1" and options.local_files_only is True
    assert kwargs["skip"] == ("safety_checker",)
    assert arguments("load") == str(work / "model") and result["model"] == "maker/model"
    # What a folder of one's own is looked at for, a fetched one is too.
    (work / "model" / WEIGHTS[0]).unlink()
    refused(capsys, hub, "no weights")


# --- the page --------------------------------------------------------------------------------------


def test_the_page_s_examples_run_one_after_the_other(work, capsys, monkeypatch):
    from test_guide import ROOT, command_lines

    monkeypatch.setattr("mindiffedit.images.strips.AnimatedStrip", lambda *_, **__: contextlib.nullcontext())
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    (work / "page.md").write_text(text[: text.index("## Models")])  # what comes then needs other models
    commands = list(command_lines(work / "page.md"))
    assert {words[0] for words in commands} == {"demo", "edit", "mask", "invert"} and len(commands) > 10
    for words in commands:
        ran(capsys, words)
    for name in ("masks.png", "edits.png", "second.png", "union.png", "grid.png", "overlay.png", "map.png"):
        assert (work / name).exists()
    parsers = build_parser()._subparsers._group_actions[0].choices
    actions = (action for command in ("edit", "mask", "invert") for action in parsers[command]._actions)
    names = {name for action in actions for name in action.option_strings if name.startswith("--")}
    assert {name for name in names if not name.startswith("--no-") and name not in text} <= {"--output"}


# --- with real models -------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_reference_s_edit_by_a_real_model_is_the_pipeline_s_own(sd2_folder, tmp_path, monkeypatch, capfd):
    """The command in parts and the command as a whole give the same pixels as three calls of the pipeline."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(2)
    picture = PIL.Image.fromarray(rng.integers(0, 256, (56, 72, 3), dtype=np.uint8))
    picture.save("p.png")
    model = ["--model", str(sd2_folder), "--seed", "4", "--reference"]
    source, target, steps = ["--source", SOURCE], ["--target", TARGET], ["--steps", "5"]
    assert cli.main(["edit", "p.png", *source, *target, *steps, "-o", "whole.png", "--maps", "2", *model]) == 0
    out = capfd.readouterr().out
    assert re.fullmatch(r"whole\.png: 72 x 56, \d+% of it in the mask, seed 4, [\d.]+ s\n", out)
    assert cli.main(["mask", "p.png", *source, *target, *steps, "-o", "mask.png", "--maps", "2", *model]) == 0
    assert cli.main(["invert", "p.png", *source, *steps, "-o", "l.safetensors", *model]) == 0
    parts = ["--mask", "mask.png", "--latents", "l.safetensors", "-o", "parts.png"]
    assert cli.main(["edit", "p.png", *target, *parts, *model]) == 0
    whole = levels("whole.png")
    np.testing.assert_array_equal(whole, levels("parts.png"))

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
    drawn, original = [], sheets.contact_sheet
    monkeypatch.setattr(sheets, "contact_sheet", lambda rows, *rest, **more: drawn.append(rows) or original(
        rows, *rest, **more))  # fmt: skip
    PIL.Image.open(demo.sample_picture()).convert("RGB").resize((150, 131)).save("p.png")
    source, target = (["--" + name, text] for name, text in demo.SAMPLE_PROMPTS.items())
    common = ["--steps", "6", "--seed", "4", "--quiet"]
    exact = ["--preset", "exact"]
    masked = [*source, *target, "--maps", "2", "--mask-smoothing", "1"]
    assert cli.main(["edit", "p.png", *masked, *common, *exact, "-o", "whole.png", "--strip", "strip.png", "--json",
                     "--sweep", "sheet.png", "--sweep-strengths", "0.9", "--sweep-guidances", "5"]) == 0  # fmt: skip
    result = json.loads(capfd.readouterr().out)
    assert cli.main(["mask", "p.png", *masked, *common, "-o", "mask.png"]) == 0
    assert cli.main(["invert", "p.png", *source, *common, "-o", "l.safetensors"]) == 0
    parts = ["--mask", "mask.png", "--latents", "l.safetensors", "--seed", "4", "--quiet", "-o", "parts.png"]
    assert cli.main(["edit", "p.png", *target, *parts, *exact]) == 0
    picture, whole = levels("p.png"), levels("whole.png")
    np.testing.assert_array_equal(whole, levels("parts.png"))
    np.testing.assert_array_equal(np.asarray(drawn[0][0][0]), whole)

    mask = levels("mask.png")
    assert result["mask_share"] == pytest.approx(mask.mean() / 255, abs=0.01) and 0.02 < result["mask_share"] < 0.5
    seam = masks.feathered((mask > 0).astype(np.float32), mask.shape, 6)[0]
    np.testing.assert_array_equal(whole[seam == 0], picture[seam == 0])
    assert np.abs(whole.astype(int) - picture)[mask > 0].mean() > 10
    report = result["report"]
    assert report["change_outside"] == 0 < report["change_outside_before_paste_back"]
    assert report["inversion_error"] > 0 and set(report["seconds"]) >= {"mask", "inversion", "edit"}
    assert PIL.Image.open("strip.png").n_frames == 2 * 5  # 5 of 6 steps run, each way
