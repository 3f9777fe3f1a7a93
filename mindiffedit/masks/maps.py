"""From a map to a mask: what `mask_of` does, and the options that shape it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mindiffedit.arrays import to_numpy
from mindiffedit.errors import InputError, InputTypeError
from mindiffedit.images.edges import follow_edges
from mindiffedit.options import (
    NumericalError,
    check_at_least_zero,
    check_count,
    check_finite,
    check_ratio,
    check_switch,
    check_threshold,
)

# Far beyond any grid of latents; a kernel or a footprint of this size is still computed at once.
MAX_LATENTS = 1000
MAX_SIGMA = 100.0
MAX_WINDOW = 100

NO_DIFFERENCE = (
    "Source and target prompt give the same noise prediction everywhere, so there is no difference to"
    " make a mask of; say in the target prompt what should change."
)

__all__ = ["NO_DIFFERENCE", "MaskOptions", "checked_options", "clamp_of", "distance_to", "mask_of"]


@dataclass(frozen=True)
class MaskOptions:
    """How a map becomes a mask; in the order in which `mask_of` does it. The defaults are the reference's.

    Checked on construction: a wrong type is a TypeError, a wrong value a ValueError.

    Args:
        smoothing: sigma in latents, 0 to 100, of a Gaussian over the clamped map; 0: none. The grid goes on at its
            edges with the values there.
        threshold: in (0, 1); a latent belongs to the mask where the map is above this share of the clamp. The
            paper's and the reference's is 0.5. "auto" takes one that suits each map, see `automatic_threshold`, under a
            clamp of `AUTOMATIC_RATIO`; the ratio does not count then.
        edges: radius in latents, 0 to 100, of windows in which the map follows the picture's edges, see
            `edges.follow_edges`; 0: it does not. Needs `guides` in `mask_of`; the pipeline gives its picture.
        edge_contrast: above 0; colours, in [0, 1], that vary by less than this in a window count as one.
        fill_holes: holes that the mask encloses become part of it. What reaches the edge of the grid is no hole.
        smallest_region: connected regions of fewer latents are dropped; latents that touch at a corner are connected.
            0 or 1: all are kept.
        erosion: latents taken off the mask's border, then
        dilation: latents added around it. Both footprints are discs: a latent within this distance, from middle to
            middle. The edge of the grid is no border of the mask.
        soft: continuous values in place of 0 and 1; `mask_of` has the formula.
    """

    threshold: float | str = 0.5
    smoothing: float = 0.0
    erosion: int = 0
    dilation: int = 0
    fill_holes: bool = False
    smallest_region: int = 0
    soft: bool = False
    edges: int = 0
    edge_contrast: float = 0.06

    def __post_init__(self):
        for name, check, *most in (
            ("threshold", _check_threshold),
            ("smoothing", check_at_least_zero, MAX_SIGMA),
            ("erosion", check_count, MAX_LATENTS),
            ("dilation", check_count, MAX_LATENTS),
            ("fill_holes", check_switch),
            ("smallest_region", check_count, MAX_LATENTS**2),
            ("soft", check_switch),
            ("edges", check_count, MAX_WINDOW),
            ("edge_contrast", check_ratio),
        ):
            object.__setattr__(self, name, check(getattr(self, name), name, *most))

    def clamp_ratio(self, ratio: float) -> float:
        """The ratio that maps are clamped with, where this one is given."""
        return AUTOMATIC_RATIO if self.threshold == "auto" else ratio


AUTOMATIC_RATIO = 5.0
"""So high a clamp that it only takes outliers; what lies below it tells the threshold."""

OTSU_FACTOR = 1.2
"""Otsu's threshold lies in the middle of a blurred border; an object that the map overlaps on all sides ends above it.

Chosen on drawn scenes, see docs/quality.md."""


def automatic_threshold(share: np.ndarray) -> float:
    """A threshold for one map, (h, w) in [0, 1]: by Otsu's method (1979), times `OTSU_FACTOR`; in (0, 1).

    Otsu's is the one that parts the values into two groups whose means are furthest apart, by their variance between.
    """
    values = np.sort(share.ravel().astype(np.float64))
    below = np.arange(1, len(values))
    sums = np.cumsum(values)[:-1]
    means = sums / below, (values.sum() - sums) / below[::-1]
    best = int(np.argmax(below * below[::-1] * (means[1] - means[0]) ** 2))
    return float(np.clip(OTSU_FACTOR * (values[best] + values[best + 1]) / 2, 1e-3, 1 - 1e-3))


def _check_threshold(value, name: str):
    return value if isinstance(value, str) and value == "auto" else check_threshold(value, name)


def checked_options(options) -> MaskOptions:
    """`options` where they are MaskOptions; the reference's for None; a TypeError for anything else."""
    if options is None:
        return MaskOptions()
    if not isinstance(options, MaskOptions):
        raise InputTypeError(
            "{parameter} has to be a MaskOptions or None, but is {options!t}; give for example "
            "MaskOptions(smoothing=1.0).",
            parameter="mask_options",
            options=options,
        )
    return options


