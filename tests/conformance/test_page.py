from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from conformance.case import Result
from conformance.cases import all_cases
from conformance.outcome import FAIL, NOT_OFFERED, PASS
from conformance.page import PAGE, page
from conformance.suite import Report


def report(outcome: str, **different: str) -> Report:
    results = [
        Result(case.id, case.sentence, different.get(case.id, outcome), "why `so`", 0.1) for case in all_cases()
    ]
    return Report("a-server", "1.0", "a-model", "serve", "2026-01-02", results)


def test_results_survive_their_file(tmp_path: Path) -> None:
    written = report(PASS, **{"chat.n": FAIL})
    written.write(tmp_path / "folder" / "results.json")
    assert Report.read(tmp_path / "folder" / "results.json") == written


def test_the_page_has_a_row_for_each_case_and_a_column_for_each_server() -> None:
    other = replace(report(NOT_OFFERED, **{"chat.n": FAIL}), system="another", version="2.0")
    text = page([report(PASS), other])
    for case in all_cases():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {case.sentence} |")][:1]
        assert row.endswith("| ✓ | **✗** |" if case.id == "chat.n" else "| ✓ | - |")
    assert "## What another does instead\n\n- n choices are numbered from 0: `why 'so'`" in text
    assert "What a-server does instead" not in text


def test_the_page_in_the_docs_has_every_case() -> None:
    rows = re.findall(r"^\| ([^|]+) \| ", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    missing = {case.sentence for case in all_cases()} - set(rows)
    assert missing == set(), "write it anew from results: python -m conformance.page"
