"""`make conformance`: the suite against this server with its embedded model, or against any other.

    python -m conformance --base-url http://127.0.0.1:8080/v1 --model NAME

One line for each case. The exit code is 1 if a case fails, 2 if there is no server to test.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from conformance.case import Case, Result
from conformance.cases import all_cases
from conformance.outcome import FAIL, NOT_OFFERED, PASS, Failed
from conformance.own_server import own_server
from conformance.suite import Report, Target, run_suite

_MARKS = {PASS: "ok  ", FAIL: "FAIL", NOT_OFFERED: "-   "}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make conformance", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base-url", help="the server's address, with or without /v1; default: start our own")
    parser.add_argument("--model", help="the model's name; default: the first that the server lists")
    parser.add_argument("--api-key")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    parser.add_argument("--only", default="", metavar="TEXT", help="run the cases whose id contains it")
    parser.add_argument("--system", help="the server's name in the results; default: what it says itself")
    parser.add_argument("--started-with", default="", help="the command line to name in the results")
    options = parser.parse_args(arguments)
    cases = [case for case in all_cases() if options.only in case.id]
    try:
        report = asyncio.run(_run(options, cases))
    except (Failed, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    print(summary(report))
    if options.json:
        report.write(options.json)
    return 1 if report.counts()[FAIL] else 0


async def _run(options: argparse.Namespace, cases: list[Case]) -> Report:
    if options.base_url is None:
        async with own_server() as target:
            return await run_suite(target, cases, tell)
    target = Target(options.base_url, options.model, options.api_key, options.system, options.started_with)
    return await run_suite(target, cases, tell)


def tell(result: Result) -> None:
    line = f"{_MARKS[result.outcome]} {result.id:<34} {result.sentence}"
    print(f"{line}: {result.reason}" if result.reason else line, flush=True)


def summary(report: Report) -> str:
    counts = ", ".join(f"{count} {outcome}" for outcome, count in report.counts().items())
    seconds = sum(result.seconds for result in report.results)
    return f"{report.system} {report.version}: {counts}, of {len(report.results)} in {seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
