"""What ends a text: stop strings, stop tokens, the model's own end, and who may overrule it."""

from __future__ import annotations

from conformance.case import Group
from conformance.client import Json, Server, text_of
from conformance.outcome import NotOffered, expect, expect_equal

GROUP = Group("stopping")
case = GROUP.case
_END_IDS = (1, 106, 107, 2, 0, 3, 50256, 100257, 128001, 128009, 151643, 151645, 199999, 200002)
"""Ends of text and of turn of Gemma, Llama, Qwen and OpenAI's vocabularies."""


async def _text_and_middle(server: Server, length: int) -> tuple[str, str]:
    """A greedy text, and a part of it that begins behind its first third: at no token's border, as a rule."""
    text = text_of(await server.complete(max_tokens=24))
    start = len(text) // 3
    expect(len(text) >= start + length + 4, f"the text is too short to stop in: {text!r}")
    return text, text[start : start + length]


async def _end_id(server: Server) -> str:
    """A token id that ends a text. Raises NotOffered if none of the usual ones does."""
    if "end id" not in server.known:
        for token_id in map(str, _END_IDS):
            choice = (await server.complete(max_tokens=3, logit_bias={token_id: 100}))["choices"][0]
            if choice["finish_reason"] == "stop":
                server.known["end id"] = token_id
                break
        else:
            raise NotOffered("no known token ends the model's text")
    return str(server.known["end id"])


@case("string")
async def a_text_ends_before_its_stop_string(server: Server) -> None:
    text, stop = await _text_and_middle(server, 3)
    answer = await server.complete(max_tokens=24, stop=stop)
    expect_equal(text_of(answer), text[: text.index(stop)], "the text")
    expect_equal(answer["choices"][0]["finish_reason"], "stop", "finish_reason")


@case("string-across-tokens")
async def a_stop_string_over_several_tokens_leaves_nothing_of_itself(server: Server) -> None:
    text, stop = await _text_and_middle(server, 8)
    answer = await server.complete(max_tokens=24, stop=[stop])
    expect_equal(text_of(answer), text[: text.index(stop)], "the text")


@case("string-stream")
async def no_part_of_a_stop_string_is_streamed(server: Server) -> None:
    text, stop = await _text_and_middle(server, 8)
    stream = await server.stream_completion(max_tokens=24, stop=[stop])
    expect_equal(stream.text(), text[: text.index(stop)], "the streamed text")
    expect_equal(stream.finish_reasons(), ["stop"], "the finish reasons")


@case("string-half")
async def what_only_began_like_a_stop_string_is_sent(server: Server) -> None:
    text = text_of(await server.complete(max_tokens=12))
    stream = await server.stream_completion(max_tokens=12, stop=[text[-3:] + "§§"])
    expect_equal(stream.text(), text, "the streamed text")
    expect_equal(stream.finish_reasons(), ["length"], "the finish reasons")


@case("string-first")
async def the_stop_string_that_comes_first_ends_the_text(server: Server) -> None:
    text, stop = await _text_and_middle(server, 3)
    later = text[-3:]
    answer = await server.complete(max_tokens=24, stop=[later, "§§", stop])
    expect_equal(text_of(answer), text[: min(text.index(stop), text.index(later))], "the text")


@case("string-chat")
async def a_chat_ends_before_its_stop_string(server: Server) -> None:
    prompt = "Write a long story about a dragon."
    text = text_of(await server.chat(prompt, max_tokens=24))
    stop = text[len(text) // 3 :][:5]
    answer = await server.chat(prompt, max_tokens=24, stop=stop)
    expect_equal(text_of(answer), text[: text.index(stop)], "the text")
    expect_equal(answer["choices"][0]["finish_reason"], "stop", "finish_reason")


@case("string-unicode")
async def a_stop_string_may_be_any_character(server: Server) -> None:
    prompt = "日本語🤖🎉" * 8
    text = text_of(await server.complete(prompt, max_tokens=24))
    wide = [character for character in text[1:] if ord(character) > 0x2FFF]
    if not wide:
        raise NotOffered(f"the model does not go on in such characters: {text!r}")
    answer = await server.complete(prompt, max_tokens=24, stop=wide[0])
    expect_equal(text_of(answer), text[: text.index(wide[0])], "the text")


@case("string-four")
async def four_stop_strings_are_taken(server: Server) -> None:
    await server.complete(stop=["§a", "§b", "§c", "§d"])


@case("string-type")
async def a_stop_string_that_is_a_number_is_refused(server: Server) -> None:
    await server.refuses_chat(stop=5)


@case("string-included")
async def a_stop_string_is_kept_if_asked_for(server: Server) -> None:
    text, stop = await _text_and_middle(server, 3)
    end = text.index(stop)
    fields: Json = {"max_tokens": 24, "stop": stop, "include_stop_str_in_output": True}
    found = text_of(await server.complete(**fields))
    if found == text[:end]:
        raise NotOffered("include_stop_str_in_output has no effect")
    expect_equal(found, text[: end + len(stop)], "the text")


@case("end-token")
async def the_model_s_own_end_token_ends_the_text_and_is_not_part_of_it(server: Server) -> None:
    choice = (await server.complete(max_tokens=8, logit_bias={await _end_id(server): 100}))["choices"][0]
    expect_equal(choice["finish_reason"], "stop", "finish_reason")
    expect_equal(choice["text"], "", "the text")


@case("end-token-chat")
async def an_empty_answer_is_an_answer(server: Server) -> None:
    answer = await server.chat(max_tokens=8, logit_bias={await _end_id(server): 100})
    expect_equal(text_of(answer), "", "the text")
    expect_equal(answer["choices"][0]["finish_reason"], "stop", "finish_reason")
    stream = await server.stream_chat(max_tokens=8, logit_bias={await _end_id(server): 100})
    expect_equal((stream.text(), stream.finish_reasons()), ("", ["stop"]), "the stream")


@case("ignore-eos")
async def ignore_eos_has_the_model_go_on_after_its_end_token(server: Server) -> None:
    """Whether the end token is sampled and does not end, or is not sampled at all."""
    answer = await server.complete(max_tokens=6, ignore_eos=True, logit_bias={await _end_id(server): 100})
    if answer["choices"][0]["finish_reason"] == "stop":
        raise NotOffered("ignore_eos has no effect")
    expect_equal(answer["usage"]["completion_tokens"], 6, "completion_tokens")


@case("min-tokens")
async def min_tokens_keeps_the_end_token_away(server: Server) -> None:
    answer = await server.complete(max_tokens=8, min_tokens=5, logit_bias={await _end_id(server): 100})
    count = answer["usage"]["completion_tokens"]
    if count <= 1:
        raise NotOffered("min_tokens has no effect")
    expect(5 <= count <= 6, f"completion_tokens is {count}, not 5 and the end token")


@case("stop-token-ids")
async def a_stop_token_of_one_s_own_ends_the_text(server: Server) -> None:
    answer = await server.complete(max_tokens=8, stop_token_ids=[5000], logit_bias={"5000": 100})
    if answer["choices"][0]["finish_reason"] == "length":
        raise NotOffered("stop_token_ids has no effect")
    expect(answer["usage"]["completion_tokens"] <= 1, "the text goes on after it")
