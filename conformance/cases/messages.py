"""Anthropic's Messages API, which many clients of coding tools speak."""

from __future__ import annotations

import json

from conformance.case import Group
from conformance.cases.tools import WEATHER_OF
from conformance.client import COUNTING, Answer, Json, Server
from conformance.outcome import expect, expect_equal, expect_keys, fail
from conformance.schema import violation

GROUP = Group("messages")
case = GROUP.case
PATH = "/v1/messages"
ORDER = (
    "message_start",
    "content_block_start",
    "content_block_delta",
    "content_block_stop",
    "message_delta",
    "message_stop",
)


def body_of(server: Server, **fields: Json) -> Json:
    messages = [{"role": "user", "content": COUNTING}]
    return {"model": server.model, "messages": messages, "max_tokens": 16, "temperature": 0} | fields


async def message(server: Server, **fields: Json) -> Json:
    answer = await server.answered(PATH, body_of(server, **fields))
    expect(isinstance(answer["content"], list), "content is no list")
    return answer


async def events(server: Server, **fields: Json) -> list[Json]:
    found = (await server.streamed(PATH, body_of(server, stream=True, **fields))).chunks
    return [event for event in found if event["type"] != "ping"]


def text_of_blocks(answer: Json) -> str:
    return "".join(block["text"] for block in answer["content"] if block["type"] == "text")


def input_tokens(usage: Json) -> int:
    """All of them: Anthropic counts what came from a cache, or went into one, apart."""
    kinds = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    return sum(usage.get(kind) or 0 for kind in kinds)


def anthropic_error(answer: Answer, status: int) -> Json:
    expect_equal(answer.status, status, "the status")
    body = answer.json
    expect_equal(body.get("type"), "error", "type")
    expect_keys(body["error"], "type message", "the error")
    return body["error"]


@case("shape")
async def a_message_has_every_required_key(server: Server) -> None:
    answer = await message(server)
    expect_keys(answer, "id type role content model stop_reason stop_sequence usage", "the message")
    expect_equal((answer["type"], answer["role"]), ("message", "assistant"), "type and role")
    expect_keys(answer["usage"], "input_tokens output_tokens", "usage")
    expect(text_of_blocks(answer), "the text is empty")


@case("max-tokens")
async def a_message_that_is_cut_says_so(server: Server) -> None:
    answer = await message(server, max_tokens=3)
    expect_equal(answer["stop_reason"], "max_tokens", "stop_reason")
    expect_equal(answer["usage"]["output_tokens"], 3, "output_tokens")


@case("system")
async def a_system_text_is_part_of_the_input(server: Server) -> None:
    without = input_tokens((await message(server))["usage"])
    for system in ("Be very brief now.", [{"type": "text", "text": "Be very brief now."}]):
        count = input_tokens((await message(server, system=system))["usage"])
        expect(count >= without + 3, f"the input has {count} tokens, and {without} without it")


@case("stop-sequence")
async def a_stop_sequence_ends_a_message_and_is_named(server: Server) -> None:
    text = text_of_blocks(await message(server))
    stop = text[len(text) // 2 :][:3]
    answer = await message(server, stop_sequences=[stop])
    expect_equal(text_of_blocks(answer), text[: text.index(stop)], "the text")
    expect_equal((answer["stop_reason"], answer["stop_sequence"]), ("stop_sequence", stop), "the reason")


@case("events")
async def the_events_of_a_stream_come_in_order(server: Server) -> None:
    found = await events(server)
    expect_equal(tuple(dict.fromkeys(event["type"] for event in found)), ORDER, "the order")


@case("event-text")
async def the_deltas_of_a_stream_join_to_the_whole_text(server: Server) -> None:
    found = await events(server)
    deltas = [event["delta"]["text"] for event in found if event["type"] == "content_block_delta"]
    expect_equal("".join(deltas), text_of_blocks(await message(server)), "the streamed text")


@case("event-names")
async def every_event_of_a_stream_is_named_by_its_type(server: Server) -> None:
    stream = await server.streamed(PATH, body_of(server, stream=True))
    names = [line[6:].strip() for line in stream.lines if line.startswith("event:")]
    expect_equal(names, [event["type"] for event in stream.chunks], "the names")


@case("event-usage")
async def a_stream_says_what_it_used(server: Server) -> None:
    whole = (await message(server))["usage"]
    found = await events(server)
    (end,) = [event for event in found if event["type"] == "message_delta"]
    expect_equal(input_tokens(found[0]["message"]["usage"]), input_tokens(whole), "input_tokens")
    expect_equal(end["usage"]["output_tokens"], whole["output_tokens"], "output_tokens")
    expect_equal(end["delta"]["stop_reason"], "max_tokens", "stop_reason")


@case("max-tokens-required")
async def a_message_without_max_tokens_is_refused_in_anthropic_s_shape(server: Server) -> None:
    await message(server)
    body = body_of(server)
    del body["max_tokens"]
    error = anthropic_error(await server.post(PATH, body), 400)
    expect_equal(error["type"], "invalid_request_error", "type")


@case("unknown-model")
async def a_message_from_an_unknown_model_is_a_404_in_anthropic_s_shape(server: Server) -> None:
    await message(server)
    answer = await server.post(PATH, body_of(server, model="nobody/serves-this-model"))
    expect_equal(anthropic_error(answer, 404)["type"], "not_found_error", "type")


@case("count")
async def the_tokens_of_a_conversation_are_counted(server: Server) -> None:
    body = body_of(server)
    del body["max_tokens"], body["temperature"]
    counted = await server.answered(f"{PATH}/count_tokens", body)
    expect_equal(counted["input_tokens"], input_tokens((await message(server))["usage"]), "input_tokens")


ANY_TOOL_ONCE = {"type": "any", "disable_parallel_tool_use": True}


@case("tool")
async def a_tool_that_must_be_used_is_used(server: Server) -> None:
    tool = {"name": "get_weather", "description": "The weather.", "input_schema": WEATHER_OF}
    answer = await message(server, tools=[tool], tool_choice=ANY_TOOL_ONCE, max_tokens=200)
    uses = [block for block in answer["content"] if block["type"] == "tool_use"]
    expect(uses, "no tool is used")
    for use in uses:
        expect_keys(use, "id name input", "the use")
        if broken := violation(use["input"], WEATHER_OF):
            fail(broken)
    expect_equal(answer["stop_reason"], "tool_use", "stop_reason")


@case("tool-stream")
async def the_pieces_of_a_tool_s_input_join_to_json(server: Server) -> None:
    tool = {"name": "get_weather", "description": "The weather.", "input_schema": WEATHER_OF}
    found = await events(
        server, tools=[tool], tool_choice={"type": "tool", "name": "get_weather"}, max_tokens=200
    )
    pieces = [
        event["delta"]["partial_json"]
        for event in found
        if event["type"] == "content_block_delta" and event["delta"]["type"] == "input_json_delta"
    ]
    if broken := violation(json.loads("".join(pieces)), WEATHER_OF):
        fail(broken)


@case("tool-result")
async def a_tool_s_result_is_answered(server: Server) -> None:
    tool = {"name": "get_weather", "description": "The weather.", "input_schema": WEATHER_OF}
    use = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Paris", "unit": "C"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "18 degrees"}
    await message(server, tools=[tool])
    messages = [
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result]},
    ]
    await message(server, messages=messages, tools=[tool])
