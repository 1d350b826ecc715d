"""The end of a server: what it still answers, what it refuses, and what those get that it cannot finish."""

from __future__ import annotations

import json
import socket
import time

import httpx
import pytest

from tests.api.raw_http import read_to_end, response_of, send_request
from tests.api.support import LiveServer, assert_error, live_server, wait_until

CHAT = {"messages": [{"role": "user", "content": "ab"}]}


def begun_stream(server: LiveServer, path: str = "/v1/completions", **fields: object) -> socket.socket:
    """One of which the first event has arrived."""
    sock = send_request(server, path, stream=True, **fields)
    data = b""
    while b"data: " not in data:
        received = sock.recv(4096)
        assert received
        data += received
    return sock


def endless(server: LiveServer) -> None:
    server.script.delay, server.script.ends_with_stop = 0.05, False


@pytest.mark.covers("L01")
def test_what_was_accepted_is_answered_and_what_comes_later_refused() -> None:
    with live_server() as server:
        server.script.delay, server.script.text = 0.1, "abcdefghijk"
        stream, whole = begun_stream(server), send_request(server)
        wait_until(lambda: len(server.engine.running) == 2)
        server.drain()
        with httpx.Client(base_url=server.url) as stranger:  # on a connection of its own
            assert stranger.get("/livez").status_code == 200
            ready = stranger.get("/readyz")
            assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
            assert ready.headers["connection"] == "close"
            refused = stranger.post("/v1/chat/completions", json=CHAT)
        assert_error(refused, 503, code="shutting_down")
        assert int(refused.headers["retry-after"]) > 0
        assert refused.headers["connection"] == "close"
        assert len(server.engine.submitted) == 2
        assert read_to_end(stream).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        with whole:
            answer = response_of(whole)
            assert answer.status == 200
            assert answer.headers["connection"] == "close"
            assert json.loads(answer.read())["choices"][0]["finish_reason"] == "stop"
        server.wait_end(2)
        assert server.engine.is_stopped


@pytest.mark.covers("L01")
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/v1/messages", "/v1/moderations"])
def test_every_route_to_the_model_refuses_while_the_server_ends(path: str) -> None:
    bodies = {
        "/v1/completions": {"prompt": "a"},
        "/v1/responses": {"input": "a"},
        "/v1/messages": {**CHAT, "max_tokens": 2},
        "/v1/moderations": {"input": "a"},
    }
    with live_server() as server:
        server.runtime.takes_requests = False
        response = server.http.post(path, json=bodies[path])
        assert response.status_code == 503
        assert "retry-after" in response.headers
        assert "shutting down" in response.json()["error"]["message"]


def test_a_server_with_nothing_to_do_ends_at_once() -> None:
    with live_server() as server:
        with server.connect():  # an idle connection holds nothing up
            started = time.monotonic()
            server.drain()
            server.wait_end(5)
        assert time.monotonic() - started < 1.5


@pytest.mark.covers("L07")
def test_until_balancers_have_noticed_all_is_served_as_before() -> None:
    with live_server(shutdown_delay=0.6) as server:
        started = time.monotonic()
        server.drain()
        assert server.http.get("/readyz").status_code == 503
        answer = server.complete()
        assert answer.status_code == 200
        assert answer.headers["connection"] == "close"  # the next one comes to another server
        server.wait_end(5)
        assert time.monotonic() - started > 0.6


@pytest.mark.covers("L02", "H11")
def test_a_stream_that_outlasts_the_deadline_ends_with_an_error() -> None:
    with live_server(shutdown_timeout=0.3) as server:
        endless(server)
        stream, started = begun_stream(server, max_tokens=None), time.monotonic()
        server.drain()
        events = [line for line in read_to_end(stream).decode().splitlines() if line.startswith("data: ")]
        server.wait_end(5)
        assert 0.3 < time.monotonic() - started < 2.3
        assert events[-1] == "data: [DONE]"
        error = json.loads(events[-2][6:])["error"]
        assert (error["type"], error["code"]) == ("server_error", "shutting_down")
        assert not server.engine.running


@pytest.mark.covers("L02", "H11")
def test_streams_of_the_other_dialects_say_so_too() -> None:
    with live_server(shutdown_timeout=0.3) as server:
        endless(server)
        responses = begun_stream(server, "/v1/responses", input="ab", prompt=None, max_tokens=None)
        messages = begun_stream(server, "/v1/messages", **CHAT, prompt=None)
        server.drain()
        assert b"event: response.failed" in read_to_end(responses)
        assert b"event: error\ndata: " in read_to_end(messages)


@pytest.mark.covers("L02")
def test_whole_answers_that_outlast_the_deadline_become_errors() -> None:
    with live_server(shutdown_timeout=0.3) as server:
        endless(server)
        waiting = send_request(server, max_tokens=None)
        wait_until(lambda: len(server.engine.running) == 1)
        # One whose body is not complete has not come to the engine.
        late = server.connect()
        late.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        wait_until(lambda: server.http_server.num_in_flight == 2)
        server.drain()
        for sock in (waiting, late):
            with sock:
                answer = response_of(sock)
                assert answer.status == 503
                assert json.loads(answer.read())["error"]["code"] == "shutting_down"
                assert answer.headers["connection"] == "close"
        server.wait_end(5)
