"""`make soak`: thousands of requests to a real server, and what they leave behind.

It fails on any answer that is not the expected one, on a KV block, descriptor or thread that stays, and on
memory that grows with the number of requests. Options: `make soak ARGS="--requests 2000"`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.e2e.server_process import ServerProcess, running_server
from tests.soak.workload import Ask, workload

WARM_UP = 0.2
"""Share of the requests after which memory, descriptors and threads must have stopped growing."""
MOST_MB_PER_THOUSAND = 1.0
FEWEST_JUDGED = 1000
"""With fewer requests, memory grows because it is used for the first time."""
SPARE_DESCRIPTORS = 4
SPARE_THREADS = 4
"""Pools of threads grow to their size when they are first busy enough."""
SERVER_OPTIONS = (
    *("--dtype", "float32", "--num-threads", "1"),
    # Room for a few of the longest, so that some are preempted.
    *("--num-gpu-blocks-override", "96"),
    # Should a request keep its place, the rest will soon be refused.
    *("--max-queued-requests", "128"),
)


@dataclass(frozen=True, slots=True)
class Process:
    rss_mb: float
    descriptors: int
    threads: int

    @classmethod
    def of(cls, process: psutil.Process) -> Process:
        with process.oneshot():
            return cls(process.memory_info().rss / 1e6, process.num_fds(), process.num_threads())


@dataclass(slots=True)
class Record:
    """What was seen while requests were answered."""

    statuses: Counter[str] = field(default_factory=Counter)
    """Answers by status, and requests that were abandoned."""
    faults: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of each valid request that was read to its end, in order."""
    samples: list[tuple[int, Process, Process]] = field(default_factory=list)
    """Requests done, the front and the engine at that time."""
    elapsed: float = 0.0

    @property
    def num_done(self) -> int:
        return self.statuses.total()

    def slopes(self) -> tuple[float, float]:
        """MB per thousand requests, of front and engine."""
        done = [sample[0] / 1000 for sample in self.samples]
        front, engine = ([sample[i].rss_mb for sample in self.samples] for i in (1, 2))
        return _slope(done, front), _slope(done, engine)

    def drift(self) -> float:
        """By how much the p99 of the last third is above that of the first, as a share of it."""
        third = len(self.seconds) // 3
        first, last = (_percentile(part, 99) for part in (self.seconds[:third], self.seconds[-third:]))
        return last / first - 1


class Soak:
    """A server under load. `phase` may be called again and again; between two calls the server is at rest."""

    def __init__(self, server: ServerProcess, seed: int, concurrency: int) -> None:
        self._server = server
        self._asks = workload(seed)
        self._concurrency = concurrency
        self._front, self._engine = psutil.Process(server.process.pid), server.engine
        self._canary: object = None

    def phase(self, num_requests: int) -> Record:
        record = Record()
        started = time.monotonic()
        asyncio.run(self._load(itertools.islice(self._asks, num_requests), record))
        record.elapsed = time.monotonic() - started
        self._check_rest(record)
        return record

    def processes(self) -> tuple[Process, Process]:
        return Process.of(self._front), Process.of(self._engine)

    async def _load(self, asks: Iterator[Ask], record: Record) -> None:
        limits = httpx.Limits(max_connections=self._concurrency)
        async with httpx.AsyncClient(
            base_url=self._server.url, limits=limits, timeout=120, trust_env=False
        ) as client:

            async def work() -> None:
                for ask in asks:
                    await self._answer(client, ask, record)
                    if record.num_done % 50 == 0:
                        record.samples.append((record.num_done, *self.processes()))

            await asyncio.gather(*(work() for _ in range(self._concurrency)))

    async def _answer(self, client: httpx.AsyncClient, ask: Ask, record: Record) -> None:
        started = time.monotonic()
        try:
            async with asyncio.timeout(ask.leaves_after_seconds):
                status, answer = await _read(client, ask)
        except TimeoutError:
            record.statuses["abandoned"] += 1
            return
        except httpx.HTTPError as error:
            record.statuses["lost"] += 1
            record.faults.append(f"{error!r} for {ask}")
            return
        if answer is None:
            record.statuses["abandoned"] += 1
            return
        record.statuses[str(status)] += 1
        fault = _fault(ask, status, answer)
        if fault is None and ask.is_canary:
            self._canary = self._canary or answer["choices"]
            fault = None if answer["choices"] == self._canary else "the canary sings another song"
        if fault is not None:
            record.faults.append(f"{fault}: {status} {str(answer)[:500]} for {ask}")
        if status == 200:
            record.seconds.append(time.monotonic() - started)

    def _check_rest(self, record: Record) -> None:
        """Once all is answered, nothing runs, waits or is held."""
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            with suppress(AssertionError):
                self._server.wait_metric(f"vllm:{name}", 0.0)
            if left := self._server.metric(f"vllm:{name}"):
                record.faults.append(f"{name} is {left} when nobody asks for anything")
        if self._server.process.poll() is not None or self._server.engine.pid != self._engine.pid:
            record.faults.append("the server or its engine has ended")
        record.faults += [
            line for line in self._server.log.splitlines() if " ERROR " in line or "Traceback" in line
        ]


