"""The native sampler against the definition, on rows made to be difficult.

What it shares with the torch sampler is tested in test_sampler*.py and test_sampling_*.py.
"""

from __future__ import annotations

import gc
import itertools
import math
import subprocess
import sys
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from numpy.typing import NDArray

from server.engine.sampling import native_sampler
from server.engine.sampling.rng import uniform
from server.engine.sampling.token_counts import TokenCounts
from server.engine.sampling.types import LOGPROB_FLOOR, NOT_FINITE, NOTHING_LEFT, SampledToken
from server.engine.sequence import Sequence
from server.engine.types import TokenLogprob
from tests.unit.samplers import LEVELS, allow, native_sampler_of
from tests.unit.sampling_oracle import adjusted, sequence, survivors

Rows = NDArray[np.float32]

every_level = pytest.mark.parametrize("level", LEVELS)
in_its_own_time = settings(deadline=None)
"""On busy cores the threads wait for each other."""


@pytest.fixture(scope="module", autouse=True)
def built_libraries() -> None:
    for level in LEVELS:
        native_sampler_of(level, 1, 1)


SIZES = st.sampled_from([1, 7, 16, 63, 64, 65, 200, 640, 1000])
"""Vocabularies. Blocks are of 64 logits, vectors of 8 or 16."""

ROWS = {
    "normal": lambda random, size: random.standard_normal(size) * 4,
    "peaked": lambda random, size: random.standard_normal(size) + 20.0 * (random.random(size) < 0.02),
    "near uniform": lambda random, size: random.standard_normal(size) * 1e-4,
    "one ahead of a crowd": lambda random, size: random.random(size) * 1e-7 + 5.0 * (np.arange(size) == 3),
    "tied": lambda random, size: np.round(random.standard_normal(size) * 2),
    "all equal": lambda random, size: np.full(size, random.choice([0.0, -7.5, 1e30])),
    "both zeros": lambda random, size: random.choice([0.0, -0.0], size),
    "mostly minus infinity": lambda random, size: np.where(random.random(size) < 0.9, -np.inf, 1.0),
    "huge": lambda random, size: random.uniform(-3e38, 3e38, size),
    "tiny": lambda random, size: random.standard_normal(size) * 1e-40,
    "of every magnitude": lambda random, size: (
        random.standard_normal(size) * 10.0 ** random.integers(-9, 9, size)
    ),
}
BAD = [math.nan, math.inf, -math.inf]

params = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 1e-4, 0.5, 1.0, 3.0]),
        "top_k": st.sampled_from([0, 1, 2, 9, 70, 500]),
        "top_p": st.sampled_from([1e-6, 0.3, 0.95, 0.9999, 1.0]),
        "min_p": st.sampled_from([0.0, 1e-4, 0.1, 1.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.7]),
        "presence_penalty": st.sampled_from([-2.0, 0.0, 0.6]),
        "frequency_penalty": st.sampled_from([-0.3, 0.0, 1.1]),
        "logit_bias": st.dictionaries(st.integers(0, 70), st.sampled_from([-100.0, 3.0]), max_size=4),
        "min_tokens": st.sampled_from([0, 9]),
        "stop_token_ids": st.just((1, 5)),
        "logprobs": st.sampled_from([0, 3, 100]),
    },
)


@st.composite
def batches(draw, max_rows: int = 3) -> tuple[Rows, list[Sequence]]:
    """Logits of up to three kinds, and their sequences."""
    size = draw(SIZES)
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, seqs = [], []
    for _ in range(draw(st.integers(1, max_rows))):
        row = ROWS[draw(st.sampled_from(sorted(ROWS)))](random, size).astype(np.float32)
        if draw(st.sampled_from([False, False, True])):
            row[random.integers(size)] = draw(st.sampled_from(BAD))
        rows.append(row)
        text = [token for token in random.integers(0, 12, 6).tolist() if token < size] or [0]
        seed = draw(st.integers(0, 2**64 - 1))
        seqs.append(sequence(prompt=tuple(text[:2]), generated=tuple(text[2:]), seed=seed, **draw(params)))
    return np.stack(rows), seqs


