"""An agent framework, pydantic-ai: structured output and tools through its own loop, with the embedded model.

A base model never ends a loop of its own will, so that the loop is held to its end by what must be called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.messages import ModelRequest, ModelResponse, ToolCallPart, ToolReturnPart
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.profiles.openai import OpenAIModelProfile
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

from tests.e2e.server_process import ServerProcess
from tests.sdk.conftest import API_KEY

pytestmark = pytest.mark.slow

SETTINGS = ModelSettings(temperature=0, max_tokens=300)
QUESTION = "What is the weather in Paris?"


class Weather(BaseModel):
    city: Literal["Paris", "Oslo"]
    warm: bool


@pytest.fixture
def model(embedded: ServerProcess) -> OpenAIChatModel:
    client = openai.AsyncOpenAI(base_url=f"{embedded.url}/v1", api_key=API_KEY, max_retries=0)
    profile = OpenAIModelProfile(supports_json_schema_output=True, openai_supports_strict_tool_definition=True)
    with embedded.client(headers={"authorization": f"Bearer {API_KEY}"}) as http:
        name = http.get("/v1/models").json()["data"][0]["id"]
    return OpenAIChatModel(name, provider=OpenAIProvider(openai_client=client), profile=profile)


async def test_a_text_is_answered_and_counted(model: OpenAIChatModel) -> None:
    agent = Agent(model, instructions="Be brief.", model_settings=SETTINGS | {"max_tokens": 12})
    result = await agent.run(QUESTION)
    assert isinstance(result.output, str)
    assert result.usage.output_tokens == 12


async def test_a_text_is_streamed(model: OpenAIChatModel) -> None:
    agent = Agent(model, model_settings=SETTINGS | {"max_tokens": 12})
    async with agent.run_stream(QUESTION) as streamed:
        pieces = [piece async for piece in streamed.stream_text(delta=True)]
    assert "".join(pieces) == (await agent.run(QUESTION)).output


async def test_an_output_by_json_schema_is_an_object_of_the_class(model: OpenAIChatModel) -> None:
    agent = Agent(model, output_type=NativeOutput(Weather), model_settings=SETTINGS, retries=0)
    assert isinstance((await agent.run(QUESTION)).output, Weather)


async def test_an_output_by_a_tool_call_is_an_object_of_the_class(model: OpenAIChatModel) -> None:
    agent = Agent(model, output_type=ToolOutput(Weather), model_settings=SETTINGS, retries=0)
    assert isinstance((await agent.run(QUESTION)).output, Weather)


async def test_a_tool_is_called_and_its_result_goes_back(model: OpenAIChatModel) -> None:
    """The first answer must call a tool of two; once it was called, only the output's is left."""
    called: list[str] = []

    def look_out(direction: Literal["north", "south"]) -> str:
        """Look out of the window."""
        called.append(direction)
        return "The sun shines."

    agent = Agent(
        model,
        output_type=ToolOutput(Weather, name="answer"),
        tools=[_only_once(look_out, called)],
        model_settings=SETTINGS,
        retries=0,
    )
    result = await agent.run("Look out of the window with look_out, then answer. look_out look_out look_out")
    assert isinstance(result.output, Weather)
    kinds = [type(message) for message in result.all_messages()]
    assert kinds[:2] == [ModelRequest, ModelResponse]
    if called:
        returned = [
            part
            for message in result.all_messages()
            for part in message.parts
            if isinstance(part, (ToolCallPart, ToolReturnPart)) and part.tool_name == "look_out"
        ]
        assert len(returned) == 2 * len(called)


def _only_once(function: Callable[..., str], called: list[str]) -> Any:
    from pydantic_ai import Tool
    from pydantic_ai.tools import RunContext, ToolDefinition

    async def prepare(context: RunContext[None], definition: ToolDefinition) -> ToolDefinition | None:
        return None if called else definition

    return Tool(function, prepare=prepare)
