"""Server-sent events: framing, order, and that a stream says the same as a whole answer."""

from __future__ import annotations

from conformance.case import Group
from conformance.client import COUNTING, Json, Server, Stream, text_of
from conformance.outcome import NotOffered, expect, expect_equal, expect_keys

GROUP = Group("streaming")
case = GROUP.case

UNICODE = "日本語🤖🎉👩‍👩‍👧‍👦" * 6
"""Characters of several tokens each, which a model goes on with."""
WITH_USAGE = {"include_usage": True}


@case("media-type")
async def a_stream_is_an_event_stream(server: Server) -> None:
    media_type = (await server.stream_chat()).headers.get("content-type", "")
    expect_equal(media_type.partition(";")[0].strip(), "text/event-stream", "content-type")


@case("framing")
async def every_event_is_one_data_line_and_a_blank_line(server: Server) -> None:
    lines = (await server.stream_chat()).lines
    for number, line in enumerate(lines):
        expect(line == "" or line.startswith(("data: ", ":")), f"a line is {line[:60]!r}")
        if line.startswith("data: "):
            expect_equal(lines[number + 1], "", "the line behind an event")


@case("done")
async def a_stream_ends_with_done_once(server: Server) -> None:
    data = (await server.stream_chat()).data
    expect_equal(data[-1], "[DONE]", "the last event")
    expect_equal(data.count("[DONE]"), 1, "the number of [DONE]")


@case("chunk-shape")
async def every_chunk_has_every_required_key(server: Server) -> None:
    for chunk in (await server.stream_chat()).chunks:
        expect_keys(chunk, "id object created model choices", "a chunk")
        expect_equal(chunk["object"], "chat.completion.chunk", "object")
        for choice in chunk["choices"]:
            expect_keys(choice, "index delta finish_reason", "a choice")


@case("same-head")
async def all_chunks_have_the_same_id_time_and_model(server: Server) -> None:
    heads = {(chunk["id"], chunk["created"], chunk["model"]) for chunk in (await server.stream_chat()).chunks}
    expect_equal(len(heads), 1, "the number of different heads")


@case("role")
async def the_role_comes_in_the_first_chunk_only(server: Server) -> None:
    roles = [choice["delta"].get("role") for choice in (await server.stream_chat()).choices()]
    expect_equal(roles, ["assistant"] + [None] * (len(roles) - 1), "the roles")


@case("finish-once")
async def the_finish_reason_comes_once_and_nothing_follows_it(server: Server) -> None:
    choices = (await server.stream_chat()).choices()
    reasons = [choice["finish_reason"] for choice in choices]
    expect_equal(len([reason for reason in reasons if reason]), 1, "the number of finish reasons")
    expect_equal(reasons[-1], "length", "the last finish_reason")


@case("increments")
async def text_arrives_in_several_pieces(server: Server) -> None:
    pieces = [
        choice
        for choice in (await server.stream_chat(max_tokens=24)).choices()
        if choice["delta"].get("content")
    ]
    expect(len(pieces) >= 3, f"24 tokens came in {len(pieces)} pieces")


@case("same-text-greedy")
async def a_greedy_stream_has_the_text_of_the_whole_answer(server: Server) -> None:
    whole = text_of(await server.chat(max_tokens=32))
    expect_equal((await server.stream_chat(max_tokens=32)).text(), whole, "the streamed text")


@case("same-text-sampled")
async def a_sampled_stream_has_the_text_of_the_whole_answer(server: Server) -> None:
    fields: Json = {"temperature": 1, "seed": 7, "max_tokens": 32}
    whole = text_of(await server.chat(**fields))
    expect_equal((await server.stream_chat(**fields)).text(), whole, "the streamed text")


@case("same-text-stop")
async def a_stopped_stream_has_the_text_of_the_whole_answer(server: Server) -> None:
    fields: Json = {"max_tokens": 24, "stop": [", 16", "0000"]}
    whole = text_of(await server.complete(**fields))
    expect_equal((await server.stream_completion(**fields)).text(), whole, "the streamed text")


@case("unicode")
async def characters_of_several_tokens_arrive_whole(server: Server) -> None:
    whole = text_of(await server.chat(UNICODE, max_tokens=40))
    stream = await server.stream_chat(UNICODE, max_tokens=40)
    expect_equal(stream.text(), whole, "the streamed text")
    for choice in stream.choices()[:-2]:  # a limit of tokens may cut the last character
        expect("\ufffd" not in (choice["delta"].get("content") or ""), "a piece has half a character")


@case("unicode-completion")
async def a_completion_streams_characters_of_several_tokens_whole(server: Server) -> None:
    whole = text_of(await server.complete(UNICODE, max_tokens=40))
    stream = await server.stream_completion(UNICODE, max_tokens=40)
    expect_equal(stream.text(), whole, "the streamed text")
    for choice in stream.choices()[:-2]:
        expect("\ufffd" not in choice["text"], "a piece has half a character")


