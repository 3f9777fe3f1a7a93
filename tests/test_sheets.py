"""Several pictures in one: grids, rows with captions, tables with labels."""

import numpy as np
import PIL.Image
import pytest

from mindiffedit.errors import InputError, InputTypeError
from mindiffedit.images import pictures, sheets


def noise(height, width, seed=0):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("resize", [None, 10])
def test_grids_equal_the_reference_s(resize):
    reference = pytest.importorskip("diffusers.utils").make_image_grid
    images = [noise(12, 9, seed) for seed in range(6)]
    ours = sheets.make_image_grid(images, rows=2, cols=3, resize=resize)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(reference(images, 2, 3, resize)))


def test_a_grid_that_is_not_full_is_refused():
    with pytest.raises(ValueError, match="5 pictures.*2 rows and 3"):
        sheets.make_image_grid([noise(4, 4)] * 5, rows=2, cols=3)
    with pytest.raises(ValueError):
        sheets.make_image_grid([], rows=0, cols=3)


def cells(rows, columns, height=96, width=128):
    return [[noise(height, width, 10 * i + k) for k in range(columns)] for i in range(rows)]


def found(sheet, cell):
    """(left, top) of the one place where a cell stands in the sheet, pixel by pixel."""
    sheet, cell = np.asarray(sheet), np.asarray(cell.convert("RGB"))
    height, width = cell.shape[:2]
    tops, lefts = sheet.shape[0] - height + 1, sheet.shape[1] - width + 1
    fits = np.ones((tops, lefts), bool)
    for y, x in ((0, 0), (0, 1), (1, 1), (height - 1, width - 1)):
        fits &= (sheet[y : y + tops, x : x + lefts] == cell[y, x]).all(axis=-1)
    places = [(x, y) for y, x in np.argwhere(fits) if np.array_equal(sheet[y : y + height, x : x + width], cell)]
    assert len(places) == 1
    return places[0]


def test_contact_sheets_show_every_cell_and_label():
    rows = cells(2, 3)
    sheet = sheets.contact_sheet(rows, ["0.3", "0.5"], ["one", "two", "three"], "threshold \\ strength", "A sweep")
    assert sheet.mode == "RGB"
    places = [[found(sheet, cell) for cell in row] for row in rows]
    for row in places:
        assert len({y for _, y in row}) == 1 and [x for x, _ in row] == sorted(x for x, _ in row)
        assert [x for x, _ in row] == [x for x, _ in places[0]]
    left, top = places[0][0]
    dark = np.asarray(sheet).max(axis=-1) < 128
    for _, y in (row[0] for row in places):
        assert dark[y : y + 96, :left].any(), "no label at the left"
    for x, _ in places[0]:
        assert dark[:top, x : x + 128].any(), "no label above"
    assert dark[:top, :left].any(), "no corner"
    plain = sheets.contact_sheet(rows, ["0.3", "0.5"], ["one", "two", "three"])
    assert plain.height < sheet.height and plain.width <= sheet.width


def test_long_labels_are_cut_not_spread():
    sheet = sheets.contact_sheet(cells(1, 1), ["word " * 300], ["longword" * 90], "corner " * 90, "title " * 900)
    assert sheet.width < 128 * 3 and sheet.height < 96 * 5
    sheets.contact_sheet(cells(1, 1), [""], ["日本"], None, "ü")


def test_contact_sheets_that_cannot_be_drawn(monkeypatch):
    monkeypatch.setattr(sheets, "MAX_PIXELS", 30_000)
    for error, words, arguments in (
        (InputError, "at least one", ([], [], [])),
        (InputError, "at least one", ([[]], ["a"], [])),
        (InputError, "2, 1", ([*cells(1, 2), *cells(1, 1)], ["a", "b"], ["c", "d"])),
        (InputError, "`row_labels` of this contact sheet has to be 2 texts", (cells(2, 1), ["a"], ["b"])),
        (InputError, "1 texts", (cells(2, 1), ["a", "b"], ["c", "d"])),
        (InputError, "'ab'", (cells(2, 1), "ab", ["c"])),
        (InputTypeError, "ndarray", ([[np.zeros((4, 4))]], ["a"], ["b"])),
        (InputError, "0 x 4", ([[PIL.Image.new("L", (0, 4))]], ["a"], ["b"])),
        (InputError, "smaller", (cells(3, 1), ["a", "b", "c"], ["d"])),
    ):
        with pytest.raises(error, match=words):
            sheets.contact_sheet(*arguments)


def test_cells_are_brought_to_one_size_and_masks_stay_black_and_white():
    mask = pictures.mask_to_pil(np.eye(16, 16))[0]
    sheet = sheets.contact_sheet([[mask, mask.resize((40, 40), 0)]], ["a"], ["b", "c"], smallest_side=96)
    left, top = found(sheet, mask.resize((96, 96), PIL.Image.Resampling.NEAREST))
    second = np.asarray(sheet)[top : top + 96, left + 96 :]
    assert {0, 255} == set(np.unique(second)) and (second == 0).sum() > 96 * 96


def test_a_labelled_grid_shows_every_picture_and_caption():
    items = [("original: a red apple", noise(300, 400)), ("mask", pictures.mask_to_pil(np.eye(300, 400))[0]),
             ("edited " * 40, noise(300, 400, 1))]  # fmt: skip
    grid = sheets.labelled_grid(items)
    places = [found(grid, picture) for _, picture in items]
    assert places == sorted(places) and len({top for _, top in places}) == 1
    for left, top in places:
        assert (np.asarray(grid)[:top, left : left + 400] < 128).any(), "no caption above a picture"
    small = sheets.labelled_grid([("a", noise(16, 24)), ("b", noise(16, 24))], smallest_side=64)
    assert small.width > 2 * 24 * 4 and small.height > 64
    with pytest.raises(InputError):
        sheets.labelled_grid([])
