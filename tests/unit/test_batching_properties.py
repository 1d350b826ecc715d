"""Any mix of arrivals, aborts and steps on pools that are too small gives what each request gives alone.

`engine_simulation` checks every read of the KV cache, the books after every step, and the limits of each batch.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from server.batching import NeverFitsError
from server.engine.kv_cache import hashing
from server.engine.kv_cache.hashing import BlockHash
from server.engine.types import FinishReason, GenerateRequest
from tests.unit.engine_simulation import VOCAB_SIZE, Engine, generate_alone, make_engine, make_request

SHARED_PREFIXES = [[1] * 40, [1] * 11 + [2] * 29, [3, 4] * 20]
"""Prompts begin with a part of one of these, so that they meet and part inside and between blocks."""


class EngineMachine(RuleBasedStateMachine):
    engine: Engine

    def __init__(self) -> None:
        super().__init__()
        self.requests: dict[str, GenerateRequest] = {}
        self.aborted: set[str] = set()
        self.monkeypatch = pytest.MonkeyPatch()

    @initialize(
        windows=st.sampled_from([(None,), (None, 1), (None, 5), (None, 6), (4,)]),
        block_size=st.integers(1, 4),
        spare_blocks=st.integers(0, 6),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(5, 12),
        threshold=st.integers(1, 12),
        caching=st.booleans(),
        digest_bytes=st.sampled_from([0, 1, 32]),
        max_draft_tokens=st.sampled_from([0, 1, 3, 8]),
    )
    def start(
        self,
        windows: tuple[int | None, ...],
        block_size: int,
        spare_blocks: int,
        max_num_seqs: int,
        budget: int,
        threshold: int,
        caching: bool,
        digest_bytes: int,
        max_draft_tokens: int,
    ) -> None:
        digest = hashing._digest
        self.monkeypatch.setattr(hashing, "_digest", lambda data: BlockHash(digest(data)[:digest_bytes]))
        self.engine = make_engine(
            windows=windows,
            num_blocks=[20 // block_size + spare_blocks] * len(windows),
            block_size=block_size,
            enable_prefix_caching=caching,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=50,
            long_prefill_threshold=threshold,
            max_draft_tokens=max_draft_tokens,
        )

    @rule(
        shared=st.sampled_from(SHARED_PREFIXES),
        shared_length=st.integers(0, 20),
        own=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=5),
        max_tokens=st.integers(1, 15),
        stop_token_ids=st.sampled_from([(), (), (0,), (2, 5)]),
        cache_salt=st.sampled_from(["", "", "other"]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        priority=st.sampled_from([0, 0, 0, -1, 3]),
        tenant=st.sampled_from(["", "a", "b"]),
    )
    def add(
        self,
        shared: list[int],
        shared_length: int,
        own: list[int],
        max_tokens: int,
        stop_token_ids: tuple[int, ...],
        cache_salt: str,
        prompt_logprobs: int | None,
        priority: int,
        tenant: str,
    ) -> None:
        request = make_request(
            str(len(self.requests)),
            [*shared[:shared_length], *own] or [0],
            max_tokens,
            cache_salt,
            priority,
            tenant,
            stop_token_ids=stop_token_ids,
            prompt_logprobs=prompt_logprobs,
        )
        fits = len(request.prompt_token_ids) < self.max_sequence_tokens
        if fits:
            self.engine.add(request)
            self.requests[request.request_id] = request
        else:
            with pytest.raises(NeverFitsError):
                self.engine.add(request)

    @rule(number=st.integers(0, 30))
    def abort(self, number: int) -> None:
        if self.engine.scheduler.abort(str(number)) is not None:
            self.aborted.add(str(number))

    @precondition(lambda self: self.engine.scheduler.has_work())
    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()

    @rule(number=st.integers(0, 30))
    def abort_during_the_forward_pass(self, number: int) -> None:
        self.engine.step(during=lambda: self.abort(number))

    @property
    def max_sequence_tokens(self) -> int:
        return min(50, self.engine.kv.max_sequence_tokens())

    def teardown(self) -> None:
        try:
            if hasattr(self, "engine"):
                self.finish()
        finally:
            self.monkeypatch.undo()

    def finish(self) -> None:
        self.engine.run()
        for request_id, request in self.requests.items():
            outputs = self.engine.outputs.get(request_id, [])
            expected, reason = generate_alone(request, self.max_sequence_tokens)
            if request_id in self.aborted:
                assert all(output.finish_reason is None for output in outputs)
                generated = [token_id for output in outputs for token_id in output.token_ids]
                assert generated == expected[: len(generated)]
                continue
            assert self.engine.generated(request_id) == expected
            assert self.engine.finish_reason(request_id) is reason
            if request.params.prompt_logprobs is not None:
                assert len(outputs[0].prompt_logprobs or []) == len(request.prompt_token_ids)


@pytest.mark.covers("K01", "K04", "K11", "K12", "K17")
class TestEngine(EngineMachine.TestCase):  # type: ignore[misc]
    settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@pytest.mark.covers("E14", "K01", "K03", "K08", "K11", "K12")
@pytest.mark.parametrize("windows", [(None,), (None, 6), (6,)])
@pytest.mark.parametrize("digest_bytes", [0, 32])
@pytest.mark.parametrize("max_draft_tokens", [0, 5])
def test_a_crowd_with_shared_prefixes_and_disconnects_on_a_small_pool(
    windows: tuple[int | None, ...], digest_bytes: int, max_draft_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashing._digest
    monkeypatch.setattr(hashing, "_digest", lambda data: BlockHash(digest(data)[:digest_bytes]))
    engine = make_engine(
        windows,
        [14] * len(windows),
        max_num_seqs=6,
        max_num_batched_tokens=12,
        max_draft_tokens=max_draft_tokens,
    )
    chance = random.Random(7)
    requests, aborted = {}, set()
    for number in range(300):
        shared = SHARED_PREFIXES[number % 3][: chance.randrange(1, 30)]
        prompt = shared + [chance.randrange(VOCAB_SIZE) for _ in range(chance.randrange(4))]
        requests[str(number)] = request = make_request(
            str(number), prompt, chance.randrange(1, 20), priority=number % 7 // 6
        )
        engine.add(request)
        for _ in range(chance.randrange(5)):
            engine.step()
        if chance.random() < 0.1:
            victim = str(chance.randrange(number + 1))
            aborted |= {victim} if engine.scheduler.abort(victim) else set()
    engine.run()
    for request_id, request in requests.items():
        if request_id not in aborted:
            assert engine.generated(request_id) == generate_alone(request, 56)[0]
            assert engine.finish_reason(request_id) is FinishReason.LENGTH
    assert len(aborted) > 5
    assert engine.num_preemptions > 5
    assert engine.num_cached_tokens > 500 or digest_bytes == 0
    assert engine.num_accepted_tokens > 50 or max_draft_tokens == 0
