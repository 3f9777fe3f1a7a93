"""`mindiffedit parity record` and `mindiffedit parity check` as a user meets them.

One recording and the replays of it are real, in processes of their own where the other side's framework cannot be
imported. What is refused, and what a check makes of tensors that differ, is tested without models.
"""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import parity
import PIL.Image
import pytest
from safetensors.numpy import save_file

import mindiffedit
from mindiffedit import demo, options
from mindiffedit.cli import command as cli
from mindiffedit.cli import parity as command
from mindiffedit.cli.arguments import CASE_OPTIONS, build_parser
from mindiffedit.parity import golden, replay, tolerances

SOURCE, TARGET = "a red apple on a table", "a yellow pear on a table"
REFERENCE, OURS = ("torch", "diffusers"), ("mindspore", "mindone")

# Runs commands one after another where some packages cannot be found, and writes down what came of each.
DRIVER = '''
import json, os, sys

plan = json.loads(sys.argv[1])


class Without:
    """A finder of modules that does not find those packages."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        absent = name.partition(".")[0] in plan["absent"]
        return None if absent else self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from mindiffedit.__main__ import run as program

for number, run in enumerate(plan["runs"]):
    if run.get("plant"):
        exec(run["plant"])
    saved = os.dup(1), os.dup(2)
    for stream, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{plan['name']}{number}.{kind}", os.O_WRONLY | os.O_CREAT), stream)
    sys.argv[1:] = run["argv"]
    code = program()
    sys.stdout.flush(), sys.stderr.flush()
    os.dup2(saved[0], 1), os.dup2(saved[1], 2)
    print(code)
present = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps(present))
'''


def run(folder, name, absent, *runs):
    """Exit code, stdout and stderr of each command, and the packages that are imported in the end."""
    runs = [{"argv": one} if isinstance(one, list) else {"argv": one[0], "plant": one[1]} for one in runs]
    plan = {"name": str(folder / name), "absent": absent, "runs": runs}
    root = os.path.dirname(os.path.dirname(os.path.abspath(mindiffedit.__file__)))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(plan)], capture_output=True, text=True, cwd=folder, timeout=900,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *codes, present = map(json.loads, done.stdout.splitlines())
    results = []
    for number, code in enumerate(codes):
        files = [Path(f"{plan['name']}{number}.{kind}") for kind in ("out", "err")]
        results.append(types.SimpleNamespace(code=code, out=files[0].read_text(), err=files[1].read_text()))
        for file in files:
            file.unlink()
    return results, set(present)


