"""An agent framework, pydantic-ai: structured output and tools through its own loop, with the embedded model.

A base model never ends a loop of its own will, so that the loop is held to its end by what must be called.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal

import openai
import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, RunContext, ToolOutput
from pydantic_ai.capabilities import PrepareOutputTools, PrepareTools
from pydantic_ai.messages import ToolCallPart, ToolReturnPart
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.profiles.openai import OpenAIModelProfile
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings
from pydantic_ai.tools import ToolDefinition

from tests.e2e.server_process import ServerProcess
from tests.sdk.conftest import API_KEY

pytestmark = pytest.mark.slow

SETTINGS = ModelSettings(temperature=0, max_tokens=300, parallel_tool_calls=False)
QUESTION = "What is the weather in Paris?"


class Weather(BaseModel):
    city: Literal["Paris", "Oslo"]
    warm: bool


@pytest.fixture
async def model(embedded: ServerProcess) -> AsyncIterator[OpenAIChatModel]:
    profile = OpenAIModelProfile(supports_json_schema_output=True, openai_supports_strict_tool_definition=True)
    with embedded.client(headers={"authorization": f"Bearer {API_KEY}"}) as http:
        name = http.get("/v1/models").json()["data"][0]["id"]
    async with openai.AsyncOpenAI(base_url=f"{embedded.url}/v1", api_key=API_KEY, max_retries=0) as client:
        yield OpenAIChatModel(name, provider=OpenAIProvider(openai_client=client), profile=profile)


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
    """The first answer can only call `look_out`; once that was called, only the output is left to call."""
    called: list[str] = []

    def look_out(direction: Literal["north", "south"]) -> str:
        """Look out of the window."""
        called.append(direction)
        return "The sun shines."

    def before(context: RunContext[None], tools: list[ToolDefinition]) -> list[ToolDefinition]:
        return [] if called else tools

    def after(context: RunContext[None], tools: list[ToolDefinition]) -> list[ToolDefinition]:
        return tools if called else []

    agent = Agent(
        model,
        output_type=ToolOutput(Weather, name="answer"),
        tools=[look_out],
        capabilities=[PrepareTools(before), PrepareOutputTools(after)],
        model_settings=SETTINGS,
        retries=0,
    )
    result = await agent.run(QUESTION)
    assert isinstance(result.output, Weather)
    assert called
    parts = [part for message in result.all_messages() for part in message.parts]
    calls = [part.tool_name for part in parts if isinstance(part, ToolCallPart)]
    assert calls == ["look_out"] * len(called) + ["answer"]
    returned = [part.content for part in parts if isinstance(part, ToolReturnPart)]
    assert returned[: len(called)] == ["The sun shines."] * len(called)
