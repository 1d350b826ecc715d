"""An engine that launches each step while the one before it is computed gives what one does that waits.

`device_simulation` has the device, which checks what it is handed and what it reads.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from server.engine.batch import ScheduledBatch
from server.engine.core import EngineCore
from server.engine.faults import MAX_FAILED_STEPS
from server.engine.kv_cache.manager import sliding_pool_blocks
from server.engine.pacing import PrefillPacer
from server.engine.types import FinishReason, GenerateRequest, SequenceOutput, StepStats
from server.frontend.mailbox import merge
from server.grammar_library import Matcher
from tests.unit.device_simulation import Fault, SimulatedDevice, ThreadedDevice
from tests.unit.engine_simulation import VOCAB_SIZE, Engine, groups_of, make_engine, make_request
from tests.unit.grammars import EOS, LANGUAGES, make_vocabulary

GRAMMARS = ("regex", "open")
SHARED_PREFIXES = [[1] * 40, [1] * 11 + [2] * 29, [3, 4] * 20]


@functools.cache
def compiled_grammar(name: str) -> Matcher:
    return make_vocabulary().compile(LANGUAGES[name].grammar)


class Compiled:
    """In place of the compiler: knows the grammars by their names, at once."""

    has_news = False

    def compiled(self, name: str) -> Matcher:
        return compiled_grammar(name)


class Stage:
    """An engine on the simulated device, and what came out of it."""

    def __init__(
        self,
        device: type[SimulatedDevice] | Callable[..., SimulatedDevice] = SimulatedDevice,
        *,
        runs_ahead: bool = True,
        windows: tuple[int | None, ...] = (None,),
        num_blocks: int | list[int] = 200,
        block_size: int = 4,
        **options: Any,
    ) -> None:
        options = {"max_num_batched_tokens": 64, "long_prefill_threshold": 64} | options
        sizes = num_blocks if isinstance(num_blocks, list) else [num_blocks] * len(windows)
        self.engine: Engine = make_engine(windows, sizes, block_size, **options)
        self.kv = self.engine.kv
        self.device = device(groups_of(*windows), sizes, block_size)
        self.device.tracks_writers = options.get("max_draft_tokens", 0) == 0
        self.core = EngineCore(
            self.engine.scheduler,
            PrefillPacer(100.0, 64),
            self.device,
            Compiled(),  # type: ignore[arg-type]  # a stand-in
            runs_ahead=runs_ahead,
        )
        self.outputs: dict[str, SequenceOutput] = {}
        self.stats: list[StepStats] = []
        self.pieces: dict[str, list[str]] = {}
        """Stop strings, as pairs of tokens, that the front looks for."""

    def step(self) -> list[SequenceOutput]:
        step = self.core.step()
        assert not self.device.broken, self.device.broken
        for output in step.outputs:
            earlier = self.outputs.get(output.request_id)
            assert earlier is None or earlier.finish_reason is None, "something came behind the end"
            self.outputs[output.request_id] = output if earlier is None else merge(earlier, output)
        self.stats.append(step.stats)
        self.kv.check(self.engine.scheduler.sequences)
        return step.outputs

    def run(self) -> None:
        while self.core.has_work():
            self.step()
        assert set(self.kv.usage().values()) == {0.0}, "blocks leaked"
        assert not self.engine.speculator.known, "sequences that have ended are remembered"
        self.device.check_published(self.kv)

    def generated(self, request_id: str) -> list[int]:
        return self.outputs[request_id].token_ids

    def is_right(self, request: GenerateRequest) -> bool:
        return told(self.outputs[request.request_id]) == told(alone(request))


def told(output: SequenceOutput) -> tuple[object, ...]:
    return (
        output.token_ids,
        output.finish_reason,
        output.stop_token_id,
        output.logprobs,
        output.prompt_logprobs,
    )


def alone(request: GenerateRequest, max_sequence_tokens: int = 1000) -> SequenceOutput:
    """What a request yields in an engine that waits for each step, and does nothing else."""
    return _alone(msgspec.json.encode(msgspec.structs.replace(request, request_id="")), max_sequence_tokens)


@functools.lru_cache(maxsize=2000)
def _alone(request: bytes, max_sequence_tokens: int) -> SequenceOutput:
    stage = Stage(runs_ahead=False, max_model_len=max_sequence_tokens)
    stage.core.add(msgspec.json.decode(request, type=GenerateRequest))
    stage.run()
    return stage.outputs[""]


def test_a_step_is_launched_before_the_one_in_front_of_it_is_waited_for() -> None:
    stage = Stage()
    requests = [make_request(str(number), [number, 1, 2], 12) for number in range(4)]
    for request in requests:
        stage.core.add(request)
    stage.run()
    assert all(stage.is_right(request) for request in requests)
    # Twelve steps; the one behind the last has nothing to compute, since max_tokens is known in advance.
    assert stage.device.num_launched_ahead == 11
    assert [stats.num_decode_tokens for stats in stage.stats] == [0, 0] + [4] * 11


def test_on_a_host_that_is_the_device_nothing_runs_ahead() -> None:
    stage = Stage(runs_ahead=False)
    stage.core.add(make_request("a", [1, 2, 3], 12))
    stage.run()
    assert stage.device.num_launched_ahead == 0
    assert len(stage.stats) == 12


class Machine(RuleBasedStateMachine):
    stage: Stage
    max_model_len = 50

    def __init__(self) -> None:
        super().__init__()
        self.requests: dict[str, GenerateRequest] = {}
        self.aborted: set[str] = set()
        self.stops: dict[str, tuple[int, int]] = {}
        """Two tokens by request id at which the front aborts it."""

    @initialize(
        windows=st.sampled_from([(None,), (None, 5), (None, 6), (6,)]),
        block_size=st.integers(1, 4),
        spare_blocks=st.integers(0, 10),
        max_num_seqs=st.integers(1, 6),
        budget=st.integers(6, 16),
        threshold=st.integers(1, 12),
        caching=st.booleans(),
        max_draft_tokens=st.sampled_from([0, 0, 0, 2]),
        chance=st.randoms(use_true_random=False),
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
        max_draft_tokens: int,
        chance: random.Random,
    ) -> None:
        self.stage = Stage(
            windows=windows,
            num_blocks=20 // block_size + spare_blocks,
            block_size=block_size,
            enable_prefix_caching=caching,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=self.max_model_len,
            long_prefill_threshold=threshold,
            max_draft_tokens=max_draft_tokens,
        )
        self.stage.device.is_eager = lambda: chance.random() < 0.5
        self.max_sequence_tokens = min(self.max_model_len, self.stage.kv.max_sequence_tokens())

    @rule(
        shared=st.sampled_from(SHARED_PREFIXES),
        shared_length=st.integers(0, 12),
        own=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=5),
        max_tokens=st.integers(1, 15),
        stop_token_ids=st.sampled_from([(), (0,), (2, 5)]),
        priority=st.sampled_from([0, 0, 0, -1, 3]),
        params=st.sampled_from(
            [{}] * 12
            + [
                {"presence_penalty": 1.0},
                {"bad_words": ((3,), (1, 2))},
                {"min_tokens": 4},
                {"logprobs": 0},
                {"prompt_logprobs": 0},
                {"grammar": "regex", "stop_token_ids": (EOS,)},
                {"grammar": "open"},
            ]
        ),
        stop_string=st.sampled_from([None, None, (1, 2), (3, 3), (0, 6)]),
    )
    def add(
        self,
        shared: list[int],
        shared_length: int,
        own: list[int],
        max_tokens: int,
        stop_token_ids: tuple[int, ...],
        priority: int,
        params: dict[str, Any],
        stop_string: tuple[int, int] | None,
    ) -> None:
        prompt = [*shared[:shared_length], *own] or [0]
        if len(prompt) < self.max_sequence_tokens:
            request_id = str(len(self.requests))
            self.requests[request_id] = make_request(
                request_id, prompt, max_tokens, "", priority, **({"stop_token_ids": stop_token_ids} | params)
            )
            self.stage.core.add(self.requests[request_id])
            if stop_string is not None:
                self.stops[request_id] = stop_string

    @rule(number=st.integers(0, 30))
    def abort(self, number: int) -> None:
        if str(number) in self.stage.engine.scheduler._sequences:
            self.aborted.add(str(number))
        self.stage.core.abort([str(number)])

    @precondition(lambda self: self.stage.core.has_work())
    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.stage.step()
            self.stage.device.check_published(self.stage.kv)
            self.look_for_stop_strings()

    def look_for_stop_strings(self) -> None:
        for request_id, stop in self.stops.items():
            output = self.stage.outputs.get(request_id)
            if output is None or output.finish_reason is not None:
                continue
            if any(pair == stop for pair in zip(output.token_ids, output.token_ids[1:], strict=False)):
                self.aborted.add(request_id)
                self.stage.core.abort([request_id])

    def teardown(self) -> None:
        if not hasattr(self, "stage"):
            return
        while self.stage.core.has_work():
            self.step(1)
        self.stage.run()
        assert self.stage.outputs.keys() == self.requests.keys()
        for request_id, request in self.requests.items():
            output, expected = self.stage.outputs[request_id], alone(request, self.max_sequence_tokens)
            if request_id in self.aborted:
                assert output.finish_reason is FinishReason.ABORT
                assert output.token_ids == expected.token_ids[: len(output.token_ids)]
            else:
                assert told(output) == told(expected)


@pytest.mark.covers("K01", "K04", "K17")
class TestRunningAhead(Machine.TestCase):  # type: ignore[misc]
    settings = settings(
        max_examples=100, stateful_step_count=30, deadline=None, phases=[Phase.generate], print_blob=False
    )


PARAMS: list[dict[str, Any]] = [
    {"presence_penalty": 1.0},
    {"bad_words": ((3,), (1, 2))},
    {"min_tokens": 4, "stop_token_ids": (0, 3)},
    {"logprobs": 0},
    {"prompt_logprobs": 0},
    {"grammar": "regex", "stop_token_ids": (EOS,)},
]


@pytest.mark.covers("E14", "K01", "K03", "K08", "K17")
@pytest.mark.parametrize("is_threaded", [False, True], ids=["late", "threaded"])
@pytest.mark.parametrize(("windows", "caching"), [((None,), True), ((None, 6), True), ((None, 6), False)])
def test_a_crowd_on_a_small_pool_gets_what_each_gets_alone(
    windows: tuple[int | None, ...], caching: bool, is_threaded: bool
) -> None:
    chance = random.Random(5)
    delays = random.Random(6)
    device = functools.partial(ThreadedDevice, delay=lambda: delays.random() * 2e-3)
    stage = Stage(
        device if is_threaded else SimulatedDevice,
        windows=windows,
        num_blocks=16,
        enable_prefix_caching=caching,
        max_num_seqs=6,
        max_num_batched_tokens=12,
        long_prefill_threshold=6,
    )
    requests, aborted = {}, set()
    for number in range(60 if is_threaded else 250):
        prompt = [*SHARED_PREFIXES[number % 3][: chance.randrange(1, 24)], chance.randrange(VOCAB_SIZE)]
        params = chance.choice(PARAMS) if number % 50 > 40 else chance.choice([{}, {"stop_token_ids": (2, 5)}])
        requests[str(number)] = request = make_request(
            str(number), prompt, chance.randrange(1, 20), priority=number % 7 // 6, **params
        )
        stage.core.add(request)
        for _ in range(chance.randrange(6)):
            stage.step()
        if chance.random() < 0.1:
            victim = str(chance.randrange(max(0, number - 6), number + 1))
            aborted |= {victim} & stage.engine.scheduler._sequences.keys()
            stage.core.abort([victim])
    stage.run()
    assert all(stage.is_right(requests[key]) for key in requests.keys() - aborted)
    for key in aborted:
        assert stage.generated(key) == alone(requests[key]).token_ids[: len(stage.generated(key))]
    assert len(aborted) > 1
    num_steps = sum(stats.step_seconds > 0 for stats in stage.stats)
    assert num_steps / 3 < stage.device.num_launched_ahead < num_steps
    assert sum(stats.num_preemptions for stats in stage.stats) > 2
    assert sum(stats.prefix_cache_hits for stats in stage.stats) > 40 or not caching
    # What was computed of the ended is not counted. (With a preemption it is, once more.)
    num_generated = sum(len(output.token_ids) for output in stage.outputs.values())
    assert sum(stats.num_decode_tokens for stats in stage.stats) <= num_generated + 20 * len(requests)


@pytest.mark.covers("K17")
def test_what_is_computed_behind_the_end_is_neither_told_nor_counted_nor_cached() -> None:
    request = make_request("a", [1, 2, 3], 30)
    stop = alone(request).token_ids[5]
    request = make_request("a", [1, 2, 3], 30, stop_token_ids=(stop,))
    num_tokens = len(alone(request).token_ids)
    assert num_tokens < 30
    stage = Stage(block_size=1)
    stage.core.add(request)
    stage.run()
    assert stage.is_right(request)
    assert stage.device.num_launched_ahead == num_tokens, "one behind the end"
    assert sum(stats.num_decode_tokens for stats in stage.stats) == num_tokens - 1
    [pool] = stage.kv.snapshot().values()
    assert pool.num_published == 3 + num_tokens - 1, "all that was computed up to the stop token, which was not"


@pytest.mark.covers("K17")
def test_an_abort_between_launch_and_wait_frees_the_blocks_for_the_next_step() -> None:
    stage = Stage(num_blocks=6, max_num_seqs=1)
    first, second = make_request("first", [1] * 16, 6), make_request("second", [2] * 16, 6)
    stage.core.add(first)
    stage.step()
    stage.core.abort(["first"])
    stage.core.add(second)
    # Its blocks are the second's at once, while the first's step has not begun: it comes before, all the same.
    assert [output.finish_reason for output in stage.step()] == [FinishReason.ABORT]
    assert stage.device.num_launched_ahead == 1
    stage.run()
    assert stage.is_right(second)
    assert stage.generated("first") == []


@pytest.mark.covers("K03")
def test_nobody_is_preempted_for_a_step_before_the_one_in_flight_is_known() -> None:
    # When both need a third block, the stop token that makes the room is in flight.
    plain = make_request("a", [1] * 6, 9)
    stop = alone(plain).token_ids[2]
    assert stop not in alone(plain).token_ids[:2]
    stage = Stage(num_blocks=5, enable_prefix_caching=False, max_num_seqs=2)
    requests = [make_request("a", [1] * 6, 9, stop_token_ids=(stop,)), make_request("b", [2] * 6, 9)]
    for request in requests:
        stage.core.add(request)
    stage.run()
    assert all(stage.is_right(request) for request in requests)
    assert sum(stats.num_preemptions for stats in stage.stats) == 0


@pytest.mark.parametrize(("count", "drafts"), [(2, True), (8, False)])
def test_a_step_with_room_for_drafts_waits_for_the_tokens_to_guess_from(
    count: int, drafts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(max_draft_tokens=3)
    propose = stage.engine.speculator.propose
    monkeypatch.setattr(
        stage.engine.speculator,
        "propose",
        lambda seq, limit: propose(seq, limit if seq.num_generated % 3 == 2 else 0),
    )
    requests = [make_request(str(number), [number], 9) for number in range(count)]
    for request in requests:
        stage.core.add(request)
    stage.run()
    assert all(stage.is_right(request) for request in requests)
    assert (sum(stats.num_drafts for stats in stage.stats) > 0) is drafts
    assert (stage.device.num_launched_ahead == 0) is drafts


@pytest.mark.covers("K11")
def test_a_sliding_pool_of_the_size_for_two_steps_never_holds_the_engine_back() -> None:
    size = sliding_pool_blocks(6, 4, 4, 16, max_model_len=1000, steps_in_flight=2)
    stage = Stage(
        windows=(None, 6),
        num_blocks=[300, size],
        enable_prefix_caching=False,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        long_prefill_threshold=8,
    )
    requests = [make_request(str(number), [number % 7] * (50 + number), 40) for number in range(12)]
    for request in requests:
        stage.core.add(request)
    num_steps = 0
    while stage.core.has_work():
        stage.step()
        num_steps += stage.stats[-1].step_seconds > 0
    assert all(stage.is_right(request) for request in requests)
    assert stage.device.num_launched_ahead == num_steps - 1


# --- steps that fail ---------------------------------------------------------------------------------------


def fault_at(moment: int, error: Exception) -> Fault:
    """One at the moment-th step."""
    moments = iter(range(1000))
    return lambda batch: error if next(moments) == moment else None


def ended_with_error(stage: Stage) -> set[str]:
    return {key for key, output in stage.outputs.items() if output.finish_reason is FinishReason.ERROR}


@pytest.mark.covers("E04")
@pytest.mark.parametrize("where", ["fault_in_launch", "fault_in_step"])
@pytest.mark.parametrize("moment", [0, 3, 4])
def test_a_step_that_fails_costs_its_sequences_and_the_one_behind_it_is_computed_again(
    where: str, moment: int
) -> None:
    stage = Stage(max_num_seqs=6)
    setattr(stage.device, where, fault_at(moment, ZeroDivisionError("a bug")))
    old = [make_request(f"old {number}", [number, 1, 2, 3, 4], 12) for number in range(3)]
    new = [make_request(f"new {number}", [number, 1, 2, 3, 4], 12) for number in range(3)]
    for request in old:
        stage.core.add(request)
    for _ in range(moment):
        stage.step()
    stage.step()  # the one that will fail is in flight
    for request in new:
        stage.core.add(request)
    stage.run()
    assert ended_with_error(stage) == {request.request_id for request in old}
    assert all(stage.is_right(request) for request in new)
    for request in old:
        told_of = stage.generated(request.request_id)
        assert told_of == alone(request).token_ids[: len(told_of)]
        assert len(told_of) == moment


@pytest.mark.covers("E06")
@pytest.mark.parametrize("where", ["fault_in_launch", "fault_in_step"])
@pytest.mark.parametrize("fits", [1, 3, 8])
def test_a_step_that_runs_out_of_memory_is_computed_again_behind_all_others(where: str, fits: int) -> None:
    stage = Stage(max_num_seqs=8)
    chance = random.Random(fits)

    def fault(batch: ScheduledBatch) -> Exception | None:
        is_short = len(batch.sequences) > fits or (stage.device.has_one_in_flight and chance.random() < 0.3)
        return MemoryError() if is_short else None

    setattr(stage.device, where, fault)
    stop = alone(make_request("", [0, 0], 30)).token_ids[4]
    requests = [make_request(str(n), [n % 7, n], 20, stop_token_ids=(stop,)) for n in range(30)]
    aborted = set()
    for request in requests:
        stage.core.add(request)
        stage.step()
        if chance.random() < 0.2 and request.request_id in stage.engine.scheduler._sequences:
            aborted.add(request.request_id)
            stage.core.abort([request.request_id])
    stage.run()
    assert not ended_with_error(stage)
    assert all(stage.is_right(request) for request in requests if request.request_id not in aborted)
    assert stage.device.num_launched_ahead > 10 or fits < 8


@pytest.mark.covers("E04", "E06")
@pytest.mark.parametrize("seed", range(6))
def test_random_failures_cost_those_that_they_meet_and_nobody_else(seed: int) -> None:
    chance = random.Random(seed)
    stage = Stage(num_blocks=16, max_num_seqs=5, max_num_batched_tokens=12, long_prefill_threshold=6)
    stage.device.is_eager = lambda: chance.random() < 0.5
    num_good, met = 0, set()

    def fault(batch: ScheduledBatch) -> Exception | None:
        nonlocal num_good
        num_good += 1
        if num_good < 8 or chance.random() < 0.7:
            return None
        num_good = 0
        met.update(one.seq.request_id for one in batch.sequences)
        return chance.choice([MemoryError(), ZeroDivisionError("a bug"), AssertionError("another")])

    stage.device.fault_in_launch = stage.device.fault_in_step = fault
    requests, aborted = {}, set()
    for number in range(120):
        prompt = [*SHARED_PREFIXES[number % 3][: chance.randrange(1, 24)], chance.randrange(VOCAB_SIZE)]
        params = chance.choice(PARAMS) if number % 50 > 44 else chance.choice([{}, {"stop_token_ids": (2, 5)}])
        requests[str(number)] = make_request(str(number), prompt, chance.randrange(1, 20), **params)
        stage.core.add(requests[str(number)])
        for _ in range(chance.randrange(8)):
            stage.step()
            stage.device.check_published(stage.kv)
        if chance.random() < 0.1:
            victim = str(chance.randrange(max(0, number - 6), number + 1))
            aborted |= {victim} & stage.engine.scheduler._sequences.keys()
            stage.core.abort([victim])
    stage.run()
    assert stage.outputs.keys() == requests.keys()
    failed = ended_with_error(stage)
    assert failed <= met
    assert 5 < len(failed) < 110
    for key, request in requests.items():
        if key in failed or key in aborted:
            assert stage.generated(key) == alone(request).token_ids[: len(stage.generated(key))]
        else:
            assert stage.is_right(request)


def test_a_row_that_cannot_be_sampled_ends_alone_though_the_next_step_builds_on_it() -> None:
    stage = Stage()
    prompts = {"bad": [1, 2, 3, 4, 5], "good": [3, 4, 5, 6]}
    requests = {key: make_request(key, prompt, 12) for key, prompt in prompts.items()}
    for request in requests.values():
        stage.core.add(request)
    for _ in range(4):
        stage.step()
    stage.device.bad_rows = {"bad"}
    stage.step()
    stage.device.bad_rows = set()
    stage.core.add(make_request("again", prompts["bad"], 12))
    stage.run()
    assert ended_with_error(stage) == {"bad"}
    assert stage.outputs["bad"].error == "NaN"
    assert stage.is_right(requests["good"])
    assert stage.is_right(make_request("again", prompts["bad"], 12))
    assert stage.outputs["again"].num_cached_tokens == 0, "what gave a bad row is not found again"


@pytest.mark.covers("E07")
def test_a_poisoned_device_is_the_engine_s_end_with_a_step_in_flight_too() -> None:
    stage = Stage()
    stage.core.add(make_request("a", [1, 2], 9))
    stage.device.fault_in_step = fault_at(2, RuntimeError("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError, match="CUDA error"):
        stage.run()


@pytest.mark.covers("E04")
def test_an_engine_whose_every_step_fails_ends_when_it_runs_ahead_too() -> None:
    stage = Stage(max_num_seqs=1)
    stage.device.fault_in_step = lambda batch: ZeroDivisionError("a bug")
    for number in range(MAX_FAILED_STEPS + 1):
        stage.core.add(make_request(str(number), [number], 5))
    with pytest.raises(ZeroDivisionError):
        stage.run()
    assert ended_with_error(stage) == set(map(str, range(MAX_FAILED_STEPS)))


def test_the_beginning_of_a_sequence_is_told_once_though_its_first_step_is_dropped() -> None:
    stage = Stage()
    begun: list[str] = []
    stage.core.on_begun = begun.extend
    stage.device.fault_in_step = fault_at(0, ZeroDivisionError("a bug"))
    stage.core.add(make_request("a", [1], 5))
    stage.step()
    stage.core.add(make_request("b", [2], 5))
    stage.run()
    assert begun == ["a", "b"]
    assert stage.is_right(make_request("b", [2], 5))
