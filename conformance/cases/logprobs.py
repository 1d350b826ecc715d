"""Log probabilities: shapes, and that the numbers can be true."""

from __future__ import annotations

import math

from conformance.case import Group
from conformance.client import COUNTING, Json, Server, text_of
from conformance.outcome import NotOffered, expect, expect_equal, expect_keys

GROUP = Group("logprobs")
case = GROUP.case
TOLERANCE = 0.05
"""Between two ways to compute the same number: a batch of another size may round otherwise."""


async def chat_entries(server: Server, content: Json = COUNTING, **fields: Json) -> tuple[Json, list[Json]]:
    """An answer and its tokens' log probabilities."""
    answer = await server.chat(content, logprobs=True, **fields)
    logprobs = answer["choices"][0].get("logprobs")
    expect(logprobs, "logprobs is empty")
    return answer, list(logprobs["content"])


async def completion_logprobs(server: Server, prompt: Json = COUNTING, **fields: Json) -> tuple[Json, Json]:
    answer = await server.complete(prompt, **({"logprobs": 2} | fields))
    logprobs = answer["choices"][0].get("logprobs")
    expect(isinstance(logprobs, dict), "logprobs is no object")
    if "content" in logprobs:
        raise NotOffered("completions have the log probabilities of chats")
    expect_keys(logprobs, "tokens token_logprobs top_logprobs text_offset", "logprobs")
    return answer, logprobs


def check_numbers(values: list[Json]) -> None:
    for value in values:
        expect(isinstance(value, (int, float)) and math.isfinite(value), f"{value!r} is no finite number")
        expect(value <= 1e-6, f"{value} is above 0")


@case("chat-shape")
async def each_token_of_a_chat_has_its_log_probability(server: Server) -> None:
    answer, entries = await chat_entries(server)
    for entry in entries:
        expect_keys(entry, "token logprob bytes top_logprobs", "a token")
    check_numbers([entry["logprob"] for entry in entries])
    expect_equal(len(entries), answer["usage"]["completion_tokens"], "the number of tokens")


@case("chat-text")
async def the_tokens_of_a_chat_join_to_its_text(server: Server) -> None:
    answer, entries = await chat_entries(server)
    expect_equal("".join(entry["token"] for entry in entries), text_of(answer), "the joined text")


@case("chat-bytes")
async def the_bytes_of_tokens_join_to_the_text_in_utf_8(server: Server) -> None:
    answer, entries = await chat_entries(server, "日本語🤖🎉" * 6, max_tokens=30)
    joined = b"".join(bytes(entry["bytes"] or []) for entry in entries)
    expect_equal(
        joined.decode("utf-8", "replace").rstrip("\ufffd"), text_of(answer).rstrip("\ufffd"), "the joined text"
    )


@case("chat-top")
async def top_logprobs_are_as_many_as_asked_for_likeliest_first(server: Server) -> None:
    _, entries = await chat_entries(server, top_logprobs=5)
    for entry in entries:
        values = [top["logprob"] for top in entry["top_logprobs"]]
        expect_equal(len(values), 5, "the number of alternatives")
        expect(values == sorted(values, reverse=True), f"they are not in order: {values}")
        check_numbers(values)


@case("chat-top-none")
async def without_top_logprobs_there_are_no_alternatives(server: Server) -> None:
    _, entries = await chat_entries(server)
    expect(all(entry["top_logprobs"] == [] for entry in entries), "there are some")


@case("greedy-is-top")
async def a_greedy_token_is_the_likeliest(server: Server) -> None:
    _, entries = await chat_entries(server, top_logprobs=3)
    for entry in entries:
        expect_equal(entry["token"], entry["top_logprobs"][0]["token"], "the token")
        expect(abs(entry["logprob"] - entry["top_logprobs"][0]["logprob"]) < 1e-3, "its two numbers differ")


@case("sum")
async def probabilities_add_up_to_at_most_1(server: Server) -> None:
    _, entries = await chat_entries(server, "Once upon a time", top_logprobs=20)
    for entry in entries:
        total = sum(math.exp(top["logprob"]) for top in entry["top_logprobs"])
        expect(0 < total <= 1.001, f"20 alternatives add up to {total}")


@case("finite")
async def log_probabilities_stay_finite_under_filters_and_biases(server: Server) -> None:
    """JSON has no infinity, whatever is impossible after a filter."""
    _, entries = await chat_entries(
        server, top_logprobs=5, temperature=1, top_p=0.01, logit_bias={"5000": -100}, seed=1
    )
    check_numbers([top["logprob"] for entry in entries for top in [entry, *entry["top_logprobs"]]])


