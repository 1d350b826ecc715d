"""Limits and load: long prompts, many clients, and clients that leave."""

from __future__ import annotations

import asyncio
import re
import time

from conformance.case import Group
from conformance.client import COUNTING, Json, Server, refusal, text_of, with_choices
from conformance.outcome import expect, expect_equal

GROUP = Group("limits")
case = GROUP.case
TOO_LONG = "a b c d e f g h " * 25_000
"""200,000 tokens: more than any context that is tested here, and less than a megabyte."""
QUICK_SECONDS = 20.0
"""For a few tokens on a slow machine, if nothing else runs."""


async def _too_long(server: Server, **fields: Json) -> Json:
    answer = await server.post("/v1/chat/completions", server.chat_body(TOO_LONG, **fields))
    await server.check_alive()
    return refusal(answer)


@case("context")
async def a_prompt_beyond_the_context_is_refused(server: Server) -> None:
    await _too_long(server)


@case("context-code")
async def the_refusal_of_a_long_prompt_has_openai_s_code(server: Server) -> None:
    expect_equal((await _too_long(server)).get("code"), "context_length_exceeded", "code")


@case("context-numbers")
async def the_refusal_of_a_long_prompt_names_its_length_and_the_limit(server: Server) -> None:
    message = (await _too_long(server))["message"]
    numbers = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", message)]
    expect(any(number >= 200_000 for number in numbers), f"not the length: {message}")
    expect(any(256 <= number < 200_000 for number in numbers), f"not the limit: {message}")


@case("context-stream")
async def a_stream_of_a_prompt_beyond_the_context_is_refused_with_a_status(server: Server) -> None:
    await _too_long(server, stream=True)


@case("context-completion")
async def a_completion_beyond_the_context_is_refused(server: Server) -> None:
    await server.refuses_completion(TOO_LONG)


@case("max-tokens-huge")
async def more_tokens_than_the_context_holds_are_refused_or_cut(server: Server) -> None:
    """Stopped at once where it is taken, since it may mean all that fits."""
    body = server.chat_body(max_tokens=10_000_000, stop=["0", "1", "2", "e"])
    answer = await server.post("/v1/chat/completions", body)
    await server.answers_or_refuses(answer)


@case("long-prompt")
async def a_prompt_of_a_thousand_tokens_is_read_to_its_beginning(server: Server) -> None:
    filler = "blue sky, green field. " * 150
    one = text_of(await server.complete("zx: 71.\n" + filler + "\nzx: 71.\nzx:", max_tokens=4))
    expect(one, "the text is empty")


@case("concurrent")
async def sixteen_requests_at_once_get_the_texts_they_get_alone(server: Server) -> None:
    prompts = [f"{COUNTING} {'and on ' * (i % 5)}" for i in range(16)]
    alone = [text_of(await server.complete(prompt)) for prompt in prompts]
    answers = await asyncio.gather(*(server.complete(prompt) for prompt in prompts))
    different = [i for i, answer in enumerate(answers) if text_of(answer) != alone[i]]
    expect(not different, f"{len(different)} of 16 differ")


@case("concurrent-streams")
async def sixteen_streams_at_once_do_not_mix(server: Server) -> None:
    biases = [{str(5000 + 100 * i): 100} for i in range(16)]
    alone = [text_of(await server.complete(max_tokens=6, logit_bias=bias)) for bias in biases]
    streams = await asyncio.gather(
        *(server.stream_completion(max_tokens=6, logit_bias=bias) for bias in biases)
    )
    different = [i for i, stream in enumerate(streams) if stream.text() != alone[i]]
    expect(not different, f"{len(different)} of 16 have another's text")


@case("burst")
async def sixty_four_requests_at_once_are_all_answered(server: Server) -> None:
    """Or told to come again, which an overloaded server may do."""
    bodies = [server.chat_body(f"Say {i}.", max_tokens=2) for i in range(64)]
    answers = await asyncio.gather(*(server.post("/v1/chat/completions", body) for body in bodies))
    for answer in answers:
        expect(answer.status in (200, 429, 503), f"a status is {answer.status}")
        if answer.status == 200:
            with_choices(answer.json)
    expect(any(answer.status == 200 for answer in answers), "nobody is answered")


async def _leave_early(server: Server, path: str, body: Json) -> None:
    async with server.http.stream("POST", server.root + path, json=body) as response:
        expect_equal(response.status_code, 200, "the status")
        async for line in response.aiter_lines():
            expect(line.startswith(("data:", ":")), f"the first line is {line[:60]!r}")
            return


async def _check_quick(server: Server) -> None:
    started = time.monotonic()
    await server.chat("Hi", max_tokens=2)
    seconds = time.monotonic() - started
    expect(seconds < QUICK_SECONDS, f"the next answer took {seconds:.1f} s")


@case("leave")
async def a_client_that_leaves_its_stream_frees_the_server(server: Server) -> None:
    """Thirty-two of them, each of whom had asked for thousands of tokens."""
    body = server.completion_body(max_tokens=4000, stream=True)
    await asyncio.gather(*(_leave_early(server, "/v1/completions", body) for _ in range(32)))
    await _check_quick(server)


@case("leave-chat")
async def a_client_that_leaves_a_chat_frees_the_server(server: Server) -> None:
    body = server.chat_body(max_tokens=4000, stream=True, n=2)
    await asyncio.gather(*(_leave_early(server, "/v1/chat/completions", body) for _ in range(16)))
    await _check_quick(server)


@case("leave-whole")
async def a_client_that_gives_up_waiting_frees_the_server(server: Server) -> None:
    async def give_up(number: int) -> None:
        body = server.completion_body(f"{COUNTING} {number}", max_tokens=4000)
        try:
            async with asyncio.timeout(0.5):
                await server.post("/v1/completions", body)
        except TimeoutError:
            pass

    await asyncio.gather(*(give_up(number) for number in range(32)))
    await _check_quick(server)


@case("after-leaving")
async def answers_after_others_left_are_what_they_were_before(server: Server) -> None:
    before = text_of(await server.complete(max_tokens=24))
    body = server.completion_body(max_tokens=4000, stream=True)
    left = [_leave_early(server, "/v1/completions", body) for _ in range(8)]
    answers = await asyncio.gather(server.complete(max_tokens=24), *left)
    expect_equal(text_of(answers[0]), before, "the text")


@case("health")
async def a_server_says_that_it_is_well(server: Server) -> None:
    expect_equal((await server.get("/health")).status, 200, "the status of /health")