def clamp_of(maps, ratio: float = 3.0, per_image: bool = False) -> np.ndarray:
    """The magnitude that maps are clamped to: `ratio` times their mean.

    Args:
        maps: (B, h, w), at least 0.
        ratio: above 0.
        per_image: False: the mean of the whole batch, as the reference takes it (D4). True: each map's own, so that
            no mask depends on its batch-mates.

    Returns:
        float32, of shape () or, per image, (B, 1, 1). The mean is taken in float64, the product in float32.

    Raises:
        options.NumericalError: The mean, or that of one image, is 0: there is no difference to make a mask
            of.
        ValueError, TypeError: `maps` or `ratio` is not as above.
    """
    maps, ratio = _maps(maps), check_ratio(ratio, "ratio")
    groups = maps if check_switch(per_image, "per_image") else [maps]
    magnitudes = np.array([group.mean(dtype=np.float64) for group in groups]).astype(np.float32) * np.float32(ratio)
    empty = np.flatnonzero(magnitudes == 0)
    if len(empty):
        which = f" (picture {empty[0] + 1} of {len(maps)})" if per_image and len(maps) > 1 else ""
        raise NumericalError(f"{NO_DIFFERENCE[:-1]}{which}.")
    return magnitudes.reshape(-1, 1, 1) if per_image else magnitudes.reshape(())


def mask_of(
    maps, ratio: float = 3.0, options: MaskOptions = MaskOptions(), per_image: bool = False, clamp=None, guides=None
) -> np.ndarray:
    """Make masks of maps (DiffEdit, section 3.2, step 1; with the defaults what the reference does).

    1. Clamp: x = clip(map, 0, c) / c with c = `clamp_of(maps, ratio, per_image)`. First, so that an outlier, which
       may be a hundred times the mean, counts no more than a clear difference when values are averaged.
    2. Smooth x with a Gaussian. Before the threshold, because averaging decides there what a lone latent can't.
    3. Follow the picture's edges. After smoothing, which would blur them again.
    4. Threshold: 1 where x > t.
    5. Fill holes. Before regions are counted, so that a hollow outline counts with its inside; before erosion,
       which would widen the holes.
    6. Drop small regions. Before erosion and dilation, so that sizes are those of the map's own regions.
    7. Erode, then 8. dilate: with equal numbers an opening, which takes off what is thin and leaves the rest.

    With `options.soft` the result of these steps, H, says where the border is, and the map how sharp it is:

        s = clip(1/2 + (x - t) / min(t, 1 - t), 0, 1)              1/2 at the threshold; 0 and 1 well below and above
        in H:       soft = max(s, min(1, 1/2 + (d - 1) / 2r))      d: distance to the nearest latent outside H
        outside H:  soft = min(s, max(0, 1/2 - (d - 1) / 2r))      d: distance to the nearest latent in H

    with r = 1 + ceil(smoothing), away from 1/2 to a multiple of 1/255. So the value is 1 deeper than r latents in H, 0
    further than r outside, above 1/2 in H and at most 1/2 elsewhere; without `edges` it never falls where the map rises
    under the same clamp.

    Args:
        maps: (B, h, w), finite and at least 0; computed with as float32.
        ratio: as for `clamp_of`.
        per_image: as `ratio`.
        options: see `MaskOptions`.
        clamp: magnitudes above 0 of shape (), (B,) or (B, 1, 1), as `clamp_of` gives them; `ratio` and `per_image` are
            then not used. None: computed.
        guides: (1 or B, h, w, C), what `edges.guides_of` makes of the pictures; for `options.edges`.

    Returns:
        int64 (B, h, w) of 0 and 1; float32 in [0, 1] with `options.soft`.

    Raises:
        options.NumericalError: The maps are 0 everywhere (per image: one of them is), or hold NaN or
            infinity.
        ValueError, TypeError: An argument is not as above.
    """
    if not isinstance(options, MaskOptions):
        raise InputTypeError(
            "{parameter} has to be a MaskOptions, but is {options!t}.", parameter="options", options=options
        )
    from scipy import ndimage

    maps = _maps(maps)
    ratio = options.clamp_ratio(ratio)
    magnitude = clamp_of(maps, ratio, per_image) if clamp is None else _clamp(clamp, len(maps))
    share = np.clip(maps, 0, magnitude) / magnitude
    if options.smoothing > 0:
        share = np.stack([ndimage.gaussian_filter(x, options.smoothing, mode="nearest") for x in share])
    if options.edges > 0:
        followed = zip(share, _guides(guides, maps.shape))
        share = np.stack([follow_edges(x, guide, options.edges, options.edge_contrast) for x, guide in followed])
    automatic = options.threshold == "auto"
    thresholds = [np.float32(automatic_threshold(x) if automatic else options.threshold) for x in share]
    masks = np.stack([_cleaned(x > threshold, options) for x, threshold in zip(share, thresholds)])
    if not options.soft:
        return masks.astype(np.int64)
    reach = 1 + int(np.ceil(options.smoothing))
    softened = [_softened(x, mask, float(threshold), reach) for x, mask, threshold in zip(share, masks, thresholds)]
    return np.stack(softened)


