"""Masks that end where the picture has an edge: the guided filter (He, Sun, Tang, 2013) on the latents' grid.

A map says roughly where the noise predictions differ; the picture says exactly where one thing ends and another begins.
The filter explains the map in each window as a linear function of the picture's colours there, so that what has one
colour gets one value, and a step in the map moves to the step in the picture. Nothing here knows a model.
"""

from __future__ import annotations

import numpy as np

__all__ = ["follow_edges", "guides_of"]

_SPREAD = 0.25
"""Standard deviation that latents are brought to as guides: about that of pictures' values in [0, 1]."""


def guides_of(pixels: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """What `follow_edges` takes its edges from.

    Args:
        pixels: pictures (N, 3, H, W) in [-1, 1] whose sides are multiples of the grid's, or latents (N, C, h, w).
        grid: (h, w) of the latents.

    Returns:
        float64 (N, h, w, 3 or C): the mean colour of each latent's pixels, in [0, 1]; of latents their values, in
        units of four standard deviations of each one's own.
    """
    count, channels, height, width = pixels.shape
    values = pixels.astype(np.float64)
    if (height, width) == tuple(grid):
        spread = values.std(axis=(1, 2, 3), keepdims=True)
        values = values * (_SPREAD / np.maximum(spread, np.finfo(np.float32).tiny))
    else:
        rows, columns = height // grid[0], width // grid[1]
        values = values.reshape(count, channels, grid[0], rows, grid[1], columns).mean((3, 5)) / 2 + 0.5
    return values.transpose(0, 2, 3, 1)


def follow_edges(share: np.ndarray, guide: np.ndarray, radius: int, contrast: float) -> np.ndarray:
    """The guided filter, of one map.

    In the window around each latent, a, b minimise the sum of (a . guide + b - share)^2 + contrast^2 |a|^2; a latent's
    value is the mean over all windows that it is in.

    Args:
        share: (h, w).
        guide: (h, w, C).
        radius: windows are squares of 2 * radius + 1 latents; the grid goes on at its edges with the values there.
        contrast: above 0; within a window, colours that vary by less than this count as one.

    Returns:
        (h, w) of `share`'s dtype. It may leave the range of `share` a little where the picture is extreme.
    """
    from scipy import ndimage

    def mean(values):
        size = (2 * radius + 1,) * 2 + (1,) * (values.ndim - 2)
        return ndimage.uniform_filter(values, size, mode="nearest")

    values = share.astype(np.float64)
    colours, average = mean(guide), mean(values)
    covariance = mean(guide * values[..., None]) - colours * average[..., None]
    products = mean(guide[..., :, None] * guide[..., None, :])
    variance = products - colours[..., :, None] * colours[..., None, :]
    slope = np.linalg.solve(variance + contrast**2 * np.eye(guide.shape[-1]), covariance[..., None])[..., 0]
    offset = average - (slope * colours).sum(-1)
    return ((mean(slope) * guide).sum(-1) + mean(offset)).astype(share.dtype)
