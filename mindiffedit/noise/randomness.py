"""The one door for randomness: every random number of the pipeline is drawn here, on the host, with NumPy.

A *random stream* (``rng``) is anything with ``standard_normal(size, dtype)`` and ``integers(high)`` that behave like
those of ``numpy.random.Generator``: a NumPy generator itself, ``mindiffedit.Generator``, which draws
PyTorch's numbers, or another object. An int seed stands for ``mindiffedit.Generator().manual_seed(seed)``, so
``generator=0`` here is diffusers' ``generator=torch.Generator().manual_seed(0)``. Models and compiled steps
never draw; they take noise as an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np

from mindiffedit.errors import InputError, InputTypeError
from mindiffedit.noise.generator import Generator, check_seed, dtype_name, rounded


@runtime_checkable
class RandomStream(Protocol):
    """What a random stream has to offer."""

    def standard_normal(self, size, dtype): ...

    def integers(self, high, /): ...


def resolve(generator) -> RandomStream | list[RandomStream]:
    """Turns what a user gives as ``generator=`` into one random stream or a list of them.

    Args:
        generator: None (fresh entropy), an int seed as PyTorch takes them, -2**63 to 2**64 - 1 (the stream of
            ``mindiffedit.Generator().manual_seed(seed)``, from its beginning), a ``mindiffedit.Generator``, a
            ``numpy.random.Generator`` or another random stream (its position moves on with every draw), or a
            list of these, one for each sample.

    Raises:
        TypeError: for anything else, naming it.
        ValueError: for a seed out of that range or an empty list.
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) == 0:
            raise InputError(
                "{parameter} is an empty list; give one generator or seed for each sample, or None.",
                parameter="generator",
            )
        return [_single(item) for item in generator]
    return _single(generator)


def _single(generator) -> RandomStream:
    if generator is None:
        return np.random.default_rng()
    if isinstance(generator, (int, np.integer)) and not isinstance(generator, (bool, np.bool_)):
        return Generator().manual_seed(check_seed(generator, "generator"))
    if isinstance(generator, RandomStream):
        return generator
    raise InputTypeError(
        "{parameter} has to be None, an int seed, a mindiffedit.Generator, a numpy.random.Generator or a list of "
        "these, but is {module}.{kind}.",
        parameter="generator",
        module=type(generator).__module__,
        kind=type(generator).__qualname__,
    )


def randn(shape, rng: RandomStream | list[RandomStream], dtype: str = "float32") -> np.ndarray:
    """Standard normal noise of ``shape``, a float32 array whatever ``dtype`` is.

    With a list of streams each sample along the first axis comes from its own (as the reference's
    ``randn_tensor`` draws it); the list must have ``shape[0]`` entries.

    Args:
        dtype: "float32", "float16", "bfloat16" or "float64", the precision that the values have. A
            ``mindiffedit.Generator`` is asked for that dtype, which PyTorch draws as a stream of its own (the
            reference does so where its model has that dtype); other streams are asked for float32, rounded
            here.

    Raises:
        ValueError: for a list of another length or another dtype.
    """
    dtype = dtype_name(dtype)
    shape = tuple(int(n) for n in shape)
    if isinstance(rng, list) and len(rng) == 1:
        rng = rng[0]  # as the reference takes it
    if isinstance(rng, list):
        if len(rng) != shape[0]:
            raise InputError(
                "You have passed a list of generators of length {count}, but requested an effective batch size of "
                "{samples}. Give one generator for each sample of the batch.",
                parameter="generator",
                count=len(rng),
                samples=shape[0],
            )
        return np.concatenate([randn((1,) + shape[1:], each, dtype) for each in rng])
    if isinstance(rng, Generator):
        return rng.randn(shape, dtype=dtype).astype(np.float32)
    return rounded(rng.standard_normal(size=shape, dtype=np.float32), dtype)


class Draws:
    """A function that draws noise of a shape, under the one call that mindone's schedulers make of a generator."""

    def __init__(self, draw: Callable[[tuple], np.ndarray]):
        self._draw = draw

    def standard_normal(self, size) -> np.ndarray:
        """Noise of the whole batch."""
        return self._draw(size)


def randint(high: int, rng: RandomStream | list[RandomStream]) -> int:
    """A whole number from 0 to ``high - 1``; from the first stream where a list is given."""
    return int((rng[0] if isinstance(rng, list) else rng).integers(high))


def uniform(count: int, rng: RandomStream) -> np.ndarray:
    """``count`` numbers of [0, 1), float64, one draw of 53 bits for each."""
    return np.array([int(rng.integers(2**53)) for _ in range(count)], np.float64) / 2.0**53
