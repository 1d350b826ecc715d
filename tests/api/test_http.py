"""Bodies, paths, ids and keys, down to the bytes."""

from __future__ import annotations

import http.client
import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.api.auth import OPEN_PATHS
from tests.api.support import LiveServer, assert_error, live_server, wait_until

PATHS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]
JSON = {"content-type": "application/json"}


# --- bodies ------------------------------------------------------------------------------------------------


@pytest.mark.covers("R01", "R02", "R03", "R04", "R05")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"5",
        b'"x"',
        b"{",
        b'{"prompt": "a",}',
        b'{"prompt": NaN}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": -Infinity}',
        b'\xef\xbb\xbf{"prompt": "a"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\udc00x"}',
        b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        b'{"prompt": "a", "stop": "\\ud800"}',
        b'{"\\ud800": 1, "prompt": "a"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "a", "seed": ' + b"9" * 1_000_000 + b"}",
    ],
    ids=lambda body: str(body[:40]),
)
def test_what_is_no_json_object_is_refused(server: LiveServer, path: str, body: bytes) -> None:
    started = time.monotonic()
    assert_error(server.http.post(path, content=body, headers=JSON), 400)
    assert time.monotonic() - started < 5


@pytest.mark.covers("R02")
def test_a_number_beyond_floats_is_refused_like_infinity(server: LiveServer) -> None:
    body = b'{"prompt": "a", "temperature": 1e400}'
    response = server.http.post("/v1/completions", content=body, headers=JSON)
    assert_error(response, 400, param="temperature")


@pytest.mark.covers("R02")
def test_of_duplicate_keys_the_last_counts(server: LiveServer) -> None:
    body = b'{"prompt": "a", "max_tokens": 0, "max_tokens": 3}'
    assert server.http.post("/v1/completions", content=body, headers=JSON).status_code == 200
    assert server.engine.submitted[0].params.max_tokens == 3


@pytest.mark.covers("R09")
@pytest.mark.parametrize("media_type", ["text/plain", "multipart/form-data; boundary=x", "application/x-json5"])
def test_another_content_type_is_refused(server: LiveServer, media_type: str) -> None:
    response = server.http.post(
        "/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": media_type}
    )
    assert_error(response, 415, code="unsupported_media_type")


@pytest.mark.parametrize("headers", [{}, {"content-type": "Application/JSON; charset=utf-8"}])
def test_json_may_be_called_so_or_go_without_a_type(server: LiveServer, headers: dict[str, str]) -> None:
    assert server.http.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers).status_code == 200


@pytest.mark.covers("R08")
def test_a_compressed_body_is_refused(server: LiveServer) -> None:
    headers = {**JSON, "content-encoding": "gzip"}
    assert_error(server.http.post("/v1/completions", content=b"\x1f\x8b", headers=headers), 415)


@pytest.fixture(scope="module")
def small() -> Iterator[LiveServer]:
    with live_server(max_body_bytes=5000, api_key=["first-key", "second-key"], disable_access_log=True) as live:
        live.http.headers["authorization"] = "Bearer second-key"
        yield live


@pytest.mark.covers("R07")
def test_a_body_over_the_limit_is_refused_by_its_header(small: LiveServer) -> None:
    assert "5000" in assert_error(small.complete("a" * 5000), 413, code="body_too_large")
    assert_error(small.complete("a" * 4900), 400, code="context_length_exceeded")


@pytest.mark.covers("R07")
def test_a_body_over_the_limit_is_refused_without_its_length_and_the_rest_unread(small: LiveServer) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 1 << 30:
            sent += 1 << 16
            yield b" " * (1 << 16)

    try:
        response = small.http.post("/v1/completions", content=endless(), headers=JSON)
        assert_error(response, 413, code="body_too_large")
        assert response.headers["connection"] == "close"
    except (httpx.WriteError, httpx.ReadError):
        pass  # the server had closed the connection before the client read the answer
    assert sent < 1 << 28


@pytest.mark.covers("R08")
def test_a_length_that_lies_harms_nobody(server: LiveServer) -> None:
    with server.connect() as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b'Content-Length: 500\r\n\r\n{"prompt": "a"}'
        )
    with (
        server.connect() as sock
    ):  # what follows the given length is another request, and none that makes sense
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b'Content-Length: 5\r\n\r\n{"prompt": "a"}'
        )
        assert b" 400 " in sock.recv(4096).partition(b"\r\n")[0]
    assert server.complete().status_code == 200


