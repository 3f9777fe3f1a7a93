"""Reports: what the table and the files say, that no content can break them, and the drawn differences."""

import json
import math
import os

import numpy as np
import PIL.Image
import pytest

from mindiffedit.parity import report
from mindiffedit.parity.metrics import Comparison, Limit, compare, compare_traces


def traces():
    """Two traces with failures of several kinds, and their limits; the first is in the inversion's step 3."""
    rng = np.random.default_rng(0)
    theirs = {
        "mask/token_ids": np.arange(6)[None],
        "mask/moments": rng.standard_normal((1, 4, 8, 6)).astype(np.float32),
        "mask/map": rng.random((1, 16, 12)),
        "mask/clamp_magnitude": np.float64(1.0),
        "mask/prompt_embeds": rng.standard_normal((2, 7, 16)).astype(np.float32),
        "invert/inverted_latents": rng.standard_normal((5, 2, 4, 8, 6)).astype(np.float32),
        "edit/step_noise": rng.standard_normal((5, 2, 4, 8, 6)).astype(np.float32),
        "edit/picture": rng.integers(0, 200, (2, 24, 20, 3), dtype=np.uint8),
    }
    theirs["mask/mask"] = (theirs["mask/map"] > 0.5).astype(np.int64)
    ours = {name: np.array(array) for name, array in theirs.items()}
    ours["mask/moments"] += np.float32(1e-5)
    ours["mask/prompt_embeds"][1] += np.float32(1e-4)
    ours["invert/inverted_latents"][2, 1, 3] += np.float32(0.5)
    ours["invert/inverted_latents"][4] += np.float32(9)
    ours["edit/step_noise"][1, 0, 0, 0, 0] = math.nan
    ours["edit/picture"][1, 3, 4, 0] += 1
    nearest = np.unravel_index(np.argmin(np.abs(theirs["mask/map"] - 0.5)), theirs["mask/map"].shape)
    ours["mask/mask"][nearest] = 1 - ours["mask/mask"][nearest]
    limits = {
        "mask/token_ids": Limit("exact", 0),
        "mask/moments": Limit("close", 1e-4),
        "mask/map": Limit("close", 1e-4),
        "mask/clamp_magnitude": Limit("close", 1e-4),
        "mask/prompt_embeds": Limit("close", 2e-4),
        "mask/mask": Limit("mask", 0.02),
        "invert/inverted_latents": Limit("close", 1e-3, stacked=True),
        "edit/step_noise": Limit("absolute", 1e-6, stacked=True),
        "edit/picture": Limit("levels", 1),
    }
    return ours, theirs, limits


def failing():
    return compare_traces(*traces())


def within():
    return [one for one in failing() if one.ok]


CONTEXT = {"golden file": "demo.safetensors", "model": "a | b <i> & *c*", "versions": "numpy 1.26.4", "seed": None}


# --- words -----------------------------------------------------------------------------------------


def test_the_verdict_names_the_first_failure_and_its_step():
    text = report.verdict(failing())
    assert text.startswith("FIRST stage out of tolerance: invert/inverted_latents, step 3 of 5: the largest")
    assert text.endswith("(2 of 9 stages are out of tolerance)")
    assert report.verdict(within()) == "all 7 stages are within their tolerances"
    assert report.verdict([]) == "no stage was compared"


def test_the_table_is_aligned_and_complete():
    lines = report.table_text(failing()).split("\n")
    assert len(lines) == 10
    starts = [lines[0].index(word) for word in ("stage", "shape", "tolerance", "verdict")]
    for line, one in zip(lines[1:], failing()):
        assert line.startswith(one.where)
        assert all(line[start - 1] == " " and line[start] != " " for start in starts[1:])
        assert line[starts[3] :].startswith("ok" if one.ok else "OUT: ")
    row = dict(zip(traces()[1], lines[1:]))
    assert "1×4×8×6" in row["mask/moments"] and "1.0e-04" in row["mask/moments"]
    assert " number " in row["mask/clamp_magnitude"] and " exact " in row["mask/token_ids"]
    assert "1.0e-06 abs" in row["edit/step_noise"] and "NaN" in row["edit/step_noise"]
    assert " 1 level " in row["edit/picture"] and "1 of 2880 values differ" in row["edit/picture"]
    assert "margin 2.0e-02" in row["mask/mask"] and "1 of them flipped" in row["mask/mask"]


