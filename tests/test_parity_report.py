"""Reports: what the table and the files say, that no content can break them, and the drawn differences."""

import html.parser
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


CONTEXT = {
    "golden file": "demo.safetensors",
    "model": "a | b <script>alert(1)</script> & *c*",
    "mode": "graph",
    "isolate": True,
    "versions": {"mindspore": "2.8.0", "numpy": "1.26.4"},
    "seed": None,
    "date": "2026-01-02",
}


# --- words -----------------------------------------------------------------------------------------


def test_the_verdict_names_the_first_failure_and_its_step():
    text = report.verdict(failing())
    assert text.startswith("FIRST stage out of tolerance: invert/inverted_latents, step 3 of 5: the largest")
    assert text.endswith("(2 of 9 stages are out of tolerance)")


def test_the_verdict_of_a_good_run_and_of_no_run():
    assert len(within()) == 7
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
    assert " number " in row["mask/clamp_magnitude"]
    assert " exact " in row["mask/token_ids"]
    assert "1.0e-06 abs" in row["edit/step_noise"] and "NaN" in row["edit/step_noise"]
    assert " 1 level " in row["edit/picture"] and "1 of 2880 values differ" in row["edit/picture"]
    assert "margin 2.0e-02" in row["mask/mask"]


def test_masks_say_how_many_pixels_differ_and_are_excepted():
    one = next(one for one in failing() if one.kind == "mask")
    assert one.ok and one.counts["excepted_differing"] == 1
    excepted = one.counts["excepted"]
    text = report.table_text([one])
    assert text.endswith(f"ok, 0 of 192 pixels differ ({excepted} excepted, 1 of them flipped)")
    mask = np.array([[0, 1], [1, 0]])
    values = np.array([[0.1, 0.9], [0.501, 0.1]])
    found = compare(mask, mask, 0.02, kind="mask", reference_map=values, clamp_magnitude=1.0)
    assert report.table_text([found]).endswith("ok, 0 of 4 pixels differ (1 excepted)")
    found = compare(1 - mask, mask, 0.02, kind="mask", reference_map=values, clamp_magnitude=1.0)
    assert "OUT: 3 of 4 pixels differ" in report.table_text([found])
    found = compare(mask, mask, 0, kind="mask")
    assert report.table_text([found]).endswith("ok, 0 of 4 pixels differ")


def test_stages_without_numbers_have_dashes_in_the_table():
    found = compare(None, np.ones(3), 1, name="mask/map")
    line = report.table_text([found]).split("\n")[1]
    assert line.split()[:5] == ["mask/map", "3", "–", "–", "–"]
    assert line.endswith("OUT: our run did not give this stage")
    assert "nan" not in report.table_text([compare(np.ones(3), None, math.nan, name="x")])


# --- report files ----------------------------------------------------------------------------------