def strict(text):
    """JSON without the words that are none."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def record_argv(model, *more, output="g.safetensors"):
    return [
        *("parity", "record", "--image", "p.png", "--source", SOURCE, "--target", TARGET, "--steps", "4"),
        *("--strength", "0.5", "--maps", "2", "--guidance", "2", "--model", str(model), "-o", output, *more),
    ]


def check_argv(model, *more, file="g.safetensors"):
    return ["parity", "check", file, "--model", str(model), *more]


def rewritten(path, recording, **changes):
    """The recording again with another manifest, or other tensors as ``trace``, as `record` would have written it."""
    trace = changes.pop("trace", recording.trace)
    inputs = {f"input/{name}": array for name, array in recording.inputs.items()}
    golden.write_golden(path, {**inputs, **trace}, {**recording.manifest, **changes})


@pytest.fixture(scope="module")
def recorded(sd1_folder, tmp_path_factory):
    """A folder with a picture and a recording of its edit, made where there is no MindSpore."""
    folder = tmp_path_factory.mktemp("recorded")
    parity.picture(64, 48).save(folder / "p.png")
    argv = record_argv(sd1_folder, "--seed", "3", "--scheduler", "ddim", "--json")
    (done,), present = run(folder, "record", OURS, argv)
    assert done.code == 0, done.err
    assert present >= {*REFERENCE, "mindiffedit"} and present.isdisjoint(OURS)
    path = folder / "g.safetensors"
    return types.SimpleNamespace(folder=folder, path=path, done=done, model=sd1_folder, golden=golden.read_golden(path))


# An error in a stage in the middle of the mask.
PLANT = """
from mindiffedit.solvers.solver import TabulatedSolver as solver
exact = solver.add_noise
solver.add_noise = lambda *args: exact(*args) * 1.001
"""


@pytest.fixture(scope="module")
def checked(recorded):
    """Four checks where there is no PyTorch: two of the recording, two of a mask with an error planted in it."""
    trace = {name: array for name, array in recorded.golden.trace.items() if name.startswith("mask/")}
    calls = {**recorded.golden.manifest["calls"], "invert": None, "edit": None}
    rewritten(recorded.folder / "mask.safetensors", recorded.golden, trace=trace, calls=calls)
    operators, of_mask = ("--mode", "pynative"), dict(file="mask.safetensors")
    results, present = run(
        recorded.folder,
        "check",
        REFERENCE,
        check_argv(recorded.model, "--report", "r.md", "--save-diff", "differences"),
        check_argv(recorded.model, "--isolate", "--json", "--report", "r.json", "--quiet", *operators),
        (check_argv(recorded.model, "--isolate", "--json", *operators, **of_mask), PLANT),
        check_argv(recorded.model, "--report", "bad.json", *operators, **of_mask),
    )
    assert present >= {*OURS, "mindiffedit"} and present.isdisjoint(REFERENCE)
    return results


# --- a recording ----------------------------------------------------------------------------------------------------


def test_record_says_what_it_wrote(recorded):
    assert recorded.done.out.count("\n") == 1
    said = strict(recorded.done.out)
    assert (said["command"], said["output"]) == ("parity record", "g.safetensors")
    assert said["stages"] == len(recorded.golden.trace) and said["bytes"] == recorded.path.stat().st_size
    assert said["model"] == str(recorded.model) and said["seconds"] > 0
    assert said["arguments"] == recorded.golden.manifest["arguments"]
    notes = recorded.done.err.splitlines()
    assert len(notes) == 2 and all(line.startswith("note: ") for line in notes) and "float64" in notes[1], notes


def test_a_recording_says_how_it_was_made(recorded):
    manifest = recorded.golden.manifest
    settings = manifest["arguments"]
    assert tuple(sorted(settings)) == tuple(sorted(CASE_OPTIONS))
    given = dict(source=[SOURCE], target=[TARGET], image=["p.png"], seed=[3], mask_seed=None, steps=4, strength=0.5)
    of_its_own = dict(guidance=2.0, invert_guidance=2.0, maps=2, mask_strength=0.5, scheduler="ddim", eta=0.0)
    assert {name: settings[name] for name in (*given, *of_its_own)} == {**given, **of_its_own}
    assert manifest["dtype"] == settings["dtype"] == "float32"
    assert manifest["calls"]["edit"]["negative_prompt"] == SOURCE
    assert manifest["weights"] == golden.hash_files(recorded.model)
    assert {"torch", "diffusers", "transformers", "numpy", "mindiffedit", "python"} <= set(manifest["versions"])
    assert manifest["versions"]["mindiffedit"] == mindiffedit.__version__
    assert set(manifest["platform"]) == {"system", "processor"} and manifest["platform"]["system"]
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", manifest["recorded"]) and manifest["mended"] == []
    picture = np.asarray(PIL.Image.open(recorded.folder / "p.png"))
    np.testing.assert_array_equal(recorded.golden.inputs["picture"], picture[None])


def test_a_recording_has_every_stage_and_both_kinds_of_floors(recorded):
    trace, floors = recorded.golden.trace, recorded.golden.manifest["floors"]
    stages = list(trace)
    latents = "mask/latents mask/noised_latents invert/latents invert/inverted_latents edit/edited_latents"
    assert [name for name in stages if name.endswith("latents")] == latents.split()
    calls = [name.partition("/")[0] for name in stages]
    assert calls == sorted(calls, key=("mask", "invert", "edit").index)
    assert stages[-1] == "edit/picture" and trace["edit/picture"].shape == (1, 48, 64, 3)
    assert trace["invert/inverted_latents"].shape == (2, 1, 4, 6, 8)  # two of four steps
    for call in ("invert", "edit"):  # the UNet's outputs for the negative and the prompt
        assert trace[f"{call}/predictions"].shape == (2, 2, 4, 6, 8)
    assert set(floors) == {"chained", "isolated"}
    needed = {tolerances.floor_of(name) for name in stages if tolerances.for_stage(name).factor}
    for kind, measured in floors.items():
        assert needed <= set(measured) <= set(stages)
        assert all(0 < np.max(floor) < 0.01 for floor in measured.values()), kind
        assert np.shape(measured["edit/edited_latents"]) == ((2,) if kind == "chained" else ())


# --- checks that pass -------------------------------------------------------------------------------------------------


def test_check_in_graph_mode(recorded, checked):
    done = checked[0]
    assert done.code == 0, done.out + done.err
    heading, *table, verdict = done.out.splitlines()
    assert heading.split()[0] == "stage" and "tolerance" in heading
    assert [re.split(r"[, ]", line)[0] for line in table] == list(recorded.golden.trace)
    assert all(re.search(r"  ok(, .*)?$", line) for line in table), done.out
    assert verdict == f"all {len(table)} stages are within their tolerances"
    assert done.err == "note: replaying on CPU, mode graph.\n"
    page = (recorded.folder / "r.md").read_text()
    assert verdict in page and "mode: graph" in page and "multiples of the recorded floors" in page
    assert f"torch {recorded.golden.manifest['versions']['torch']}" in page
    drawn = sorted((recorded.folder / "differences").iterdir())
    assert len(drawn) == 6 and all(path.suffix == ".png" for path in drawn)
    for path in drawn:
        assert PIL.Image.open(path).convert("RGB").size > (64, 64)


def test_check_operator_by_operator_with_the_references_inputs(recorded, checked):
    done = checked[1]
    assert done.code == 0 and done.err == "", done.out + done.err
    assert done.out.count("\n") == 1
    said = strict(done.out)
    expected = dict(command="parity check", ok=True, isolated=True, mode="pynative", ended_early=None)
    expected.update(report="r.json", heat_maps=[], dtype="float32", device="CPU")
    assert {name: said[name] for name in expected} == expected
    assert [stage["name"] for stage in said["stages"]] == list(recorded.golden.trace)
    assert all(stage["ok"] for stage in said["stages"])
    page = strict((recorded.folder / "r.json").read_text())
    assert page["stages"] == said["stages"] and "isolated" in page["context"]["inputs of each stage"]


# --- checks that fail -------------------------------------------------------------------------------------------------


def test_isolating_finds_the_one_stage_with_an_error(recorded, checked):
    """The same error, with the reference's inputs everywhere and without."""
    isolated, chained = checked[2:]
    assert isolated.code == chained.code == 1, isolated.err + chained.err
    said = strict(isolated.out)
    assert not said["ok"] and said["verdict"].startswith("FIRST stage out of tolerance: mask/noised_latents:")
    assert [stage["name"] for stage in said["stages"] if not stage["ok"]] == ["mask/noised_latents"]
    report = strict((recorded.folder / "bad.json").read_text())
    bad = [stage["name"] for stage in report["stages"] if not stage["ok"]]
    assert bad[:3] == ["mask/noised_latents", "mask/noise_predictions", "mask/map"]
    assert report["first_failure"] == bad[0] and not report["passed"]
    assert report["context"]["mode"] == "pynative" and len(report["stages"]) == len(said["stages"])


