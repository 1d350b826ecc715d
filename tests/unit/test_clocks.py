"""Durations come from a clock that nobody sets; the time of day is for what people and clients are told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TIME_OF_DAY = {
    "server/runtime.py": "`created` of the model",
    "server/api/responses.py": "`created` of an answer",
    "server/api/openai_responses/routes.py": "`created_at` of a response",
    "server/api/batches.py": "`created_at` and `expires_at` of a batch",
    "server/api/terms.py": "when a limit is whole again, in a header",
    "server/tracing.py": "the moments of spans",
    "server/logs.py": "the time of a line",
    "server/batches/file_store.py": "`created_at` of a file",
    "server/batches/runner.py": "a batch's dates, which outlive the process and so its monotonic clock",
}
"""The only files that ask for it, and what for. The standard library's log and its HTTP dates do, too."""
CLOCK = re.compile(
    r"\b(?:time|datetime|date)\.(?:time|time_ns|now|utcnow|today|localtime|gmtime|ctime)\("
    r"|from time import|from datetime import"
)


@pytest.mark.covers("E13")
def test_only_what_is_told_to_people_comes_from_a_clock_that_can_be_set() -> None:
    asking = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "server").rglob("*.py")
        if CLOCK.search(path.read_text(encoding="utf-8"))
    }
    assert asking == TIME_OF_DAY.keys()
