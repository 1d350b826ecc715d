"""Who is given up on, by a clock that the tests move."""

from __future__ import annotations

import pytest

from server.engine.pulse import Pulse
from server.engine.types import (
    EngineInfo,
    FinishReason,
    Heartbeat,
    Loading,
    Ready,
    SequenceOutput,
    StepOutput,
    StepStats,
)
from server.frontend.client import LossCause
from server.frontend.watchdog import LASTING_SECONDS, SILENT_SECONDS, TICK_SECONDS, Restarts, Watchdog
from tests.api.support import make_info
from tests.unit.clock import Clock


def verdict_after(watchdog: Watchdog, clock: Clock, seconds: float) -> tuple[LossCause, str] | None:
    verdict = None
    for _ in range(round(seconds / TICK_SECONDS)):
        clock.now += TICK_SECONDS
        verdict = verdict or watchdog.tick()
    return verdict


@pytest.mark.covers("E03")
def test_silence_is_noticed_first_and_punished_later_and_any_word_ends_it() -> None:
    clock = Clock()
    watchdog = Watchdog(silence_timeout=10, step_timeout=300, clock=clock)
    assert verdict_after(watchdog, clock, SILENT_SECONDS) is None
    assert not watchdog.is_silent
    assert verdict_after(watchdog, clock, 1) is None
    assert watchdog.is_silent
    watchdog.heard(Loading("weights", 0.5))
    assert not watchdog.is_silent
    assert verdict_after(watchdog, clock, 9.9) is None
    verdict = verdict_after(watchdog, clock, 1)
    assert verdict is not None
    assert verdict[0] is LossCause.SILENT


@pytest.mark.covers("E13")
def test_a_front_that_slept_does_not_blame_the_engine() -> None:
    clock = Clock()
    watchdog = Watchdog(silence_timeout=10, step_timeout=300, clock=clock)
    clock.now += 3600.0
    assert watchdog.tick() is None
    assert not watchdog.is_silent


def test_a_long_step_is_the_engine_s_own_word() -> None:
    clock = Clock()
    watchdog = Watchdog(silence_timeout=10, step_timeout=300, clock=clock)
    watchdog.heard(Heartbeat(299.0))
    assert watchdog.tick() is None
    watchdog.heard(Heartbeat(0.0))
    assert watchdog.tick() is None
    watchdog.heard(Heartbeat(301.0))
    verdict = watchdog.tick()
    assert verdict is not None
    assert verdict[0] is LossCause.STUCK


def test_heartbeats_tell_how_long_a_turn_takes() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    assert pulse.heartbeat() == Heartbeat(0.0)
    with pulse.turn():
        clock.now += 5.0
        assert pulse.heartbeat() == Heartbeat(5.0)
    clock.now += 5.0
    assert pulse.heartbeat() == Heartbeat(0.0)
    with pytest.raises(ZeroDivisionError), pulse.turn():
        raise ZeroDivisionError
    assert pulse.heartbeat() == Heartbeat(0.0)


@pytest.mark.covers("E08")
def test_engines_that_get_nothing_done_are_replaced_more_and_more_slowly_and_then_no_more() -> None:
    restarts = Restarts(7, Clock())
    assert [restarts.ended() for _ in range(8)] == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, None]


def output(reason: FinishReason | None) -> StepOutput:
    return StepOutput([SequenceOutput(request_id="a", token_ids=[1], finish_reason=reason)], StepStats())


def test_a_completed_sequence_is_a_new_beginning_and_tokens_alone_are_none() -> None:
    restarts = Restarts(3, Clock())
    delays = []
    for reason in (None, FinishReason.ERROR, FinishReason.ABORT, FinishReason.STOP, FinishReason.LENGTH):
        restarts.heard(output(reason))
        delays.append(restarts.ended())
    assert delays == [0.0, 1.0, 2.0, 0.0, 0.0]


def test_an_engine_that_lasted_is_a_new_beginning() -> None:
    clock, info = Clock(), make_info()
    restarts = Restarts(5, clock)

    def life(info: EngineInfo, seconds: float) -> float | None:
        restarts.heard(Ready(info))
        clock.now += seconds
        return restarts.ended()

    assert [life(info, seconds) for seconds in (1.0, 1.0, LASTING_SECONDS + 1, 1.0)] == [0.0, 1.0, 0.0, 1.0]
