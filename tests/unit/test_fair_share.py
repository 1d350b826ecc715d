"""Tenants of one priority share the engine evenly; with one tenant there is nothing to share."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.precedence import Precedence
from server.engine.sequence import Sequence
from tests.unit.engine_simulation import Engine, make_engine, make_request, make_sequence

OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["enter", "enter", "admit", "leave"]),
        st.integers(0, 1000),
        st.sampled_from([0, 0, 0, -1, 7]),
        st.sampled_from(["a", "b", "c"]),
    ),
    max_size=60,
)


class Book:
    """A precedence, and the live sequences in its order."""

    def __init__(self) -> None:
        self.precedence = Precedence()
        self.arrivals: dict[Sequence, int] = {}
        self.admitted: set[Sequence] = set()
        self.gone: set[Sequence] = set()

    def do(self, what: str, number: int, priority: int, tenant: str) -> None:
        if what == "enter":
            prompt = [1] * (1 + number % 40)
            seq = make_sequence("", prompt, max_tokens=1 + number, priority=priority, tenant=tenant)
            self.arrivals[seq] = len(self.arrivals)
            self.precedence.enter(seq)
            return
        live = self.order()
        waiting = [seq for seq in live if seq not in self.admitted]
        if what == "admit" and waiting:
            self.precedence.admit(waiting[0])
            self.admitted.add(waiting[0])
        elif what == "leave" and live:
            seq = live[number % len(live)]
            seq.token_ids += [1] * (number % 5 if seq in self.admitted else 0)
            self.precedence.leave(seq)
            self.gone.add(seq)

    def order(self) -> list[Sequence]:
        ordered: list[Sequence] = []
        for seq in self.arrivals:
            if seq not in self.gone:
                self.precedence.insert(seq, ordered)
        return ordered


@given(operations=OPERATIONS)
@settings(max_examples=60, deadline=None)
def test_with_one_tenant_the_order_is_that_of_priority_and_arrival(
    operations: list[tuple[str, int, int, str]],
) -> None:
    book = Book()
    for what, number, priority, _ in operations:
        book.do(what, number, priority, "the only one")
        ordered = book.order()
        assert ordered == sorted(ordered, key=lambda seq: (seq.request.priority, book.arrivals[seq]))


@given(operations=OPERATIONS)
@settings(max_examples=60, deadline=None)
def test_no_order_of_two_changes_and_nobody_overtakes_within_a_tenant(
    operations: list[tuple[str, int, int, str]],
) -> None:
    book = Book()
    before: list[Sequence] = []
    for operation in operations:
        book.do(*operation)
        ordered = book.order()
        still_there, seen = set(ordered), set(before)
        assert [seq for seq in ordered if seq in seen] == [seq for seq in before if seq in still_there]
        for tenant in "abc":
            own = [seq for seq in ordered if seq.request.tenant == tenant]
            assert own == sorted(own, key=lambda seq: (seq.request.priority, book.arrivals[seq]))
        before = ordered
    for seq in before:
        book.precedence.leave(seq)
    assert not book.precedence._classes, "those that left are remembered"


def starts(engine: Engine, request_ids: Iterable[str]) -> list[float]:
    return [engine.outputs[request_id][0].scheduled_at for request_id in request_ids]


@pytest.mark.covers("K16")
@pytest.mark.parametrize("num_seats", [1, 4])
def test_a_small_tenant_waits_for_one_of_a_greedy_one_s_500_requests(num_seats: int) -> None:
    engine = make_engine(max_num_seqs=num_seats)
    for number in range(500):
        engine.add(make_request(f"greedy {number}", [1, 2, 3], max_tokens=4, tenant="greedy"))
    for _ in range(20):
        engine.step()
    num_before = sum(bool(seq.scheduled_at) for seq in engine.scheduler.sequences) + len(engine.outputs)
    for number in range(3):
        engine.add(make_request(f"small {number}", [4, 5], max_tokens=4, tenant="small"))
    while any(seq.request.tenant == "small" for seq in engine.scheduler.sequences):
        engine.step()
    order = sorted(engine.outputs, key=lambda request_id: engine.outputs[request_id][0].scheduled_at)
    places = [order.index(f"small {number}") for number in range(3)]
    assert places[0] <= num_before + 1
    # The others take turns with the greedy one's.
    assert places[2] <= places[0] + 4 + num_seats
    assert len(engine.scheduler.sequences) > 450


def test_tenants_with_requests_of_different_sizes_get_as_many_tokens() -> None:
    engine = make_engine(
        max_num_seqs=2, max_num_batched_tokens=64, long_prefill_threshold=64, num_blocks=(200,)
    )
    sizes = {"long": 60, "short": 6}
    for number in range(80):
        for tenant, size in sizes.items():
            # Nobody names how much it will be: the outputs' lengths are learnt.
            engine.add(make_request(f"{tenant} {number}", [1] * 4, max_tokens=size, tenant=tenant))
    used = dict.fromkeys(sizes, 0)
    while min(used.values()) < 500:
        engine.step()
        used = {
            tenant: sum(
                4 + len(engine.generated(request_id))
                for request_id in engine.outputs
                if request_id.startswith(tenant)
            )
            for tenant in sizes
        }
    assert max(used.values()) < 1.3 * min(used.values())


def test_who_names_no_limit_is_charged_for_what_outputs_turn_out_to_be() -> None:
    """Both tenants' outputs have 3 tokens; one of them allowed for a million."""
    precedence = Precedence()
    live: list[Sequence] = []
    for _ in range(60):
        for tenant, max_tokens in (("vague", 10**6), ("exact", 3)):
            live.append(make_sequence("", [1] * 3, max_tokens=max_tokens, tenant=tenant))
            precedence.enter(live[-1])
            precedence.admit(live[-1])
            live[-1].token_ids += [1] * 3
        for seq in live:
            precedence.leave(seq)
        live.clear()
    contenders = [
        make_sequence("", [1] * 3, max_tokens=max_tokens, tenant=tenant)
        for _ in range(4)
        for tenant, max_tokens in (("vague", 10**6), ("exact", 3))
    ]
    ordered: list[Sequence] = []
    for seq in contenders:
        precedence.enter(seq)
        precedence.insert(seq, ordered)
    assert [seq.request.tenant for seq in ordered] == ["vague", "exact"] * 4


