"""Conversations of many calls, from their wire form to what is rendered."""

from __future__ import annotations

import time

import pytest

from server.api.anthropic import conversation as anthropic_conversation
from server.api.anthropic.protocol import CountTokensRequest
from server.api.openai_responses import conversation as responses_conversation
from server.api.openai_responses.protocol import ResponsesRequest

NUM_CALLS = 10_000
NUMBERS = range(NUM_CALLS)


@pytest.mark.covers("S23")
def test_thousands_of_calls_in_one_message_take_no_time() -> None:
    blocks = [{"type": "tool_use", "id": str(number), "name": "f", "input": {}} for number in NUMBERS]
    messages = [{"role": "assistant", "content": blocks}, {"role": "user", "content": "a"}]
    body = CountTokensRequest.model_validate({"messages": messages})
    started = time.process_time()
    first, _ = anthropic_conversation.conversation(body)
    assert time.process_time() - started < 1
    assert [call.id for call in first.calls] == [str(number) for number in NUMBERS]


@pytest.mark.covers("S23")
def test_thousands_of_calls_in_a_row_take_no_time() -> None:
    calls = [{"type": "function_call", "call_id": str(n), "name": "f", "arguments": ""} for n in NUMBERS]
    body = ResponsesRequest.model_validate({"input": calls})
    started = time.process_time()
    (message,) = responses_conversation.conversation(body)
    assert time.process_time() - started < 1
    assert [call.id for call in message.calls] == [str(number) for number in NUMBERS]
