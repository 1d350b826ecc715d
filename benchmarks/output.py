"""What people see of a run: a table, and a JSON file with everything."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Coroutine, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import describe_machine
from benchmarks.serve import RESULTS
from benchmarks.stats import Report, Summary

_COLUMNS = (
    *("load", "requests", "errors", "tok/s", "req/s"),
    *("TTFT p50", "p90", "p99", "ITL p50", "p90", "p99", "tok/s each"),
)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of as many cells each, in columns that end under each other."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def format_table(reports: Sequence[Report]) -> str:
    """One line for each report. Times in milliseconds; "tok/s each" is the median speed of one request."""
    lines: list[Sequence[str]] = [_COLUMNS]
    for report in reports:
        settings = report.settings
        load = f"c={settings['concurrency']}" if settings.get("concurrency") else f"{settings['rate']:g}/s"
        cells = [
            load,
            str(report.requests),
            str(report.errors),
            f"{report.output_tokens_per_second:.1f}",
            f"{report.requests_per_second:.2f}",
            *_cells(report.ttft_ms),
            *_cells(report.inter_token_ms),
            _cell(report.request_output_speed.p50),
        ]
        lines.append(cells)
    return aligned(lines)


def _cells(summary: Summary) -> tuple[str, str, str]:
    return _cell(summary.p50), _cell(summary.p90), _cell(summary.p99)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def run_to_file(name: str, measurement: Coroutine[None, None, dict[str, Any]]) -> int:
    """Run `measurement`, and write what it found to `benchmarks/results/NAME-<time>.json`. The exit code."""
    try:
        result = asyncio.run(measurement)
    except (RuntimeError, httpx.HTTPError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    path = RESULTS / f"{name}-{time.strftime('%Y-%m-%dT%H%M%S')}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0


def write_results(path: Path, reports: Sequence[Report], server: dict[str, Any]) -> None:
    """Write the reports as JSON with the machine, the versions and the moment they were taken at."""
    result = {
        "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": describe_machine(),
        "server": server,
        "runs": [asdict(report) for report in reports],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
