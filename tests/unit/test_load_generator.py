"""The load generator's arithmetic, and its client against a small server on the loopback interface."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.load import (
    LoadSettings,
    StreamRecorder,
    arrival_times,
    closed_loop,
    open_loop,
    run_load,
    sse_data,
)
from benchmarks.output import format_table
from benchmarks.stats import Report, RequestRecord, Summary, percentile, split_tokens
from benchmarks.words import COMMON_WORDS, make_prompts

finite = st.floats(-1e6, 1e6)


@given(st.lists(finite, min_size=1), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    expected = float(np.percentile(values, percent))
    assert percentile(sorted(values), percent) == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_a_summary_of_nothing_has_no_figures() -> None:
    assert Summary.of([]) == Summary(None, None, None, None)


@given(st.integers(1, 500), st.lists(st.integers(0, 50), min_size=1, max_size=40))
def test_tokens_are_split_over_chunks_without_losing_one(total: int, pieces: list[int]) -> None:
    parts = split_tokens(total, pieces)
    assert len(parts) == len(pieces)
    assert min(parts) >= 1
    assert sum(parts) == max(total, len(pieces))


def test_a_chunk_of_three_tokens_counts_as_three_gaps() -> None:
    record = RequestRecord(
        sent_at=0.0, finished_at=2.0, chunk_times=(0.5, 0.6, 1.2), chunk_tokens=(1, 1, 3), output_tokens=5
    )
    assert record.token_gaps == pytest.approx([0.1, 0.2, 0.2, 0.2])
    assert record.ttft == 0.5
    assert record.output_speed == pytest.approx(4 / 0.7)


def test_a_request_of_one_chunk_has_no_gaps_and_no_speed() -> None:
    record = RequestRecord(sent_at=0.0, finished_at=1.0, chunk_times=(0.5,), chunk_tokens=(4,), output_tokens=4)
    assert record.token_gaps == []
    assert record.output_speed is None


def test_poisson_arrivals_repeat_with_their_seed_and_have_the_rate_asked_for() -> None:
    moments = arrival_times(rate=20.0, count=5000, seed=3)
    assert moments == arrival_times(rate=20.0, count=5000, seed=3)
    assert moments != arrival_times(rate=20.0, count=5000, seed=4)
    gaps = np.diff([0.0, *moments])
    assert (gaps >= 0).all()
    # Mean and standard deviation of an exponential distribution are both 1 / rate.
    assert gaps.mean() == pytest.approx(0.05, rel=0.06)
    assert gaps.std() == pytest.approx(0.05, rel=0.08)


async def test_a_closed_loop_keeps_exactly_so_many_requests_under_way() -> None:
    under_way = 0
    most = 0

    async def send(prompt: str) -> RequestRecord:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        under_way -= 1
        return RequestRecord(sent_at=0.0, finished_at=1.0)

    records = await closed_loop(send, [str(number) for number in range(20)], concurrency=4)
    assert len(records) == 20
    assert most == 4


async def test_after_its_budget_a_closed_loop_starts_nothing_more_but_has_sent_each_ones_first() -> None:
    async def send(_: str) -> RequestRecord:
        await asyncio.sleep(0.02)
        return RequestRecord(sent_at=0.0, finished_at=1.0)

    requests = [str(number) for number in range(20)]
    assert len(await closed_loop(send, requests, concurrency=4, budget=0.0)) == 4
    assert len(await closed_loop(send, requests, concurrency=4, budget=60.0)) == 20


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    released = asyncio.Event()
    arrived: list[str] = []

    async def send(prompt: str) -> RequestRecord:
        arrived.append(prompt)
        if len(arrived) == 3:
            released.set()
        await released.wait()  # Only all three being under way at once lets any of them end.
        return RequestRecord(sent_at=0.0, finished_at=1.0)

    records = await asyncio.wait_for(open_loop(send, ["a", "b", "c"], [0.0, 0.01, 0.02]), timeout=5)
    assert len(records) == 3
    assert arrived == ["a", "b", "c"]


async def _bytes(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def test_events_are_parsed_whatever_the_packets_are() -> None:
    stream = (
        ": keep-alive\n\n"
        'data: {"text": "caf\u00e9 \u2028 \u000b"}\r\n\r\n'
        "event: x\nid: 7\ndata:two\ndata: lines\n\n"
        "\n\ndata: [DONE]\n\n"
    ).encode()
    expected = ['{"text": "caf\u00e9 \u2028 \u000b"}', "two\nlines", "[DONE]"]
    for size in (1, 2, 3, 7, len(stream)):
        packets = [stream[i : i + size] for i in range(0, len(stream), size)]
        assert [data async for data in sse_data(_bytes(packets))] == expected


def _chunk(text: str, **usage: int) -> str:
    return json.dumps({"choices": [{"text": text}], "usage": usage or None})


def test_the_servers_own_running_count_decides_how_many_tokens_a_chunk_had() -> None:
    stream = StreamRecorder()
    stream.feed(_chunk("a", prompt_tokens=9, completion_tokens=1), 1.0)
    stream.feed(_chunk("", prompt_tokens=9, completion_tokens=3), 1.5)  # Tokens that have no text yet.
    stream.feed(_chunk("bcd", prompt_tokens=9, completion_tokens=5), 2.0)
    stream.feed("[DONE]", 2.5)
    record = stream.record(sent_at=0.0, finished_at=9.0)
    assert record.chunk_tokens == (1, 4)
    assert record.chunk_times == (1.0, 2.0)
    assert (record.prompt_tokens, record.output_tokens, record.finished_at, record.error) == (9, 5, 2.5, None)


def test_without_a_running_count_tokens_are_split_by_length() -> None:
    stream = StreamRecorder()
    for text, now in (("aa", 1.0), ("aaaaaaaa", 2.0)):
        stream.feed(_chunk(text), now)
    stream.feed(json.dumps({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 5}}), 2.0)
    stream.feed("[DONE]", 2.0)
    record = stream.record(0.0, 2.0)
    assert sum(record.chunk_tokens) == 5
    assert record.chunk_tokens[1] > record.chunk_tokens[0]


def test_chat_deltas_count_and_the_role_does_not() -> None:
    stream = StreamRecorder()
    stream.feed(json.dumps({"choices": [{"delta": {"role": "assistant", "content": ""}}]}), 1.0)
    stream.feed(json.dumps({"choices": [{"delta": {"content": "Hi"}}]}), 2.0)
    stream.feed("[DONE]", 2.0)
    assert stream.record(0.0, 2.0).chunk_times == (2.0,)


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([_chunk("a")], "ended without"),
        ([_chunk("a"), '{"error": {"message": "the engine died"}}', "[DONE]"], "the engine died"),
        (["<html>"], "not JSON"),
    ],
)
def test_a_broken_stream_is_an_error(events: list[str], expected: str) -> None:
    stream = StreamRecorder()
    for event in events:
        stream.feed(event, 1.0)
    assert expected in str(stream.record(0.0, 2.0).error)


def test_prompts_are_of_the_length_asked_for_and_share_only_their_prefix() -> None:
    prompts = make_prompts(COMMON_WORDS, count=5, num_tokens=40, seed=1, shared_prefix=10)
    assert prompts == make_prompts(COMMON_WORDS, count=5, num_tokens=40, seed=1, shared_prefix=10)
    words = [prompt.split() for prompt in prompts]
    assert {len(each) for each in words} == {39}  # <bos> is the fortieth.
    assert len({tuple(each[:10]) for each in words}) == 1
    assert len({tuple(each[10:]) for each in words}) == 5


def test_the_common_words_are_distinct() -> None:
    assert len(set(COMMON_WORDS)) == len(COMMON_WORDS) >= 200


class FakeServer:
    """Streams `max_tokens` words, two to a chunk; does not know the word "able" as one token."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.refuse = False
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split()[1]
        length = next(
            (
                int(line.split(":")[1])
                for line in head.split("\r\n")
                if line.lower().startswith("content-length")
            ),
            0,
        )
        body = json.loads(await reader.readexactly(length)) if length else {}
        status, kind, answer = self.answer(path, body)
        writer.write(
            f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n{answer}".encode()
        )
        await writer.drain()
        writer.close()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, str, str]:
        if path == "/tokenize":
            words = body["prompt"].split()
            return 200, "application/json", json.dumps({"count": len(words) + words.count("able")})
        if self.refuse:
            return 429, "application/json", '{"error": {"message": "busy"}}'
        self.requests.append(body)
        prompt_tokens = len(body["prompt"].split()) + 1
        events = [
            _chunk(" word word", prompt_tokens=prompt_tokens, completion_tokens=done)
            for done in range(2, body["max_tokens"] + 1, 2)
        ]
        return 200, "text/event-stream", "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"])


