"""Who goes first, and who gives way, when requests have priorities."""

from __future__ import annotations

import random

import pytest

from server.engine.precedence import Precedence
from server.engine.sequence import Sequence, SequenceStatus
from tests.unit.engine_simulation import Engine, generate_alone, make_engine, make_request


def order_of_ends(engine: Engine) -> list[str]:
    ended: list[str] = []
    while engine.scheduler.has_work():
        alive = {seq.request_id for seq in engine.scheduler.sequences}
        engine.step()
        ended += sorted(alive - {seq.request_id for seq in engine.scheduler.sequences})
    return ended


def test_the_waiting_go_by_priority_and_then_by_arrival() -> None:
    engine = make_engine(max_num_seqs=1)
    for request_id, priority in {"first": 0, "late": 1, "b": 0, "now": -5, "later": 2**40, "c": 0}.items():
        engine.add(make_request(request_id, [1, 2], max_tokens=2, priority=priority))
    assert order_of_ends(engine) == ["now", "first", "b", "c", "late", "later"]


def test_one_that_runs_is_not_put_off_for_a_seat() -> None:
    engine = make_engine(max_num_seqs=1)
    engine.add(make_request("low", [1, 2], max_tokens=5, priority=9))
    engine.step()
    engine.add(make_request("high", [1, 2], priority=-9))
    assert order_of_ends(engine) == ["low", "high"]


def test_prompts_share_a_step_by_priority() -> None:
    engine = make_engine(max_num_batched_tokens=16, long_prefill_threshold=12)
    engine.add(make_request("low", range(100, 140), priority=1))
    engine.step()
    engine.add(make_request("high", range(200, 240)))
    engine.step()
    engine.step()
    planned = [(scheduled.seq.request_id, scheduled.num_new) for scheduled in engine.step().sequences]
    assert planned == [("high", 12), ("low", 4)]


def crowd_out(engine: Engine) -> list[str]:
    """Who was preempted, in order."""
    victims: list[str] = []
    while engine.scheduler.has_work():
        victims += [seq.request_id for seq in engine.step().preempted]
    return victims


@pytest.mark.parametrize("low_first", [True, False])
def test_memory_is_taken_from_the_lowest_priority_whoever_came_first(low_first: bool) -> None:
    engine = make_engine(num_blocks=(12,), max_num_batched_tokens=32, enable_prefix_caching=False)
    arrivals = [("low", 5), ("high", 0), ("other", 0)]
    for request_id, priority in arrivals if low_first else reversed(arrivals):
        engine.add(make_request(request_id, range(10), max_tokens=12, priority=priority))
    victims = crowd_out(engine)
    assert victims
    assert set(victims) == {"low"}
    assert order_of_ends(engine) == []
    for request_id in ("low", "high", "other"):
        assert engine.generated(request_id) == generate_alone(make_request("", range(10), 12), 1000)[0]


def running(*states: tuple[int, int]) -> list[Sequence]:
    """Of (priority, computed tokens), in order."""
    sequences = []
    for number, (priority, num_computed) in enumerate(states):
        seq = Sequence.from_request(make_request(str(number), range(50), priority=priority))
        seq.num_computed, seq.status = num_computed, SequenceStatus.RUNNING
        sequences.append(seq)
    return sequences


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([(0, 9)], None),
        ([(0, 9), (0, 9)], "1"),
        ([(0, 1), (0, 1), (0, 9)], "2"),
        ([(0, 1), (0, 1), (0, 9), (0, 5)], "3"),
        ([(0, 1), (0, 1), (0, 5), (0, 9)], "2"),
        ([(0, 1), (3, 9)], "1"),
        ([(0, 1), (3, 1), (3, 9)], "2"),
        ([(0, 1), (3, 1), (3, 9), (3, 5)], "3"),
        ([(0, 1), (3, 1), (3, 5), (3, 9)], "2"),
        ([(-1, 1), (0, 1), (3, 9)], "2"),
    ],
)
def test_the_victim_is_of_the_later_half_of_the_lowest_class(
    states: list[tuple[int, int]], expected: str | None
) -> None:
    victim = Precedence().victim(running(*states))
    assert (victim and victim.request_id) == expected


def test_equals_are_served_as_they_came_however_many_of_others_come_between() -> None:
    engine = make_engine(max_num_seqs=2, num_blocks=(14,))
    chance = random.Random(3)
    arrivals: dict[int, list[str]] = {0: [], 4: []}
    for number in range(120):
        priority = chance.choice([0, 4])
        arrivals[priority].append(str(number))
        engine.add(make_request(str(number), range(3 + number % 5), max_tokens=4, priority=priority))
        for _ in range(chance.randrange(3)):
            engine.step()
    engine.run()
    started = {request_id: outputs[0].scheduled_at for request_id, outputs in engine.outputs.items()}
    scheduled = sorted(started, key=started.__getitem__)
    for priority, expected in arrivals.items():
        assert [request_id for request_id in scheduled if request_id in expected] == expected, priority
