"""Masks: from a map to a mask, masks drawn by users, combinations of the two, and results pasted back through them.

A *map* is the averaged difference of two noise predictions, (B, h, w) float32, at least 0, on the latents' grid. A
*mask* is on the same grid, from 0 (keep) to 1 (change). Nothing here knows a model.
"""

from mindiffedit.images.sheets import contact_sheet
from mindiffedit.masks.drawn import (
    COMBINATIONS,
    combine,
    enlarged,
    fit_mask,
    mask_coverage,
    mask_values,
    on_latents,
    preprocess_mask,
    user_mask,
)
from mindiffedit.masks.maps import NO_DIFFERENCE, MaskOptions, checked_options, clamp_of, mask_of
from mindiffedit.masks.pasting import as_picture, feathered, overlay, paste_back
from mindiffedit.masks.sweeps import MAX_SWEEP_VALUES, sweep_values

__all__ = [
    "COMBINATIONS",
    "MAX_SWEEP_VALUES",
    "NO_DIFFERENCE",
    "MaskOptions",
    "as_picture",
    "checked_options",
    "clamp_of",
    "combine",
    "contact_sheet",
    "enlarged",
    "feathered",
    "fit_mask",
    "mask_coverage",
    "mask_of",
    "mask_values",
    "on_latents",
    "overlay",
    "paste_back",
    "preprocess_mask",
    "sweep_values",
    "user_mask",
]
