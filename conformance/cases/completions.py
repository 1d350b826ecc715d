"""Completions: the four forms of a prompt, echo, and what a list of prompts gives."""

from __future__ import annotations

from conformance.case import Group
from conformance.client import COUNTING, Json, Server, text_of
from conformance.outcome import NotOffered, expect, expect_equal, expect_keys
from conformance.tokens import token_ids

GROUP = Group("completions")
case = GROUP.case
LETTERS = "a b c d a b c d a b c d a b"


@case("shape")
async def a_completion_has_every_required_key(server: Server) -> None:
    answer = await server.complete()
    expect_keys(answer, "id object created model choices usage", "the answer")
    expect_equal(answer["object"], "text_completion", "object")
    (choice,) = answer["choices"]
    expect_keys(choice, "index text finish_reason logprobs", "the choice")
    expect_equal(choice["logprobs"], None, "logprobs")
    usage = answer["usage"]
    expect_equal(usage["total_tokens"], usage["prompt_tokens"] + usage["completion_tokens"], "total_tokens")


@case("default-length")
async def a_completion_has_16_tokens_by_default(server: Server) -> None:
    body = server.completion_body()
    del body["max_tokens"]
    usage = (await server.answered("/v1/completions", body))["usage"]
    expect_equal(usage["completion_tokens"], 16, "completion_tokens")


@case("max-tokens")
async def max_tokens_is_met_exactly(server: Server) -> None:
    answer = await server.complete(max_tokens=5)
    expect_equal(answer["usage"]["completion_tokens"], 5, "completion_tokens")
    expect_equal(answer["choices"][0]["finish_reason"], "length", "finish_reason")


@case("continues")
async def a_completion_continues_the_text_itself(server: Server) -> None:
    """As a base model or a chat model would: no template is put around the prompt."""
    text = text_of(await server.complete("1 2 3 4 5 6 7 8 9 1 2 3 4 5 6 7 8 9 1 2 3 4 5", max_tokens=8))
    expect("6" in text, f"the text is {text!r}")


@case("prompt-list")
async def a_list_of_prompts_gives_a_choice_for_each_in_order(server: Server) -> None:
    answer = await server.complete([COUNTING, LETTERS, COUNTING])
    expect_equal([choice["index"] for choice in answer["choices"]], [0, 1, 2], "the indexes")
    expect_equal(text_of(answer, 2), text_of(answer, 0), "the text of the third, which is the first")
    expect(text_of(answer, 1) != text_of(answer, 0), "another prompt has the same text")


@case("prompt-list-alone")
async def a_prompt_in_a_list_is_continued_as_it_is_alone(server: Server) -> None:
    answer = await server.complete([LETTERS, COUNTING])
    for index, prompt in enumerate((LETTERS, COUNTING)):
        expect_equal(text_of(answer, index), text_of(await server.complete(prompt)), f"text {index}")


@case("prompt-list-usage")
async def usage_adds_up_over_a_list_of_prompts(server: Server) -> None:
    alone = [(await server.complete(prompt))["usage"] for prompt in (COUNTING, LETTERS)]
    together = (await server.complete([COUNTING, LETTERS]))["usage"]
    for key in ("prompt_tokens", "completion_tokens"):
        expect_equal(together[key], sum(usage[key] for usage in alone), key)


@case("prompt-ids")
async def token_ids_are_a_prompt_as_their_text_is(server: Server) -> None:
    ids = await token_ids(server, COUNTING)
    by_ids, by_text = await server.complete(ids), await server.complete()
    expect_equal(by_ids["usage"]["prompt_tokens"], by_text["usage"]["prompt_tokens"], "prompt_tokens")
    expect_equal(text_of(by_ids), text_of(by_text), "the text")


@case("prompt-id-lists")
async def lists_of_token_ids_are_several_prompts(server: Server) -> None:
    prompts = [await token_ids(server, COUNTING), await token_ids(server, LETTERS)]
    answer = await server.complete(prompts)
    for index, prompt in enumerate((COUNTING, LETTERS)):
        expect_equal(text_of(answer, index), text_of(await server.complete(prompt)), f"text {index}")


