"""Counter-based random numbers: no generator object, no state, nothing to save or restore.

The number for a token is a function of the sequence's seed and of how many tokens it has generated, so neither
preemption, nor batching, nor a prefix-cache hit can shift a seeded sequence.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def uniform(seed: int, index: int) -> float:
    """The `index`-th number of the stream of `seed`: a multiple of 2**-53 in [0, 1)."""
    return (splitmix64(stream_of(seed), index) >> 11) * 2.0**-53


def stream_of(seed: int) -> int:
    """Where the stream of `seed` starts: 64 bits.

    Were it the seed itself, the seeds s and s + _GAMMA would give the same numbers one step apart.
    """
    return splitmix64(seed, 0)


def uniforms(streams: ArrayLike, indices: ArrayLike) -> NDArray[np.float64]:
    """`uniform` of each pair, streams for seeds. [R], [R] -> [R]"""
    numbers = _splitmix64_of(np.asarray(streams, dtype=np.uint64), np.asarray(indices, dtype=np.uint64))
    return (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53


def splitmix64(state: int, index: int) -> int:
    """Output number `index` (from 0) of the SplitMix64 generator that starts at `state`; 64 bits.

    Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014; constants of the variant
    13 mixer as in Vigna's public-domain splitmix64.c. The state only ever grows by a constant, which is why
    output `index` can be had without its predecessors.
    """
    z = (state + (index + 1) * _GAMMA) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _splitmix64_of(state: NDArray[np.uint64], index: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`splitmix64` of each pair; arithmetic of arrays in 64 bits wraps around by itself."""
    z = state + (index + np.uint64(1)) * np.uint64(_GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    number: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return number
