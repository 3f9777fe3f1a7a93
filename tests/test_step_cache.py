"""The step cache: full evaluations are the UNet's, shallow ones its last layer over what a full one left."""

import mindspore as ms
import numpy as np
import parity
import pytest
from checkpoints import UNET
from test_pipeline import our_pipeline

from mindiffedit import InputError, demo
from mindiffedit.checkpoints import freeu, lora, step_cache
from mindiffedit.runtime import devices
from mindiffedit.runtime.kernels import portable_kernels
from mindiffedit.stages import Stages, host, tensor

RNG = np.random.default_rng(1)
EMBEDS = RNG.standard_normal((3, 77, 32)).astype(np.float32)
LATENTS = RNG.standard_normal((3, 4, 8, 6)).astype(np.float32)
NEAR = LATENTS + 0.1 * RNG.standard_normal(LATENTS.shape).astype(np.float32)  # those of the next step


@pytest.fixture(scope="module")
def pipe(sd1_folder):
    """Its last up block has attention, as Stable Diffusion's."""
    return our_pipeline(sd1_folder)


@pytest.fixture
def stages(pipe):
    pipe._stages.calls.clear()
    return pipe._stages


def predicted(predict, latents=LATENTS, timestep=501):
    return host(predict(tensor(latents), timestep))


def plain(stages, latents=LATENTS, timestep=501, embeds=EMBEDS):
    before = stages.calls.copy()
    result = predicted(stages.predictor(embeds, {}, 2), latents, timestep)
    stages.calls.clear()
    stages.calls.update(before)
    return result


def cached(stages, interval, embeds=EMBEDS, rows=2):
    return stages.predictor(embeds, {}, rows, cache_interval=interval)


# --- numbers ---------------------------------------------------------------------------------------------------------


def check_numbers(stages, shape, embeds=EMBEDS):
    """Bits where nothing changed since the full evaluation; how far off elsewhere: shallow ones, and no new ones."""
    latents, change = np.random.default_rng(2).standard_normal((2, len(embeds), 4, *shape)).astype(np.float32)
    near = latents + 0.1 * change
    predict = cached(stages, 3, embeds)
    expected, beside = (plain(stages, x, t, embeds) for x, t in ((latents, 501), (near, 481)))
    assert np.array_equal(predicted(predict, latents), expected)
    assert np.array_equal(predicted(predict, latents), expected)
    shallow = predicted(predict, near, 481)
    assert np.array_equal(predicted(predict, near, 481), beside)
    return parity.relative(shallow, beside), parity.relative(expected, beside)


def test_numbers_with_attention_in_the_last_block(stages):
    shallow, _ = check_numbers(stages, (8, 6))  # of random weights, whose deep part changes as much as the rest
    assert shallow > 0


def test_numbers_of_the_demo():
    """Of trained weights: a shallow evaluation is nearer to the whole one than its last outputs are."""
    stages = our_pipeline(demo.checkpoint_folder(), mode="pynative")._stages
    width = stages.unet.config.cross_attention_dim
    shallow, stale = check_numbers(stages, (8, 8), RNG.standard_normal((3, 32, width)).astype(np.float32))
    assert 0 < shallow < 0.9 * stale


