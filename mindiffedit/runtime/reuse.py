"""Results kept from one call to the next, so that no model does the same work twice.

A result is returned again only for the same input bytes and the same weights: what comes out is what would have been
computed.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import xxhash

from mindiffedit.runtime import devices, turns


def digest(array: np.ndarray) -> tuple[str, tuple, bytes]:
    """What tells one array from another: dtype, shape and a 128-bit hash (XXH3) of its values."""
    return array.dtype.str, array.shape, xxhash.xxh3_128_digest(np.ascontiguousarray(array).data)


def weights_of(model) -> Hashable:
    """What tells a model's weights from others.

    On a CPU a hash of all values (``fingerprint``), so that no change is missed, whoever made it, and the kinds of the
    layers. Elsewhere the turn (see ``turns``), so that nothing is kept longer: bringing the weights to the host takes
    longer than what is saved.
    """
    if devices.device_target() != "CPU":
        return turns.once((weights_of, id(model)), object)
    return turns.once(
        (weights_of, id(model)),
        lambda: (fingerprint(model), *(type(cell) for _, cell in model.cells_and_names())),
    )


def fingerprint(model) -> bytes:
    """128-bit hash (XXH3) of a model's parameters: order, shapes, dtypes and every value.

    Reads all weights once (0.5 GB in less than 0.1 s). No protection against weights made to collide.
    """
    total = xxhash.xxh3_128()
    for parameter in model.get_parameters():
        values = np.ascontiguousarray(_values(parameter))
        total.update(f"{parameter.dtype} {values.shape}".encode())
        total.update(values.reshape(-1).view(np.uint8).data)
    return total.digest()


def _values(parameter) -> np.ndarray:
    import mindspore

    # NumPy has no bfloat16.
    return (parameter.astype(mindspore.float32) if parameter.dtype == mindspore.bfloat16 else parameter).asnumpy()


def places_of(model) -> list[Any]:
    """All that a graph over a model is fixed to: layers, their attention processors, weights and where these lie."""
    places: list[Any] = []
    for _, cell in model.cells_and_names():
        places += [cell, getattr(cell, "processor", None)]
    for parameter in model.get_parameters():
        places += [parameter, parameter.data_ptr()]
    return places


def same_places(some: list[Any], others: list[Any]) -> bool:
    """Whether two such lists hold the same objects and addresses."""
    return len(some) == len(others) and all(a == b if isinstance(a, int) else a is b for a, b in zip(some, others))


class Memory:
    """The last ``limit`` results of a function, by key, for one state of the weights."""

    def __init__(self, limit: int):
        self._limit = limit
        self._weights: Any = None
        self._results: collections.OrderedDict[Hashable, np.ndarray] = collections.OrderedDict()

    def get(self, key: Hashable, weights: Hashable, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The result kept for ``key``, or ``compute()``, which is then kept; not to be written into."""
        if weights != self._weights:
            self.clear()
            self._weights = weights
        if key not in self._results:
            result = compute()
            result.setflags(write=False)
            self._results[key] = result
            while len(self._results) > self._limit:
                self._results.popitem(last=False)
        self._results.move_to_end(key)
        return self._results[key]

    def clear(self) -> None:
        """Drops all results."""
        self._results.clear()
