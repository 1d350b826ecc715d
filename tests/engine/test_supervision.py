"""An engine that ends in any way, and what the front makes of it: nobody waits for ever, and nothing that can
be answered is lost.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from server.engine.types import EngineConfig, EngineInfo, FinishReason, GenerateRequest, SequenceOutput
from server.frontend import watchdog
from server.frontend.client import (
    CrashingSequenceError,
    EngineDeadError,
    EngineLoss,
    LossCause,
    SequenceLostError,
)
from server.frontend.mailbox import merge
from server.frontend.process_client import ProcessClient
from server.options import ServerConfig
from tests.engine import scripted_engine as script
from tests.unit.engine_simulation import generate_alone, make_request


class Supervised:
    """A client over scripted engines, and what it reported."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.client = ProcessClient(ServerConfig(**options))
        self.config = EngineConfig(model_path=str(directory))
        self.losses: list[EngineLoss] = []
        self.returns: list[EngineInfo] = []
        self.silences: list[bool] = []
        self.deaths: list[str] = []
        self.client.on_loss = self.losses.append
        self.client.on_return = self.returns.append
        self.client.on_silence = self.silences.append
        self.client.on_death = self.deaths.append

    @property
    def engine(self) -> psutil.Process:
        (engine,) = (
            child for child in psutil.Process().children() if script.__name__ in " ".join(child.cmdline())
        )
        return engine

    async def run(self, request: GenerateRequest) -> SequenceOutput:
        whole: SequenceOutput | None = None
        async for output in self.client.generate(request):
            whole = output if whole is None else merge(whole, output)
        assert whole is not None
        return whole

    def begin(self, request: GenerateRequest) -> asyncio.Task[SequenceOutput]:
        return asyncio.create_task(self.run(request))


@pytest.fixture
async def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Callable[..., Any], None]:
    monkeypatch.setattr("server.frontend.engine_process.ENGINE_MODULE", script.__name__)
    monkeypatch.setattr(watchdog, "SILENT_SECONDS", 1.2)
    started: list[Supervised] = []

    async def start(*starts: str, **options: Any) -> Supervised:
        if starts:
            (tmp_path / "starts").write_text("\n".join(starts))
        supervised = Supervised(tmp_path, **options)
        started.append(supervised)
        await supervised.client.start(supervised.config)
        return supervised

    yield start
    for supervised in started:
        await supervised.client.stop()


async def until(condition: Callable[[], object], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.01)


def is_right(request: GenerateRequest, output: SequenceOutput) -> bool:
    return (output.token_ids, output.finish_reason) == generate_alone(request, 1000)


async def assert_serves(supervised: Supervised) -> None:
    request = make_request("next", [1], 5)
    assert is_right(request, await supervised.run(request))


async def first_output(supervised: Supervised, request: GenerateRequest) -> asyncio.Task[SequenceOutput]:
    """A request of which an output has come."""
    has_output = asyncio.Event()

    async def run() -> SequenceOutput:
        outputs = []
        async for output in supervised.client.generate(request):
            outputs.append(output)
            has_output.set()
        return outputs[-1]

    running = asyncio.create_task(run())
    await has_output.wait()
    return running


@pytest.mark.covers("E01")
async def test_a_killed_engine_takes_along_what_had_an_output_and_hands_on_the_rest(start: Any) -> None:
    supervised = await start(max_engine_restarts=5)
    streams = [await first_output(supervised, make_request(f"s{i}", [i], 900)) for i in range(4)]
    waiting = [make_request(f"w{i}", [6, i], 5) for i in range(7)]
    readers = [supervised.begin(request) for request in waiting]
    await asyncio.sleep(0.05)
    supervised.engine.kill()
    for stream in streams:
        with pytest.raises(SequenceLostError, match="signal 9"):
            await stream
    late = make_request("late", [5], 5)  # it comes while there is no engine
    outputs = await asyncio.gather(*readers, supervised.begin(late))
    assert all(map(is_right, [*waiting, late], outputs))
    (loss,) = supervised.losses
    assert (loss.cause, loss.num_lost, loss.num_kept) == (LossCause.ENDED, 4, 7)
    assert len(supervised.returns) == 1
    assert supervised.deaths == []


@pytest.mark.covers("E03")
async def test_an_engine_that_was_stopped_is_silent_until_it_goes_on(start: Any) -> None:
    supervised = await start()
    engine = supervised.engine
    request = make_request("a", [1], 100)
    running = supervised.begin(request)
    engine.send_signal(signal.SIGSTOP)
    await until(lambda: supervised.silences)
    engine.send_signal(signal.SIGCONT)
    await until(lambda: len(supervised.silences) == 2)
    assert supervised.silences == [True, False]
    assert is_right(request, await running)
    assert supervised.losses == []


