"""`make bench-peers`: this server and its peers in turn, on the same weights, under the same load.

Writes benchmarks/results/peers-TIME.json and, if everything was run, tables and plots in docs/performance.md.
A part, `make bench-peers ARGS="--peers ours vllm --scenarios standard"`, prints its tables only: figures of
different runs are never merged, since they may come from different machines, days and loads.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import describe_machine
from benchmarks.peers import report
from benchmarks.peers.bandwidth import read_bandwidth
from benchmarks.peers.engines import Engines
from benchmarks.peers.environments import InstallError
from benchmarks.peers.scenarios import LARGE_SIZES, SMALL_SIZES, Sizes, Target, run_scenario
from benchmarks.peers.servers import Launch, ServerError, serving
from benchmarks.peers.variants import (
    LARGE,
    PEERS,
    SCALING,
    SCENARIOS,
    SMALL,
    VLLM,
    WEIGHTS,
    Choice,
    choose,
    cpu_has_avx512,
)
from server.config import option_name
from server.options import ServerConfig

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"

_SIZES = {SMALL: SMALL_SIZES, LARGE: LARGE_SIZES}
_TITLES = {SMALL: "Gemma 3 270M", LARGE: "Gemma 1, the shape of 2B, random weights"}


async def measure(choice: Choice, engines: Engines, folder: Path) -> dict[str, Any]:
    """Serve one variant and run its scenarios; a failure ends them and is part of the result."""
    launch = engines.launch(choice)
    run: dict[str, Any] = {
        "variant": choice.variant.name,
        "peer": choice.variant.peer,
        "weights": choice.weights,
        "scenarios": list(choice.scenarios),
        "command": launch.shown(),
        "load_average": os.getloadavg(),
        "start_seconds": None,
        "memory_bytes": None,
        "figures": {},
        "reports": {},
        "error": None,
    }
    log = folder / "logs" / f"{choice.variant.name}-{choice.weights}.log".replace(" ", "-")
    try:
        await _start_once(choice, launch, folder, log)
        if scenarios := [name for name in choice.scenarios if name != SCALING]:
            async with serving(launch, log) as server:
                run["start_seconds"] = server.start_seconds
                target = Target(server.url, server.model, _SIZES[choice.weights])
                for name in scenarios:
                    await _run(name, target, run)
                run["memory_bytes"] = server.memory_bytes()
        if SCALING in choice.scenarios:
            sizes = _SIZES[choice.weights]
            async with serving(_for_scaling(launch, sizes), log) as server:
                await _run(SCALING, Target(server.url, server.model, sizes), run)
    except (ServerError, httpx.HTTPError) as error:
        run["error"] = f"{type(error).__name__}: {error}"
        print(run["error"], file=sys.stderr, flush=True)
    return run


async def _run(name: str, target: Target, run: dict[str, Any]) -> None:
    started = time.monotonic()
    outcome = await run_scenario(name, target)
    run["figures"] |= outcome.figures
    run["reports"][name] = outcome.reports
    shown = ", ".join(f"{key} {value:.4g}" for key, value in outcome.figures.items() if value)
    print(f"  {name} ({time.monotonic() - started:.0f} s): {shown}", flush=True)


async def _start_once(choice: Choice, launch: Launch, folder: Path, log: Path) -> None:
    """The start that is measured is never the first, which may fill caches on disk.

    vLLM's, which takes minutes, is not repeated for caches that an earlier run filled.
    """
    marker = folder / "vllm-cache" / f"{choice.variant.precision}-{choice.weights}.filled"
    if choice.variant.peer == VLLM and marker.exists():
        return
    async with serving(launch, log):
        pass
    if choice.variant.peer == VLLM:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()


def _for_scaling(launch: Launch, sizes: Sizes) -> Launch:
    seats = ("--max-num-seqs", str(max(sizes.scaling_concurrency)))
    return Launch((*launch.command, *seats), launch.health, launch.environment)


def run_all(choices: list[Choice], complete: bool, folder: Path, path: Path) -> dict[str, Any]:
    """Run everything; `path` has the results so far after each variant, in case the rest is cut off."""
    engines = Engines(folder)
    for choice in choices:  # Install and convert everything before the first measurement.
        engines.launch(choice)
    result: dict[str, Any] = {
        "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "complete": complete,
        "machine": describe_machine(),
        "instruction_set": "AVX-512" if cpu_has_avx512() else "AVX2",
        "read_bandwidth": read_bandwidth(),
        "budget_seconds": SMALL_SIZES.budget,
        "versions": engines.versions(),
        "weights": {
            name: {
                "title": _TITLES[name],
                "load": _load_text(_SIZES[name]),
                "bf16_bytes": (engines.weights(name).directory / "model.safetensors").stat().st_size,
            }
            for name in WEIGHTS
            if any(choice.weights == name for choice in choices)
        },
        "runs": [],
    }
    for choice in choices:
        print(f"{choice.variant.name}, {choice.weights}", flush=True)
        result["runs"].append(asyncio.run(measure(choice, engines, folder)))
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def write_docs(result: dict[str, Any]) -> None:
    """The section of docs/performance.md, and the plots that it shows."""
    IMAGES.mkdir(exist_ok=True)
    first = next(iter(result["weights"]))
    plots = {
        report.THROUGHPUT_PLOT: report.throughput_plot([r for r in result["runs"] if r["weights"] == first]),
        report.SCALING_PLOT: report.scaling_plot(result["runs"]),
    }
    for name, content in plots.items():
        if content is not None:
            (IMAGES / name).write_text(content, encoding="utf-8")
    page = report.replace_section(PAGE.read_text(encoding="utf-8"), report.section(result))
    PAGE.write_text(page, encoding="utf-8")


def _load_text(sizes: Sizes) -> str:
    return (
        f"{sizes.prompt_tokens} prompt tokens and {sizes.output_tokens} output tokens, streamed, greedy unless "
        f"said otherwise. The long prompt has {sizes.long_prompt_tokens:,} tokens and one output token, the "
        f"shared prefix {sizes.prefix_tokens} tokens before each prompt."
    )


def _commit() -> str:
    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return result.stdout.strip()

    name = git("rev-parse", "--short", "HEAD") or "unknown"
    return f"{name} with changes" if git("status", "--porcelain", "--untracked-files=no") else name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make bench-peers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument(
        "--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS), help="2b takes 15 GB of disk"
    )
    parser.add_argument("--variants", nargs="+", metavar="NAME", help='such as "llama.cpp Q8_0"; default: all')
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".cache" / "peers", help="where peers and weights are kept"
    )
    parser.add_argument(
        "--install-only", action="store_true", help="install the peers and convert the weights, run nothing"
    )
    parser.add_argument(
        "--write-docs",
        action=argparse.BooleanOptionalAction,
        help="write docs/performance.md; default: if everything was run",
    )
    return parser


def main() -> int:
    arguments = _parser().parse_args()
    options = {option_name(name) for name in ServerConfig.model_fields}
    everything = choose(PEERS, SCENARIOS, WEIGHTS, options, cpu_has_avx512())
    choices = [
        choice
        for choice in choose(arguments.peers, arguments.scenarios, arguments.weights, options, cpu_has_avx512())
        if not arguments.variants or choice.variant.name in arguments.variants
    ]
    if not choices:
        print("nothing to run: no variant has what was asked for", file=sys.stderr)
        return 2
    complete = choices == everything
    # As on Ctrl-C, an engine that is running is ended first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if arguments.install_only:
            engines = Engines(arguments.folder)
            for choice in choices:
                engines.launch(choice)
            return 0
        path = RESULTS / f"peers-{time.strftime('%Y-%m-%dT%H%M%S')}.json"
        path.parent.mkdir(exist_ok=True)
        result = run_all(choices, complete, arguments.folder, path)
    except InstallError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"\n{report.section(result)}\nwritten to {path.relative_to(ROOT)}")
    if complete if arguments.write_docs is None else arguments.write_docs:
        write_docs(result)
        print(f"written to {PAGE.relative_to(ROOT)} and {IMAGES.relative_to(ROOT)}/")
    else:
        print(f"{PAGE.relative_to(ROOT)} stays as it is: only a part was run, and runs are never merged")
    return 1 if any(run["error"] for run in result["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main())
