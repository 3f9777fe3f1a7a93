"""scripts/evaluate_editing.py and what it rests on: scenes, metrics, the judge, the bookkeeping."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import demo_scenes as scenes  # noqa: E402
import evaluate_editing as evaluation  # noqa: E402
import scene_classifier  # noqa: E402

pytestmark = pytest.mark.tools

# --- scenes ----------------------------------------------------------------------------------------


def test_a_seed_names_a_scene():
    first, second, other = (scenes.sample_scene(np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert first == second and first != other
    picture, masks = scenes.draw_scene(first)
    again, masks_again = scenes.draw_scene(second)
    assert np.array_equal(np.asarray(picture), np.asarray(again)) and np.array_equal(masks, masks_again)
    assert not np.array_equal(np.asarray(picture), np.asarray(scenes.draw_scene(other)[0]))


@pytest.mark.parametrize("seed", range(12))
def test_masks_are_where_the_objects_are(seed):
    scene = scenes.sample_scene(np.random.default_rng(seed))
    picture, masks = scenes.draw_scene(scene)
    assert picture.size == (scenes.SIZE, scenes.SIZE) and picture.mode == "RGB"
    assert masks.shape == (len(scene.objects), scenes.SIZE, scenes.SIZE)
    assert masks.min() >= 0 and masks.max() <= 1
    covered = masks > 0.5
    assert (covered.sum((1, 2)) > 300).all(), "an object is nearly invisible"
    assert (covered.sum((1, 2)) < scenes.SIZE**2 / 2).all(), "an object is the whole picture"
    assert covered.sum(0).max() == 1, "two objects overlap"
    for item, mask in zip(scene.objects, covered):
        rows, columns = np.nonzero(mask)
        centre = np.array([columns.mean(), rows.mean()])
        assert np.abs(centre - (item.x, item.y)).max() < item.radius / 2
    # Repainting an object changes its own pixels and no others.
    for i, mask in enumerate(masks):
        colour = next(c for c in scenes.COLOURS if c != scene.objects[i].colour)
        repainted = np.asarray(scenes.draw_scene(scene.replaced(i, colour=colour))[0], int)
        changed = np.abs(repainted - np.asarray(picture)).max(-1) > 0
        assert changed[mask > 0.99].mean() > 0.5 and not changed[mask == 0].any()


def test_captions_say_what_is_drawn_in_known_words():
    known = set(scenes.vocabulary())
    for seed in range(200):
        scene = scenes.sample_scene(np.random.default_rng(seed))
        words = scene.caption.split()
        assert set(words) <= known
        for item in scene.objects:
            assert words[words.index(item.kind) - 1] == item.colour
        assert scene.caption.endswith(f" on {scenes.with_article(scene.background)}")
        for previous, word in zip(words, words[1:]):
            if previous in ("a", "an"):
                assert (previous == "an") == (word[0] in "aeiou")
    one = scenes.SceneObject("apple", "orange", 64, 64, 30)
    assert scenes.Scene((one,), "stone floor", 0).caption == "an orange apple on a stone floor"


def test_replacing_an_object_changes_that_word_only():
    scene = scenes.sample_scene(np.random.default_rng(1), number_of_objects=2)
    other = next(k for k in scenes.KINDS if k not in {item.kind for item in scene.objects})
    changed = scene.replaced(1, kind=other)
    assert changed.objects[0] == scene.objects[0]
    assert changed.objects[1].kind == other and changed.objects[1].colour == scene.objects[1].colour
    assert changed.caption == scene.caption.replace(scene.objects[1].kind, other)


# --- metrics ---------------------------------------------------------------------------------------


def test_iou_of_known_cases():
    left = np.zeros((4, 4), bool)
    left[:, :2] = True
    top = np.zeros((4, 4), bool)
    top[:2] = True
    empty = np.zeros((4, 4), bool)
    assert evaluation.iou(left, left) == 1
    assert evaluation.iou(left, ~left) == 0
    assert evaluation.iou(left, top) == pytest.approx(4 / 12)
    assert evaluation.iou(left, np.ones((4, 4), bool)) == 0.5
    assert evaluation.iou(empty, left) == 0 and evaluation.iou(empty, empty) == 0


@pytest.mark.parametrize("truth", [np.zeros((4, 5), bool), np.zeros((4, 4), int), np.zeros((1, 4, 4), bool)])
def test_iou_refuses_what_would_broadcast_or_round(truth):
    with pytest.raises(ValueError, match="boolean arrays of one shape"):
        evaluation.iou(np.zeros((4, 4), bool), truth)


def test_psnr_of_known_cases():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 246, (8, 9, 3)).astype(np.uint8)
    assert evaluation.psnr(a, a) == evaluation.HIGHEST_PSNR
    assert evaluation.psnr(a, a + np.uint8(10)) == pytest.approx(10 * math.log10(255**2 / 100), abs=1e-12)
    black, white = np.zeros_like(a), np.full_like(a, 255)
    assert evaluation.psnr(black, white) == 0
    # 200 - 210 wraps around to 246 in uint8; the order must not matter.
    assert evaluation.psnr(a, a + np.uint8(10)) == evaluation.psnr(a + np.uint8(10), a)


def test_psnr_of_a_part():
    a = np.zeros((4, 4, 3), np.uint8)
    b = a.copy()
    b[0] = 51
    outside = np.ones((4, 4), bool)
    outside[0] = False
    assert evaluation.psnr(a, b, outside) == evaluation.HIGHEST_PSNR
    assert evaluation.psnr(a, b, ~outside) == pytest.approx(20 * math.log10(255 / 51))
    assert evaluation.psnr(a, b) == pytest.approx(20 * math.log10(255 / 51) + 10 * math.log10(4))


def test_psnr_refuses_other_types_shapes_and_nothing():
    a = np.zeros((4, 4, 3), np.uint8)
    for b in (a.astype(np.float32), a.astype(int), a[:3]):
        with pytest.raises(ValueError, match="uint8"):
            evaluation.psnr(a, b)
    with pytest.raises(ValueError, match="no pixel"):
        evaluation.psnr(a, a, np.zeros((4, 4), bool))


def test_a_mask_is_enlarged_by_nearest_neighbour():
    mask = np.array([[0, 1], [1, 0]])
    large = evaluation.enlarged(mask, 6)
    assert large.dtype == bool and large.shape == (6, 6)
    assert not large[:3, :3].any() and large[:3, 3:].all() and large[3:, :3].all() and not large[3:, 3:].any()
    with pytest.raises(ValueError, match="divide"):
        evaluation.enlarged(np.zeros((4, 4)), 6)


# --- the judge -------------------------------------------------------------------------------------


def random_weights(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {f"convs.{i}": (b, a, 3, 3) for i, (a, b) in enumerate([(3, 16), (16, 32), (32, 48)])}
    shapes |= {"hidden": (64, 48 * 36), "kind": (len(scenes.KINDS), 64), "colour": (len(scenes.COLOURS), 64)}
    weights = {}
    for name, shape in shapes.items():
        spread = 1 / math.sqrt(np.prod(shape[1:]))
        weights[f"{name}.weight"] = (rng.standard_normal(shape) * spread).astype(np.float32)
        weights[f"{name}.bias"] = rng.standard_normal(shape[0]).astype(np.float32) * np.float32(0.1)
    return weights


def test_the_numpy_network_equals_torch():
    torch = pytest.importorskip("torch")

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            sizes = (3, 16, 32, 48)
            self.convs = torch.nn.ModuleList(
                torch.nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(sizes, sizes[1:])
            )
            self.hidden = torch.nn.Linear(48 * 36, 64)
            self.kind = torch.nn.Linear(64, len(scenes.KINDS))
            self.colour = torch.nn.Linear(64, len(scenes.COLOURS))

        def forward(self, x):
            for conv in self.convs:
                x = torch.relu(conv(x))
            x = torch.relu(self.hidden(x.flatten(1)))
            return self.kind(x), self.colour(x)

    weights = random_weights()
    network = Network().double()
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
    with pytest.raises(FileNotFoundError, match="train_demo_checkpoint"):
        scene_classifier.SceneClassifier.load(Path("nowhere.safetensors"))


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


@pytest.mark.skipif(not scene_classifier.WEIGHTS.is_file(), reason="the judge has not been trained yet")
def test_the_shipped_judge_knows_drawn_objects():
    """Also when the picture is blurred, as edited ones are; and it is no constant."""
    from PIL import ImageFilter

    judge, right = scene_classifier.SceneClassifier.load(), []
    for index in range(60):
        edit = evaluation.sample_edit(1234, index)
        picture, masks = scenes.draw_scene(edit.target)
        for version in (picture, picture.filter(ImageFilter.GaussianBlur(1))):
            kind, colour = judge(scene_classifier.object_crop(np.asarray(version), masks[edit.which])[None])
            right.append((kind[0], colour[0]) == edit.wanted)
    assert np.mean(right) > 0.95


# --- edits and bookkeeping -------------------------------------------------------------------------


def test_edits_change_one_thing_and_follow_from_their_number():
    edits = [evaluation.sample_edit(5, index) for index in range(60)]
    assert edits[:3] == [evaluation.sample_edit(5, index) for index in range(3)]
    assert edits[0] != evaluation.sample_edit(6, 0)
    assert [edit.what for edit in edits[:4]] == ["kind", "colour", "kind", "colour"]
    for edit in edits:
        before, after = edit.source.objects, edit.target.objects
        assert [a == b for a, b in zip(before, after)].count(False) == 1
        old, new = before[edit.which], after[edit.which]
        assert (old.kind != new.kind) == (edit.what == "kind")
        assert (old.colour != new.colour) == (edit.what == "colour")
        assert len({item.kind for item in after}) == len({item.colour for item in after}) == len(after)
        assert edit.source.caption != edit.target.caption
        assert edit.wanted == (scenes.KINDS.index(new.kind), list(scenes.COLOURS).index(new.colour))


class Oracle:
    """A pipeline's interface over drawn scenes: knows masks and targets, edits perfectly or not at all."""

    def __init__(self, edits, perfect=True):
        self.by_source = {edit.source.caption: edit for edit in edits}
        self.perfect, self.pipeline, self.batches = perfect, self, []

    def generator(self, source):
        return source

    def array(self, tensor):
        return tensor

    def vae_round_trip(self, pictures):
        return [Image.fromarray(np.asarray(picture) // 2 * 2) for picture in pictures]

    def generate_mask(self, image, source_prompt, target_prompt, **_):
        assert isinstance(source_prompt, str) and not isinstance(image, list), "one picture at a time"
        edit = self.by_source[source_prompt]
        assert target_prompt == edit.target.caption
        covered = scenes.draw_scene(edit.source)[1][edit.which]
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
        return SimpleNamespace(images=[scenes.draw_scene(scene)[0] for scene in chosen])


class ColourJudge:
    """Sees the colour of the crop's middle; trusts the caller with the kind."""

    def __call__(self, crops):
        middle = crops[:, 20:28, 20:28].reshape(len(crops), -1, 3).mean(1)
        known = np.array(list(scenes.COLOURS.values()), float)
        return np.zeros(len(crops), int), np.abs(middle[:, None] - known).sum(-1).argmin(1)


def run(perfect, judge, count=6, batch=4):
    settings = dict(
        steps=5, strength=0.8, guidance=7.5, invert_guidance=1.0, maps=2, mask_strength=0.5, mask_threshold=3.0
    )
    oracle = Oracle([evaluation.sample_edit(2, index) for index in range(count)], perfect)
    return oracle, *evaluation.evaluate(
        oracle, judge, settings, count=count, seed=2, batch=batch, reconstructions=3, keep_pictures=2
    )


@pytest.fixture(scope="module")
def weak_judge():
    return scene_classifier.SceneClassifier(random_weights())


def test_a_perfect_editor_scores_as_one():
    oracle, results, kept = run(True, ColourJudge())
    assert oracle.batches == [4, 4, 4], "batches keep their size: two of edits, one of reconstructions"
    assert len(results["records"]) == 6 and [r["index"] for r in results["records"]] == list(range(6))
    assert results["kind"]["edits"] == results["colour"]["edits"] == 3 and results["all"]["edits"] == 6
    assert results["all"]["mask_iou"] > 0.85  # the grid is four pixels coarse
    assert results["colour"]["psnr_outside"] > 40  # only the soft rim changes
    assert results["colour"]["colour_seen"] == 1
    assert results["kind"]["psnr_outside_either"] > results["kind"]["psnr_outside"]
    assert results["goals"]["mask_iou"]["passed"] and results["goals"]["psnr_outside"]["passed"]
    assert results["reconstruction"]["pictures"] == 3
    assert results["reconstruction"]["psnr_inversion"] == evaluation.HIGHEST_PSNR
    assert 45 < results["reconstruction"]["psnr_vae"] < 60
    text = evaluation.table(results)
    assert text.count("PASS") + text.count("MISS") == len(evaluation.GOALS)
    assert evaluation.contact_sheet(kept).size[0] > 4 * scenes.SIZE


def test_an_editor_that_does_nothing_is_found_out():
    _, results, _ = run(False, ColourJudge())
    assert results["all"]["psnr_outside"] == evaluation.HIGHEST_PSNR
    assert results["colour"]["colour_seen"] == 0
    assert results["all"]["target_seen"] == results["all"]["seen_unedited"]
    assert not results["goals"]["target_seen"]["passed"]
    assert "MISS" in evaluation.table(results)


def test_results_do_not_depend_on_the_batch(weak_judge):
    first, second = run(True, weak_judge, batch=4)[1], run(True, weak_judge, batch=6)[1]
    assert first["records"] == second["records"]


def test_averages_refuse_nan_and_bear_no_edits():
    record = {name: 0.5 for name in evaluation.AVERAGED}
    assert evaluation.averages([record, record])["mask_iou"] == 0.5
    assert evaluation.averages([])["mask_iou"] is None
    with pytest.raises(ArithmeticError, match="mask_iou"):
        evaluation.averages([record, {**record, "mask_iou": float("nan")}])


def test_importing_needs_neither_mindspore_nor_torch():
    import subprocess

    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import evaluate_editing; "
        "sys.exit(bool({'mindspore', 'mindone', 'torch', 'diffusers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(SCRIPTS)], check=False).returncode == 0


def test_the_exit_code_is_zero_unless_asked(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(evaluation.scene_classifier.SceneClassifier, "load", lambda path: ColourJudge())
    edits = [evaluation.sample_edit(3, index) for index in range(2)]
    monkeypatch.setattr(evaluation, "MindSporeEditor", lambda model, mode: Oracle(edits, perfect=False))
    arguments = ["--scenes", "2", "--seed", "3", "--model", str(tmp_path), "--json", str(tmp_path / "r.json")]
    assert evaluation.main(arguments) == 0
    assert evaluation.main([*arguments, "--check"]) == 1
    assert "MISS" in capsys.readouterr().out
    import json

    written = json.loads((tmp_path / "r.json").read_text())
    assert written["scenes"] == 2 and written["settings"]["steps"] == evaluation.demo.SETTINGS["steps"]
    assert len(written["records"]) == 2
