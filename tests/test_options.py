"""Validation: what passes, what is refused with which exception, and that messages say enough."""

import itertools
import math

import numpy as np
import pytest

from mindiffedit import options
from mindiffedit.errors import InputError, InputTypeError

NOT_NUMBERS = [True, False, np.True_, "1", [1], 1j, np.zeros(1), object()]


def message(function, *args, error=ValueError, **kwargs):
    """The one-line message of the error about input, of this kind, that the call raises."""
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    assert caught.type is {ValueError: InputError, TypeError: InputTypeError}[error]
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- numbers ---------------------------------------------------------------------------------------

REALS = {
    # function: (accepted, refused)
    options.check_strength: ([0, 1, 0.5, np.float32(0.25), np.int64(1), 1e-9], [-0.01, 1.01, -1, 2]),
    options.check_guidance_scale: ([0, 1, 7.5, np.float16(2), 100], [-0.001, -7.5]),
    options.check_ratio: ([1e-6, 3, np.float64(0.5)], [0, -3, 0.0]),
    options.check_eta: ([0, 1, 0.3], [-0.1, 1.1]),
    options.check_threshold: ([0.5, 1e-6, np.float32(0.25)], [0, 1, -0.5, 1.5]),
}


def test_real_numbers():
    for check, (accepted, refused) in REALS.items():
        for value in accepted:
            result = check(value)
            assert type(result) is float and result == value
        for value in refused:
            assert str(value) in message(check, value)
        for value in (math.nan, math.inf, -math.inf, np.float32("nan")):
            assert "nan" in message(check, value) or "inf" in message(check, value)
        message(check, None)
        for value in NOT_NUMBERS:
            assert type(value).__name__ in message(check, value, error=TypeError)
    assert "`mask_encode_strength`" in message(options.check_strength, 2, "mask_encode_strength")


def test_whole_numbers():
    for value in (1, 50, 1000, np.int32(7)):
        result = options.check_steps(value)
        assert type(result) is int and result == value
    for value in (0, -1, 1001):
        assert str(value) in message(options.check_steps, value)
    for value in (*NOT_NUMBERS, 50.0, None, math.nan):
        message(options.check_steps, value, error=TypeError)
    # Value errors, as in the reference.
    assert options.check_positive_int("maps", np.int64(3)) == 3
    for value in (*NOT_NUMBERS, 0, -2, 1.5, 2.0, None):
        assert "`maps`" in message(options.check_positive_int, "maps", value)


def test_effective_steps_are_the_reference_s():
    strengths = (0.1, 0.29, 0.5, 0.58, 0.8, 0.999, 1.0)
    for steps, strength in itertools.product([*range(1, 60), 100, 999, 1000], strengths):
        expected = min(int(steps * strength), steps)
        if expected:
            assert options.effective_steps(steps, strength) == expected
        else:
            message(options.effective_steps, steps, strength)


def test_the_remedy_that_is_named_works():
    for steps, share in itertools.product(range(1, 120), (0.0, 0.3, 0.99)):
        strength = share / steps
        if int(steps * strength) >= 1:
            continue
        text = message(options.effective_steps, steps, strength, "s")
        least = float(text.split("give at least ")[1].split(",")[0].rstrip("."))
        assert int(steps * least) >= 1
        if "or `num_inference_steps` of at least" in text:
            needed = int(text.split("or `num_inference_steps` of at least ")[1].rstrip("."))
            assert int(needed * strength) >= 1 and int((needed - 1) * strength) < 1
        else:
            assert strength < 1 / options.MAX_STEPS


def test_output_types():
    assert options.check_output_type("np", ("np", "pil")) == "np"
    assert "'np' or 'pil'" in message(options.check_output_type, "pt", ("np", "pil"))
    for value in (None, 3, ["np"]):
        message(options.check_output_type, value, ("np", "pil"))


def test_callbacks():
    assert options.check_callback(None, 1) == 1
    assert options.check_callback(print, np.int64(4)) == 4
    message(options.check_callback, "print", 1, error=TypeError)
    for steps in (0, -1, None, 1.0, True):
        message(options.check_callback, None, steps)


