"""Writes docs/conformance.md from the result files of one or more servers.

python -m conformance.page ours.json llama-cpp.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from conformance.cases import all_cases
from conformance.outcome import FAIL, NOT_OFFERED, PASS
from conformance.suite import Report

PAGE = Path(__file__).parent.parent / "docs" / "conformance.md"
_MARKS = {PASS: "✓", FAIL: "**✗**", NOT_OFFERED: "-"}
_INTRODUCTION = """\
# Conformance

One case for each thing that a client of OpenAI's API relies on, asked of each server over plain HTTP:

- ✓ it does it;
- ✗ it does something else, which is said below;
- "-" it says clearly that it does not offer it (a 404, a refusal that names the field), or the field is no part
  of OpenAI's API and shows no effect.

The cases are in `conformance/cases/`. They follow OpenAI's reference, and for the endpoints and fields that it
does not have, Anthropic's and vLLM's. This page is written by `conformance/page.py` from what
`make conformance` and `make conformance-peers` found.
"""


def page(reports: Sequence[Report]) -> str:
    found = [{result.id: result for result in report.results} for report in reports]
    titles = [f"{report.system} {report.version}" for report in reports]
    parts = [_INTRODUCTION, _systems(reports)]
    for group, cases in groupby(all_cases(), key=lambda case: case.group):
        lines = [
            f"## {group.capitalize()}",
            "",
            _row(["case", *titles]),
            _row(["---"] + [":-:"] * len(reports)),
        ]
        for case in cases:
            results = [of.get(case.id) for of in found]
            marks = [_MARKS[result.outcome] if result else "" for result in results]
            lines.append(_row([case.sentence, *marks]))
        parts.append("\n".join(lines) + "\n")
    parts += [_failures(report) for report in reports if report.counts()[FAIL]]
    return "\n".join(parts)


def _systems(reports: Sequence[Report]) -> str:
    lines = [_row(["", "model", "date", "✓", "✗", "-", "started with"]), _row(["---"] * 7)]
    for report in reports:
        counts = [str(report.counts()[outcome]) for outcome in (PASS, FAIL, NOT_OFFERED)]
        name = f"{report.system} {report.version}"
        lines.append(_row([name, report.model, report.date, *counts, f"`{report.started_with}`"]))
    return "\n".join(lines) + "\n"


def _failures(report: Report) -> str:
    lines = [f"## What {report.system} does instead", ""]
    sentences = {case.id: case.sentence for case in all_cases()}
    lines += [
        f"- {sentences.get(result.id, result.sentence)}: {_plain(result.reason)}"
        for result in report.results
        if result.outcome == FAIL
    ]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _plain(text: str) -> str:
    """A server's words between backticks, so that nothing in them is markup."""
    return f"`{text.replace('`', chr(39))}`"


def main() -> int:
    if len(sys.argv) < 2:
        print("usage: python -m conformance.page RESULTS.json ...", file=sys.stderr)
        return 2
    PAGE.write_text(page([Report.read(Path(name)) for name in sys.argv[1:]]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
