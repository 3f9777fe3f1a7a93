"""Contact sheets: which values are tried, what is computed how often, and what is in which cell."""

import json
import os

import numpy as np
import PIL.Image
import pytest
from test_cli import (  # noqa: F401  (work is a fixture)
    SOURCE,
    TARGET,
    TEXTS,
    FakePipeline,
    arguments,
    edit,
    invert,
    ran,
    refused,
    stages,
    work,
)

from mindiffedit import masks
from mindiffedit.cli import command as cli
from mindiffedit.cli import sweeps

MASK = ["mask", "p.png", *TEXTS, "--mask-threshold", "3", "--mask-level", "0.5", "--mask-smoothing", "0",
        "--mask-edges", "0", "--no-soft-mask"]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(request):
    """Every test is in the folder of test_cli, with its picture and stand-ins."""
    return request.getfixturevalue("work")


@pytest.fixture
def sheets(monkeypatch):
    """The arguments of every contact sheet that is drawn."""
    drawn = []
    original = masks.contact_sheet

    def contact_sheet(rows, *labels, **texts):
        drawn.append((rows, *labels, texts))
        return original(rows, *labels, **texts)

    monkeypatch.setattr("mindiffedit.images.sheets.contact_sheet", contact_sheet)
    return drawn


def edit_sheet(*more):
    """`edit` with a sheet and without -o."""
    return ["edit", "p.png", *TEXTS, "--sweep", "sheet.png", *more]


def calls(stage):
    return [call[1] for call in FakePipeline.calls if call[0] == stage]


# --- masks ----------------------------------------------------------------------------------------


def test_a_map_is_computed_once_for_each_strength(capsys, sheets):
    line, _ = ran(capsys, [*MASK, "--sweep", "sheet.png", "--sweep-strengths", "0.2,0.9", "--sweep-thresholds",
                           "1.2,2,3.5", "--mask-dilation", "1", "--json"])  # fmt: skip
    assert stages() == ["load", "mask", "mask"]
    assert [asked["mask_encode_strength"] for asked in calls("mask")] == [0.2, 0.9]
    ((rows, down, across, texts),) = sheets
    assert (down, across) == (["0.2", "0.9"], ["1.2", "2", "3.5"])
    assert [len(row) for row in rows] == [3, 3] and SOURCE in texts["title"] and TARGET in texts["title"]
    # The map is 1.5 left and 0.5 right with a mean of 1: at 1.2 the threshold is 0.6, at 2 it is 1, at 3.5 it is 1.75.
    fitted = arguments("mask")["image"]
    half = np.zeros((11, 14))
    half[:, :8] = 1  # seven columns and one more by dilation
    for cell, expected in zip(rows[0], (half, half, np.zeros((11, 14)))):
        np.testing.assert_array_equal(np.asarray(cell), np.asarray(masks.overlay(fitted, expected)))
    assert sorted(os.listdir()) == ["model", "p.png", "sheet.png"]
    assert PIL.Image.open("sheet.png").size[0] > 3 * fitted.width
    result = json.loads(line)
    assert result["sweep"] == {"file": "sheet.png", "strengths": [0.2, 0.9], "thresholds": [1.2, 2, 3.5]}
    assert result["output"] is None and result["mask_share"] is None


def test_a_sheet_and_the_one_mask(capsys, sheets):
    line, _ = ran(capsys, [*MASK, "-o", "m.png", "--sweep", "sheet.png", "--map", "map.png"])
    # The present strength's map serves both.
    assert [asked["mask_encode_strength"] for asked in calls("mask")] == [0.5, 0.3, 0.7]
    ((_, down, across, _),) = sheets
    assert (down, across) == (["0.3", "0.5", "0.7"], ["2", "3", "4"])
    assert line.startswith("m.png: ")
    assert sorted(os.listdir()) == ["m.png", "map.png", "model", "p.png", "sheet.png"]
    line, _ = ran(capsys, [*MASK, "--sweep", "sheet.png", "--sweep-thresholds", "2"])
    assert line.startswith("sheet.png: 3 strengths x 1 thresholds, seed 0")


def test_sheets_of_combined_masks(capsys, sheets):
    PIL.Image.new("L", (117, 91), 255).save("all.png")
    ran(capsys, [*MASK, "--sweep", "sheet.png", "--sweep-strengths", "0.5", "--sweep-thresholds", "3.5",
                 "--mask", "all.png", "--mask-combine", "union"])  # fmt: skip
    ((rows, *_),) = sheets
    fitted = arguments("mask")["image"]
    np.testing.assert_array_equal(np.asarray(rows[0][0]), np.asarray(masks.overlay(fitted, np.ones((11, 14)))))


