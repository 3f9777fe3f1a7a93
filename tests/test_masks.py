"""Masks: from maps to masks, masks of users, combinations, feathering, pasting back, and what is drawn of them."""

import dataclasses
import itertools
import math
import warnings

import numpy as np
import PIL.Image
import pytest

import mindiffedit
from mindiffedit import masks, options
from mindiffedit.errors import InputError, InputTypeError
from mindiffedit.images import pictures
from mindiffedit.masks import MaskOptions


def random_maps(*shape, seed=0):
    """Maps with a long tail, as real ones have: a few values are many times the mean."""
    return np.random.default_rng(seed).gamma(0.4, size=shape).astype(np.float32)


def drawn(text):
    """A boolean array of lines of '#' and '.'."""
    return np.array([[c == "#" for c in line] for line in text.split()])


def shaped(text):
    """A map (1, h, w) that is 0 outside the drawing and, at the ratio that `made` takes, far above the clamp inside."""
    mask = drawn(text)
    result = mask.astype(np.float32)[None]
    np.testing.assert_array_equal(masks.mask_of(result, ratio=0.5), result)
    return result


def lines(mask):
    return ["".join(".#"[int(v)] for v in row) for row in mask]


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def message(error, function, *args, **kwargs):
    """The one-line message of the error about input, of this kind, that the call raises."""
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    assert caught.type in (error, {ValueError: InputError, TypeError: InputTypeError}.get(error))
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".")
    return text


# --- from a map to a mask --------------------------------------------------------------------------


def test_defaults_are_the_reference_s_to_the_bit():
    torch = pytest.importorskip("torch")
    for shape, ratio in itertools.product([(1, 16, 16), (3, 8, 13), (2, 64, 48)], [3.0, 0.7, 10]):
        maps = random_maps(*shape)
        magnitude = maps.mean(dtype=np.float64).astype(np.float32) * np.float32(ratio)
        maps[0, 1, 2] = magnitude * np.float32(0.5)
        mask = masks.mask_of(maps, ratio)
        magnitude = maps.mean(dtype=np.float64).astype(np.float32) * np.float32(ratio)
        # The reference's own lines, in its own framework, with this clamp (its float32 mean may differ at the end).
        tensor = torch.from_numpy(maps)
        tensor = tensor.clamp(0, float(magnitude)) / float(magnitude)
        np.testing.assert_array_equal(mask, torch.where(tensor <= 0.5, 0, 1).numpy())
        assert mask.dtype == np.int64 and 0 < mask.mean() < 1
        # Other number types.
        np.testing.assert_array_equal(masks.mask_of(maps.astype(np.float64), ratio), mask)
        halves = torch.from_numpy(maps).bfloat16()
        np.testing.assert_array_equal(masks.mask_of(halves, ratio), masks.mask_of(halves.float().numpy(), ratio))


def test_a_value_at_the_threshold_is_outside():
    maps = np.array([[[0.5, np.nextafter(np.float32(0.5), np.float32(1)), 1.0, 0.0]]], np.float32)
    assert masks.mask_of(maps, clamp=1.0 * np.ones(())).tolist() == [[[0, 1, 1, 0]]]
    at = np.array([[[0.3, 0.31, 0.29]]], np.float32)
    chosen = masks.mask_of(at, clamp=np.ones(1), options=MaskOptions(threshold=0.3))
    assert chosen.tolist() == [[[0, 1, 0]]]


def test_clamps():
    maps = random_maps(3, 8, 9)
    whole = masks.clamp_of(maps, 3.0, False)
    assert whole.dtype == np.float32 and whole.shape == ()
    assert whole == maps.mean(dtype=np.float64).astype(np.float32) * np.float32(3)
    own = masks.clamp_of(maps, 3.0, True)
    assert own.dtype == np.float32 and own.shape == (3, 1, 1)
    assert own.ravel().tolist() == [masks.clamp_of(one[None], 3.0, False) for one in maps]
    # One that is given takes the place of the computed.
    for per_image, clamps in ((False, [whole]), (True, [own, own.ravel()])):
        for clamp in clamps:
            mask = masks.mask_of(maps, clamp=clamp)
            np.testing.assert_array_equal(mask, masks.mask_of(maps, 3.0, per_image=per_image))
    assert masks.mask_of(maps, clamp=np.float32(1e6)).sum() == 0


def test_per_image_masks_do_not_depend_on_their_mates():
    maps = random_maps(2, 16, 16)
    mates = np.stack([maps[0], 50 * maps[1]])
    kept = masks.mask_of(mates, per_image=True)
    np.testing.assert_array_equal(kept[0], masks.mask_of(maps[:1])[0])
    np.testing.assert_array_equal(kept[1], masks.mask_of(mates[1:])[0])
    assert (masks.mask_of(mates)[0] != kept[0]).any(), "the reference's masks do"


def test_no_difference_is_an_error():
    empty = np.zeros((2, 4, 4), np.float32)
    assert message(options.NumericalError, masks.mask_of, empty) == masks.NO_DIFFERENCE
    empty[0] = 1
    masks.mask_of(empty)
    assert "picture 2 of 2" in message(options.NumericalError, masks.mask_of, empty, per_image=True)