@case("limit")
async def more_than_20_alternatives_are_refused(server: Server) -> None:
    await server.refuses_chat(logprobs=True, top_logprobs=21)


@case("top-alone")
async def top_logprobs_without_logprobs_are_refused(server: Server) -> None:
    await server.refuses_chat(top_logprobs=3)


@case("negative")
async def a_negative_number_of_alternatives_is_refused(server: Server) -> None:
    await server.refuses_chat(logprobs=True, top_logprobs=-1)


@case("stream")
async def a_stream_has_the_log_probabilities_of_the_whole_answer(server: Server) -> None:
    _, entries = await chat_entries(server, top_logprobs=2)
    stream = await server.stream_chat(logprobs=True, top_logprobs=2)
    parts = [choice["logprobs"]["content"] for choice in stream.choices() if choice.get("logprobs")]
    streamed = [entry for part in parts for entry in part or []]
    expect_equal([e["token"] for e in streamed], [e["token"] for e in entries], "the streamed tokens")
    for ours, theirs in zip(streamed, entries, strict=True):
        expect(abs(ours["logprob"] - theirs["logprob"]) < TOLERANCE, "the numbers differ")


@case("n")
async def every_choice_has_log_probabilities_of_its_own(server: Server) -> None:
    answer = await server.chat(logprobs=True, n=2, temperature=1, seed=2)
    for index, choice in enumerate(answer["choices"]):
        joined = "".join(entry["token"] for entry in choice["logprobs"]["content"])
        expect_equal(joined, text_of(answer, index), f"the joined text of choice {index}")


@case("completion-shape")
async def a_completion_has_four_lists_of_one_length(server: Server) -> None:
    answer, logprobs = await completion_logprobs(server)
    lengths = {len(logprobs[key]) for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
    expect_equal(lengths, {answer["usage"]["completion_tokens"]}, "the lengths")
    check_numbers(logprobs["token_logprobs"])
    expect_equal("".join(logprobs["tokens"]), text_of(answer), "the joined text")
    for top in logprobs["top_logprobs"]:
        expect(2 <= len(top) <= 3, f"there are {len(top)} alternatives, not 2 and the token itself")


@case("completion-offsets")
async def text_offsets_say_where_each_token_begins(server: Server) -> None:
    answer, logprobs = await completion_logprobs(server)
    first = logprobs["text_offset"][0]
    expect(first in (0, len(COUNTING)), f"the first offset is {first}")
    where = first
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        expect_equal(offset, where, "an offset")
        where += len(token)
    expect_equal(where - first, len(text_of(answer)), "the end")


@case("completion-0")
async def logprobs_0_gives_the_token_s_own_number_alone(server: Server) -> None:
    _, logprobs = await completion_logprobs(server, logprobs=0)
    check_numbers(logprobs["token_logprobs"])
    expect(all(not top or len(top) == 1 for top in logprobs["top_logprobs"]), "there are alternatives")


async def _scores(server: Server, prompt: str) -> Json:
    answer, logprobs = await completion_logprobs(server, prompt, echo=True, max_tokens=0, logprobs=1)
    if text_of(answer) != prompt:
        raise NotOffered("echo has no effect")
    return logprobs


@case("scoring")
async def echo_scores_a_prompt_whose_first_token_has_no_score(server: Server) -> None:
    logprobs = await _scores(server, COUNTING)
    # What begins a prompt, <bos>, is a token without text in it.
    joined = "".join(logprobs["tokens"]), "".join(logprobs["tokens"][1:])
    expect(COUNTING in joined, f"the joined text is {joined[0]!r}")
    scored = [value for value in logprobs["token_logprobs"] if value is not None]
    check_numbers(scored)
    expect(len(scored) >= len(logprobs["tokens"]) - 1, "several tokens have no score")


@case("scoring-prefix")
async def what_follows_does_not_change_a_token_s_score(server: Server) -> None:
    short, long = await _scores(server, COUNTING), await _scores(server, COUNTING + " 14, 15, dragon")
    for ours, theirs in zip(short["token_logprobs"], long["token_logprobs"], strict=False):
        if ours is not None and theirs is not None:
            expect(abs(ours - theirs) < TOLERANCE, f"{ours} becomes {theirs}")


@case("scoring-prefers")
async def a_likely_text_scores_higher_than_an_unlikely_one(server: Server) -> None:
    likely, unlikely = await _scores(server, COUNTING + " 14"), await _scores(server, COUNTING + " 93")
    expect(
        sum(filter(None, likely["token_logprobs"])) > sum(filter(None, unlikely["token_logprobs"])),
        "it does not",
    )