@case("one-token")
async def a_stream_of_one_token_is_complete(server: Server) -> None:
    stream = await server.stream_chat(max_tokens=1)
    expect_equal(stream.finish_reasons(), ["length"], "the finish reasons")
    expect_equal(stream.text(), text_of(await server.chat(max_tokens=1)), "the text")


@case("usage-unasked")
async def usage_is_not_sent_unless_asked_for(server: Server) -> None:
    chunks = (await server.stream_chat()).chunks
    expect(all(chunk["choices"] for chunk in chunks), "a chunk has no choices")
    expect(not any(chunk.get("usage") for chunk in chunks), "a chunk has usage")


@case("usage-last")
async def usage_comes_in_a_last_chunk_without_choices(server: Server) -> None:
    chunks = (await server.stream_chat(stream_options=WITH_USAGE)).chunks
    expect_equal(chunks[-1]["choices"], [], "the choices of the last chunk")
    expect_keys(chunks[-1]["usage"], "prompt_tokens completion_tokens total_tokens", "usage")
    expect(not any(chunk.get("usage") for chunk in chunks[:-1]), "an earlier chunk has usage")
    expect(all(chunk["choices"] for chunk in chunks[:-1]), "an earlier chunk has no choices")


@case("usage-same")
async def a_stream_s_usage_is_that_of_the_whole_answer(server: Server) -> None:
    whole = (await server.chat())["usage"]
    usage = (await server.stream_chat(stream_options=WITH_USAGE)).chunks[-1]["usage"]
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        expect_equal(usage[key], whole[key], key)


@case("usage-continuous")
async def usage_so_far_rises_in_every_chunk_if_asked_for(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = (await server.stream_chat(stream_options=options)).chunks
    if not all(chunk.get("usage") for chunk in chunks):
        raise NotOffered("continuous_usage_stats has no effect")
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    expect(counts == sorted(counts) and counts[0] < counts[-1], f"completion_tokens are {counts}")


@case("options-without-stream")
async def stream_options_without_a_stream_are_refused(server: Server) -> None:
    await server.refuses_chat(stream_options=WITH_USAGE)


@case("error-status")
async def a_request_that_cannot_be_served_is_refused_before_the_stream(server: Server) -> None:
    await server.refuses_chat(stream=True, temperature="hot")


@case("n")
async def the_chunks_of_several_choices_are_told_apart_by_index(server: Server) -> None:
    stream = await server.stream_chat(n=3, temperature=1, seed=3)
    seen = {choice["index"] for chunk in stream.chunks for choice in chunk["choices"]}
    expect_equal(seen, {0, 1, 2}, "the indexes")
    for index in range(3):
        expect_equal(len(stream.finish_reasons(index)), 1, f"the number of ends of choice {index}")
        roles = [choice for choice in stream.choices(index) if choice["delta"].get("role")]
        expect_equal(len(roles), 1, f"the number of roles of choice {index}")


@case("n-same-text")
async def several_streamed_choices_have_the_texts_of_the_whole_answer(server: Server) -> None:
    fields: Json = {"n": 3, "temperature": 1, "seed": 3}
    whole = await server.chat(**fields)
    stream = await server.stream_chat(**fields)
    for index in range(3):
        expect_equal(stream.text(index), text_of(whole, index), f"the text of choice {index}")


@case("completion")
async def a_completion_streams_text_completions_and_done(server: Server) -> None:
    stream = await server.stream_completion()
    expect_equal(stream.data[-1], "[DONE]", "the last event")
    for chunk in stream.chunks:
        expect_keys(chunk, "id object created model choices", "a chunk")
        expect_equal(chunk["object"], "text_completion", "object")
    expect_equal(len({chunk["id"] for chunk in stream.chunks}), 1, "the number of ids")
    expect_equal(stream.finish_reasons(), ["length"], "the finish reasons")


@case("completion-same-text")
async def a_streamed_completion_has_the_text_of_the_whole_one(server: Server) -> None:
    expect_equal((await server.stream_completion()).text(), text_of(await server.complete()), "the text")


@case("completion-usage")
async def a_streamed_completion_ends_with_usage_if_asked_for(server: Server) -> None:
    whole = (await server.complete())["usage"]
    last = (await server.stream_completion(stream_options=WITH_USAGE)).chunks[-1]
    expect_equal(last["choices"], [], "the choices of the last chunk")
    expect_equal(last["usage"]["total_tokens"], whole["total_tokens"], "total_tokens")


@case("completion-prompts")
async def a_stream_of_two_prompts_keeps_them_apart(server: Server) -> None:
    prompts = [COUNTING, "a b c a b c a b c"]
    stream: Stream = await server.stream_completion(prompts)
    for index, prompt in enumerate(prompts):
        expect_equal(stream.text(index), text_of(await server.complete(prompt)), f"the text of prompt {index}")
