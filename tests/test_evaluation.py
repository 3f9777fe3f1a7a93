"""scripts/evaluate_editing.py and what it rests on: scenes, metrics, the judge, the bookkeeping."""

import json
import math
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import compare_editing  # noqa: E402
import demo_scenes as scenes  # noqa: E402
import editing_measures as measures  # noqa: E402
import evaluate_editing as evaluation  # noqa: E402
import pareto_editing  # noqa: E402
import reports  # noqa: E402
import scene_classifier  # noqa: E402

pytestmark = pytest.mark.tools

# --- metrics ---------------------------------------------------------------------------------------


def test_iou_of_known_cases():
    left, top, empty = np.zeros((3, 4, 4), bool)
    left[:, :2] = top[:2] = True
    assert measures.iou(left, left) == 1 and measures.iou(left, ~left) == 0
    assert measures.iou(left, top) == pytest.approx(4 / 12)
    assert measures.iou(empty, left) == 0 and measures.iou(empty, empty) == 0
    for truth in (np.zeros((4, 5), bool), np.zeros((4, 4), int), np.zeros((1, 4, 4), bool)):
        with pytest.raises(ValueError, match="boolean arrays of one shape"):
            measures.iou(left, truth)


def test_psnr_of_known_cases():
    a = np.random.default_rng(0).integers(0, 246, (8, 9, 3)).astype(np.uint8)
    brighter = a + np.uint8(10)
    assert measures.psnr(a, a) == measures.EXACT
    assert measures.psnr(a, brighter) == pytest.approx(10 * math.log10(255**2 / 100), abs=1e-12)
    assert measures.psnr(np.zeros_like(a), np.full_like(a, 255)) == 0
    # 200 - 210 wraps around to 246 in uint8; the order must not matter.
    assert measures.psnr(a, brighter) == measures.psnr(brighter, a)
    top = np.zeros((8, 9), bool)
    top[:2] = True
    part = np.where(top[..., None], brighter, a)
    assert measures.psnr(a, part, ~top) == measures.EXACT
    assert measures.psnr(a, part, top) == measures.psnr(a, brighter)
    assert measures.psnr(a, part) == pytest.approx(measures.psnr(a, brighter) + 10 * math.log10(4))
    for b in (a.astype(np.float32), a.astype(int), a[:3]):
        with pytest.raises(ValueError, match="uint8"):
            measures.psnr(a, b)
    with pytest.raises(ValueError, match="no pixel"):
        measures.psnr(a, a, np.zeros((8, 9), bool))


def test_a_mask_is_enlarged_by_nearest_neighbour():
    large = measures.enlarged(np.array([[0, 1], [1, 0]]), 6)
    assert large.dtype == bool and large.shape == (6, 6)
    assert not large[:3, :3].any() and large[:3, 3:].all() and large[3:, :3].all() and not large[3:, 3:].any()
    with pytest.raises(ValueError, match="divide"):
        measures.enlarged(np.zeros((4, 4)), 6)


# --- the judge -------------------------------------------------------------------------------------


def random_weights(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {f"convs.{i}": (b, a, 3, 3) for i, (a, b) in enumerate([(3, 24), (24, 48), (48, 64)])}
    kinds, colours = len(scenes.SEEN_KINDS), len(scenes.SEEN_COLOURS)
    shapes |= {"hidden": (96, 64 * 36), "kind": (kinds, 96), "colour": (colours, 96)}
    weights = {}
    for name, shape in shapes.items():
        spread = 1 / math.sqrt(np.prod(shape[1:]))
        weights[f"{name}.weight"] = (rng.standard_normal(shape) * spread).astype(np.float32)
        weights[f"{name}.bias"] = rng.standard_normal(shape[0]).astype(np.float32) * np.float32(0.1)
    return weights


def test_the_numpy_network_equals_torch():
    torch = pytest.importorskip("torch")
    from train_demo_checkpoint import Classifier

    weights = random_weights()
    network = Classifier().double()
    network.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    crops = np.random.default_rng(1).integers(0, 256, (5, 48, 48, 3)).astype(np.uint8)
    with torch.no_grad():
        expected = network(torch.from_numpy(crops).permute(0, 3, 1, 2).double() / 127.5 - 1)
    judge = scene_classifier.SceneClassifier(weights)
    for ours, theirs in zip(judge.logits(crops), expected):
        assert ours.std() > 0.01
        # float64 on both sides: only the order of summation differs. Seen: 1e-15.
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-12)
    kinds, colours = judge(crops)
    assert np.array_equal(kinds, expected[0].argmax(1)) and np.array_equal(colours, expected[1].argmax(1))


def test_weights_that_do_not_fit_are_named():
    weights = random_weights()
    weights["extra.weight"] = weights.pop("hidden.bias")
    with pytest.raises(ValueError, match=r"missing \['hidden.bias'\], unknown \['extra.weight'\]"):
        scene_classifier.SceneClassifier(weights)


