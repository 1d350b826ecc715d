"""Tool calls: the forms of `tool_choice`, arguments that can be parsed, and results that come back."""

from __future__ import annotations

import json

from conformance.case import Group
from conformance.cases.structured import COLOUR, an_object
from conformance.client import Json, Server, Stream, parse, text_of
from conformance.outcome import NotOffered, expect, expect_equal, expect_keys, fail
from conformance.schema import violation

GROUP = Group("tools")
case = GROUP.case

WEATHER_OF = an_object(city={"type": "string", "enum": ["Paris", "Oslo"]}, unit={"enum": ["C", "F"]})
PAINT_IN = an_object(colour=COLOUR, coats={"type": "integer", "minimum": 1, "maximum": 3})
SCHEMAS = {"get_weather": WEATHER_OF, "paint": PAINT_IN, "get_time": an_object()}
QUESTION = "What is the weather in Paris, in C?"


def tool(name: str) -> Json:
    function = {"name": name, "description": f"Call this to {name}.", "parameters": SCHEMAS[name]}
    return {"type": "function", "function": function}


WEATHER, PAINT, TIME = tool("get_weather"), tool("paint"), tool("get_time")


def named(name: str) -> Json:
    return {"type": "function", "function": {"name": name}}


def check_call(call: Json) -> None:
    expect_keys(call, "id type function", "a call")
    expect(isinstance(call["id"], str) and call["id"], "a call has no id")
    expect_equal(call["type"], "function", "type")
    function = call["function"]
    expect(function["name"] in SCHEMAS, f"{function['name']!r} is called, which is not there")
    expect(isinstance(function["arguments"], str), "arguments are no string")
    if broken := violation(parse(function["arguments"].encode()), SCHEMAS[function["name"]]):
        fail(f"{broken} in {function['arguments']!r}")


async def calls_of(server: Server, content: Json = QUESTION, **fields: Json) -> tuple[Json, list[Json]]:
    """An answer and its calls, all of them checked: one call, for a base model would make them without end."""
    one: Json = {"tools": [WEATHER], "max_tokens": 200, "parallel_tool_calls": False}
    answer = await server.chat(content, **(one | fields))
    calls = answer["choices"][0]["message"].get("tool_calls") or []
    for call in calls:
        check_call(call)
    return answer, calls


@case("none-given")
async def without_tools_there_are_no_tool_calls(server: Server) -> None:
    message = (await server.chat())["choices"][0]["message"]
    expect(not message.get("tool_calls"), "there are some")


@case("auto")
async def with_tools_comes_a_text_or_a_valid_call(server: Server) -> None:
    answer, calls = await calls_of(server)
    reason = answer["choices"][0]["finish_reason"]
    expect(bool(calls) == (reason == "tool_calls"), f"{len(calls)} calls, and finish_reason is {reason}")
    expect(calls or isinstance(answer["choices"][0]["message"]["content"], str), "there is neither")


@case("counted")
async def tools_are_part_of_the_prompt(server: Server) -> None:
    without = (await server.chat(QUESTION))["usage"]["prompt_tokens"]
    answer, _ = await calls_of(server)
    count = answer["usage"]["prompt_tokens"]
    expect(count > without + 10, f"the prompt has {count} tokens, and {without} without them")


@case("required")
async def a_required_call_comes_and_is_valid(server: Server) -> None:
    answer, calls = await calls_of(server, tool_choice="required")
    expect(calls, "there is no call")
    expect_equal(answer["choices"][0]["finish_reason"], "tool_calls", "finish_reason")


@case("required-of-several")
async def a_required_call_is_one_of_the_given_tools(server: Server) -> None:
    _, calls = await calls_of(
        server, "Paint it red twice.", tools=[WEATHER, PAINT, TIME], tool_choice="required"
    )
    expect(calls, "there is no call")


@case("required-sampled")
async def sampled_calls_are_valid(server: Server) -> None:
    for seed in range(3):
        fields: Json = {"tools": [WEATHER, PAINT], "tool_choice": "required", "temperature": 1.2, "seed": seed}
        _, calls = await calls_of(server, **fields)
        expect(calls, "there is no call")


@case("named")
async def a_named_tool_is_the_one_that_is_called(server: Server) -> None:
    answer, calls = await calls_of(server, tools=[WEATHER, PAINT], tool_choice=named("paint"))
    expect_equal([call["function"]["name"] for call in calls], ["paint"], "the called tools")
    # OpenAI ends a call that was named with "stop", others with "tool_calls".
    expect(answer["choices"][0]["finish_reason"] in ("stop", "tool_calls"), "finish_reason is another")


@case("named-without-parameters")
async def a_tool_without_parameters_gets_an_empty_object(server: Server) -> None:
    _, calls = await calls_of(server, tools=[TIME], tool_choice=named("get_time"))
    expect_equal([json.loads(call["function"]["arguments"]) for call in calls], [{}], "the arguments")


@case("none")
async def with_tool_choice_none_no_tool_is_called(server: Server) -> None:
    _, calls = await calls_of(server, tool_choice="none")
    expect_equal(calls, [], "the calls")


@case("ids-differ")
async def calls_of_different_answers_have_different_ids(server: Server) -> None:
    ids = [call["id"] for _ in range(2) for call in (await calls_of(server, tool_choice="required"))[1]]
    expect_equal(len(set(ids)), len(ids), "the number of different ids")


@case("not-parallel")
async def with_parallel_calls_off_there_is_at_most_one(server: Server) -> None:
    question = "What is the weather in Paris and in Oslo?"
    _, calls = await calls_of(server, question, tool_choice="required", parallel_tool_calls=False)
    expect_equal(len(calls), 1, "the number of calls")