@pytest.fixture
def replayed(recorded, monkeypatch):
    """Makes replays give the recorded tensors after a change; returns what they were asked."""
    asked = []

    def install(change=lambda ours: None):
        def replay_run(pipe, case, reference, isolate):
            asked.append((pipe, case, isolate))
            ours = {name: array.copy() for name, array in recorded.golden.trace.items()}
            change(ours)
            return ours

        monkeypatch.setattr(replay, "run", replay_run)
        return asked

    monkeypatch.chdir(recorded.folder)
    monkeypatch.setattr("mindiffedit.runtime.devices.require_device", lambda name: name or "CPU")
    loaded = type("Loaded", (tuple,), {})  # a tuple that takes attributes
    monkeypatch.setattr(replay, "load", lambda path, _, *how, compile_cache: loaded((str(path), *how, compile_cache)))
    install()
    return install


def checks(capsys, recorded, *more, **file):
    """(exit code, stdout, stderr)."""
    code = cli.main(check_argv(recorded.model, *more, **file))
    return (code, *capsys.readouterr())


def test_what_is_replayed_is_what_was_recorded(recorded, replayed, capsys, tmp_path):
    asked = replayed()
    again = [*("--source", SOURCE, "--target", TARGET, "--steps", "4", "--strength", "0.5", "--seed", "3")]
    again += ["--image", "p.png", "--scheduler", "ddim", "--invert-guidance", "2", "--dtype", "float32"]
    code, out, err = checks(capsys, recorded, "--isolate", "--mode", "pynative", "--device", "gpu", *again)
    assert code == 0 and out.splitlines()[-1].endswith("within their tolerances")
    assert err == "note: replaying on GPU, mode pynative.\n"
    ((pipe, case, isolate),) = asked
    assert isolate and pipe == (str(recorded.model), "pynative", "float32", None)
    assert case.described() == recorded.golden.manifest["calls"]
    assert np.array_equal(np.asarray(case.image), recorded.golden.inputs["picture"][0])
    PIL.Image.open("p.png").save(tmp_path / "again.bmp")  # the same pixels are the same picture
    assert checks(capsys, recorded, "--no-cache", "--image", str(tmp_path / "again.bmp"))[0] == 0
    assert asked[1][0][3] is False


def test_a_recording_from_before_the_predictions_is_checked_without_them(recorded, replayed, capsys, tmp_path):
    trace = {name: array for name, array in recorded.golden.trace.items() if not name.endswith("/predictions")}
    rewritten(tmp_path / "old.safetensors", recorded.golden, trace=trace)
    code, out, err = checks(capsys, recorded, file=str(tmp_path / "old.safetensors"))
    assert code == 0 and f"all {len(trace)} stages are within" in out and "/predictions" not in out
    replayed(lambda ours: ours.update({"edit/surprise": np.ones(2)}))  # any other stage is one too many
    assert checks(capsys, recorded, file=str(tmp_path / "old.safetensors"))[0] == 1


