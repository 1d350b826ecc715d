"""Greedy continuations through the real scheduler, KV manager, runner and sampler, against transformers.

`assert_greedy` puts the whole continuation through transformers once, without a cache: each of the tokens must
be its first choice at that place.
"""

from __future__ import annotations

import pytest

from server.engine.batch import ScheduledBatch
from tests.parity.harness import CONFIGS, WINDOW, Engine, assert_greedy, our_model, prompt, request

PROMPTS = [prompt(length, seed=length) for length in (3 * WINDOW + 2, 1, WINDOW, 17, 4 * WINDOW + 1)]
REQUESTS = [request(token_ids, request_id=f"r{index}") for index, token_ids in enumerate(PROMPTS)]
CHUNKS = [1, 2, 3, 5, 7, 16, 64]


def assert_all_greedy(name: str, generated: list[list[int]]) -> None:
    for token_ids, tokens in zip(PROMPTS, generated, strict=True):
        assert len(tokens) == 64
        assert_greedy(name, token_ids, tokens)


@pytest.mark.parametrize("name", CONFIGS)
def test_sequences_that_arrive_together_are_continued_as_by_transformers(name: str) -> None:
    assert_all_greedy(name, Engine(our_model(name), chunk=7).generate(REQUESTS))


@pytest.mark.covers("K07")
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3"])
def test_sequences_that_arrive_in_turn_are_continued_as_by_transformers_for_every_chunk_size(
    name: str, chunk: int
) -> None:
    """Prompts of some are computed in the same steps as the tokens of others."""
    assert_all_greedy(name, Engine(our_model(name), chunk=chunk).generate(REQUESTS, arrive_every=3))


@pytest.mark.covers("K01")
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3"])
def test_preempted_sequences_are_continued_as_by_transformers(name: str, block_size: int) -> None:
    longest = max(map(len, PROMPTS)) + 64
    engine = Engine(our_model(name), block_size=block_size, num_blocks=-(-longest // block_size) + 1, chunk=16)
    assert_all_greedy(name, engine.generate(REQUESTS))
    assert engine.num_preemptions > 0
    assert set(engine.scheduler.kv_usage().values()) == {0.0}


@pytest.mark.covers("K08", "K10")
@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3", "gemma3-all-sliding"])
def test_cached_prefixes_change_nothing(name: str) -> None:
    engine = Engine(our_model(name), prefix_caching=True)
    first = engine.generate(REQUESTS)
    again = engine.generate(REQUESTS)
    assert_all_greedy(name, first)
    assert again == first
    expected = [(len(token_ids) - 1) // 4 * 4 for token_ids in PROMPTS]
    assert [engine.num_cached_tokens[one.request_id] for one in REQUESTS] == expected


@pytest.mark.covers("K08", "K10")
def test_a_prefix_that_two_running_sequences_share_changes_nothing() -> None:
    common = prompt(2 * WINDOW, seed=5)
    prompts = [[*common, 1, 2, 3], [*common, 4], [*common, 1, 2]]
    engine = Engine(our_model("gemma3"), prefix_caching=True)
    generated = engine.generate(
        [request(token_ids, request_id=f"r{index}") for index, token_ids in enumerate(prompts)], arrive_every=4
    )
    for token_ids, tokens in zip(prompts, generated, strict=True):
        assert_greedy("gemma3", token_ids, tokens)
    assert engine.num_cached_tokens == {"r0": 0, "r1": 2 * WINDOW, "r2": 2 * WINDOW}


def test_steps_mix_chunks_and_decodes() -> None:
    """Or the tests above would show less than they say."""
    engine = Engine(our_model("gemma2"), chunk=3)
    kinds = set()
    execute = engine.runner.execute

    def spy(batch: ScheduledBatch) -> object:
        kinds.add(frozenset(scheduled.num_new > 1 for scheduled in batch.sequences))
        return execute(batch)

    engine.runner.execute = spy
    engine.generate(REQUESTS, arrive_every=3)
    assert kinds == {frozenset({True}), frozenset({False}), frozenset({True, False})}
