"""Layers in fewer launches, as a GPU and Ascend get them: the same numbers as mindone's, here in float32 on a CPU."""

from types import SimpleNamespace

import mindspore as ms
import numpy as np
import parity
import pytest
import torch
from mindspore import ops
from test_pipeline import our_pipeline

from mindiffedit.runtime import devices, kernels, launches, turns
from mindiffedit.solvers.formulas import halves, numbers
from mindiffedit.stages import Stages, host, tensor

RNG = np.random.default_rng(3)
LATENTS = RNG.standard_normal((3, 4, 8, 6)).astype(np.float32)
EMBEDS = RNG.standard_normal((3, 77, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def pipe(sd1_folder):
    return our_pipeline(sd1_folder)


@pytest.fixture
def elsewhere(monkeypatch):
    """What is replaced on both devices is replaced here; only the one kernel of all of attention is not."""
    monkeypatch.setitem(kernels.LAUNCHES, "CPU", kernels.LAUNCHES["GPU"] | kernels.LAUNCHES["Ascend"])
    monkeypatch.setattr(launches, "computes_apart", lambda: True)
    kernels._plan_key = None
    yield
    kernels._plan_key = None


def eager_stages(pipe, log=None) -> Stages:
    stages = Stages(pipe.unet, pipe.vae, pipe.text_encoder, "pynative")
    build = stages._stage

    def logged(key, make):
        run = build(key, make)

        def call(*arguments):
            if log is not None:
                log.append(key[0])
            return run(*arguments)

        return call

    stages._stage = logged
    return stages


def predictions(pipe, timesteps=(501, 21), log=None) -> np.ndarray:
    predict = eager_stages(pipe, log).predictor(EMBEDS, {}, 2, timesteps[:1])
    with turns.turn():
        return np.stack([host(predict(tensor(LATENTS), timestep)) for timestep in timesteps])


def test_a_unets_predictions(pipe, elsewhere, monkeypatch):
    log: list[str] = []
    ours = predictions(pipe, log=log)
    assert log.count("unet") == 4 and log.count("unet_text") == 2, "two groups of texts"
    assert log.count("unet_time") == 2, "one timestep was not announced"
    monkeypatch.undo()
    kernels._plan_key = None
    log.clear()
    assert parity.relative(ours, predictions(pipe, log=log)) < 3e-6
    assert log == ["unet"] * 4


def test_what_is_kept_does_not_outlive_a_turn(pipe, elsewhere):
    log: list[str] = []
    predict = eager_stages(pipe, log).predictor(EMBEDS[:1], {}, 1)
    weight = launches.apart(pipe.unet).attentions[0].to_v.weight
    with turns.turn():
        before, again = (host(predict(tensor(LATENTS[:1]), 501)) for _ in range(2))
    assert np.array_equal(before, again) and log.count("unet_text") == log.count("unet_time") == 1
    original = weight.asnumpy()
    with devices.eager():
        ops.assign(weight, ms.Tensor(original * 2))
    try:
        assert parity.relative(host(predict(tensor(LATENTS[:1]), 501)), before) > 1e-4
    finally:
        with devices.eager():
            ops.assign(weight, ms.Tensor(original))


def test_the_vae_and_clip(pipe, elsewhere, monkeypatch):
    pixels = RNG.uniform(-1, 1, (1, 3, 32, 48)).astype(np.float32)
    tokens = RNG.integers(0, 90, (1, 77))

    def results():
        stages = eager_stages(pipe)
        moments = stages.encode_image(pixels)
        return stages.encode_text(tokens, None, None), moments, stages.decode_latents(moments[:, :4])

    ours = results()
    monkeypatch.undo()
    kernels._plan_key = None
    for got, expected in zip(ours, results()):
        assert parity.relative(got, expected) < 3e-5  # 9e-6, of encoder and decoder in a row


def test_nothing_is_apart_on_a_cpu_nor_of_another_unet(pipe, monkeypatch):
    assert launches.apart(pipe.unet) is None and kernels.LAUNCHES[devices.device_target()] == {}
    monkeypatch.setattr(launches, "computes_apart", lambda: True)
    assert launches.apart(pipe.unet).attentions
    layer = launches.apart(pipe.unet).attentions[0]
    monkeypatch.setattr(layer, "norm_k", object())
    assert launches.apart(pipe.unet) is None


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("room", [1 << 25, 4 * 5 * 2])
def test_attention_in_slices(heads, room, monkeypatch):
    monkeypatch.setattr(launches, "_scores_at_once", lambda: room)
    query, key, value = (RNG.standard_normal((2, count, 8)).astype(np.float32) for count in (7, 5, 5))
    scale = (8 // heads) ** -0.5
    projections = {"to_k": lambda x: tensor(key), "to_v": lambda x: tensor(value)}
    layer = SimpleNamespace(heads=heads, scale=scale, upcast_attention=False, **projections)
    with devices.eager():
        ours = host(launches.attention(layer, tensor(query), *launches.keys_and_values(layer, tensor(key))))
    apart = (torch.from_numpy(x).double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    exact = torch.nn.functional.scaled_dot_product_attention(*apart).transpose(1, 2).flatten(2)
    assert parity.relative(ours, exact.numpy()) < 5e-6  # 2.9e-6, of the exponentials


def test_parts_of_a_tensor_keep_their_bits():
    vector = RNG.standard_normal(5).astype(np.float32)
    with devices.eager():
        assert [host(number).tobytes() for number in numbers(tensor(vector))] == [x.tobytes() for x in vector]
        first, second = halves(tensor(LATENTS[:2]))
    assert np.array_equal(host(first), LATENTS[:1]) and np.array_equal(host(second), LATENTS[1:2])


@pytest.mark.parametrize("memory, numbers_held", [(None, 1 << 25), (8 << 30, 1 << 28), (1 << 29, 1 << 25)])
def test_more_scores_at_once_where_there_is_more_memory(memory, numbers_held, monkeypatch):
    monkeypatch.setattr(devices, "device_memory", lambda: memory)
    assert launches.scores_at_once() == numbers_held
