"""Fewer evaluations of the UNet: by points, masks of an inversion, guidance in an interval, presets."""

from functools import partial

import numpy as np
import pytest
from test_editing import BOX, PICTURE, QUICK, SOURCE, TARGET, Seen
from test_pipeline import our_pipeline

from mindiffedit import DDIMScheduler, DPMSolverMultistepScheduler, MaskOptions, diffedit, inputs
from mindiffedit.arrays import to_numpy
from mindiffedit.outputs import DiffEditInversionPipelineOutput
from mindiffedit.solvers import schedulers

STEPS = dict(num_inference_steps=10, inpaint_strength=0.6)  # six of them run
BY_INVERSION = dict(guidance_scale=2.0, generator=0, mask_options=MaskOptions(), mask_thresholding_ratio=3.0, **STEPS)


@pytest.fixture(scope="module")
def ours(sd1_folder):
    return our_pipeline(sd1_folder)


@pytest.fixture(scope="module")
def ours2(sd2_folder):
    return our_pipeline(sd2_folder)  # predicts v


def counted(pipe, run):
    """The result of ``run()``, and how often each model ran in it."""
    before = dict(pipe._stages.calls)
    result = run()
    return result, {name: count - before.get(name, 0) for name, count in pipe._stages.calls.items()}


def ddim(latents, noise, here, there):
    """DDIM from a cumulative alpha to another, in float64."""
    clean = (latents - np.sqrt(1 - here) * noise) / np.sqrt(here)
    return np.sqrt(there) * clean + np.sqrt(1 - there) * noise


@pytest.mark.parametrize("points", [1, 2, 4, 6, 50])
def test_inversion_by_points(ours2, points):
    """Against the formula: there with the noise of the point before, predict, and the way again with those between."""
    pipe, seen = ours2, Seen()
    with pipe.debugging(seen):
        inverted = pipe.invert(SOURCE, PICTURE, generator=0, guidance_scale=1.0, inversion_points=points, **STEPS)
    clean, timesteps = np.float64(seen["latents"][0]), seen["timesteps"][0]
    assert list(timesteps) == sorted(timesteps) and len(timesteps) == 6
    table = pipe.scheduler.alphas_cumprod.asnumpy().astype(np.float64)
    alphas = [*(table[t] for t in timesteps), 1.0]
    assert len(seen["predictions"]) == min(points, 6), "an evaluation for each point"
    embeds = seen["prompt_embeds"][0]

    latents, noise, before, results = clean, np.zeros_like(clean), -1, []
    for point, output in zip(diffedit.points_of(6, points), seen["predictions"]):
        there = ddim(latents, noise, alphas[before], alphas[point])
        predict = pipe._stages.predictor(embeds, {}, 1)
        again = to_numpy(predict(inputs_of(there), timesteps[point]))
        assert np.allclose(again, output, atol=1e-4), "the UNet saw the latents that were expected at the point"
        later = np.sqrt(alphas[point]) * output + np.sqrt(1 - alphas[point]) * there  # from v
        noise = later if before == -1 else noise
        for index in range(before + 1, point + 1):
            share = (index - before) / (point - before)
            latents = ddim(latents, noise + share * (later - noise), alphas[index - 1], alphas[index])
            results.append(latents)
        noise, before = later, point
    assert np.allclose(np.stack(results), np.stack(seen["inverted_latents"]), atol=1e-4)
    assert np.array_equal(to_numpy(inverted.latents)[:, 0], seen["inverted_latents"][-1])


def inputs_of(array):
    from mindiffedit.stages import tensor

    return tensor(array)


def test_points_lie_evenly_and_end_at_the_noisiest_level():
    assert diffedit.points_of(18, 3) == [5, 11, 17] and diffedit.points_of(9, 2) == [3, 8]
    assert diffedit.points_of(3, 50) == [0, 1, 2] and diffedit.points_of(5, 1) == [4]


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_a_mask_of_the_inversion(ours, scheduler):
    """The source's predictions are the inversion's own; the target's are added, one for each map."""
    before, seen = ours.scheduler, Seen()
    ours.scheduler = scheduler.from_config(before.config)
    try:
        given = dict(BY_INVERSION, preset="exact", inversion_points=3, inversion_maps=2)
        edit = lambda **changes: ours.edit(PICTURE, SOURCE, TARGET, **{**given, **changes})  # noqa: E731
        with ours.debugging(seen):
            result, calls = counted(ours, edit)
        assert calls["rows"] == 3 + 2 + 2 * 6
        assert np.array_equal(seen["noise_predictions"][0][:1], seen["predictions"][2])
        assert np.array_equal(seen["noise_predictions"][1][:1], seen["predictions"][1])
        differences = [diffedit.difference(*np.split(pair, 2), 2.0, True) for pair in seen["noise_predictions"]]
        assert np.array_equal(seen["map"][0], diffedit.difference_map(np.concatenate(differences), 2, 0.99))
        assert np.array_equal(result.mask_map, seen["map"][0])
        # Led by another caption, the source's predictions at the points are missing, too.
        _, calls = counted(ours, lambda: edit(inversion_prompt="a table"))
        assert calls["rows"] == 3 + 2 * 2 + 2 * 6
    finally:
        ours.scheduler = before