@pytest.mark.covers("R08", "H02")
def test_a_body_that_does_not_come_is_given_up(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.body.BODY_SECONDS", 0.05)
    with server.connect() as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        assert answer.status == 408
        assert json.loads(answer.read())["error"]["code"] == "request_timeout"


# --- paths and methods -------------------------------------------------------------------------------------


@pytest.mark.covers("R10")
@pytest.mark.parametrize(
    "path",
    ["/", "/nope", "/v1", "//v1/models", "/V1/models", "/v1/models/", "/v1/chat/completions/", "/v1/%2e%2e/x"],
)
def test_an_unknown_path_is_a_404_in_openai_s_shape(server: LiveServer, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", path)  # as it is: httpx would normalise it
    answer = connection.getresponse()
    assert answer.status == 404
    assert set(json.loads(answer.read())["error"]) == {"message", "type", "param", "code"}
    connection.close()


@pytest.mark.covers("R10")
def test_another_method_is_a_405_that_names_the_right_one(server: LiveServer) -> None:
    response = server.http.get("/v1/chat/completions")
    assert_error(response, 405)
    assert response.headers["allow"] == "POST"
    assert_error(server.http.post("/v1/models"), 405)


@pytest.mark.covers("H13")
def test_options_get_no_cors_headers(server: LiveServer) -> None:
    response = server.http.options("/v1/models", headers={"origin": "https://evil.example"})
    assert response.status_code == 405
    assert not any(name.startswith("access-control") for name in response.headers)


def test_the_document_describes_the_bodies(server: LiveServer) -> None:
    assert server.http.get("/docs").status_code == 200
    document = server.http.get("/openapi.json").json()
    route = document["paths"]["/v1/chat/completions"]["post"]
    name = route["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    temperature = document["components"]["schemas"][name]["properties"]["temperature"]
    assert temperature["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 2}
    assert temperature["description"]
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert references <= set(document["components"]["schemas"])


# --- request ids and logs ----------------------------------------------------------------------------------


@pytest.mark.covers("H08")
@pytest.mark.parametrize("request_id", ["abc-1", "A" * 128, "trace/1:2=3+4@x._"])
def test_a_plain_request_id_is_echoed_but_never_the_engine_s(server: LiveServer, request_id: str) -> None:
    for _ in range(2):
        response = server.http.post(
            "/v1/completions", json={"prompt": "a"}, headers={"x-request-id": request_id}
        )
        assert response.headers["x-request-id"] == request_id
        assert response.headers.get_list("x-request-id") == [request_id]
    first, second = (request.request_id for request in server.engine.submitted)
    assert len({first, second, request_id}) == 3


@pytest.mark.covers("H08")
@pytest.mark.parametrize("request_id", ["A" * 129, "a b", "a;b", '"', ""])
def test_another_request_id_is_replaced(server: LiveServer, request_id: str) -> None:
    response = server.http.get("/version", headers={"x-request-id": request_id})
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


def test_errors_and_streams_carry_a_request_id(server: LiveServer) -> None:
    for response in (server.http.get("/nope"), server.complete(n=0), server.chat(stream=True)):
        assert response.headers["x-request-id"]


@pytest.mark.covers("S14", "S24")
def test_the_access_log_has_no_prompt_no_query_and_one_line(
    server: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    def lines() -> list[str]:
        ours = [record.getMessage() for record in caplog.records if record.name == "server.access"]
        return [line for line in ours if line.endswith((" ms one", " ms two"))]

    with caplog.at_level(logging.DEBUG):
        body = {"messages": [{"role": "user", "content": "CANARY"}], "user": "CANARY", "stream": True}
        server.http.post("/v1/chat/completions", json=body, headers={"x-request-id": "one"})
        server.http.get("/x%0a%1b[31m?q=CANARY", headers={"authorization": "CANARY", "x-request-id": "two"})
        wait_until(lambda: len(lines()) == 2)  # written after the answer is sent
    # A stream's line may come after that of the next request.
    first, second = sorted(lines(), key=lambda line: line.endswith(" two"))
    assert re.fullmatch(r"POST /v1/chat/completions 200 [\d.]+ ms one", first)
    assert re.fullmatch(r"GET /x%0A%1B%5B31m 404 [\d.]+ ms two", second)
    logged = [
        record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))
    ]
    assert "CANARY" not in "\n".join(logged)


# --- keys --------------------------------------------------------------------------------------------------


def paths_of(live: LiveServer) -> list[str]:
    document = live.http.get("/openapi.json").json()
    return [*document["paths"], "/docs", "/redoc", "/openapi.json", "/nope", "/", "/v1/models/x/y"]


@pytest.mark.covers("S01", "H15")
def test_every_path_but_probes_and_metrics_needs_a_key(small: LiveServer) -> None:
    paths = paths_of(small)
    assert set(paths) >= OPEN_PATHS
    with httpx.Client(base_url=small.url) as stranger:
        for path in paths:
            for method in ("GET", "POST", "OPTIONS", "HEAD"):
                response = stranger.request(method, path)
                if path in OPEN_PATHS:
                    assert response.status_code in (200, 405), path
                    continue
                assert response.status_code == 401, path
                assert response.headers["www-authenticate"] == "Bearer"
                if path.startswith("/v1/messages"):
                    continue  # its errors have a shape of their own
                if method != "HEAD":
                    assert_error(response, 401, code="invalid_api_key")


@pytest.mark.covers("S01", "H14")
@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "Bearer wrong")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer ,")],
        [("authorization", "")],
        [("authorization", "first-key")],
        [("authorization", "Basic first-key")],
        [("authorization", "Bearer first-ke")],
        [("authorization", "Bearer first-key2")],
        [("authorization", "Bearer first-key"), ("authorization", "Bearer first-key")],
        [("x-api-key", "first-key")],
        [("host", "x/health?")],
        [("host", "x/livez")],
        [("x-original-url", "/livez"), ("x-forwarded-prefix", "/livez")],
    ],
)
def test_no_other_way_in_than_a_key(small: LiveServer, headers: list[tuple[str, str]]) -> None:
    with httpx.Client(base_url=small.url) as stranger:
        assert stranger.get("/v1/models?key=first-key", headers=headers).status_code == 401


