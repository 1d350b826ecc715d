"""However a sequence ends, and in whatever state it was: one end is told, its blocks are free, and the next one
is served as if nothing had been.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from server.engine.batch import ScheduledBatch
from server.engine.core import EngineCore
from server.engine.grammar.compiler import GrammarCompiler
from server.engine.pacing import PrefillPacer
from server.engine.sampling.types import SampledToken
from server.engine.sequence import SequenceStatus
from server.engine.types import FinishReason, GenerateRequest, StepOutput
from tests.unit.engine_simulation import Engine, HostRunner, generate_alone, make_engine, make_request

PROMPT = list(range(11))


def engine_with_a_crowd(windows: tuple[int | None, ...], caching: bool) -> Engine:
    """Six others, on a pool for three, that have blocks, published prefixes and preemptions behind them."""
    engine = make_engine(
        windows,
        [14] * len(windows),
        enable_prefix_caching=caching,
        long_prefill_threshold=4,
        max_num_batched_tokens=8,
    )
    for number in range(6):
        engine.add(make_request(f"other {number}", [*PROMPT[:8], number], max_tokens=14))
    return engine


def until(engine: Engine, condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        engine.step()
    raise AssertionError("it never came to that")


def ends_by_itself(engine: Engine) -> None:
    engine.add(make_request("it", PROMPT, max_tokens=5))


def stops(engine: Engine) -> None:
    engine.add(make_request("it", PROMPT, max_tokens=50, stop_token_ids=(0, 1, 2, 3)))


def is_aborted_in_the_queue(engine: Engine) -> None:
    engine.add(make_request("it", PROMPT))
    engine.scheduler.abort("it")


def is_aborted_in_its_prompt(engine: Engine) -> None:
    seq = engine.add(make_request("it", PROMPT, priority=-1))
    until(engine, lambda: 0 < seq.num_computed < seq.num_prompt_tokens)
    engine.scheduler.abort("it")


def is_aborted_while_it_generates(engine: Engine) -> None:
    seq = engine.add(make_request("it", PROMPT, max_tokens=20, priority=-1))
    until(engine, lambda: seq.num_generated == 4)
    engine.scheduler.abort("it")


def is_aborted_when_preempted(engine: Engine) -> None:
    seq = engine.add(make_request("it", PROMPT, max_tokens=20))
    until(engine, lambda: seq.num_preemptions > 0 and seq.status is SequenceStatus.WAITING)
    engine.scheduler.abort("it")


def is_aborted_during_its_step(engine: Engine) -> None:
    seq = engine.add(make_request("it", PROMPT, max_tokens=20, priority=-1))
    until(engine, lambda: seq.num_generated == 2)
    engine.step(during=lambda: engine.scheduler.abort("it"))


def is_aborted_in_the_step_that_would_end_it(engine: Engine) -> None:
    seq = engine.add(make_request("it", PROMPT, max_tokens=3, priority=-1))
    until(engine, lambda: seq.num_generated == 2)
    engine.step(during=lambda: engine.scheduler.abort("it"))


def fails_at_its_first_token(engine: Engine) -> None:
    engine.model.bad_rows.add("it")
    engine.add(make_request("it", PROMPT))


def fails_while_it_generates(engine: Engine) -> None:
    seq = engine.add(make_request("it", PROMPT, max_tokens=20, priority=-1))
    until(engine, lambda: seq.num_generated == 4)
    engine.model.bad_rows.add("it")


ENDS = [
    ends_by_itself,
    stops,
    is_aborted_in_the_queue,
    is_aborted_in_its_prompt,
    is_aborted_while_it_generates,
    is_aborted_when_preempted,
    is_aborted_during_its_step,
    is_aborted_in_the_step_that_would_end_it,
    fails_at_its_first_token,
    fails_while_it_generates,
]


@pytest.mark.covers("K04", "K17")
@pytest.mark.parametrize("caching", [False, True], ids=["uncached", "cached"])
@pytest.mark.parametrize("windows", [(None,), (None, 6), (6,)])
@pytest.mark.parametrize("happens", ENDS)
def test_every_end_gives_all_blocks_back(
    happens: Callable[[Engine], None], windows: tuple[int | None, ...], caching: bool
) -> None:
    if happens is is_aborted_when_preempted and windows == (6,):
        pytest.skip("a window's blocks never run short here")
    engine = engine_with_a_crowd(windows, caching)
    happens(engine)
    engine.run()  # which checks the books after every step, and that nothing is held after the last
    engine.kv.check([])
    assert [pool.num_free for pool in engine.kv._pools] == [14] * len(windows)
    assert engine.scheduler.abort("it") is None
    engine.model.bad_rows.clear()
    again = [make_request("it again", PROMPT, max_tokens=9)]
    again += [make_request(f"other {number}", [*PROMPT[:8], number], max_tokens=14) for number in range(6)]
    engine.add(again[0])
    engine.run()
    for request in again:
        assert engine.generated(request.request_id) == generate_alone(request, 1000)[0]


# --- preemption --------------------------------------------------------------------------------------------


@pytest.mark.covers("K03")
@pytest.mark.parametrize("caching", [False, True], ids=["uncached", "cached"])
@pytest.mark.parametrize("windows", [(None,), (None, 5), (5,)])
@pytest.mark.parametrize("moment", range(1, 17))
def test_preemption_at_any_moment_changes_no_token(
    moment: int, windows: tuple[int | None, ...], caching: bool
) -> None:
    """Within the prompt, at the first token, one before, at and after each boundary of blocks."""
    engine = make_engine(
        windows,
        [40] * len(windows),
        enable_prefix_caching=caching,
        long_prefill_threshold=3,
        max_draft_tokens=0,
    )
    requests = [make_request("stays", PROMPT, max_tokens=20), make_request("goes", PROMPT, max_tokens=14)]
    for request in requests:
        engine.add(request)
    for _ in range(moment):
        engine.step()
    assert engine.scheduler._preempt_one() is not None
    engine.scheduler.take_counts()
    engine.run()
    for request in requests:
        assert engine.generated(request.request_id) == generate_alone(request, 1000)[0]


@pytest.mark.covers("K03")
@pytest.mark.parametrize("caching", [False, True], ids=["uncached", "cached"])
def test_one_that_is_preempted_before_every_token_gets_there_all_the_same(caching: bool) -> None:
    engine = make_engine(
        (None, 5), [40, 40], enable_prefix_caching=caching, long_prefill_threshold=64, max_num_batched_tokens=64
    )
    requests = [make_request("stays", PROMPT, max_tokens=60), make_request("goes", [*PROMPT, 5], max_tokens=14)]
    _, goes = [engine.add(request) for request in requests]
    while engine.scheduler.has_work():
        engine.step()
        if goes.status is SequenceStatus.RUNNING:
            assert engine.scheduler._preempt_one() is goes
            engine.scheduler.take_counts()
    assert goes.num_preemptions == 13
    for request in requests:
        assert engine.generated(request.request_id) == generate_alone(request, 1000)[0]


@pytest.mark.covers("K03")
def test_on_scarce_memory_nobody_is_overtaken_by_more_than_a_roomful() -> None:
    engine = make_engine(num_blocks=(15,), max_num_seqs=6, enable_prefix_caching=False)
    ended: list[int] = []
    for number in range(150):
        engine.add(make_request(str(number), [number % 7] * (5 + number % 4), max_tokens=24 + number % 3))
        for _ in range(5):
            alive = {seq.request_id for seq in engine.scheduler.sequences}
            engine.step()
            ended += sorted(map(int, alive - {seq.request_id for seq in engine.scheduler.sequences}))
    assert engine.num_preemptions > 20
    assert len(ended) > 40
    for position, number in enumerate(ended):
        assert abs(position - number) < 6


# --- the core ----------------------------------------------------------------------------------------------


class Runner(HostRunner):
    """The simulated model, behind which a message may arrive."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.during: Callable[[], None] = lambda: None

    def execute(self, batch: ScheduledBatch) -> list[SampledToken]:
        sampled = self._engine.model.execute(batch)
        self.during()
        return sampled


