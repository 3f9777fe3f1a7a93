"""``edit`` and the corrections that it switches on: each against its formula, and the whole against the three calls."""

import numpy as np
import parity
import pytest
from PIL import Image
from test_pipeline import PICTURE, SOURCE, TARGET, our_pipeline

from mindiffedit import (
    DDIMInverseScheduler,
    DiffEditOutput,
    DPMSolverMultistepScheduler,
    MaskOptions,
    editing,
    masks,
    options,
)
from mindiffedit.arrays import to_numpy
from mindiffedit.images import edges
from mindiffedit.images.colours import Original
from mindiffedit.outputs import DiffEditInversionPipelineOutput, EditReport

SHORT = dict(num_inference_steps=4, inpaint_strength=0.75)
# The masks of edit() are for larger grids than these checkpoints have.
QUICK = dict(
    SHORT,
    preset="exact",
    num_maps_per_mask=2,
    guidance_scale=2.0,
    generator=0,
    mask_options=MaskOptions(),
    mask_thresholding_ratio=3.0,
)
BOX = np.zeros((8, 10), np.float32)
BOX[2:6, 3:7] = 1
REFERENCE = dict(
    per_image_clamp=False,
    corrected_guidance=False,
    outlier_quantile=None,
    mask_options=MaskOptions(),
    inversion_guidance_scale=2.0,
    aligned_background=False,
    paste_back=False,
)
"""Every correction off."""


@pytest.fixture(scope="module")
def ours(sd1_folder):
    return our_pipeline(sd1_folder)


@pytest.fixture(scope="module")
def ours2(sd2_folder):
    return our_pipeline(sd2_folder)


@pytest.fixture(scope="module")
def inverted(ours):
    return ours.invert(SOURCE, PICTURE, generator=0, guidance_scale=1.0, **SHORT)


class Seen(dict):
    """A debugging callback that keeps the arrays: {stage: [array, ...]}."""

    def __call__(self, stage, array, step):
        self.setdefault(stage, []).append(array)


def edit(pipe, image=PICTURE, source=SOURCE, target=TARGET, **arguments) -> DiffEditOutput:
    return pipe.edit(image, source, target, **{**QUICK, **arguments})


def masked(ours, image=PICTURE, **arguments):
    """A mask and what went by while it was made."""
    seen = Seen()
    with ours.debugging(seen):
        mask = ours.generate_mask(
            image, target_prompt=TARGET, source_prompt=SOURCE, num_maps_per_mask=2, num_inference_steps=4,
            guidance_scale=3.0, generator=0, **arguments,
        )  # fmt: skip
    return mask, seen


# --- the whole ----------------------------------------------------------------------------------------------------


def test_with_every_correction_off_an_edit_is_the_three_calls(ours):
    done = edit(ours, **REFERENCE)
    mask = ours.generate_mask(
        PICTURE, TARGET, source_prompt=SOURCE, num_maps_per_mask=2, num_inference_steps=4, guidance_scale=2.0,
        generator=0,
    )  # fmt: skip
    latents = ours.invert(SOURCE, PICTURE, guidance_scale=2.0, generator=0, **SHORT).latents
    picture = ours(TARGET, mask, latents, guidance_scale=2.0, negative_prompt=SOURCE, generator=0, **SHORT).images[0]
    assert np.array_equal(done.mask_image, mask)
    assert np.array_equal(done.image_latents.asnumpy(), latents.asnumpy())
    assert np.array_equal(np.asarray(done.images[0]), np.asarray(picture))


def test_an_edit_shares_its_work(sd1_folder):
    pipe = our_pipeline(sd1_folder)
    edit(pipe, guidance_scale=3.0)
    calls = pipe._stages.calls
    # Two prompts and the empty negative of the mask; maps 2 x 2, 3 unguided steps, 3 guided ones. The report is free.
    assert (calls["text"], calls["encode"], calls["decode"]) == (3, 1, 1)
    assert calls["rows"] == 4 + 3 + 6


