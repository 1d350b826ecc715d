"""Requests that are meant to do harm: on every route, in every text, down to how their bytes arrive."""

from __future__ import annotations

import gzip
import http.client
import logging
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import httpx
import pytest

from tests.api.support import INSIDES, LiveServer, assert_error, chunks, fresh, live_server

JSON = {"content-type": "application/json"}
SURROGATE = "\\ud800"


@pytest.fixture(scope="module")
def _whole_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """With files and batches, and a context for any text."""
    with live_server(max_model_len=2_000_000, data_dir=tmp_path_factory.mktemp("data")) as live:
        yield live


@pytest.fixture
def whole_server(_whole_server: LiveServer) -> Iterator[LiveServer]:
    yield from fresh(_whole_server)


def json_routes(server: LiveServer) -> list[str]:
    """Every path that takes a JSON body."""
    paths = server.http.get("/openapi.json").json()["paths"]
    return [
        path
        for path, operations in paths.items()
        if "application/json" in operations.get("post", {}).get("requestBody", {}).get("content", {})
    ]


def assert_refused(response: httpx.Response, *statuses: int) -> None:
    assert response.status_code in statuses, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["message"]


@pytest.mark.covers("R01", "R02", "R03", "R04", "R05", "S16")
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"null",
        b"[]",
        b"5",
        b'{"model": NaN}',
        b'{"model": "x",}',
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"input": "\\ud800", "prompt": "\\ud800", "messages": "\\ud800"}',
        b'{"a":' * 100_000,
        b"\xef\xbb\xbf{}",
    ],
    ids=lambda body: str(body[:30]),
)
def test_no_route_takes_what_is_no_request(whole_server: LiveServer, body: bytes) -> None:
    routes = json_routes(whole_server)
    assert len(routes) >= 12
    for path in routes:
        assert_refused(whole_server.http.post(path, content=body, headers=JSON), 400)
    assert whole_server.engine.submitted == []


PLACES = {
    "/v1/chat/completions": [
        '{"messages": [{"role": "user", "content": "%s"}]}',
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": "%s"}]}]}',
        '{"messages": [{"role": "user", "content": "a", "name": "%s"}]}',
        '{"messages": [{"role": "user", "content": "a"}], "stop": ["%s"]}',
        '{"messages": [{"role": "user", "content": "a"}], "user": "%s"}',
        '{"messages": [{"role": "user", "content": "a"}], "bad_words": ["%s"]}',
        '{"messages": [{"role": "user", "content": "a"}], "guided_regex": "%s"}',
        '{"messages": [{"role": "user", "content": "a"}], "guided_json": {"const": "%s"}}',
        '{"messages": [{"role": "user", "content": "a"}], "cache_salt": "%s"}',
        '{"messages": [{"role": "user", "content": "a"}],'
        ' "tools": [{"type": "function", "function": {"name": "f", "description": "%s"}}]}',
        '{"messages": [{"role": "assistant", "content": "", "tool_calls":'
        ' [{"id": "1", "function": {"name": "f", "arguments": "%s"}}]}]}',
    ],
    "/v1/completions": ['{"prompt": "%s"}', '{"prompt": ["a", "%s"]}', '{"prompt": "a", "suffix": "%s"}'],
    "/v1/responses": ['{"input": "%s"}', '{"input": "a", "instructions": "%s"}'],
    "/v1/messages": [
        '{"max_tokens": 1, "messages": [{"role": "user", "content": "%s"}]}',
        '{"max_tokens": 1, "messages": [{"role": "user", "content": "a"}], "stop_sequences": ["%s"]}',
    ],
}


@pytest.mark.covers("R05")
@pytest.mark.parametrize(("path", "body"), [(path, body) for path, bodies in PLACES.items() for body in bodies])
def test_half_a_character_is_refused_in_every_text_before_a_stream_begins(
    server: LiveServer, path: str, body: str
) -> None:
    for stream in ("", '"stream": true, '):
        text = "{" + stream + body.replace("%s", "a" + SURROGATE)[1:]
        assert_refused(server.http.post(path, content=text, headers=JSON), 400)
    assert server.engine.submitted == []


@pytest.mark.covers("R06")
@pytest.mark.parametrize("text", ["\u0301" * 50_000, "\0\u2028\u202e\u200d" * 10_000])
def test_much_unusual_text_comes_back_as_it_went(whole_server: LiveServer, text: str) -> None:
    ids = whole_server.http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    back = whole_server.http.post("/detokenize", json={"tokens": ids["tokens"]}).json()
    assert back == {"prompt": text}


@pytest.mark.covers("R06")
@pytest.mark.parametrize(
    "text", ["\0a\u2028b", "\u202eabc\u200d", "a\u0301\u0301", "👨‍👩‍👧\ufeff", "\r\n\r\ndata: [DONE]\n\n"]
)
def test_a_stream_of_unusual_text_is_the_whole_text(server: LiveServer, text: str) -> None:
    server.script.text = text
    (choice,) = server.chat().json()["choices"]
    assert choice["message"]["content"] == text
    deltas = [each["choices"][0]["delta"] for each in chunks(server.chat(stream=True))]
    assert "".join(delta.get("content", "") for delta in deltas) == text