@case("prompts-times-n")
async def choice_i_of_prompt_p_has_the_index_p_times_n_plus_i(server: Server) -> None:
    answer = await server.complete([COUNTING, LETTERS], n=2)
    choices = {choice["index"]: choice["text"] for choice in answer["choices"]}
    expect_equal(sorted(choices), [0, 1, 2, 3], "the indexes")
    expect(choices[0] == choices[1] and choices[2] == choices[3], "greedy choices of one prompt differ")
    expect(choices[0] != choices[2], "the prompts have the same text")


@case("prompt-empty-list")
async def an_empty_list_of_prompts_is_refused(server: Server) -> None:
    await server.refuses_completion([])


@case("prompt-number")
async def a_prompt_that_is_a_number_is_refused(server: Server) -> None:
    await server.refuses_completion(5)


@case("prompt-object")
async def a_prompt_of_fractions_is_refused(server: Server) -> None:
    await server.refuses_completion([1.5, 2.5])


@case("prompt-negative-id")
async def a_negative_token_id_is_refused(server: Server) -> None:
    await server.refuses_completion([2, -5])


@case("prompt-huge-id")
async def a_token_id_beyond_the_vocabulary_is_refused(server: Server) -> None:
    await server.refuses_completion([2, 99_999_999])


@case("prompt-empty")
async def an_empty_prompt_is_continued_or_refused(server: Server) -> None:
    answer = await server.post("/v1/completions", server.completion_body(""))
    await server.answers_or_refuses(answer)


async def _echoed(server: Server, prompt: str, **fields: Json) -> Json:
    answer = await server.complete(prompt, echo=True, **fields)
    if not text_of(answer).startswith(prompt[:4]):
        raise NotOffered("echo has no effect")
    return answer


@case("echo")
async def echo_puts_the_prompt_before_the_text(server: Server) -> None:
    plain = text_of(await server.complete())
    expect_equal(text_of(await _echoed(server, COUNTING)), COUNTING + plain, "the text")


@case("echo-unicode")
async def an_echoed_prompt_is_intact(server: Server) -> None:
    prompt = "Ünïcode 日本語 🤖 👩‍👩‍👧‍👦  two  blanks\n\ttab"
    text = text_of(await _echoed(server, prompt, max_tokens=1))
    expect(text.startswith(prompt), f"the text is {text!r}")


@case("echo-alone")
async def echo_with_0_tokens_gives_the_prompt_alone(server: Server) -> None:
    answer = await _echoed(server, COUNTING, max_tokens=0)
    expect_equal(text_of(answer), COUNTING, "the text")
    expect_equal(answer["usage"]["completion_tokens"], 0, "completion_tokens")


@case("echo-stream")
async def a_stream_with_echo_begins_with_the_prompt(server: Server) -> None:
    whole = text_of(await _echoed(server, COUNTING))
    expect_equal((await server.stream_completion(echo=True)).text(), whole, "the streamed text")


@case("suffix")
async def a_suffix_is_used_or_refused(server: Server) -> None:
    """A model without tokens for it cannot fill in the middle, and must say so."""
    plain = text_of(await server.complete("def add(a, b):\n    return"))
    answer = await server.complete("def add(a, b):\n    return", suffix="\nprint(add(1, 2))\n")
    expect(text_of(answer) != plain, "it is accepted, but has no effect")


@case("best-of")
async def best_of_less_than_n_is_refused(server: Server) -> None:
    await server.refuses_completion(n=3, best_of=2)


@case("unicode")
async def a_prompt_in_many_scripts_is_continued(server: Server) -> None:
    for prompt in ("日本語の文章", "🤖🎉👩‍👩‍👧‍👦", "مرحبا بالعالم", "e\u0301", "\u0000", "\U000e0041"):
        await server.complete(prompt, max_tokens=2)
