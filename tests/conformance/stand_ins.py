"""Servers that answer as they are told to, without a port."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx

from conformance.case import Case, Result, run_case
from conformance.cases import all_cases
from conformance.client import Server

Handler = Callable[[httpx.Request], httpx.Response]
CASES = {case.id: case for case in all_cases()}


async def outcome_of(case: Case, handler: Handler) -> Result:
    async with httpx.AsyncClient(transport=httpx.MockTransport(handler)) as http:
        return await run_case(case, Server("http://server/v1", "a-model", None, http))


def event_stream(*events: Any) -> httpx.Response:
    """Strings are sent as they are, everything else as JSON."""
    texts = (event if isinstance(event, str) else json.dumps(event) for event in events)
    body = "".join(f"data: {text}\n\n" for text in texts)
    return httpx.Response(200, text=body, headers={"content-type": "text/event-stream; charset=utf-8"})


def refused(message: str, param: str | None, status: int = 400) -> httpx.Response:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
    return httpx.Response(status, json={"error": error})