def streamed_calls(stream: Stream) -> list[Json]:
    """The calls that a stream's parts make; names and ids come once, arguments in pieces."""
    calls: dict[int, Json] = {}
    for choice in stream.choices():
        for part in choice["delta"].get("tool_calls") or []:
            if part["index"] not in calls:
                expect(part.get("id") and part["function"].get("name"), "a call begins without id or name")
                calls[part["index"]] = {
                    "id": part["id"],
                    "type": part.get("type"),
                    "function": part["function"],
                }
            else:
                expect(not part.get("id") or part["id"] == calls[part["index"]]["id"], "a call's id changes")
                calls[part["index"]]["function"]["arguments"] += part["function"].get("arguments") or ""
    expect_equal(sorted(calls), list(range(len(calls))), "the indexes of calls")
    return [calls[index] for index in sorted(calls)]


@case("stream")
async def the_pieces_of_a_streamed_call_make_a_valid_call(server: Server) -> None:
    one: Json = {"tool_choice": "required", "max_tokens": 200, "parallel_tool_calls": False}
    stream = await server.stream_chat(QUESTION, tools=[WEATHER], **one)
    calls = streamed_calls(stream)
    expect(calls, "there is no call")
    for call in calls:
        check_call(call)
    expect_equal(stream.finish_reasons(), ["tool_calls"], "the finish reasons")


@case("stream-same")
async def a_streamed_call_is_that_of_the_whole_answer(server: Server) -> None:
    fields: Json = {"tools": [WEATHER, PAINT], "tool_choice": named("paint"), "max_tokens": 200}
    fields["parallel_tool_calls"] = False
    _, whole = await calls_of(server, **fields)
    streamed = streamed_calls(await server.stream_chat(QUESTION, **fields))
    functions = [[call["function"] for call in calls] for calls in (streamed, whole)]
    for call in functions[0] + functions[1]:
        call["arguments"] = json.loads(call["arguments"])
    expect_equal(functions[0], functions[1], "the streamed call")


async def _round_trip(server: Server, content: Json, *cities: str) -> Json:
    """The answer to what a client sends back after it made calls for `cities`."""
    calls = []
    for number, city in enumerate(cities):
        function = {"name": "get_weather", "arguments": json.dumps({"city": city, "unit": "C"})}
        calls.append({"id": f"call_{number}", "type": "function", "function": function})
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "18 degrees"} for call in calls]
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": content, "tool_calls": calls},
        *results,
    ]
    without = (await server.chat(QUESTION, tools=[WEATHER]))["usage"]["prompt_tokens"]
    # A server without tools has refused above; here it could name only the messages.
    answer, _ = await calls_of(server, messages=messages)
    count = answer["usage"]["prompt_tokens"]
    expect(count > without + 5, f"the prompt has {count} tokens, and {without} before the call")
    return answer


@case("result")
async def a_tool_s_result_is_answered(server: Server) -> None:
    await _round_trip(server, None, "Paris")


@case("result-empty-content")
async def a_call_beside_an_empty_text_is_answered(server: Server) -> None:
    await _round_trip(server, "", "Paris")


@case("results")
async def two_results_of_parallel_calls_are_answered(server: Server) -> None:
    await _round_trip(server, None, "Paris", "Oslo")


@case("result-then-call")
async def a_call_can_follow_a_result(server: Server) -> None:
    await calls_of(server)
    call = {"id": "call_0", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0", "content": [{"type": "text", "text": "noon"}]},
        {"role": "user", "content": "And now paint it."},
    ]
    _, calls = await calls_of(server, messages=messages, tools=[TIME, PAINT], tool_choice=named("paint"))
    expect_equal([made["function"]["name"] for made in calls], ["paint"], "the called tools")


async def _offered(server: Server) -> None:
    """Lest a refusal of all tools count as one of a mistake in them."""
    await server.chat(QUESTION, tools=[WEATHER], max_tokens=1)


@case("choice-without-tools")
async def a_tool_choice_without_tools_is_refused(server: Server) -> None:
    await _offered(server)
    await server.refuses_chat(tool_choice="required")


@case("choice-unknown")
async def a_choice_of_an_unknown_tool_is_refused(server: Server) -> None:
    await _offered(server)
    await server.refuses_chat(tools=[WEATHER], tool_choice=named("fly"))


@case("choice-misspelt")
async def a_misspelt_tool_choice_is_refused(server: Server) -> None:
    await _offered(server)
    await server.refuses_chat(tools=[WEATHER], tool_choice="perhaps")


@case("nameless")
async def a_tool_without_a_name_is_refused(server: Server) -> None:
    await _offered(server)
    await server.refuses_chat(tools=[{"type": "function", "function": {"parameters": WEATHER_OF}}])


@case("bad-parameters")
async def parameters_that_are_no_schema_are_refused(server: Server) -> None:
    await _offered(server)
    broken = {"type": "function", "function": {"name": "fly", "parameters": {"type": "no such type"}}}
    await server.refuses_chat(tools=[broken], tool_choice="required")


@case("result-without-id")
async def a_result_that_belongs_to_no_call_is_refused(server: Server) -> None:
    await _offered(server)
    messages = [{"role": "user", "content": "Hi"}, {"role": "tool", "content": "18"}]
    await server.refuses_chat(messages=messages, tools=[WEATHER])


@case("text-too")
async def a_free_text_is_not_changed_by_tools_that_may_not_be_called(server: Server) -> None:
    answer = await server.chat(tools=[WEATHER], tool_choice="none")
    if not text_of(answer):
        raise NotOffered("the model says nothing")
    expect_equal(answer["choices"][0]["finish_reason"], "length", "finish_reason")