async def _read(client: httpx.AsyncClient, ask: Ask) -> tuple[int, Any]:
    """Status and answer: JSON, the events of a stream, or None of one that was left."""
    async with client.stream(
        "POST", ask.path, content=ask.content, headers={"content-type": "application/json"}
    ) as response:
        if ask.leaves_after_chunks is not None:
            num_read = 0
            async for _ in response.aiter_raw():
                num_read += 1
                if num_read > ask.leaves_after_chunks:
                    break
            return response.status_code, None
        text = (await response.aread()).decode()
    if response.headers["content-type"].startswith("text/event-stream"):
        return response.status_code, [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return response.status_code, json.loads(text)


def _fault(ask: Ask, status: int, answer: Any) -> str | None:
    """What is wrong with an answer."""
    if status != ask.status:
        return f"not the expected {ask.status}"
    if status != 200:
        error = answer["error"]
        return None if error["message"] and ask.code in (None, error["code"]) else "not the expected error"
    if isinstance(answer, list):
        if not answer or answer[-1] != "[DONE]":
            return "a stream without its end"
        choices = [choice for event in answer[:-1] for choice in json.loads(event).get("choices", [])]
        ends = Counter(choice["index"] for choice in choices if choice.get("finish_reason"))
        reasons = {choice["finish_reason"] for choice in choices if choice.get("finish_reason")}
    else:
        ends = Counter(choice["index"] for choice in answer["choices"])
        reasons = {choice["finish_reason"] for choice in answer["choices"]}
    if ends != {index: 1 for index in range(ask.body.get("n", 1))}:
        return "not one end for each choice"
    return None if reasons <= {"stop", "length"} else f"ended for {reasons}"


def violations(record: Record, before: tuple[Process, Process], after: tuple[Process, Process]) -> list[str]:
    """Of what a soak of any length must hold. before, after: front and engine at rest."""
    found = record.faults[:20]
    for name, first, last in zip(("front", "engine"), before, after, strict=True):
        if last.descriptors > first.descriptors + SPARE_DESCRIPTORS:
            found.append(f"the {name} had {first.descriptors} descriptors and has {last.descriptors}")
        if last.threads > first.threads + SPARE_THREADS:
            found.append(f"the {name} had {first.threads} threads and has {last.threads}")
    return found


def growth(record: Record) -> list[str]:
    """Of memory, where there were enough requests to tell."""
    if record.num_done < FEWEST_JUDGED:
        return []
    slopes = zip(("front", "engine"), record.slopes(), strict=True)
    return [
        f"the {name} grows by {slope:.2f} MB per 1,000 requests; {MOST_MB_PER_THOUSAND} is the limit"
        for name, slope in slopes
        if slope > MOST_MB_PER_THOUSAND
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from tests.tiny_checkpoint import write_tiny_checkpoint  # torch and transformers take seconds to import

    num_warm_up = int(arguments.requests * WARM_UP)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_tiny_checkpoint(Path(folder) / "tiny")
        with running_server(checkpoint, *SERVER_OPTIONS) as server:
            soak = Soak(server, arguments.seed, arguments.concurrency)
            warm_up = soak.phase(num_warm_up)
            before = soak.processes()
            record = soak.phase(arguments.requests - num_warm_up)
            after = soak.processes()
            preemptions = server.metric("vllm:num_preemptions_total")
    _print("warm-up", warm_up, before)
    _print("soak", record, after)
    front, engine = record.slopes()
    print(f"memory per 1,000 requests: front {front:+.2f} MB, engine {engine:+.2f} MB")
    print(
        f"p99 of the last third against the first: {record.drift():+.0%} (not judged: others use the machine)"
    )
    print(
        f"preemptions: {preemptions:.0f}; answers: {dict(sorted((warm_up.statuses + record.statuses).items()))}"
    )
    found = warm_up.faults[:20] + violations(record, before, after) + growth(record)
    for violation in found:
        print(f"VIOLATION {violation}")
    return 1 if found else 0


def _print(name: str, record: Record, at_rest: tuple[Process, Process]) -> None:
    front, engine = at_rest
    print(
        f"{name:8} {record.num_done:6} requests in {record.elapsed:6.1f} s"
        f" ({record.num_done / record.elapsed:5.1f}/s), p50 {_percentile(record.seconds, 50):.3f} s,"
        f" p99 {_percentile(record.seconds, 99):.3f} s; at rest: front {front.rss_mb:.1f} MB,"
        f" {front.descriptors} descriptors, {front.threads} threads; engine {engine.rss_mb:.1f} MB,"
        f" {engine.descriptors} descriptors, {engine.threads} threads"
    )


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


def _slope(x: list[float], y: list[float]) -> float:
    return statistics.linear_regression(x, y).slope


if __name__ == "__main__":
    sys.exit(main())