def test_the_crop_is_a_square_around_the_object():
    picture = np.zeros((100, 120, 3), np.uint8)
    picture[40:60, 70:86] = (10, 200, 30)  # 20 high, 16 wide
    mask = np.zeros((100, 120))
    mask[40:60, 70:86] = 1
    crop = scene_classifier.object_crop(picture, mask)
    assert crop.shape == (48, 48, 3) and crop.dtype == np.uint8
    rows, columns = np.nonzero(crop[..., 1] > 100)
    # The side is 1.125 times the larger extent between pixel centres (19): 48 pixels are 21.4 of the picture.
    assert np.ptp(rows) + 1 == pytest.approx(20 / 21.375 * 48, abs=1.5)
    assert np.ptp(columns) + 1 == pytest.approx(16 / 21.375 * 48, abs=1.5)
    for places in (rows, columns):
        assert abs((places.min() + places.max()) / 2 - 23.5) <= 1
    with pytest.raises(ValueError, match="empty"):
        scene_classifier.object_crop(picture, np.zeros((100, 120)))


def test_the_shipped_judge_knows_drawn_objects():
    """Also when the picture is blurred, as edited ones are; and it is no constant."""
    from PIL import ImageFilter

    judge, right = scene_classifier.SceneClassifier.load(), []
    for index in range(60):
        edit = measures.sample_edit(1234, index)
        drawing, place = place_of(edit)
        for version in (drawing.picture, drawing.picture.filter(ImageFilter.GaussianBlur(1))):
            kind, colour = judge(scene_classifier.object_crop(np.asarray(version), place)[None])
            right.append((kind[0], colour[0]) == edit.wanted)
    assert np.mean(right) > 0.95


def place_of(edit):
    """The drawn target, and where the judge should look."""
    target = scenes.draw_scene(edit.target)
    if edit.what == "removal":
        return target, edit.changed(scenes.draw_scene(edit.source), target)[0]
    return target, target.subject[edit.which]


# --- edits and bookkeeping -------------------------------------------------------------------------


def test_edits_change_one_thing_and_follow_from_their_number():
    edits = [measures.sample_edit(5, index) for index in range(60)]
    assert edits[:3] == [measures.sample_edit(5, index) for index in range(3)]
    assert edits[0] != measures.sample_edit(6, 0)
    assert tuple(edit.what for edit in edits[:5]) == measures.WHATS
    for edit in edits:
        before, after = edit.source.parts, edit.target.parts
        assert edit.source.caption != edit.target.caption
        kind, colour = (names[i] for names, i in zip((scenes.SEEN_KINDS, scenes.SEEN_COLOURS), edit.wanted))
        old, new = edit.changed(scenes.draw_scene(edit.source), scenes.draw_scene(edit.target))
        assert old.any() and new.any() == (edit.what != "removal")
        if edit.what == "removal":
            assert after == before[: edit.which] + before[edit.which + 1 :] and (kind, colour) == ("nothing", "none")
            continue
        assert [a == b for a, b in zip(before, after)].count(False) == 1
        source, target = before[edit.which], after[edit.which]
        assert target.kind == kind and (getattr(target, "colour", None) or "none") == colour
        assert (source.kind != target.kind) == (edit.what != "colour")
        assert isinstance(source, scenes.Filling) == (edit.what == "contents")
        if edit.what == "contents" and source.container != target.container:
            assert old.sum() > 1.5 * (scenes.draw_scene(edit.source).subject[edit.which] > 0.5).sum()
    assert len({edit.target.parts[edit.which].container for edit in edits if edit.what == "contents"}) == 2


