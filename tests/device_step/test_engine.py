"""The whole engine, a step ahead of a device that computes late, gives what the synchronous one gives."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from server.batching import Scheduler, SchedulerConfig
from server.engine.core import EngineCore
from server.engine.device_step.assemble import StepMaker
from server.engine.grammar.compiler import GrammarCompiler
from server.engine.kv_cache.manager import KVCacheManager
from server.engine.kv_cache.tensors import KVTensors
from server.engine.memory import PoolLimits
from server.engine.model_runner import ModelRunner
from server.engine.pacing import PrefillPacer
from server.engine.speculation import NgramSpeculator
from server.engine.types import FinishReason, GenerateRequest, SequenceOutput, TokenLogprob
from tests.device_step.driver import static_model
from tests.device_step.static_backend import StaticBackend
from tests.device_step.thread_queue import ThreadQueue
from tests.parity.harness import VOCAB, Engine, our_model, prompt, request

PARAMS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.2, "top_k": 7, "min_p": 0.02},
    {"stop_token_ids": frozenset(range(0, VOCAB, 9))},
    {"temperature": 1.0, "stop_token_ids": frozenset(range(0, VOCAB, 9)), "min_tokens": 6},
    {"logprobs": 2, "temperature": 0.9},
    {"frequency_penalty": 0.9},
]


@pytest.fixture
def queue() -> Iterator[ThreadQueue]:
    one = ThreadQueue()
    yield one
    one.close()


@dataclass
class Ahead:
    """The engine as the server builds it for a device."""

    name: str
    queue: ThreadQueue
    num_blocks: int = 1000
    max_num_seqs: int = 9
    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    logprobs: dict[str, list[TokenLogprob]] = field(default_factory=lambda: defaultdict(list))
    ends: dict[str, FinishReason] = field(default_factory=dict)
    num_preemptions: int = 0

    def __post_init__(self) -> None:
        model = static_model(self.name, self.queue)
        limits = PoolLimits(4, 128, self.max_num_seqs, 32)
        groups = model.config.kv_groups()
        counts = [self.num_blocks] * len(groups)
        kv = KVTensors(model.backend, groups, counts, limits.block_size)
        assert isinstance(model.backend, StaticBackend)
        step = StepMaker(model.backend, (), limits).make(model, kv)
        sampler = model.backend.sampler(model.config.vocab_size, ())
        runner = ModelRunner(model, kv, sampler, limits.max_num_batched_tokens, step)
        self.manager = KVCacheManager(groups, counts, limits.block_size, True, limits.max_num_batched_tokens)
        config = SchedulerConfig(self.max_num_seqs, limits.max_num_batched_tokens, limits.max_model_len, 16)
        self.scheduler = Scheduler(config, self.manager, NgramSpeculator(0), lambda: 0.0)
        pacer = PrefillPacer(100.0, limits.max_num_batched_tokens)
        self.core = EngineCore(self.scheduler, pacer, runner, GrammarCompiler(), runs_ahead=True)

    def step(self) -> None:
        output = self.core.step()
        for one in output.outputs:
            self._take(one)
        self.num_preemptions += output.stats.num_preemptions
        self.manager.check(self.scheduler.sequences)

    def _take(self, output: SequenceOutput) -> None:
        assert output.error is None
        assert output.request_id not in self.ends
        self.tokens[output.request_id] += output.token_ids
        self.logprobs[output.request_id] += output.logprobs or []
        if output.finish_reason is not None:
            self.ends[output.request_id] = output.finish_reason


def requests(count: int, seed: int, params: list[dict[str, Any]]) -> list[GenerateRequest]:
    rng = random.Random(seed)
    return [
        request(
            prompt(rng.randint(1, 40), seed=seed + index),
            request_id=f"r{index}",
            **{"max_tokens": rng.randint(1, 24), "seed": index} | params[index % len(params)],
        )
        for index in range(count)
    ]


def check(ahead: Ahead, wanted: list[GenerateRequest]) -> None:
    for one in wanted:
        engine = Engine(our_model(ahead.name))
        expected, tokens = engine.generate([one])[0], ahead.tokens[one.request_id]
        if ahead.ends[one.request_id] is FinishReason.ABORT:
            assert tokens == expected[: len(tokens)]
            continue
        assert tokens == expected
        assert ahead.ends[one.request_id] == engine.finish_reasons[one.request_id]
        reported, expected_logprobs = ahead.logprobs[one.request_id], engine.logprobs[one.request_id]
        assert [each.logprob for each in reported] == pytest.approx(
            [each.logprob for each in expected_logprobs], abs=1e-4
        )


@pytest.mark.parametrize("name", ["gemma1", "gemma2", pytest.param("gemma3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("params", [PARAMS[:6], PARAMS], ids=["plain", "with steps that need the host"])
def test_requests_that_come_and_go_get_the_tokens_of_the_synchronous_engine(
    queue: ThreadQueue, name: str, params: list[dict[str, Any]]
) -> None:
    ahead = Ahead(name, queue)
    wanted = requests(16, seed=len(params), params=params)
    rng = random.Random(1)
    waiting = list(wanted)
    while waiting or ahead.core.has_work():
        while waiting and rng.random() < 0.5:
            ahead.core.add(waiting.pop(0))
        if rng.random() < 0.03 and (living := [seq.request_id for seq in ahead.scheduler.sequences]):
            ahead.core.abort([rng.choice(living)])
        ahead.step()
    check(ahead, wanted)
    assert queue.num_replays > queue.num_recordings > 3


def test_preempted_sequences_get_the_same_tokens(queue: ThreadQueue) -> None:
    ahead = Ahead("gemma3", queue, num_blocks=30)
    wanted = requests(10, seed=7, params=PARAMS[:4])
    for one in wanted:
        ahead.core.add(one)
    while ahead.core.has_work():
        ahead.step()
    check(ahead, wanted)
    assert ahead.num_preemptions > 0