def test_requests_that_were_given_up_in_the_queue_cost_their_tenant_nothing() -> None:
    engine = make_engine(max_num_seqs=1)
    engine.add(make_request("runs", [1], max_tokens=30, tenant="steady"))
    engine.step()
    for number in range(100):
        engine.add(make_request(f"given up {number}", [1] * 9, tenant="fickle"))
    abandoned = [f"given up {number}" for number in range(100)]
    random.Random(5).shuffle(abandoned)
    for request_id in abandoned:
        assert engine.scheduler.abort(request_id)
    for tenant in ("steady", "fickle", "steady"):
        engine.add(make_request(f"{tenant} {len(engine.scheduler.sequences)}", [1], tenant=tenant))
    engine.run()
    first, second, third = starts(engine, ["fickle 2", "steady 1", "steady 3"])
    assert first < second < third


def test_a_priority_comes_before_any_share() -> None:
    engine = make_engine(max_num_seqs=1)
    for number in range(20):
        engine.add(make_request(f"much {number}", [1] * 9, tenant="much", priority=-1))
    engine.step()
    engine.add(make_request("little", [1], tenant="little"))
    engine.run()
    assert max(starts(engine, [f"much {number}" for number in range(20)])) < starts(engine, ["little"])[0]


def test_memory_is_taken_from_who_has_had_most() -> None:
    engine = make_engine(num_blocks=(12,), max_num_batched_tokens=32, enable_prefix_caching=False)
    for number in range(3):
        engine.add(make_request(f"much {number}", range(10), max_tokens=12, tenant="much"))
    engine.add(make_request("little", range(10), max_tokens=12, tenant="little"))
    victims = []
    while engine.scheduler.has_work():
        victims += [seq.request_id for seq in engine.step().preempted]
    assert victims
    assert "little" not in victims
    assert "much 0" not in victims