def test_a_batch_edit_is_its_single_edits(ours):
    other = parity.picture(seed=4)
    prompts = [SOURCE, "a dog on grass"], [TARGET, "a cat on grass"]
    together = edit(ours, [PICTURE, other], *prompts, generator=[5, 6], outlier_quantile=0.9)
    assert len(together.images) == 2 and len(together.report.mask_coverage) == 2
    for i, picture in enumerate((PICTURE, other)):
        alone = edit(ours, [picture, picture], *([p[i]] * 2 for p in prompts), generator=[5, 6][i : i + 1] * 2,
                     outlier_quantile=0.9)  # fmt: skip
        assert np.array_equal(alone.mask_image[i], together.mask_image[i])
        assert np.abs(np.asarray(alone.images[i], int) - np.asarray(together.images[i], int)).max() <= 1
    reference = dict(REFERENCE, outlier_quantile=0.9)
    first = edit(ours, [PICTURE, other], *prompts, generator=[5, 6], **reference).mask_image
    assert not np.array_equal(first, together.mask_image)  # there, a mask depends on its batch-mates


def test_the_inversions_error_is_that_of_the_inversion_whatever_edits(sd1_folder):
    """Taken from the edit's first step where that has it, computed where not: by the third-order solver's own steps."""
    pipe = our_pipeline(sd1_folder)
    config = pipe.scheduler.config
    pipe.inverse_scheduler = DDIMInverseScheduler.from_config(config)
    for scheduler in (pipe.scheduler, DPMSolverMultistepScheduler.from_config(config, solver_order=3)):
        pipe.scheduler = scheduler
        quick = edit(pipe)
        anew = edit(pipe, callback_on_step_end=lambda *_: None)  # what such a callback may change is not taken
        assert np.allclose(quick.report.inversion_error, anew.report.inversion_error, rtol=1e-4), scheduler
        assert quick.report.inversion_error[0] > 1e-3


def test_outputs(ours):
    done = edit(ours, output_type="np")
    assert done.images.shape == (1, 64, 80, 3) and done.mask_image.shape == done.mask_map.shape == (1, 8, 10)
    assert done.image_latents.shape == (1, 3, 4, 8, 10) and done.latents.shape == (1, 4, 8, 10)
    assert done["report"] is done.report and done.nsfw_content_detected is None
    report = done.report
    assert report.mask_coverage == [done.mask_image.mean()]
    assert {"mask", "inversion", "edit"} <= set(report.seconds) and min(report.seconds.values()) >= 0
    assert report.change_outside == [0] and report.change_outside_before_paste_back[0] > 0.5
    assert report.inversion_error[0] > 0 and report.reconstruction_psnr is None
    latent = edit(ours, output_type="latent")
    assert latent.images.shape == (1, 4, 8, 10) and latent.report.change_outside is None
    assert np.array_equal(latent.images.asnumpy(), done.latents.asnumpy())


# --- the corrections of the mask ----------------------------------------------------------------------------------


def test_corrected_guidance(ours):
    """C1: the map of guided predictions n + g (p - n), which the reference has as p + g (n - p)."""
    negatives = dict(source_negative_prompt="bad", target_negative_prompt="ugly")
    _, seen = masked(ours, corrected_guidance=True, **negatives)
    source, target = np.split(seen["noise_predictions"][0], 2)
    no_source, no_target = np.split(seen["negative_noise_predictions"][0], 2)
    difference = np.abs((no_target + 3 * (target - no_target)) - (no_source + 3 * (source - no_source)))
    assert np.allclose(seen["map"][0], difference.mean(axis=(0, 1)), rtol=1e-5)
    _, wrong = masked(ours, **negatives)
    assert not np.allclose(wrong["map"][0], difference.mean(axis=(0, 1)), rtol=0.05)
    # With equal negatives it is the scale only: the mask is the same.
    mask, right = masked(ours, corrected_guidance=True)
    same, wrong = masked(ours)
    assert np.allclose(right["map"][0], 1.5 * wrong["map"][0], rtol=1e-5) and np.array_equal(mask, same)


def test_outliers_are_brought_down_before_the_mean(ours):
    """C2."""
    _, seen = masked(ours, outlier_quantile=0.8)
    source, target = np.split(seen["noise_predictions"][0], 2)
    difference = 2 * np.abs(target - source)
    assert len(difference) == 2  # maps
    bounds = [np.quantile(one, 0.8) for one in difference]
    expected = np.stack([np.minimum(one, bound) for one, bound in zip(difference, bounds)]).mean(axis=(0, 1))
    assert np.allclose(seen["map"][0][0], expected, rtol=1e-5)
    _, untouched = masked(ours)
    assert untouched["map"][0].max() > 1.2 * seen["map"][0].max()


