"""Which kind of object, and of which colour, a picture shows at a given place.

A small convolutional network, trained on drawn scenes by ``train_demo_checkpoint.py`` and independent of the
diffusion model: it judges the edits in ``evaluate_editing.py``. Its forward pass is written in NumPy, so that
neither torch nor MindSpore decides what counts as a success. Only NumPy, Pillow and safetensors are needed.

The network, names as in the weights file: three 3x3 convolutions of stride 2 and padding 1 with ReLU
(``convs.0`` to ``convs.2``, 48x48x3 to 6x6x64), a linear layer with ReLU (``hidden``), and two linear heads
(``kind`` and ``colour``).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CROP_SIZE = 48
"""Height and width of the crop that the network sees, in pixels."""

WEIGHTS = Path(__file__).resolve().parent / "scene_classifier.safetensors"


def object_crop(picture: np.ndarray, mask: np.ndarray, shift=(0, 0), stretch=1.0) -> np.ndarray:
    """The square around a mask's box, one eighth larger, resized for the network.

    Args:
        picture: uint8 (H, W, 3).
        mask: (H, W); the object is where it is above 0.5.
        shift: (rows, columns) by which the square is moved, in pixels.
        stretch: factor on the square's side.

    Returns:
        uint8 (CROP_SIZE, CROP_SIZE, 3); black where the square leaves the picture.

    Raises:
        ValueError: the mask is empty.
    """
    rows, columns = np.nonzero(mask > 0.5)
    if rows.size == 0:
        raise ValueError("the mask is empty: there is no object to crop")
    y = (rows.min() + rows.max() + 1) / 2 + shift[0]
    x = (columns.min() + columns.max() + 1) / 2 + shift[1]
    half = max(np.ptp(rows), np.ptp(columns)) * 0.5 * 1.125 * stretch
    box = (x - half, y - half, x + half, y + half)
    crop = Image.fromarray(picture).transform(
        (CROP_SIZE, CROP_SIZE), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR
    )
    return np.asarray(crop)


def conv2d(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int, padding: int) -> np.ndarray:
    """Cross-correlation of (B, C, H, W) with (D, C, K, K), zeros around: (B, D, H', W')."""
    size = weight.shape[-1]
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (2, 3))[:, :, ::stride, ::stride]
    # As one matrix product: contracts channel and window.
    return np.tensordot(windows, weight, ((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2) + bias[:, None, None]


class SceneClassifier:
    """The trained network, in float64: its verdict does not depend on a library's order of summation."""

    def __init__(self, weights: dict[str, np.ndarray]):
        self.weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}
        layers = ["hidden", "kind", "colour"] + [f"convs.{i}" for i in range(3)]
        expected = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
        if set(self.weights) != expected:
            raise ValueError(
                f"classifier weights: missing {sorted(expected - set(self.weights))}, "
                f"unknown {sorted(set(self.weights) - expected)}"
            )

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> SceneClassifier:
        from safetensors.numpy import load_file

        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is missing; scripts/train_demo_checkpoint.py makes it")
        return cls(load_file(str(path)))

    def logits(self, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits of kind and of colour for uint8 crops (B, CROP_SIZE, CROP_SIZE, 3), float64 (B, classes)."""
        w = self.weights
        x = np.asarray(crops, np.float64).transpose(0, 3, 1, 2) / 127.5 - 1
        for i in range(3):
            x = np.maximum(conv2d(x, w[f"convs.{i}.weight"], w[f"convs.{i}.bias"], stride=2, padding=1), 0)
        x = x.reshape(len(x), -1)
        x = np.maximum(x @ w["hidden.weight"].T + w["hidden.bias"], 0)
        return x @ w["kind.weight"].T + w["kind.bias"], x @ w["colour.weight"].T + w["colour.bias"]

    def __call__(self, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the seen kind and of the seen colour, int (B,) each."""
        kind, colour = self.logits(crops)
        return kind.argmax(1), colour.argmax(1)
