from __future__ import annotations

import math

import pytest
import torch

from server.engine.sampling.types import LOGPROB_FLOOR
from server.engine.types import PromptTokenLogprob
from tests.unit.samplers import every_sampler, make_sampler
from tests.unit.sampling_oracle import sequence

__all__ = ["every_sampler"]  # a fixture


def gather_logprobs(logits: torch.Tensor, chosen: list[int], num_top: list[int]) -> list[PromptTokenLogprob]:
    return make_sampler(logits.shape[1]).gather_logprobs(logits, chosen, num_top)


def random_logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 4


@pytest.mark.parametrize("vocab", [50, 1000, 262_144])
def test_values_equal_log_softmax_and_the_likeliest_come_first(vocab):
    logits = random_logits(3, vocab)
    before = logits.clone()
    results = gather_logprobs(logits, [7, 0, 49], [20, 0, 5])
    reference = torch.log_softmax(logits.double(), dim=-1)
    assert torch.equal(logits, before)
    assert [result.token_id for result in results] == [7, 0, 49]
    for row, (result, count) in enumerate(zip(results, [20, 0, 5], strict=True)):
        top = reference[row].topk(count)
        assert result.logprob == pytest.approx(reference[row, result.token_id].item(), abs=1e-5)
        assert [token for token, _ in result.top] == top.indices.tolist()
        assert [logprob for _, logprob in result.top] == pytest.approx(top.values.tolist(), abs=1e-5)


def test_all_probabilities_of_a_row_sum_to_one():
    [result] = gather_logprobs(random_logits(1, 300), [0], [300])
    assert math.fsum(math.exp(logprob) for _, logprob in result.top) == pytest.approx(1.0, abs=1e-6)
    assert result.logprob == dict(result.top)[0]


def test_equal_logits_are_listed_by_id_also_across_the_last_place():
    logits = torch.zeros(1, 4096)
    logits[0, 4000] = 1.0
    [result] = gather_logprobs(logits, [0], [5])
    assert [token for token, _ in result.top] == [4000, 0, 1, 2, 3]


def test_more_likeliest_than_tokens_lists_every_token():
    [result] = gather_logprobs(random_logits(1, 6), [0], [20])
    assert sorted(token for token, _ in result.top) == list(range(6))


def test_minus_infinity_becomes_the_floor():
    [result] = gather_logprobs(torch.tensor([[0.0, -math.inf, 0.0]]), [1], [3])
    assert result.logprob == LOGPROB_FLOOR == -9999.0
    assert result.top == [
        (0, pytest.approx(math.log(0.5))),
        (2, pytest.approx(math.log(0.5))),
        (1, LOGPROB_FLOOR),
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_still_gives_finite_numbers(bad):
    logits = random_logits(2, 100)
    logits[0, 3] = bad
    broken, sound = gather_logprobs(logits, [5, 5], [2, 2])
    assert (broken.logprob, broken.top) == (LOGPROB_FLOOR, [])
    assert sound == gather_logprobs(logits[1:], [5], [2])[0]


def test_a_row_gives_bitwise_the_same_numbers_alone_and_among_many():
    logits = random_logits(20, 262_144, seed=1)
    together = gather_logprobs(logits, list(range(20)), [3] * 20)
    assert [gather_logprobs(logits[i : i + 1], [i], [3])[0] for i in range(20)] == together


def test_no_rows_give_no_logprobs():
    assert gather_logprobs(torch.empty(0, 10), [], []) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"logit_bias": {9: 100.0}, "prompt": (3, 9), "repetition_penalty": 2.0},
        {"logit_bias": {5: 1.0}, "generated": (8, 9, 9), "frequency_penalty": -50.0},
    ],
    ids=["biased", "seen"],
)
def test_the_sampler_reports_the_models_own_logprobs_of_the_token_it_chose(changes):
    logits = random_logits(1, 200)
    seq = sequence(temperature=0.5, top_k=5, logprobs=2, **changes)
    [result] = make_sampler(200, (4,)).sample(logits.clone(), [seq])
    assert result.token_id == 9
    [own] = gather_logprobs(logits, [9], [2])
    assert (result.logprob.logprob, result.logprob.top) == (own.logprob, own.top)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.8, 1.0])
