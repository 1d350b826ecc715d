"""Clients that read many streams and do little else, in a process of their own.

    python -m benchmarks.front.reader < job.json

prints a line when all streams are open, and JSON at the end.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from urllib.parse import urlsplit

import msgspec
import numpy as np
import uvloop

_TEXT = re.compile(rb'"text":"([^"]*)"')


class Job(msgspec.Struct, frozen=True):
    url: str
    """http://HOST:PORT"""
    model: str
    streams: int
    seconds: float
    words: list[str]
    out: str
    """Where the arrivals go: .npy, fp64 [tokens, 2], number of the word and when it came."""


class Stream(asyncio.Protocol):
    def __init__(self, request: bytes, numbers: dict[bytes, int], arrivals: list[tuple[int, float]]) -> None:
        self._request = request
        self._numbers = numbers
        self._arrivals = arrivals
        self._left_over = b""
        self.num_events = 0
        self.num_tokens = 0
        self.has_begun = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport) or hasattr(transport, "write")
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        data = self._left_over + data
        end = data.rfind(b"\n\n") + 1
        self._left_over = data[end:]
        for text in _TEXT.findall(data, 0, end):
            self.num_events += 1
            for word in text.split():
                self._arrivals.append((self._numbers[word], now))
                self.num_tokens += 1
        if self.num_tokens:
            self.has_begun.set()


async def read(job: Job) -> dict[str, float]:
    body = json.dumps(
        {"model": job.model, "prompt": "x", "max_tokens": 100_000, "stream": True, "ignore_eos": True}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    request = head.encode() + b"content-type: application/json\r\n\r\n" + body
    numbers = {word.encode(): number for number, word in enumerate(job.words)}
    arrivals: list[tuple[int, float]] = []
    loop = asyncio.get_running_loop()
    host, port = urlsplit(job.url).netloc.split(":")
    streams = []
    for _ in range(job.streams):
        stream = Stream(request, numbers, arrivals)
        await loop.create_connection(lambda stream=stream: stream, host, int(port))  # type: ignore[misc]
        streams.append(stream)
    await asyncio.wait_for(asyncio.gather(*(stream.has_begun.wait() for stream in streams)), 120)
    print("open", flush=True)
    await asyncio.sleep(1.0)
    arrivals.clear()
    events, tokens = sum(s.num_events for s in streams), sum(s.num_tokens for s in streams)
    started = time.monotonic()
    await asyncio.sleep(job.seconds)
    seconds = time.monotonic() - started
    np.save(job.out, np.array(arrivals, dtype=np.float64))
    return {
        "seconds": seconds,
        "tokens": sum(s.num_tokens for s in streams) - tokens,
        "events": sum(s.num_events for s in streams) - events,
    }


def main() -> int:
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    print(json.dumps(uvloop.run(read(job))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
