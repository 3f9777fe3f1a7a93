"""The one door for randomness: every random number of the pipeline is drawn here, on the host, with NumPy.

A *noise source* is anything with ``standard_normal(size, dtype)`` and ``integers(high)`` that behave like those of
``numpy.random.Generator``: a NumPy generator itself, or an object that imitates another framework's stream. Models
and compiled steps never draw; they take noise as an argument.
"""

from __future__ import annotations

from typing import List, Protocol, Union, runtime_checkable

import numpy as np


@runtime_checkable
class NoiseSource(Protocol):
    """What a random stream has to offer."""

    def standard_normal(self, size, dtype): ...

    def integers(self, high): ...


def resolve(generator) -> Union[NoiseSource, List[NoiseSource]]:
    """Turns what a user gives as ``generator=`` into one noise source or a list of them.

    Args:
        generator: None (fresh entropy), an int seed (a new stream starting there), a ``numpy.random.Generator`` or
            another noise source (its position moves on with every draw), or a list of these, one for each sample.

    Raises:
        TypeError: for anything else, naming it.
        ValueError: for a negative seed or an empty list.
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) == 0:
            raise ValueError(
                "`generator` is an empty list; give one generator or seed for each sample, or None."
            )
        return [_single(item) for item in generator]
    return _single(generator)


def _single(generator) -> NoiseSource:
    if generator is None:
        return np.random.default_rng()
    if isinstance(generator, (int, np.integer)) and not isinstance(generator, (bool, np.bool_)):
        if generator < 0:
            raise ValueError(
                f"`generator` was given as the seed {generator}; a seed is a whole number of at least 0."
            )
        return np.random.default_rng(int(generator))
    if isinstance(generator, NoiseSource):
        return generator
    raise TypeError(
        f"`generator` has to be None, an int seed, a numpy.random.Generator or a list of these, but is"
        f" {type(generator).__module__}.{type(generator).__qualname__}."
    )


def randn(shape, source: Union[NoiseSource, List[NoiseSource]]) -> np.ndarray:
    """Standard normal noise, float32, of ``shape``.

    With a list of sources each sample along the first axis comes from its own source (as the reference's
    ``randn_tensor`` draws it); the list must have ``shape[0]`` entries.
    """
    shape = tuple(int(n) for n in shape)
    if isinstance(source, list) and len(source) == 1:
        source = source[0]  # as the reference takes it
    if isinstance(source, list):
        if len(source) != shape[0]:
            raise ValueError(
                f"You have passed a list of generators of length {len(source)}, but requested an effective batch size"
                f" of {shape[0]}. Give one generator for each sample of the batch."
            )
        return np.concatenate([randn((1,) + shape[1:], each) for each in source])
    return np.asarray(source.standard_normal(size=shape, dtype=np.float32), np.float32)


class Draws:
    """A source, or list of sources, under the one call that mindone's schedulers make of a generator."""

    def __init__(self, source: Union[NoiseSource, List[NoiseSource]]):
        self._source = source

    def standard_normal(self, size) -> np.ndarray:
        """Noise of the whole batch; a list of sources is split by ``randn``."""
        return randn(size, self._source)


def randint(high: int, source: Union[NoiseSource, List[NoiseSource]]) -> int:
    """A whole number from 0 to ``high - 1``; from the first source where a list is given."""
    return int((source[0] if isinstance(source, list) else source).integers(high))
