"""What the engine tells of itself, compared with what it was given."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from server.engine.core import EngineCore
from server.engine.grammar.compiler import GrammarCompiler
from server.engine.pacing import PrefillPacer
from server.engine.types import Snapshot
from tests.unit.engine_simulation import Engine, make_engine, make_request
from tests.unit.grammars import VOCABULARY_MESSAGE


def make_core(engine: Engine) -> EngineCore:
    ticks = itertools.count(100)
    core = EngineCore(
        engine.scheduler,
        PrefillPacer(100.0, 16),
        engine.model,
        GrammarCompiler(),
        clock=lambda: float(next(ticks)),
    )
    core.set_vocabulary(VOCABULARY_MESSAGE)
    return core


def ids(snapshot: Snapshot) -> tuple[list[str], list[str]]:
    return [seq.request_id for seq in snapshot.running], [seq.request_id for seq in snapshot.waiting]


def test_an_engine_without_work_has_nothing_but_its_blocks_to_show() -> None:
    snapshot = make_core(make_engine(num_blocks=(9,))).snapshot(7, 10)
    assert (snapshot.number, snapshot.num_steps, snapshot.last_step_ago) == (7, 0, None)
    assert ids(snapshot) == ([], [])
    (pool,) = snapshot.pools.values()
    assert (pool.num_blocks, pool.num_free, pool.num_held, pool.num_published) == (9, 9, 0, 0)


def test_each_sequence_is_described_by_its_counts() -> None:
    core = make_core(make_engine(block_size=4, max_num_batched_tokens=8))
    request = make_request("a", range(11), max_tokens=5, priority=3)
    core.add(msgspec.structs.replace(request, client_request_id="client-a", tenant="abcd"))
    core.step()
    (seq,) = core.snapshot(0, 10).running
    assert (seq.request_id, seq.client_request_id, seq.tenant) == ("a", "client-a", "abcd")
    assert (seq.status, seq.priority) == ("running", 3)
    assert (seq.num_prompt_tokens, seq.max_tokens, seq.num_computed_tokens) == (11, 5, 8)
    assert (seq.num_generated_tokens, seq.num_preemptions, seq.num_cached_tokens) == (0, 0, 0)
    core.step()
    snapshot = core.snapshot(0, 10)
    assert (snapshot.running[0].num_generated_tokens, snapshot.running[0].num_computed_tokens) == (1, 11)
    assert snapshot.running[0].age_seconds > seq.age_seconds > 0
    assert snapshot.num_steps == len(snapshot.step_seconds) == 2
    assert snapshot.last_step_ago is not None
    assert snapshot.last_step_ago > 0
    (pool,) = snapshot.pools.values()
    assert (pool.num_held, pool.num_published) == (3, 2)


def test_the_waiting_are_in_the_order_of_their_admission_and_as_many_as_asked_for() -> None:
    core = make_core(make_engine(max_num_seqs=1))
    core.add(make_request("runs", [1], max_tokens=50))
    core.step()
    for request_id, priority in {"late": 5, "b": 0, "now": -1, "c": 0}.items():
        core.add(make_request(request_id, [1], priority=priority))
    core.add(make_request("compiles", [1], grammar="start: /a/"))
    snapshot = core.snapshot(0, 100)
    assert ids(snapshot) == (["runs"], ["now", "b", "c", "late", "compiles"])
    assert [seq.status for seq in snapshot.waiting] == ["waiting"] * 4 + ["compiling"]
    snapshot = core.snapshot(0, 2)
    assert ids(snapshot) == (["runs"], ["now", "b"])
    assert snapshot.num_waiting == 5
    order = []
    core.abort(["runs", "compiles"])
    while core.has_work():
        order += [output.request_id for output in core.step().outputs if output.finish_reason]
    assert order == ["runs", "compiles", "now", "b", "c", "late"]


def test_one_that_was_preempted_waits_and_says_how_often() -> None:
    core = make_core(make_engine(num_blocks=(8,), max_num_batched_tokens=32, enable_prefix_caching=False))
    for request_id in ("first", "second"):
        core.add(make_request(request_id, range(10), max_tokens=14))
    core.step()
    while not (waiting := core.snapshot(0, 10).waiting):
        core.step()
    assert (waiting[0].status, waiting[0].num_preemptions, waiting[0].num_computed_tokens) == ("waiting", 1, 0)
    assert waiting[0].num_generated_tokens > 0


@pytest.mark.covers("S24")
def test_a_snapshot_holds_no_token_and_no_parameter_that_a_client_wrote() -> None:
    core = make_core(make_engine())
    request = make_request("a", [6, 5, 4], cache_salt="CANARY", grammar="CANARY", stop_token_ids=(987654,))
    core.add(request)
    core.add(make_request("b", [6, 5, 4], cache_salt="CANARY", bad_words=((987654,),)))
    core.step()
    snapshot = core.snapshot(0, 10)
    text = msgspec.json.encode(snapshot).decode()
    assert "CANARY" not in text
    assert "987654" not in text
    assert "[6,5,4]" not in text


def test_only_the_last_steps_are_kept() -> None:
    core = make_core(make_engine())
    core.add(make_request("a", [1], max_tokens=100))
    while core.has_work():
        core.step()
    snapshot = core.snapshot(0, 0)
    assert snapshot.num_steps == 100
    assert 1 <= len(snapshot.step_seconds) < 50
