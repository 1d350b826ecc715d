"""Nothing that clients write, or are answered, and no key reaches the log, the metrics or an error of another's
request: every route is sent canaries, the log is at its most talkative, and all sorts of things go wrong.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from fastapi.routing import APIRoute

from server import logs
from server.app import BATCH_ROUTERS, OTHER_ROUTERS
from server.tokenizer import Tokenizer
from tests.api.batch_support import create, jsonl, line, wait_status
from tests.api.support import LiveServer, Script, live_server, wait_until

PROMPT, OUTPUT, KEY, PII = "PROMPTCANARY", "OUTPUTCANARY", "KEYCANARY", "PIICANARY"
CANARIES = (PROMPT, OUTPUT, KEY, PII)
SCHEMA = {"type": "object", "properties": {PROMPT: {"type": "string", "enum": [PROMPT]}}, "required": [PROMPT]}
TOOL = {"name": "get", "description": PROMPT, "parameters": SCHEMA}
COMMON = {
    "user": PII,
    "metadata": {"who": PII},
    "safety_identifier": PII,
    "prompt_cache_key": PII,
    "max_tokens": 30,
}
MESSAGES = [{"role": "user", "content": f"{PROMPT} ab"}]

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "stop": [PROMPT], "cache_salt": PROMPT, **COMMON},
    "/v1/completions": {"prompt": PROMPT, "echo": True, "logprobs": 2, "cache_salt": PROMPT, **COMMON},
    "/v1/responses": {"input": PROMPT, "instructions": PROMPT, "user": PII, "max_output_tokens": 30},
    "/v1/messages": {
        "model": "tiny",
        "max_tokens": 30,
        "system": PROMPT,
        "messages": MESSAGES,
        "metadata": {"user_id": PII},
    },
    "/v1/messages/count_tokens": {"model": "tiny", "messages": MESSAGES},
    "/v1/moderations": {"input": PROMPT},
    "/v1/chat/completions/render": {"messages": MESSAGES},
    "/v1/completions/render": {"prompt": PROMPT},
    "/tokenize": {"prompt": PROMPT},
    "/v1/tokenize": {"messages": MESSAGES},
    "/detokenize": {"tokens": [9, 10]},
    "/v1/detokenize": {"tokens": [9, 10]},
    "/v1/batches": {"input_file_id": PROMPT, "endpoint": PROMPT, "completion_window": "24h"},
}
GENERATING = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"]
FORMS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": PROMPT}}}},
    {"structured_outputs": {"regex": f"({PROMPT}"}},
    {"structured_outputs": {"grammar": f"start: {PROMPT} ("}},
    {"structured_outputs": {"grammar": f"root ::= {PROMPT} ("}},
    {"structured_outputs": {"choice": [PROMPT]}},
    {"tools": [{"type": "function", "function": TOOL}]},
    {"tools": [{"type": "function", "function": {**TOOL, "name": PROMPT}}], "tool_choice": "required"},
    {"tools": [{"type": "function", "function": {"name": PROMPT, "parameters": PROMPT}}]},
    {"bad_words": [PROMPT]},
]


class Log:
    def __init__(self, form: logs.Form) -> None:
        self._buffer = io.StringIO()
        logs.configure("debug", form, "front")
        (handler,) = logging.getLogger().handlers
        assert isinstance(handler, logging.StreamHandler)
        handler.setStream(self._buffer)

    @property
    def text(self) -> str:
        return self._buffer.getvalue()


@pytest.fixture
def log(request: pytest.FixtureRequest) -> Iterator[Log]:
    """What the server would write to its standard error, at `debug`."""
    names = ("", "server", "uvicorn")
    before = [(logger, logger.level, list(logger.handlers)) for logger in map(logging.getLogger, names)]
    hooks = sys.excepthook, threading.excepthook
    yield Log(getattr(request, "param", "json"))
    sys.excepthook, threading.excepthook = hooks
    logging.captureWarnings(False)
    logging.raiseExceptions = True
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers = handlers


@pytest.fixture(scope="module")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    data = tmp_path_factory.mktemp("data")
    with live_server(api_key=[KEY], max_model_len=2000, data_dir=data) as live:
        live.http.headers["authorization"] = f"Bearer {KEY}"
        yield live


@pytest.fixture
def server(_shared: LiveServer) -> Iterator[LiveServer]:
    _shared.engine.script = Script(text=OUTPUT)
    yield _shared
    _shared.assert_idle()


def assert_secret(server: LiveServer, log: Log) -> None:
    metrics = server.http.get("/metrics").text
    for canary in CANARIES:
        assert canary not in log.text
        assert canary not in metrics


def test_every_route_that_takes_a_body_is_sent_canaries() -> None:
    routes = [route for router in (*BATCH_ROUTERS, *OTHER_ROUTERS) for route in router.routes]
    taking = {route.path for route in routes if isinstance(route, APIRoute) and "POST" in (route.methods or ())}
    assert taking - set(BODIES) == {"/v1/files", "/v1/batches/{batch_id}/cancel"}, "which have other bodies"


@pytest.mark.covers("S03", "S14", "S24")
def test_what_is_asked_and_answered_is_in_no_log_and_no_metric(server: LiveServer, log: Log) -> None:
    answered = []
    for path, body in BODIES.items():
        for variant in ({}, {"stream": True}):
            response = server.http.post(
                f"{path}?key={KEY}", json={**body, **variant}, headers={"x-api-key": KEY}
            )
            answered.append((path, response.status_code, OUTPUT in response.text.replace('","', "")))
    for form in FORMS:
        server.chat(PROMPT, **COMMON, **form)
        server.complete(PROMPT, **COMMON, **{name: value for name, value in form.items() if name != "tools"})
    statuses = {path: status for path, status, _ in answered}
    assert [path for path, status in statuses.items() if status != 200] == ["/v1/batches"]
    assert {path for path, _, has_output in answered if has_output} >= set(GENERATING), "a canary is not there"
    wait_until(lambda: log.text.count("POST /v1/batches ") == 2)
    assert "sequence" in log.text, "the log is not at debug"
    assert_secret(server, log)


@pytest.mark.covers("S14")
@pytest.mark.parametrize("log", ["text", "json"], indirect=True)
@pytest.mark.parametrize("stream", [False, True])
def test_requests_that_fail_in_the_engine_are_logged_without_their_text(
    server: LiveServer, log: Log, stream: bool
) -> None:
    failures = [
        {"error_after": 2},
        {"death_after": 2},
        {"crash_after": 2},
        {"crash_after": 0},
    ]
    for path in GENERATING:
        for failure in failures:
            server.engine.script = Script(
                text=OUTPUT, crash=ExceptionGroup(PROMPT, [KeyError(PROMPT), ValueError(OUTPUT)]), **failure
            )
            server.http.post(path, json={**BODIES[path], "stream": stream})
    assert log.text.count("server failed") == 0
    assert log.text.count("builtins.KeyError") >= 2 * len(GENERATING)
    assert_secret(server, log)


@pytest.mark.covers("S14")
def test_requests_that_are_refused_are_logged_without_their_text(server: LiveServer, log: Log) -> None:
    for path, body in BODIES.items():
        for name, value in body.items():
            for wrong in ({PROMPT: [PROMPT]}, PROMPT):
                server.http.post(path, json={**body, name: wrong} if value != wrong else {name: wrong})
        server.http.post(path, json={**body, "model": PROMPT, "chat_template": PROMPT, "unknown": PROMPT})
        server.http.post(path, content=f'{{"prompt": "{PROMPT}'.encode())
        server.http.post(path, content=b'{"prompt": "\xff' + PROMPT.encode() + b'"}')
        server.http.post(path, content=PROMPT.encode(), headers={"content-type": f"text/{PROMPT}"})
        server.http.put(path, content=PROMPT.encode(), headers={"cookie": KEY})
        server.http.get(f"/v1/models?{KEY}")
        with httpx.Client(base_url=server.url) as stranger:
            stranger.post(path, json=body, headers={"authorization": f"Bearer {KEY}2", "x-api-key": f"{KEY}3"})
    assert_secret(server, log)


@pytest.mark.covers("S14")
def test_what_no_route_expects_is_logged_without_its_words(
    server: LiveServer, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise RuntimeError(f"cannot take {PROMPT}")

    for path in (*GENERATING, "/tokenize", "/v1/moderations"):
        with monkeypatch.context() as patch:
            for method in ("encode_controls", "encode_prompt", "encode_text"):
                patch.setattr(Tokenizer, method, fail)
            assert server.http.post(path, json=BODIES[path]).status_code == 500, path
    assert_secret(server, log)


@pytest.mark.covers("S14")
def test_the_lines_of_a_batch_are_in_no_log(server: LiveServer, log: Log) -> None:
    content = jsonl(
        line("good", prompt=PROMPT, max_tokens=20, user=PII),
        line("wrong", prompt=PROMPT, temperature=PROMPT),
    )
    batch = create(server, content, metadata={"who": PII})
    assert wait_status(server, batch["id"], "completed")["request_counts"]["failed"] == 1
    server.engine.script = Script(crash_after=0, crash=ValueError(PROMPT))
    wait_status(server, create(server, content)["id"], "completed")
    assert "of a batch failed" in log.text
    create(server, f"{PROMPT}\n{{}}\n".encode())
    server.http.post("/v1/files", files={"file": (PROMPT, PROMPT.encode())}, data={"purpose": PROMPT})
    assert_secret(server, log)


@pytest.mark.covers("S14")
@pytest.mark.parametrize("log", ["text", "json"], indirect=True)
def test_every_line_about_a_request_has_its_id(server: LiveServer, log: Log) -> None:
    trace, span = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    headers = {"x-request-id": "mine-1", "traceparent": f"00-{trace}-{span}-01"}
    server.engine.script = Script(crash_after=1)
    server.http.post("/v1/completions", json=BODIES["/v1/completions"], headers=headers)
    server.http.post("/v1/completions", json={"prompt": "a", "logit_bias": None}, headers=headers)
    wait_until(lambda: log.text.count(" 500 ") == 2)
    if not log.text.startswith("{"):
        assert log.text.count("mine-1") >= 6
        return
    entries = [json.loads(each) for each in log.text.splitlines()]
    entries = [entry for entry in entries if entry["logger"].startswith("server.")]
    assert len(entries) >= 6
    assert {entry["request_id"] for entry in entries} == {"mine-1"}
    assert {entry["logging.googleapis.com/trace"] for entry in entries} == {trace}
    assert {entry["logging.googleapis.com/spanId"] for entry in entries} == {span}
    (access, _) = [entry for entry in entries if entry["logger"] == "server.access"]
    latency = access["httpRequest"].pop("latency")
    assert latency.endswith("s")
    assert 0 < float(latency[:-1]) < 10
    assert access["httpRequest"] == {
        "requestMethod": "POST",
        "requestUrl": "/v1/completions",
        "status": 500,
    }


@pytest.mark.covers("S14")
def test_requests_side_by_side_keep_their_ids_apart(server: LiveServer, log: Log) -> None:
    server.script.delay = 0.01

    def ask(number: int) -> None:
        server.http.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-id": f"r{number}"})

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: log.text.count("POST /v1/completions ") == 10)
    if log.text.startswith("{"):
        entries = [json.loads(each) for each in log.text.splitlines()]
        for entry in entries:
            assert entry["message"].count(entry["request_id"]) == 1
        assert {entry["request_id"] for entry in entries} == {f"r{number}" for number in range(10)}


@pytest.mark.covers("S14")
def test_what_the_grammar_library_prints_when_it_panics_goes_nowhere(server: LiveServer) -> None:
    assert server.complete("a", structured_outputs={"regex": "a+"}).status_code == 200
    children = psutil.Process().children()
    workers = [child for child in children if "server.frontend.grammar_worker" in child.cmdline()]
    assert {os.readlink(f"/proc/{worker.pid}/fd/2") for worker in workers} == {os.devnull}
