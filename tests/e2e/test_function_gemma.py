"""Calls in FunctionGemma's form by the real engine: whole and valid, though the weights are random."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from server.tokenizer import FUNCTION_TOKENS
from tests.e2e.server_process import ServerProcess, running_server
from tests.tiny_checkpoint import write_tiny_checkpoint

SCHEMA = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "city": {"type": "string", "maxLength": 9},
    },
    "required": ["unit", "days", "city"],
    "additionalProperties": False,
}
FUNCTIONS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "now", "strict": True}},
]
USER: Any = {"role": "user", "content": "hi"}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("models") / "functions"
    checkpoint = write_tiny_checkpoint(directory, context=4096, more_control=FUNCTION_TOKENS)
    with running_server(checkpoint, "--dtype", "float32", "--num-threads", "1") as server:
        yield server


def test_calls_are_valid_streamed_or_not_and_their_results_are_taken(server: ServerProcess) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    for seed, choice in enumerate(("required", named, "required", named)):
        asked: Any = {
            "model": model,
            "max_tokens": 300,
            "tools": FUNCTIONS,
            "tool_choice": choice,
            "parallel_tool_calls": False,
            "seed": seed,
        }
        (answered,) = client.chat.completions.create(messages=[USER], **asked).choices
        assert answered.finish_reason == "tool_calls"
        (call,) = answered.message.tool_calls or ()
        assert call.type == "function"
        function = call.function
        assert function.name == "get_weather" or choice == "required"
        jsonschema.validate(
            json.loads(function.arguments), SCHEMA if function.name == "get_weather" else {"const": {}}
        )
        with client.chat.completions.stream(messages=[USER], **asked) as stream:
            (streamed,) = stream.get_final_completion().choices
        assert streamed.finish_reason == "tool_calls"
        (same,) = streamed.message.tool_calls or ()
        assert (same.function.name, same.function.arguments) == (function.name, function.arguments)
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "clear"}'}
        messages: Any = [USER, answered.message, result]
        again = client.chat.completions.create(
            messages=messages, **{**asked, "tool_choice": "auto", "max_tokens": 20}
        )
        assert again.choices[0].finish_reason in ("stop", "length", "tool_calls")
