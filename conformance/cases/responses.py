"""OpenAI's Responses API."""

from __future__ import annotations

from conformance.case import Group
from conformance.cases.structured import FLAG, check_obeys
from conformance.client import COUNTING, Json, Server, refusal
from conformance.outcome import NotOffered, expect, expect_equal, expect_keys

GROUP = Group("responses")
case = GROUP.case
PATH = "/v1/responses"
ORDER = (
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
)


async def respond(server: Server, **fields: Json) -> Json:
    body = {"model": server.model, "input": COUNTING, "max_output_tokens": 16, "temperature": 0}
    return await server.answered(PATH, body | fields)


async def events(server: Server, **fields: Json) -> list[Json]:
    body = {"model": server.model, "input": COUNTING, "max_output_tokens": 16, "temperature": 0, "stream": True}
    return (await server.streamed(PATH, body | fields)).chunks


def output_text(response: Json) -> str:
    parts = [part for item in response["output"] if item["type"] == "message" for part in item["content"]]
    return "".join(part["text"] for part in parts if part["type"] == "output_text")


@case("shape")
async def a_response_has_every_required_key(server: Server) -> None:
    response = await respond(server)
    expect_keys(response, "id object created_at status model output usage", "the response")
    expect_equal(response["object"], "response", "object")
    messages = [item for item in response["output"] if item["type"] == "message"]
    expect_equal(len(messages), 1, "the number of messages")
    message = messages[0]
    expect_keys(message, "id type role content status", "the message")
    expect_equal(message["role"], "assistant", "role")
    expect(output_text(response), "the text is empty")


@case("usage")
async def usage_counts_input_and_output_tokens(server: Server) -> None:
    usage = (await respond(server))["usage"]
    expect_keys(usage, "input_tokens output_tokens total_tokens", "usage")
    expect_equal(usage["total_tokens"], usage["input_tokens"] + usage["output_tokens"], "total_tokens")


@case("same-as-chat")
async def a_response_to_a_text_is_what_a_chat_answers(server: Server) -> None:
    chat = await server.chat()
    response = await respond(server)
    expect_equal(output_text(response), chat["choices"][0]["message"]["content"], "the text")


@case("input-list")
async def a_list_of_messages_is_the_same_as_a_text(server: Server) -> None:
    by_text = output_text(await respond(server))
    parts = [{"type": "input_text", "text": COUNTING}]
    for content in (COUNTING, parts):
        response = await respond(server, input=[{"role": "user", "content": content}])
        expect_equal(output_text(response), by_text, "the text")


@case("instructions")
async def instructions_are_part_of_the_input(server: Server) -> None:
    without = (await respond(server))["usage"]["input_tokens"]
    count = (await respond(server, instructions="Be very brief now."))["usage"]["input_tokens"]
    expect(count >= without + 3, f"the input has {count} tokens, and {without} without them")


@case("incomplete")
async def a_response_that_is_cut_is_incomplete(server: Server) -> None:
    response = await respond(server)
    expect_equal(response["status"], "incomplete", "status")
    expect_equal(response["incomplete_details"], {"reason": "max_output_tokens"}, "incomplete_details")


@case("events")
async def the_events_of_a_stream_come_in_order(server: Server) -> None:
    found = [event["type"] for event in await events(server)]
    *body, end = list(dict.fromkeys(found))
    expect_equal(tuple(body), ORDER, "the order")
    expect(end in ("response.completed", "response.incomplete"), f"the last event is {end}")


@case("event-numbers")
async def the_events_of_a_stream_are_numbered(server: Server) -> None:
    numbers = [event["sequence_number"] for event in await events(server)]
    expect_equal(numbers, list(range(numbers[0], numbers[0] + len(numbers))), "the numbers")


@case("event-text")
async def the_deltas_of_a_stream_join_to_the_whole_text(server: Server) -> None:
    found = await events(server)
    joined = "".join(event["delta"] for event in found if event["type"] == "response.output_text.delta")
    (done,) = [event["text"] for event in found if event["type"] == "response.output_text.done"]
    expect_equal(joined, done, "the joined text")
    expect_equal(output_text(found[-1]["response"]), done, "the text of the last event")
    expect_equal(joined, output_text(await respond(server)), "the streamed text")


@case("schema")
async def a_response_obeys_a_schema(server: Server) -> None:
    text_format = {"type": "json_schema", "name": "answer", "schema": FLAG, "strict": True}
    response = await respond(server, text={"format": text_format}, max_output_tokens=200)
    check_obeys(output_text(response), FLAG)


@case("previous")
async def a_response_can_follow_another_or_says_that_it_cannot(server: Server) -> None:
    first = await respond(server, store=True)
    second = await respond(server, previous_response_id=first["id"], input="And on")
    before, after = first["usage"]["input_tokens"], second["usage"]["input_tokens"]
    expect(after > before, f"previous_response_id has no effect: {after} tokens after {before}")


@case("unknown-model")
async def a_response_of_an_unknown_model_is_a_404(server: Server) -> None:
    await respond(server)
    refusal(
        await server.post(PATH, {"model": "nobody/serves-this-model", "input": "Hi", "max_output_tokens": 2}),
        404,
    )


@case("bad-input")
async def an_input_that_is_a_number_is_refused(server: Server) -> None:
    await respond(server)
    await server.refuses(PATH, {"model": server.model, "input": 5})


@case("input-tokens")
async def the_tokens_of_an_input_are_counted(server: Server) -> None:
    counted = await server.answered(f"{PATH}/input_tokens", {"model": server.model, "input": COUNTING})
    usage = (await respond(server))["usage"]
    if "input_tokens" not in counted:
        raise NotOffered("the answer has no input_tokens")
    expect_equal(counted["input_tokens"], usage["input_tokens"], "input_tokens")
