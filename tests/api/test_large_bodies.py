"""The most that a body may hold, and that nothing stands still for it."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from server.api import body as body_module
from server.limits import MAX_ESCAPES, MAX_KEYS, MAX_OBJECTS, MAX_STRINGS, MAX_VALUES
from tests.api.loop_probe import LoopMeter
from tests.api.support import LiveServer, assert_error, live_server

MOST_SECONDS = 0.1
"""Of processor time, in which nothing else is served."""


@pytest.fixture(scope="module")
def roomy() -> Iterator[LiveServer]:
    """A server whose model takes any length, so that it is the body that is measured."""
    with live_server(max_model_len=50_000_000, log_level="warning") as live:
        # As a real one does when it is loaded.
        gc.collect()
        gc.freeze()
        yield live
        gc.unfreeze()


def chat(**fields: Any) -> dict[str, Any]:
    return {"max_tokens": 1, "messages": [{"role": "user", "content": "ab"}], **fields}


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
WORST: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "messages": (
        "/v1/chat/completions",
        lambda: chat(messages=[{"role": "user", "content": "hello there"}] * 2000),
    ),
    "parts": (
        "/v1/chat/completions",
        lambda: chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * 20_000}]),
    ),
    "calls": (
        "/v1/chat/completions",
        lambda: chat(messages=[{"role": "assistant", "content": "a", "tool_calls": [CALL]}] * 3000),
    ),
    "blocks": (
        "/v1/messages",
        lambda: chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * 20_000}]),
    ),
    "items": ("/v1/responses", lambda: {"input": [{"role": "user", "content": "a"}] * 5000}),
    "fields": ("/v1/chat/completions", lambda: chat(**{f"f{number}": 1 for number in range(50_000)})),
    "token ids": ("/v1/completions", lambda: {"prompt": [8] * (MAX_VALUES - 100), "max_tokens": 1}),
    "prompts": ("/v1/completions", lambda: {"prompt": [[8] * 100] * 1000, "max_tokens": 1}),
    "choices": (
        "/v1/chat/completions",
        lambda: chat(structured_outputs={"choice": ["a" * 1000] * 10_000}),
    ),
}


@pytest.mark.covers("E09", "R03", "R12")
@pytest.mark.parametrize("name", WORST)
def test_the_loop_has_its_turn_while_a_large_body_is_taken_in(
    roomy: LiveServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, make = WORST[name]
    content = json.dumps(make()).encode()
    meter = LoopMeter(monkeypatch)
    response = roomy.http.post(path, content=content, headers={"content-type": "application/json"})
    print(f"\n{name}: {response.status_code}, {meter.worst * 1000:.0f} ms")
    assert response.status_code in (200, 400)
    assert 0 < meter.worst < MOST_SECONDS


def post(server: LiveServer, content: bytes) -> httpx.Response:
    headers = {"content-type": "application/json"}
    return server.http.post("/v1/completions", content=content, headers=headers)


@pytest.mark.covers("R03")
@pytest.mark.parametrize(
    ("what", "limit", "make"),
    [
        ("values", MAX_VALUES, lambda count: b"[" + b"1," * (count - 2) + b"1]"),
        ("strings", MAX_STRINGS, lambda count: b"[" + b'"",' * (count - 2) + b'""]'),
        ("objects", MAX_OBJECTS, lambda count: b"[" + b"{}," * (count - 2) + b"{}]"),
        ("keys", MAX_KEYS, lambda count: b"{" + b'"":1,' * (count - 2) + b'"":1}'),
        ("backslashes", MAX_ESCAPES, lambda count: b'"' + rb"\n" * count + b'"'),
    ],
)
def test_a_body_with_too_much_in_it_is_refused_before_it_is_parsed(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, what: str, limit: int, make: Callable[[int], bytes]
) -> None:
    parsed = []
    parse = body_module.from_json

    def noted(*arguments: Any, **options: Any) -> Any:
        parsed.append(True)
        return parse(*arguments, **options)

    monkeypatch.setattr(body_module, "from_json", noted)
    message = assert_error(post(server, b'{"prompt": ' + make(limit + 2) + b"}"), 400, code="body_too_complex")
    assert what in message
    assert str(limit) in message
    assert not parsed
    fits = post(server, b'{"prompt": ' + make(limit - 2) + b"}")
    assert fits.json()["error"]["code"] != "body_too_complex"
    assert parsed


@pytest.mark.covers("R03")
def test_what_stands_in_strings_is_not_counted(server: LiveServer) -> None:
    many = b',:{["' * MAX_VALUES
    for text in (many.replace(b'"', b""), many.replace(b'"', rb"\""), many.replace(b'"', rb"\\\"")):
        if text.count(b"\\") > MAX_ESCAPES:
            text = text[: len(text) // 4 // 7 * 7]
        response = post(server, b'{"prompt": "' + text + b'"}')
        assert_error(response, 400, code="context_length_exceeded")


@pytest.mark.covers("R03")
def test_deep_nesting_is_refused_at_once(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = LoopMeter(monkeypatch)
    for content in (b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt": ' + b"[" * 15_000_000):
        assert_error(post(server, content), 400)
    assert 0 < meter.worst < MOST_SECONDS


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.covers("E09")
def test_probes_are_quick_while_large_things_are_asked_for(roomy: LiveServer) -> None:
    """Times as a client has them; on a machine that does nothing else they are what the loop takes."""
    from tests.api.loop_probe import LoopProbe

    with LoopProbe(roomy.url) as probe:
        time.sleep(3)
    idle = probe.p99
    print(f"\nidle: p99 {idle * 1000:.0f} ms")
    asked: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
        **WORST,
        "prompt of 5 MB": ("/tokenize", lambda: {"prompt": "ab user model " * 360_000}),
    }
    del asked["prompts"]  # the fake engine serves a thousand sequences at once, on the same loop
    for name, (path, make) in asked.items():
        content = json.dumps(make()).encode()
        with LoopProbe(roomy.url) as probe:
            deadline = time.monotonic() + 3
            while time.monotonic() < deadline:
                roomy.http.post(
                    path, content=content, headers={"content-type": "application/json"}, timeout=120
                )
        print(f"{name}: p99 {probe.p99 * 1000:.0f} ms, worst {probe.worst * 1000:.0f} ms")
        assert probe.p99 < 0.1 + 3 * idle, name


@pytest.mark.slow
@pytest.mark.covers("E09")
def test_probes_are_quick_while_the_largest_schemas_compile(roomy: LiveServer) -> None:
    from tests.api.loop_probe import LoopProbe

    kinds = [
        {"type": "object", "properties": {f"k{i}": {"type": "integer", "minimum": i}}, "required": [f"k{i}"]}
        for i in range(2400)
    ]
    took = []
    with LoopProbe(roomy.url) as probe:
        for number in range(5):
            schema = {"title": f"never seen: {number}", "items": {"anyOf": kinds}, "type": "array"}
            body = {"prompt": "ab", "max_tokens": 1, "guided_json": schema}
            started = time.monotonic()
            # 400 where the machine is so busy that compiling reaches its limit.
            assert roomy.http.post("/v1/completions", json=body, timeout=60).status_code in (200, 400)
            took.append(time.monotonic() - started)
    print(f"\nschemas: {min(took):.2f} to {max(took):.2f} s, p99 {1000 * probe.p99:.0f} ms")
    assert probe.p99 < 0.1
