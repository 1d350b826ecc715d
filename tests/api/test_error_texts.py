"""What errors tell, and what they keep to themselves.

Every error that any test of the API gets over `LiveServer.http` is checked (tests/api/support.py); these
provoke what others do not, and make sure that the check sees something.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.api.support import INSIDES, LiveServer, Script, check_reveals_nothing


@pytest.mark.parametrize(
    "text",
    [
        'Traceback (most recent call last):\n  File "x.py"',
        "broken in server/api/chat.py",
        "<tokenizers.Tokenizer object at 0x7f12ab34cd56>",
        "invalid: tensor([1, 2])",
        "torch.OutOfMemoryError",
        "KeyError: 'x'",
        "cannot open /usr/share/model/config.json",
        "[Errno 28] No space left on device",
        "<class 'int'>",
        "https://errors.pydantic.dev/2/v/int_type",
    ],
)
def test_the_check_sees_what_must_not_be_told(text: str) -> None:
    assert INSIDES.search(text)
    request = httpx.Request("POST", "http://x/v1/completions", json={"prompt": "a"})
    with pytest.raises(AssertionError):
        check_reveals_nothing(httpx.Response(400, text=text, request=request))


BODIES: list[Any] = [
    {},
    {"prompt": None},
    {"prompt": {"a": 1}},
    {"prompt": [[1.5]]},
    {"prompt": [10**30]},
    {"prompt": "a", "n": "many"},
    {"prompt": "a", "stop": {"a": object.__name__}},
    {"prompt": "a", "logit_bias": {"x": 1}},
    {"prompt": "a", "seed": [1]},
    {"messages": "hello"},
    {"messages": [{"role": "user", "content": {"a": 1}}]},
    {"messages": [{"role": "robot", "content": "a"}]},
    {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function", "function": {"name": 1}}]},
    {"messages": [{"role": "user", "content": "a"}], "tools": "all"},
    {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "yaml"}},
    {"input": 5},
    {"input": [{"type": "input_image", "image_url": "http://x"}]},
    {"prompt": "a" * 100_000},
    {"tokens": [-1]},
    {"tokens": ["a"]},
]
GRAMMARS: list[dict[str, Any]] = [
    {"structured_outputs": {"regex": "("}},
    {"structured_outputs": {"regex": "(?<=a)b"}},
    {"structured_outputs": {"grammar": "start: ("}},
    {"structured_outputs": {"grammar": "root ::= (" * 50}},
    {"structured_outputs": {"grammar": "start: missing"}},
    {"structured_outputs": {"json": {"type": "foo"}}},
    {"structured_outputs": {"json": {"$ref": "http://example.com/x.json"}}},
    {"structured_outputs": {"json": {"$ref": "#/nowhere"}}},
    {"structured_outputs": {"json": {"pattern": "(", "type": "string"}}},
    {"structured_outputs": {"json": "not json"}},
]


@pytest.mark.covers("S16")
@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/moderations",
        "/tokenize",
        "/detokenize",
        "/v1/batches",
        "/v1/files",
        "/v1/nowhere",
    ],
)
def test_an_error_tells_nothing_of_the_server_s_insides(server: LiveServer, path: str) -> None:
    raw = [
        b"",
        b"[",
        b'{"a": 1e999}',
        b"\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b"[" * 5000,
        b'{"seed": ' + b"9" * 5000,
    ]
    contents = [json.dumps(body).encode() for body in BODIES] + raw
    num_errors = 0
    for content in contents:
        response = server.http.post(path, content=content, headers={"content-type": "application/json"})
        num_errors += response.status_code >= 400
    assert num_errors > len(contents) / 2
    for method in ("PUT", "DELETE", "PATCH"):
        assert server.http.request(method, path).status_code >= 400


@pytest.mark.covers("S16")
def test_a_grammar_s_error_is_about_the_grammar(server: LiveServer) -> None:
    for fields in GRAMMARS:
        assert server.complete("a", **fields).status_code == 400


@pytest.mark.covers("S16")
@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_the_server_is_told_as_one_and_no_more(server: LiveServer, stream: bool) -> None:
    faults: list[dict[str, Any]] = [
        {"error_after": 1},
        {"death_after": 1},
        {"crash_after": 1},
        {"crash_after": 0},
    ]
    for fault in faults:
        server.engine.script = Script(**fault)
        response = server.complete("ab", stream=stream)
        assert "error" in response.text
        assert not INSIDES.search(response.text)