def test_bad_maps_are_refused():
    for maps, error, words in (
        (np.zeros((4, 4), np.float32), ValueError, "(4, 4)"),
        (np.zeros((0, 4, 4), np.float32), ValueError, "(0, 4, 4)"),
        (np.ones((1, 4, 4), int), TypeError, "int64"),
        (np.full((1, 4, 4), -1.0), ValueError, "-1"),
        (np.full((1, 4, 4), np.nan), options.NumericalError, "NaN"),
        (np.full((1, 4, 4), np.inf), options.NumericalError, "16 of 16"),
    ):
        assert words in message(error, masks.mask_of, maps)
        assert words in message(error, masks.clamp_of, maps)
    maps = random_maps(2, 4, 4)
    for error, words, arguments in (
        (TypeError, "dict", dict(options={"threshold": 0.5})), (ValueError, "`ratio`", dict(ratio=0)),
        (TypeError, "`ratio`", dict(ratio=True)), (TypeError, "`per_image`", dict(per_image=1)),
        (ValueError, "(3,)", dict(clamp=np.ones(3))),
        *((ValueError, "above 0", dict(clamp=np.array(bad))) for bad in (0.0, -1.0, np.nan)),
    ):  # fmt: skip
        assert words in message(error, masks.mask_of, maps, **arguments)


# --- options ---------------------------------------------------------------------------------------


def test_defaults_and_values_of_the_options():
    assert dataclasses.asdict(MaskOptions()) == dict(
        threshold=0.5, smoothing=0.0, erosion=0, dilation=0, fill_holes=False, smallest_region=0, soft=False, edges=0,
        edge_contrast=0.06,
    )  # fmt: skip
    chosen = MaskOptions(np.float32(0.25), 2, np.int64(1), soft=np.True_)
    values = [chosen.threshold, chosen.smoothing, chosen.erosion, chosen.soft]
    assert values == [0.25, 2.0, 1, True] and [type(value) for value in values] == [float, float, int, bool]
    with pytest.raises(dataclasses.FrozenInstanceError):
        chosen.threshold = 0.5
    assert mindiffedit.MaskOptions is MaskOptions


def test_bad_options_are_refused():
    for name, error, values in (
        ("threshold", ValueError, (0, 1, -0.5, 1.5, math.nan, math.inf, None)),
        ("threshold", TypeError, (True, "0.5", [0.5])),
        ("smoothing", ValueError, (-0.1, math.nan, math.inf, 1e9, None)),
        ("smoothing", TypeError, (False, "1")),
        ("erosion", ValueError, (-1, 10**9)),
        ("erosion", TypeError, (1.0, True, None, "1", math.nan)),
        ("dilation", ValueError, (-1, 10**9)),
        ("dilation", TypeError, (0.5, False, None)),
        ("smallest_region", ValueError, (-3,)),
        ("smallest_region", TypeError, (2.5, True, None)),
        ("fill_holes", TypeError, (1, 0, None, "yes")),
        ("soft", TypeError, (1, 0, None, "no")),
        ("edges", ValueError, (-1, 101)),
        ("edges", TypeError, (1.5, True, None, "2")),
        ("edge_contrast", ValueError, (0, -0.1, math.nan, math.inf, None)),
        ("edge_contrast", TypeError, (True, "0.1")),
    ):
        for value in values:
            text = message(error, MaskOptions, **{name: value})
            assert f"`{name}`" in text and (str(value) in text or f"{value:g}" in text)


# --- each knob by counting -------------------------------------------------------------------------


def made(text, **knobs):
    return lines(masks.mask_of(shaped(text), ratio=0.5, options=MaskOptions(**knobs))[0])


def test_dilation_adds_a_disc():
    speck = "....... ....... ....... ...#... ....... ....... ......."
    for radius, count in {1: 5, 2: 13, 3: 29}.items():
        disc = ["".join(".#"[(x - 3) ** 2 + (y - 3) ** 2 <= radius**2] for x in range(7)) for y in range(7)]
        assert made(speck, dilation=radius) == disc and "".join(disc).count("#") == count


def test_erosion_takes_the_border_off_but_not_at_the_edge_of_the_grid():
    square = "..... .###. .###. .###. ....."
    assert made(square, erosion=1) == "..... ..... ..#.. ..... .....".split()
    assert made(square, erosion=2) == ["....."] * 5
    assert made("###.. ###.. ###.. ..... .....", erosion=1) == "##... ##... ..... ..... .....".split()
    assert made("### ### ###", erosion=5) == ["###"] * 3
    thin = "........ .###.... .####### .###.... ........"
    assert made(thin, erosion=1, dilation=1) == "........ ..##.... .####... ..##.... ........".split()


