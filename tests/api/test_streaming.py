"""Streams and disconnects, on real connections."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import time
from typing import Any

import httpx
import pytest
from sse_starlette.sse import SendTimeoutError

from server.app import create_app
from server.options import ServerConfig
from tests.api.raw_http import reset, send_request
from tests.api.support import (
    FakeEngineClient,
    LiveServer,
    ScriptedRuntime,
    assert_error,
    events,
    live_server,
    wait_until,
)


def slow_and_endless(server: LiveServer, delay: float = 0.05) -> None:
    server.script.delay = delay
    server.script.ends_with_stop = False


@pytest.mark.covers("H09")
def test_a_stream_s_headers_keep_proxies_from_buffering(server: LiveServer) -> None:
    headers = server.chat(stream=True).headers
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"


def test_each_token_is_sent_when_it_comes(server: LiveServer) -> None:
    server.script.delay, server.script.text = 0.05, "abc"
    with server.http.stream("POST", "/v1/completions", json={"prompt": "a", "stream": True}) as response:
        arrivals = [time.monotonic() for line in response.iter_lines() if line.startswith("data: {")]
    assert len(arrivals) >= 2
    assert arrivals[-1] - arrivals[0] > 0.04


@pytest.mark.covers("H09")
def test_a_silent_stream_is_kept_alive_before_and_after_the_first_token() -> None:
    with live_server(sse_keep_alive_interval=0.05) as server:
        server.script.delay, server.script.text = 0.3, "a"
        text = server.chat(stream=True).text
        first_event = text.index("data:")
        assert text[:first_event].count(": ping\n\n") >= 2
        assert ": ping\n\n" in text[first_event:]
        assert len(events(text)) >= 2


@pytest.mark.covers("H05", "H06")
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("close", [socket.socket.close, reset])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_aborts_its_sequences(
    server: LiveServer, stream: bool, close: Any, n: int
) -> None:
    slow_and_endless(server)
    before = server.metric("gemma_client_disconnects_total")
    aborts = 'vllm:request_success_total{engine="0",finished_reason="abort",model_name="google/gemma-tiny"}'
    aborts_before = server.metric(aborts)
    sock = send_request(server, stream=stream, n=n)
    if stream:
        assert b"data: " in sock.recv(4096) + sock.recv(4096)
    wait_until(lambda: len(server.engine.running) == n)
    close(sock)
    wait_until(lambda: len(server.engine.aborted) == n, seconds=1)
    server.assert_idle()
    wait_until(lambda: server.metric("gemma_client_disconnects_total") == before + 1)
    assert server.metric(aborts) == aborts_before + n


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_before_the_first_token_aborts_too(server: LiveServer, stream: bool) -> None:
    slow_and_endless(server, delay=30)
    sock = send_request(server, stream=stream)
    wait_until(lambda: len(server.engine.running) == 1)
    sock.close()
    wait_until(lambda: len(server.engine.aborted) == 1, seconds=1)


@pytest.mark.parametrize("stream", [True, False])
def test_a_storm_of_leaving_clients_leaves_nothing_behind(server: LiveServer, stream: bool) -> None:
    slow_and_endless(server, delay=0.002)
    for number in range(100):
        sock = send_request(server, stream=stream, n=1 + number % 3)
        if number % 4:
            time.sleep(0.002 * (number % 4))
        (reset if number % 2 else socket.socket.close)(sock)
    server.assert_idle()
    assert server.metric("gemma_sse_open_streams") == 0
    server.script.ends_with_stop = True
    assert server.complete().status_code == 200


def test_clients_that_stay_are_not_counted_as_gone(server: LiveServer) -> None:
    before = server.metric("gemma_client_disconnects_total")
    for _ in range(20):
        server.chat(stream=True)
        server.chat()
    assert server.metric("gemma_client_disconnects_total") == before
    assert server.metric("gemma_sse_open_streams") == 0


@pytest.mark.covers("H03")
def test_a_reader_that_stands_still_does_not_hold_up_the_others(server: LiveServer) -> None:
    slow_and_endless(server, delay=0)
    idle = [send_request(server, stream=True) for _ in range(20)]
    started = time.monotonic()
    assert server.complete().status_code == 200
    assert time.monotonic() - started < 5
    for sock in idle:
        sock.close()


@pytest.mark.covers("K13")
def test_a_full_server_refuses_at_once_and_recovers() -> None:
    with live_server(max_queued_requests=3) as server:
        slow_and_endless(server, delay=30)
        busy = [send_request(server, stream=True, n=2), send_request(server)]
        wait_until(lambda: server.in_flight == 3)
        for response in (server.complete(), server.complete(stream=True), server.chat()):
            assert "3" in assert_error(response, 429, code="queue_full")
            assert int(response.headers["retry-after"]) >= 1
        assert server.metric('gemma_requests_rejected_total{reason="queue_full"}') == 3
        for sock in busy:
            sock.close()
        server.assert_idle()
        assert_error(server.complete(n=4), 400, param="n")
        server.script.delay = 0
        assert server.complete(n=3).status_code == 200


def test_every_end_of_a_request_gives_its_room_back(server: LiveServer) -> None:
    for name in ("error_after", "death_after", "crash_after"):
        setattr(server.script, name, 1)
        for stream in (False, True):
            server.complete(stream=stream, n=3)
            server.chat(stream=stream)
            server.complete(stream=stream, n=0)
        setattr(server.script, name, None)
    server.complete(stop="b", n=2)
    server.assert_idle()


def test_a_request_that_fails_leaves_its_siblings_aborted(server: LiveServer) -> None:
    slow_and_endless(server, delay=0.01)
    server.script.error_after = 3
    assert_error(server.complete(n=4), 500)
    server.assert_idle()


async def test_many_streams_at_once_get_their_own_text(server: LiveServer) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:

        async def one(letter: str) -> str:
            body = {"prompt": letter * 3, "stream": True, "echo": True, "max_tokens": 3}
            response = await client.post("/v1/completions", json=body)
            return "".join(json.loads(event)["choices"][0]["text"] for event in events(response.text))

        letters = "abcdefghijklmnopqrstuvwxyz"
        texts = await asyncio.gather(*(one(letter) for letter in letters))
    for letter, text in zip(letters, texts, strict=True):
        assert text.startswith(letter * 3)


@pytest.mark.covers("H03")
async def test_a_client_that_reads_nothing_for_long_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.sse.SEND_SECONDS", 0.05)
    engine = FakeEngineClient()
    engine.script.ends_with_stop = False
    runtime = ScriptedRuntime(ServerConfig(), engine)
    runtime.load()
    app = create_app(runtime)
    bodies = iter([{"type": "http.request", "body": b'{"prompt": "ab", "stream": true}', "more_body": False}])
    forever = asyncio.Event()
    sent: list[Any] = []

    async def receive() -> Any:
        message = next(bodies, None)
        if message is None:
            await forever.wait()
        return message

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == 4:
            await forever.wait()

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "headers": [],
    }
    with pytest.raises(SendTimeoutError):
        await app(scope, receive, send)
    assert len(engine.aborted) == 1
    assert app.state.admission.in_flight == 0
    assert b"gemma_client_disconnects_total 1.0" in runtime.metrics.render()
    assert b"gemma_sse_open_streams 0.0" in runtime.metrics.render()


def test_a_head_request_starts_no_stream(server: LiveServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("HEAD", "/v1/completions", body=b'{"prompt": "a", "stream": true}')
    assert connection.getresponse().status == 405
    connection.close()