def test_a_failing_check_names_the_first_bad_stage(recorded, replayed, capsys, tmp_path):
    def change(ours):
        ours["edit/picture"][0, 0, 0] += 100
        ours["invert/inverted_latents"][1] *= 1.5
        ours["mask/timestep"] += 1
        del ours["edit/token_ids"]

    replayed(change)
    files = ["--report", str(tmp_path / "r.md"), "--save-diff", str(tmp_path / "a" / "b")]
    code, out, err = checks(capsys, recorded, *files, "--quiet")
    assert code == 1 and err == ""
    *table, verdict = out.splitlines()
    bad = [line.split()[0].rstrip(",") for line in table if "  OUT: " in line]
    assert bad == ["mask/timestep", "invert/inverted_latents", "edit/token_ids", "edit/picture"]
    assert verdict.startswith("FIRST stage out of tolerance: mask/timestep: 1 of 1 values differ")
    assert "(4 of " in verdict and "invert/inverted_latents, step 2 of 2" in out
    assert "our run did not give this stage" in out
    assert "FIRST stage out of tolerance: mask/timestep" in (tmp_path / "r.md").read_text()
    drawn = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert drawn == ["01-invert-inverted_latents-step-2-of-2.png", "02-edit-picture.png"]


def test_tolerances_are_those_of_the_recording_and_of_the_kind_of_check(recorded, replayed, capsys, tmp_path):
    """The same difference is within floors that were measured and out of such as are tiny."""
    replayed(lambda ours: ours.update({"edit/decoded": ours["edit/decoded"] + np.float32(5e-6)}))
    measured = recorded.golden.manifest["floors"]
    tiny = {**measured, "isolated": {stage: 1e-9 for stage in measured["isolated"]}}
    files = {name: dict(file=str(tmp_path / f"{name}.safetensors")) for name in ("tiny", "none")}
    rewritten(files["tiny"]["file"], recorded.golden, floors=tiny)
    rewritten(files["none"]["file"], recorded.golden, floors=None)
    assert checks(capsys, recorded)[0] == checks(capsys, recorded, "--isolate")[0] == 0
    assert checks(capsys, recorded, **files["tiny"])[0] == 0
    code, out, _ = checks(capsys, recorded, "--isolate", "--json", **files["tiny"])
    assert code == 1 and [stage["name"] for stage in strict(out)["stages"] if not stage["ok"]] == ["edit/decoded"]
    report = tmp_path / "r.json"
    assert checks(capsys, recorded, "--report", str(report), **files["none"])[0] == 0
    assert strict(report.read_text())["context"]["tolerances"] == "the table's, no floors recorded"


def test_nan_on_the_way_fails_the_check_where_it_is(recorded, replayed, capsys, monkeypatch, tmp_path):
    def ends(pipe, case, reference, isolate):
        error = options.NumericalError("inversion, step 2: 3 of 192 values are NaN")
        error.trace = {name: array for name, array in reference.items() if name.startswith("mask/")}
        raise error

    monkeypatch.setattr(replay, "run", ends)
    code, out, err = checks(capsys, recorded, "--json", "--report", str(tmp_path / "r.md"))
    said = strict(out)
    assert code == 1 and said["verdict"].startswith("FIRST stage out of tolerance: invert/")
    assert "our run did not give this stage" in said["verdict"] and "step 2" in said["ended_early"]
    assert "note: the replay ended early: inversion, step 2" in err
    assert "ended early: inversion, step 2" in (tmp_path / "r.md").read_text()


def test_half_precision_is_checked_only_where_it_is_computed(recorded, replayed, capsys, monkeypatch, tmp_path):
    manifest = recorded.golden.manifest
    # As large as moves pixels by 3.6 levels, times the factor of the table.
    size = np.sqrt(np.mean(recorded.golden.trace["edit/decoded"].astype(np.float64) ** 2))
    floor = 3.6 / (255 / 2) / size / tolerances.for_stage("edit/decoded").factor
    floors = {kind: {**of, "edit/decoded": floor} for kind, of in manifest["floors"].items()}
    file = dict(file=str(tmp_path / "half.safetensors"))
    rewritten(file["file"], recorded.golden, arguments={**manifest["arguments"], "dtype": "float16"}, floors=floors)

    asked, answer = replayed(), ["MindSpore's kernels are float32."]
    monkeypatch.setattr("mindiffedit.runtime.devices.supported_dtype", lambda dtype: (dtype, *answer))
    code, out, err = checks(capsys, recorded, **file)
    assert code == 2 and out == "" and asked == []
    assert "was recorded in float16, for which CPU computes in float32" in err

    answer[0] = None
    for levels, expected in ((4, 0), (5, 1)):

        def change(ours, levels=levels):
            picture = ours["edit/picture"]
            picture += np.where(picture < 128, levels, -levels).astype(np.uint8)

        replayed(change)
        code, out, _ = checks(capsys, recorded, "--json", **file)
        said = strict(out)
        assert code == expected and said["dtype"] == "float16" == asked[0][0][2]
        assert (said["stages"][-1]["tolerance"], said["stages"][-1]["max_abs"]) == (4, levels)


