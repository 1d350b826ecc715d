"""Whatever a server does, a case ends with one of three outcomes, and the right one."""

from __future__ import annotations

import httpx
import pytest

from conformance.case import Case
from conformance.client import Server
from conformance.outcome import FAIL, NOT_OFFERED, OUTCOMES, PASS
from tests.conformance.stand_ins import CASES, Handler, event_stream, outcome_of, refused


def _closes(request: httpx.Request) -> httpx.Response:
    raise httpx.RemoteProtocolError("closed")


NONSENSE: dict[str, Handler] = {
    "empty object": lambda request: httpx.Response(200, json={}),
    "list": lambda request: httpx.Response(200, json=[1]),
    "text": lambda request: httpx.Response(200, json="text"),
    "null fields": lambda request: httpx.Response(200, json={"choices": None, "data": None, "error": None}),
    "wrong types": lambda request: httpx.Response(200, json={"choices": [5], "data": [5], "usage": 5}),
    "html": lambda request: httpx.Response(200, html="<p>hello</p>"),
    "html error": lambda request: httpx.Response(500, html="<p>oh</p>"),
    "not utf-8": lambda request: httpx.Response(200, content=b"data: \xff\xfe\n\n"),
    "odd events": lambda request: event_stream({}, [], "5", "[DONE]"),
    "error of another shape": lambda request: httpx.Response(400, json={"error": "text"}),
    "no connection": _closes,
}
TRUE_OF_NONSENSE = {
    "odd events": {"streaming.media-type", "streaming.framing", "streaming.done"},
}


@pytest.mark.parametrize("kind", NONSENSE)
async def test_nonsense_never_passes_and_never_crashes_the_suite(kind: str) -> None:
    outcomes = {case.id: (await outcome_of(case, NONSENSE[kind])).outcome for case in CASES.values()}
    assert set(outcomes.values()) <= set(OUTCOMES)
    passed = {name for name, outcome in outcomes.items() if outcome == PASS}
    # Only the status of /health counts.
    assert passed <= {"limits.health"} | TRUE_OF_NONSENSE.get(kind, set())


async def test_a_server_without_anything_offers_nothing() -> None:
    def nothing(request: httpx.Request) -> httpx.Response:
        return refused("There is nothing here.", None, 404)

    outcomes = {case.id: (await outcome_of(case, nothing)).outcome for case in CASES.values()}
    passed = {name for name, outcome in outcomes.items() if outcome == PASS}
    assert passed <= {"errors.unknown-path", "errors.method"}
    assert all(outcomes[name] == NOT_OFFERED for name in ("tools.auto", "responses.shape", "batches.run"))


async def test_a_refusal_that_names_the_field_is_no_failure() -> None:
    by_param = await outcome_of(CASES["chat.n"], lambda request: refused("No.", "n"))
    assert (by_param.outcome, by_param.reason) == (NOT_OFFERED, "400: No.")
    by_message = await outcome_of(CASES["chat.n"], lambda request: refused("There is no n here.", None))
    assert by_message.outcome == NOT_OFFERED


@pytest.mark.parametrize(
    "answer",
    [
        refused("Something is wrong.", None),
        refused("'messages' is wrong.", "messages"),
        refused("'n' is wrong.", "n", 500),
    ],
    ids=["names nothing", "names what every server must have", "is a fault of the server"],
)
async def test_any_other_refusal_is_a_failure(answer: httpx.Response) -> None:
    assert (await outcome_of(CASES["chat.n"], lambda request: answer)).outcome == FAIL


async def test_a_case_that_takes_too_long_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(server: Server) -> None:
        import asyncio

        await asyncio.sleep(60)

    monkeypatch.setattr("conformance.case.LIMIT_SECONDS", 0.01)
    result = await outcome_of(Case("x.y", never, "never"), lambda request: httpx.Response(200))
    assert (result.outcome, result.reason) == (FAIL, "no end after 0.01 s")


async def test_a_reason_is_one_short_line() -> None:
    result = await outcome_of(CASES["chat.n"], lambda request: httpx.Response(500, text="a\nb " * 1000))
    assert "\n" not in result.reason
    assert len(result.reason) <= 200


def test_ids_are_unique_and_name_their_group() -> None:
    modules = {case.id: case.check.__module__.rpartition(".")[2] for case in CASES.values()}
    assert len(CASES) > 120
    assert all(name.partition(".")[0] == module for name, module in modules.items())
