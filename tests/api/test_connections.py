"""Clients that are slow, many or rude, each on connections of its own."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvloop

from tests.api.loop_probe import LoopMeter
from tests.api.raw_http import GET, is_closed, post, response_of, send_request
from tests.api.support import LiveServer, live_server, wait_until


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveServer]:
    """A server that waits for tenths of seconds where others wait for tens."""
    monkeypatch.setattr("server.http_connection.HEADER_SECONDS", 0.3)
    monkeypatch.setattr("server.http_server.KEEP_ALIVE_SECONDS", 0.6)
    monkeypatch.setattr("server.http_connection.SEND_SECONDS", 0.3)
    with live_server(max_model_len=50_000_000) as live:
        yield live


@pytest.mark.covers("H02")
def test_headers_that_trickle_in_are_given_up(impatient: LiveServer) -> None:
    with impatient.connect() as sock:
        started = time.monotonic()
        over = threading.Event()

        def trickle() -> None:
            for byte in GET[:-2]:
                if over.wait(0.02):
                    return
                try:
                    sock.sendall(bytes([byte]))
                except OSError:
                    return

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            answer = response_of(sock)
            assert answer.status == 408
            assert json.loads(answer.read())["error"]["code"] == "request_timeout"
            assert 0.2 < time.monotonic() - started < 2
        finally:
            over.set()
            thread.join()
        assert is_closed(sock)


@pytest.mark.covers("H02")
def test_a_connection_without_a_request_is_closed(impatient: LiveServer) -> None:
    with impatient.connect() as sock:
        sock.settimeout(3)
        assert sock.recv(100) == b""


@pytest.mark.covers("H02")
def test_the_second_request_of_a_connection_has_to_hurry_too(impatient: LiveServer) -> None:
    with impatient.connect() as sock:
        sock.sendall(GET)
        answer = response_of(sock)
        assert answer.status == 200
        answer.read()
        time.sleep(0.4)  # longer than headers may take, and not as long as a connection may be idle
        sock.sendall(GET[:10])
        assert response_of(sock).status == 408


@pytest.mark.covers("H02")
@pytest.mark.parametrize("header", [b"Content-Length: 1000000", b"Transfer-Encoding: chunked"])
def test_a_body_that_trickles_in_behind_its_answer_is_given_up(impatient: LiveServer, header: bytes) -> None:
    with impatient.connect() as sock:
        sock.sendall(b"POST /nope HTTP/1.1\r\nHost: localhost\r\n" + header + b"\r\n\r\n")
        answer = response_of(sock)
        assert answer.status == 404
        answer.read()
        sock.sendall(b"9")
        sock.settimeout(3)
        assert sock.recv(100) == b""


@pytest.mark.covers("H12")
def test_whose_request_is_answered_makes_room_even_if_its_body_goes_on() -> None:
    with live_server() as server:
        server.http_server.connections.most = 1
        with server.connect() as sock:
            sock.sendall(post("/nope", b"9", announced=1_000_000))
            assert response_of(sock).status == 404
            with server.connect() as other:
                other.sendall(GET)
                assert response_of(other).status == 200
            assert is_closed(sock)


def test_an_idle_connection_is_kept_and_in_the_end_closed(impatient: LiveServer) -> None:
    with impatient.connect() as sock:
        sock.settimeout(3)
        sock.sendall(GET)
        response_of(sock).read()
        time.sleep(0.4)
        sock.sendall(GET)
        response_of(sock).read()
        assert is_closed(sock)


@pytest.mark.covers("H02", "H12")
def test_hundreds_of_slow_connections_do_not_slow_others_down(server: LiveServer) -> None:
    slow = [server.connect() for _ in range(300)]
    try:
        for sock in slow:
            sock.sendall(b"GET /livez HTTP/1.1\r\nHost: loc")
        seconds = []
        for _ in range(50):
            started = time.monotonic()
            assert server.http.get("/livez").status_code == 200
            seconds.append(time.monotonic() - started)
        assert sorted(seconds)[47] < 0.1
    finally:
        for sock in slow:
            sock.close()


@pytest.mark.covers("H12")
def test_one_connection_too_many_takes_the_place_of_the_one_that_waited_longest() -> None:
    with live_server() as server:
        server.http_server.connections.most = 10
        idle = [server.connect() for _ in range(10)]
        with httpx.Client(base_url=server.url) as client:
            assert client.get("/livez").status_code == 200
            idle[0].settimeout(5)
            assert is_closed(idle[0])
            idle[-1].sendall(GET)
            assert response_of(idle[-1]).status == 200
        for sock in idle:
            sock.close()


@pytest.mark.covers("H12")
def test_one_connection_too_many_is_refused_while_all_others_are_busy() -> None:
    with live_server() as server:
        server.script.delay, server.script.ends_with_stop = 0.05, False
        server.http_server.connections.most = 5
        busy = [send_request(server, stream=True, max_tokens=None) for _ in range(5)]
        wait_until(lambda: len(server.engine.running) == 5)
        with server.connect() as sock:
            answer = response_of(sock)
            assert answer.status == 503
            assert json.loads(answer.read())["error"]["code"] == "too_many_connections"
            assert int(answer.headers["retry-after"]) > 0
        for sock in busy:
            sock.close()
        wait_until(lambda: not server.engine.running)
        assert server.complete().status_code == 200


def unread(server: LiveServer) -> socket.socket:
    """A connection whose client takes in next to nothing."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    sock.settimeout(20)
    sock.connect(("127.0.0.1", server.port))
    return sock


