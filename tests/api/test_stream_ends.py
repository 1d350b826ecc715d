"""However a stream ends, and whoever asks again: one end for each choice, and nobody else's text."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.api.support import LiveServer, chunks, events, wait_until

ENDS: dict[str, tuple[dict[str, Any], str]] = {
    "a stop token": ({}, "stop"),
    "a stop text": ({"stop": "user"}, "stop"),
    "the last token allowed": ({"max_tokens": 2}, "length"),
    "several choices": ({"n": 3, "max_tokens": 3}, "length"),
}


@pytest.mark.covers("H10")
@pytest.mark.parametrize(("fields", "reason"), ENDS.values(), ids=ENDS)
def test_each_choice_has_one_finish_reason_and_the_stream_one_end(
    server: LiveServer, fields: dict[str, Any], reason: str
) -> None:
    for ask in (server.chat, server.complete):
        # `events` asserts one line an event, and one [DONE] at the end.
        parts = chunks(ask(stream=True, stream_options={"include_usage": True}, **fields))
        ends = [
            (choice["index"], choice["finish_reason"])
            for part in parts
            for choice in part["choices"]
            if choice["finish_reason"] is not None
        ]
        assert sorted(ends) == [(index, reason) for index in range(fields.get("n", 1))]
        assert [bool(part.get("usage")) for part in parts] == [False] * (len(parts) - 1) + [True]


@pytest.mark.covers("H10")
def test_a_stream_that_fails_has_one_error_and_no_finish_reason(server: LiveServer) -> None:
    server.script.error_after = 1
    payloads = [json.loads(payload) for payload in events(server.chat(stream=True).text)]
    assert [("error" in payload) for payload in payloads] == [False] * (len(payloads) - 1) + [True]
    assert not any(choice["finish_reason"] for payload in payloads[:-1] for choice in payload["choices"])


@pytest.mark.covers("H07")
def test_clients_that_leave_and_ask_again_under_one_id_get_their_own_text(server: LiveServer) -> None:
    server.script.delay = 0.002
    body = {"messages": [{"role": "user", "content": "ab"}], "stream": True}

    def leave_and_return(number: int) -> str:
        headers = {"x-request-id": f"same-{number % 3}"}
        with server.http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
            next(response.iter_bytes())
        again = server.http.post("/v1/chat/completions", json=body, headers=headers)
        assert again.headers["x-request-id"] == headers["x-request-id"]
        return "".join(part["choices"][0]["delta"].get("content", "") for part in chunks(again))

    with ThreadPoolExecutor(8) as pool:
        texts = set(pool.map(leave_and_return, range(40)))
    assert texts == {server.script.text}
    ids = [request.request_id for request in server.engine.submitted]
    assert len(set(ids)) == len(ids) == 80
    wait_until(lambda: not server.engine.running)