@pytest.mark.slow
@pytest.mark.covers("E03")
async def test_what_shows_no_sign_of_life_for_too_long_is_replaced(start: Any) -> None:
    supervised = await start(engine_silence_timeout=1.5)
    running = supervised.begin(make_request("bad", [script.BREATHLESS], 5))
    with pytest.raises(CrashingSequenceError):
        await running
    assert [loss.cause for loss in supervised.losses] == [LossCause.SILENT, LossCause.SILENT]
    await assert_serves(supervised)


@pytest.mark.slow
async def test_a_step_that_does_not_end_is_told_from_a_long_one(start: Any) -> None:
    supervised = await start(engine_step_timeout=0.6)
    request = make_request("a", [script.SLOW], 12)
    assert is_right(request, await supervised.run(request))
    assert supervised.losses == [], "more than a second in all, but no step was long"
    with pytest.raises(CrashingSequenceError):
        await supervised.run(make_request("bad", [script.HANGS], 5))
    assert {loss.cause for loss in supervised.losses} == {LossCause.STUCK}
    assert supervised.silences == []


@pytest.mark.covers("E11")
@pytest.mark.parametrize("command", [script.GARBAGE, pytest.param(script.OVERSIZE, marks=pytest.mark.slow)])
async def test_an_engine_that_sends_garbage_is_replaced(start: Any, command: int) -> None:
    supervised = await start()
    with pytest.raises(CrashingSequenceError):
        await supervised.run(make_request("bad", [command], 5))
    assert [loss.cause for loss in supervised.losses] == [LossCause.GARBAGE] * 2
    await assert_serves(supervised)


async def test_a_request_that_crashes_the_engine_is_found_out_and_nobody_else_is_blamed(start: Any) -> None:
    supervised = await start()
    beside = [make_request(f"b{i}", [i], 5) for i in range(3)]
    behind = [make_request(f"a{i}", [i, i], 5) for i in range(7)]
    poison = make_request("poison", [script.KILLED], 5)
    readers = [supervised.begin(request) for request in [*beside, poison, *behind]]
    outcomes = await asyncio.gather(*readers, return_exceptions=True)
    assert isinstance(outcomes.pop(len(beside)), CrashingSequenceError)
    for request, outcome in zip([*beside, *behind], outcomes, strict=True):
        if isinstance(outcome, SequenceLostError):
            assert request in beside, "only who had an output when it crashed again"
        else:
            assert isinstance(outcome, SequenceOutput), outcome
            assert is_right(request, outcome)
    assert len(supervised.losses) == 2, "once beside others, and once as the only one to begin"
    assert supervised.deaths == []


async def test_a_request_that_crashes_the_engine_later_is_not_run_again(start: Any) -> None:
    supervised = await start()
    with pytest.raises(SequenceLostError):
        await supervised.run(make_request("late", [script.KILLED_LATER], 5))
    assert [(loss.num_lost, loss.num_kept) for loss in supervised.losses] == [(1, 0)]
    await assert_serves(supervised)


@pytest.mark.covers("E04")
async def test_an_exception_in_a_step_costs_its_batch_and_not_the_engine(start: Any) -> None:
    supervised = await start()
    outcome = await supervised.run(make_request("bad", [script.FAULT], 5))
    assert (outcome.finish_reason, outcome.token_ids) == (FinishReason.ERROR, [])
    await assert_serves(supervised)
    assert supervised.losses == []


@pytest.mark.slow
@pytest.mark.covers("E08")
async def test_engines_that_only_crash_are_given_up_on_and_waited_for_longer_and_longer(start: Any) -> None:
    supervised = await start("well", "dies", "refuses", max_engine_restarts=2)
    waiting = supervised.begin(make_request("a", [1], 900))
    await asyncio.sleep(0.1)
    started = time.monotonic()
    supervised.engine.kill()
    with pytest.raises(EngineDeadError):
        await waiting
    await until(lambda: supervised.deaths)
    assert supervised.deaths == ["there is no room"]
    assert [loss.reason for loss in supervised.losses] == ["the engine process ended with signal 9"] * 2
    assert time.monotonic() - started > 1.0, "the second one was not waited for"
    with pytest.raises(EngineDeadError):
        await supervised.run(make_request("b", [1]))


@pytest.mark.covers("E08")
@pytest.mark.parametrize(("way", "said"), [("dies", "signal 9"), ("refuses", "there is no room")])
async def test_the_first_engine_is_not_replaced(start: Any, way: str, said: str) -> None:
    with pytest.raises(EngineDeadError, match=said):
        await start(way)


async def test_a_server_can_end_while_an_engine_is_being_replaced(start: Any) -> None:
    supervised = await start("well", "slowly", max_engine_restarts=5)
    supervised.engine.kill()
    await until(lambda: supervised.losses)
    waiting = supervised.begin(make_request("a", [1]))
    await asyncio.sleep(0.2)
    await supervised.client.stop()
    with pytest.raises(EngineDeadError):
        await waiting
    assert supervised.deaths == []
    assert not [child for child in psutil.Process().children() if script.__name__ in " ".join(child.cmdline())]
