"""The soak of `make soak`, short enough for every day; and that it sees what it looks for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.e2e.server_process import running_server
from tests.soak.soak import SERVER_OPTIONS, Process, Record, Soak, _fault, growth, violations
from tests.soak.workload import Ask


@pytest.mark.covers("K04", "K05")
def test_200_requests_of_all_kinds_leave_nothing_behind(tiny_checkpoint: Path) -> None:
    with running_server(tiny_checkpoint, *SERVER_OPTIONS) as server:
        soak = Soak(server, seed=1, concurrency=16)
        warm_up = soak.phase(60)
        before = soak.processes()
        record = soak.phase(140)
        assert warm_up.faults + violations(record, before, soak.processes()) == []
        statuses = warm_up.statuses + record.statuses
    assert min(statuses["200"], statuses["400"], statuses["abandoned"]) > 0
    assert statuses.total() == 200


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.covers("K05")
def test_ten_thousand_requests_leave_nothing_behind(tiny_checkpoint: Path) -> None:
    with running_server(tiny_checkpoint, *SERVER_OPTIONS) as server:
        soak = Soak(server, seed=2, concurrency=32)
        warm_up = soak.phase(2000)
        before = soak.processes()
        record = soak.phase(8000)
        assert warm_up.faults + violations(record, before, soak.processes()) + growth(record) == []


def test_it_sees_what_it_looks_for() -> None:
    record = Record(statuses=Counter({"200": 5000}))
    record.samples = [(n, Process(50 + n / 500, 9, 9), Process(90, 9, 9)) for n in range(0, 5000, 50)]
    assert growth(record) == ["the front grows by 2.00 MB per 1,000 requests; 1.0 is the limit"]
    rest, leaking = Process(50, 20, 8), Process(50, 60, 30)
    assert violations(record, (rest, rest), (rest, rest)) == []
    assert len(violations(record, (rest, rest), (leaking, rest))) == 2


@pytest.mark.parametrize(
    ("ask", "status", "answer", "expected"),
    [
        (Ask("", {}), 500, {}, "not the expected 200"),
        (Ask("", {}, status=400), 400, {"error": {"message": "", "code": None}}, "not the expected error"),
        (Ask("", {}), 200, ['{"choices": []}'], "a stream without its end"),
        (Ask("", {"n": 2}), 200, {"choices": [{"index": 0, "finish_reason": "stop"}]}, "not one end for each"),
        (Ask("", {}), 200, {"choices": [{"index": 0, "finish_reason": "error"}]}, "ended for"),
        (Ask("", {}), 200, ['{"choices": [{"index": 0, "finish_reason": "stop"}]}', "[DONE]"], None),
    ],
)
def test_an_answer_that_is_not_as_it_should_be_is_a_fault(
    ask: Ask, status: int, answer: object, expected: str | None
) -> None:
    fault = _fault(ask, status, answer)
    assert fault is None if expected is None else expected in (fault or "")