def test_a_mask_of_the_inversion_in_a_batch_is_each_pictures_own(ours):
    other = PICTURE.transpose(0)
    given = dict(BY_INVERSION, preset="balanced", output_type="np")
    rngs = lambda: [np.random.default_rng(seed) for seed in (1, 2)]  # noqa: E731
    both = ours.edit([PICTURE, other], [SOURCE] * 2, [TARGET] * 2, **{**given, "generator": rngs()})
    alone = ours.edit(other, SOURCE, TARGET, **{**given, "generator": rngs()[1]})
    assert np.allclose(both.mask_map[1], alone.mask_map[0], atol=1e-5)


def test_guidance_in_an_interval(ours):
    """Steps outside take the prompt's prediction alone; nothing compiles again for another interval."""
    given = dict(QUICK, **STEPS, mask_image=BOX)
    everywhere = ours.edit(PICTURE, SOURCE, TARGET, **given)
    whole = ours.edit(PICTURE, SOURCE, TARGET, guidance_start=0.0, guidance_end=1.0, **given)
    assert np.array_equal(to_numpy(whole.latents), to_numpy(everywhere.latents))

    def rows_of(**interval):
        seen = Seen()
        with ours.debugging(seen):
            result, calls = counted(ours, lambda: ours.edit(PICTURE, SOURCE, TARGET, **interval, **given))
        guided = [len(outputs) == 2 for outputs in seen["predictions"][6:]]  # after those of the inversion
        return result, guided, calls["rows"] - 6

    result, guided, rows = rows_of(guidance_end=0.34)
    assert guided == [True, True, False, False, False, False] and rows == 8
    assert not np.array_equal(to_numpy(result.latents), to_numpy(everywhere.latents))
    graphs = len(ours._stages.graphs)
    _, guided, rows = rows_of(guidance_start=0.5, guidance_end=0.9)
    assert guided == [False, False, False, True, True, False] and rows == 8 + 1, "one for the report"
    assert rows_of(guidance_end=0.01)[1] == [True] + [False] * 5, "one step at least"
    assert len(ours._stages.graphs) == graphs


def test_the_last_steps_without_guidance_are_those_of_the_unguided_call(ours):
    """From the latents of the last guided step on, the call without guidance does the same."""
    given = dict(QUICK, **STEPS, mask_image=BOX)
    seen = Seen()
    with ours.debugging(seen):
        ours.edit(PICTURE, SOURCE, TARGET, guidance_end=0.5, paste_back=False, **given)
    steps = seen["edited_latents"]
    stack = lambda name: np.stack(seen["inverted_latents"][::-1], 1)  # noqa: E731
    levels, clean = stack("inverted_latents"), seen["latents"][0]
    # The last three of ten steps, which begin where the third of six has arrived.
    later = levels[:, 3:].copy()
    later[:, 0] = steps[2]
    edited = ours(
        TARGET, BOX, later, inpaint_strength=0.3, num_inference_steps=10, guidance_scale=1.0, clean_latents=clean,
        output_type="latent",
    ).images  # fmt: skip
    assert np.allclose(to_numpy(edited), steps[5], atol=1e-5)


def test_steps_that_use_the_deep_layers_again(sd1_folder):
    """Near the edit by the whole UNet, by two graphs of the UNet in all; what it cannot run, a preset leaves out."""
    pipe = our_pipeline(sd1_folder)
    given = dict(
        BY_INVERSION, preset="exact", inversion_points=2, inversion_maps=1, mask_combination="union", mask_image=BOX
    )
    edit = partial(pipe.edit, PICTURE, SOURCE, TARGET, **given)
    result, calls = counted(pipe, partial(edit, unet_cache_interval=2))
    assert calls["rows"] == 2 + 1 + 2 * 3 and calls["shallow_rows"] == 2 * 3
    assert {key[0] for key in pipe._stages._built if key[0].startswith("unet")} == {"unet_full", "unet_shallow"}
    assert sum(key[0].startswith("unet") for key in pipe._stages._built) == 2
    cached, whole = to_numpy(result.latents), to_numpy(edit().latents)
    assert 0 < np.abs(cached - whole).mean() < 0.2 * np.abs(whole).mean()

    pipe.unet.class_embedding = lambda timestep: None
    with pytest.raises(inputs.InputError) as caught:
        edit(unet_cache_interval=2)
    assert caught.value.parameter == "unet_cache_interval"
    del pipe.unet.class_embedding


