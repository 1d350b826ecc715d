"""A load generator for any server that speaks the OpenAI API.

    python -m benchmarks.load --url http://127.0.0.1:8000 --concurrency 8 --requests 32

Closed loop (`--concurrency`): so many requests are always under way; the next starts when one ends. It
measures what the server can do, but slows down with the server. Open loop (`--rate`): requests arrive as users
would send them, at random moments (Poisson arrivals), whatever the server does. It shows the queues that a
closed loop hides.

All requests stream, with prompts of a known number of tokens and (from servers that know `ignore_eos`) outputs
of exactly `--output-tokens`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import httpx

from benchmarks.machine import describe_server
from benchmarks.output import format_table, write_results
from benchmarks.stats import Report, RequestRecord, split_tokens
from benchmarks.words import make_prompts, single_token_words

Body = dict[str, Any]
"""A request's JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """One run. Exactly one of `concurrency` and `rate` is set."""

    url: str
    """The server without `/v1`."""
    model: str
    api: str = "completions"
    """completions | chat"""
    concurrency: int | None = None
    rate: float | None = None
    """Mean arrivals per second."""
    requests: int = 32
    prompt_tokens: int = 128
    """`<bos>` included; a chat adds its template's tokens."""
    output_tokens: int = 64
    shared_prefix: int = 0
    """Words at the start that all prompts have in common."""
    warmup: int = 1
    """Requests sent one after the other before the clock starts."""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    fields: tuple[Mapping[str, Any], ...] = ({},)
    """More fields of a request's body: request i has the (i modulo length)-th, so that a batch can mix them."""
    timeout: float = 600.0
    """Seconds that one read may take."""
    budget: float | None = None
    """Seconds after which a closed loop starts no more requests, but for the first of each under way."""
    extensions: bool = True
    """Send vLLM's `ignore_eos` and `continuous_usage_stats`, which OpenAI's own service refuses."""

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise ValueError("give one of concurrency and rate")
        if self.api not in ("completions", "chat"):
            raise ValueError(f"api must be completions or chat, not {self.api!r}")