@pytest.mark.covers("R08")
def test_a_compressed_body_is_not_unpacked_whatever_the_route(whole_server: LiveServer) -> None:
    bomb = gzip.compress(b" " * 5_000_000)
    for path in json_routes(whole_server):
        for encoding in ("gzip", "deflate", "br", "gzip, identity"):
            headers = {**JSON, "content-encoding": encoding}
            assert_refused(whole_server.http.post(path, content=bomb, headers=headers), 415)


@pytest.mark.covers("R08")
def test_a_client_that_asks_before_it_sends_is_told_to_go_on(server: LiveServer) -> None:
    body = b'{"prompt": "ab"}'
    with server.connect() as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        assert sock.recv(1024).startswith(b"HTTP/1.1 100")
        sock.sendall(body)
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        assert answer.status == 200


@pytest.mark.covers("R09")
def test_no_route_takes_a_form_for_json(whole_server: LiveServer) -> None:
    for path in json_routes(whole_server):
        for options in ({"data": {"prompt": "a"}}, {"files": {"prompt": b"a"}}):
            assert_refused(whole_server.http.post(path, **options), 415)  # type: ignore[arg-type]


@pytest.mark.covers("R10")
@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "PROPFIND", "get", "\u00e9"])
def test_an_unheard_of_method_does_nothing(server: LiveServer, method: str) -> None:
    for target in ("/v1/chat/completions", "/v1/models", "*"):
        with server.connect() as sock:
            sock.sendall(f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            status = sock.recv(4096).split(b" ")[1]
        assert status in (b"400", b"404", b"405")
    assert server.engine.submitted == []


@pytest.mark.covers("R11", "S24")
def test_no_name_that_a_client_chooses_becomes_a_series(server: LiveServer) -> None:
    def series() -> set[str]:
        lines = server.http.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}

    def ask(name: str) -> None:
        headers = {"x-request-id": name}
        body = {"prompt": "a", "user": name, "metadata": {name: name}, name: 1, "max_tokens": 1}
        server.http.post("/v1/completions", json={**body, "model": name}, headers=headers)
        server.http.post("/v1/completions", json=body, headers=headers)
        server.http.get(f"/{name}")
        server.http.request(name, "/v1/models")

    ask("once")
    series()
    before = series()
    for number in range(20):
        ask(f"CANARY{number}")
    assert series() == before
    assert "CANARY" not in "".join(before)


@pytest.mark.covers("S24")
def test_marks_of_a_person_are_not_logged(server: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    marks = {
        "user": "CANARY",
        "metadata": {"CANARY": "CANARY"},
        "safety_identifier": "CANARY",
        "prompt_cache_key": "CANARY",
        "cache_salt": "CANARY",
    }
    with caplog.at_level(logging.DEBUG):
        assert server.chat("CANARY", **marks).status_code == 200
        assert server.chat("CANARY", stream=True, **marks).status_code == 200
        assert_error(server.chat("CANARY", temperature=9, **marks), 400)
    logged = [
        record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))
    ]
    assert logged
    assert "CANARY" not in "\n".join(logged)


@pytest.mark.covers("R12")
def test_ten_thousand_messages_are_read(whole_server: LiveServer) -> None:
    messages = [{"role": role, "content": f"m{i}"} for i, role in enumerate(("user", "assistant") * 5000)]
    response = whole_server.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    assert response.status_code == 200
    (request,) = whole_server.engine.submitted
    assert len(request.prompt_token_ids) > 60_000


@pytest.mark.covers("S23")
def test_a_name_is_not_repeated_until_memory_ends(whole_server: LiveServer) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f" * 200_000, "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": "1", "content": ""}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}, *[result] * 9000]
    assert_error(
        whole_server.http.post("/v1/chat/completions", json={"messages": messages}),
        400,
        param="messages[0].tool_calls[0].function.name",
    )


@pytest.mark.covers("S05")
@pytest.mark.parametrize(
    "name", ["..%2f..%2fsecret", "%2e%2e/secret", "/etc/passwd", "%00", "a%0d%0ab", "file-%2e%2e", "%ff%fe"]
)
def test_no_name_in_a_path_reaches_a_file(whole_server: LiveServer, name: str) -> None:
    data = whole_server.runtime.config.data_dir
    assert data is not None
    secret = Path(data).parent / "secret"
    secret.write_text("SECRET")
    for target in (
        f"/v1/models/{name}",
        f"/v1/files/{name}",
        f"/v1/files/{name}/content",
        f"/v1/batches/{name}",
    ):
        for method in ("GET", "DELETE"):
            with whole_server.connect() as sock:
                sock.sendall(
                    f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
                )
                answer = b"".join(iter(lambda: sock.recv(65536), b""))
            assert answer.split(b" ")[1] in (b"404", b"405"), answer
            assert b"SECRET" not in answer
            assert not set(INSIDES.findall(answer.decode())) - set(INSIDES.findall(unquote(target)))
    body = {"input_file_id": f"../{secret.name}", "endpoint": "/v1/completions", "completion_window": "24h"}
    assert_refused(whole_server.http.post("/v1/batches", json=body), 404)
    assert secret.read_text() == "SECRET"