# --- edits ----------------------------------------------------------------------------------------


def test_mask_once_and_an_inversion_for_each_strength(capsys, sheets):
    ran(capsys, edit_sheet("--sweep-strengths", "0.5,1", "--sweep-guidances", "0,4,9", "--iterations", "1",
                           "--caption", "a table"))  # fmt: skip
    assert stages() == ["load", "mask", "invert", *["whole"] * 3, "invert", *["whole"] * 3]
    assert [asked["inpaint_strength"] for asked in calls("invert")] == [0.5, 1]
    assert calls("invert")[0]["prompt"] == "a table" and calls("invert")[0]["inversion_iterations"] == 1
    assert calls("invert")[0]["guidance_scale"] == 1
    asked = calls("whole")
    assert [(one["inpaint_strength"], one["guidance_scale"]) for one in asked] == [
        (0.5, 0), (0.5, 4), (0.5, 9), (1, 0), (1, 4), (1, 9),
    ]  # fmt: skip
    assert all(one["mask_image"] is asked[0]["mask_image"] for one in asked)
    assert len({id(one["image_latents"]) for one in asked}) == 2
    assert asked[0]["image_latents"].latents.shape[1] == 25 and asked[5]["image_latents"].latents.shape[1] == 50
    assert not {"inversion", "inversion_prompt", "inversion_iterations"} & set(asked[0])
    ((rows, down, across, _),) = sheets
    assert (down, across) == (["0.5", "1"], ["0", "4", "9"]) and np.shape(rows)[:2] == (2, 3)
    bars = [call[1]["desc"] for call in FakePipeline.calls if call[0] == "bar"]
    assert "edit, strength 0.5, guidance 4" in bars and "invert, strength 1" in bars


def test_a_sheet_and_the_one_edit_share_the_mask(capsys, sheets):
    line, _ = ran(capsys, edit("--sweep", "sheet.png", "--sweep-strengths", "0.6", "--sweep-guidances", "2", "--json"))
    assert stages() == ["load", "whole", "invert", "whole"]
    single, cell = calls("whole")
    assert single["mask_image"] is None and cell["mask_image"].shape == (1, 11, 14)
    assert (single["guidance_scale"], cell["guidance_scale"]) == (7.5, 2)
    assert json.loads(line)["sweep"] == {"file": "sheet.png", "strengths": [0.6], "guidances": [2]}
    assert sorted(os.listdir()) == ["model", "out.png", "p.png", "sheet.png"]


def test_noise_and_an_own_mask(capsys, sheets):
    PIL.Image.new("L", (117, 91), 255).save("all.png")
    ran(capsys, edit_sheet("--sweep-strengths", "0.6", "--sweep-guidances", "2", "--mask", "all.png",
                           "--inversion", "noise"))  # fmt: skip
    assert stages() == ["load", "noise", "whole"]
    assert calls("whole")[0]["mask_image"].all()


def test_with_latents_the_strength_is_theirs(capsys, sheets):
    invert(capsys, "--strength", "0.6")
    ran(capsys, ["edit", "p.png", "--latents", "l.safetensors", *TEXTS[2:], "--sweep", "sheet.png"])
    assert stages() == ["load", "mask", "whole", "whole", "whole"]
    ((_, down, across, _),) = sheets
    assert (down, across) == (["0.6"], ["5", "7.5", "10"])
    assert {one["inpaint_strength"] for one in calls("whole")} == {0.6}


def test_large_cells_are_made_smaller(capsys, sheets):
    PIL.Image.open("p.png").resize((1000, 600)).save("large.png")
    ran(capsys, edit("--sweep", "sheet.png", "--sweep-strengths", "0.6", "--sweep-guidances", "2", "--size", "800",
                     picture="large.png"))  # fmt: skip
    ((rows, *_),) = sheets
    assert rows[0][0].size == (sweeps.CELL, round(sweeps.CELL * 0.6))


def test_strengths_around_one():
    for strength, steps, expected in (
        *((0.5, 50, [0.3, 0.5, 0.7]), (0.9, 20, [0.7, 0.9, 1]), (1, 50, [0.8, 1]), (0.1, 50, [0.02, 0.1, 0.3])),
        *((0.4, 3, [0.4, 0.6]), (1, 1, [1])),
    ):
        assert sweeps.around_strength(strength, steps) == expected


def test_no_sheet_of_what_cannot_be_drawn(capsys):
    refused(capsys, edit_sheet("--sweep-guidances", "1,1"), "twice")
    FakePipeline.breaks["whole"] = lambda: 1 / 0
    assert cli.main(edit_sheet()) == 1
    assert sorted(os.listdir()) == ["model", "p.png"]
