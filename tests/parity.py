"""Both pipelines side by side on the same noise: PyTorch's draws are fed through our door for randomness."""

import contextlib

import numpy as np
import torch


class TorchNoise:
    """A torch CPU generator as a noise source of ours, so that both sides draw the same numbers in the same order."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def standard_normal(self, size, dtype):
        return torch.randn(tuple(size), generator=self.generator).numpy().astype(dtype)

    def integers(self, high):
        return torch.randint(high, (1,), generator=self.generator).item()


def torch_noise(seed):
    """The same stream for torch: what to give to the reference where ours gets ``TorchNoise(seed)``."""
    return torch.Generator().manual_seed(seed)


def relative(ours, theirs):
    """Largest absolute difference over the reference's rms, in float64; NaN anywhere gives inf."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape and ours.size, (ours.shape, theirs.shape)
    worst = np.max(np.abs(ours - theirs)) / np.sqrt(np.mean(theirs**2))
    return worst if np.isfinite(worst) else np.inf


@contextlib.contextmanager
def recorded_map(reference):
    """Catches the reference's map before the threshold: its one call of ``Tensor.clamp`` with a tensor bound."""
    maps, original = [], torch.Tensor.clamp

    def clamp(self, *args, **kwargs):
        if len(args) == 2 and isinstance(args[1], torch.Tensor):
            maps.append(self.detach().clone().numpy())
        return original(self, *args, **kwargs)

    torch.Tensor.clamp = clamp
    try:
        yield maps
    finally:
        torch.Tensor.clamp = original


def picture(width=80, height=64, seed=0):
    """A coloured, non-black, non-square picture without symmetry."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin(x / (5 + 3 * c) + y / (9 - 2 * c) + c) for c in range(3)]
    pixels = np.stack(waves, -1) + rng.normal(0, 12, (height, width, 3))
    pixels[height // 4 : height // 2, width // 3 : width // 2] = (220, 40, 60)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
