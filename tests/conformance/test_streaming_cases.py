"""Each case about streams passes for a right stream and fails for one that is wrong in its way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from conformance.outcome import FAIL, PASS
from tests.conformance.stand_ins import CASES, event_stream, outcome_of

Events = list[Any]


def chunk(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    head = {"id": "a", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return head | {"choices": [choice]}


RIGHT: Events = [
    chunk({"role": "assistant", "content": ""}),
    chunk({"content": " one"}),
    chunk({"content": " two"}),
    chunk({"content": " three"}),
    chunk({}, "length"),
    "[DONE]",
]


def _second_role(events: Events) -> None:
    events[2]["choices"][0]["delta"]["role"] = "assistant"


def _second_end(events: Events) -> None:
    events[2]["choices"][0]["finish_reason"] = "length"


def _text_behind_the_end(events: Events) -> None:
    events.insert(-1, chunk({"content": " four"}))


def _other_id(events: Events) -> None:
    events[2]["id"] = "b"


def _usage(events: Events) -> None:
    events[4]["usage"] = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}


def _one_piece(events: Events) -> None:
    events[1:4] = [chunk({"content": " one two three"})]


def _no_done(events: Events) -> None:
    events.pop()


def _two_done(events: Events) -> None:
    events.append("[DONE]")


def _no_finish_reason(events: Events) -> None:
    del events[1]["choices"][0]["finish_reason"]


def _not_json(events: Events) -> None:
    events[1] = '{"id": NaN}'


MISTAKES: list[tuple[str, Callable[[Events], None]]] = [
    ("streaming.done", _no_done),
    ("streaming.done", _two_done),
    ("streaming.role", _second_role),
    ("streaming.finish-once", _second_end),
    ("streaming.finish-once", _text_behind_the_end),
    ("streaming.same-head", _other_id),
    ("streaming.usage-unasked", _usage),
    ("streaming.increments", _one_piece),
    ("streaming.chunk-shape", _no_finish_reason),
    ("streaming.chunk-shape", _not_json),
]


@pytest.mark.parametrize(("name", "spoil"), MISTAKES, ids=[f"{n}-{f.__name__}" for n, f in MISTAKES])
async def test_a_case_sees_its_mistake(name: str, spoil: Callable[[Events], None]) -> None:
    right = await outcome_of(CASES[name], lambda request: event_stream(*RIGHT))
    assert (right.outcome, right.reason) == (PASS, "")
    wrong = copy.deepcopy(RIGHT)
    spoil(wrong)
    assert (await outcome_of(CASES[name], lambda request: event_stream(*wrong))).outcome == FAIL


async def test_framing_is_taken_literally() -> None:
    def one_line_break(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text='data: {"choices": []}\ndata: [DONE]\n\n')

    assert (await outcome_of(CASES["streaming.framing"], one_line_break)).outcome == FAIL
    right = await outcome_of(CASES["streaming.framing"], lambda request: event_stream(*RIGHT))
    assert right.outcome == PASS