LAYOUTS = {
    "as Stable Diffusion": dict(
        block_out_channels=(8, 16, 16),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        time_cond_proj_dim=8,  # as those of latent consistency models, which run without the condition
    ),
    "without attention on the outside": dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type=None,
        center_input_sample=True,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_of_other_layouts(layout):
    """Of random weights, at a size that cannot be halved without a remainder."""
    stages = Stages(our_unet(**LAYOUTS[layout]), None, None, "pynative")
    shallow, _ = check_numbers(stages, (7, 5), EMBEDS[:2])
    assert shallow > 0


def our_unet(**options):
    """A random one of mindone's."""
    from mindone.diffusers import UNet2DConditionModel

    with portable_kernels():
        return UNet2DConditionModel(**{**UNET, **options}).set_train(False)


# --- calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_which_calls_are_full(stages, interval):
    predict = cached(stages, interval)  # two groups of two rows for three samples
    for i in range(5):
        stages.calls.clear()
        predicted(predict, LATENTS + i, 501 - i)
        full = i % interval == 0
        assert stages.calls == ({"unet": 2, "rows": 4} if full else {"shallow_rows": 4}), i


def test_other_embeddings_make_the_next_call_full(stages):
    predict = cached(stages, 2)
    predicted(predict)
    predict.replace(EMBEDS[::-1])
    expected = plain(stages, embeds=EMBEDS[::-1])
    assert np.array_equal(predicted(predict), expected)
    assert np.array_equal(predicted(predict, NEAR), predicted(cached_after(stages, EMBEDS[::-1]), NEAR))


def cached_after(stages, embeds):
    predict = cached(stages, 2, embeds)
    predicted(predict)
    return predict


def test_a_call_that_is_left_lacks_no_hidden_state(stages):
    """As a loop does that fails between two groups of rows and is taken up again."""
    predict = cached(stages, 2)
    next(predict.stream(tensor(LATENTS), 501))
    assert np.array_equal(predicted(predict), plain(stages))
    assert stages.calls["unet"] == 2 and stages.calls["shallow_rows"] == 2


def test_two_graphs_for_a_size_of_groups(stages, sd1_folder):
    predict = cached(stages, 2)
    predicted(predict)
    predicted(predict)
    with devices.CompileCounter() as compiled:
        for interval in (2, 3):
            predict = cached(stages, interval)
            for i in range(4):
                predicted(predict, LATENTS + i, 501 - i)
    assert compiled.count == 0
    other = our_pipeline(sd1_folder)
    predict = cached(other._stages, 2)
    predicted(predict)
    predicted(predict)
    assert other.compile_cache.found == len(other._stages.graphs) == 2


def test_lora(pipe, stages):
    """Of the layers that a shallow evaluation runs it counts at once."""
    adapters = lora.adapted(pipe.unet)
    name = next(name for name in adapters.weights if name.startswith("up_blocks.1.resnets.1.conv1"))
    rows, columns = adapters.weights[name].shape[0], int(np.prod(adapters.weights[name].shape[1:]))
    up, down = (RNG.standard_normal(shape).astype(np.float32) for shape in ((rows, 2), (2, columns)))
    predict = cached(stages, 2)
    expected = predicted(predict)
    adapters.add("a", {name: lora.LowRank(down, up, 0.1)})
    try:
        changed = predicted(predict)
        assert parity.relative(changed, expected) > 1e-3
        assert np.array_equal(changed, plain(stages))
        assert np.array_equal(predicted(predict), changed)  # full again
    finally:
        adapters.unload()
    assert np.array_equal(predicted(predict), expected)


# --- UNets that are not supported ------------------------------------------------------------------------------------


UNSUPPORTED = {
    "class_embedding": dict(class_embed_type="timestep"),
    "addition_embed_type": dict(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=32
    ),
    "encoder_hid_proj": dict(encoder_hid_dim=16),
    "time_embed_act": dict(time_embedding_act_fn="silu"),
    "AttnUpBlock2D": dict(up_block_types=("UpBlock2D", "AttnUpBlock2D")),
}


@pytest.mark.parametrize("words", UNSUPPORTED)
def test_unsupported_unets(words):
    unet = our_unet(**UNSUPPORTED[words])
    with pytest.raises(InputError, match=f"{words}.*`unet_cache_interval=1`") as caught:
        cached(Stages(unet, None, None, "pynative"), 2)
    assert caught.value.parameter == "unet_cache_interval"
    cached(Stages(unet, None, None, "pynative"), None)


def test_what_is_no_unet_of_mindones():
    with pytest.raises(InputError, match="UNet2DConditionModel, but this UNet is a Cell"):
        step_cache.check_supported(ms.nn.Cell())


def test_freeu(pipe, stages):
    """With two levels it reaches the last block; of three it does not."""
    three = our_unet(**LAYOUTS["as Stable Diffusion"])
    freeu.enable(three, 0.9, 0.2, 1.4, 1.6)
    predict = cached(Stages(three, None, None, "pynative"), 2, EMBEDS[:1])
    assert np.array_equal(predicted(predict, LATENTS[:1]), plain(predict._stages, LATENTS[:1], embeds=EMBEDS[:1]))
    predict = cached(stages, 2)
    predicted(predict)
    pipe.enable_freeu(0.9, 0.2, 1.4, 1.6)
    try:
        for call in (lambda: cached(stages, 2), lambda: predicted(predict)):
            with pytest.raises(InputError, match="switch FreeU off"):
                call()
    finally:
        pipe.disable_freeu()