def make_core(engine: Engine) -> tuple[EngineCore, Runner]:
    runner = Runner(engine)
    return EngineCore(engine.scheduler, PrefillPacer(100.0, 16), runner, GrammarCompiler()), runner


@pytest.mark.covers("K17")
def test_aborts_in_any_number_and_at_any_time_give_each_request_one_end() -> None:
    engine = make_engine((None, 6), [14, 14], max_num_seqs=5, max_num_batched_tokens=12, max_draft_tokens=3)
    core, _ = make_core(engine)
    chance = random.Random(11)
    requests: dict[str, GenerateRequest] = {}
    tokens: dict[str, list[int]] = {}
    ends: dict[str, list[FinishReason]] = {}

    def take(step: StepOutput) -> None:
        for output in step.outputs:
            assert output.request_id not in ends, "something came after the end"
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason is not None:
                ends[output.request_id] = [output.finish_reason]

    for number in range(600):
        request = make_request(
            str(number), [chance.randrange(7) for _ in range(chance.randrange(1, 16))], chance.randrange(1, 12)
        )
        requests[request.request_id] = request
        if chance.random() < 0.1:
            core.abort([request.request_id])  # before it was ever seen: of no effect
        core.add(request)
        for _ in range(chance.randrange(3)):
            victims = [
                str(chance.randrange(max(0, number - 12), number + 3)) for _ in range(chance.randrange(4))
            ]
            core.abort(victims + victims)
        for _ in range(chance.randrange(4)):
            if core.has_work():
                take(core.step())
    while core.has_work():
        take(core.step())
    assert ends.keys() == requests.keys()
    assert set(engine.scheduler.kv_usage().values()) == {0.0}
    counts = Counter(reason for [reason] in ends.values())
    assert min(counts[FinishReason.ABORT], counts[FinishReason.LENGTH]) > 100
    for request_id, request in requests.items():
        expected = generate_alone(request, 1000)[0]
        told = tokens.get(request_id, [])
        assert told == expected[: len(told)]
        assert len(told) == len(expected) or ends[request_id] == [FinishReason.ABORT]


@pytest.mark.covers("K17")
def test_an_abort_that_comes_after_the_end_says_nothing_more() -> None:
    engine = make_engine()
    core, runner = make_core(engine)
    core.add(make_request("a", PROMPT[:5], max_tokens=1))
    runner.during = lambda: core.abort(["unknown"])
    assert [output.finish_reason for output in core.step().outputs] == [FinishReason.LENGTH]
    core.abort(["a", "a"])
    assert not core.has_work()


@pytest.mark.covers("K17")
def test_an_abort_that_races_the_last_token_gives_one_end() -> None:
    engine = make_engine()
    core, runner = make_core(engine)
    core.add(make_request("a", PROMPT[:5], max_tokens=1))
    runner.during = lambda: core.abort(["a", "a"])
    outputs = core.step().outputs
    runner.during = lambda: None
    while core.has_work():
        outputs += core.step().outputs
    assert [output.finish_reason for output in outputs] == [FinishReason.ABORT]