def test_holes_are_filled_where_they_are_enclosed():
    ring = "........ .####... .#..#... .#..#.## .####.#. ......##"
    assert made(ring, fill_holes=True) == ["........", ".####...", ".####...", ".####.##", ".####.#.", "......##"], (
        "the bay at the right reaches the edge of the grid and stays"
    )
    # A wall of corners encloses, as regions are connected over corners.
    assert made("..... ..#.. .#.#. ..#.. .....", fill_holes=True)[2] == ".###."
    assert made("..... .###. .#..# .###. .....", fill_holes=True)[2] == ".####"


def test_small_regions_are_dropped():
    text = "#...##.. .#..##.. ........ ...#...."
    assert made(text, smallest_region=0) == made(text, smallest_region=1) == text.split()
    assert made(text, smallest_region=2) == ["#...##..", ".#..##..", "........", "........"], "corners connect"
    assert made(text, smallest_region=3) == ["....##..", "....##..", "........", "........"]
    assert made(text, smallest_region=4) == made(text, smallest_region=3)
    assert made(text, smallest_region=5) == ["........"] * 4


def test_the_order_of_the_knobs():
    ring = ".......... .####..... .#..#..... .#..#...#. .####....."
    # Filled first: the outline of 12 counts with its inside of 4, and erosion does not widen the hole.
    assert made(ring, fill_holes=True, smallest_region=16)[1:] == [".####.....", *[".####....."] * 3]
    assert made(ring, fill_holes=True, smallest_region=17) == [".........."] * 5
    assert made(ring, fill_holes=True, erosion=1)[2:4] == ["..##......"] * 2
    # Regions are counted before erosion would make them small, and specks are gone before dilation makes them large.
    assert made(ring, fill_holes=True, smallest_region=16, erosion=1)[2:4] == ["..##......"] * 2
    grown = made(ring, smallest_region=2, dilation=1)
    assert all(line[7:] == "..." for line in grown) and grown[0] == ".####....."


def test_smoothing_drops_specks_and_closes_gaps():
    def mask_of(maps, smoothing):
        return masks.mask_of(maps, clamp=np.ones(1), options=MaskOptions(smoothing=smoothing))

    maps = np.zeros((1, 24, 24), np.float32)
    maps[0, 4:14, 4:14] = 1
    maps[0, 9, 9] = 0  # a gap
    maps[0, 20, 20] = 1000  # a speck; unclamped, it would cover whatever the Gaussian reaches
    plain, smooth = mask_of(maps, 0), mask_of(maps, 1)
    assert plain[0, 9, 9] == 0 and plain[0, 20, 20] == 1
    assert smooth[0, 9, 9] == 1 and smooth[0, 18:, 18:].sum() == 0
    assert abs(int(smooth.sum()) - 100) <= 4, "the border stays where it was, but for the corners"
    # Beyond the edges of the grid it goes on with the values there.
    maps = np.zeros((1, 12, 12), np.float32)
    maps[0, :, :4] = 1
    np.testing.assert_array_equal(mask_of(maps, 2), maps)


# --- soft masks ------------------------------------------------------------------------------------


def test_soft_masks_agree_with_the_hard_ones():
    maps = random_maps(2, 32, 40)
    maps[:, 8:20, 10:30] += 2
    for threshold, smoothing in itertools.product([0.5, 0.2, 0.85], [0.0, 1.3]):
        hard = masks.mask_of(maps, options=MaskOptions(threshold, smoothing))
        soft = masks.mask_of(maps, options=MaskOptions(threshold, smoothing, soft=True))
        assert soft.dtype == np.float32 and soft.shape == hard.shape
        assert soft.min() == 0 and soft.max() <= 1
        np.testing.assert_array_equal(soft > 0.5, hard == 1)
        assert ((soft > 0) & (soft < 1)).sum() > 20, "there are values between"


def test_soft_masks_follow_their_formula():
    """A row that rises over the threshold: 0 far out, the ramp near the border, 1 deep inside."""
    row = np.array([0.45, 0.2, 0.3, 0.45, 0.55, 0.6, 0.55, 0.9], np.float32)
    maps = np.repeat(row[None, None], 5, axis=1)
    soft = masks.mask_of(maps, clamp=np.ones(1), options=MaskOptions(soft=True))[0]
    # Outside: 0.45 is next to the mask at one place, far from it at the other. Inside: 0.55 is 1 when it is deep.
    np.testing.assert_allclose(soft[2], [0, 0, 0, 0.4, 0.6, 1, 1, 1], atol=1 / 255)
    # Of everything; and of nothing, where a third of the clamp is near the threshold, but no mask to be near to.
    for ratio, expected in ((1.0, 1), (3.0, 0)):
        assert (masks.mask_of(np.ones((1, 6, 6), np.float32), ratio, options=MaskOptions(soft=True)) == expected).all()


