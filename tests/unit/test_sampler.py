from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from server.engine.sampling import draw
from server.engine.sampling.blocks import BlockedLogits
from server.engine.sampling.rng import uniform
from server.engine.sampling.types import SampledToken
from server.engine.sequence import Sequence
from tests.unit.samplers import draw_with, every_sampler, look_at_few, make_sampler, torch_only
from tests.unit.sampling_oracle import adjusted, sequence, survivors, token_at

__all__ = ["every_sampler"]  # a fixture

GEMMA3_VOCAB = 262_144
KINDS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "hot": {"temperature": 2.0},
    "top_k": {"top_k": 64},
    "large top_k": {"top_k": 3000},
    "top_p": {"top_p": 0.9},
    "wide top_p": {"top_p": 0.9999},
    "min_p": {"min_p": 0.05},
    "low min_p": {"min_p": 1e-4},
    "gemma's defaults": {"top_k": 64, "top_p": 0.95},
    "all cuts": {"temperature": 1.3, "min_p": 0.001, "top_k": 500, "top_p": 0.97},
}


def sample(logits: torch.Tensor, seqs: list[Sequence], suppress: tuple[int, ...] = ()) -> list[SampledToken]:
    return make_sampler(logits.shape[1], suppress).sample(logits.clone(), seqs)


def tokens(logits: torch.Tensor, seqs: list[Sequence], suppress: tuple[int, ...] = ()) -> list[int]:
    return [result.token_id for result in sample(logits, seqs, suppress)]


def row(*logits: float) -> torch.Tensor:
    return torch.tensor([logits], dtype=torch.float32)


# --- against the definition ----------------------------------------------------------------------------------

# A coarse grid, so that ties are common.
logit = st.one_of(st.integers(-8, 8).map(lambda n: n / 2), st.just(-math.inf), st.floats(-30, 30, width=32))
vocabularies = st.lists(logit, min_size=1, max_size=40).filter(lambda row: max(row) > -math.inf)
sampling = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.01, 0.5, 1.0, 2.0]),
        "top_k": st.integers(0, 45),
        "top_p": st.one_of(st.sampled_from([1e-6, 0.3, 0.5, 0.7]), st.floats(1e-3, 1.0)),
        "min_p": st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.0, 1.0)),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.7]),
        "presence_penalty": st.sampled_from([-2.0, 0.0, 0.6]),
        "frequency_penalty": st.sampled_from([-0.3, 0.0, 1.1]),
        "logit_bias": st.dictionaries(
            st.integers(0, 39), st.sampled_from([-100.0, -1.5, 3.0, 100.0]), max_size=4
        ),
    },
)


def expected(logits: list[float], seq: Sequence, u_shift: float = 0.0, p_shift: float = 0.0) -> int:
    changed = adjusted(np.array(logits, dtype=np.float32), seq)
    if seq.params.temperature == 0:
        return int(changed.argmax())
    u = min(max(uniform(seq.params.seed, seq.num_generated) + u_shift, 0.0), draw.LARGEST_UNIFORM)
    top_p = seq.params.top_p if seq.params.top_p == 1 else min(seq.params.top_p + p_shift, 1.0)
    return token_at(changed, replace(seq.params, top_p=top_p), u)


@given(
    logits=vocabularies, params=sampling, seed=st.integers(0, 2**64 - 1), generated=st.lists(st.integers(0, 3))
)
def test_a_draw_over_few_tokens_equals_the_definition(logits, params, seed, generated):
    seq = sequence(prompt=(0,), generated=tuple(generated), seed=seed, **params)
    if not math.isfinite(adjusted(np.array(logits, dtype=np.float32), seq).max()):
        return
    [token] = tokens(torch.tensor([logits], dtype=torch.float32), [seq])
    uncut = (
        not params.get("min_p") and params.get("top_p", 1) == 1 and not 0 < params.get("top_k", 0) < len(logits)
    )
    if uncut:  # these weights are summed in float32
        assert token in {expected(logits, seq, u_shift=shift) for shift in (-1e-6, 0.0, 1e-6)}
    else:
        assert token == expected(logits, seq)