def test_masks_say_how_many_pixels_differ_and_are_excepted():
    mask, values = np.array([[0, 1], [1, 0]]), np.array([[0.1, 0.9], [0.501, 0.1]])
    around = dict(kind="mask", reference_map=values, clamp_magnitude=1.0)
    for one, words in (
        (compare(mask, mask, 0.02, **around), "ok, 0 of 4 pixels differ (1 excepted)"),
        (compare(1 - mask, mask, 0.02, **around), "OUT: 3 of 4 pixels differ"),
        (compare(mask, mask, 0, kind="mask"), "ok, 0 of 4 pixels differ"),
    ):
        assert words in report.table_text([one])


def test_stages_without_numbers_have_dashes_in_the_table():
    line = report.table_text([compare(None, np.ones(3), 1, name="mask/map")]).split("\n")[1]
    assert line.split()[:5] == ["mask/map", "3", "–", "–", "–"]
    assert line.endswith("OUT: our run did not give this stage")
    assert "nan" not in report.table_text([compare(np.ones(3), None, math.nan, name="x")])


# --- report files ----------------------------------------------------------------------------------


def test_markdown():
    text = report.markdown(failing(), CONTEXT)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 9
    assert {line.replace("\\|", "").count("|") for line in lines} == {8}
    assert "**FIRST stage out of tolerance: invert/inverted\\_latents, step 3 of 5" in text
    assert "- model: a \\| b \\<i\\> & \\*c\\*" in text and "- seed: –" in text
    assert list(CONTEXT) == [line[2:].split(":")[0] for line in text.splitlines() if line.startswith("- ")]


