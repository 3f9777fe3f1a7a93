"""The editor in memory: the command's results, options by name, progress, cancelling, an inversion taken again."""

import json
import threading
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

from mindiffedit import demo
from mindiffedit.cli import command
from mindiffedit.cli.arguments import build_parser
from mindiffedit.errors import InputError
from mindiffedit.images.reading import load_image
from mindiffedit.service.editor import OPTIONS, Cancelled, Editor, option_schemas

QUICK = {**demo.SAMPLE_PROMPTS, "steps": 6, "seed": 3}


@pytest.fixture(scope="module")
def editor():
    return Editor.load(Namespace(model="demo"))


@pytest.fixture(scope="module")
def picture():
    return PIL.Image.open(demo.sample_picture())


@pytest.fixture(scope="module")
def edited(editor, picture):
    return editor.edit(picture, QUICK)


def pixels(image):
    return np.asarray(image)


def test_the_command_s_edit(edited, tmp_path, capsys):
    argv = [
        "edit",
        str(demo.sample_picture()),
        "-o",
        str(tmp_path / "out.png"),
        "--steps",
        "6",
        "--seed",
        "3",
        "--json",
    ]
    argv += ["--source", QUICK["source"], "--target", QUICK["target"]]
    assert command.main(argv) == 0
    said = json.loads(capsys.readouterr().out)
    np.testing.assert_array_equal(pixels(edited.image), pixels(PIL.Image.open(tmp_path / "out.png")))
    timed = {"seconds", "report", "output", "picture", "sweep", "grid", "overlay", "strip"}
    assert {k: v for k, v in edited.settings.items() if k not in timed} == {
        k: v for k, v in said.items() if k not in timed
    }
    assert edited.settings["report"]["mask_coverage"] == said["report"]["mask_coverage"] == edited.mask.mean()
    assert edited.mask.shape == edited.map.shape and edited.mask.ndim == 3
    assert json.loads(json.dumps(edited.settings)) == edited.settings