@asynccontextmanager
async def fake_server() -> AsyncIterator[FakeServer]:
    fake = FakeServer()
    server = await asyncio.start_server(fake.handle, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield fake


@pytest.mark.parametrize("load", [{"concurrency": 3}, {"rate": 500.0}])
async def test_a_run_sends_what_was_asked_for_and_counts_what_came_back(load: dict[str, Any]) -> None:
    async with fake_server() as server:
        settings = LoadSettings(
            url=server.url, model="m", requests=6, prompt_tokens=20, output_tokens=8, **load
        )
        report = await run_load(settings)
    assert len(server.requests) == 7  # One of them to warm up.
    assert all(request["stream"] and request["ignore_eos"] for request in server.requests)
    assert not any("able" in request["prompt"].split() for request in server.requests)
    assert (report.requests, report.errors) == (6, 0)
    assert (report.mean_prompt_tokens, report.mean_output_tokens) == (20, 8)
    assert report.output_tokens_per_second == pytest.approx(48 / report.wall_seconds)
    assert report.ttft_ms.p50 is not None
    assert report.settings["prompt_tokens"] == 20


async def test_requests_take_turns_with_the_fields_that_were_given() -> None:
    fields = ({"presence_penalty": 0.5, "logprobs": 5}, {"temperature": 0.7}, {})
    async with fake_server() as server:
        await run_load(
            LoadSettings(url=server.url, model="m", requests=5, warmup=1, concurrency=1, fields=fields)
        )
    assert [request.get("logprobs") for request in server.requests] == [5, None, None] * 2
    assert [request["temperature"] for request in server.requests] == [0.0, 0.7, 0.0] * 2


async def test_a_refusal_is_counted_and_shown() -> None:
    async with fake_server() as server:
        server.refuse = True
        report = await run_load(LoadSettings(url=server.url, model="m", requests=3, concurrency=1))
    assert (report.requests, report.errors) == (0, 3)
    assert "429" in report.first_errors[0]
    assert "busy" in report.first_errors[0]


def test_settings_name_one_kind_of_load() -> None:
    with pytest.raises(ValueError, match="one of concurrency and rate"):
        LoadSettings(url="", model="m")
    with pytest.raises(ValueError, match="one of concurrency and rate"):
        LoadSettings(url="", model="m", rate=1.0, concurrency=1)


def test_the_table_has_a_line_for_each_run() -> None:
    record = RequestRecord(0.0, 1.0, (0.25, 0.5), (1, 1), 10, 2)
    table = format_table(
        [Report.of([record], 1.0, {"concurrency": 8}), Report.of([], 1.0, {"concurrency": None, "rate": 2.5})]
    )
    header, closed, opened = table.splitlines()
    assert header.split()[:3] == ["load", "requests", "errors"]
    assert closed.split()[:5] == ["c=8", "1", "0", "2.0", "1.00"]
    assert "250.0" in closed
    assert opened.split()[0] == "2.5/s"
    assert len({len(header), len(closed), len(opened)}) == 1