def is_right(row: Rows, seq: Sequence, result: SampledToken, suppress: tuple[int, ...]) -> bool:
    """Whether the definition gives this token, but for the rounding of sums in float32."""
    row = row.copy()
    row[[token for token in suppress if token < len(row)]] = -np.inf
    with np.errstate(over="ignore"):
        row = adjusted(row, seq)
    largest = row.max()
    if not np.isfinite(largest):
        return result == SampledToken(-1, error=NOTHING_LEFT if largest == -np.inf else NOT_FINITE)
    if seq.params.temperature == 0 or seq.params.top_k == 1:
        return result.token_id == int(row.argmax())
    u = uniform(seq.params.seed, seq.num_generated)
    for shift in (-1e-6, 0.0, 1e-6) if seq.params.top_p < 1 else (0.0,):
        ids, weights = survivors(row, replace(seq.params, top_p=min(seq.params.top_p * (1 + shift), 1.0)))
        [place] = np.flatnonzero(ids == result.token_id) if result.token_id in ids else [None]
        if place is None or weights[place] == 0:
            continue
        share = weights.cumsum()[place] / weights.sum()
        if share - weights[place] / weights.sum() - 2e-6 <= u <= share + 2e-6:
            return True
    return False


@pytest.mark.covers("E05")
@every_level
@in_its_own_time
@given(batch=batches(), few=st.sampled_from([1, 4, 256]), num_threads=st.integers(1, 3))
def test_difficult_rows_are_sampled_as_the_definition_has_it(level, batch, few, num_threads):
    logits, seqs = batch
    suppress = (2, 5000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_sampler, "_FEW", few)
        ours = native_sampler_of(level, num_threads, logits.shape[1], suppress)
        results = ours.sample(logits.copy(), seqs)
    for row, seq, result in zip(logits, seqs, results, strict=True):
        assert is_right(row, seq, result, suppress)


@pytest.mark.covers("E05")
@in_its_own_time
@given(batch=batches(max_rows=6), columns=st.sampled_from([0, 3, 64]))
def test_results_are_bitwise_the_same_alone_with_any_threads_and_at_every_level(batch, columns):
    logits, seqs = batch
    padding = np.full((len(logits), columns), 50.0, dtype=np.float32)
    logits = np.concatenate((logits, padding), axis=1)  # of the vocabulary
    first, *others = itertools.product(LEVELS, (1, 2, 3))
    vocab_size = logits.shape[1] - columns
    together = native_sampler_of(*first, vocab_size).sample(logits.copy(), seqs)
    for level, num_threads in others:
        ours = native_sampler_of(level, num_threads, vocab_size)
        assert repr(ours.sample(logits.copy(), seqs)) == repr(together)
    alone = [
        native_sampler_of(*first, vocab_size).sample(logits[i : i + 1].copy(), [seq])[0]
        for i, seq in enumerate(seqs)
    ]
    assert repr(alone) == repr(together)


@pytest.mark.parametrize("params", [{"top_p": 0.9999}, {"top_p": 0.95, "temperature": 2.0}, {"top_k": 5000}])
@pytest.mark.parametrize("kind", ["near uniform", "one ahead of a crowd", "all equal", "normal"])
def test_a_whole_vocabulary_without_a_peak_is_sampled_as_the_definition_has_it(kind, params):
    [row] = [ROWS[kind](np.random.default_rng(1), 262_144).astype(np.float32)]
    seqs = [sequence(seed=seed, **params) for seed in range(4)]
    results = native_sampler_of("avx2", 2, len(row)).sample(np.stack([row] * 4), seqs)
    assert all(is_right_quickly(row, seq, result) for seq, result in zip(seqs, results, strict=True))


def is_right_quickly(row: Rows, seq: Sequence, result: SampledToken) -> bool:
    """As is_right, for sequences that change no logits."""
    ids, weights = survivors(row, seq.params)
    cumulative = weights.cumsum() / weights.sum()
    place = int(np.flatnonzero(ids == result.token_id)[0])
    u = uniform(seq.params.seed, seq.num_generated)
    return bool(cumulative[place] - weights[place] / weights.sum() - 1e-6 <= u <= cumulative[place] + 1e-6)


# --- token masks ---------------------------------------------------------------------------------------------


@every_level
@in_its_own_time
@given(
    size=SIZES, data=st.data(), params=st.sampled_from([{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 5}])
)
def test_a_mask_is_as_if_the_other_logits_were_minus_infinity(level, size, data, params):
    logits = np.random.default_rng(size).standard_normal((2, size)).astype(np.float32)
    allowed = sorted(data.draw(st.sets(st.integers(0, size - 1), max_size=40)))
    if data.draw(st.booleans()):
        allowed = sorted(set(range(size)) - set(allowed))
    masked = logits.copy()
    masked[1, sorted(set(range(size)) - set(allowed))] = -np.inf
    seqs = [sequence(seed=seed, generated=(0,), frequency_penalty=0.3, **params) for seed in range(2)]
    ours = native_sampler_of(level, 2, size)
    assert ours.sample(logits, seqs, {1: allow(allowed, size)}) == ours.sample(masked, seqs)
    assert (logits[1] == masked[1]).all()