def test_a_soft_mask_never_falls_where_the_map_rises():
    for knobs in ({}, {"dilation": 2}, {"erosion": 1}, {"fill_holes": True, "smallest_region": 5}, {"threshold": 0.3}):
        rng = np.random.default_rng(4)
        low = random_maps(1, 24, 24, seed=5) * (rng.random((1, 24, 24)) < 0.1).astype(np.float32)
        clamp = masks.clamp_of(low, 3.0, False)
        low[0, 8:16, 8:16] = np.linspace(0.2, 1.2, 64, dtype=np.float32).reshape(8, 8) * clamp
        raised = 0
        for _ in range(5):
            high = low + (rng.random(low.shape) < 0.05) * rng.random(low.shape).astype(np.float32)
            before, after = (
                masks.mask_of(m, clamp=clamp, options=MaskOptions(soft=True, **knobs)) for m in (low, high)
            )
            assert (after >= before).all(), knobs
            raised += (after > before).sum()
            low = high
        assert raised > 10, knobs


def test_the_hard_mask_decides_where_a_soft_one_is():
    text = "............ .######..... .#....#..... .#....#...#. .#....#..... .#....#..... .######..... ............"
    maps = shaped(text)
    knobs = {"fill_holes": True, "smallest_region": 2, "dilation": 1}
    hard = masks.mask_of(maps, ratio=0.5, options=MaskOptions(**knobs))
    soft = masks.mask_of(maps, ratio=0.5, options=MaskOptions(soft=True, **knobs))
    np.testing.assert_array_equal(soft > 0.5, hard == 1)
    assert soft[0, 4, 4] == 1, "in the filled hole, although the map is 0 there"
    assert soft[0, 3, 10] == 0, "the speck that was dropped, although the map is large there"
    assert soft[0, 3, 11] == 0, "further than the reach from the mask"


# --- coverage --------------------------------------------------------------------------------------


def test_coverage():
    mask = np.zeros((3, 4, 5), np.int64)
    mask[1, :2] = 1
    mask[2] = 1
    assert masks.mask_coverage(mask) == [0.0, 0.5, 1.0]
    assert masks.mask_coverage(mask[1]) == [0.5]
    assert masks.mask_coverage(np.full((1, 2, 2), 0.25)) == [0.25]
    assert all(type(value) is float for value in masks.mask_coverage(mask))
    assert "NaN" in message(ValueError, masks.mask_coverage, np.full((2, 2), np.nan))


# --- masks of users --------------------------------------------------------------------------------


