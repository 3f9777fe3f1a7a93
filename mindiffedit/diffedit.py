"""DiffEdit (Couairon et al., arXiv 2210.11427, section 3.2): difference map, inversion, masked denoising.

This is the idea; everything else in the package serves it. It is arithmetic on arrays or tensors, and knows no model,
solver or device. Two functions come in:

- ``predict(latents, timestep)``: the UNet's outputs for latents (B, C, h, w), without guidance (B, C, h, w), with
  guidance (2 B, C, h, w), those of the negatives first;
- ``update(index, latents, noise_prediction, pred_x0, background)``: what a step makes of them, by guidance, solver and
  blend: the next latents and the predicted clean latents ``x0``, or None where the solver gives none. ``pred_x0`` is
  that of the step before, None at first.

``invert_by_points`` moves along the path by itself and takes other two functions, see there.

Loops are generators of ``Step``: their caller shows progress, watches, and may put other latents in a step's place.

Letters in shapes: B pictures, N maps for each, C latent channels, h x w the latents' grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Step:
    """What a loop has done so far. It goes on from ``latents`` and ``pred_x0``, which may be replaced.

    Attributes:
        index: counts from 0.
        timestep: of the training schedule.
        latents: after the step, (B, C, h, w).
        noise_prediction: the UNet's outputs in it, as ``predict`` gave them.
        pred_x0: the clean latents that they predict, (B, C, h, w), or None.
    """

    index: int
    timestep: Any
    latents: Any
    noise_prediction: Any
    pred_x0: Any


def invert(predict: Callable, update: Callable, latents, timesteps: Iterable) -> Iterator[Step]:
    """Step 2: from clean to noisy latents, along an inverse solver, whose steps have no background.

    Args:
        latents: clean, (B, C, h, w).
        timesteps: cleanest first.
    """
    return _loop(predict, update, latents, timesteps, None)


def denoise(predict: Callable, update: Callable, latents, timesteps: Iterable, backgrounds: Sequence) -> Iterator[Step]:
    """Step 3: from noisy to clean latents towards the target; outside the mask each step takes its background.

    Args:
        latents: where it begins, (B, C, h, w).
        timesteps: noisiest first.
        backgrounds: for each step the latents outside the mask, (B, C, h, w). ``update`` knows the mask and blends, by
            ``blended``; the compiled one is ``stages.CompiledUpdate``.
    """
    return _loop(predict, update, latents, timesteps, backgrounds)


def _loop(predict, update, latents, timesteps, backgrounds) -> Iterator[Step]:
    pred_x0 = None
    for index, timestep in enumerate(timesteps):
        noise_prediction = predict(latents, timestep)
        background = None if backgrounds is None else backgrounds[index]
        latents, pred_x0 = update(index, latents, noise_prediction, pred_x0, background)
        step = Step(index, timestep, latents, noise_prediction, pred_x0)
        yield step
        latents, pred_x0 = step.latents, step.pred_x0


def points_of(levels: int, count: int) -> list[int]:
    """``count`` of the levels 0 to ``levels - 1``, evenly spread, the last among them; all where there are fewer."""
    count = min(count, levels)
    return [(number + 1) * levels // count - 1 for number in range(count)]


def invert_by_points(
    predict_noise: Callable, move: Callable, latents, timesteps: Sequence, points, nothing
) -> Iterator:
    """Step 2 with fewer evaluations: noise is predicted at some levels only, the points, each once (C10).

    A step of DDIM back from a level takes the noise predicted there. So an inversion that is led back exactly takes it
    where it arrives, which is not known before. Here it goes to a point with the noise of the point before (none at
    first, so that the clean latents only fade), predicts there, and goes the same way again from where it stood, with
    predictions between the two points' for the levels between them.

    Args:
        predict_noise: (latents, timestep) -> noise (B, C, h, w).
        move: (latents, start, end, noise, later noise, share) -> the latents at level ``end`` of those at level
            ``start``, along noise that is so far on the way to the later one, and the clean latents ``x0`` that it
            stands for. Level -1 is the clean one.
        latents: clean, (B, C, h, w).
        timesteps: of the levels, cleanest first.
        points: indices of levels, rising, with the last one.
        nothing: zeros (B, C, h, w).
    """
    before, noise = -1, nothing
    for point in points:
        there, _ = move(latents, before, point, noise, noise, 0.0)
        later = predict_noise(there, timesteps[point])
        if before == -1:
            noise = later
        for index in range(before + 1, point + 1):
            latents, pred_x0 = move(latents, index - 1, index, noise, later, (index - before) / (point - before))
            step = Step(index, timesteps[index], latents, later, pred_x0)
            yield step
            latents = step.latents
        before, noise = point, later


def guided(unconditional, conditional, guidance_scale):
    """Classifier-free guidance (arXiv 2207.12598): of predictions for negatives and prompts, all (B, C, h, w)."""
    return unconditional + guidance_scale * (conditional - unconditional)


def blended(latents, mask, background):
    """Latents where the mask (B, 1, h, w) is 1, the background where it is 0."""
    return latents * mask + background * (1 - mask)


def difference(source: np.ndarray, target: np.ndarray, guidance_scale: float, corrected: bool, negatives=None):
    """Step 1: the target's noise prediction less the source's, with guidance where the scale is above 1.

    Args:
        source: predictions for the source prompts, (B N, C, h, w) float32.
        target: those for the target prompts, of the same noised latents.
        guidance_scale: at most 1 is without guidance.
        corrected: guide away from the negatives (C1). D1: the reference takes the negative for the prompt and the
            prompt for the negative here, which turns the guidance round: each prediction is p + scale * (n - p).
        negatives: predictions for the negatives of source and target; None where the two are the same.
    """
    scale = np.float32(guidance_scale)
    if guidance_scale <= 1:
        return target - source
    if negatives is None:
        # B9: one negative's prediction, twice, cancels: what remains of the reference's four is this.
        return (target - source) * (scale if corrected else np.float32(1) - scale)
    pairs = [(source, negatives[0]), (target, negatives[1])]
    if corrected:
        pairs = [(negative, positive) for positive, negative in pairs]
    source_noise, target_noise = (start + scale * (end - start) for start, end in pairs)
    return target_noise - source_noise


def difference_map(differences: np.ndarray, num_maps: int, outlier_quantile: float | None = None) -> np.ndarray:
    """Step 1: the mean over maps and channels of the absolute difference.

    Args:
        differences: (B N, C, h, w) float32, the maps of one picture in a row.
        num_maps: N.
        outlier_quantile: each map's values beyond this quantile of them are brought down to it first; None leaves them.

    Returns:
        float32 (B, h, w), at least 0.
    """
    magnitudes = np.abs(differences)
    magnitudes = magnitudes.reshape(-1, num_maps, *magnitudes.shape[1:])
    if outlier_quantile is not None:
        most = np.quantile(magnitudes, outlier_quantile, axis=(2, 3, 4), keepdims=True)
        magnitudes = np.minimum(magnitudes, most.astype(np.float32))
    return magnitudes.mean(axis=(1, 2), dtype=np.float64).astype(np.float32)