@given(logits=vocabularies, params=sampling, seed=st.integers(0, 2**64 - 1))
def test_a_draw_with_too_few_candidates_at_first_equals_the_definition(logits, params, seed):
    """As for a large vocabulary: the first search finds four logits and cuts ties off."""
    params = {name: value for name, value in params.items() if name in ("temperature", "top_p", "min_p")}
    seq = sequence(seed=seed, **params)
    with pytest.MonkeyPatch.context() as patch:
        look_at_few(patch, 4)
        [token] = tokens(torch.tensor([logits], dtype=torch.float32), [seq])
    shifts = itertools.product((-1e-6, 0.0, 1e-6), repeat=2)
    assert token in {expected(logits, seq, u_shift, p_shift) for u_shift, p_shift in shifts}


@functools.cache
def large_rows() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(GEMMA3_VOCAB, generator=generator)
    peaked = normal * 2.0
    peaked[torch.randint(GEMMA3_VOCAB, (40,), generator=generator)] += 15.0
    return {
        "peaked": peaked,
        "flat": normal,
        "in bfloat16": (normal * 3.0).bfloat16().float(),  # thousands of ties
        "all equal": torch.zeros(GEMMA3_VOCAB),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["peaked", "flat", "in bfloat16", "all equal"])
def test_a_draw_over_a_whole_vocabulary_equals_the_definition(kind, shape):
    logits = large_rows()[shape]
    seqs = [sequence(seed=seed, **KINDS[kind]) for seed in range(3)]
    drawn = tokens(logits.repeat(3, 1), seqs)
    if kind == "greedy":
        assert drawn == [int(logits.argmax())] * 3
        return
    ids, weights = survivors(logits.numpy(), seqs[0].params)
    cumulative = weights.cumsum() / weights.sum()
    for seq, token in zip(seqs, drawn, strict=True):
        place = int(np.flatnonzero(ids == token)[0])
        u = uniform(seq.params.seed, 0)
        assert cumulative[place] - weights[place] / weights.sum() - 1e-6 <= u <= cumulative[place] + 1e-6


# --- a row depends on nothing but itself ---------------------------------------------------------------------


def test_a_row_is_bitwise_the_same_alone_and_in_any_batch():
    generator = torch.Generator().manual_seed(5)
    kinds = [
        *KINDS.values(),
        {"repetition_penalty": 1.3, "logprobs": 3},
        {"logit_bias": {7: 5.0}, "logprobs": 0},
    ]
    logits = (torch.randn(len(kinds), GEMMA3_VOCAB, generator=generator) * 4).bfloat16().float()
    seqs = [sequence(prompt=(5, 6), generated=(7,), seed=i, **kind) for i, kind in enumerate(kinds)]
    together = sample(logits, seqs)
    alone = [sample(logits[i : i + 1], [seq])[0] for i, seq in enumerate(seqs)]
    order = torch.randperm(len(seqs), generator=generator).tolist()
    shuffled = sample(logits[order], [seqs[i] for i in order])
    assert alone == together
    assert shuffled == [together[i] for i in order]


def test_a_seeded_draw_depends_on_the_seed_and_the_number_of_generated_tokens_only():
    logits = torch.zeros(1, 4096)
    first = tokens(logits, [sequence(prompt=(1, 2), generated=(9, 9), seed=11)])
    assert tokens(logits, [sequence(prompt=(3,), generated=(4, 8), seed=11)]) == first
    assert tokens(logits, [sequence(prompt=(1, 2), generated=(9,), seed=11)]) != first
    assert tokens(logits, [sequence(prompt=(1, 2), generated=(9, 9), seed=12)]) != first


@pytest.mark.covers("E05")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite_fails_alone(bad, kind):
    logits = torch.randn(3, 4096, generator=torch.Generator().manual_seed(1))
    seqs = [sequence(seed=i, logprobs=2, **KINDS[kind]) for i in range(3)]
    sound = sample(logits, seqs)
    logits[1, 4000] = bad
    results = sample(logits, seqs)
    assert results[1] == SampledToken(-1, error="the model's logits are not finite")
    assert [results[0], results[2]] == [sound[0], sound[2]]


