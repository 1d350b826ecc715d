"""`make bench-batch`: what clients notice of a batch that runs beside them.

Serves a model on a free port with a data directory and sends one client's requests, one after the other, with
and without a running batch in turns; then does the same with 8 clients. Options that this module does not know
go to the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import httpx

from benchmarks.load import LoadSettings, first_model, run_load
from benchmarks.machine import describe_machine
from benchmarks.output import run_to_file
from benchmarks.serve import serving
from benchmarks.stats import Report

_ROUNDS = 3
_BATCH_LINES = 2000
"""More than are answered while the batch is wanted."""
_COLUMNS = "{:>7} {:>7} {:>10} {:>10} {:>10} {:>10} {:>11} {:>12}"


@asynccontextmanager
async def running_batch(client: httpx.AsyncClient, model: str) -> AsyncIterator[None]:
    """A batch that generates all the while; it is cancelled on leaving."""
    body = {"model": model, "prompt": "", "max_tokens": 128, "ignore_eos": True}
    lines = (
        json.dumps(
            {
                "custom_id": str(number),
                "method": "POST",
                "url": "/v1/completions",
                "body": body | {"prompt": f"Entry {number} of the list of all that is known about {number}"},
            }
        )
        for number in range(_BATCH_LINES)
    )
    upload = await client.post(
        "/v1/files",
        files={"file": ("batch.jsonl", "\n".join(lines).encode())},
        data={"purpose": "batch"},
    )
    batch = {"input_file_id": upload.raise_for_status().json()["id"], "endpoint": "/v1/completions"}
    created = await client.post("/v1/batches", json=batch | {"completion_window": "24h"})
    url = f"/v1/batches/{created.raise_for_status().json()['id']}"
    await _until(client, url, {"in_progress"})
    yield
    if (status := (await client.get(url)).json()["status"]) != "in_progress":
        raise RuntimeError(f"the batch was {status} before the measurement was over")
    (await client.post(f"{url}/cancel")).raise_for_status()
    await _until(client, url, {"cancelled"})


async def _until(client: httpx.AsyncClient, url: str, statuses: set[str]) -> None:
    deadline = time.monotonic() + 60
    while (await client.get(url)).json()["status"] not in statuses:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{url} is not {' or '.join(statuses)} after 60 s")
        await asyncio.sleep(0.1)


async def _measure(server_options: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"machine": describe_machine(), "runs": []}
    print(
        _COLUMNS.format(
            "clients", "batch", "tok/s", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "request p50"
        )
    )
    with tempfile.TemporaryDirectory() as data:
        async with (
            serving(["--data-dir", data, *server_options]) as url,
            httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client,
        ):
            model = await first_model(url)
            for concurrency in arguments.concurrency:
                for number in range(2 * _ROUNDS):
                    has_batch = number % 2 == 1
                    settings = LoadSettings(
                        url=url,
                        model=model,
                        concurrency=concurrency,
                        requests=max(10, 3 * concurrency),
                        prompt_tokens=128,
                        output_tokens=64,
                        # Another for each run, lest the prefix cache answer the next run's prompts.
                        seed=100 * concurrency + number,
                    )
                    async with running_batch(client, model) if has_batch else nullcontext():
                        report = await run_load(settings)
                    _print(concurrency, has_batch, report)
                    result["runs"].append({"has_batch": has_batch, **asdict(report)})
    return result


def _print(concurrency: int, has_batch: bool, report: Report) -> None:
    if report.errors:
        raise RuntimeError(f"{report.errors} requests failed: {report.first_errors[0]}")
    times = (
        *(report.ttft_ms.p50, report.ttft_ms.p99),
        *(report.inter_token_ms.p50, report.inter_token_ms.p99, report.request_ms.p50),
    )
    shown = (f"{value:.1f} ms" for value in times if value is not None)
    print(
        _COLUMNS.format(
            concurrency, "yes" if has_batch else "no", f"{report.output_tokens_per_second:.1f}", *shown
        ),
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-batch", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    arguments, server_options = parser.parse_known_args()
    return run_to_file("batch", _measure(server_options, arguments))


if __name__ == "__main__":
    sys.exit(main())
