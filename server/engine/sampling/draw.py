"""The choice of a token on the host: a few numbers a row, in float64 and one row at a time.

Laws:
1. Sums run in order over one row (`numpy.cumsum` adds one by one), so a draw does not depend on the batch
   around it and a cumulative weight never falls.
2. What is drawn has a weight above zero: see `invert_cdf`.
3. Weights are relative to the likeliest token that is looked at, which has weight 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from server.engine.sampling.rng import uniform
from server.engine.sequence import Sequence

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_Scalar = TypeVar("_Scalar", bound=np.generic)

LARGEST_UNIFORM = 1.0 - 2.0**-53


@dataclass(frozen=True, slots=True)
class DrawParams:
    """The parameters of R rows that are to be drawn at random, as arrays [R]."""

    temperature: Floats
    top_k: Ints
    """In 1..vocabulary size; the vocabulary size where it is off."""
    top_p: Floats
    min_p: Floats
    uniform: Floats

    @classmethod
    def of(cls, seqs: Seq[Sequence], vocab_size: int) -> DrawParams:
        params = [seq.params for seq in seqs]
        return cls(
            temperature=np.array([p.temperature for p in params], dtype=np.float64),
            top_k=np.array([min(p.top_k or vocab_size, vocab_size) for p in params], dtype=np.int64),
            top_p=np.array([p.top_p for p in params], dtype=np.float64),
            min_p=np.array([p.min_p for p in params], dtype=np.float64),
            uniform=np.array([uniform(seq.params.seed, seq.num_generated) for seq in seqs], dtype=np.float64),
        )

    def row(self, i: int) -> DrawParams:
        one = slice(i, i + 1)
        return DrawParams(
            self.temperature[one], self.top_k[one], self.top_p[one], self.min_p[one], self.uniform[one]
        )


@dataclass(frozen=True, slots=True)
class Candidates:
    """The K largest logits of R rows, largest first and equal ones by id."""

    values: Floats  # [R, K]
    ids: Ints  # [R, K]
    num_certain: Ints  # [R]
    """How many leading candidates are surely the row's first. Beyond, a tie may have cut off lower ids."""
    exhausted: NDArray[np.bool_]  # [R]
    """No token with a weight is missing."""


def invert_cdf(cumulative: Floats, total: Floats, uniforms: Floats) -> Ints:
    """The first column whose cumulative weight exceeds `uniforms * total`. [R, K], [R], [R] -> [R]

    `total` is one of the row's cumulative weights, at least 1 (law 3). The column exists and has a weight above
    zero, whatever u is in [0, 1 - 2**-53]: u * total rounds to less than total, and where a sum passes a
    threshold that its predecessor did not, something was added.
    """
    return np.asarray((cumulative <= (uniforms * total)[:, None]).sum(axis=1), dtype=np.int64)


def draw_truncated(
    candidates: Candidates, params: DrawParams, full_mass: Floats
) -> tuple[Ints, NDArray[np.bool_]]:
    """Draws among the tokens that min_p, top_k and top_p leave, each over what the one before it left.

    Every cut leaves a prefix of the descending order: min_p the tokens with at least min_p times the
    likeliest's probability, top_k the first k, top_p the smallest number whose share reaches top_p.

    Args:
        full_mass: [R] the summed weights of the whole row where neither min_p nor top_k is on, NaN elsewhere.

    Returns:
        The drawn ids [R], and whether the candidates sufficed [R]; where they did not, the id means nothing.
    """
    weights = np.exp((candidates.values - candidates.values[:, :1]) / params.temperature[:, None])
    cumulative = weights.cumsum(axis=1)
    kept = np.minimum((weights >= params.min_p[:, None]).sum(axis=1), params.top_k)
    mass_known = ~np.isnan(full_mass) & ~candidates.exhausted
    mass = np.where(mass_known, full_mass, _at(cumulative, kept - 1))
    nucleus = np.minimum((cumulative < (params.top_p * mass)[:, None]).sum(axis=1) + 1, kept)
    column = invert_cdf(cumulative, _at(cumulative, nucleus - 1), params.uniform)
    enough = np.where(mass_known, nucleus, kept) <= candidates.num_certain
    return _at(candidates.ids, column), enough


def smallest_logit_needed(values: Floats, params: DrawParams, full_mass: float, vocab_size: int) -> float:
    """A bound below every logit that a draw can need of one row, whose candidates `values` [K] were too few.

    Under top_k, that is the k-th largest logit itself (K > top_k), ties included; under min_p, its threshold.
    Under top_p alone, with M = full_mass: the tokens that weigh less than (1 - top_p) * M / vocab_size have
    together less than (1 - top_p) * M, so the others reach top_p without them.
    """
    if params.top_k[0] < vocab_size:
        return float(values[params.top_k[0] - 1])
    weight = params.min_p[0] if params.min_p[0] > 0 else (1.0 - params.top_p[0]) * full_mass / vocab_size
    slack = 1e-3  # above any rounding of the sums and of the logits; costs 0.1 % more candidates
    return float(values[0] + params.temperature[0] * (math.log(weight) - slack))


def draw_block(masses: Floats, uniforms: Floats) -> tuple[Ints, Floats]:
    """Draws a column of `masses` [R, B] and returns what is left of each uniform number to draw inside it."""
    cumulative = masses.cumsum(axis=1)
    total = cumulative[:, -1]
    block = invert_cdf(cumulative, total, uniforms)
    mass = _at(masses, block)
    rest = uniforms * total - (_at(cumulative, block) - mass)
    return block, np.clip(rest / mass, 0.0, LARGEST_UNIFORM)


def draw_column(logits: Floats, temperature: Floats, uniforms: Floats) -> Ints:
    """Draws a column of `logits` [R, W] by its weight exp(logit / temperature). [R, W], [R], [R] -> [R]"""
    largest = logits.max(axis=1, keepdims=True)
    cumulative = np.exp((logits - largest) / temperature[:, None]).cumsum(axis=1)
    return invert_cdf(cumulative, cumulative[:, -1], uniforms)


def _at(table: NDArray[_Scalar], column: Ints) -> NDArray[_Scalar]:
    """table[r, column[r]] for each row r."""
    picked: NDArray[_Scalar] = table[np.arange(len(table)), column]
    return picked