def test_the_command_s_mask(editor, picture, tmp_path, capsys):
    argv = ["mask", str(demo.sample_picture()), "-o", str(tmp_path / "mask.png"), "--steps", "6", "--seed", "3"]
    assert command.main([*argv, "--source", QUICK["source"], "--target", QUICK["target"]]) == 0
    capsys.readouterr()
    mask, map_ = editor.find_mask(picture, {**QUICK, "strength": 0.5})  # the last is of an edit only
    written = pixels(PIL.Image.open(tmp_path / "mask.png").convert("L"))
    latent = np.ones([side // cells for side, cells in zip(written.shape, mask[0].shape)])
    np.testing.assert_array_equal(np.kron(mask[0], latent) * 255, written)
    assert map_.shape == mask.shape and map_.dtype == np.float32
    exact = editor.edit(picture, {**QUICK, "preset": "exact"})
    np.testing.assert_array_equal(mask, exact.mask)


def test_steps_are_told_and_the_pictures_of_others_change_nothing(editor, picture, edited):
    steps = []
    editor.edit(picture.transpose(PIL.Image.Transpose.ROTATE_90), {**QUICK, "reference": "true"})
    again = editor.edit(picture, QUICK, progress=lambda *step: steps.append(step))
    np.testing.assert_array_equal(pixels(again.image), pixels(edited.image))
    stages = list(dict.fromkeys(stage for stage, _, _ in steps))
    assert stages == ["inversion", "mask", "edit"]  # the preset's order
    for stage in ("inversion", "edit"):
        counted = [(done, total) for name, done, total in steps if name == stage]
        assert counted == [(done, 5) for done in range(6)], stage
    exact = []
    editor.find_mask(picture, QUICK, progress=lambda *step: exact.append(step))
    assert {stage for stage, _, _ in exact} == {"mask"} and exact[-1][1] == exact[-1][2] > 0


def test_cancelled_between_two_steps(editor, picture, edited):
    cancelled, steps = threading.Event(), []

    def progress(stage, done, total):
        steps.append((stage, done))
        if (stage, done) == ("edit", 2):
            cancelled.set()

    with pytest.raises(Cancelled):
        editor.edit(picture, QUICK, progress=progress, cancelled=cancelled)
    assert steps[-1] == ("edit", 2)
    with pytest.raises(Cancelled):  # before it begins
        editor.edit(picture, QUICK, progress=progress, cancelled=cancelled)
    assert steps[-1] == ("edit", 2)
    np.testing.assert_array_equal(pixels(editor.edit(picture, QUICK).image), pixels(edited.image))


def test_a_painted_mask_takes_the_inversion_again(editor, picture, edited):
    painted = np.zeros_like(edited.mask)
    painted[:, 4:10, 5:12] = 1

    def evaluations(**more):
        before = editor.pipe._stages.calls["rows"]
        return editor.edit(picture, QUICK, mask=painted, **more), editor.pipe._stages.calls["rows"] - before

    anew, most = evaluations()
    again, fewer = evaluations(reuse=edited)
    assert fewer < most
    np.testing.assert_array_equal(pixels(again.image), pixels(anew.image))
    drawn = PIL.Image.fromarray(np.uint8(painted[0] * 255)).resize(picture.size, PIL.Image.Resampling.NEAREST)
    np.testing.assert_array_equal(pixels(editor.edit(picture, QUICK, mask=drawn).image), pixels(anew.image))
    # Where another inversion is needed, or the mask is made of it, one is made.
    for options, more in (({**QUICK, "seed": 4}, {"mask": painted}), (QUICK, {})):
        with_it = editor.edit(picture, options, reuse=edited, **more)
        np.testing.assert_array_equal(pixels(with_it.image), pixels(editor.edit(picture, options, **more).image))


def test_mode_and_transparency_stay(editor, picture):
    clear = picture.convert("RGBA")
    clear.putalpha(200)
    result = editor.edit(clear, QUICK).image
    assert result.mode == "RGBA" and result.getchannel("A").getextrema() == (200, 200)


def test_options_are_refused_in_their_names(editor, picture):
    for options, words in (
        ({}, "`target` is missing"),
        ({"target": "a pear"}, "`source` is missing: say what the picture shows"),
        ({**QUICK, "steps": "many"}, "`steps`: invalid int value: 'many'"),
        ({**QUICK, "steps": 0}, "`steps`"),
        ({**QUICK, "steps": True}, "`steps` has to be a text or a number"),
        ({**QUICK, "fill_holes": "perhaps"}, "`fill_holes` has to be true or false"),
        ({**QUICK, "mask_strength": 2}, "`mask_strength`"),
        ({**QUICK, "preset": "best"}, "`preset`: invalid choice"),
        ({**QUICK, "mask_combine": "union"}, "`mask_combine` says what becomes of `mask`"),
        ({**QUICK, "target": QUICK["source"]}, "`source` and `target` are the same text"),
        ({**QUICK, "reference": True, "soft_mask": False}, "`soft_mask`"),
        ({**QUICK, "negative": "\ud800"}, "`negative` is not valid UTF-8"),
    ):
        with pytest.raises(InputError) as caught:
            editor.check(picture, options)
        assert words in str(caught.value) and "--" not in str(caught.value), options
    with pytest.raises(InputError) as caught:
        editor.check(picture, {**QUICK, "steps": "many"})
    assert caught.value.parameter == "steps"
    with pytest.raises(InputError, match="in \\[0, 1\\]"):
        editor.check(picture, QUICK, np.full((4, 4), 2.0))


def test_no_option_is_a_path(editor, picture):
    paths = "mask latents output grid overlay strip sweep map model lora embedding config picture".split()
    assert not set(paths) & set(OPTIONS)
    for name in paths:
        with pytest.raises(InputError, match=f"'{name}' is no option of an edit"):
            editor.check(picture, {**QUICK, name: "/etc/passwd"})


def test_schemas_are_the_command_s_options():
    schemas = option_schemas()
    assert [*schemas] == [*OPTIONS]
    assert schemas["steps"]["type"] == "integer" and schemas["preset"]["enum"] == ["exact", "balanced", "fast"]
    assert schemas["soft_mask"]["type"] == "boolean" and "strength" not in option_schemas("mask")
    parsed = vars(build_parser().parse_args(["edit", "p.png", "--target", "x"]))
    assert set(OPTIONS) <= set(parsed)


def test_a_captioner_stands_in_for_the_source(editor, picture, edited):
    captioner = SimpleNamespace(caption=lambda image: QUICK["source"])
    described = Editor(editor.pipe, editor._job, captioner)
    described._model_scheduler = editor._model_scheduler
    asked = {name: value for name, value in QUICK.items() if name != "source"}
    result = described.edit(picture, asked)
    assert result.settings["caption"] == result.settings["source"] == QUICK["source"]
    np.testing.assert_array_equal(pixels(result.image), pixels(edited.image))
    assert "caption" not in described.edit(picture, QUICK).settings


def test_a_model_that_cannot_be_loaded(tmp_path):
    for args, words in (
        ({"model": str(tmp_path / "none")}, "--model .* no such folder"),
        ({"model": "demo", "lora": [str(tmp_path / "x.bin")]}, "--lora .*only .safetensors"),
        ({"model": "demo", "revision": "main"}, "--revision is for models on the hub"),
    ):
        with pytest.raises(InputError, match=words):
            Editor.load(Namespace(**args))


def test_threads_take_turns(editor, picture, edited):
    results = {}

    def run(seed):
        results[seed] = pixels(editor.edit(picture, {**QUICK, "seed": seed}).image)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (3, 4, 3 + 2**32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(results[3], pixels(edited.image))
    assert (results[4] != results[3]).any()


def test_settings_name_no_path(picture):
    folder = demo.checkpoint_folder()
    # By a folder the demo model has the defaults of any other.
    result = Editor.load(Namespace(model=str(folder))).edit(load_image(picture), {**QUICK, "guidance": 5})
    assert result.settings["model"] == folder.name and str(folder.parent) not in json.dumps(result.settings)