@pytest.mark.covers("S01")
def test_an_empty_key_locks_the_server_rather_than_opening_it() -> None:
    with live_server(api_key=[""]) as server:
        assert server.http.get("/v1/models").status_code == 401
        assert server.http.get("/v1/models", headers={"authorization": "Bearer"}).status_code == 401


@pytest.mark.covers("S01")
@pytest.mark.parametrize("value", ["Bearer first-key", "bearer second-key", "BEARER  first-key"])
def test_each_key_lets_in(small: LiveServer, value: str) -> None:
    with httpx.Client(base_url=small.url) as client:
        assert client.get("/v1/models", headers={"authorization": value}).status_code == 200


@pytest.mark.covers("S01", "R10")
@pytest.mark.parametrize(
    "target", ["/livez/../v1/models", "//livez", "/livez/", "/LIVEZ", "/livez%2f..%2fv1/models"]
)
def test_a_path_that_looks_open_is_not(small: LiveServer, target: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", small.port)
    connection.request("GET", target)
    assert connection.getresponse().status == 401
    connection.close()


@pytest.mark.covers("S10")
def test_keys_do_not_share_cached_prefixes(small: LiveServer) -> None:
    small.engine.submitted.clear()

    def salt_of(key: str, **fields: Any) -> str:
        headers = {"authorization": f"Bearer {key}"}
        assert (
            small.http.post("/v1/completions", json={"prompt": "a", **fields}, headers=headers).status_code
            == 200
        )
        return small.engine.submitted[-1].cache_salt

    first, second = salt_of("first-key"), salt_of("second-key")
    assert first == salt_of("first-key")
    assert (
        len({first, second, salt_of("first-key", cache_salt="s"), salt_of("second-key", cache_salt="s")}) == 4
    )
    assert "key" not in first


def test_without_keys_all_share_prefixes_but_for_the_request_s_salt(server: LiveServer) -> None:
    server.complete()
    server.complete(cache_salt="s")
    assert [request.cache_salt for request in server.engine.submitted] == ["", "/s"]


# --- connections -------------------------------------------------------------------------------------------


@pytest.mark.covers("H12")
def test_pipelined_requests_are_answered_in_order(server: LiveServer) -> None:
    host = b"HTTP/1.1\r\nHost: localhost\r\n\r\n"
    request = b"GET /v1/models/tiny " + host + b"GET /version " + host
    with server.connect() as sock:
        sock.sendall(request)
        data = b""
        while data.count(b"HTTP/1.1 200") < 2 or b'"version"' not in data:
            received = sock.recv(4096)
            assert received
            data += received
    assert data.index(b'"tiny"') < data.index(b'"version"')


@pytest.mark.parametrize("junk", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET /\r\n", b"\r\n" * 10, b"A" * 100_000])
def test_junk_harms_nobody(server: LiveServer, junk: bytes) -> None:
    with server.connect() as sock:
        sock.sendall(junk)
        sock.shutdown(socket.SHUT_WR)
    assert server.complete().status_code == 200


@pytest.mark.covers("H01")
def test_headers_have_a_bound(server: LiveServer) -> None:
    with server.connect() as sock:
        sock.settimeout(10)
        sock.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000)
        assert sock.recv(4096).startswith(b"HTTP/1.1 400")


def test_the_body_of_a_request_that_offers_http_2_is_read(server: LiveServer) -> None:
    # Java's HttpClient offers it with every request that is not encrypted.
    offer = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAEAAEAAAAIAAAAA"}
    assert server.http.post("/v1/completions", json={"prompt": "ab"}, headers=offer).status_code == 200


def test_a_client_that_leaves_within_its_body_harms_nobody(server: LiveServer) -> None:
    for _ in range(20):
        with server.connect() as sock:
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    series = 'gemma_http_requests_total{code="499",route="/v1/completions"}'
    wait_until(lambda: server.metric(series) >= 20)
