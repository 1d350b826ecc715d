"""`make bench`: serve a model on a free port, load it at concurrency 1, 8 and 32, print the table.

Options that this module does not know go to the server: `make bench ARGS="--model google/gemma-2b-it"`.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.load import LoadSettings, first_model, run_load
from benchmarks.machine import describe_server
from benchmarks.output import format_table, write_results
from benchmarks.stats import Report

RESULTS = Path(__file__).parent / "results"


async def wait_until_ready(url: str, server: subprocess.Popen[bytes], limit_seconds: float) -> None:
    """Return when `/readyz` answers 200. Raises RuntimeError if the server ends first or takes too long."""
    deadline = time.monotonic() + limit_seconds
    async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
        while time.monotonic() < deadline:
            if server.poll() is not None:
                raise RuntimeError(f"the server ended with exit code {server.returncode} before it was ready")
            try:
                if (await client.get(f"{url}/readyz")).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # The port is not open yet.
            await asyncio.sleep(0.1)
    raise RuntimeError(f"the server was not ready within {limit_seconds:g} s")


async def _measure(
    url: str, server: subprocess.Popen[bytes], arguments: argparse.Namespace
) -> tuple[list[Report], dict[str, Any]]:
    started = time.monotonic()
    await wait_until_ready(url, server, arguments.start_timeout)
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--start-timeout", type=float, default=600.0, help="seconds that loading may take")
    arguments, server_options = parser.parse_known_args()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "server",
        "serve",
        "--port",
        str(port),
        "--disable-access-log",
        *server_options,
    ]
    server = subprocess.Popen(command)
    try:
        reports, description = asyncio.run(_measure(url, server, arguments))
    except (RuntimeError, httpx.HTTPError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    finally:
        server.terminate()
        server.wait(timeout=60)
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
