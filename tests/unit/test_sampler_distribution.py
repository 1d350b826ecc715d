"""Chi-square tests of the drawn distribution. All seeds are fixed, so a passing test stays passing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.unit.samplers import every_sampler, look_at_few, make_sampler
from tests.unit.sampling_oracle import probabilities, sequence

__all__ = ["every_sampler"]  # a fixture

NUM_DRAWS = 4000
KINDS = {
    "temperature 1": {},
    "temperature 0.5": {"temperature": 0.5},
    "temperature 2": {"temperature": 2.0},
    "top_k": {"top_k": 9},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all cuts": {"temperature": 1.5, "min_p": 0.02, "top_k": 12, "top_p": 0.9},
}


def chi_square_z(counts: np.ndarray, target: np.ndarray) -> float:
    """How many standard deviations the chi-square statistic lies above its mean (Wilson and Hilferty, 1931).

    Tokens expected fewer than five times are counted as one.
    """
    expected = target * counts.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    freedom = max(len(wanted) - 1, 1)
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)


def draw_many(logits: torch.Tensor, params: dict[str, float], one_stream: bool) -> np.ndarray:
    """Counts of each token: the streams' first tokens, or one stream's successive ones."""
    seqs = [
        sequence(generated=(0,) * i, seed=99, **params) if one_stream else sequence(seed=i, **params)
        for i in range(NUM_DRAWS)
    ]
    results = make_sampler(len(logits)).sample(logits.repeat(NUM_DRAWS, 1), seqs)
    return np.bincount([result.token_id for result in results], minlength=len(logits))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("one_stream", [False, True], ids=["many seeds", "one seed"])
def test_draws_follow_the_target_distribution(kind, one_stream):
    logits = torch.randn(192, generator=torch.Generator().manual_seed(8)) * 2
    counts = draw_many(logits, KINDS[kind], one_stream)
    target = probabilities(logits.numpy(), sequence(**KINDS[kind]).params)
    assert counts[target == 0].sum() == 0
    assert chi_square_z(counts, target) < 4


@pytest.mark.parametrize("kind", ["top_p", "min_p"])
def test_draws_that_need_a_second_search_follow_the_target_distribution(kind, monkeypatch):
    look_at_few(monkeypatch, 3)
    logits = torch.randn(192, generator=torch.Generator().manual_seed(9)).bfloat16().float()
    counts = draw_many(logits, KINDS[kind], one_stream=False)
    target = probabilities(logits.numpy(), sequence(**KINDS[kind]).params)
    assert counts[target == 0].sum() == 0
    assert chi_square_z(counts, target) < 4


def test_the_statistic_notices_a_slightly_wrong_distribution():
    logits = torch.randn(192, generator=torch.Generator().manual_seed(8)) * 2
    counts = draw_many(logits, {"temperature": 1.2}, one_stream=False)
    assert chi_square_z(counts, probabilities(logits.numpy(), sequence().params)) > 6
