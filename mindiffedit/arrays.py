"""Arrays of any framework as NumPy arrays. Nothing else of the package is imported here, and no framework."""

from __future__ import annotations

import numpy as np

__all__ = ["is_tensor", "rounded", "to_numpy"]


def is_tensor(value) -> bool:
    """True for a MindSpore or PyTorch tensor, known by its methods: neither framework is imported for it."""
    return hasattr(value, "asnumpy") or (hasattr(value, "detach") and hasattr(value, "numpy"))


def to_numpy(value) -> np.ndarray:
    """`value` as a NumPy array of the same shape; an array comes back as it is, not copied.

    Args:
        value: NumPy array, MindSpore tensor, PyTorch tensor (of any device, with or without gradient), or what
            `numpy.asarray` takes. bfloat16, which NumPy does not have, becomes float32.
    """
    if isinstance(value, np.ndarray):
        return value
    if not is_tensor(value):
        return np.asarray(value)
    if hasattr(value, "detach") and not hasattr(value, "asnumpy"):
        value = value.detach().cpu()
    if "bfloat16" in str(value.dtype).lower():
        value = value.float()
    return value.asnumpy() if hasattr(value, "asnumpy") else value.numpy()


def rounded(function, value):
    """A float32 function correctly rounded; the vectorised ones of NumPy and torch can be some bits off."""
    return np.float32(function(np.float64(value)))
