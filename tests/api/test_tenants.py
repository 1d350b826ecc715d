"""Several keys on one server: who gets in where, and who may use how much."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.auth import ADMIN_PREFIX, OPEN_PATHS
from tests.api.batch_support import create, jsonl, line, wait_status
from tests.api.support import LiveServer, assert_error, fresh, live_server, wait_until

FREE, LIMITED, METERED, SINGLE, ADMIN = (f"sk-canary-{name}" for name in ("f", "l", "m", "s", "a"))
KEYS = f"""
- {{name: free, keys: [{FREE}, sk-canary-f2]}}
- {{name: limited, keys: [{LIMITED}], requests-per-minute: 3}}
- {{name: metered, keys: [{METERED}], tokens-per-minute: 100}}
- {{name: single, keys: [{SINGLE}], max-sequences: 2}}
- {{name: admin, keys: [{ADMIN}], admin: true, least-priority: -7}}
"""
GENERATING: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "ab", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 2},
    "/v1/responses": {"input": "ab", "max_output_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 2},
    "/v1/moderations": {"input": "ab"},
}


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    path.write_text(KEYS)
    return path


@pytest.fixture(scope="module")
def _server(key_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    data = tmp_path_factory.mktemp("data")
    with live_server(api_key_file=key_file, data_dir=data, max_model_len=4096) as live:
        yield live


@pytest.fixture
def server(_server: LiveServer) -> Iterator[LiveServer]:
    """Every limit is as if a minute had passed."""
    _server.app.state.accounts._accounts.clear()
    yield from fresh(_server)


def ask(
    server: LiveServer, key: str, path: str = "/v1/completions", headers: Any = None, **fields: Any
) -> httpx.Response:
    body = {**GENERATING[path], **fields}
    return server.http.post(path, json=body, headers={"authorization": f"Bearer {key}", **(headers or {})})


# --- who gets in -------------------------------------------------------------------------------------------


def every_path(routes: Any) -> set[str]:
    """Those of the included routers among them, which some versions of FastAPI keep as a part."""
    paths: set[str] = set()
    for route in routes:
        included = getattr(route, "original_router", None)
        paths |= every_path(included.routes) if included is not None else {route.path}
    return paths


@pytest.mark.covers("S01", "H15")
def test_every_route_of_the_application_but_the_probes_asks_for_a_key(server: LiveServer) -> None:
    paths = every_path(server.app.routes)
    assert {"/docs", "/openapi.json", *GENERATING, *OPEN_PATHS} <= paths
    bodies = set()
    with httpx.Client(base_url=server.url) as stranger:
        for path in sorted(paths):
            for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
                response = stranger.request(method, re.sub("{.*?}", "x", path), json={})
                if path in OPEN_PATHS:
                    assert response.status_code in (200, 405), (method, path)
                    continue
                assert response.status_code == 401, (method, path)
                assert response.headers["www-authenticate"] == "Bearer"
                bodies.add(response.text)
    assert len(bodies) == 2, "one for each dialect, whatever was asked for"


@pytest.mark.covers("S25")
def test_debug_paths_are_for_admins_alone(server: LiveServer) -> None:
    path = f"{ADMIN_PREFIX}anything"
    assert server.http.get(path).status_code == 401
    for key, status in ((FREE, 403), (ADMIN, 404)):
        response = server.http.get(path, headers={"authorization": f"Bearer {key}"})
        assert_error(response, status)
    assert ask(server, ADMIN).status_code == 200


@pytest.mark.covers("S25")
@pytest.mark.parametrize("options", [{}, {"api_key": ["k"]}])
def test_without_an_admin_s_key_there_are_no_debug_paths(options: dict[str, Any]) -> None:
    with live_server(**options) as server:

        @server.app.get(f"{ADMIN_PREFIX}there")
        async def there() -> None: ...

        headers = {"authorization": "Bearer k"}
        texts = []
        for path in (f"{ADMIN_PREFIX}there", f"{ADMIN_PREFIX}nope", "/nope"):
            response = server.http.get(path, headers=headers)
            assert_error(response, 404, code="unknown_url")
            texts.append(response.text.replace(path, "PATH"))
        assert len(set(texts)) == 1


@pytest.mark.covers("S03", "S14", "S15")
def test_no_key_is_in_a_log_an_error_or_a_metric(server: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    seen = []
    with caplog.at_level(logging.DEBUG):
        for key in (FREE, LIMITED, f"{FREE}-wrong"):
            seen += [ask(server, key) for _ in range(5)]
            seen.append(ask(server, key, n=0))
            seen.append(server.http.get(f"/v1/models/{key}?key={key}", headers={"x-api-key": key}))
        server.script.crash_after = 0
        seen.append(ask(server, FREE))
        server.app.state.keys.reload()
    seen.append(server.http.get("/metrics"))
    ours = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    logged = "\n".join(
        logging.Formatter().format(record) for record in ours if "/v1/models/" not in record.getMessage()
    )
    told = "\n".join(
        f"{response.headers} {response.text}" for response in seen if "/v1/models/" not in str(response.url)
    )
    for text in (logged, told):
        assert "sk-canary" not in text
        assert "name:free" not in text


# --- limits ------------------------------------------------------------------------------------------------


@pytest.mark.covers("S04")
@pytest.mark.parametrize("path", GENERATING)
def test_each_generating_route_counts_requests_and_refuses_one_too_many(server: LiveServer, path: str) -> None:
    if path == "/v1/moderations":
        server.script.token_ids = [5]
    for number in range(3):
        response = ask(server, LIMITED, path)
        assert response.status_code == 200, response.text
        assert quota(response)[:2] == (3, 2 - number)
    refused = ask(server, LIMITED, path)
    assert refused.status_code == 429
    assert 15 <= int(refused.headers["retry-after"]) <= 20
    assert quota(refused)[:2] == (3, 0)
    if path != "/v1/messages":
        assert_error(refused, 429, code="rate_limit_exceeded")
    assert ask(server, FREE, path).status_code == 200


def quota(response: httpx.Response, kind: str = "requests") -> tuple[int, int, str]:
    """Limit, remaining, reset: in either dialect's headers."""
    names = (
        [f"anthropic-ratelimit-{kind}-{what}" for what in ("limit", "remaining", "reset")]
        if response.url.path == "/v1/messages"
        else [f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset")]
    )
    limit, remaining, reset = (response.headers[name] for name in names)
    return int(limit), int(remaining), reset


@pytest.mark.covers("S04")
def test_streams_and_errors_say_what_is_left_too(server: LiveServer) -> None:
    assert quota(ask(server, LIMITED, stream=True))[:2] == (3, 2)
    mistake = ask(server, LIMITED, n=0)
    assert_error(mistake, 400)
    limit, remaining, reset = quota(mistake)
    assert (limit, remaining) == (3, 1)
    assert re.fullmatch(r"3\d(\.\d+)?s|40s", reset)
    other = ask(server, LIMITED, "/v1/messages")
    reset_at = datetime.strptime(quota(other)[2], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert 50 < reset_at.timestamp() - time.time() < 62
    for response in (ask(server, FREE), server.http.get("/livez")):
        assert not any("ratelimit" in name for name in response.headers)


@pytest.mark.covers("S04")
def test_tokens_are_reserved_and_what_was_not_used_comes_back(server: LiveServer) -> None:
    used = ask(server, METERED, max_tokens=50).json()["usage"]["total_tokens"]
    assert used < 20
    left = quota(ask(server, METERED, n=0), "tokens")[1]
    assert left == 100 - used or left == 101 - used
    server.script.delay, server.script.ends_with_stop = 0.05, False
    headers = {"authorization": f"Bearer {METERED}"}
    body = {"prompt": "ab", "max_tokens": 60, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body, headers=headers) as streaming:
        pieces = streaming.iter_bytes()
        next(pieces)
        refused = ask(server, METERED, max_tokens=60)
        assert_error(refused, 429, code="rate_limit_exceeded")
        assert 10 < int(refused.headers["retry-after"]) < 60
        assert len(server.engine.running) == 1
    server.assert_idle()
    server.script.delay = 0
    assert ask(server, METERED, max_tokens=60).status_code == 200


@pytest.mark.covers("S04")
def test_sequences_in_flight_are_limited_for_one_key_and_not_for_others(server: LiveServer) -> None:
    server.script.delay, server.script.ends_with_stop = 0.05, False
    assert_error(ask(server, SINGLE, n=3), 400, param="n")
    headers = {"authorization": f"Bearer {SINGLE}"}
    body = {"prompt": "ab", "max_tokens": 60, "stream": True, "n": 2}
    with server.http.stream("POST", "/v1/completions", json=body, headers=headers) as streaming:
        pieces = streaming.iter_bytes()
        next(pieces)
        refused = ask(server, SINGLE)
        assert_error(refused, 429, code="rate_limit_exceeded")
        assert int(refused.headers["retry-after"]) >= 1
        assert ask(server, FREE, n=4).status_code == 200
    server.assert_idle()
    assert ask(server, SINGLE).status_code == 200


@pytest.mark.covers("S04")
def test_without_keys_the_limits_are_for_all_clients_together() -> None:
    with live_server(requests_per_minute=2) as server:
        for path in ("/v1/completions", "/v1/chat/completions"):
            assert server.http.post(path, json=GENERATING[path]).status_code == 200
        assert_error(server.complete(), 429, code="rate_limit_exceeded")
        assert server.http.post("/tokenize", json={"prompt": "a"}).status_code == 200
        assert server.metric('gemma_requests_rejected_total{reason="rate_limit_exceeded"}') == 1


def test_lines_of_batches_do_not_count(server: LiveServer) -> None:
    server.http.headers["authorization"] = f"Bearer {LIMITED}"
    try:
        batch = create(server, jsonl(*[line(str(number)) for number in range(6)]))
        done = wait_status(server, batch["id"], "completed")
    finally:
        del server.http.headers["authorization"]
    assert done["request_counts"]["completed"] == 6
    assert quota(ask(server, LIMITED))[:2] == (3, 2)


@pytest.mark.covers("K13")
def test_a_refusal_takes_milliseconds_and_reaches_no_engine(server: LiveServer) -> None:
    for _ in range(3):
        ask(server, LIMITED)
    server.engine.submitted.clear()
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        response = ask(server, LIMITED, prompt="ab" * 3000)
        seconds.append(time.perf_counter() - started)
        assert response.status_code == 429
    assert sorted(seconds)[5] < 0.02
    assert server.engine.submitted == []


# --- tenants -----------------------------------------------------------------------------------------------


@pytest.mark.covers("S10", "K16")
def test_the_engine_knows_tenants_apart_and_a_tenant_s_keys_not(server: LiveServer) -> None:
    for key in (FREE, "sk-canary-f2", METERED):
        ask(server, key, cache_salt="s")
    first, second, other = server.engine.submitted
    assert (first.tenant, first.cache_salt) == (second.tenant, second.cache_salt)
    assert first.tenant != other.tenant
    assert first.cache_salt != other.cache_salt
    assert "sk-canary" not in repr(server.engine.submitted)


def test_no_key_makes_its_requests_more_urgent_than_it_may(server: LiveServer) -> None:
    assert_error(ask(server, FREE, priority=-1), 400, param="priority")
    assert_error(ask(server, ADMIN, priority=-8), 400, param="priority")
    for key, fields, expected in ((FREE, {"priority": 3}, 3), (ADMIN, {"priority": -7}, -7), (ADMIN, {}, 0)):
        assert ask(server, key, **fields).status_code == 200
        assert server.engine.submitted[-1].priority == expected


@pytest.mark.covers("S03")
def test_keys_change_while_a_stream_goes_on(server: LiveServer, key_file: Path) -> None:
    server.script.delay, server.script.text = 0.02, "abcdefghij"
    headers = {"authorization": f"Bearer {FREE}"}
    body = {"prompt": "ab", "max_tokens": 10, "stream": True}
    try:
        with server.http.stream("POST", "/v1/completions", json=body, headers=headers) as streaming:
            pieces = streaming.iter_text()
            text = next(pieces)
            key_file.write_text(KEYS.replace(f"{FREE}, ", "sk-canary-new, "))
            server.app.state.keys.reload()
            assert_error(ask(server, FREE), 401)
            assert ask(server, "sk-canary-new").status_code == 200
            text += "".join(pieces)
        assert text.endswith("data: [DONE]\n\n")
        assert "error" not in text
    finally:
        key_file.write_text(KEYS)
        server.app.state.keys.reload()
    assert ask(server, FREE).status_code == 200


# --- the queue ---------------------------------------------------------------------------------------------


@pytest.mark.covers("K16")
def test_a_tenant_that_fills_the_queue_leaves_room_for_others() -> None:
    with live_server(api_key=["greedy", "small"], max_queued_requests=9) as server:
        server.script.delay, server.script.ends_with_stop = 0.05, False
        headers = {"authorization": "Bearer greedy"}
        body = {"prompt": "ab", "max_tokens": 58, "stream": True, "n": 8}
        with server.http.stream("POST", "/v1/completions", json=body, headers=headers) as streaming:
            pieces = streaming.iter_bytes()
            next(pieces)
            assert_error(ask(server, "greedy"), 429, code="queue_full")
            assert ask(server, "small").status_code == 200
        server.assert_idle()


@pytest.mark.covers("K13")
def test_prompts_that_wait_are_bounded_by_their_tokens() -> None:
    with live_server(max_queued_tokens=20) as server:
        server.script.delay = 0.2
        waiting = threading.Thread(target=lambda: server.complete("abcdefgh" * 2, max_tokens=9))
        waiting.start()
        wait_until(lambda: len(server.engine.running) == 1)
        refused = server.complete("abcdefgh" * 2)
        assert_error(refused, 429, code="queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        # The first has its first token, and goes on.
        wait_until(lambda: server.app.state.admission.queued_tokens == 0)
        assert server.in_flight == 1
        server.script.delay = 0
        assert server.complete("abcdefgh" * 2).status_code == 200
        waiting.join()


# --- deadlines ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _hasty() -> Iterator[LiveServer]:
    with live_server(request_timeout=0.3, queue_timeout=0.1, max_model_len=200) as live:
        yield live


@pytest.fixture
def hasty(_hasty: LiveServer) -> Iterator[LiveServer]:
    yield from fresh(_hasty)


@pytest.mark.covers("K14")
@pytest.mark.parametrize(
    ("delay", "headers", "said", "after"),
    [
        (0.4, {}, "not begun within 0.1 seconds", 0.1),
        (0.02, {}, "not complete within 0.3 seconds", 0.3),
        (0.02, {"x-request-timeout": "0.2"}, "not complete within 0.2 seconds", 0.2),
        (0.4, {"x-request-timeout": "0.05"}, "not complete within 0.05 seconds", 0.05),
        (0.02, {"x-request-timeout": "100"}, "not complete within 0.3 seconds", 0.3),
    ],
)
@pytest.mark.parametrize("n", [1, 3])
def test_an_answer_that_is_late_ends_with_504_and_its_sequences_with_it(
    hasty: LiveServer, delay: float, headers: dict[str, str], said: str, after: float, n: int
) -> None:
    hasty.script.delay, hasty.script.ends_with_stop = delay, False
    before = hasty.metric("gemma_requests_timed_out_total")
    started = time.monotonic()
    body = {"prompt": "ab", "max_tokens": 100, "n": n}
    response = hasty.http.post("/v1/completions", json=body, headers=headers)
    assert after <= time.monotonic() - started < after + 2
    assert said in assert_error(response, 504, code="deadline_exceeded")
    assert response.headers["x-should-retry"] == "false"
    hasty.assert_idle()
    assert len(hasty.engine.aborted) == n
    assert hasty.metric("gemma_requests_timed_out_total") == before + 1


@pytest.mark.covers("K14", "H11")
@pytest.mark.parametrize("delay", [0.05, 0.4])
def test_a_stream_that_is_late_ends_with_an_error_event(hasty: LiveServer, delay: float) -> None:
    hasty.script.delay, hasty.script.ends_with_stop = delay, False
    lines = hasty.complete(stream=True, max_tokens=100).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert "deadline_exceeded" in lines[-3]
    assert bool(lines[:-3]) == (delay == 0.05), "what came in time is sent"
    hasty.assert_idle()
    response = hasty.http.post("/v1/messages", json=GENERATING["/v1/messages"] | {"max_tokens": 50})
    assert response.status_code == 504
    assert response.json()["error"]["type"] == "timeout_error"


@pytest.mark.covers("K14")
def test_an_answer_in_time_is_not_touched(hasty: LiveServer) -> None:
    hasty.script.delay = 0.001
    plain = hasty.complete(max_tokens=5).json()["choices"][0]["text"]
    headers = {"x-request-timeout": "30"}
    body = {"prompt": "ab", "max_tokens": 5, "n": 2}
    for choice in hasty.http.post("/v1/completions", json=body, headers=headers).json()["choices"]:
        assert choice["text"] == plain
    assert hasty.engine.aborted == []


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e9", "soon", "", "10s"])
def test_a_time_that_is_none_is_refused(hasty: LiveServer, value: str) -> None:
    response = hasty.http.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-timeout": value})
    assert_error(response, 400, param="x-request-timeout")
    assert hasty.engine.submitted == []