def test_a_row_with_every_token_forbidden_says_so():
    [result] = sample(row(1.0, 2.0), [sequence(stop_token_ids=(0,), min_tokens=1)], suppress=(1,))
    assert result.token_id == -1
    assert "every logit is minus infinity" in (result.error or "")


def test_an_empty_batch_gives_no_tokens():
    assert sample(torch.empty(0, 64), []) == []


# --- greedy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 1e-300}, {"top_k": 1}])
def test_equal_largest_logits_give_the_lowest_id(params):
    logits = torch.zeros(1, 1000)
    logits[0, [333, 334, 640, 999]] = 7.0
    assert {tokens(logits, [sequence(seed=seed, **params)])[0] for seed in range(20)} == {333}


def test_a_greedy_batch_is_neither_summed_nor_searched(monkeypatch):
    torch_only()

    def refuse(*_: object) -> None:
        raise AssertionError("a greedy row was treated as a random one")

    monkeypatch.setattr(BlockedLogits, "masses", refuse)
    monkeypatch.setattr(BlockedLogits, "top", refuse)
    assert tokens(row(1.0, 3.0, 2.0), [sequence(temperature=0.0)]) == [1]


def test_penalties_and_bias_apply_to_greedy_rows():
    logits = row(5.0, 4.0, 3.0)
    assert tokens(logits, [sequence(prompt=(0,), temperature=0.0, repetition_penalty=2.0)]) == [1]
    assert tokens(logits, [sequence(prompt=(2,), generated=(0,), temperature=0.0, presence_penalty=1.5)]) == [1]
    assert tokens(logits, [sequence(temperature=0.0, logit_bias={2: 100.0})]) == [2]


# --- what must never be chosen -------------------------------------------------------------------------------


@pytest.mark.parametrize("u", [0.0, 2.0**-53, 0.5, draw.LARGEST_UNIFORM])
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_without_probability_is_never_drawn(kind, u, monkeypatch):
    draw_with(monkeypatch, u)
    logits = torch.full((1, 4096), -math.inf)
    logits[0, ::2] = -3000.0  # underflows to weight zero
    logits[0, [100, 1000, 3000]] = torch.tensor([1.0, 1.5, 0.5])
    logits[0, [0, 4095]] = 50.0
    [token] = tokens(logits, [sequence(**KINDS[kind])], suppress=(0, 4095))
    assert token in {100, 1000, 3000}


@pytest.mark.parametrize("few", [1, 256])
@pytest.mark.parametrize(("u", "token"), [(0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3), (draw.LARGEST_UNIFORM, 3)])
def test_a_number_on_the_border_of_two_tokens_draws_the_second(u, token, few, monkeypatch):
    draw_with(monkeypatch, u)
    look_at_few(monkeypatch, few)
    logits = torch.zeros(1, 1024)
    logits[0, 4:] = -1.0
    assert tokens(logits, [sequence(top_k=4)]) == tokens(logits, [sequence(min_p=0.5)]) == [token]


def test_suppressed_ids_and_rows_that_pad_the_vocabulary_are_never_chosen():
    logits = torch.zeros(200, 64)
    logits[:, [3, 60, 63]] = 9.0
    seqs = [sequence(seed=i, temperature=i % 3 / 2, logit_bias={3: 100.0}) for i in range(200)]
    results = make_sampler(60, (3, 70)).sample(logits, seqs)
    assert all(result.token_id < 60 and result.token_id != 3 for result in results)
    assert len({result.token_id for result in results}) > 20


def test_stop_tokens_are_forbidden_until_min_tokens_were_generated():
    logits = row(0.0, 9.0, 1.0, 8.0)
    params = {"temperature": 0.0, "stop_token_ids": (1, 3, 1), "min_tokens": 2}
    assert tokens(logits, [sequence(generated=(0,), **params)]) == [2]
    assert tokens(logits, [sequence(generated=(0, 0), **params)]) == [1]


