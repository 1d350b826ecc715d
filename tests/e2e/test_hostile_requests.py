"""What clients may do to a real server and its engine: afterwards it says what it said before, and nothing is
left behind."""

from __future__ import annotations

import http.server
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.server_process import ServerProcess
from tests.tiny_checkpoint import CONTEXT

CANARY = {"prompt": "canary abc", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
MB = 1 << 20


def ask_canary(server: ServerProcess) -> str:
    started = time.monotonic()
    with server.client() as client:
        response = client.post("/v1/completions", json=CANARY)
    assert response.status_code == 200, response.text
    assert time.monotonic() - started < 2
    text: str = response.json()["choices"][0]["text"]
    return text


@pytest.fixture
def alive(server: ServerProcess) -> Iterator[ServerProcess]:
    """After the test the same engine says the same, and holds nothing."""
    engine, text = server.engine.pid, ask_canary(server)
    yield server
    assert ask_canary(server) == text
    assert server.engine.pid == engine
    server.wait_metric("vllm:num_requests_running", 0)
    server.wait_metric("vllm:num_requests_waiting", 0)
    server.wait_metric("vllm:kv_cache_usage_perc", 0)


def memory(server: ServerProcess) -> int:
    """Bytes that the front and its children hold."""
    front = psutil.Process(server.process.pid)
    return sum(process.memory_info().rss for process in (front, *front.children(recursive=True)))


@pytest.mark.covers("R07")
def test_a_body_without_end_takes_no_memory(alive: ServerProcess) -> None:
    host, port = alive.url.removeprefix("http://").split(":")
    before = memory(alive)
    highest = before
    with socket.create_connection((host, int(port))) as sock:
        sock.settimeout(5)
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"100000\r\n" + b" " * MB + b"\r\n"
        try:
            for _ in range(1024):
                sock.sendall(chunk)
                highest = max(highest, memory(alive))
        except OSError:
            pass  # closed, as it should be
        else:
            pytest.fail("a gigabyte was taken")
    assert highest - before < 100 * MB


@pytest.mark.covers("R15")
def test_an_empty_prompt_begins_with_bos(alive: ServerProcess) -> None:
    with alive.client() as client:
        for prompt in ("", [""], ["", "a"]):
            body = {"prompt": prompt, "max_tokens": 2, "temperature": 0}
            response = client.post("/v1/completions", json=body)
            assert response.status_code == 200
            assert all(choice["text"] for choice in response.json()["choices"])


GREEDY: list[dict[str, Any]] = [
    {"temperature": 1e-300},
    {"temperature": 5e-324},
    {"temperature": 2, "top_k": 1},
    {"temperature": 2, "min_p": 1},
    {"temperature": 2, "top_p": 1e-300},
    {"temperature": 0, "top_k": 10**18, "top_p": 1, "min_p": 0},
]
EXTREME: list[dict[str, Any]] = [
    {"temperature": 2, "presence_penalty": -2, "frequency_penalty": -2, "repetition_penalty": 0.01},
    {"temperature": 2, "presence_penalty": 2, "frequency_penalty": 2, "repetition_penalty": 2},
    {"temperature": 2, "logit_bias": {str(each): -100 for each in range(300)}},
    {"temperature": 1e-300, "logit_bias": {"20": 100}},
    {"bad_words": [" ", "   ", "a", "\0"]},
]


@pytest.mark.covers("R21")
def test_the_ends_of_every_range_give_an_answer(alive: ServerProcess) -> None:
    greedy = ask_canary(alive)
    with alive.client() as client:
        for fields in [*GREEDY, *EXTREME]:
            response = client.post("/v1/completions", json={**CANARY, "logprobs": 2, "seed": 1, **fields})
            assert response.status_code == 200, response.text
            (choice,) = json.loads(response.text, parse_constant=pytest.fail)["choices"]
            assert choice["finish_reason"] == "length"
            assert all(logprob <= 0 for logprob in choice["logprobs"]["token_logprobs"])
            assert fields not in GREEDY or choice["text"] == greedy, fields


@contextmanager
def trap() -> Iterator[tuple[str, list[str]]]:
    """The address of a server that nobody should ask, and what it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_POST = do_HEAD = do_PUT = do_GET

        def log_message(self, format: str, *args: Any) -> None: ...

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.server_port}", asked
    finally:
        listener.shutdown()
        thread.join()
        listener.server_close()


@pytest.mark.covers("S17")
def test_the_server_fetches_nothing_that_a_request_names(alive: ServerProcess) -> None:
    with trap() as (url, asked), alive.client() as client:
        user = {"role": "user", "content": f"![x]({url}/markdown) <img src='{url}/html'>"}
        image = {"type": "image_url", "image_url": {"url": f"{url}/image"}}
        grammar = f'%import "{url}/lark" (x)\nstart: x'

        def part(**fields: str) -> dict[str, Any]:
            return {"input": [{"role": "user", "content": [fields]}]}

        bodies: list[tuple[str, dict[str, Any]]] = [
            ("/v1/chat/completions", {"messages": [user], "max_tokens": 1}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": [image]}]}),
            ("/v1/chat/completions", {"messages": [user], "model": f"{url}/model"}),
            ("/v1/chat/completions", {"messages": [user], "lora_path": f"{url}/lora"}),
            ("/v1/chat/completions", {"messages": [user], "guided_json": {"$ref": f"{url}/schema"}}),
            ("/v1/chat/completions", {"messages": [user], "guided_json": {"$schema": f"{url}/meta"}}),
            ("/v1/chat/completions", {"messages": [user], "guided_json": {"$id": f"{url}/x", "$ref": "y"}}),
            ("/v1/chat/completions", {"messages": [user], "guided_grammar": grammar}),
            ("/v1/completions", {"prompt": f"{url}/prompt", "max_tokens": 1}),
            ("/v1/responses", part(type="input_image", image_url=url)),
            ("/v1/responses", {"input": "a", "tools": [{"type": "mcp", "server_url": f"{url}/mcp"}]}),
            ("/v1/responses", part(type="input_file", file_url=url)),
            ("/v1/messages", {"messages": [user], "max_tokens": 1, "mcp_servers": [{"url": f"{url}/mcp"}]}),
        ]  # fmt: skip
        answered = [client.post(path, json=body).status_code for path, body in bodies]
    assert set(answered) <= {200, 400, 404}
    assert answered[0] == 200
    assert asked == []


@pytest.mark.covers("S11")
def test_what_one_client_wrote_shows_in_no_other_client_s_output(alive: ServerProcess) -> None:
    prompts = [f"tell me about {word}" for word in ("rivers", "stones", "the sea")]
    with alive.client() as client:

        def outputs() -> list[str]:
            answers = [client.post("/v1/completions", json={**CANARY, "prompt": each}) for each in prompts]
            return [answer.json()["choices"][0]["text"] for answer in answers]

        before = outputs()
        for number in range(8):
            # As long as theirs and longer, so that the same blocks change hands.
            body = {"prompt": f"tell me zebra{number:04} " * (1 + number), "max_tokens": 8, "n": 4}
            assert client.post("/v1/completions", json=body).status_code == 200
            after = outputs()
            assert after == before
            assert "zebra" not in "".join(after)


MONSTERS: dict[str, Any] = {
    "a huge number": 10**300,
    "a negative number": -(10**18),
    "a megabyte": "x" * MB,
    "a list of numbers": [1] * 200_000,
    "a list of texts": ["ab"] * 100_000,
    "an object of many keys": {f"k{number}": number for number in range(50_000)},
    "deep lists": json.loads("[" * 150 + "]" * 150),
}


def fields_of_all_routes(server: ServerProcess) -> list[tuple[str, str, dict[str, Any]]]:
    """(path, field, a body that is right)"""
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
        "/v1/completions": {"prompt": "a", "max_tokens": 1},
        "/v1/responses": {"input": "a", "max_output_tokens": 1},
        "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
        "/v1/moderations": {"input": "a"},
        "/tokenize": {"prompt": "a"},
        "/detokenize": {"tokens": [9]},
    }
    with server.client() as client:
        document = client.get("/openapi.json").json()
    found = []
    for path, body in bodies.items():
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        models = {reference["$ref"].rpartition("/")[2] for reference in schema.get("anyOf", [schema])}
        fields = {name for model in models for name in document["components"]["schemas"][model]["properties"]}
        found += [(path, name, body) for name in sorted(fields)]
    return found


def send_monsters(server: ServerProcess, *, every: int) -> None:
    """Each `every`th pair of field and monster. Fails at an answer that is slow or the server's fault."""
    pairs = [
        (path, field, body, name) for path, field, body in fields_of_all_routes(server) for name in MONSTERS
    ]
    with server.client() as client:
        for path, field, body, name in pairs[::every]:
            started = time.monotonic()
            response = client.post(path, json={**body, field: MONSTERS[name]})
            seconds = time.monotonic() - started
            assert response.status_code < 500, (path, field, name, response.text[:500])
            assert seconds < 10, (path, field, name, seconds)


@pytest.mark.covers("S23")
def test_no_field_s_value_makes_a_request_slow(alive: ServerProcess) -> None:
    before = memory(alive)
    send_monsters(alive, every=61)
    assert memory(alive) - before < 300 * MB


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.covers("S23")
def test_no_value_of_any_field_makes_a_request_slow(alive: ServerProcess) -> None:
    send_monsters(alive, every=5)
    before = memory(alive)
    send_monsters(alive, every=1)
    assert memory(alive) - before < 100 * MB


@pytest.mark.covers("R18")
def test_one_token_less_than_the_context_gives_one_token(alive: ServerProcess) -> None:
    with alive.client() as client:
        last = client.post("/v1/completions", json={"prompt": [9] * (CONTEXT - 1), "ignore_eos": True})
        over = client.post("/v1/completions", json={"prompt": [9] * CONTEXT})
    (choice,) = last.json()["choices"]
    assert choice["finish_reason"] == "length"
    assert last.json()["usage"]["completion_tokens"] == 1
    assert over.status_code == 400
    assert over.json()["error"]["code"] == "context_length_exceeded"


REFUSED: list[dict[str, Any]] = [
    {"guided_json": {"$ref": "#"}},
    {"guided_json": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
    {"guided_json": {"type": "string", "pattern": "(?<=x)*"}},
    {"guided_json": {"type": "string", "pattern": "("}},
    {"guided_json": {"type": "integer", "minimum": 10**400}},
    {"guided_regex": "(" * 60_000},
]
FOLLOWED: list[tuple[dict[str, Any], str]] = [
    ({"guided_json": {"items": {"$ref": "#"}, "type": "array"}}, r"[\[\]\s,]*"),
    ({"guided_json": {"enum": [{"x": [number]} for number in range(200)]}}, r'[{}\[\]"x:\d\s]*'),
    ({"guided_regex": "(a|b)*a(a|b){14}"}, "[ab]*"),
    ({"guided_regex": "((((a{1,99}){1,99}){1,99}){1,99}){1,99}"}, "a*"),
    ({"guided_grammar": 'start: a\na: a a | "x" | "y"'}, "[xy]*"),
]


@pytest.mark.covers("R27")
def test_a_form_that_is_hard_is_refused_or_followed_and_never_dropped(alive: ServerProcess) -> None:
    with alive.client() as client:
        for fields in REFUSED:
            started = time.monotonic()
            response = client.post("/v1/completions", json={"prompt": "a", **fields})
            assert response.status_code == 400, (fields, response.text)
            assert time.monotonic() - started < 6
        for fields, pattern in FOLLOWED:
            body = {"prompt": "a", "max_tokens": 60, "temperature": 2, "seed": 1, **fields}
            response = client.post("/v1/completions", json=body)
            assert response.status_code == 200, (fields, response.text)
            assert re.fullmatch(pattern, response.json()["choices"][0]["text"])


CONTRADICTIONS: list[dict[str, Any]] = [
    {"guided_choice": [""], "min_tokens": 1},
    {"guided_regex": "", "ignore_eos": True},
    {"guided_json": {"type": "object"}, "allowed_token_ids": [9]},
    {"allowed_token_ids": [266], "bad_words": ["b"]},
]


@pytest.mark.covers("R25", "R27")
def test_demands_that_contradict_each_other_are_the_client_s_mistake(alive: ServerProcess) -> None:
    with alive.client() as client:
        for fields in CONTRADICTIONS:
            body = {"prompt": "a", "max_tokens": 8, **fields}
            whole = client.post("/v1/completions", json=body)
            assert whole.status_code == 400, (fields, whole.text)
            assert whole.json()["error"]["code"] == "contradictory_constraints"
            streamed = client.post("/v1/completions", json={**body, "stream": True})
            assert '"code":"contradictory_constraints"' in streamed.text


@pytest.mark.covers("R05")
def test_a_stream_is_not_begun_for_half_a_character(alive: ServerProcess) -> None:
    body = b'{"prompt": "\\ud83d", "stream": true}'
    with alive.client() as client:
        response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400


@pytest.mark.covers("S16")
def test_no_error_tells_where_the_server_lives(alive: ServerProcess, tiny_checkpoint: Path) -> None:
    places = [str(tiny_checkpoint), str(Path(__file__).parents[2]), "Traceback", "site-packages", "torch"]
    with alive.client() as client:
        answers: list[httpx.Response] = [
            client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}], **fields})
            for fields in (
                {"model": "../../x"},
                {"temperature": "x"},
                {"guided_grammar": 'start: "a'},
                {"guided_json": {"$ref": "file:///etc/passwd"}},
                {"max_tokens": 10**6},
                {"chat_template": "{{ x }}"},
            )
        ]
        answers += [client.get("/v1/models/x/../y"), client.get("/v1/files/x"), client.get("/nothing")]
    for answer in answers:
        assert 400 <= answer.status_code < 600
        assert not [place for place in places if place in answer.text], answer.text