def test_clip_skip():
    # The hidden states are the embedding and one for each layer, so all layers can be skipped.
    assert [options.check_clip_skip(n, 12) for n in (None, 0, 1, 12)] == [None, 0, 1, 12]
    for value in (-1, 13):
        assert "12" in message(options.check_clip_skip, value, 12)
    for value in (1.0, True, "1"):
        message(options.check_clip_skip, value, 12, error=TypeError)


def test_regularisation():
    assert options.check_regularisation(20, np.float32(0.5), 0, np.int64(5)) == (20.0, 0.5, 0, 5)
    for arguments, name in (
        ((-1, 20, 1, 5), "lambda_auto_corr"),
        ((20, math.nan, 1, 5), "lambda_kl"),
        ((20, 20, -1, 5), "num_reg_steps"),
        ((20, 20, 1, -5), "num_auto_corr_rolls"),
    ):
        assert name in message(options.check_regularisation, *arguments)
    for arguments in (("a", 20, 1, 5), (20, 20, 1.0, 5), (20, 20, 1, True)):
        message(options.check_regularisation, *arguments, error=TypeError)


# --- prompts ---------------------------------------------------------------------------------------


def embeds(batch=1, tokens=4, width=8):
    return np.random.default_rng(0).normal(size=(batch, tokens, width)).astype(np.float32)


def test_prompts_that_fit():
    for arguments, batch in (
        (("",), 1),
        ((["a", ""],), 2),
        (("a", "b"), 1),
        ((["a", "b"], ["c", "d"]), 2),
        ((None, None, embeds(3)), 3),
        ((None, None, embeds(3), embeds(3)), 3),
        ((None, ["b", "c"], embeds(2)), 2),
        ((["a", "b"], None, None, embeds(2)), 2),
    ):
        assert options.check_prompt_inputs(*arguments) == batch
    # Without guidance negatives need not fit.
    assert options.check_prompt_inputs(["a", "b"], "c", guided=False) == 2
    assert options.check_prompt_inputs(["a", "b"], None, None, embeds(1), guided=False) == 2


PROMPTS_REFUSED = [
    ((None,), ValueError, "both are None"),
    (("a", None, embeds()), ValueError, "Cannot forward both"),
    (("a", "b", None, embeds()), ValueError, "Cannot forward both"),
    ((3,), ValueError, "`str` or `list`"),
    ((("a", "b"),), ValueError, "`str` or `list`"),
    (([],), ValueError, "empty list"),
    ((["a", None],), ValueError, "prompt[1]"),
    (("a", ["b"]), TypeError, "same type"),
    ((["a"], "b"), TypeError, "same type"),
    (("a", 3), TypeError, "same type"),
    ((["a", "b"], ["c"]), ValueError, "batch size 1"),
    ((["a"], ["c", 4]), ValueError, "negative_prompt[1]"),
    ((None, "b", embeds(2)), ValueError, "batch size 1"),
    ((None, None, embeds(2, 4), embeds(2, 5)), ValueError, "same shape"),
    ((["a", "b"], None, None, embeds(1)), ValueError, "batch size 1"),
    ((None, None, embeds()[0]), ValueError, "(4, 8)"),
    ((None, None, embeds(0)), ValueError, "(0, 4, 8)"),
    ((None, None, embeds() * np.nan), ValueError, "NaN"),
    (("a", None, None, embeds() + np.inf), ValueError, "infinite"),
    ((None, None, np.zeros((1, 4, 8), int)), TypeError, "int64"),
    ((None, None, "embeds"), TypeError, "floating-point"),
]


def test_prompts_that_do_not_fit():
    for arguments, error, words in PROMPTS_REFUSED:
        assert words in message(options.check_prompt_inputs, *arguments, error=error)
        for prefix in ("target_", "target"):
            text = message(options.check_prompt_inputs, *arguments, prefix=prefix, error=error)
            assert "target_prompt" in text or "target_negative_prompt" in text
            assert "`prompt" not in text and "`negative_prompt" not in text
    # What cannot be meant at all is refused without guidance too.
    message(options.check_prompt_inputs, "a", "b", None, embeds(), guided=False)


