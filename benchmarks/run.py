"""`make bench`: serve a model on a free port, load it at concurrency 1, 8 and 32, print the table.

Options that this module does not know go to the server: `make bench ARGS="--model google/gemma-2b-it"`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx

from benchmarks.load import LoadSettings, first_model, run_load
from benchmarks.machine import describe_server
from benchmarks.output import format_table, write_results
from benchmarks.serve import RESULTS, serving
from benchmarks.stats import Report


async def _measure(
    server_options: Sequence[str], arguments: argparse.Namespace
) -> tuple[list[Report], dict[str, Any]]:
    started = time.monotonic()
    async with serving(server_options, arguments.start_timeout) as url:
        print(f"ready after {time.monotonic() - started:.1f} s", flush=True)
        model = await first_model(url)
        reports: list[Report] = []
        for number, concurrency in enumerate(arguments.concurrency):
            settings = LoadSettings(
                url=url,
                model=model,
                concurrency=concurrency,
                requests=max(8, 3 * concurrency),
                prompt_tokens=arguments.prompt_tokens,
                output_tokens=arguments.output_tokens,
                # Another seed for each run, lest the prefix cache answer the next run's prompts.
                seed=number,
            )
            reports.append(await run_load(settings))
        return reports, await describe_server(url)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--start-timeout", type=float, default=600.0, help="seconds that loading may take")
    arguments, server_options = parser.parse_known_args()
    try:
        reports, description = asyncio.run(_measure(server_options, arguments))
    except (RuntimeError, httpx.HTTPError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    path = RESULTS / f"{time.strftime('%Y-%m-%dT%H%M%S')}.json"
    write_results(path, reports, description)
    print(
        f"\n{arguments.prompt_tokens} prompt tokens, {arguments.output_tokens} output tokens, greedy, streamed"
    )
    print(format_table(reports))
    print(f"\nwritten to {path}")
    return 1 if any(report.errors for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
