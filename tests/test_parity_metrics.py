"""Comparisons and tolerances: every way to be out of tolerance, and that nothing slips through as within."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from mindiffedit.parity import metrics, tolerances
from mindiffedit.parity.metrics import compare, compare_traces, first_failure, passed


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def reason(one):
    """Why a comparison is out of tolerance: one sentence without a line break or a full stop."""
    assert not one.ok
    assert one.reason and "\n" not in one.reason and not one.reason.endswith(".")
    return one.reason


# --- close and absolute ----------------------------------------------------------------------------


def test_the_numbers_of_a_known_case():
    theirs = np.array([3.0, -4.0, 0.0, 0.0], np.float32)  # rms 2.5
    ours = np.array([3.0, -4.0, 0.0, 0.5], np.float32)
    one = compare(ours, theirs, 0.2, name="mask/moments")
    assert (one.name, one.kind, one.shape, one.step, one.steps) == ("mask/moments", "close", (4,), None, None)
    assert one.max_abs == 0.5
    assert one.relative == pytest.approx(0.2, abs=0)
    assert one.rms_relative == pytest.approx(0.1)
    assert one.cosine == pytest.approx(25 / (5 * math.sqrt(25.25)))
    assert one.ok and one.reason is None and one.measure == one.relative and one.excess == 1
    just_less = compare(ours, theirs, np.nextafter(0.2, 0))
    assert "2.00e-01" in reason(just_less)


def test_what_the_size_of_the_reference_decides():
    small, large = np.full(4, 1.0), np.full(4, 2.0)
    assert compare(small, large, 0.5).ok and not compare(large, small, 0.5).ok
    assert compare(-normal(50), normal(50), 1).cosine == pytest.approx(-1)
    one = compare(normal(2, 3), normal(2, 3), 0)
    assert one.ok and (one.max_abs, one.relative, one.rms_relative) == (0, 0, 0) and one.cosine == pytest.approx(1)
    theirs = np.full(8, 1000.0)  # which an absolute difference does not look at
    one = compare(theirs + 0.5, theirs, 0.5, kind="absolute")
    assert one.ok and one.measure == 0.5
    assert "6.00e-01" in reason(compare(theirs + 0.6, theirs, 0.5, kind="absolute"))
    zeros = np.zeros((2, 2), np.float32)
    assert compare(zeros, zeros, 0).ok and compare(zeros, zeros, 0).cosine == 1
    one = compare(zeros + np.float32(1e-30), zeros, 1e6)
    assert one.relative == one.rms_relative == math.inf and one.cosine == 0 and reason(one)
    # Differences are computed in float64.
    theirs = np.full(4, 1.0, np.float16)
    assert compare(theirs + np.float16(2**-10), theirs, 1).max_abs == 2**-10
    big = np.full(4, 60000.0, np.float16)
    one = compare(-big, big, 2.001)  # 120000 is above float16's largest number
    assert one.ok and one.max_abs == 120000


def test_an_rms_that_overflows_lets_nothing_pass():
    """Over an infinite rms any difference would be 0; one that vanishes makes any difference infinite."""
    for size in (1e300, 1e-300, 1e-30):
        theirs = normal(100, dtype=np.float64) * size
        reason(compare(theirs * 1.5, theirs, 0.1))
    reason(compare(-np.full(3, 1.7e308), np.full(3, 1.7e308), 1))


# --- what is never within --------------------------------------------------------------------------


def test_not_finite_values_are_out_of_tolerance():
    for kind, bad, sides in itertools.product(
        ["close", "absolute", "exact", "mask"], [math.nan, math.inf, -math.inf], [[0], [1], [0, 1]]
    ):
        pair = np.ones((2, 2, 3))
        pair[sides, 1, 2] = bad
        assert "1 of 6 values of" in reason(compare(*pair, 1e30, kind=kind))


def test_what_cannot_be_compared():
    ones = np.ones((2, 3), np.uint8)
    for kind in metrics.KINDS:
        for tolerance in (math.nan, -1e-9, math.inf, None, [1, 1]):
            assert "tolerance" in reason(compare(ones, ones, tolerance, kind=kind))
        assert compare(ones, ones, 0, kind=kind).ok and compare(ones.astype(np.int64), ones, 1, kind=kind).ok
        for ours, theirs, words in (
            (None, ones, "our run"), (ones, None, "the reference does not"), (ones.T, ones, "(3, 2)"),
            (ones[None], ones, "(1, 2, 3)"), (ones[:0], ones[:0], "empty"), (ones.astype(np.float32), ones, "float32"),
            (ones.astype(bool), ones, "booleans"),
            *((ones.astype(dtype), ones.astype(dtype), "no numbers") for dtype in (object, str, complex)),
        ):  # fmt: skip
            assert words in reason(compare(ours, theirs, 1, kind=kind)), kind
    assert compare(None, ones, 1).shape == compare(ones, None, 1).shape == (2, 3)
    assert compare(None, None, 1).shape == () and not compare(None, None, 1).ok
    with pytest.raises(ValueError, match="nearly"):
        compare(ones, ones, 0, kind="nearly")


# --- exact, levels ---------------------------------------------------------------------------------


def test_exact_names_the_first_value_that_differs():
    theirs = np.arange(12).reshape(3, 4)
    ours = theirs.copy()
    ours[1, 2], ours[2, 0] = 99, -1
    one = compare(ours, theirs, 1000, kind="exact")
    assert "2 of 12 values differ, the first at [1, 2]: ours 99, the reference 6" in reason(one)
    assert one.counts == {"differing": 2, "total": 12} and one.measure == 2
    assert compare(theirs, theirs, 0, kind="exact").ok
    assert "ours 3, the reference 4" in reason(compare(np.int64(3), np.int64(4), 0, kind="exact"))
    big = np.array([2**53], np.int64)  # float64 sees no difference to the next number
    reason(compare(big + 1, big, 0, kind="exact"))


def test_levels_do_not_wrap():
    """255 and 0 are 255 levels apart; in uint8 their difference would be 1."""
    white, black = np.full((2, 2, 3), 255, np.uint8), np.zeros((2, 2, 3), np.uint8)
    for ours, theirs in ((white, black), (black, white)):
        one = compare(ours, theirs, 1, kind="levels")
        assert one.max_abs == 255 and "255 levels" in reason(one)
    near = black.copy()
    near[0, 0, 0] = 1
    for ours, theirs in ((near, black), (black, near)):
        one = compare(ours, theirs, 1, kind="levels")
        assert one.ok and one.max_abs == 1 and one.counts == {"differing": 1, "total": 12}
    assert "integers" in reason(compare(np.ones(2), np.ones(2), 1, kind="levels"))


# --- masks -----------------------------------------------------------------------------------------


def mask_case():
    """A map with threshold 1 (clamp magnitude 2) and rms 1, two pixels within 0.01 of it, and its mask."""
    values = np.array([[0.2, 1.004, 1.6], [0.997, 0.5, 1.2], [0.9, 1.1, 0.8]])
    values[2, 2] = math.sqrt(9 - (np.sum(values**2) - values[2, 2] ** 2))
    return values, np.float32(2), (values > 1).astype(np.int64)


def compare_masks(ours, theirs, margin=0.01, **changed):
    values, magnitude, _ = mask_case()
    changed = {"reference_map": values, "clamp_magnitude": magnitude, **changed}
    return compare(ours, theirs, margin, kind="mask", **changed)


def test_pixels_near_the_threshold_may_flip_others_may_not():
    _, _, mask = mask_case()
    one = compare_masks(mask, mask)
    assert one.ok and one.counts == {"differing": 0, "total": 9, "excepted": 2, "excepted_differing": 0}
    ours = mask.copy()
    ours[0, 1] = 1 - ours[0, 1]
    one = compare_masks(ours, mask)
    assert one.ok and one.measure == 0
    assert one.counts == {"differing": 1, "total": 9, "excepted": 2, "excepted_differing": 1}
    ours[2, 1] = 1 - ours[2, 1]  # 0.1 from the threshold
    one = compare_masks(ours, mask)
    assert "1 of 9 pixels differ" in reason(one) and one.measure == 1
    assert one.counts["differing"] == 2 and one.counts["excepted_differing"] == 1


def test_the_margin_is_relative_to_the_rms_of_the_map():
    values, magnitude, mask = mask_case()
    for scale in (1e-3, 1e3):
        one = compare_masks(mask, mask, reference_map=values * scale, clamp_magnitude=magnitude * scale)
        assert one.counts["excepted"] == 2
    assert compare_masks(mask, mask, margin=0.0035).counts["excepted"] == 1
    assert compare_masks(mask, mask, margin=0).counts["excepted"] == 0
    ours = mask.copy()
    ours[0, 1] = 1 - ours[0, 1]
    reason(compare_masks(ours, mask, clamp_magnitude=np.float32(1)))  # half of which is another threshold
    one = compare(ours, mask, 0.01, kind="mask")  # without a map no pixel is excepted
    assert reason(one) == "1 of 9 pixels differ" and "excepted" not in one.counts
    assert compare(mask, mask, 0.01, kind="mask").ok


def test_what_fails_equal_masks():
    """A map that does not fit, values other than 0 and 1 even where they are excepted, too wide a margin."""
    _, _, mask = mask_case()
    for changed, words in (
        ({"reference_map": None}, "missing"),
        ({"clamp_magnitude": None}, "missing"),
        ({"reference_map": np.ones((3, 4))}, "(3, 4)"),
        ({"reference_map": np.full((3, 3), math.nan)}, "not finite"),
        ({"clamp_magnitude": np.ones(2)}, "(2,)"),
        ({"clamp_magnitude": math.nan}, "above 0"),
        ({"clamp_magnitude": 0.0}, "above 0"),
    ):
        assert words in reason(compare_masks(mask, mask, **changed))
    other = mask.copy()
    other[0, 1] = 255
    assert "1 of 9 values of ours are neither 0 nor 1" in reason(compare_masks(other, mask))
    assert "the reference" in reason(compare_masks(mask, other))
    one = compare_masks(mask, mask, margin=0.3)
    assert "too near" in reason(one) and one.counts["excepted"] > 9 * metrics.MAX_EXCEPTED


# --- stacked by step -------------------------------------------------------------------------------


def test_the_first_bad_step_is_named_not_the_worst():
    theirs = normal(5, 1, 2, 3)
    ours = theirs.astype(np.float64)
    ours[2] += 0.1
    ours[4] += 10
    one = compare(ours, theirs, 1e-3, name="invert/inverted_latents", stacked=True)
    assert reason(one) and (one.step, one.steps, one.shape) == (2, 5, (5, 1, 2, 3))
    assert one.max_abs == pytest.approx(0.1, rel=1e-6)
    assert one.where == "invert/inverted_latents, step 3 of 5"
    assert len(one.by_step) == 5 and one.by_step[4] > one.by_step[2] > one.by_step[0] == 0
    # Where all is well, the worst step speaks, by what each step is allowed, not by the difference itself.
    theirs = normal(4, 3, dtype=np.float64)
    ours = theirs + np.array([1e-6, 5e-6, 2e-6, 0])[:, None]
    for tolerance, step in ((1, 1), ([1e-5, 1, 1, 1], 0)):
        one = compare(ours, theirs, tolerance, stacked=True)
        assert one.ok and one.step == step
    # Each step has its own rms: an error in a small step is not hidden by a large one.
    theirs = np.stack([np.full(4, 1e-3), np.full(4, 1e3)])
    ours = theirs * [[1.5], [1]]
    assert compare(ours, theirs, 1e-3).ok
    one = compare(ours, theirs, 1e-3, stacked=True)
    assert reason(one) and one.step == 0 and one.relative == pytest.approx(0.5)


def test_a_tolerance_for_each_step():
    theirs = np.ones((3, 2))
    ours = theirs + np.array([0.01, 0.1, 0.3])[:, None]
    assert compare(ours, theirs, [0.02, 0.2, 0.4], stacked=True).ok
    one = compare(ours, theirs, [0.02, 0.2, 0.2], stacked=True)
    reason(one)
    assert one.step == 2 and one.tolerance == 0.2
    assert "(2,)" in reason(compare(ours, theirs, [0.5, 0.5], stacked=True))
    assert "nan" in reason(compare(ours, theirs, [0.5, math.nan, 0.5], stacked=True))
    ours[1, 0] = math.nan
    one = compare(ours, theirs, 1, stacked=True)
    assert "NaN" in reason(one) and one.step == 1


def test_stacked_integers_and_noise():
    theirs = np.array([801, 601, 401])
    one = compare(np.array([801, 602, 402]), theirs, 0, kind="exact", stacked=True)
    assert one.step == 1 and reason(one) == "1 of 1 values differ: ours 602, the reference 601"
    assert one.counts == {"differing": 2, "total": 3}
    noise = normal(3, 4)
    assert compare(noise + np.float32(5e-7), noise, 1e-6, kind="absolute", stacked=True).ok
    assert not compare(noise + np.float32(5e-6), noise, 1e-6, kind="absolute", stacked=True).ok
    assert "single number" in reason(compare(np.float32(1), np.float32(1), 0, stacked=True))


# --- traces ----------------------------------------------------------------------------------------


def traces():
    values, magnitude, mask = mask_case()
    theirs = {
        "mask/token_ids": np.arange(6).reshape(1, 6),
        "mask/moments": normal(1, 2, 3),
        "mask/map": values,
        "mask/clamp_magnitude": magnitude,
        "mask/mask": mask,
        "invert/inverted_latents": normal(4, 1, 2, 2),
        "edit/picture": np.full((1, 2, 2, 3), 128, np.uint8),
    }
    return {name: array.copy() for name, array in theirs.items()}, theirs


def limits_of(theirs):
    """The table's limits, with a floor that makes the mask's margin that of `mask_case`."""
    floor = 0.01 / tolerances.for_stage("mask/mask").factor
    return tolerances.limits(theirs, {"mask/map": floor})


def test_equal_traces_pass_in_the_order_of_the_reference():
    ours, theirs = traces()
    found = compare_traces(dict(reversed(ours.items())), theirs, limits_of(theirs))
    assert [one.name for one in found] == list(theirs)
    assert passed(found) and first_failure(found) is None
    assert [one.kind for one in found] == ["exact", "close", "close", "close", "mask", "close", "levels"]


def test_each_planted_difference_is_found_in_its_own_stage():
    for name in traces()[1]:
        ours, theirs = traces()
        ours[name] = ours[name] * 0 if name == "mask/mask" else ours[name] + ours[name].dtype.type(3)
        found = compare_traces(ours, theirs, limits_of(theirs))
        assert [one.name for one in found if not one.ok] == [name]
        assert first_failure(found).name == name and not passed(found)


def test_the_mask_is_judged_by_the_references_map_of_the_same_call():
    ours, theirs = traces()
    ours["mask/mask"][0, 1] = 1 - ours["mask/mask"][0, 1]
    ours["mask/map"] = ours["mask/map"] + 5  # ours does not decide what is near the threshold
    found = {one.name: one for one in compare_traces(ours, theirs, limits_of(theirs))}
    assert found["mask/mask"].ok and found["mask/mask"].counts["excepted_differing"] == 1
    theirs["edit/mask"] = theirs["mask/mask"]
    ours["edit/mask"] = ours["mask/mask"]
    found = {one.name: one for one in compare_traces(ours, theirs, limits_of(theirs))}
    assert not found["edit/mask"].ok


def test_missing_and_extra_stages():
    ours, theirs = traces()
    del ours["mask/moments"]
    ours["edit/surprise"] = np.ones(2)
    found = compare_traces(ours, theirs, limits_of(theirs))
    assert [one.name for one in found] == [*theirs, "edit/surprise"]
    bad = {one.name: reason(one) for one in found if not one.ok}
    assert list(bad) == ["mask/moments", "edit/surprise"]
    assert "our run" in bad["mask/moments"] and "the reference does not" in bad["edit/surprise"]
    assert not passed([])  # no comparison at all is no success


# --- the table -------------------------------------------------------------------------------------


def test_every_stage_has_its_row():
    for pattern, names in {
        "*token_ids": "mask/target_token_ids mask/source_negative_token_ids invert/negative_token_ids",
        "timesteps": "invert/timesteps", "timestep": "mask/timestep", "coefficients": "edit/coefficients",
        "*noise": "mask/posterior_noise mask/noise", "step_noise": "edit/step_noise", "moments": "invert/moments",
        "*prompt_embeds": "mask/target_prompt_embeds mask/source_negative_prompt_embeds edit/prompt_embeds",
        "*noise_predictions": "mask/noise_predictions mask/negative_noise_predictions",
        "predictions": "invert/predictions edit/predictions", "latents": "mask/latents", "map": "mask/map",
        "noised_latents": "mask/noised_latents", "clamp_magnitude": "mask/clamp_magnitude", "mask": "mask/mask",
        "inverted_latents": "invert/inverted_latents", "edited_latents": "edit/edited_latents",
        "clean_predictions": "edit/clean_predictions", "decoded": "edit/decoded invert/decoded",
        "picture": "edit/picture",
    }.items():  # fmt: skip
        assert {tolerances.for_stage(name).pattern for name in names.split()} == {pattern}
    with pytest.raises(ValueError, match="edit/surprise"):
        tolerances.for_stage("edit/surprise")
    for row in tolerances.TABLE:
        assert row.kind in metrics.KINDS and 0 <= row.least <= row.default < math.inf
        assert row.factor > 0 or row.least == row.default
    loops = {"predictions", "inverted_latents", "edited_latents", "clean_predictions"}
    stacked = {row.pattern for row in tolerances.TABLE if row.stacked}
    assert stacked == {"timesteps", "coefficients", "step_noise", *loops}
    page = (Path(__file__).parent.parent / "docs" / "parity.md").read_text(encoding="utf-8")
    assert f"<!-- rules: begin -->\n{tolerances.render_markdown()}<!-- rules: end -->" in page


def test_limits_are_multiples_of_floors_and_never_below_the_least():
    row = tolerances.for_stage("mask/moments")
    assert tolerances.limit("mask/moments", 1e-3) == pytest.approx(row.factor * 1e-3)
    assert tolerances.limit("mask/moments", 0) == row.least > 0
    assert tolerances.limit("mask/moments") == row.default
    row = tolerances.for_stage("edit/edited_latents")
    found = tolerances.limit("edit/edited_latents", [0, 1e-4, 2e-4])
    np.testing.assert_allclose(found, [row.least, row.factor * 1e-4, row.factor * 2e-4], rtol=1e-12)
    assert type(tolerances.limit("edit/edited_latents", 1e-4)) is float
    # What has to be equal is not loosened.
    assert tolerances.limit("mask/timestep", 100) == 0
    for name in ("edit/picture", "mask/noise", "edit/coefficients"):
        assert tolerances.limit(name, 100) == tolerances.for_stage(name).least <= 1


def test_senseless_floors_are_refused():
    for floor in (math.nan, -1e-9, math.inf, [], [1e-5, math.nan], [[1e-5]]):
        with pytest.raises(ValueError, match="invert/inverted_latents.*at least 0, or one for each step"):
            tolerances.limit("invert/inverted_latents", floor)
    with pytest.raises(ValueError, match="at least 0, but is"):  # a list of floors is for stacked stages
        tolerances.limit("mask/moments", [1e-5, 1e-5])


def test_a_mask_takes_the_floor_of_its_map():
    assert tolerances.floor_of("mask/mask") == tolerances.floor_of("mask/clamp_magnitude") == "mask/map"
    assert tolerances.floor_of("mask/moments") == "mask/moments"
    limits = tolerances.limits(["mask/map", "mask/mask", "invert/predictions"], {"mask/map": 1e-4, "mask/mask": 1})
    assert limits["mask/mask"].value == pytest.approx(tolerances.for_stage("mask/mask").factor * 1e-4)
    assert limits["mask/mask"].kind == "mask" and not limits["mask/mask"].stacked
    assert limits["invert/predictions"].value == tolerances.for_stage("invert/predictions").default
    assert limits["invert/predictions"].stacked