# --- what the arguments mean ----------------------------------------------------------------------------------------


def case_of(*argv, folder, image=None):
    """(settings, case) of `parity record` with these options, up to where a model runs."""
    argv = ["parity", "record", "-o", "out.safetensors", "--model", str(folder), *argv]
    args = build_parser().parse_args(argv)
    settings = command._settings(args)
    return settings, command._case(settings, [image] * len(settings["image"]), Path(folder))


ONE = ("--image", "p.png", "--source", "a", "--target", "b")
TWO = ("--image", "p.png", "--image", "q.png", "--source", "a", "--source", "c", "--target", "b", "--target", "d")
GENERATORS = "--seed 1 --seed 2 --mask-seed 3 --mask-seed -4 --mask-seed 5 --mask-seed 6".split()
EVERYTHING = (
    *("--steps", "8", "--strength", "0.75", "--guidance", "3", "--invert-guidance", "1.5", "--maps", "2"),
    *("--mask-strength", "0.25", "--mask-threshold", "2", "--scheduler", "dpm", "--solver-order", "1"),
    *("--images-per-prompt", "3", "--eta", "0.5", "--clip-skip", "2", "--reg-steps", "4", "--lambda-kl", "7"),
    *("--lambda-auto-corr", "6", "--auto-corr-rolls", "9", "--decode-latents", "--negative", "n"),
    *("--invert-negative", "i", "--source-negative", "s", "--target-negative", "t", "--seed", "11"),
)
METHODS = {"mask": "generate_mask", "invert": "invert", "edit": "__call__"}


def test_a_case_is_what_edit_does_with_the_references_defaults(sd1_folder):
    import diffusers

    settings, case = case_of(*ONE, "--guidance", "5", folder=sd1_folder, image="the picture")
    assert case.image == "the picture" and settings["scheduler"] == "ddim"  # the model's own is PNDM
    prompts = {"target_prompt": "b", "source_prompt": "a"}, {"prompt": "a"}, {"prompt": "b", "negative_prompt": "a"}
    for (call, method), given in zip(METHODS.items(), prompts):
        theirs = getattr(diffusers.StableDiffusionDiffEditPipeline, method)
        defaults = {name: parameter.default for name, parameter in inspect.signature(theirs).parameters.items()}
        made = getattr(case, call)
        assert made == {name: defaults[name] for name in made} | given | {"guidance_scale": 5.0}, call
    assert case.seeds == {"mask": 0, "invert": 0, "edit": 0}
    assert (case.scheduler, case.scheduler_options) == ("DDIMScheduler", {})


def test_every_option_reaches_its_call(sd1_folder):
    settings, case = case_of(*ONE, *EVERYTHING, "--size", "96", "--dtype", "bfloat16", folder=sd1_folder)
    assert (settings["size"], settings["dtype"]) == (96, "bfloat16")
    mask = dict(target_prompt="b", source_prompt="a", target_negative_prompt="t", source_negative_prompt="s")
    mask.update(num_maps_per_mask=2, mask_encode_strength=0.25, mask_thresholding_ratio=2.0)
    assert case.mask == dict(mask, num_inference_steps=8, guidance_scale=3.0)
    loops = dict(num_inference_steps=8, inpaint_strength=0.75)
    invert = dict(loops, prompt="a", negative_prompt="i", guidance_scale=1.5, decode_latents=True)
    assert case.invert == dict(invert, num_reg_steps=4, lambda_auto_corr=6.0, lambda_kl=7.0, num_auto_corr_rolls=9)
    edit = dict(loops, prompt="b", negative_prompt="n", guidance_scale=3.0)
    assert case.edit == dict(edit, num_images_per_prompt=3, eta=0.5, clip_skip=2)
    assert case.seeds == {"mask": 11, "invert": 11, "edit": 11}
    assert case.scheduler == "DPMSolverMultistepScheduler" and case.scheduler_options == {"solver_order": 1}
    assert case.inverse_scheduler == "DPMSolverMultistepInverseScheduler"
    for call, method in METHODS.items():
        ours = getattr(mindiffedit.StableDiffusionDiffEditPipeline, method)
        assert set(getattr(case, call)) <= set(inspect.signature(ours).parameters)


