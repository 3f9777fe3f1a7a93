"""The door for random numbers: what it takes, what it refuses, and that streams are kept apart."""

import numpy as np
import pytest

from mindiffedit import randomness


def test_a_seed_starts_a_stream_anew_and_a_generator_moves_on():
    first = randomness.randn((2, 3), randomness.resolve(7))
    assert np.array_equal(first, randomness.randn((2, 3), randomness.resolve(7)))
    generator = np.random.default_rng(7)
    source = randomness.resolve(generator)
    assert np.array_equal(first, randomness.randn((2, 3), source))
    assert not np.array_equal(first, randomness.randn((2, 3), source))


def test_a_list_draws_each_sample_from_its_own_stream():
    drawn = randomness.randn((2, 4, 5), randomness.resolve([1, 2]))
    for row, seed in zip(drawn, (1, 2)):
        assert np.array_equal(row[None], randomness.randn((1, 4, 5), randomness.resolve(seed)))
    assert drawn.dtype == np.float32


def test_another_framework_fits_through_the_door():
    class Source:
        def standard_normal(self, size, dtype):
            return np.full(size, 0.25, dtype)

        def integers(self, high):
            return high - 1

    source = randomness.resolve(Source())
    assert randomness.randn((3,), source).tolist() == [0.25] * 3
    assert randomness.randint(9, source) == 8


@pytest.mark.parametrize("given", ["0", 1.5, True, object(), [None, "x"]])
def test_other_things_are_refused_by_name(given):
    with pytest.raises(TypeError, match="generator"):
        randomness.resolve(given)


@pytest.mark.parametrize("given", [-1, []])
def test_values_that_mean_nothing_are_refused(given):
    with pytest.raises(ValueError, match="generator"):
        randomness.resolve(given)


def test_a_list_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="length 2"):
        randomness.randn((3, 4), randomness.resolve([1, 2]))