def test_the_reference_refuses_the_same_prompts_with_the_same_types():
    """Of the table above, everything the reference's own two checks look at."""
    torch = pytest.importorskip("torch")
    pipeline, seen = pytest.importorskip("diffusers").StableDiffusionDiffEditPipeline, 0
    for arguments, error, _ in PROMPTS_REFUSED:
        prompt, *others = (torch.from_numpy(value) if isinstance(value, np.ndarray) else value for value in arguments)
        try:
            pipeline.check_inputs(None, prompt, 0.5, 1, *others)
        except (ValueError, TypeError) as refused:
            assert isinstance(refused, error), arguments
            seen += 1
        except Exception:
            pass  # it stumbles over what it does not check
    assert seen >= 6


# --- batches, latents, generators ------------------------------------------------------------------


def test_image_batches():
    assert [options.check_image_batch(*n) for n in ((1, 1), (1, 4), (2, 4), (4, 4))] == [1, 4, 2, 1]
    for images, batch in ((3, 4), (4, 2), (2, 1), (0, 2)):
        assert str(batch) in message(options.check_image_batch, images, batch)


def latents(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def test_image_latents_in_both_layouts_and_of_other_frameworks():
    five = latents(2, 3, 4, 5, 6)
    assert options.check_image_latents(five, 2, 3, (4, 5, 6)) is five
    torch = pytest.importorskip("torch")
    for array in (five.reshape(6, 4, 5, 6), torch.from_numpy(five)):
        np.testing.assert_array_equal(options.check_image_latents(array, 2, 3, [4, 5, 6]), five)


def test_image_latents_that_do_not_fit():
    one_nan = latents(2, 3, 4, 5, 6)
    one_nan[1, 2, 3, 4, 5] = np.nan
    for array, error, words in (
        (latents(2, 4, 4, 5, 6), ValueError, "4 timesteps"),
        (latents(1, 3, 4, 5, 6), ValueError, "batch size 1"),
        (latents(2, 3, 4, 6, 5), ValueError, "(4, 5, 6)"),
        (latents(5, 4, 5, 6), ValueError, "5 latent images"),
        (latents(4, 5, 6), ValueError, "(4, 5, 6)"),
        (one_nan, ValueError, "NaN"),
        (latents(2, 3, 4, 5, 6).astype(np.int64), TypeError, "int64"),
        (latents(2, 3, 4, 5, 6).astype(complex), TypeError, "complex"),
        ("latents", TypeError, "floating-point"),
    ):
        assert words in message(options.check_image_latents, array, 2, 3, (4, 5, 6), error=error)


def test_generators():
    for generator in (None, 3, np.random.default_rng(0), [1, 2]):
        options.check_generators(generator, 2)
    for generator in ([], [1], (1, 2, 3)):
        assert str(len(generator)) in message(options.check_generators, generator, 2)


# --- numerical errors ------------------------------------------------------------------------------


def test_check_finite_names_stage_and_step():
    for array in (latents(2, 3), np.zeros((0,)), np.array([1, 2])):
        options.check_finite(array, "inversion", 4)
    for bad in (np.nan, np.inf, -np.inf):
        array = latents(2, 3)
        array[1, 2] = bad
        with pytest.raises(options.NumericalError, match="inversion, step 0: 1 of 6") as caught:
            options.check_finite(array, "inversion", 0)
        assert (caught.value.stage, caught.value.step) == ("inversion", 0)
        assert isinstance(caught.value, ArithmeticError) and isinstance(caught.value, ValueError)
    with pytest.raises(options.NumericalError, match="^VAE decoding: 6 of 6") as caught:
        options.check_finite(np.full((2, 3), np.nan), "VAE decoding")
    assert caught.value.step is None
