"""The regularisers' closed-form gradients against autograd through the reference's own functions."""

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_diffedit import pipeline_stable_diffusion_diffedit as reference

from mindiffedit.noise import regularisers


def _noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(0.3, 1.4, shape).astype(np.float32)


@pytest.fixture
def rolls(monkeypatch):
    """The same rolls on both sides: a fixed list, handed to torch.randint and to ours from the start each."""
    drawn = [3, 1, 0, 2, 5, 4, 1, 2, 3, 0] * 200

    class Queue:
        def __init__(self):
            self.left = list(drawn)

        def __call__(self, high):
            return self.left.pop(0) % high

    theirs = Queue()
    monkeypatch.setattr(reference.torch, "randint", lambda high, size, generator=None: torch.tensor([theirs(high)]))
    return Queue()


@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (2, 4, 12, 20), (1, 3, 19, 33)])
def test_auto_correlation(shape, rolls):
    noise = _noise(*shape)
    tensor = torch.tensor(noise, dtype=torch.float64, requires_grad=True)
    expected = reference.auto_corr_loss(tensor)
    expected.backward()
    loss, gradient = regularisers.auto_correlation(noise, rolls)
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-9, atol=1e-15)


def test_kl_divergence():
    noise = _noise(2, 4, 9, 7)
    tensor = torch.tensor(noise, dtype=torch.float64, requires_grad=True)
    expected = reference.kl_divergence(tensor)
    expected.backward()
    loss, gradient = regularisers.kl_divergence(noise)
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-9, atol=1e-15)


def test_several_doubled_predictions_are_refused():
    with pytest.raises(ValueError, match="one prompt at a time"):
        regularisers.regularise(
            _noise(2, 4, 8, 8), _noise(4, 4, 8, 8), 0.5, "v_prediction", lambda n: 0, 20.0, 20.0, 1, 1
        )