def _maps(maps) -> np.ndarray:
    maps = to_numpy(maps)
    if maps.dtype.kind != "f":
        raise InputTypeError(
            "{parameter} has to hold floating-point numbers, but is of dtype {dtype}.",
            parameter="maps",
            dtype=maps.dtype,
        )
    if maps.ndim != 3 or maps.size == 0:
        raise InputError(
            "{parameter} has to be (B, h, w) with something in it, but has shape {shape}.",
            parameter="maps",
            shape=maps.shape,
        )
    check_finite(maps, "map")
    if maps.min() < 0:
        raise InputError(
            "{parameter} holds magnitudes, at least 0, but the smallest value is {least:g}.",
            parameter="maps",
            least=maps.min(),
        )
    return maps.astype(np.float32, copy=False)


def _clamp(clamp, count: int) -> np.ndarray:
    clamp = to_numpy(clamp)
    if clamp.dtype.kind not in "fiu" or clamp.shape not in ((), (count,), (count, 1, 1)):
        raise InputError(
            "{parameter} has to be one number for all or ({count},) for each map, but is {dtype} of shape {shape}; "
            "give what `clamp_of` returns.",
            parameter="clamp",
            count=count,
            dtype=clamp.dtype,
            shape=clamp.shape,
        )
    clamp = clamp.astype(np.float32)
    if not (clamp > 0).all():
        raise InputError("{parameter} has to be above 0, but is {least:g}.", parameter="clamp", least=clamp.min())
    return clamp if clamp.ndim == 0 else clamp.reshape(-1, 1, 1)


def _guides(guides, shape: tuple[int, ...]) -> np.ndarray:
    if guides is None:
        raise InputError(
            "{parameter} asks for the picture's edges; give {guides}, as `edges.guides_of` makes them.",
            parameter="edges",
        )
    guides = to_numpy(guides)
    if guides.ndim != 4 or guides.shape[1:3] != shape[1:] or guides.shape[0] not in (1, shape[0]):
        raise InputError(
            "{parameter} has shape {shape}, but maps of shape {maps} need ({count}, {height}, {width}, C); make "
            "it by `edges.guides_of`.",
            parameter="guides",
            shape=guides.shape,
            maps=shape,
            count=shape[0] if shape[0] == 1 else f"1 or {shape[0]}",
            height=shape[1],
            width=shape[2],
        )
    check_finite(guides, "guide")
    return np.broadcast_to(guides, (shape[0], *guides.shape[1:]))


def _cleaned(mask: np.ndarray, options: MaskOptions) -> np.ndarray:
    """Steps 5 to 8 of `mask_of` on one boolean mask (h, w)."""
    from scipy import ndimage

    if options.fill_holes:
        mask = ndimage.binary_fill_holes(mask)
    if options.smallest_region > 1:
        regions, _ = ndimage.label(mask, structure=np.ones((3, 3)))
        mask = mask & (np.bincount(regions.ravel())[regions] >= options.smallest_region)
    if options.erosion:
        mask = distance_to(~mask) > options.erosion
    if options.dilation:
        mask = distance_to(mask) <= options.dilation
    return mask


def distance_to(target: np.ndarray) -> np.ndarray:
    """Euclidean distance of every cell to the nearest one of `target` (bool), float64; infinity where there is none."""
    from scipy import ndimage

    if not target.any():  # scipy would measure to a cell outside the array
        return np.full(target.shape, np.inf)
    return ndimage.distance_transform_edt(~target)


def _softened(share: np.ndarray, mask: np.ndarray, threshold: float, reach: int) -> np.ndarray:
    """The formula of soft masks in `mask_of`, for one image."""
    ramp = np.clip(0.5 + (share.astype(np.float64) - threshold) / min(threshold, 1 - threshold), 0, 1)
    least = np.clip(0.5 + (distance_to(~mask) - 1) / (2 * reach), 0.5, 1)
    most = np.clip(0.5 - (distance_to(mask) - 1) / (2 * reach), 0, 0.5)
    soft = np.where(mask, np.maximum(ramp, least), np.minimum(ramp, most)) * 255
    # In steps of 1/255, so that a mask can be a picture; values near 1/2 stay on their side of it.
    levels = np.where(mask, np.maximum(np.ceil(soft), 128), np.minimum(np.floor(soft), 127))
    return levels.astype(np.float32) / np.float32(255)
