"""Tokens and texts: /tokenize and /detokenize."""

from __future__ import annotations

from conformance.case import Group
from conformance.client import Server
from conformance.outcome import NotOffered, expect, expect_equal
from conformance.tokens import text_of_ids, token_ids

GROUP = Group("tokens")
case = GROUP.case
TEXTS = (
    "Hello, world",
    " a  b   c\n\n\td ",
    "日本語と한국어 и кириллица",
    "🤖👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b",
    "def f(x):\n    return x ** 2  # ½",
    "\U00013000\U000e0041",
)


@case("round-trip")
async def the_text_of_a_text_s_tokens_is_the_text(server: Server) -> None:
    for text in TEXTS:
        expect_equal(await text_of_ids(server, await token_ids(server, text, special=False)), text, "the text")


@case("count")
async def as_many_tokens_are_counted_as_a_completion_s_usage_says(server: Server) -> None:
    for text in TEXTS:
        usage = (await server.complete(text, max_tokens=1))["usage"]
        expect_equal(usage["prompt_tokens"], len(await token_ids(server, text)), f"prompt_tokens of {text!r}")


@case("special")
async def what_begins_a_prompt_is_there_only_if_asked_for(server: Server) -> None:
    with_it, without = await token_ids(server, "Hello"), await token_ids(server, "Hello", special=False)
    expect_equal(with_it[len(with_it) - len(without) :], without, "the end")
    expect(0 <= len(with_it) - len(without) <= 1, "more than one token comes first")


@case("empty")
async def an_empty_text_has_no_tokens(server: Server) -> None:
    expect_equal(await token_ids(server, "", special=False), [], "the tokens")


@case("long")
async def a_long_text_makes_the_round_trip(server: Server) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 2000
    expect_equal(await text_of_ids(server, await token_ids(server, text, special=False)), text, "the text")


@case("unknown-id")
async def an_id_beyond_the_vocabulary_is_refused(server: Server) -> None:
    await text_of_ids(server, [5])
    answer = await server.post("/detokenize", {"model": server.model, "tokens": [99_999_999]})
    expect_equal(answer.status, 400, "the status")
    await server.check_alive()


@case("chat")
async def a_conversation_has_as_many_tokens_as_its_usage_says(server: Server) -> None:
    body = server.chat_body("Hi, how are you?", max_tokens=1)
    usage = (await server.answered("/v1/chat/completions", body))["usage"]
    answer = await server.post("/tokenize", {"model": server.model, "messages": body["messages"]})
    if answer.status != 200 or "count" not in answer.json:
        raise NotOffered("/tokenize takes no messages")
    expect_equal(answer.json["count"], usage["prompt_tokens"], "count")