@pytest.mark.covers("H03")
def test_a_stream_that_nobody_reads_is_cut_off_and_aborted(impatient: LiveServer) -> None:
    impatient.script.ends_with_stop = False
    # Many bytes for each token, to fill the system's buffers.
    many = {"logprobs": 1, "logprob_token_ids": list(range(200)), "stream": True, "max_tokens": 40_000_000}
    with unread(impatient) as sock:
        sock.sendall(post("/v1/completions", json.dumps({"prompt": "a", **many}).encode()))
        wait_until(lambda: bool(impatient.engine.running))
        most = 0

        def is_over() -> bool:
            nonlocal most
            connections = list(impatient.http_server.server_state.connections)
            sizes = [connection.transport.get_write_buffer_size() for connection in connections]
            most = max([most, *sizes])
            return not impatient.engine.running

        wait_until(is_over)
        assert 0 < most < 200_000
    assert impatient.complete().status_code == 200
    assert impatient.metric("gemma_client_disconnects_total") == 1


@pytest.mark.covers("H03", "H12")
def test_answers_that_nobody_reads_are_cut_off(impatient: LiveServer) -> None:
    with unread(impatient) as sock:
        # One answer at a time is written: the next request waits until the one before is on its way.
        sock.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500)
        wait_until(lambda: len(impatient.http_server.server_state.connections) == 1)
        wait_until(lambda: not impatient.http_server.server_state.connections)
    assert impatient.http.get("/livez").status_code == 200


@pytest.mark.covers("H03")
def test_a_client_that_reads_slowly_gets_all(impatient: LiveServer) -> None:
    with unread(impatient) as sock:
        sock.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        data = b""
        while received := sock.recv(2000):
            data += received
            time.sleep(0.003)
    body = data.partition(b"\r\n\r\n")[2]
    assert json.loads(body)["info"]["title"] == "gemma-server"


@pytest.mark.covers("R07")
def test_a_body_in_tiny_chunks_is_read_and_holds_up_nobody(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = b'{"prompt": "' + b"a" * 40_000 + b'"}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    meter = LoopMeter(monkeypatch)
    with server.connect() as sock:
        sock.sendall(head + chunks)
        answer = response_of(sock)
        assert answer.status == 400
        assert "40000 characters" in json.loads(answer.read())["error"]["message"]
    assert 0 < meter.worst < 0.1  # all of it takes several times as long


@pytest.mark.covers("R07", "H04")
def test_a_body_that_comes_after_its_answer_holds_up_nobody() -> None:
    late, next_one = b"x" * 10_000, b"x" * 1_000_000
    # What users run on: asyncio's own loop does not read between two of its turns.
    with live_server(make_loop=uvloop.new_event_loop) as server, server.connect() as sock:
        sock.sendall(post("/nope", b"", announced=len(late)))
        answer = response_of(sock)
        assert answer.status == 404
        answer.read()
        sock.sendall(late + post("/nope", next_one) + GET)
        statuses = []
        for _ in range(2):
            answer = response_of(sock)
            answer.read()
            statuses.append(answer.status)
        assert statuses == [404, 200]
        assert server.complete().status_code == 200


@pytest.mark.covers("H04")
@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nbad header\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
        post("/v1/completions", b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"zz\r\n",
    ],
    ids=lambda request_bytes: str(request_bytes[:50]),
)
def test_what_is_no_http_gets_an_error_in_the_usual_shape(server: LiveServer, request_bytes: bytes) -> None:
    with server.connect() as sock:
        sock.sendall(request_bytes)
        answer = response_of(sock)
        assert answer.status == 400
        assert json.loads(answer.read())["error"]["code"] == "invalid_http"
        assert is_closed(sock)


@pytest.mark.covers("H04")
def test_a_body_with_two_lengths_is_no_second_request(server: LiveServer) -> None:
    smuggled = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with server.connect() as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
            b"Content-Length: %d\r\n\r\n0\r\n\r\n" % (5 + len(smuggled)) + smuggled
        )
        sock.settimeout(0.3)
        data = b""
        try:
            while received := sock.recv(65536):
                data += received
        except TimeoutError:
            pass
    # Whichever of the two counts, no answer is mixed into another's.
    assert b"HTTP/1.1 400" in data or data.count(b"HTTP/1.1 ") == 2
    assert server.complete().status_code == 200


@pytest.mark.covers("H01")
def test_thousands_of_headers_are_refused(server: LiveServer) -> None:
    with server.connect() as sock:
        sock.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"X: 1\r\n" * 20_000)
        assert response_of(sock).status == 400
