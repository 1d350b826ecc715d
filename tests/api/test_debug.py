"""GET /debug/engine, with engines that answer and engines that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.engine.types import PoolSnapshot, SequenceSnapshot, Snapshot
from server.frontend.client import EngineDeadError
from server.runtime import Phase
from tests.api.support import ADMIN_KEY, LiveServer, live_server, wait_until

SNAPSHOT = Snapshot(
    number=5,
    running=[
        SequenceSnapshot(
            request_id="internal",
            client_request_id="client-1",
            tenant="abcd1234",
            status="running",
            priority=0,
            age_seconds=1.5,
            num_prompt_tokens=9,
            num_generated_tokens=2,
            max_tokens=16,
            num_computed_tokens=10,
            num_cached_tokens=0,
            num_preemptions=1,
        )
    ],
    waiting=[],
    num_waiting=0,
    pools={"full": PoolSnapshot(num_blocks=8, num_held=3, num_free=5, num_published=2)},
    num_steps=4,
    last_step_ago=0.1,
    step_seconds=[0.01, 0.02],
)


def state(server: LiveServer, status: int = 200) -> dict[str, Any]:
    response = server.http.get("/debug/engine")
    assert response.status_code == status, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_it_shows_both_sides(admin_server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_server.engine, "snapshot", SNAPSHOT)
    answer = state(admin_server)
    assert set(answer) == {"front", "engine", "answer_seconds"}
    assert answer["front"] == {
        "phase": "ready",
        "stage": "",
        "admitted_sequences": 0,
        "max_admitted_sequences": 1024,
        "open_streams": 0,
        "engine_pid": admin_server.engine.pid,
    }
    assert set(answer["engine"]) == {
        "running",
        "waiting",
        "num_waiting",
        "pools",
        "num_steps",
        "last_step_ago",
        "step_seconds",
    }
    (running,) = answer["engine"]["running"]
    assert (running["client_request_id"], running["num_generated_tokens"]) == ("client-1", 2)
    assert answer["engine"]["pools"]["full"]["num_published"] == 2


def test_it_counts_what_is_in_flight(admin_server: LiveServer) -> None:
    admin_server.script.delay, admin_server.script.ends_with_stop = 0.05, False
    body = {"prompt": "ab", "n": 3, "max_tokens": 50, "stream": True}
    with admin_server.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()  # which, once forgotten, would close the stream
        next(lines)
        front = state(admin_server)["front"]
        assert (front["admitted_sequences"], front["open_streams"]) == (3, 1)
    admin_server.assert_idle()
    wait_until(lambda: state(admin_server)["front"]["open_streams"] == 0)


def test_the_engine_is_told_whom_a_sequence_is_for() -> None:
    with live_server(api_key=["CANARY-KEY"]) as admin_server:
        admin_server.http.headers["authorization"] = "Bearer CANARY-KEY"
        admin_server.http.post(
            "/v1/completions", json={"prompt": "ab", "user": "CANARY"}, headers={"x-request-id": "mine"}
        )
        (request,) = admin_server.engine.submitted
        assert request.client_request_id == "mine"


def test_an_engine_that_does_not_answer_is_told_of_and_so_is_the_front(
    admin_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.debug.ANSWER_SECONDS", 0.05)
    admin_server.script.delay = 30
    answer = state(admin_server, 503)
    assert answer["engine"] is None
    assert answer["front"]["phase"] == "ready"
    assert answer["error"]["code"] == "engine_silent"
    assert "0.05 seconds" in answer["error"]["message"]


@pytest.mark.covers("S16")
def test_a_dead_engine_is_told_of_but_not_why(admin_server: LiveServer) -> None:
    admin_server.script.inspection_error = EngineDeadError("killed by signal 9 in /secret/path")
    assert state(admin_server, 503)["error"]["code"] == "engine_unavailable"


def test_it_answers_while_the_model_loads_and_after_the_engine_failed(admin_key_file: Path) -> None:
    with live_server(loaded=False, api_key_file=admin_key_file) as server:
        server.http.headers["authorization"] = f"Bearer {ADMIN_KEY}"
        server.runtime.stage = "weights"
        answer = state(server, 503)
        assert (answer["front"]["phase"], answer["front"]["stage"]) == ("starting", "weights")
        assert answer["error"]["code"] == "model_loading"
        server.runtime.phase, server.runtime.stage = Phase.FAILED, "engine died at /secret/path"
        server.script.inspection_error = EngineDeadError("killed by signal 9 in /secret/path")
        answer = state(server, 503)
        assert answer["front"]["stage"] == ""
        assert answer["error"]["code"] == "engine_unavailable"


def test_while_the_engine_is_replaced_nobody_is_told_that_the_server_ends(
    admin_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin_server.runtime, "phase", Phase.RESTARTING)
    monkeypatch.setattr(admin_server.runtime, "stage", "weights")
    admin_server.script.inspection_error = EngineDeadError("the engine is being replaced")
    answer = state(admin_server, 503)
    assert (answer["front"]["phase"], answer["front"]["stage"]) == ("restarting", "weights")
    assert (answer["error"]["code"], "restarted" in answer["error"]["message"]) == ("engine_unavailable", True)
