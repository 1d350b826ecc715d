"""The real server passes its own conformance suite, and says no only where that is known."""

from __future__ import annotations

import pytest

from conformance.case import Result
from conformance.cases import all_cases
from conformance.outcome import FAIL, NOT_OFFERED
from conformance.suite import Target, run_suite
from server import embedded_model
from tests.e2e.server_process import running_server

NOT_FOR_ALL = ("completions.suffix", "responses.previous", "responses.input-tokens", "batches.")
"""What takes infilling tokens, memory of responses, or a directory for files."""
API_KEY = "sk-test"


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_the_server_conforms() -> None:
    with running_server(embedded_model.locate(), "--api-key", API_KEY) as server:
        report = await run_suite(Target(server.url, api_key=API_KEY), all_cases(), lambda result: None)
    assert _reasons(report.results, FAIL) == {}
    unexpected = {
        name: reason
        for name, reason in _reasons(report.results, NOT_OFFERED).items()
        if not name.startswith(NOT_FOR_ALL)
    }
    assert unexpected == {}


def _reasons(results: list[Result], outcome: str) -> dict[str, str]:
    return {result.id: result.reason for result in results if result.outcome == outcome}