def test_ids_beyond_the_vocabulary_have_no_effect():
    params = {"logit_bias": {64: 100.0, 10**9: 5.0}, "stop_token_ids": (10**9,), "min_tokens": 5}
    logits = torch.randn(1, 64, generator=torch.Generator().manual_seed(2))
    assert tokens(logits, [sequence(**params)]) == tokens(logits, [sequence()])


# --- cuts ----------------------------------------------------------------------------------------------------


def support(logits: torch.Tensor, params: dict[str, object], draws: int = 300) -> set[int]:
    return set(
        tokens(logits.expand(draws, -1).clone(), [sequence(seed=seed, **params) for seed in range(draws)])
    )


def test_top_k_keeps_exactly_k_tokens_and_of_equal_ones_the_lowest_ids():
    logits = torch.zeros(1, 1024)
    logits[0, 500] = 1.0
    assert support(logits, {"top_k": 4}) == {500, 0, 1, 2}
    assert support(logits, {"top_k": 2}) == {500, 0}


@pytest.mark.parametrize("params", [{"top_k": 64}, {"top_k": 40, "top_p": 0.9}, {"top_p": 0.5}, {"min_p": 0.2}])
def test_a_peaked_row_is_searched_once(params, monkeypatch):
    torch_only()

    def refuse(*_: object) -> None:
        raise AssertionError("the first candidates were not enough")

    monkeypatch.setattr(BlockedLogits, "at_least", refuse)
    logits = -torch.arange(4096.0).roll(1000)[None] / 8
    assert tokens(logits, [sequence(seed=1, **params)])[0] in range(1000, 1064)


def test_top_k_of_the_vocabulary_or_more_cuts_nothing():
    logits = row(0.3, 0.2, 0.1, 0.0)
    assert support(logits, {"top_k": 4}) == support(logits, {"top_k": 10**9}) == {0, 1, 2, 3}


def test_top_p_keeps_the_token_that_crosses_the_threshold_and_none_after():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert support(logits, {"top_p": 0.79}) == {0, 1}
    assert support(logits, {"top_p": 0.81}) == {0, 1, 2}
    assert support(logits, {"top_p": 1e-9}) == {0}


def test_top_p_counts_over_what_top_k_left():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert support(logits, {"top_k": 2, "top_p": 0.6}) == {0}  # 0.5 of 0.8 is 0.625
    assert support(logits, {"top_p": 0.6}) == {0, 1}


def test_min_p_is_relative_to_the_likeliest_token_after_temperature():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert support(logits, {"min_p": 0.59}) == {0, 1}
    assert support(logits, {"min_p": 0.61}) == {0}
    assert support(logits, {"min_p": 0.61, "temperature": 2.0}) == {0, 1}  # sqrt(0.6) = 0.77, sqrt(0.3) = 0.55


def test_a_min_p_of_one_keeps_all_that_are_as_likely_as_the_likeliest():
    assert support(row(1.0, 0.5, 1.0, 1.0), {"min_p": 1.0}) == {0, 2, 3}


def test_a_bias_of_100_makes_a_token_certain_and_minus_100_bans_it():
    logits = torch.randn(1, 512, generator=torch.Generator().manual_seed(4)) * 3
    assert support(logits, {"logit_bias": {77: 100.0}}) == {77}
    assert support(row(9.0, 0.0), {"logit_bias": {0: -100.0}}) == {1}


@given(
    weights=st.lists(st.floats(0.0, 1.0), max_size=30),
    largest_at=st.integers(0, 30),
    u=st.one_of(st.sampled_from([0.0, draw.LARGEST_UNIFORM]), st.floats(0, draw.LARGEST_UNIFORM)),
)
def test_inverting_a_distribution_always_finds_a_column_with_a_weight(weights, largest_at, u):
    weights.insert(largest_at, 1.0)
    cumulative = np.array([weights]).cumsum(axis=1)
    [column] = draw.invert_cdf(cumulative, cumulative[:, -1], np.array([u]))
    assert weights[column] > 0
