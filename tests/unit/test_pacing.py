"""How prompts are cut up so that running streams keep their pace."""

from __future__ import annotations

import pytest

from server.engine.pacing import PrefillPacer


def machine(num_streams: int, num_prefill_tokens: int) -> float:
    """Seconds of a step where streams cost 20 ms, and a prompt token 1 ms more."""
    return (0.02 if num_streams else 0.0) + 0.001 * num_prefill_tokens


def paced_steps(pacer: PrefillPacer, count: int) -> list[float]:
    """Durations of steps of a long prompt beside four streams."""
    durations = []
    for _ in range(count):
        tokens = pacer.max_prefill_tokens()
        durations.append(machine(4, tokens))
        pacer.record(4, tokens, durations[-1])
    return durations


def test_the_first_prompt_beside_streams_is_bounded_before_its_cost_is_known() -> None:
    pacer = PrefillPacer(2.5, 512)
    pacer.record(4, 0, machine(4, 0))
    assert paced_steps(pacer, 1)[0] <= 2.5 * 0.02


def test_as_long_as_nothing_is_known_a_step_is_full() -> None:
    pacer = PrefillPacer(2.5, 512)
    assert pacer.max_prefill_tokens() == 512
    pacer.record(0, 300, 0.3)
    assert pacer.max_prefill_tokens() == 512


@pytest.mark.covers("K15")
@pytest.mark.parametrize("stretch", [1.5, 2.5, 6.0])
def test_steps_with_prompts_take_at_most_the_stretch(stretch: float) -> None:
    pacer = PrefillPacer(stretch, 512)
    pacer.record(4, 0, machine(4, 0))
    durations = paced_steps(pacer, 10)
    assert max(durations) <= max(stretch * 0.02, 0.036) + 1e-9
    assert durations[-1] == pytest.approx(max(stretch * 0.02, 0.036), abs=0.0011)


def test_a_prompt_gets_on_however_dear_its_tokens_are() -> None:
    pacer = PrefillPacer(1.1, 512)
    pacer.record(1, 0, 0.001)
    pacer.record(1, 100, 10.0)
    assert pacer.max_prefill_tokens() == 16


def test_the_pace_follows_a_machine_that_changes() -> None:
    pacer = PrefillPacer(3.0, 512)
    pacer.record(4, 0, 0.02)
    paced_steps(pacer, 5)
    assert pacer.max_prefill_tokens() == pytest.approx(40, abs=1)
    for _ in range(40):
        pacer.record(4, 0, 0.04)
        pacer.record(4, 40, 0.04 + 40 * 0.002)
    assert pacer.max_prefill_tokens() == pytest.approx(40, abs=1)
    for _ in range(40):
        pacer.record(4, 40, 0.04 + 40 * 0.0005)
    assert pacer.max_prefill_tokens() == pytest.approx(160, abs=2)


def test_a_measurement_below_that_of_streams_alone_does_not_divide_by_nothing() -> None:
    pacer = PrefillPacer(2.5, 512)
    pacer.record(4, 0, 0.02)
    pacer.record(4, 100, 0.01)
    assert pacer.max_prefill_tokens() == 512