def table_of(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_markdown():
    text = report.render(failing(), CONTEXT, "md")
    lines = table_of(text)
    assert len(lines) == 2 + 9
    bars = [line.replace("\\|", "").count("|") for line in lines]
    assert set(bars) == {8}
    assert "**FIRST stage out of tolerance: invert/inverted\\_latents, step 3 of 5" in text
    assert "- model: a \\| b \\<script\\>alert(1)\\</script\\> & \\*c\\*" in text
    assert "- isolate: yes" in text and "- versions: mindspore 2.8.0, numpy 1.26.4" in text and "- seed: –" in text
    assert list(CONTEXT) == [line[2:].split(":")[0] for line in text.splitlines() if line.startswith("- ")]


class _Page(html.parser.HTMLParser):
    """Tags that were opened and not closed, all tags, and the text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text, self.classes = [], [], "", []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.classes += [value for name, value in attributes if name == "class"]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_html_is_well_formed_escaped_and_needs_nothing_else():
    text = report.render(failing(), CONTEXT, "html")
    page = _Page()
    page.feed(text)
    assert page.open == [] and text.startswith("<!DOCTYPE html>")
    assert not {"script", "img", "link"} & set(page.tags) and "http" not in text
    assert CONTEXT["model"] in page.text
    assert "FIRST stage out of tolerance: invert/inverted_latents, step 3 of 5" in page.text
    assert page.classes.count("verdict out") == 1 and page.tags.count("tr") == len(CONTEXT) + 1 + 9
    good = report.render(within(), CONTEXT, "html")
    assert 'class="verdict ok"' in good and 'class="out"' not in good


def test_html_of_nothing_is_not_green():
    assert 'class="verdict out"' in report.render([], {}, "html")


def strictly(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_is_strict_and_has_every_field():
    zeros = np.zeros(2)
    comparisons = [*failing(), compare(zeros + 1, zeros, 1, name="edit/zero"), compare(None, zeros, 1)]
    context = {
        **CONTEXT,
        "path": report.Path("x"),
        "number": np.float32(0.5),
        "bad": math.nan,
        "pair": (1, -math.inf),
    }
    content = strictly(report.render(comparisons, context, "json"))
    assert content["passed"] is False and content["first_failure"] == "invert/inverted_latents"
    assert content["verdict"] == report.verdict(comparisons)
    assert content["context"] == {**CONTEXT, "path": "x", "number": 0.5, "bad": "nan", "pair": [1, "-inf"]}
    assert [stage["name"] for stage in content["stages"]] == [one.name for one in comparisons]
    fields = set(Comparison.__dataclass_fields__) | {"measure"}
    assert all(set(stage) == fields for stage in content["stages"])
    by_name = {stage["name"]: stage for stage in content["stages"]}
    inverted = by_name["invert/inverted_latents"]
    assert (inverted["step"], inverted["steps"], inverted["ok"], len(inverted["by_step"])) == (2, 5, False, 5)
    assert by_name["edit/zero"]["relative"] == "inf" and by_name[""]["max_abs"] == "nan"
    assert by_name["edit/step_noise"]["max_abs"] == "nan"
    good = strictly(report.render(within(), {}, "json"))
    assert good["passed"] is True and good["first_failure"] is None
    assert strictly(report.render([], {}, "json"))["passed"] is False


def test_other_kinds_are_refused():
    with pytest.raises(ValueError, match="pdf"):
        report.render([], {}, "pdf")


@pytest.mark.parametrize("name", ["report.md", "report.json", "report.html", "report.HTML"])
def test_reports_are_written_by_extension(tmp_path, name):
    path = tmp_path / name
    path.write_text("old")
    report.write_report(path, failing(), CONTEXT)
    assert path.read_text(encoding="utf-8") == report.render(failing(), CONTEXT, name.lower().split(".")[1])
    assert os.listdir(tmp_path) == [name]
    assert report.check_report_path(str(path)) == path


@pytest.mark.parametrize("name", ["report.txt", "report", "report.html.gz", "", "nowhere/report.md"])
def test_other_paths_are_refused_before_any_work(tmp_path, name):
    with pytest.raises(ValueError):
        report.check_report_path(tmp_path / name)

    class Untouchable(list):
        def __iter__(self):
            raise AssertionError("work before the path was judged")

    with pytest.raises(ValueError):
        report.write_report(tmp_path / name, Untouchable(), {})
    assert os.listdir(tmp_path) == []


def test_a_failure_while_rendering_leaves_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "report.md"
    path.write_text("old")
    with pytest.raises(AttributeError):
        report.write_report(path, [None], {})
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["report.md"]


# --- drawn differences -----------------------------------------------------------------------------


def draw(folder, worst=6, **changed):
    ours, theirs, limits = traces()
    ours.update(changed)
    return report.save_diff(folder, compare_traces(ours, theirs, limits), ours, theirs, worst=worst)


def test_failures_are_drawn_first_then_the_nearest_to_their_tolerance(tmp_path):
    folder = tmp_path / "new" / "diff"
    paths = draw(folder)
    assert [path.name for path in paths] == [
        "01-invert-inverted_latents-step3.png",
        "02-edit-step_noise-step2.png",
        "03-edit-picture.png",  # 1 of 1 levels
        "04-mask-prompt_embeds.png",
        "05-mask-moments.png",
        "06-mask-mask.png",  # flipped, but excepted
    ]
    assert sorted(os.listdir(folder)) == [path.name for path in paths]
    assert [path.name for path in draw(tmp_path / "two", worst=2)] == [path.name for path in paths[:2]]


def test_equal_missing_and_misshapen_stages_are_not_drawn(tmp_path):
    changed = {
        "invert/inverted_latents": np.ones(3),
        "edit/step_noise": None,
        "mask/clamp_magnitude": np.float64(9),
    }
    names = [path.name for path in draw(tmp_path, **changed)]
    assert names == [
        "01-edit-picture.png",
        "02-mask-prompt_embeds.png",
        "03-mask-moments.png",
        "04-mask-mask.png",
    ]
    assert report.save_diff(tmp_path, [], {}, {}) == []


def test_bad_arguments(tmp_path):
    for worst in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="worst"):
            draw(tmp_path / "x", worst=worst)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        draw(file)
    assert file.read_text() == "x" and os.listdir(tmp_path) == ["file"]


def panels(monkeypatch, comparison, ours, theirs):
    """(captions, tiles) that would be put side by side."""
    caught = []
    original = report.sheets.labelled_grid
    monkeypatch.setattr(
        report.sheets,
        "labelled_grid",
        lambda items, **options: caught.append(items) or original(items, **options),
    )
    picture = report._drawing(comparison, ours, theirs)
    assert isinstance(picture, PIL.Image.Image) and picture.mode == "RGB"
    return [caption for caption, _ in caught[0]], [np.asarray(tile) for _, tile in caught[0]]


def test_the_step_and_item_of_the_difference_are_drawn_where_it_is(monkeypatch):
    ours, theirs, limits = traces()
    one = compare_traces(ours, theirs, limits)[5]
    captions, tiles = panels(monkeypatch, one, ours[one.name], theirs[one.name])
    start = "invert/inverted_latents, step 3 of 5, item 2 of 2, 4 channels: reference, -"
    assert captions[0].startswith(start) and captions[1].startswith("ours, out of tolerance, -")
    assert captions[2] == f"difference, up to 5.0e-01, {one.relative:.1e} of the rms; allowed: 1.0e-03"
    # Four channels of 8 × 6 side by side are 24 wide; 512 // 24 pixels for each value.
    factor = 512 // 24
    assert all(tile.shape == (8 * factor, 24 * factor, 3) for tile in tiles)
    difference = tiles[2].reshape(8, factor, 24, factor, 3)
    assert (difference == difference[:, :1, :, :1]).all()  # blocks, not blurred
    assert (difference[:, 0, :18, 0] == report._DIFFERENCES[0]).all()
    assert (difference[:, 0, 18:, 0] >= (250, 235, 130)).all()  # channel 4 differs everywhere by 0.5
    assert (tiles[0][:, : 18 * factor] == tiles[1][:, : 18 * factor]).all()
    assert (tiles[0] != tiles[1]).any()


def test_values_that_are_not_finite_are_marked(monkeypatch):
    ours, theirs, limits = traces()
    one = compare_traces(ours, theirs, limits)[6]
    captions, tiles = panels(monkeypatch, one, ours[one.name], theirs[one.name])
    assert "step 2 of 5, item 1 of 2" in captions[0] and "not finite" in captions[2]
    for tile in tiles[1:]:
        assert tuple(tile[0, 0]) == report._NOT_FINITE
        assert (tile == report._NOT_FINITE).all(axis=-1).mean() == pytest.approx(1 / 192)
    assert not (tiles[0] == report._NOT_FINITE).all(axis=-1).any()


def test_pictures_keep_their_colours_and_do_not_wrap(monkeypatch):
    theirs = np.zeros((1, 8, 8, 3), np.uint8)
    ours = theirs.copy()
    theirs[0, 2, 3] = (255, 0, 0)
    ours[0, 5, 6] = (0, 1, 0)
    one = compare(ours, theirs, 1, kind="levels", name="edit/picture")
    captions, tiles = panels(monkeypatch, one, ours, theirs)
    assert captions[0] == "edit/picture: reference, 0 to 255" and captions[1] == "ours, out of tolerance, 0 to 1"
    assert captions[2] == "difference, up to 2.6e+02; allowed: 1 level"
    assert tuple(tiles[0][2 * 64, 3 * 64]) == (255, 0, 0) and tuple(tiles[1][2 * 64, 3 * 64]) == (0, 0, 0)
    assert tuple(tiles[2][2 * 64, 3 * 64]) == report._DIFFERENCES[-1]
    assert tuple(tiles[2][0, 0]) == report._DIFFERENCES[0] != tuple(tiles[2][5 * 64, 6 * 64])


@pytest.mark.parametrize(
    "shape, size",
    [
        ((7, 16), (32 * 7, 512)),  # a matrix
        ((1, 77, 1024), (77, 1024)),  # embeddings: not enlarged
        ((3,), (170, 510)),  # one row
        ((2, 3, 16, 12), (14 * 16, 14 * 36)),  # channels side by side
        ((1, 16, 16, 16), (512, 512)),  # too many channels: their mean
        ((1, 3, 64, 800), (64, 800)),  # too wide
        ((5, 1), (510, 102)),
        ((1, 2000), (64, 2000)),  # a line is made thick enough to be seen
        ((2, 1, 4, 8, 8), (128, 512)),
    ],
)
def test_every_shape_can_be_drawn(monkeypatch, shape, size):
    theirs = np.random.default_rng(0).standard_normal(shape)
    ours = theirs + np.random.default_rng(1).standard_normal(shape) * 0.01
    one = compare(ours, theirs, 1, name="mask/x")
    _, tiles = panels(monkeypatch, one, ours, theirs)
    assert {tile.shape for tile in tiles} == {(*size, 3)}


def test_constant_and_wholly_broken_tensors_can_be_drawn(monkeypatch):
    theirs, ours = np.ones((4, 4)), np.full((4, 4), math.nan)
    captions, tiles = panels(monkeypatch, compare(ours, theirs, 1, name="x"), ours, theirs)
    assert (tiles[1] == report._NOT_FINITE).all() and (tiles[2] == report._NOT_FINITE).all()
    assert (tiles[0] == report._VALUES[0]).all()


def test_names_make_safe_files(tmp_path):
    name = "../mask/ü b"
    ours, theirs = np.zeros((2, 2)), np.ones((2, 2))
    one = compare(ours, theirs, 1e-3, name=name)
    paths = report.save_diff(tmp_path / "diff", [one], {name: ours}, {name: theirs})
    assert paths == [tmp_path / "diff" / "01-mask-b.png"]
    assert PIL.Image.open(paths[0]).size[0] > 3 * 500
