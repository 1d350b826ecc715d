"""`make bench-front`: tokens a second that the HTTP side delivers, how late, and what a stream costs.

The engine is a stand-in that emits a token of each stream in steps at a set rate; the clients read and do
little else. All share the machine. A delay is the time from a token's emission to its arrival at the client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil

from benchmarks.front.engine import MAX_STEPS, VARIABLE, Plan, steps_in
from benchmarks.front.reader import Job
from benchmarks.front.words import Words, delays_of
from benchmarks.load import first_model
from benchmarks.machine import describe_machine
from benchmarks.output import aligned
from benchmarks.serve import RESULTS, running
from server import embedded_model
from server.cache_directory import cache_directory
from server.gguf_tokenizer import tokenizer_for_gguf
from server.tokenizer import Tokenizer

_COLUMNS = ("streams", "tok/s each", "tok/s", "events/s", "p50 ms", "p99 ms", "max ms", "CPU", "KiB a stream")
START_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Scenario:
    streams: int
    rate: float
    """Tokens a second of each."""

    @classmethod
    def of(cls, text: str) -> Scenario:
        streams, rate = text.split("x")
        return cls(int(streams), float(rate))


async def measure(
    scenario: Scenario, words: Words, seconds: float, options: Sequence[str], folder: Path
) -> dict[str, Any]:
    """One scenario with a server of its own. Raises RuntimeError where the server or the readers fail."""
    plan = Plan(
        steps_per_second=scenario.rate,
        token_ids=list(words.token_ids),
        times_file=str(folder / "times"),
        vocab_size=1 << 18,
        max_num_seqs=scenario.streams,
    )
    np.memmap(plan.times_file, dtype=np.float64, mode="w+", shape=(MAX_STEPS,)).flush()
    server = ["benchmarks.front.serve", "--log-level", "warning", "--max-queued-requests", "100000", *options]
    variables = {VARIABLE: msgspec.json.encode(plan).decode()}
    async with running(server, START_SECONDS, variables) as (started, url):
        process = psutil.Process(started.pid)
        model = await first_model(url)
        before = _resident(process)
        job = Job(url, model, scenario.streams, seconds, list(words.words), str(folder / "arrivals.npy"))
        reader = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.front.reader"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert reader.stdin is not None
        assert reader.stdout is not None
        reader.stdin.write(msgspec.json.encode(job))
        reader.stdin.write_eof()
        if not await reader.stdout.readline():
            raise RuntimeError("the streams did not all begin")
        opened = _resident(process)
        cpu, began = _cpu_seconds(process), time.monotonic()
        await asyncio.sleep(1.0 + seconds)
        used = (_cpu_seconds(process) - cpu) / (time.monotonic() - began)
        counts = json.loads(await reader.stdout.read() or b"null")
        await reader.wait()
    if counts is None:
        raise RuntimeError("the readers failed")
    arrivals = np.load(job.out)
    delays = delays_of(arrivals[:, 0].astype(np.int64), arrivals[:, 1], steps_in(Path(plan.times_file)))
    p50, p99 = np.percentile(delays, (50, 99))
    return {
        "streams": scenario.streams,
        "rate": scenario.rate,
        "tokens_per_second": counts["tokens"] / counts["seconds"],
        "events_per_second": counts["events"] / counts["seconds"],
        "delay_ms": {"p50": p50 * 1e3, "p99": p99 * 1e3, "max": delays.max() * 1e3},
        "front_cpu": used,
        "bytes_per_stream": (opened - before) / scenario.streams,
    }


def _fronts(process: psutil.Process) -> list[psutil.Process]:
    """All of the server's processes but the stand-in."""
    children = process.children(recursive=True)
    return [process, *(one for one in children if "benchmarks.front.engine" not in " ".join(one.cmdline()))]


def _resident(process: psutil.Process) -> int:
    return sum(one.memory_info().rss for one in _fronts(process))


def _cpu_seconds(process: psutil.Process) -> float:
    return sum(sum(one.cpu_times()[:2]) for one in _fronts(process))


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines: list[Sequence[str]] = [_COLUMNS]
    for row in rows:
        delay = row["delay_ms"]
        lines.append(
            [
                str(row["streams"]),
                f"{row['rate']:g}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['events_per_second']:,.0f}",
                *(f"{delay[name]:.0f}" for name in ("p50", "p99", "max")),
                f"{row['front_cpu']:.2f}",
                f"{row['bytes_per_stream'] / 1024:.0f}",
            ]
        )
    return aligned(lines)


async def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    tokenizer = Tokenizer.from_file(tokenizer_for_gguf(embedded_model.locate(), cache_directory()))
    words, rows = Words.of(tokenizer), []
    for scenario in arguments.scenarios:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(
                await measure(scenario, words, arguments.seconds, arguments.options.split(), Path(folder))
            )
        print(table(rows[-1:]), flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make bench-front", description=(__doc__ or "").split("\n")[0])
    default = [Scenario.of(text) for text in ("256x25", "256x50", "256x100", "1000x5")]
    parser.add_argument(
        "--scenarios", nargs="+", type=Scenario.of, default=default, help="streams x tokens a second of each"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of each scenario")
    parser.add_argument("--options", default="", help="more options of the server, in one string")
    parser.add_argument(
        "--out", type=Path, help="the JSON file; benchmarks/results/front-TIME.json if not given"
    )
    arguments = parser.parse_args(argv)
    rows = asyncio.run(run(arguments))
    path = arguments.out or RESULTS / f"front-{time.strftime('%Y-%m-%dT%H%M%S')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": describe_machine(), "options": arguments.options, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(rows)}\n\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