class Oracle:
    """A pipeline's interface over drawn scenes: knows masks and targets, edits perfectly or not at all."""

    def __init__(self, edits, perfect=True):
        self.by_source = {edit.source.caption: edit for edit in edits}
        self.perfect, self.pipeline, self.batches, self.edits = perfect, self, [], []
        self.unet_batch_size = 1

    def generator(self, source):
        return source

    def vae_round_trip(self, pictures):
        return [Image.fromarray(np.asarray(picture) // 2 * 2) for picture in pictures]

    def generate_mask(self, image, source_prompt, target_prompt, **_):
        assert isinstance(source_prompt, str) and not isinstance(image, list), "one picture at a time"
        edit = self.by_source[source_prompt]
        assert target_prompt == edit.target.caption
        covered = np.any(edit.changed(scenes.draw_scene(edit.source), scenes.draw_scene(edit.target)), 0)
        return (covered.reshape(1, 32, 4, 32, 4).mean((2, 4)) > 0.5).astype(int)

    def invert(self, prompt, image, generator, **_):
        assert len(prompt) == len(image) == len(generator)
        self.batches.append(len(prompt))
        self.noise = [g.standard_normal() for g in generator]
        return SimpleNamespace(latents=np.zeros((len(prompt), 3, 4, 32, 32), np.float32))

    def __call__(self, prompt, mask_image, image_latents, negative_prompt=None, **_):
        assert mask_image.shape == (len(prompt), 32, 32) and len(image_latents) == len(prompt)
        edits = [self.by_source[source] for source in (negative_prompt or prompt)]
        target = negative_prompt is not None and self.perfect
        chosen = [edit.target if target else edit.source for edit in edits]
        return SimpleNamespace(images=[scenes.draw_scene(scene).picture for scene in chosen])

    def edit(self, image, source_prompt, target_prompt, **options):
        self.edits.append(options)
        masks = [self.generate_mask(*each)[0] for each in zip(image, source_prompt, target_prompt)]
        images = self(target_prompt, np.array(masks), image, source_prompt).images
        return SimpleNamespace(mask_image=np.array(masks), images=images)


class PixelJudge:
    """Knows the drawn targets by their pixels, and takes everything else for what nobody asked for."""

    def __init__(self, seed, count=6):
        self.known = {}
        for index in range(count):
            edit = measures.sample_edit(seed, index)
            drawing, place = place_of(edit)
            crop = scene_classifier.object_crop(np.asarray(drawing.picture), place)
            self.known[crop.tobytes()] = edit.wanted

    def __call__(self, crops):
        seen = [self.known.get(crop.tobytes(), (-1, -1)) for crop in crops]
        return np.array([kind for kind, _ in seen]), np.array([colour for _, colour in seen])


SETTINGS = dict(steps=5, strength=0.8, guidance=7.5, invert_guidance=1.0, maps=2, mask_strength=0.5, mask_threshold=3.0)


def run(perfect, judge, count=6, batch=4):
    oracle = Oracle([measures.sample_edit(2, index) for index in range(count)], perfect)
    return oracle, *evaluation.evaluate(
        oracle, judge, SETTINGS, count=count, seed=2, batch=batch, reconstructions=3, keep_pictures=2
    )


def test_a_perfect_editor_scores_as_one():
    oracle, results, kept = run(True, PixelJudge(2))
    assert oracle.batches == [4, 4, 3], "two of edits, of one size, and one of reconstructions"
    assert len(results["records"]) == 6 and [r["index"] for r in results["records"]] == list(range(6))
    assert [results[what]["edits"] for what in ("all", "kind", "colour", "contents", "removal")] == [6, 3, 1, 1, 1]
    assert results["all"]["mask_iou"] > 0.85  # the grid is four pixels coarse
    assert results["all"]["mask_iou"] > results["all"]["mask_iou_old"]
    assert results["colour"]["psnr_outside"] > 40  # only the soft rim changes
    assert results["all"]["target_seen"] == results["all"]["removed"] == results["all"]["seen_drawn"] == 1
    assert results["all"]["seen_unedited"] == 0
    assert results["all"]["psnr_vacated"] == results["removal"]["psnr_vacated"] == measures.EXACT
    assert results["colour"]["psnr_vacated"] is None, "nothing is vacated"
    assert results["goals"]["mask_iou"]["passed"] and results["goals"]["psnr_outside"]["passed"]
    assert results["reconstruction"]["pictures"] == 3
    assert results["reconstruction"]["psnr_inversion"] == measures.EXACT
    assert 45 < results["reconstruction"]["psnr_vae"] < 60
    text = evaluation.table(results)
    assert text.count("PASS") + text.count("MISS") == len(evaluation.GOALS)
    assert evaluation.contact_sheet(kept).size[0] > 4 * scenes.SIZE


def test_an_editor_that_does_nothing_is_found_out():
    _, results, _ = run(False, PixelJudge(2))
    assert results["all"]["psnr_outside"] == measures.EXACT
    assert results["all"]["target_seen"] == results["all"]["removed"] == results["all"]["seen_unedited"] == 0
    assert results["removal"]["psnr_vacated"] < 20, "the old object stands there"
    assert not results["goals"]["target_seen"]["passed"]
    assert "MISS" in evaluation.table(results)


def test_results_do_not_depend_on_the_batch():
    judge = scene_classifier.SceneClassifier(random_weights())
    first, second = run(True, judge, batch=4)[1], run(True, judge, batch=6)[1]
    assert first["records"] == second["records"]


def test_a_comparison_has_every_part(tmp_path):
    """A perfect editor on both sides; each line of the ablation changes one option of edit()."""
    edits = [measures.sample_edit(2, index) for index in range(5)]
    oracle, done = Oracle(edits), []
    results, sheet = compare_editing.compare(
        oracle,
        PixelJudge(2),
        SETTINGS,
        count=5,
        seed=2,
        batch=2,
        ablation=2,
        rebuilt=2,
        timed=1,
        progress=lambda name, count: done.append((name, count)),
    )
    assert oracle.unet_batch_size == 1 and done[:3] == [("reference", 2), ("reference", 2), ("reference", 1)]
    usual, *others = [options for options in oracle.edits if "paste_back" in options][2:]  # the last of three batches
    names = [
        {name for name in options if options[name] != usual.get(name, "usual")} - {"generator"} for options in others
    ]
    wanted = [
        set(changes) for part in (compare_editing.CORRECTIONS, compare_editing.EXTRAS) for changes in part.values()
    ]
    assert names == wanted
    assert results["parties"]["edit()"]["psnr_outside_mask"] == measures.EXACT
    assert results["parties"]["edit()"]["mask_iou"] == results["parties"]["reference"]["mask_iou"] > 0.8
    assert results["goals"]["outside the feathered mask"]["passed"] and len(results["goals"]) == 5
    assert set(results["reconstruction"].values()) == {measures.EXACT}
    rows = [line for line in reports.comparison_tables(results)["ablation"].splitlines() if " exact |" in line]
    assert any(line.startswith("| with: pasted back (C5)") for line in rows)
    assert sheet.size[1] > 12 * scenes.SIZE


def test_a_pareto_run_has_every_part(monkeypatch):
    """A perfect editor, whose UNet costs what each preset is told to."""
    edits = [measures.sample_edit(2, index) for index in range(3)]
    oracle, calls = Oracle(edits), Counter()
    monkeypatch.setattr(oracle, "_stages", SimpleNamespace(calls=calls), raising=False)

    def costly(edit):
        def run(pictures, *prompts, **options):
            calls.update(rows=len(pictures) * {"exact": 58, "balanced": 30, "fast": 15}[options["preset"]])
            calls.update(shallow_rows=len(pictures) * (options["preset"] == "fast"))
            return edit(pictures, *prompts, **options)

        return run

    monkeypatch.setattr(oracle, "edit", costly(oracle.edit))
    results = pareto_editing.pareto(
        oracle,
        PixelJudge(2),
        SETTINGS,
        count=3,
        seed=2,
        batch=2,
        ablation=2,
        rebuilt=1,
        timed=1,
        progress=lambda *_: None,
    )
    settings = results["settings"]
    assert list(settings) == list(pareto_editing.FAMILY)
    assert [settings[name]["rows"] for name in ("exact", "balanced", "fast")] == [58, 30, 15]
    assert settings["fast"]["shallow"] == 1 and settings["fast"]["seconds"] > 0
    assert settings["balanced"]["edits"] == 3 and settings["3 points"]["edits"] == 2
    assert settings["balanced"]["against_exact"]["target_seen"] == [0, 0, 0]
    assert all(goal["passed"] for goal in results["goals"].values())
    assert set(results["rebuilt"]["DDIM"].values()) == {measures.EXACT}
    tables = reports.pareto_tables(results)
    assert "| balanced | 30 | - |" in tables["pareto"] and "| fast | 15 | 1 |" in tables["pareto"]
    picture = ElementTree.fromstring(reports.pareto_curve(results))
    assert len(picture.findall("{*}circle")) == len(settings)
    # Scenes are paired: what both see or miss does not count.
    seen = [{"target_seen": value} for value in (True, False, None, True, True)]
    worse = [{"target_seen": value} for value in (True, False, None, False, True)]
    mean, low, high = pareto_editing.differences(worse, seen, "target_seen")
    assert mean == -0.25 and low < -0.25 < high <= 0


def test_averages_refuse_nan_and_bear_no_edits():
    record = {name: 0.5 for name in measures.AVERAGED}
    assert measures.averages([record, record])["mask_iou"] == 0.5
    assert measures.averages([])["mask_iou"] is None
    with pytest.raises(ArithmeticError, match="mask_iou"):
        measures.averages([record, {**record, "mask_iou": float("nan")}])


def test_the_exit_code_is_zero_unless_asked(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scene_classifier.SceneClassifier, "load", lambda path: PixelJudge(3))
    edits = [measures.sample_edit(3, index) for index in range(2)]
    monkeypatch.setattr(measures, "MindSporeEditor", lambda model, mode: Oracle(edits, perfect=False))
    arguments = ["--scenes", "2", "--seed", "3", "--model", str(tmp_path), "--json", str(tmp_path / "r.json")]
    assert evaluation.main(arguments) == 0
    assert evaluation.main([*arguments, "--check"]) == 1
    assert "MISS" in capsys.readouterr().out
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["scenes"] == 2 and written["settings"]["steps"] == evaluation.demo.SETTINGS["steps"]
    assert len(written["records"]) == 2