def test_asking_for_logprobs_changes_no_token(temperature, top_p):
    logits = random_logits(60, 1000)
    params = {"temperature": temperature, "top_p": top_p, "logit_bias": {3: 5.0}}
    plain, reporting = (
        make_sampler(1000, (2,)).sample(
            logits.clone(), [sequence(seed=seed, **params, **asked) for seed in range(60)]
        )
        for asked in ({}, {"logprobs": 1})
    )
    assert [result.token_id for result in reporting] == [result.token_id for result in plain]


def test_only_sequences_that_ask_get_logprobs():
    seqs = [sequence(), sequence(logprobs=0), sequence(logprobs=3)]
    results = make_sampler(200).sample(random_logits(3, 200), seqs)
    assert [None if r.logprob is None else len(r.logprob.top) for r in results] == [None, 0, 3]


def test_the_likeliest_of_a_greedy_row_is_the_token_itself_even_in_a_tie():
    logits = torch.zeros(1, 4096)
    logits[0, [900, 70, 4000]] = 2.0
    [result] = make_sampler(4096).sample(logits, [sequence(temperature=0.0, logprobs=1)])
    assert result.token_id == 70
    assert result.logprob is not None
    assert result.logprob.top[0] == (70, result.logprob.logprob)


@pytest.mark.parametrize("vocab", [1, 50, 1000, 262_208])
def test_a_rank_is_the_place_in_descending_order_and_then_by_id(vocab):
    logits = (random_logits(8, vocab) * 2).round() / 2  # with many equal ones
    logits[:, 0] = -0.0
    chosen = [0, vocab - 1, vocab // 2, vocab // 3, *logits.argmax(dim=1)[4:].tolist()]
    order = logits.sort(dim=1, descending=True, stable=True).indices
    expected = [order[row].tolist().index(token) + 1 for row, token in enumerate(chosen)]
    assert [found.rank for found in gather_logprobs(logits, chosen, [0] * 8)] == expected


def test_the_rank_of_a_listed_token_is_its_place_in_the_list():
    logits = random_logits(1, 300).round()
    [whole] = gather_logprobs(logits, [0], [300])
    for place, (token, _) in enumerate(whole.top, start=1):
        assert gather_logprobs(logits, [token], [0])[0].rank == place


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_has_no_rank(bad):
    logits = random_logits(2, 100)
    logits[0, 3] = bad
    assert [found.rank == 0 for found in gather_logprobs(logits, [3, 5], [0, 0])] == [True, False]


@pytest.mark.parametrize("num_top", [0, 3])
def test_tokens_named_by_id_are_reported_as_the_model_has_them_likely_or_not(num_top):
    logits = random_logits(2, 500)
    likeliest = int(logits[0].argmax())
    named = (17, likeliest, 400, 17, 10_000)
    # What the request itself changes about them does not show.
    changes = {"logit_bias": {400: 50.0, 17: -50.0}, "repetition_penalty": 1.5, "prompt": (17, 400)}
    seqs = [sequence(logprobs=num_top, logprob_token_ids=named, **changes), sequence(logprobs=1)]
    results = make_sampler(500, (likeliest,)).sample(logits.clone(), seqs)
    reference = torch.log_softmax(logits.double(), dim=-1)
    logprob = results[0].logprob
    assert logprob is not None
    ids = [token for token, _ in logprob.top]
    top = reference[0].topk(num_top).indices.tolist()
    assert ids == top + [token for token in (17, likeliest, 400) if token not in top]
    for token, value in logprob.top:
        assert value == pytest.approx(reference[0, token].item(), abs=1e-5)
    assert results[1].logprob is not None
    assert len(results[1].logprob.top) == 1