def strictly(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_is_strict_and_has_every_field():
    zeros = np.zeros(2)
    comparisons = [*failing(), compare(zeros + 1, zeros, 1, name="edit/zero"), compare(None, zeros, 1)]
    content = strictly(report.json_text(comparisons, CONTEXT))
    assert content["passed"] is False and content["first_failure"] == "invert/inverted_latents"
    assert content["verdict"] == report.verdict(comparisons) and content["context"] == CONTEXT
    assert [stage["name"] for stage in content["stages"]] == [one.name for one in comparisons]
    fields = set(Comparison.__dataclass_fields__) | {"measure"}
    assert all(set(stage) == fields for stage in content["stages"])
    by_name = {stage["name"]: stage for stage in content["stages"]}
    inverted = by_name["invert/inverted_latents"]
    assert (inverted["step"], inverted["steps"], inverted["ok"], len(inverted["by_step"])) == (2, 5, False, 5)
    assert by_name["edit/zero"]["relative"] == "inf" and by_name[""]["max_abs"] == "nan"
    good = strictly(report.json_text(within(), {}))
    assert good["passed"] is True and good["first_failure"] is None
    assert strictly(report.json_text([], {}))["passed"] is False


def test_reports_are_written_by_extension_whole_or_not_at_all(tmp_path):
    for name, text in (("report.MD", report.markdown), ("report.json", report.json_text)):
        path = tmp_path / name
        path.write_text("old")
        with pytest.raises(AttributeError):
            report.write_report(path, [None], {})
        assert path.read_text() == "old"
        report.write_report(path, failing(), CONTEXT)
        assert path.read_text(encoding="utf-8") == text(failing(), CONTEXT)
    assert len(os.listdir(tmp_path)) == 2


def test_other_paths_are_refused(tmp_path):
    for name in ("report.html", "report.txt", "report", "report.md.gz", "", "nowhere/report.md"):
        with pytest.raises(ValueError):
            report.write_report(tmp_path / name, failing(), {})
    with pytest.raises(ValueError, match="has to end in .md or .json"):
        report.check_report_path(tmp_path / "report.html")
    assert os.listdir(tmp_path) == []


# --- drawn differences -----------------------------------------------------------------------------


def draw(folder, **changed):
    ours, theirs, limits = traces()
    ours.update(changed)
    return [path.name for path in report.save_diff(folder, compare_traces(ours, theirs, limits), ours, theirs)]


def test_failures_are_drawn_first_then_the_nearest_to_their_tolerance(tmp_path):
    folder = tmp_path / "new" / "diff"
    names = draw(folder)
    assert names == [
        "01-invert-inverted_latents-step-3-of-5.png",
        "02-edit-step_noise-step-2-of-5.png",
        "03-edit-picture.png",  # 1 of 1 levels
        "04-mask-prompt_embeds.png",
        "05-mask-moments.png",
        "06-mask-mask.png",  # flipped, but excepted
    ]
    assert sorted(os.listdir(folder)) == names
    # Stages that are misshapen or missing, and single numbers, cannot be drawn.
    changed = {"invert/inverted_latents": np.ones(3), "edit/step_noise": None, "mask/clamp_magnitude": np.float64(9)}
    assert draw(tmp_path, **changed) == [f"0{i + 1}{name[2:]}" for i, name in enumerate(names[2:])]
    assert report.save_diff(tmp_path, [], {}, {}) == []
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        draw(file)


@pytest.fixture
def panels(monkeypatch, tmp_path):
    """Draws one tensor; gives captions, and tiles as arrays."""
    drawn = []
    original = report.sheets.labelled_grid

    def watched(items, **options):
        drawn[:] = [(caption, np.asarray(tile)) for caption, tile in items]
        return original(items, **options)

    monkeypatch.setattr(report.sheets, "labelled_grid", watched)

    def panels(one, ours, theirs):
        (path,) = report.save_diff(tmp_path, [one], {one.name: ours}, {one.name: theirs})
        assert PIL.Image.open(path).mode == "RGB"
        return list(zip(*drawn))

    return panels


def test_the_step_and_item_of_the_difference_are_drawn_where_it_is(panels):
    ours, theirs, limits = traces()
    one = compare_traces(ours, theirs, limits)[5]
    captions, tiles = panels(one, ours[one.name], theirs[one.name])
    assert captions[0].startswith("invert/inverted_latents, step 3 of 5, item 2 of 2: reference, -")
    assert captions[1].startswith("ours, out of tolerance, -")
    assert captions[2] == f"difference, up to 5.0e-01, {one.relative:.1e} of the rms; allowed: 1.0e-03"
    # Four channels of 8 × 6 side by side are 24 wide; 512 // 24 pixels for each value.
    factor = 512 // 24
    assert all(tile.shape == (8 * factor, 24 * factor) for tile in tiles)
    difference = tiles[2].reshape(8, factor, 24, factor)
    assert (difference == difference[:, :1, :, :1]).all()  # blocks, not blurred
    assert (difference[:, 0, :18, 0] == 0).all() and (difference[:, 0, 18:, 0] > 250).all()  # in channel 4
    assert (tiles[0][:, : 18 * factor] == tiles[1][:, : 18 * factor]).all() and (tiles[0] != tiles[1]).any()


def test_what_is_not_finite_is_white(panels):
    ours, theirs, limits = traces()
    one = compare_traces(ours, theirs, limits)[6]
    captions, tiles = panels(one, ours[one.name], theirs[one.name])
    assert "step 2 of 5, item 1 of 2" in captions[0]
    assert tiles[1][0, 0] == tiles[2][0, 0] == 255 and (tiles[2] == 255).mean() == pytest.approx(1 / 192)
    flat, broken = np.ones((4, 4)), np.full((4, 4), math.nan)
    _, tiles = panels(compare(broken, flat, 1, name="x"), broken, flat)
    assert (tiles[0] == 0).all() and (tiles[1] == 255).all() and (tiles[2] == 255).all()


def test_pictures_do_not_wrap(panels):
    theirs = np.zeros((1, 8, 8, 3), np.uint8)
    ours = theirs.copy()
    theirs[0, 2, 3, 0] = 255
    ours[0, 5, 6, 1] = 51
    captions, tiles = panels(compare(ours, theirs, 1, kind="levels", name="edit/picture"), ours, theirs)
    assert captions[0].endswith("reference, 0 to 255") and captions[1] == "ours, out of tolerance, 0 to 51"
    assert captions[2] == "difference, up to 2.6e+02; allowed: 1 level"
    small = [tile[:: 512 // 24, :: 512 // 24] for tile in tiles]  # three channels side by side
    assert small[0][2, 3] == small[2][2, 3] == 255 and small[1][5, 8 + 6] == small[2][5, 8 + 6] == 51
    assert [np.count_nonzero(tile) for tile in small] == [1, 1, 2]


def test_every_shape_can_be_drawn(panels):
    for shape, size in (
        ((7, 16), (32 * 7, 512)),  # a matrix
        ((1, 77, 1024), (77, 1024)),  # embeddings: not enlarged
        ((3,), (170, 510)),  # one row
        ((2, 3, 16, 12), (14 * 16, 14 * 36)),  # channels side by side
        ((1, 2000), (64, 2000)),  # a line is made thick enough to be seen
        ((2, 1, 4, 8, 8), (128, 512)),
    ):
        theirs = np.random.default_rng(0).standard_normal(shape)
        ours = theirs + np.random.default_rng(1).standard_normal(shape) * 0.01
        _, tiles = panels(compare(ours, theirs, 1, name="../mask/ü b"), ours, theirs)
        assert {tile.shape for tile in tiles} == {size}, shape