def test_a_line_of_one_pixel_survives():
    for position in range(0, 512, 37):
        across = np.zeros((512, 512), np.uint8)
        across[position] = 255
        mask = masks.user_mask(PIL.Image.fromarray(across), (64, 64))
        assert mask.dtype == np.float32 and mask.shape == (1, 64, 64) and mask.sum() == 64
        assert mask[0].any(axis=1).nonzero()[0].tolist() == [position // 8]
        np.testing.assert_array_equal(masks.user_mask(across.T > 0, (64, 64))[0], mask[0].T)


def test_every_pixel_belongs_to_one_latent_at_any_size():
    for height, width, h, w in [(91, 117, 8, 11), (13, 7, 5, 7), (100, 3, 9, 2), (9, 9, 9, 9)]:
        for y in range(height):
            mask = np.zeros((height, width))
            mask[y, width // 2] = 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                small = masks.user_mask(mask, (h, w))[0]
            assert small.sum() == 1
            assert small[int((y + 0.5) * h / height), int((width // 2 + 0.5) * w / width)] == 1


def test_values_and_sizes_of_masks():
    small = np.array([[0, 0.25], [1, 0.5]])
    for result in (masks.user_mask(small, (6, 6)), masks.enlarged(small[None], (6, 6))):  # to the nearest
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result[0], np.kron(small, np.ones((3, 3))))
    assert masks.enlarged(small[None], (5, 7)).shape == (1, 5, 7)
    np.testing.assert_array_equal(masks.user_mask(np.ones((1, 1)), (3, 5)), np.ones((1, 3, 5)))
    row = masks.user_mask(np.array([[0, 1, 0.5]] * 2), (4, 7))[0]
    assert row[0].tolist() == [0, 0, 1, 1, 1, 0.5, 0.5]
    large = np.zeros((16, 16), np.float32)  # values are kept
    large[3, 3], large[2, 2], large[12, 9] = 0.3, 0.7, 0.125
    np.testing.assert_array_equal(masks.user_mask(large, (2, 2))[0], np.array([[0.7, 0], [0, 0.125]], np.float32))
    np.testing.assert_array_equal(masks.user_mask(large, (2, 2), soft=False)[0], [[1, 0], [0, 0]])
    assert "`soft`" in message(TypeError, masks.user_mask, large, (2, 2), soft="no")


def test_masks_survive_the_way_to_the_picture_and_back():
    rng = np.random.default_rng(2)
    for grid, size in [((8, 11), (91, 117)), ((64, 64), (512, 512)), ((5, 9), (41, 79))]:
        mask = rng.random((2, *grid)).astype(np.float32)
        np.testing.assert_array_equal(masks.user_mask(masks.enlarged(mask, size), grid, 2), mask)
        # So do those that are written at a picture's size as black and white pictures.
        hard = (mask[:1] > 0.5).astype(np.float32)
        written = pictures.restore_size(pictures.mask_to_pil(hard)[0], size[::-1])
        np.testing.assert_array_equal(masks.user_mask(written, grid), hard)
        np.testing.assert_array_equal(masks.fit_mask(written, size[::-1], grid[::-1], 8)[0], hard)
        np.testing.assert_array_equal(np.asarray(written) / 255, masks.enlarged(hard, size)[0])


HALVES = np.zeros((8, 8), np.uint8)
HALVES[:, 4:] = 255


def test_masks_of_every_kind():
    mindspore, torch = pytest.importorskip("mindspore"), pytest.importorskip("torch")
    grey = PIL.Image.fromarray(HALVES)
    clear = PIL.Image.new("RGBA", (8, 8), (255, 255, 255, 0))  # white, but nothing drawn
    clear.paste((255, 255, 255, 255), (4, 0, 8, 8))
    ones = (HALVES > 0).astype(np.uint8)
    tensor = torch.from_numpy(ones)
    for number, mask in enumerate((
        clear, clear.convert("LA"), *(grey.convert(mode) for mode in ("L", "RGB", "1", "P", "CMYK")), [grey],
        *(PIL.Image.fromarray(values) for values in (
            ones, ones.astype(np.float32), HALVES.astype(np.uint16) * 257, HALVES.astype(np.int32))),
        HALVES, HALVES[None], HALVES[None, None], [HALVES], ones.tolist(), [ones.tolist()],
        *(ones.astype(dtype) for dtype in (bool, np.uint8, np.int64, np.float64, np.float16)),
        mindspore.Tensor(ones.astype(np.float32)), tensor.float(), tensor.bool(), torch.from_numpy(HALVES)[None],
        [tensor.bfloat16()],
    )):  # fmt: skip
        result = masks.user_mask(mask, (4, 4))
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, [[[0, 0, 1, 1]] * 4], err_msg=f"{number}: {type(mask)}")
    own = np.eye(4, dtype=np.float32)[None]
    masks.user_mask(own, (4, 4))[:] = 7
    np.testing.assert_array_equal(own[0], np.eye(4), "the caller's mask is left alone")
    # Batches.
    two = np.stack([HALVES, HALVES.T])
    for batch in (two, [PIL.Image.fromarray(one) for one in two]):
        assert masks.user_mask(batch, (2, 2), 2).tolist() == [[[0, 1], [0, 1]], [[0, 0], [1, 1]]]
    assert masks.user_mask(HALVES, (2, 2), 5).shape == (1, 2, 2), "one serves all"


def test_masks_that_mean_nothing_are_refused():
    zeros, eye = np.zeros((4, 4)), np.eye(4)
    for mask, batch, error, words in (
        ("mask.png", 1, TypeError, "holds str"), (None, 1, TypeError, "NoneType"), ([0, 1], 1, TypeError, "int"),
        ([], 1, ValueError, "empty list"), (zeros[:0], 1, ValueError, "empty"),
        (zeros[:0].astype(np.uint8), 1, ValueError, "empty"), (zeros[0], 1, ValueError, "(4,)"),
        (zeros[None, None, None], 1, ValueError, "(1, 1, 1, 4, 4)"), (zeros + np.nan, 1, ValueError, "NaN"),
        (zeros + np.inf, 1, ValueError, "[0, 1]"), (zeros - 0.1, 1, ValueError, "-0.1"),
        (eye * 255, 1, ValueError, "divide"), (eye.astype(int) * 255, 1, ValueError, "divide"),
        (zeros.astype(complex), 1, TypeError, "complex"), (np.array([["a"]]), 1, TypeError, "numbers"),
        (np.zeros((3, 4, 4)), 2, ValueError, "batch size 3"), (np.zeros((8, 8, 3), np.uint8), 1, ValueError, "(h, w)"),
        (np.zeros((1, 3, 8, 8)), 1, ValueError, "3 channels"),
        ([zeros, np.zeros((5, 5))], 2, ValueError, "(4, 4), (5, 5)"),
        ([PIL.Image.new("L", (4, 4)), PIL.Image.new("L", (4, 5))], 2, ValueError, "different shapes"),
    ):  # fmt: skip
        assert words in message(error, masks.preprocess_mask, mask, batch)
        text = message(error, masks.user_mask, mask, (4, 4), batch)
        assert words in text and "`mask`" in text
        assert "`mine`" in message(error, masks.user_mask, mask, (4, 4), batch, name="mine")
    assert "mixes" in message(TypeError, masks.preprocess_mask, [PIL.Image.new("L", (4, 4)), zeros])
    assert "divide" in message(ValueError, masks.preprocess_mask, eye.astype(np.uint8) * 255)
    floats = [PIL.Image.fromarray(np.full((4, 4), value, np.float32)) for value in (np.nan, 255)]
    for mask, error, words in (
        ([[0, 1], [1]], ValueError, "different lengths"), ([["a", "b"]], TypeError, "numbers"),
        (PIL.Image.new("L", (0, 4)), ValueError, "empty"), (floats[0], ValueError, "NaN"),
        (floats[1], ValueError, "divide"),
    ):  # fmt: skip
        assert words in message(error, masks.user_mask, mask, (4, 4))
    for size in (4, (4,), (4, 4, 4), (0, 4), (4, -1), (4.0, 4), (True, 4), None, "44"):
        for function in (masks.user_mask, masks.enlarged):
            assert "`size`" in message(ValueError, function, zeros, size)


def test_a_mask_of_other_proportions_is_stretched_with_a_warning():
    with pytest.warns(UserWarning, match="8 x 16, which are not the proportions of the 8 x 8 latents"):
        result = masks.user_mask(np.tri(16, 8), (8, 8))
    assert result.shape == (1, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks.user_mask(np.zeros((390, 520)), (48, 64))
        masks.user_mask(np.zeros((70, 100)), (8, 12))  # a picture that is cut to whole latents
        masks.user_mask(np.zeros((1, 1)), (8, 64))


# --- masks as the reference takes them -------------------------------------------------------------


def soft_mask(*shape):
    """Values in [0, 1], exactly 0.5 among them."""
    values = np.random.default_rng(7).random(shape).astype(np.float32)
    values.ravel()[:3] = (0.5, np.nextafter(np.float32(0.5), np.float32(0)), 1.0)
    return values


def reference_mask(mask, batch_size):
    import copy

    module = pytest.importorskip("diffusers.pipelines.stable_diffusion_diffedit.pipeline_stable_diffusion_diffedit")
    # A copy: the reference writes into what it is given.
    return module.preprocess_mask(copy.deepcopy(mask), batch_size).float().numpy()


def test_masks_equal_the_reference_s():
    torch = pytest.importorskip("torch")
    single, double, drawn = soft_mask(6, 9), soft_mask(2, 6, 9), PIL.Image.fromarray(picture(6, 9))
    tensor = torch.from_numpy(single)
    assert np.array_equal(masks.preprocess_mask(single, 1), reference_mask(single, 1))
    assert np.array_equal(masks.preprocess_mask(single, 3), reference_mask(single, 3))
    for mask in (
        single[None], double, double[:, None], [single, 1 - single], [single[None], 1 - single[None]], tensor,
        torch.from_numpy(double), tensor[None, None], [tensor, 1 - tensor], drawn, [drawn.convert("L"), drawn],
        (double > 0.5).astype(np.int64),
    ):  # fmt: skip
        ours = masks.preprocess_mask(mask, 2)
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, reference_mask(mask, 2))


def test_masks_of_any_number_type():
    for dtype in (bool, np.uint8, np.int64, np.float16, np.float64):
        np.testing.assert_array_equal(masks.preprocess_mask(np.eye(5, 7).astype(dtype))[0, 0], np.eye(5, 7))


def test_the_caller_s_mask_is_not_written_to():
    mask = soft_mask(4, 5)
    before = mask.copy()
    masks.preprocess_mask(mask)
    np.testing.assert_array_equal(mask, before)
    binary = np.eye(4, dtype=np.float32)[None, None]
    assert not np.shares_memory(masks.preprocess_mask(binary), binary)


def test_masks_are_fitted_and_those_of_another_size_refused():
    mask = np.zeros((16, 16), np.float32)
    mask[:8, :4] = 1  # half of the first latent: it changes
    mask[8:, :3] = 1  # less than half of the third
    assert masks.fit_mask(pictures.mask_to_pil(mask)[0], (16, 16), (2, 2), 8)[0, 0].tolist() == [[1, 0], [0, 0]]
    mask = PIL.Image.new("L", (30, 20))
    for size in ((90, 70), (88, 64), (11, 8)):
        masks.fit_mask(mask.resize(size), (90, 70), (11, 8), 8)
    with pytest.raises(ValueError, match="30 x 20.*90 x 70 or 88 x 64 or 11 x 8"):
        masks.fit_mask(mask, (90, 70), (11, 8), 8)


# --- combinations ----------------------------------------------------------------------------------


def test_combinations():
    a, b = np.array([[[0, 0, 1, 1]]], np.int64), np.array([[[0, 1, 0, 1]]], np.float32)
    soft_a, soft_b = np.array([[[0.2, 0.9]]], np.float32), np.array([[[0.6, 0.75]]], np.float32)
    for how, expected, soft in (
        ("replace", [0, 1, 0, 1], [0.6, 0.75]),
        ("union", [0, 1, 1, 1], [0.6, 0.9]),
        ("subtract", [0, 0, 1, 0], [0.2, 0.25]),
        ("intersection", [0, 0, 0, 1], [0.2, 0.75]),
    ):
        result = masks.combine(a, b, how)
        assert result.dtype == np.float32 and result.tolist() == [[expected]]
        np.testing.assert_array_equal(masks.combine(soft_a, soft_b, how)[0, 0], np.array(soft, np.float32), how)
        # One of them serves all of the other.
        np.testing.assert_array_equal(masks.combine(np.repeat(a, 3, 0), b, how), np.repeat(result, 3, 0))
        np.testing.assert_array_equal(masks.combine(a, np.repeat(b, 3, 0), how), np.repeat(result, 3, 0))
    # The results are new arrays.
    masks.combine(None, b, "replace")[:] = 5
    masks.combine(np.repeat(a, 2, 0), b, "replace")[0] = 5
    assert b.tolist() == masks.combine(None, b, "replace").tolist() == [[[0, 1, 0, 1]]]


def test_masks_that_cannot_be_combined():
    a, b = np.array([[[0, 0, 1, 1]]], np.int64), np.array([[[0, 1, 0, 1]]], np.float32)
    for words, automatic, own, how in (
        ("'xor'", a, b, "xor"), ("user_mask", a, np.zeros((1, 2, 4)), "union"),
        ("(3, 1, 4)", np.repeat(a, 2, 0), np.repeat(b, 3, 0), "union"), ("`automatic` is None", None, b, "subtract"),
        ("`own`", a, b * 2, "union"), ("`automatic`", a * 2, b, "union"),
    ):  # fmt: skip
        assert words in message(ValueError, masks.combine, automatic, own, how)
    assert "`own`" in message(TypeError, masks.combine, a, None, "union")


# --- feathering and pasting ------------------------------------------------------------------------


def test_feathers_end_exactly():
    mask = np.zeros((2, 8, 8), np.int64)
    mask[0, 2:4, 3:6], mask[0, 6, 6], mask[1, 7, 0] = 1, 1, 1
    y, x = np.mgrid[:64, :64]
    for pixels, number in zip(masks.enlarged(mask, (64, 64)) > 0, range(2)):
        ys, xs = np.nonzero(pixels)
        squares = ((y[..., None] - ys) ** 2 + (x[..., None] - xs) ** 2).min(axis=-1)
        for radius in (0, 1, 2.5, 8, 40):
            weights = masks.feathered(mask, (64, 64), radius)
            assert weights.dtype == np.float32 and weights.shape == (2, 64, 64)
            weight, far = weights[number], (squares >= radius**2) & ~pixels
            between = ~far & ~pixels
            assert (weight[pixels] == 1).all() and (weight[far] == 0).all()
            assert ((weight[between] > 0) & (weight[between] < 1)).all()
            assert between.any() == (radius > 1)
            expected = 0.5 + 0.5 * np.cos(np.pi * np.sqrt(squares[between]) / max(radius, 1))
            np.testing.assert_allclose(weight[between], expected, atol=1e-6)


def test_feathers_of_nothing_of_everything_and_of_soft_masks():
    assert (masks.feathered(np.zeros((1, 4, 4)), (32, 32), 5) == 0).all()
    assert (masks.feathered(np.ones((1, 4, 4)), (32, 32), 5) == 1).all()
    soft = np.zeros((1, 4, 4), np.float32)
    soft[0, 1, 1] = 0.01
    np.testing.assert_array_equal(masks.feathered(soft, (32, 32), 3), masks.feathered(np.ceil(soft), (32, 32), 3))
    for error, radii in {ValueError: (-1, math.nan, 1e9, None), TypeError: (True, "3")}.items():
        for radius in radii:
            assert "`radius`" in message(error, masks.feathered, soft, (32, 32), radius)


def test_pasting_back_is_exact():
    original, edited = (np.stack([picture(64, 48, 2 * i + k) for i in range(2)]) for k in range(2))
    mask = np.zeros((2, 8, 6), np.int64)
    mask[0, 2:5, 1:4], mask[1, 6, 5] = 1, 1
    weights = masks.feathered(mask, (64, 48), 7)
    before = original.copy(), edited.copy()
    result = masks.paste_back(original, edited, weights)
    assert result.dtype == np.uint8 and result.shape == original.shape
    np.testing.assert_array_equal(result[weights == 0], original[weights == 0])
    np.testing.assert_array_equal(result[weights == 1], edited[weights == 1])
    between = (weights > 0) & (weights < 1)
    assert between.sum() > 100
    w = weights[between][:, None].astype(np.float64)
    exact = w * edited[between] + (1 - w) * original[between]
    assert np.abs(result[between] - exact).max() <= 0.5 + 1e-4
    np.testing.assert_array_equal(original, before[0])
    np.testing.assert_array_equal(edited, before[1])
    # All pairs of levels, kept and replaced.
    levels = np.arange(256, dtype=np.uint8)
    first, second = (np.repeat(m[None, :, :, None], 3, 3) for m in np.meshgrid(levels, levels))
    for weight, kept in ((0, first), (1, second)):
        np.testing.assert_array_equal(masks.paste_back(first, second, np.full((1, 256, 256), weight)), kept)
    half = masks.paste_back(first, second, np.full((1, 256, 256), 0.5))
    assert half[0, 200, 100].tolist() == [150] * 3
    # One weight serves all pictures.
    black, grey = np.zeros((3, 4, 4, 3), np.uint8), np.full((3, 4, 4, 3), 9, np.uint8)
    one = masks.paste_back(black, grey, np.eye(4)[None])
    np.testing.assert_array_equal(one, np.broadcast_to(9 * np.eye(4)[None, :, :, None], (3, 4, 4, 3)))


def test_what_cannot_be_pasted():
    good, weights = np.zeros((2, 4, 6, 3), np.uint8), np.zeros((2, 4, 6))
    for words, *arguments in (
        ("(4, 6, 3)", good[0], good[0], weights), ("(2, 4, 5, 3)", good, good[:, :, 1:], weights),
        ("(2, 4, 6)", good, good, np.zeros((2, 6, 4))), ("feathered", good, good, np.zeros((3, 4, 6))),
        ("`weights`", good, good, weights + 1.5), ("NaN", good, good, weights * np.nan),
    ):  # fmt: skip
        assert words in message(ValueError, masks.paste_back, *arguments)
    assert "`edited`" in message(TypeError, masks.paste_back, good, good.astype(np.float32), weights)
    assert "`original`" in message(TypeError, masks.paste_back, good / 255, good, weights)


# --- pictures of masks -----------------------------------------------------------------------------


def test_overlays_colour_the_mask_and_nothing_else():
    pixels = picture(80, 120)
    mask = np.zeros((1, 10, 15), np.int64)
    mask[0, 2:6, 3:9] = 1
    shown = masks.overlay(PIL.Image.fromarray(pixels), mask, colour=(10, 200, 30), opacity=0.25, outline=False)
    assert shown.mode == "RGB" and shown.size == (120, 80)
    inside = masks.enlarged(mask, (80, 120))[0] == 1
    shown = np.asarray(shown)
    np.testing.assert_array_equal(shown[~inside], pixels[~inside])
    expected = 0.75 * pixels[inside] + 0.25 * np.array([10, 200, 30])
    assert np.abs(shown[inside] - expected).max() <= 0.5001
    # The outline is inside, in the full colour, one pixel wide here.
    lined = np.asarray(masks.overlay(PIL.Image.fromarray(pixels), mask, colour=(10, 200, 30), opacity=0.25))
    frame = np.zeros_like(inside)
    frame[16:48, 24:72] = True
    frame[17:47, 25:71] = False
    assert (lined[frame] == (10, 200, 30)).all()
    np.testing.assert_array_equal(lined[~frame], shown[~frame])


def test_overlays_of_any_picture_and_mask():
    grey = PIL.Image.fromarray(HALVES)
    shown = np.asarray(masks.overlay(grey, grey, opacity=1, outline=False))
    assert (shown[:, 4:] == (255, 0, 64)).all() and (shown[:, :4] == 0).all()
    soft = np.asarray(masks.overlay(PIL.Image.new("L", (2, 1)), np.array([[0.5, 0.0]]), (200, 100, 40), 1.0, False))
    assert soft.tolist() == [[[100, 50, 20], [0, 0, 0]]]
    empty = masks.overlay(grey, np.zeros((4, 4)))
    np.testing.assert_array_equal(np.asarray(empty), np.asarray(grey.convert("RGB")))


def test_overlays_that_cannot_be_drawn():
    grey, mask = PIL.Image.fromarray(HALVES), np.zeros((4, 4))
    assert "ndarray" in message(TypeError, masks.overlay, HALVES, mask)
    assert "`opacity`" in message(ValueError, masks.overlay, grey, mask, opacity=2)
    for colour in ((1, 2), (1, 2, 3, 4), "red", 7, (1.5, 0, 0), (0, 0, 256), (True, 0, 0)):
        assert "`colour`" in message(ValueError, masks.overlay, grey, mask, colour=colour)
    assert "`outline`" in message(TypeError, masks.overlay, grey, mask, outline=1)
    assert "batch size 2" in message(ValueError, masks.overlay, grey, np.zeros((2, 4, 4)))


# --- sweeps ----------------------------------------------------------------------------------------


def test_sweeps():
    assert masks.sweep_values("0.3, 0.5,7e-1", "threshold", options.check_threshold) == [0.3, 0.5, 0.7]
    steps = masks.sweep_values(",".join(map(str, range(1, 13))), "steps", options.check_steps)
    assert steps == [*range(1, 13)] and all(type(value) is int for value in steps)
    for text, words in (
        ("", "''"), (" ", "commas"), (None, "None"), ("0.3,,0.5", "an empty place"), ("0.3,", "an empty place"),
        ("0.3;0.5", "'0.3;0.5'"), ("a,b", "'a'"), ("0.3,1.5", "1.5"), ("0.3,nan", "nan"), ("0.3,inf", "inf"),
        ("0.5,0.3,0.50", "'0.50' twice"), (",".join(str(0.01 * i) for i in range(1, 14)), "13 values"),
    ):  # fmt: skip
        told = message(ValueError, masks.sweep_values, text, "threshold", options.check_threshold)
        assert words in told and "`threshold`" in told
    assert "whole number" in message(ValueError, masks.sweep_values, "10,2.5", "steps", options.check_steps)