def test_mask_options_in_the_first_call(ours):
    options_ = MaskOptions(smoothing=1.0, dilation=1, fill_holes=True)
    mask, seen = masked(ours, mask_options=options_, per_image_clamp=True)
    assert np.array_equal(mask, masks.mask_of(seen["map"][0], 3.0, options_, per_image=True))
    plain, _ = masked(ours)
    assert not np.array_equal(mask, plain) and mask.dtype == plain.dtype == np.int64


def test_masks_follow_the_edges_of_each_picture_of_a_batch(ours):
    followed = MaskOptions(smoothing=0.5, edges=2)
    pictures_ = [PICTURE, PICTURE.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
    seen = Seen()
    with ours.debugging(seen):
        mask = ours.generate_mask(
            pictures_, [TARGET] * 2, source_prompt=[SOURCE] * 2, num_maps_per_mask=2, num_inference_steps=4,
            guidance_scale=2.0, generator=0, per_image_clamp=True, mask_options=followed,
        )  # fmt: skip
    pixels = [np.asarray(picture.convert("RGB"), np.float32).transpose(2, 0, 1) / 127.5 - 1 for picture in pictures_]
    guides = edges.guides_of(np.stack(pixels), (8, 10))
    for i in range(2):
        alone = masks.mask_of(seen["map"][0][i : i + 1], 3.0, followed, guides=guides[i : i + 1])
        assert np.array_equal(mask[i : i + 1], alone)
    plain = masks.mask_of(seen["map"][0], 3.0, MaskOptions(smoothing=0.5), per_image=True)
    assert not np.array_equal(mask, plain)


def test_latents_guide_their_own_masks(ours):
    latents = np.random.default_rng(0).normal(size=(1, 4, 8, 10)).astype(np.float32)
    mask, seen = masked(ours, image=latents, mask_options=MaskOptions(edges=2))
    expected = masks.mask_of(seen["map"][0], 3.0, MaskOptions(edges=2), guides=edges.guides_of(latents, (8, 10)))
    assert np.array_equal(mask, expected)


# --- background and picture ---------------------------------------------------------------------------------------


def test_the_background_is_at_the_level_that_each_step_arrives_at(ours, inverted):
    """C3: with nothing to change, every step ends on the inversion's own latents, the last on the clean ones."""
    nothing, seen = np.zeros((8, 10), np.float32), Seen()
    arguments = dict(image_latents=inverted.latents, output_type="latent", guidance_scale=2.0, **SHORT)
    with ours.debugging(seen):
        done = ours(TARGET, nothing, clean_latents=inverted.clean_latents, **arguments).images.asnumpy()
    kept, clean = inverted.latents.asnumpy(), inverted.clean_latents.asnumpy()
    assert np.array_equal(done, clean)
    for step, expected in enumerate([kept[:, 1], kept[:, 2], clean]):
        assert np.array_equal(seen["edited_latents"][step], expected)
    late = ours(TARGET, nothing, **arguments).images.asnumpy()
    assert np.array_equal(late, kept[:, -1]) and not np.array_equal(late, clean)


def test_clean_latents_are_where_the_inversion_began(ours, inverted):
    seen = Seen()
    with ours.debugging(seen):
        ours.invert(SOURCE, PICTURE, generator=0, guidance_scale=1.0, **SHORT)
    assert np.array_equal(seen["latents"][0], inverted.clean_latents.asnumpy())
    assert list(inverted) == ["latents"] and len(inverted.to_tuple()) == 1  # the tuple is the reference's


@pytest.mark.parametrize("kind", ["pil", "odd size", "array", "bytes"])
def test_outside_the_feathered_mask_the_picture_is_untouched(ours, kind):
    """C5."""
    image = PICTURE.resize((83, 70)) if kind == "odd size" else PICTURE
    pixels = np.asarray(image)
    if kind in ("array", "bytes"):
        image = pixels[None] if kind == "bytes" else (pixels[None] / 255).astype(np.float32)
    done = edit(ours, image, mask_image=BOX, feather=5, output_type="np" if kind == "array" else "pil")
    result = np.asarray(done.images[0])
    weights = masks.feathered(BOX, pixels.shape[:2], 5)[0]
    before = image[0] if kind == "array" else pixels
    assert result.shape == pixels.shape and 0.3 < (weights == 0).mean() < 0.9
    assert np.array_equal(result[weights == 0], before[weights == 0])
    assert not np.array_equal(result[weights == 1], before[weights == 1])
    assert done.report.change_outside == [0]
    loose = edit(ours, image, mask_image=BOX, feather=5, paste_back=False)
    assert loose.report.change_outside == loose.report.change_outside_before_paste_back != [0]
    assert not np.array_equal(np.asarray(loose.images[0])[weights == 0], pixels[weights == 0])


@pytest.mark.parametrize("paste_back", [True, False])
@pytest.mark.parametrize("feather", [None, 5])
def test_a_working_size_is_the_models_alone(ours, paste_back, feather):
    """As if the picture was scaled by hand, edited, scaled back and pasted back, in its own colours."""
    own = (131, 83)
    picture = PICTURE.resize(own)
    picture.putalpha(picture.convert("L"))
    original = Original(picture)
    small = original.shown.resize(PICTURE.size, Image.Resampling.LANCZOS)
    done = edit(ours, picture, mask_image=BOX, working_size=PICTURE.size, paste_back=paste_back, feather=feather)
    by_hand = edit(ours, small, mask_image=BOX, paste_back=False)
    assert np.array_equal(done.latents.asnumpy(), by_hand.latents.asnumpy())
    drawn = by_hand.images[0].resize(own, Image.Resampling.LANCZOS)
    weights = masks.feathered(BOX, own[::-1], 8 * 131 / 80 if feather is None else feather)
    expected = original.rewritten(drawn, weights[0] if paste_back else None)
    assert done.images[0].mode == "RGBA" and np.array_equal(np.asarray(done.images[0]), np.asarray(expected))
    shown, result = (np.asarray(one, np.float32)[None] / 255 for one in (original.shown, drawn))
    change = editing.change_outside(result, shown, weights)
    assert done.report.change_outside_before_paste_back == change and change[0] > 1
    assert done.report.change_outside == ([0] if paste_back else change)
    assert done.image_latents.shape == by_hand.image_latents.shape


def test_soft_masks_blend(ours, inverted):
    """C7."""
    arguments = dict(image_latents=inverted.latents, clean_latents=inverted.clean_latents, output_type="latent",
                     guidance_scale=2.0, **SHORT)  # fmt: skip
    half = np.full((8, 10), 0.5, np.float32)
    seen, whole = Seen(), Seen()
    with ours.debugging(seen):
        ours(TARGET, half, soft_mask=True, **arguments)
    with ours.debugging(whole):
        ours(TARGET, half, **arguments)  # rounded to 1, as in the reference
    first = 0.5 * whole["edited_latents"][0] + 0.5 * inverted.latents.asnumpy()[:, 1]
    assert np.allclose(seen["edited_latents"][0], first, atol=1e-5)
    done = edit(ours, mask_options=MaskOptions(soft=True, smoothing=1.0), mask_thresholding_ratio=1.8)
    values = np.unique(done.mask_image)
    assert done.mask_image.dtype == np.float32 and ((values > 0) & (values < 1)).any()


def test_own_masks(ours):
    drawn = Image.fromarray((np.kron(BOX, np.ones((16, 16))) * 255).astype(np.uint8))  # twice the picture's size
    own = edit(ours, mask_image=drawn)
    assert np.array_equal(own.mask_image[0], BOX) and own.mask_map is None
    computed = edit(ours).mask_image
    for how, expected in {
        "union": np.maximum(computed, BOX),
        "subtract": np.minimum(computed, 1 - BOX),
        "intersection": np.minimum(computed, BOX),
    }.items():
        done = edit(ours, mask_image=drawn, mask_combination=how)
        assert np.array_equal(done.mask_image, expected) and done.mask_map is not None, how


def test_pictures_of_different_sizes_are_refused_before_any_work(ours):
    """E13."""
    photos, seen = [PICTURE, PICTURE.resize((96, 56))], Seen()
    both = dict(num_inference_steps=4)
    calls = {
        "edit": lambda photos: edit(ours, photos, [SOURCE] * len(photos), [TARGET] * len(photos), mask_image=BOX
                                    if photos[0].width == 80 else np.ones((7, 12))),
        "generate_mask": lambda photos: ours.generate_mask(
            photos, [TARGET] * len(photos), source_prompt=[SOURCE] * len(photos), num_maps_per_mask=1, **both),
        "invert": lambda photos: ours.invert([SOURCE] * len(photos), photos, **both),
        "noise_image": lambda photos: ours.noise_image(photos, **both),
    }  # fmt: skip
    with ours.debugging(seen):
        for call in calls.values():
            with pytest.raises(ValueError, match="`image`.*80 x 64, 96 x 56.*each picture alone, or resize") as caught:
                call(photos)
            assert caught.value.parameter == "image"
    assert not seen
    # The advice.
    for photo in photos:
        assert calls["noise_image"]([photo]).latents.shape[-2:] == (photo.height // 8, photo.width // 8)
    assert (
        len(edit(ours, [photos[0], photos[1].resize((80, 64))], [SOURCE] * 2, [TARGET] * 2, mask_image=BOX).images) == 2
    )
    # An edit has results of each picture's own size, so there even the same working size is not enough.
    with pytest.raises(ValueError, match="80 x 64, 83 x 65"):
        edit(ours, [PICTURE, PICTURE.resize((83, 65))], [SOURCE] * 2, [TARGET] * 2)
    assert ours.noise_image([PICTURE, PICTURE.resize((83, 65))], **both).latents.shape[0] == 2
    with pytest.raises(ValueError, match="one picture for each prompt"):
        ours.noise_image([PICTURE, PICTURE], batch_size=1, **both)


def test_a_mask_of_the_pictures_size_is_brought_to_its_latents(ours, inverted):
    """W10."""
    arguments = dict(image_latents=inverted.latents, output_type="latent", guidance_scale=2.0, **SHORT)
    expected = ours(TARGET, BOX, **arguments).images.asnumpy()
    drawn = Image.fromarray((np.kron(BOX, np.ones((8, 8))) * 255).astype(np.uint8))
    clear = drawn.convert("RGBA")
    clear.putalpha(drawn)
    for mask in (drawn, clear, np.asarray(drawn) > 0, np.asarray(drawn)[None, None] / 255, drawn.resize((87, 71), 0)):
        assert np.array_equal(ours(TARGET, mask, **arguments).images.asnumpy(), expected)
    seen = Seen()
    with ours.debugging(seen):
        for mask in (drawn.resize((160, 128)), np.ones((9, 10)), drawn.resize((88, 64)), np.ones((10, 8))):
            with pytest.raises(ValueError, match="`mask_image` is .*`image_latents` are 10 x 8, .* 80 x 64") as caught:
                ours(TARGET, mask, **arguments)
            assert caught.value.parameter == "mask_image"
        with pytest.raises(ValueError, match="batch size 2"):
            ours(TARGET, [drawn, drawn], **arguments)
    assert not seen
    for size in ((80, 64), (10, 8)):  # the advice
        resized = drawn.resize((160, 128), 0).resize(size, 0)
        assert np.array_equal(ours(TARGET, resized, **arguments).images.asnumpy(), expected)


# --- inversion ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", ["ours", "ours2"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_iterations_make_an_inverse_step_exact(request, checkpoint, guidance):
    """C6: x' becomes the point from which the step back leads to x."""
    pipe = request.getfixturevalue(checkpoint)
    # Small steps: the tiny checkpoints are random, and their predictions turn round within a large one.
    schedule = dict(num_inference_steps=50, inpaint_strength=0.06)
    arguments = dict(generator=0, guidance_scale=guidance, **schedule)
    errors = []
    for iterations in (0, 1, 6):
        inverted = pipe.invert(SOURCE, PICTURE, inversion_iterations=iterations, **arguments)
        everywhere = np.ones((8, 10), np.float32)
        back = pipe(SOURCE, everywhere, inverted.latents, output_type="latent", guidance_scale=guidance, **schedule)
        errors.append(parity.relative(back.images.asnumpy(), inverted.clean_latents.asnumpy()))
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.05 * errors[0], errors


def test_the_report_says_how_far_the_inversion_is_off(ours):
    arguments = dict(measure_reconstruction=True, num_inference_steps=50, inpaint_strength=0.06)
    coarse = edit(ours, **arguments).report
    fine = edit(ours, inversion_iterations=10, **arguments).report
    assert fine.inversion_error[0] < 0.5 * coarse.inversion_error[0]
    assert fine.reconstruction_psnr[0] >= coarse.reconstruction_psnr[0] and "reconstruction" in fine.seconds


def test_noise_in_place_of_an_inversion(ours):
    """C8: every level has noise of its own."""
    noised = ours.noise_image(PICTURE, generator=0, **SHORT)
    clean, latents = noised.clean_latents.asnumpy(), noised.latents.asnumpy()
    ours.scheduler.set_timesteps(4)
    timesteps, _ = ours.get_timesteps(4, 0.75)
    assert latents.shape == (1, 3, 4, 8, 10)
    noises = []
    for i, t in enumerate(timesteps):
        bar = ours.scheduler.exact_alphas_cumprod[int(t)]
        noises.append((latents[:, i] - np.sqrt(bar) * clean) / np.sqrt(1 - bar))
        assert 0.8 < noises[-1].std() < 1.2
    assert abs(np.corrcoef(noises[0].ravel(), noises[1].ravel())[0, 1]) < 0.2
    rows = ours._stages.calls["rows"]
    done = edit(ours, inversion="noise", mask_image=BOX)
    assert ours._stages.calls["rows"] == rows + 6  # the edit alone
    assert np.array_equal(done.image_latents.asnumpy(), latents)
    outside = done.latents.asnumpy()[..., BOX == 0]
    assert np.array_equal(outside, clean[..., BOX == 0]) and done.report.inversion_error is None


def test_latents_of_an_inversion_serve_several_edits(ours, inverted):
    rows = ours._stages.calls["rows"]
    done = edit(ours, image_latents=inverted, mask_image=BOX)
    assert ours._stages.calls["rows"] == rows + 6
    whole = edit(ours, mask_image=BOX)
    assert np.array_equal(np.asarray(done.images[0]), np.asarray(whole.images[0]))
    in_a_row = DiffEditInversionPipelineOutput(inverted.latents[0], clean_latents=inverted.clean_latents)
    assert np.array_equal(edit(ours, image_latents=in_a_row, mask_image=BOX).latents.asnumpy(), done.latents.asnumpy())


def test_generators_have_to_fit_the_pictures_only_where_these_are_encoded(ours):
    prompts = dict(source=[SOURCE, "a photo of a cat"], target=[TARGET, "a photo of a dog"])
    with pytest.raises(ValueError, match="one picture for each prompt, but 1 pictures"):
        edit(ours, **prompts, generator=[1, 2])
    inverted = ours.invert(prompts["source"], PICTURE, generator=0, guidance_scale=1.0, **SHORT)
    edited = edit(ours, **prompts, generator=[1, 2], eta=0.5, image_latents=inverted, mask_image=BOX).latents.asnumpy()
    assert not np.array_equal(edited[0], edited[1])


def test_an_empty_source_prompt_is_a_prompt(ours):
    """The first notebooks' reference prompt."""
    done = edit(ours, source="", target="a cat")
    assert 0 < done.mask_image.mean() < 1
    assert not any("word" in warning for warning in done.report.warnings)


# --- callbacks ----------------------------------------------------------------------------------------------------


def test_callback_on_step_end(ours, inverted):
    seen = []

    def watch(pipe, step, timestep, tensors):
        assert pipe is ours
        seen.append((step, int(timestep), sorted(tensors)))
        return None

    names = ["latents", "pred_original_sample", "prompt_embeds"]
    arguments = dict(prompt=TARGET, mask_image=np.ones((8, 10), np.float32), image_latents=inverted.latents,
                     guidance_scale=2.0, output_type="latent", **SHORT)  # fmt: skip
    plain = ours(**arguments, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names)
    ours.scheduler.set_timesteps(4)
    timesteps = ours.get_timesteps(4, 0.75)[0]
    assert seen == [(i, int(t), names) for i, t in enumerate(timesteps)]
    seen.clear()
    ours.invert(SOURCE, PICTURE, callback_on_step_end=watch, generator=0, **SHORT)
    assert [entry[0] for entry in seen] == [0, 1, 2] and seen[0][2] == ["latents"]

    def reset(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * 0 + 1} if step == 2 else tensors

    done = ours(**arguments, callback_on_step_end=reset)
    assert np.array_equal(done.images.asnumpy(), np.ones((1, 4, 8, 10), np.float32))
    assert not np.array_equal(plain.images.asnumpy(), done.images.asnumpy())


def test_a_callback_can_change_the_prompt(ours, inverted):
    arguments = dict(mask_image=np.ones((8, 10), np.float32), image_latents=inverted.latents, guidance_scale=2.0,
                     output_type="latent", **SHORT)  # fmt: skip
    other = np.concatenate([to_numpy(e) for e in reversed(ours.encode_prompt("a dog", None, 1, True))])

    def switch(pipe, step, timestep, tensors):
        return {"prompt_embeds": other} if step == 0 else {}

    first, seen, expected = Seen(), Seen(), Seen()
    with ours.debugging(first):
        ours(TARGET, **arguments)
    with ours.debugging(seen):
        ours(TARGET, callback_on_step_end=switch, **arguments)
    # From the first step's latents on it is an edit to the other prompt.
    rest = {**arguments, "image_latents": np.stack([first["edited_latents"][0]] * 3, axis=1)}
    ours.scheduler.set_timesteps(4)
    assert np.array_equal(seen["edited_latents"][0], first["edited_latents"][0])
    assert not np.allclose(seen["edited_latents"][1], first["edited_latents"][1], rtol=1e-3)
    with ours.debugging(expected):
        ours("a dog", **{**rest, "num_inference_steps": 4, "inpaint_strength": 0.5,
                         "image_latents": rest["image_latents"][:, :2]})  # fmt: skip
    assert np.allclose(seen["edited_latents"][1], expected["edited_latents"][0], atol=1e-5)


@pytest.mark.parametrize(
    "returned, error, text",
    [
        (lambda tensors: tensors["latents"], TypeError, "has to return a dict or None, but returned Tensor"),
        (lambda tensors: {"latents": np.zeros((1, 4, 8, 9))}, ValueError, r"it has to stay \(1, 4, 8, 10\)"),
        (lambda tensors: {"latents": np.full((1, 4, 8, 10), np.nan)}, options.NumericalError, "step 0"),
    ],
)
def test_what_a_callback_may_not_return(ours, inverted, returned, error, text):
    with pytest.raises(error, match=text):
        ours(
            TARGET, BOX, inverted.latents, callback_on_step_end=lambda *given: returned(given[-1]), **SHORT
        )  # fmt: skip


def test_a_debugging_callback_sees_every_intermediate(ours):
    seen = []
    done = edit(ours, debug_callback=lambda stage, array, step: seen.append((stage, array, step)))
    stages = [stage for stage, _, _ in seen]
    by_name = {name: [array for stage, array, _ in seen if stage == name] for name in stages}
    assert np.array_equal(by_name["map"][0], done.mask_map) and np.array_equal(by_name["mask"][0], done.mask_image)
    assert len(by_name["inverted_latents"]) == len(by_name["edited_latents"]) == 3
    assert np.array_equal(by_name["edited_latents"][-1], done.latents.asnumpy())
    assert len(by_name["clean_predictions"]) == 6
    # The prediction of the noiseless latents: what the DDIM step was made of.
    first = stages.index("edited_latents")
    assert stages[first - 1] == "clean_predictions" and stages.index("map") < stages.index("mask") < first
    assert not ours._viewers


# --- what a report says -------------------------------------------------------------------------------------------


def report_of(coverage):
    return EditReport([coverage])


def test_warnings_say_what_to_turn(ours):
    def said(**arguments):
        return " ".join(edit(ours, **arguments).report.warnings)

    assert "mask is empty" in said(mask_image=np.zeros((8, 10), np.float32))
    assert "covers 100% of the picture; draw less" in said(mask_image=np.ones((8, 10), np.float32))
    assert "no word in common" in said(target="seven dogs", mask_image=BOX)
    for source, target in (
        ("桌子上的红苹果", "桌子上的黄梨"),
        ("赤いりんご", "きいろいなし"),
        ("ﾘﾝｺﾞ", "ﾅｼ"),
        ("แอปเปิ้ลสีแดง", "ลูกแพร์"),
        ("빨간 사과가", "노란 배를"),
        ("ផ្លែប៉ោម", "ព្រីស"),
        ("𠀀", "a 梨"),
        ("Ein Apfel auf der STRASSE", "Hunde auf der Straße"),
        ("une pomme a\u0300 table", "deux poires \u00e0 manger"),
        ("яблоко на столе", "груша на столе"),
        ("🍎", "🍐"),
    ):
        assert not editing._warnings(report_of(0.5), source, target, False), (source, target)
    for source, target in (("красное яблоко", "жёлтая груша"), ("μήλο", "αχλάδι"), ("une pomme", "deux poires")):
        assert "no word in common" in editing._warnings(report_of(0.5), source, target, False)[0]
    (long,) = editing._warnings(report_of(0.5), "apple " * 900, "pear " * 900, False)
    assert len(long) < 500
    empty = edit(ours, mask_options=MaskOptions(erosion=9))
    assert "mask_thresholding_ratio" in empty.report.warnings[0]
    assert np.array_equal(np.asarray(empty.images[0]), np.asarray(PICTURE))
    assert edit(ours, mask_image=BOX, inversion="noise").report.warnings == []


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        (dict(source=SOURCE, target=[TARGET, TARGET]), ValueError, "2 target prompts for 1 source"),
        (dict(target=None), ValueError, "target_prompt"),
        (dict(inversion_prompt=["a", "b"]), ValueError, "2 inversion prompts"),
        (dict(inversion="none"), ValueError, "'ddim' or 'noise'"),
        (dict(inversion="noise", inversion_iterations=1), ValueError, "Nothing is inverted"),
        (dict(inversion_iterations=-1), ValueError, "inversion_iterations"),
        (dict(inversion_iterations=1.5), TypeError, "inversion_iterations"),
        (dict(inversion_guidance_scale=-1.0), ValueError, "inversion_guidance_scale"),
        (dict(outlier_quantile=0.0), ValueError, "above 0 and at most 1"),
        (dict(outlier_quantile="0.9"), TypeError, "outlier_quantile"),
        (dict(mask_options={"threshold": 0.4}), TypeError, "MaskOptions"),
        (dict(mask_combination="union"), ValueError, "no `mask_image` to combine"),
        (dict(mask_combination="xor", mask_image=BOX), ValueError, "mask_combination"),
        (dict(mask_image=np.full((8, 10), np.nan, np.float32)), ValueError, "NaN"),
        (dict(mask_image="mask.png"), TypeError, "str"),
        (dict(mask_image=np.ones((3, 8, 10), np.float32)), ValueError, "batch"),
        (dict(feather=-1), ValueError, "feather"),
        (dict(working_size=64), TypeError, "width, height"),
        (dict(working_size=(64, 0)), ValueError, "positive integer"),
        (dict(working_size=(80, 64), image=np.asarray(PICTURE)), TypeError, "PIL pictures"),
        (dict(paste_back="yes"), TypeError, "paste_back"),
        (dict(per_image_clamp=1), TypeError, "per_image_clamp"),
        (dict(image_latents=np.zeros((1, 3, 4, 8, 10), np.float32)), TypeError, "whole output"),
        (dict(debug_callback=3), TypeError, "debug_callback"),
        (dict(callback_on_step_end_tensor_inputs=["noise"]), ValueError, "'noise' was given"),
        (dict(callback_on_step_end_tensor_inputs="latents"), TypeError, "list of names"),
        (dict(output_type="pt"), ValueError, "output_type"),
        (dict(inpaint_strength=0.1), ValueError, "leaves no step"),
        (dict(image=None), ValueError, "image"),
        (dict(generator="seed"), TypeError, "generator"),
    ],
)
def test_bad_input_is_refused_before_any_model_runs(ours, arguments, error, text):
    before = dict(ours._stages.calls)
    with pytest.raises(error, match=text):
        edit(ours, **arguments)
    assert dict(ours._stages.calls) == before


def test_latents_of_another_run_are_refused(ours, inverted):
    with pytest.raises(ValueError, match="timesteps"):
        edit(ours, image_latents=inverted, num_inference_steps=8)


def test_iterations_need_ddim(sd1_folder):
    pipe = our_pipeline(sd1_folder, scheduler="DPMSolverMultistepScheduler")
    with pytest.raises(ValueError, match="refines DDIM.s inversion"):
        pipe.invert(SOURCE, PICTURE, inversion_iterations=1, **SHORT)
    done = pipe.edit(PICTURE, SOURCE, TARGET, **{**QUICK, "mask_image": BOX})  # the rest works with it
    assert done.report.change_outside == [0] and done.report.inversion_error[0] > 0