async def run_load(settings: LoadSettings, api_key: str | None = None) -> Report:
    """Send the load and return what it showed. A failed request counts as an error; the run goes on."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    # Without limits of its own, the client cannot queue what the settings want under way.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(settings.timeout)
    async with httpx.AsyncClient(
        base_url=settings.url, headers=headers, limits=limits, timeout=timeout, trust_env=False
    ) as client:
        words = await single_token_words(client, settings.model)
        total = settings.warmup + settings.requests
        prompts = make_prompts(words, total, settings.prompt_tokens, settings.seed, settings.shared_prefix)

        bodies = [request_body(settings, prompt, number) for number, prompt in enumerate(prompts)]

        async def send(body: Body) -> RequestRecord:
            return await send_request(client, settings.api, body, StreamRecorder())

        for body in bodies[: settings.warmup]:
            await send(body)
        measured = bodies[settings.warmup :]
        started = time.perf_counter()
        if settings.concurrency is not None:
            records = await closed_loop(send, measured, settings.concurrency, settings.budget)
        else:
            assert settings.rate is not None  # __post_init__
            records = await open_loop(
                send, measured, arrival_times(settings.rate, len(measured), settings.seed)
            )
        return Report.of(records, time.perf_counter() - started, asdict(settings))


_T = TypeVar("_T")


async def closed_loop(
    send: Callable[[_T], Awaitable[RequestRecord]],
    requests: Sequence[_T],
    concurrency: int,
    budget: float | None = None,
) -> list[RequestRecord]:
    """Keep `concurrency` requests under way until all are answered, or `budget` seconds have passed.

    The first request of each is sent whatever the time.
    """
    waiting = iter(requests)
    records: list[RequestRecord] = []
    deadline = time.perf_counter() + (math.inf if budget is None else budget)

    async def worker() -> None:
        for request in waiting:
            records.append(await send(request))
            if time.perf_counter() > deadline:
                return

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return records


async def open_loop(
    send: Callable[[_T], Awaitable[RequestRecord]], requests: Sequence[_T], arrivals: Sequence[float]
) -> list[RequestRecord]:
    started = time.perf_counter()

    async def at(moment: float, request: _T) -> RequestRecord:
        await asyncio.sleep(max(0.0, started + moment - time.perf_counter()))
        return await send(request)

    return await asyncio.gather(*(at(*pair) for pair in zip(arrivals, requests, strict=True)))


def arrival_times(rate: float, count: int, seed: int) -> list[float]:
    """Seconds after the start at which each of `count` requests arrives: a Poisson process of that rate."""
    rng = random.Random(seed)
    moment = 0.0
    moments: list[float] = []
    for _ in range(count):
        moment += rng.expovariate(rate)
        moments.append(moment)
    return moments


def request_body(settings: LoadSettings, prompt: str, number: int) -> Body:
    """What is sent for the `number`-th prompt."""
    body: Body = {
        "model": settings.model,
        "max_tokens": settings.output_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if settings.extensions:
        body["ignore_eos"] = True
        body["stream_options"]["continuous_usage_stats"] = True
    if settings.api == "chat":
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    return body | dict(settings.fields[number % len(settings.fields)])


async def send_request(
    client: httpx.AsyncClient, api: str, body: Body, stream: StreamRecorder
) -> RequestRecord:
    """Send one request, and record in `stream` what comes back while it comes."""
    path = "/v1/chat/completions" if api == "chat" else "/v1/completions"
    sent_at = time.perf_counter()
    try:
        async with client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                stream.error = f"HTTP {response.status_code}: {text[:300]}"
            else:
                # Read on after [DONE], so that the connection can carry the next request.
                async for data in sse_data(response.aiter_bytes()):
                    stream.feed(data, time.perf_counter())
    except httpx.HTTPError as error:
        stream.error = f"{type(error).__name__}: {error}"
    return stream.record(sent_at, time.perf_counter())


async def sse_data(chunks: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """The data of each server-sent event. Comments and other fields are dropped; data lines are joined.

    Source: WHATWG HTML, 9.2.6 "Interpreting an event stream". Lines are split as bytes, since `str.splitlines`
    also splits at U+2028 and others that JSON may hold. A lone carriage return does not end a line here.
    """
    data: list[str] = []
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" ").decode())
            elif not line and data:
                yield "\n".join(data)
                data = []


class StreamRecorder:
    """Turns the events of one streamed answer into a `RequestRecord`."""

    def __init__(self) -> None:
        self.error: str | None = None
        self._done_at: float | None = None
        self._chunk_times: list[float] = []
        self._chunk_characters: list[int] = []
        self._chunk_totals: list[int | None] = []
        """Output tokens up to and including the chunk, where the server says so."""
        self._usage: dict[str, Any] = {}

    def feed(self, data: str, now: float) -> None:
        """Take one event that arrived at `now`; what follows an error or `[DONE]` is ignored."""
        if self.error is not None or self._done_at is not None:
            return
        if data == "[DONE]":
            self._done_at = now
            return
        try:
            event = json.loads(data)
        except ValueError:
            self.error = f"not JSON: {data[:200]}"
            return
        if not isinstance(event, dict) or event.get("error"):
            self.error = data[:300]
            return
        usage = event.get("usage") or {}
        self._usage = usage or self._usage
        for choice in event.get("choices") or ():
            text = _text(choice)
            if text:
                self._chunk_times.append(now)
                self._chunk_characters.append(len(text))
                self._chunk_totals.append(usage.get("completion_tokens"))

    @property
    def num_tokens(self) -> int:
        """Output tokens so far; chunks, where the server does not count."""
        return (self._chunk_totals[-1] if self._chunk_totals else None) or len(self._chunk_times)

    def record(self, sent_at: float, finished_at: float) -> RequestRecord:
        if self.error is None and self._done_at is None:
            self.error = "the stream ended without [DONE]"
        tokens = self._tokens_by_chunk()
        return RequestRecord(
            sent_at=sent_at,
            finished_at=finished_at if self._done_at is None else self._done_at,
            chunk_times=tuple(self._chunk_times),
            chunk_tokens=tokens,
            prompt_tokens=int(self._usage.get("prompt_tokens") or 0),
            output_tokens=int(self._usage.get("completion_tokens") or sum(tokens)),
            error=self.error,
        )

    def _tokens_by_chunk(self) -> tuple[int, ...]:
        totals = [total for total in self._chunk_totals if total is not None]
        if totals and len(totals) == len(self._chunk_totals):
            return tuple(max(1, high - low) for low, high in pairwise([0, *totals]))
        final = self._usage.get("completion_tokens")
        return split_tokens(int(final or len(self._chunk_times)), self._chunk_characters)


def _text(choice: dict[str, Any]) -> str:
    delta = choice.get("delta")
    content = delta.get("content") if isinstance(delta, dict) else choice.get("text")
    return content if isinstance(content, str) else ""


async def first_model(url: str, api_key: str | None = None) -> str:
    """The id of the first model that the server lists."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=30) as client:
        response = await client.get("/v1/models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])


async def _main(arguments: argparse.Namespace) -> int:
    model = arguments.model or await first_model(arguments.url, arguments.api_key)
    loads: list[dict[str, Any]] = [{"rate": arguments.rate}] if arguments.rate else []
    loads = loads or [{"concurrency": concurrency} for concurrency in arguments.concurrency]
    reports: list[Report] = []
    for number, load in enumerate(loads):
        settings = LoadSettings(
            url=arguments.url,
            model=model,
            api=arguments.api,
            requests=arguments.requests or 4 * (load.get("concurrency") or 8),
            prompt_tokens=arguments.prompt_tokens,
            output_tokens=arguments.output_tokens,
            shared_prefix=arguments.shared_prefix,
            warmup=arguments.warmup,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            # Another seed for each run, lest a prefix cache answer the next run's prompts.
            seed=arguments.seed + number,
            timeout=arguments.timeout,
            extensions=not arguments.no_extensions,
            **load,
        )
        reports.append(await run_load(settings, arguments.api_key))
    print(format_table(reports))
    for report in reports:
        for error in report.first_errors:
            print(f"error: {error}", file=sys.stderr)
    if arguments.output:
        write_results(Path(arguments.output), reports, await describe_server(arguments.url))
    return 1 if any(report.errors for report in reports) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server, without /v1")
    parser.add_argument("--model", help="default: the first one that the server lists")
    parser.add_argument("--api-key")
    parser.add_argument("--api", choices=["completions", "chat"], default="completions")
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--concurrency", type=int, nargs="+", default=[1, 8, 32], help="closed loop; several: one run each"
    )
    load.add_argument("--rate", type=float, help="open loop: mean arrivals per second")
    parser.add_argument(
        "--requests", type=int, help="in each run; default: four for each one under way, 32 in an open loop"
    )
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--shared-prefix", type=int, default=0, help="tokens that all prompts begin with")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds to wait for a chunk")
    parser.add_argument("--no-extensions", action="store_true", help="send only fields that OpenAI has")
    parser.add_argument("--output", help="JSON file to write")
    return parser


def main() -> int:
    arguments = _parser().parse_args()
    arguments.url = arguments.url.rstrip("/").removesuffix("/v1")
    return asyncio.run(_main(arguments))


if __name__ == "__main__":
    sys.exit(main())
