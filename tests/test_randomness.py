"""The door for random numbers: what it takes, what it refuses, and that streams are kept apart."""

import numpy as np
import pytest
import torch

from mindiffedit import Generator
from mindiffedit.noise import randomness


def test_a_seed_starts_a_stream_anew_and_a_generator_moves_on():
    first = randomness.randn((2, 3), randomness.resolve(7))
    assert np.array_equal(first, randomness.randn((2, 3), randomness.resolve(7)))
    for generator in (Generator().manual_seed(7), np.random.default_rng(7)):
        rng = randomness.resolve(generator)
        assert rng is generator
        drawn = randomness.randn((2, 3), rng)
        assert np.array_equal(first, drawn) == isinstance(generator, Generator)
        assert not np.array_equal(drawn, randomness.randn((2, 3), rng))


@pytest.mark.parametrize("seed", [0, 33, -7, 2**64 - 7, -(2**63), np.int32(-7), np.uint64(2**63)])
def test_an_int_is_the_seed_of_a_torch_generator(seed):
    reference = torch.Generator().manual_seed(int(seed))
    rng = randomness.resolve(seed)
    for shape in ((1, 4, 8, 9), (2, 3), (2, 4, 5, 5)):
        expected = torch.randn(shape, generator=reference).numpy()
        assert np.abs(randomness.randn(shape, rng) - expected).max() <= 1e-6
        assert randomness.randint(32, rng) == torch.randint(32, (1,), generator=reference).item()
    assert np.array_equal(rng.get_state()[:5024], reference.get_state().numpy()[:5024])


def test_a_numpy_generator_draws_as_ever():
    drawn = randomness.randn((3, 5), randomness.resolve(np.random.default_rng(4)))
    assert np.array_equal(drawn, np.random.default_rng(4).standard_normal((3, 5), np.float32))
    assert randomness.randint(9, np.random.default_rng(4)) == np.random.default_rng(4).integers(9)


def test_no_generator_is_another_stream_each_time():
    drawn = [randomness.randn((8,), randomness.resolve(None)) for _ in range(2)]
    assert not np.array_equal(*drawn)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("count", [5, 40])
def test_a_dtype_is_that_of_the_stream_or_rounds(dtype, count):
    kind = getattr(torch, dtype)
    steps = {"float32": 1e-6, "float64": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}
    drawn = randomness.randn((2, count), randomness.resolve([3, -4]), dtype)
    assert drawn.dtype == np.float32 and drawn.shape == (2, count)
    for row, seed in zip(drawn, (3, -4)):
        expected = torch.randn((1, count), generator=torch.Generator().manual_seed(seed), dtype=kind)
        assert np.abs(row - expected[0].float().numpy()).max() <= steps[dtype]
        if count == 40 and dtype != "float32":  # not the float32 stream, rounded
            other = torch.randn((1, count), generator=torch.Generator().manual_seed(seed)).to(kind)
            assert np.abs(row - other[0].float().numpy()).max() > 0.1
    # What NumPy draws is float32, rounded, as PyTorch rounds.
    single = np.random.default_rng(6).standard_normal(count, np.float32)
    rounded = torch.from_numpy(single).to(kind).float().numpy()
    assert np.array_equal(randomness.randn((count,), np.random.default_rng(6), dtype), rounded)


def test_another_dtype_is_refused():
    for rng in (Generator(), np.random.default_rng(0), [Generator(), Generator()]):
        with pytest.raises(ValueError, match="int8"):
            randomness.randn((2, 3), rng, "int8")


def test_a_list_draws_each_sample_from_its_own_stream():
    drawn = randomness.randn((2, 4, 5), randomness.resolve([1, 2]))
    for row, seed in zip(drawn, (1, 2)):
        assert np.array_equal(row[None], randomness.randn((1, 4, 5), randomness.resolve(seed)))
    assert drawn.dtype == np.float32


def test_another_framework_fits_through_the_door():
    class Stream:
        def standard_normal(self, size, dtype):
            return np.full(size, 0.25, dtype)

        def integers(self, high):
            return high - 1

    rng = randomness.resolve(Stream())
    assert randomness.randn((3,), rng).tolist() == [0.25] * 3
    assert randomness.randint(9, rng) == 8


def test_what_is_no_generator_is_refused_by_name():
    for error, values in {
        TypeError: ("0", 1.5, True, object(), [None, "x"]),
        ValueError: (2**64, -(2**63) - 1, [0, 2**64], []),
    }.items():
        for value in values:
            with pytest.raises(error, match="generator"):
                randomness.resolve(value)
    with pytest.raises(ValueError, match="length 2"):
        randomness.randn((3, 4), randomness.resolve([1, 2]))


@pytest.mark.parametrize("rng", [0, np.random.default_rng(0)])
def test_uniform_numbers(rng):
    numbers = randomness.uniform(4000, randomness.resolve(rng))
    assert numbers.dtype == np.float64 and numbers.min() >= 0 and numbers.max() < 1
    assert len(set(numbers)) == 4000
    assert np.abs(np.histogram(numbers, 4, (0, 1))[0] / 4000 - 0.25).max() < 0.03
    again = randomness.uniform(10, randomness.resolve(0))
    assert np.array_equal(again, randomness.uniform(10, randomness.resolve(0)))
