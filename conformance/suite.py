"""Runs cases against one server, and keeps what came out with what is known of the server."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from conformance.case import Case, Result, run_case
from conformance.client import READ_SECONDS, Server, root_of
from conformance.outcome import OUTCOMES, Failed


@dataclass(frozen=True, slots=True)
class Target:
    """Where the server is, and how it wants to be spoken to."""

    base_url: str
    model: str | None = None
    """The first one that it lists, if not given."""
    api_key: str | None = None
    name: str | None = None
    """What it says itself, if not given."""
    started_with: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    system: str
    version: str
    model: str
    started_with: str
    date: str
    """UTC, as ISO 8601 writes a day."""
    results: list[Result]

    def counts(self) -> dict[str, int]:
        found = Counter(result.outcome for result in self.results)
        return {outcome: found[outcome] for outcome in OUTCOMES}

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Report:
        value = json.loads(path.read_text(encoding="utf-8"))
        return cls(**value | {"results": [Result(**result) for result in value["results"]]})


async def run_suite(target: Target, cases: Sequence[Case], tell: Callable[[Result], None]) -> Report:
    """Run `cases` one after the other, and `tell` each result. Raises Failed if there is no server to test."""
    headers = {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    # No connection is used twice, lest one that the server is about to close look like the next one's fault.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(trust_env=False, timeout=READ_SECONDS, headers=headers, limits=limits) as http:
        listed = await _first_model(http, target.base_url)
        model = target.model or listed["id"]
        server = Server(target.base_url, model, target.api_key, http)
        results = []
        for case in cases:
            results.append(await run_case(case, server))
            tell(results[-1])
        version = await _version(http, server.root)
    name = target.name or str(listed.get("owned_by") or "server")
    return Report(
        name, version, Path(model).name, target.started_with, time.strftime("%Y-%m-%d", time.gmtime()), results
    )


async def _first_model(http: httpx.AsyncClient, base_url: str) -> dict[str, Any]:
    url = f"{root_of(base_url)}/v1/models"
    try:
        response = await http.get(url)
        response.raise_for_status()
        model: dict[str, Any] = response.json()["data"][0]
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise Failed(f"{url} lists no model: {type(error).__name__}: {error}") from None
    return model


async def _version(http: httpx.AsyncClient, root: str) -> str:
    """Where vLLM and this server say it, and where llama.cpp does."""
    for path, key in (("/version", "version"), ("/props", "build_info")):
        try:
            response = await http.get(root + path)
            if response.status_code == 200:
                return str(response.json()[key])
        except (httpx.HTTPError, ValueError, LookupError, TypeError):
            continue
    return "unknown"