def test_a_batch_is_lists_and_has_a_generator_for_each_sample(sd1_folder):
    _, case = case_of(*TWO, *GENERATORS, "--maps", "2", "--images-per-prompt", "2", folder=sd1_folder, image="one")
    assert case.image == ["one", "one"]
    assert (case.mask["source_prompt"], case.mask["target_prompt"]) == (["a", "c"], ["b", "d"])
    assert case.invert["prompt"] == ["a", "c"] and case.edit["negative_prompt"] == ["a", "c"]
    assert case.seeds == {"mask": [3, -4, 5, 6], "invert": [1, 2], "edit": [1, 1, 2, 2]}
    _, case = case_of(*TWO, "--seed", "7", "--negative", "", "--negative", "x", folder=sd1_folder)
    assert case.seeds == {"mask": 7, "invert": 7, "edit": 7} and case.edit["negative_prompt"] == ["", "x"]
    argv = ("--seed", "5", "--mask-seed", "6", "--mask-seed", "7", "--maps", "2")
    assert case_of(*ONE, *argv, folder=sd1_folder)[1].seeds == {"mask": [6, 7], "invert": [5], "edit": [5]}


@pytest.mark.parametrize("own, name", [("DPMSolverMultistepScheduler", "dpm"), ("LMSDiscreteScheduler", "ddim")])
def test_the_scheduler_is_the_models_own_where_it_can_be(sd1_folder, tmp_path, own, name):
    shutil.copy(sd1_folder / "model_index.json", tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", own]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    settings, case = case_of(*ONE, folder=tmp_path)
    assert settings["scheduler"] == name and case.scheduler == command.SCHEDULERS[name][0]
    assert case_of(*ONE, "--scheduler", "ddim", folder=tmp_path)[1].scheduler == "DDIMScheduler"


def test_the_demo_model_has_settings_of_its_own():
    folder = demo.checkpoint_folder()
    settings, case = case_of(*ONE, "--maps", "3", "--model", "demo", folder=folder)
    suited = {**demo.SETTINGS, "maps": 3}
    assert {name: settings[name] for name in suited} == suited
    assert case.invert["guidance_scale"] == 1.0 and case.edit["guidance_scale"] == 5.0


def test_crashes_of_the_reference_that_were_mended_are_written_down(sd1_folder):
    def mended(*argv):
        return command._mended(case_of(*ONE, *argv, folder=sd1_folder)[1])

    assert mended() == [] and mended("--guidance", "1") == ["W1"]
    assert mended("--scheduler", "dpm", "--guidance", "0.5") == ["W1", "W3"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def work(recorded, tmp_path, monkeypatch):
    """A folder with pictures and the recording, where no framework can be imported."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(recorded.path, "g.safetensors")
    shutil.copy(recorded.folder / "p.png", "p.png")
    parity.picture(64, 48, seed=1).save("q.png")
    parity.picture(80, 48).save("wide.png")
    for name in (*REFERENCE, *OURS, "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    return tmp_path


def everything_here():
    return sorted((str(path), path.stat().st_size) for path in Path().rglob("*"))


def refused(capsys, argv, *words):
    """The one line of a command that ends with 2, without an import of a framework and without a trace of itself."""
    before = everything_here()
    code = cli.main(argv)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert code == 2, err
    assert out == "" and len(lines) == 1, err
    assert re.match(r"mindiffedit( parity \w+)?: error: ", lines[0]) and lines[0].endswith((".", "--help)"))
    for word in words:
        assert word in lines[0], err
    assert everything_here() == before
    return lines[0]


REFUSED_RECORDINGS = (
    *(("--eta 2", "--eta has to be in [0, 1], but is 2"), ("--steps 0", "--steps"), ("--strength 0", "leaves no step")),
    *(("--mask-strength 0.1", "leaves no step"), ("--mask-threshold 0", "--mask-threshold"), ("--maps 0", "--maps")),
    *(("--images-per-prompt 0", "--images-per-prompt"), ("--clip-skip 4", "--clip-skip has to be from 0 to 3")),
    ("--reg-steps -1", "--reg-steps has to be at least 0"),
    ("--lambda-kl -2", "--lambda-kl has to be at least 0"),
    ("--solver-order 3", "--solver-order has to be 1 or 2, but is 3"),
    ("--solver-order 2", "--solver-order is an option of --scheduler dpm"),
    ("--dtype float64", "--dtype"),
    ("--dtype float16 --no-floors", "leave --no-floors out"),
    ("--seed 1 --seed 2", "1 prompt of 2 maps take 1 --seed and 2 --mask-seed, but 2 and 0"),
    ("--mask-seed 1", "1 --seed and 2 --mask-seed, but 1 and 1"),
    ("--target pear", "1 --source and 2 --target were given"),
    ("--image q.png", "2 --image were given for 1 prompt;"),
    ("--negative a --negative b", "2 --negative were given for 1 prompt;"),
    ("--source-negative \udcff", "--source-negative is not valid UTF-8"),
    ("--model someone/some-model", "no such folder; parity works on 'demo' or a local folder"),
    *(("--model .", "has no model_index.json"), ("-o x.txt", "has to end in .safetensors")),
    *(("-o nowhere/x.safetensors", "the folder nowhere of the output"), ("--isolate", "--isolate")),
)


def test_recordings_that_are_refused(work, recorded, capsys):
    for more, words in REFUSED_RECORDINGS:
        refused(capsys, record_argv(recorded.model, *more.split(" "), output="out.safetensors"), words)
    for missing in ("--image", "--source", "--target", "-o"):
        argv = record_argv(recorded.model)
        at = argv.index(missing)
        refused(capsys, argv[:at] + argv[at + 2 :], "required", missing)
    for name, value, words in (
        ("--target", SOURCE, "the same text"),
        ("--source", " ", "--source is empty"),
        ("--target", "", "--target is empty"),
        ("--image", "missing.png", "there is no picture missing.png"),
        ("--image", "g.safetensors", "not a picture"),
    ):
        argv = record_argv(recorded.model, output="out.safetensors")
        argv[argv.index(name) + 1] = value
        refused(capsys, argv, words)
    # A batch of pictures has one size, and a recording does not go into its model.
    more = ["--image", "wide.png", "--source", "a cat", "--target", "a dog"]
    refused(capsys, record_argv(recorded.model, *more, output="o.safetensors"), "64 x 48, 80 x 48", "of one size")
    shutil.copytree(recorded.model, "model")
    weights = next(Path("model/unet").glob("*.safetensors"))
    refused(capsys, record_argv("model", output=str(weights)), "is among the files of the model model")


def test_what_fails_in_the_reference_after_minutes_is_refused_at_once(work, recorded, sd2_folder, capsys):
    def argv(model, *more):
        given = ["parity", "record", *TWO, "-o", "out.safetensors", "--model", str(model), "--maps", "2"]
        return [*given, "--reg-steps", "1", "--guidance", "2", *more]

    line = refused(capsys, argv(recorded.model, *GENERATORS), "--reg-steps fails in the reference")
    assert "--lambda-auto-corr 0" in line
    refused(capsys, argv(sd2_folder), "v_prediction", "one prompt at a time, but 2 were given")
    # What the messages advise is taken: then it is PyTorch that is missing here.
    for accepted in (
        argv(recorded.model, *GENERATORS, "--lambda-auto-corr", "0"),
        argv(recorded.model, "--seed", "1"),
        argv(sd2_folder, "--invert-guidance", "1"),
    ):
        refused(capsys, accepted, "torch is not installed")


@pytest.fixture
def unloaded(monkeypatch):
    """As if the reference's side had not been imported by other tests."""
    for name in ("reference", "floors"):
        monkeypatch.delitem(sys.modules, f"mindiffedit.parity.{name}", raising=False)
        monkeypatch.delattr(mindiffedit.parity, name, raising=False)


def test_recording_without_the_reference_says_what_to_install(work, recorded, unloaded, capsys, monkeypatch):
    argv = record_argv(recorded.model, output="out.safetensors")
    install = "pip install 'mindiffedit[parity]'"
    refused(capsys, argv, "torch is not installed", install)
    for there in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, there, types.ModuleType(there))
    refused(capsys, argv, "diffusers is not installed", install)
    # Another release of it, which has no such pipeline.
    monkeypatch.setitem(sys.modules, "diffusers", types.ModuleType("diffusers"))
    refused(capsys, argv, "cannot be imported (module 'diffusers' has no attribute", install)


REFUSED_CHECKS = (
    ("--steps 5", "recorded with --steps 4, but --steps is 5"),
    ("--seed 3 --seed 4", "--seed 3, but --seed is [3, 4]"),
    ("--mask-seed 1", "recorded with no --mask-seed, but --mask-seed is 1"),
    ("--source cat", f'recorded with --source "{SOURCE}", but --source is "cat"'),
    ("--decode-latents", "--decode-latents False, but --decode-latents is True"),
    ("--scheduler dpm", '--scheduler "ddim", but --scheduler is "dpm"'),
    ("--steps 5 --eta 0.5", "--steps 4 and --eta 0.0"),
    ("--image q.png", "recorded with another picture than --image q.png"),
    ("--image p.png --image p.png", "another picture than --image p.png, p.png"),
    ("--model demo", "the recorded"),
    ("--model someone/some-model", "no such folder; parity works on 'demo' or a local folder"),
    ("--model .", "another model folder than the recorded one"),
    ("--report x.html", "x.html: the name of the output has to end in .md or .json"),
    ("--report nowhere/x.md", "the folder nowhere of the output"),
    ("--save-diff p.png/a/b", "p.png is a file; give the name of a folder"),
    *(("--device TPU", "TPU"), ("--no-floors", "--no-floors"), ("-o x.safetensors", "-o")),
)


def test_checks_that_are_refused(work, recorded, capsys):
    for more, words in REFUSED_CHECKS:
        refused(capsys, check_argv(recorded.model, *more.split()), words)
    shutil.move("g.safetensors", "g.json")
    refused(capsys, check_argv(recorded.model, "--report", "./g.json", file="g.json"), "would overwrite")


def test_other_models_and_files_that_are_no_recording(work, recorded, sd2_folder, capsys):
    """All that is refused of either is in tests/test_parity_golden.py."""
    refused(capsys, check_argv(sd2_folder), "has other weights than the recorded model", "unet/")
    whole = Path("g.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({"weight": np.ones(3, np.float32)}, "foreign.safetensors")
    rewritten("arguments.safetensors", recorded.golden, arguments={"steps": 4})
    rewritten("calls.safetensors", recorded.golden, calls={"sharpen": {}})
    rewritten("floors.safetensors", recorded.golden, floors=dict.fromkeys(("isolated", "chained"), {"mask/map": -1.0}))
    for name, words in (
        ("missing", "there is no golden file missing.safetensors"),
        ("cut", "not a whole safetensors file"),
        ("foreign", "was not written by `mindiffedit parity record`"),
        ("arguments", "does not say all that a replay needs"),
        ("calls", "does not say all that a replay needs"),
        ("floors", "the floor of mask/map has to be"),
    ):
        refused(capsys, check_argv(recorded.model, file=f"{name}.safetensors"), words)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_folders_that_are_read_only(work, recorded, capsys):
    os.mkdir("closed", 0o555)
    for argv in (
        record_argv(recorded.model, output="closed/g.safetensors"),
        check_argv(recorded.model, "--report", "closed/r.md"),
        check_argv(recorded.model, "--save-diff", "closed/a"),
    ):
        refused(capsys, argv, "no file can be written in the folder closed")


def test_an_absent_device_is_one_sentence(work, recorded, capsys, monkeypatch):
    def absent(name):
        raise RuntimeError(f"device {name} was asked for\nand is not here.")

    monkeypatch.setattr("mindiffedit.runtime.devices.require_device", absent)
    refused(capsys, check_argv(recorded.model, "--device", "ascend"), "device Ascend was asked for and is not here.")


# --- recordings that take longer ------------------------------------------------------------------------------------

SEVERAL = (
    *("--image", "p.png", "--image", "q.png", "--source", "a red apple", "--source", "a cat in the grass"),
    *("--target", "a yellow pear", "--target", "a dog in the grass", *GENERATORS),
)
SINGLE = ("--image", "odd.png", "--source", SOURCE, "--target", TARGET, "--seed", "-5")
NEGATIVES = ("negative", "invert-negative", "source-negative", "target-negative")


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv, mode",
    [
        pytest.param(SEVERAL, "graph", id="batch"),
        pytest.param(
            (
                *(*SINGLE, "--size", "56", "--eta", "0.5", "--clip-skip", "1", "--decode-latents"),
                *("--images-per-prompt", "2", "--reg-steps", "1", "--auto-corr-rolls", "2", "--lambda-kl", "5"),
                *("--invert-guidance", "3", "--mask-strength", "0.75", "--mask-threshold", "2"),
                *(word for name in NEGATIVES for word in (f"--{name}", f"a house, not {name}")),
            ),
            "pynative",
            id="everything",
        ),
        pytest.param(
            (
                *(*SEVERAL, "--eta", "1", "--images-per-prompt", "2", "--decode-latents", "--no-floors"),
                *(word for name in NEGATIVES for n in "ab" for word in (f"--{name}", f"{name} {n}")),
            ),
            "pynative",
            id="batch of everything, no floors",
        ),
        pytest.param((*SINGLE, "--scheduler", "dpm", "--solver-order", "1"), "graph", id="dpm"),
        pytest.param((*SINGLE, "--guidance", "1"), "pynative", id="no guidance"),
    ],
)
def test_round_trips(sd1_folder, tmp_path, monkeypatch, capsys, argv, mode):
    monkeypatch.chdir(tmp_path)
    parity.picture(64, 48).save("p.png")
    parity.picture(64, 48, seed=1).save("q.png")
    parity.picture(75, 51).save("odd.png")
    numbers = ("--steps", "5", "--strength", "0.8", "--maps", "2")
    if "--guidance" not in argv:
        numbers += ("--guidance", "2")
    record = ["parity", "record", *argv, *numbers, "--model", str(sd1_folder), "-o", "g.safetensors", "--quiet"]
    assert cli.main(record) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"g\.safetensors: \d+ stages, [\d.]+ MB, [\d.]+ s\n", out), out
    floors = golden.read_golden("g.safetensors").manifest["floors"]
    assert (floors is None) == ("--no-floors" in argv)
    given = [word for word in (*argv, *numbers) if word != "--no-floors"]
    for more in ((),) if mode == "graph" else ((), ("--isolate",)):
        check = check_argv(sd1_folder, *given, *more, "--mode", mode, "--report", "r.md", "--save-diff", "d")
        code = cli.main(check)
        out, err = capsys.readouterr()
        assert code == 0, out + err
        assert out.splitlines()[-1].endswith("stages are within their tolerances")
