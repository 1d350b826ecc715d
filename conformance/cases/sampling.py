"""Sampling: seeds, filters, penalties and biases act, and values out of range are refused."""

from __future__ import annotations

import asyncio

from conformance.case import Group
from conformance.client import COUNTING, Json, Server, text_of
from conformance.outcome import NotOffered, expect, expect_equal, fail

GROUP = Group("sampling")
case = GROUP.case


@case("seed-repeats")
async def a_seed_gives_the_same_text_twice(server: Server) -> None:
    first = text_of(await server.chat(temperature=1, seed=11))
    expect_equal(text_of(await server.chat(temperature=1, seed=11)), first, "the second text")


@case("seeds-differ")
async def different_seeds_give_different_texts(server: Server) -> None:
    texts = {text_of(await server.chat(temperature=1.5, seed=seed)) for seed in range(4)}
    expect(len(texts) > 1, "four seeds give one text")


@case("no-seed")
async def texts_without_a_seed_differ(server: Server) -> None:
    texts = {text_of(await server.chat(temperature=1.5)) for _ in range(4)}
    expect(len(texts) > 1, "four answers are the same")


@case("seed-and-company")
async def a_seed_gives_the_same_text_whatever_else_is_running(server: Server) -> None:
    fields: Json = {"temperature": 1, "seed": 11, "max_tokens": 24}
    alone = text_of(await server.complete(**fields))
    mates = [server.complete(f"{i} " * 3 * i, temperature=1, max_tokens=24) for i in range(1, 8)]
    together = (await asyncio.gather(server.complete(**fields), *mates))[0]
    expect_equal(text_of(together), alone, "the text in company")


@case("seed-negative")
async def a_large_and_a_negative_seed_are_taken(server: Server) -> None:
    for seed in (2**62, -5):
        await server.chat(temperature=1, seed=seed, max_tokens=2)


@case("top-p-small")
async def a_tiny_top_p_is_greedy(server: Server) -> None:
    greedy = text_of(await server.complete())
    expect_equal(text_of(await server.complete(temperature=1, top_p=1e-6)), greedy, "the text")


@case("top-p-0")
async def a_top_p_of_0_is_legal_and_greedy(server: Server) -> None:
    greedy = text_of(await server.complete())
    answer = await server.post("/v1/completions", server.completion_body(temperature=1, top_p=0))
    expect_equal(answer.status, 200, "the status")
    expect_equal(text_of(answer.json), greedy, "the text")


async def _is_greedy_with(server: Server, **fields: Json) -> None:
    """An extension of OpenAI's parameters makes sampling at a high temperature greedy."""
    greedy = text_of(await server.complete())
    text = text_of(await server.complete(temperature=2, seed=5, **fields))
    if text != greedy and text == text_of(await server.complete(temperature=2, seed=5)):
        raise NotOffered(f"{', '.join(fields)} has no effect")
    expect_equal(text, greedy, "the text")


@case("top-k")
async def a_top_k_of_1_is_greedy(server: Server) -> None:
    await _is_greedy_with(server, top_k=1)


@case("min-p")
async def a_min_p_of_1_is_greedy(server: Server) -> None:
    await _is_greedy_with(server, min_p=1)


@case("bias-forces")
async def a_bias_of_100_forces_a_token(server: Server) -> None:
    text = text_of(await server.complete(max_tokens=4, logit_bias={"5000": 100}))
    piece = text[: len(text) // 4]
    expect(piece and text == piece * 4, f"the text is {text!r}, not one piece four times")


@case("bias-bans")
async def a_bias_of_minus_100_bans_a_token(server: Server) -> None:
    both = text_of(await server.complete(max_tokens=3, logit_bias={"5000": 100, "6000": 50}))
    banned = text_of(await server.complete(max_tokens=3, logit_bias={"5000": -100, "6000": 50}))
    second = text_of(await server.complete(max_tokens=3, logit_bias={"6000": 100}))
    expect(both != second, "6000 and 5000 are one piece")
    expect_equal(banned, second, "the text without 5000")


@case("bias-in-chat")
async def a_bias_acts_in_a_chat(server: Server) -> None:
    text = text_of(await server.chat(max_tokens=4, logit_bias={"5000": 100}))
    expect(text and text == text[: len(text) // 4] * 4, f"the text is {text!r}, not one piece four times")


@case("bias-range")
async def a_bias_out_of_range_is_refused(server: Server) -> None:
    await server.refuses_chat(logit_bias={"5000": 101})


@case("bias-key")
async def a_bias_of_no_token_id_is_refused(server: Server) -> None:
    await server.refuses_chat(logit_bias={"no token": 5})


@case("bias-type")
async def a_bias_that_is_no_object_is_refused(server: Server) -> None:
    await server.refuses_chat(logit_bias=[1, 2])


@case("frequency-penalty")
async def a_frequency_penalty_ends_a_repetition(server: Server) -> None:
    """One token leads by up to 100, and loses 2 each time that it comes."""
    bias = {"5000": 100}
    plain = text_of(await server.complete(max_tokens=70, logit_bias=bias))
    text = text_of(await server.complete(max_tokens=70, logit_bias=bias, frequency_penalty=2))
    expect(text != plain, "the text is the same")


@case("presence-penalty")
async def a_presence_penalty_brings_in_other_tokens(server: Server) -> None:
    """In at least one of three texts that repeat themselves without any token being certain."""
    for prompt in ("Random letters: q z x q", "Random digits: 4 8 1 5", "Coin: heads, tails, tails,"):
        plain = text_of(await server.complete(prompt, max_tokens=24))
        if text_of(await server.complete(prompt, max_tokens=24, presence_penalty=2)) != plain:
            return
    fail("three texts are the same with it")


@case("repetition-penalty")
async def a_repetition_penalty_acts(server: Server) -> None:
    prompt = "a a a a a a a a a a"
    plain = text_of(await server.complete(prompt))
    for field in ("repetition_penalty", "repeat_penalty"):  # vLLM's name and llama.cpp's
        if text_of(await server.complete(prompt, **{field: 1.9})) != plain:
            return
    raise NotOffered("repetition_penalty has no effect")


@case("temperature-high")
async def a_temperature_above_2_is_refused(server: Server) -> None:
    await server.refuses_chat(temperature=2.5)


@case("temperature-negative")
async def a_negative_temperature_is_refused(server: Server) -> None:
    await server.refuses_chat(temperature=-0.5)


@case("top-p-high")
async def a_top_p_above_1_is_refused(server: Server) -> None:
    await server.refuses_chat(top_p=1.5)


@case("penalty-high")
async def a_penalty_above_2_is_refused(server: Server) -> None:
    await server.refuses_chat(presence_penalty=2.5)
    await server.refuses_chat(frequency_penalty=-2.5)


@case("n-0")
async def no_choice_at_all_is_refused(server: Server) -> None:
    await server.refuses_chat(n=0)


@case("n-many")
async def more_than_128_choices_are_refused(server: Server) -> None:
    await server.refuses_chat(n=129, max_tokens=1)


@case("greedy-n")
async def greedy_choices_are_all_the_same(server: Server) -> None:
    answer = await server.complete(COUNTING, n=2)
    expect_equal(text_of(answer, 1), text_of(answer, 0), "the second text")
