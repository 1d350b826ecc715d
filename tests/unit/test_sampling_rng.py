from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from server.engine.sampling.rng import splitmix64, uniform

seeds = st.integers(0, 2**64 - 1)


def test_splitmix64_gives_the_published_numbers():
    """The reference C program's output for the seed 1234567, which many ports test against."""
    assert [splitmix64(1234567, i) for i in range(5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(seed=seeds, index=st.integers(0, 10**6))
def test_a_number_is_a_multiple_of_two_to_the_minus_53_below_one(seed, index):
    u = uniform(seed, index)
    assert 0 <= u < 1
    assert (u * 2**53).is_integer()


def largest_gap(numbers: list[float]) -> float:
    """The Kolmogorov-Smirnov statistic against the uniform distribution, times sqrt(n)."""
    ordered = np.sort(numbers)
    steps = np.arange(len(ordered))
    gap = max(np.abs(ordered - steps / len(ordered)).max(), np.abs(ordered - (steps + 1) / len(ordered)).max())
    return float(gap * len(ordered) ** 0.5)


def test_numbers_are_uniform_along_one_stream_and_across_neighbouring_seeds():
    assert largest_gap([uniform(0, i) for i in range(20_000)]) < 1.95  # exceeded once in a thousand times
    assert largest_gap([uniform(seed, 0) for seed in range(20_000)]) < 1.95


def test_neighbouring_seeds_and_steps_are_uncorrelated():
    table = np.array([[uniform(seed, i) for i in range(100)] for seed in range(100)]) - 0.5
    for pairs in (table[1:] * table[:-1], table[:, 1:] * table[:, :-1]):
        assert abs(pairs.mean()) < 4 / 12 / pairs.size**0.5


def test_no_stream_is_another_one_shifted():
    gamma = 0x9E3779B97F4A7C15
    streams = [[uniform(seed % 2**64, i) for i in range(50)] for seed in (7, 7 + gamma, 7 + 2 * gamma, 8)]
    assert len({u for stream in streams for u in stream}) == 200
