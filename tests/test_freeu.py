"""FreeU against diffusers, compiled and not; switched on and off again."""

import mindspore as ms
import numpy as np
import parity
import pytest
import torch
from diffusers.utils.torch_utils import fourier_filter
from test_pipeline import PICTURE, SOURCE, our_pipeline, their_pipeline

from mindiffedit.checkpoints import freeu, models
from mindiffedit.runtime import devices, graph_keys
from mindiffedit.stages import host, tensor

FACTORS = dict(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
CLOSE = 2e-5  # relative to the reference's rms; 2e-6 was measured


@pytest.fixture(scope="module")
def ours(sd1_folder):
    return our_pipeline(sd1_folder)


@pytest.fixture(scope="module")
def eager(ours):
    """Over the same models, operator by operator, which compiles nothing."""
    pipeline = type(ours)(**ours.components, mode="pynative", requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def theirs(sd1_folder):
    return their_pipeline(sd1_folder)


@pytest.fixture(autouse=True)
def switched_off(ours, theirs):
    yield
    ours.disable_freeu()
    theirs.disable_freeu()


# --- the filter ----------------------------------------------------------------------------------------------------


def test_the_filter_is_the_references():
    for rows, columns in ((1, 1), (1, 6), (2, 2), (2, 3), (3, 3), (4, 6), (5, 7), (8, 10), (32, 24)):
        values = np.random.default_rng(rows).standard_normal((2, 3, rows, columns)).astype(np.float32)
        expected = fourier_filter(torch.from_numpy(values), threshold=1, scale=0.2).numpy()
        with devices.eager():
            ours = freeu.fourier_filter(ms.Tensor(values), 0.2).asnumpy()
        assert parity.relative(ours, expected) < 1e-6
        low = freeu.low_frequencies(rows, columns)
        # A frequency left out is seen, where there is more than one.
        flat = values.reshape(6, -1)
        defect = flat + (0.2 - 1) * flat @ low[:-2].T @ low[:-2]
        assert len(low) < 3 or parity.relative(defect.reshape(values.shape), expected) > 1e-2


def test_float16_is_filtered_in_float32():
    values = np.random.default_rng(0).standard_normal((1, 2, 6, 6)).astype(np.float16)
    with devices.eager():
        found = freeu.fourier_filter(ms.Tensor(values), 0.5)
        scaled = freeu.scaled_features(ms.Tensor(values), 1.4)
    assert found.dtype == scaled.dtype == ms.float16
    expected = fourier_filter(torch.from_numpy(values.astype(np.float32)), threshold=1, scale=0.5).numpy()
    assert np.abs(found.asnumpy().astype(np.float32) - expected).max() < 2e-3
    assert np.array_equal(scaled.asnumpy()[:, 1], values[:, 1])


# --- the UNet ------------------------------------------------------------------------------------------------------


RNG = np.random.default_rng(1)
LATENTS, EMBEDS = (RNG.standard_normal(shape).astype(np.float32) for shape in ((2, 4, 8, 6), (2, 77, 32)))


def predicted(pipeline):
    return host(pipeline._stages.predictor(EMBEDS, {}, 2)(tensor(LATENTS), 501))


def predicted_by_the_reference(pipeline):
    with torch.no_grad():
        return pipeline.unet(torch.from_numpy(LATENTS), 501, torch.from_numpy(EMBEDS)).sample.numpy()


def test_on_and_off_again(ours, theirs):
    before, bare = predicted(ours), predicted_by_the_reference(theirs)
    assert parity.relative(before, bare) < CLOSE
    names = set(models.parameters_by_name(ours.unet))
    described = graph_keys.fingerprint(ours.unet)

    ours.enable_freeu(**FACTORS)
    theirs.enable_freeu(**FACTORS)
    freed, expected = predicted(ours), predicted_by_the_reference(theirs)
    assert parity.relative(expected, bare) > 0.01  # it does something
    assert parity.relative(freed, expected) < CLOSE
    assert set(models.parameters_by_name(ours.unet)) == names  # it is saved as ever
    assert graph_keys.fingerprint(ours.unet) != described
    ours.enable_freeu(**dict(FACTORS, s2=0.3))  # whose graph no later process takes for the other's
    others = graph_keys.fingerprint(ours.unet)
    ours.enable_freeu(**FACTORS)
    assert others not in (described, graph_keys.fingerprint(ours.unet))

    # Off and on again: the graphs are still there.
    count = devices.compile_count()
    ours.disable_freeu()
    assert np.array_equal(predicted(ours), before)
    assert graph_keys.fingerprint(ours.unet) == described
    ours.enable_freeu(**FACTORS)
    assert np.array_equal(predicted(ours), freed)
    assert devices.compile_count() == count


def test_each_factor_counts(eager, theirs):
    """Every factor changed by itself, each against the reference."""
    seen = [predicted(eager)]
    for name in FACTORS:
        factors = dict(FACTORS, **{name: 0.7})
        eager.enable_freeu(**factors)
        theirs.enable_freeu(**factors)
        seen.append(predicted(eager))
        assert parity.relative(seen[-1], predicted_by_the_reference(theirs)) < CLOSE, name
    for i, one in enumerate(seen):
        assert all(parity.relative(one, other) > 1e-3 for other in seen[:i])


def test_an_inversion_is_the_references(eager, theirs):
    arguments = dict(num_inference_steps=4, inpaint_strength=0.5, guidance_scale=2.0)
    eager.enable_freeu(**FACTORS)
    theirs.enable_freeu(**FACTORS)
    expected = theirs.invert(SOURCE, PICTURE, generator=parity.torch_noise(3), **arguments).latents.numpy()
    mine = eager.invert(SOURCE, PICTURE, generator=parity.TorchNoise(3), **arguments).latents.asnumpy()
    theirs.disable_freeu()
    bare = theirs.invert(SOURCE, PICTURE, generator=parity.torch_noise(3), **arguments).latents.numpy()
    assert parity.relative(mine, expected) < 1e-3 < parity.relative(bare, expected) / 10


# --- bad input -----------------------------------------------------------------------------------------------------


def test_factors_of_the_wrong_kind(ours):
    for name in FACTORS:
        for value in (0, -1.0, float("nan"), float("inf"), True, "1.2", None):
            with pytest.raises((TypeError, ValueError), match=f"`{name}`"):
                ours.enable_freeu(**dict(FACTORS, **{name: value}))
    ours.disable_freeu()
    assert freeu.factors_of(ours.unet) is None


def test_a_unet_of_other_blocks():
    class Block(ms.nn.Cell):
        pass

    class Other:
        up_blocks = [Block()]

    with pytest.raises(ValueError, match="UpBlock2D and CrossAttnUpBlock2D, but this UNet has a Block"):
        freeu.enable(Other(), 1, 1, 1, 1)
    freeu.disable(Other())
