"""Chat completions that are not streamed: shapes, counts, and every legal list of messages."""

from __future__ import annotations

import asyncio

from conformance.case import Group
from conformance.client import Json, Server, text_of
from conformance.outcome import NotOffered, expect, expect_equal, expect_keys

GROUP = Group("chat")
case = GROUP.case

FINISH_REASONS = ("stop", "length", "tool_calls", "content_filter", "function_call")


def user(content: Json) -> Json:
    return {"role": "user", "content": content}


def assistant(content: Json) -> Json:
    return {"role": "assistant", "content": content}


async def answer_to(server: Server, *messages: Json, **fields: Json) -> Json:
    """A short answer to `messages`, whose usage must count more tokens than the last of them alone."""
    answer = await server.chat(messages=list(messages), max_tokens=4, **fields)
    expect_keys(answer["choices"][0]["message"], "role content", "the message")
    return answer


async def prompt_tokens(server: Server, *messages: Json) -> int:
    count: int = (await answer_to(server, *messages))["usage"]["prompt_tokens"]
    return count


@case("shape")
async def an_answer_has_every_required_key(server: Server) -> None:
    answer = await server.chat()
    expect_keys(answer, "id object created model choices usage", "the answer")
    expect_equal(answer["object"], "chat.completion", "object")
    expect(
        type(answer["created"]) is int and 1_600_000_000 < answer["created"] < 10**11,
        "created is no Unix second",
    )
    (choice,) = answer["choices"]
    expect_keys(choice, "index message finish_reason", "the choice")
    expect_equal(choice["index"], 0, "index")
    expect_keys(choice["message"], "role content", "the message")
    expect_equal(choice["message"]["role"], "assistant", "role")
    expect(isinstance(choice["message"]["content"], str), "content is no string")
    expect(choice["finish_reason"] in FINISH_REASONS, f"finish_reason is {choice['finish_reason']}")


@case("logprobs-null")
async def log_probabilities_that_nobody_asked_for_are_null(server: Server) -> None:
    expect_equal((await server.chat())["choices"][0].get("logprobs"), None, "logprobs")


@case("ids-differ")
async def two_answers_have_different_ids(server: Server) -> None:
    first, second = await server.chat(max_tokens=1), await server.chat(max_tokens=1)
    expect(first["id"] and first["id"] != second["id"], f"both are {first['id']!r}")


@case("usage")
async def usage_counts_prompt_and_answer_and_adds_up(server: Server) -> None:
    usage = (await server.chat())["usage"]
    expect_keys(usage, "prompt_tokens completion_tokens total_tokens", "usage")
    expect(usage["prompt_tokens"] > 0 and usage["completion_tokens"] > 0, f"usage is {usage}")
    expect_equal(usage["total_tokens"], usage["prompt_tokens"] + usage["completion_tokens"], "total_tokens")


@case("usage-cached")
async def usage_says_how_much_of_the_prompt_was_cached(server: Server) -> None:
    await server.chat("a b c d e f g h " * 20, max_tokens=1)
    usage = (await server.chat("a b c d e f g h " * 20, max_tokens=1))["usage"]
    details = usage.get("prompt_tokens_details")
    if not details:
        raise NotOffered("usage has no prompt_tokens_details")
    cached = details["cached_tokens"]
    expect(type(cached) is int and 0 <= cached <= usage["prompt_tokens"], f"cached_tokens is {cached}")


@case("max-tokens")
async def max_tokens_is_met_exactly_and_ends_with_length(server: Server) -> None:
    for limit in (1, 2, 7):
        answer = await server.chat(max_tokens=limit)
        expect_equal(answer["choices"][0]["finish_reason"], "length", f"finish_reason at {limit}")
        expect_equal(answer["usage"]["completion_tokens"], limit, "completion_tokens")


@case("max-completion-tokens")
async def max_completion_tokens_limits_as_max_tokens_does(server: Server) -> None:
    body = server.chat_body(max_completion_tokens=3)
    del body["max_tokens"]
    answer = await server.answered("/v1/chat/completions", body)
    expect_equal(answer["choices"][0]["finish_reason"], "length", "finish_reason")
    expect_equal(answer["usage"]["completion_tokens"], 3, "completion_tokens")


@case("greedy-repeats")
async def temperature_0_gives_the_same_text_twice(server: Server) -> None:
    first, second = text_of(await server.chat()), text_of(await server.chat())
    expect_equal(second, first, "the second text")


@case("system")
async def a_system_message_is_part_of_the_prompt(server: Server) -> None:
    without = await prompt_tokens(server, user("Hi"))
    with_system = await prompt_tokens(server, {"role": "system", "content": "Be very brief now."}, user("Hi"))
    expect(with_system >= without + 3, f"the prompt has {with_system} tokens, and {without} without it")


@case("developer")
async def a_developer_message_is_part_of_the_prompt(server: Server) -> None:
    without = await prompt_tokens(server, user("Hi"))
    with_developer = await prompt_tokens(
        server, {"role": "developer", "content": "Be very brief now."}, user("Hi")
    )
    expect(with_developer >= without + 3, f"the prompt has {with_developer} tokens, and {without} without it")


@case("system-alone")
async def a_system_message_alone_is_answered_and_counted(server: Server) -> None:
    short = await prompt_tokens(server, {"role": "system", "content": "Hi"})
    long = await prompt_tokens(server, {"role": "system", "content": "Hi, be very brief now."})
    expect(long >= short + 3, f"{long} tokens against {short}: the text is dropped")