def test_logprobs_are_those_before_the_mask():
    logits = np.zeros((1, 100), dtype=np.float32)
    logits[0, 7] = 3.0
    ours = native_sampler_of("avx2", 1, 100)
    [expected] = ours.gather_logprobs(logits, [40], [2])
    [result] = ours.sample(logits, [sequence(logprobs=2)], {0: allow([40], 100)})
    assert result == SampledToken(40, TokenLogprob(40, expected.logprob, expected.top))


def test_a_mask_that_allows_nothing_is_a_fault_of_its_row_alone():
    ours = native_sampler_of("avx2", 1, 70)
    logits = np.zeros((2, 70), dtype=np.float32)
    results = ours.sample(logits, [sequence(), sequence()], {1: allow([], 70)})
    assert results[0].error is None
    assert results[1] == SampledToken(-1, error=NOTHING_LEFT)


# --- what is kept for a sequence -----------------------------------------------------------------------------


def test_a_sequence_that_grows_is_penalised_as_one_that_is_new():
    ours = native_sampler_of("avx2", 1, 12)
    random = np.random.default_rng(0)
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2, "logprobs": 2}
    seq = sequence(prompt=(1, 1, 20), **penalties)
    for step in range(30):
        logits = random.standard_normal((1, 12)).astype(np.float32)
        fresh = sequence(prompt=(1, 1, 20), generated=tuple(seq.token_ids[3:]), **penalties)
        before = logits.copy()
        assert ours.sample(logits, [seq]) == ours.sample(before, [fresh])
        assert (logits == before).all()
        seq.token_ids += random.integers(0, 30, step % 3).tolist()


def test_counts_are_the_sequences_own():
    seq = sequence(prompt=(4, 2, 4, 90), generated=(2, 3, 2, 91))
    with_prompt = TokenCounts(seq, 50, with_prompt=True)
    without = TokenCounts(seq, 50, with_prompt=False)
    for counts in (with_prompt, without):
        counts.update(seq)
        counts.update(seq)
    assert dict(zip(with_prompt.ids, with_prompt.counts, strict=True)) == {4: 0, 2: 2, 3: 1}
    assert dict(zip(without.ids, without.counts, strict=True)) == {2: 2, 3: 1}


def test_a_long_context_is_counted_once():
    class Counted(list):
        read = 0

        def __getitem__(self, index):
            found = super().__getitem__(index)
            self.read += len(found)
            return found

    seq = sequence(repetition_penalty=1.5)
    seq.token_ids = Counted([1, *range(8000)])
    ours = native_sampler_of("avx2", 1, 9000)
    for _ in range(5):
        ours.sample(np.zeros((1, 9000), dtype=np.float32), [seq])
        seq.token_ids.append(3)
    assert seq.token_ids.read < 8010


def test_nothing_is_kept_of_a_sequence_that_is_gone():
    ours = native_sampler_of("avx2", 1, 10)
    seq = sequence(frequency_penalty=1.0)
    ours.sample(np.zeros((1, 10), dtype=np.float32), [seq])
    gone = weakref.ref(seq)
    del seq
    gc.collect()
    assert gone() is None


# --- log-probabilities ---------------------------------------------------------------------------------------


@every_level
@in_its_own_time
@given(batch=batches(), num_top=st.sampled_from([0, 1, 5, 70]))
def test_logprobs_of_difficult_rows_are_the_log_softmax(level, batch, num_top):
    logits, _ = batch
    size = logits.shape[1]
    before = logits.copy()
    results = native_sampler_of(level, 2, size).gather_logprobs(
        logits, [size - 1] * len(logits), [num_top] * len(logits)
    )
    assert logits.tobytes() == before.tobytes()
    for row, result in zip(logits.astype(np.float64), results, strict=True):
        if not np.isfinite(row.max()):
            assert (result.logprob, result.top) == (LOGPROB_FLOOR, [])
            continue
        exact = np.maximum(row - row.max() - np.log(np.exp(row - row.max()).sum()), LOGPROB_FLOOR)
        order = np.lexsort((np.arange(size), -row))[:num_top]
        assert result.logprob == pytest.approx(exact[-1], abs=1e-5)
        assert [token for token, _ in result.top] == order.tolist()
        assert [logprob for _, logprob in result.top] == pytest.approx(exact[order].tolist(), abs=1e-5)


# --- the house -----------------------------------------------------------------------------------------------


def test_the_native_sampler_runs_without_torch():
    code = "import server.engine.sampling.native_sampler, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