def test_rows_of_each_preset(ours):
    """What the pages say each costs: rows of the UNet for six steps, and graphs compiled once."""
    rows = {}
    for preset in inputs.PRESETS:
        edit = partial(ours.edit, PICTURE, SOURCE, TARGET, preset=preset, **BY_INVERSION)
        result, calls = counted(ours, edit)
        rows[preset] = calls["rows"], calls.get("shallow_rows", 0)
        assert result.mask_map.shape == (1, 8, 10) and np.isfinite(to_numpy(result.latents)).all()
        graphs = len(ours._stages.graphs)
        ours.edit(PICTURE, TARGET, SOURCE, preset=preset, **{**BY_INVERSION, "guidance_scale": 3.0, "generator": 1})
        assert len(ours._stages.graphs) == graphs, "a second edit compiles nothing"
    assert rows["exact"] == (4 * 2 + 6 + 2 * 6, 0)
    assert rows["balanced"] == (3 + 2 + 6 + 2, 0)
    assert rows["fast"] == (2 + 2 + 2 + 2, 3)  # whole, shallow, shallow, whole, shallow after the guided step


def test_what_is_asked_for_goes_before_the_preset(ours, caplog):
    given = dict(BY_INVERSION, preset="balanced")

    def rows(**changes):
        return counted(ours, lambda: ours.edit(PICTURE, SOURCE, TARGET, **{**given, **changes}))[1]["rows"]

    usual = 3 + 2 + 6 + 2
    assert rows() == usual
    assert rows(num_maps_per_mask=3) == usual - 2 + 6, "maps of fresh noise"
    assert rows(mask_encode_strength=0.5) == usual - 2 + 8
    assert rows(inversion_points=2, inversion_maps=1) == usual - 2
    assert rows(inversion_points=0) == usual - 5 + 6 + 8
    assert rows(inversion_iterations=1) == usual - 5 + 12 + 8
    assert rows(guidance_end=1.0) == usual + 4 and rows(guidance_scale=1.0) == usual - 2
    assert rows(mask_image=BOX) == usual - 2, "no mask is computed"
    assert rows(inversion="noise") == 8 + 6 + 2
    inverted = ours.invert(SOURCE, PICTURE, generator=0, guidance_scale=1.0, **STEPS)
    assert isinstance(inverted, DiffEditInversionPipelineOutput)
    assert rows(image_latents=inverted) == 8 + 6 + 2


@pytest.mark.parametrize("name", ["LCMScheduler", "EulerDiscreteScheduler"])
def test_few_steps_without_guidance(sd1_folder, name):
    """As checkpoints take it that are distilled to a few steps: a prediction a level, at their own noise levels."""
    pipe = our_pipeline(sd1_folder)
    pipe.scheduler = schedulers.make(name, pipe.scheduler.config, timestep_spacing="trailing")
    seen = Seen()
    with pipe.debugging(seen):
        edit = partial(pipe.edit, PICTURE, SOURCE, TARGET, num_inference_steps=4, guidance_scale=1.0, generator=0)
        result, calls = counted(pipe, partial(edit, inpaint_strength=1.0))
    assert [list(timesteps) for timesteps in seen["timesteps"]] == [[249, 499, 749, 999], [999, 749, 499, 249]]
    assert calls["rows"] == 3 + 2 + 4 and np.isfinite(to_numpy(result.latents)).all()
    fast = partial(edit, inpaint_strength=1.0, preset="fast")
    assert counted(pipe, fast)[1]["rows"] == 2 + 2 + 2, "and two of the last layer alone"


@pytest.mark.parametrize(
    "changes, parameter",
    [
        (dict(preset="slow"), "preset"),
        (dict(inversion_points=-1), "inversion_points"),
        (dict(inversion_points=3, inversion="noise"), "inversion_points"),
        (dict(inversion_points=3, inversion_iterations=1), "inversion_points"),
        (dict(inversion_maps=1), "inversion_maps"),
        (dict(inversion_points=3, inversion_maps=1, num_maps_per_mask=2), "inversion_maps"),
        (dict(guidance_end=1.5), "guidance_end"),
        (dict(guidance_start=0.5, guidance_end=0.5), "guidance_end"),
        (dict(unet_cache_interval=0), "unet_cache_interval"),
    ],
)
def test_wrong_options_are_refused_before_any_model_runs(ours, changes, parameter):
    before = dict(ours._stages.calls)
    with pytest.raises(inputs.InputError) as caught:
        ours.edit(PICTURE, SOURCE, TARGET, **{**BY_INVERSION, "preset": "exact", **changes})
    assert caught.value.parameter == parameter
    assert dict(ours._stages.calls) == before
    with pytest.raises(TypeError):
        ours.edit(PICTURE, SOURCE, TARGET, guidance_end="late", **BY_INVERSION)


def test_points_are_no_place_for_regularisation(ours):
    with pytest.raises(inputs.InputError, match="exclude"):
        ours.invert(SOURCE, PICTURE, inversion_points=2, num_reg_steps=1, **STEPS)
    with pytest.raises(inputs.InputError, match="exclude"):
        ours.invert(SOURCE, PICTURE, inversion_points=2, inversion_iterations=1, **STEPS)