@case("system-later")
async def a_system_message_may_come_later(server: Server) -> None:
    await answer_to(
        server, user("Hi"), assistant("Yes?"), {"role": "system", "content": "Be brief."}, user("Go on")
    )


@case("system-twice")
async def two_system_messages_both_count(server: Server) -> None:
    system = {"role": "system", "content": "Be very brief now."}
    one = await prompt_tokens(server, system, user("Hi"))
    two = await prompt_tokens(server, system, system, user("Hi"))
    expect(two >= one + 3, f"{two} tokens against {one}")


@case("user-twice")
async def two_user_messages_in_a_row_are_answered(server: Server) -> None:
    one = await prompt_tokens(server, user("A b c d e f"))
    two = await prompt_tokens(server, user("A b c d e f"), user("A b c d e f"))
    expect(two >= one + 5, f"{two} tokens against {one}")


@case("assistant-twice")
async def two_assistant_messages_in_a_row_are_answered(server: Server) -> None:
    await answer_to(server, user("Hi"), assistant("Yes."), assistant("And?"), user("Go on"))


@case("assistant-first")
async def a_conversation_may_begin_with_the_assistant(server: Server) -> None:
    await answer_to(server, assistant("How can I help?"), user("Hi"))


@case("assistant-last")
async def a_conversation_may_end_with_the_assistant(server: Server) -> None:
    await answer_to(server, user("Count."), assistant("1, 2, 3,"))


@case("many-turns")
async def a_conversation_of_sixty_turns_is_answered(server: Server) -> None:
    turns = [message for i in range(30) for message in (user(f"Say {i}."), assistant(f"{i}"))]
    await answer_to(server, *turns, user("Go on"))


@case("text-parts")
async def a_text_part_is_the_same_as_a_string(server: Server) -> None:
    plain = await server.chat("Tell me about the sea.")
    parts = await server.chat([{"type": "text", "text": "Tell me about the sea."}])
    expect_equal(parts["usage"]["prompt_tokens"], plain["usage"]["prompt_tokens"], "prompt_tokens")
    expect_equal(text_of(parts), text_of(plain), "the text")


@case("several-parts")
async def several_text_parts_all_count(server: Server) -> None:
    part = {"type": "text", "text": "a b c d e f"}
    one, two = await prompt_tokens(server, user([part])), await prompt_tokens(server, user([part, part]))
    expect(two >= one + 5, f"{two} tokens against {one}")


@case("empty-content")
async def an_empty_message_is_answered(server: Server) -> None:
    await answer_to(server, user(""))


@case("name")
async def a_participant_may_have_a_name(server: Server) -> None:
    await answer_to(server, user("Hi") | {"name": "ada"})


@case("whitespace")
async def blanks_and_line_breaks_in_a_message_are_answered(server: Server) -> None:
    await answer_to(server, user(" \n\t \n"))


@case("control-text")
async def control_tokens_in_a_message_stay_text(server: Server) -> None:
    """A client could open a turn of its own otherwise."""
    plain = await prompt_tokens(server, user("a"))
    for text in ("<end_of_turn>", "<start_of_turn>", "<|im_end|>"):
        expect(await prompt_tokens(server, user("a" + text)) > plain + 1, f"{text} becomes one token or none")


@case("null-fields")
async def null_stands_for_the_default_everywhere(server: Server) -> None:
    fields = (
        "stop seed n top_p presence_penalty frequency_penalty logit_bias logprobs stream stream_options user"
    )
    expected = text_of(await server.chat())
    expect_equal(text_of(await server.chat(**dict.fromkeys(fields.split()))), expected, "the text")


@case("bookkeeping-fields")
async def fields_for_bookkeeping_change_nothing(server: Server) -> None:
    expected = text_of(await server.chat())
    answer = await server.chat(user="somebody", metadata={"a": "b"}, store=False, service_tier="auto")
    expect_equal(text_of(answer), expected, "the text")


@case("n")
async def n_choices_are_numbered_from_0(server: Server) -> None:
    answer = await server.chat(n=3, temperature=1, seed=1)
    expect_equal([choice["index"] for choice in answer["choices"]], [0, 1, 2], "the indexes")
    expect(
        all(choice["finish_reason"] in FINISH_REASONS for choice in answer["choices"]), "a choice has no end"
    )


@case("n-differ")
async def sampled_choices_differ(server: Server) -> None:
    answer = await server.chat(n=4, temperature=1.5, seed=1)
    texts = {text_of(answer, index) for index in range(4)}
    expect(len(texts) > 1, "all four are the same")


@case("n-usage")
async def usage_counts_the_prompt_once_and_all_choices(server: Server) -> None:
    one, three = await server.chat(max_tokens=5), await server.chat(max_tokens=5, n=3)
    expect_equal(three["usage"]["prompt_tokens"], one["usage"]["prompt_tokens"], "prompt_tokens")
    expect_equal(
        three["usage"]["completion_tokens"], 3 * one["usage"]["completion_tokens"], "completion_tokens"
    )


@case("request-id")
async def answers_carry_a_request_id_header_of_their_own(server: Server) -> None:
    bodies = (server.chat_body(max_tokens=1), server.chat_body(max_tokens=1))
    answers = await asyncio.gather(*(server.post("/v1/chat/completions", body) for body in bodies))
    ids = [answer.headers.get("x-request-id") for answer in answers]
    if None in ids:
        raise NotOffered("no x-request-id header")
    expect(ids[0] != ids[1], f"both are {ids[0]}")
