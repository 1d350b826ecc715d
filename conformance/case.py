"""Cases, and how one is run.

A case is an async function whose name is a sentence. It returns where the server behaves, and raises `Failed`
or `NotOffered` where it does not. Whatever else happens in it is the server's fault, too: an answer without
`choices` is a KeyError here, a closed connection a TransportError.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx

from conformance.client import READ_SECONDS, Server
from conformance.outcome import FAIL, NOT_OFFERED, PASS, Failed, NotOffered

LIMIT_SECONDS = 90.0
"""For one case. The longest generates a few hundred tokens."""
LONGEST_REASON = 200

Check = Callable[[Server], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Case:
    id: str
    """`group.name`; stable, so that results of different days and servers can be compared."""
    check: Check
    sentence: str

    @property
    def group(self) -> str:
        return self.id.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Result:
    id: str
    sentence: str
    outcome: str
    reason: str
    """One line; empty for a pass."""
    seconds: float


class Group:
    """The cases of one module, in the order of their definition."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cases: list[Case] = []

    def case(self, name: str) -> Callable[[Check], Check]:
        """Decorator: the function below is the case `group.name`."""

        def add(check: Check) -> Check:
            sentence = re.sub(r"_s(?=_|$)", "'s", check.__name__).replace("_", " ")
            self.cases.append(Case(f"{self.name}.{name}", check, sentence))
            return check

        return add


async def run_case(case: Case, server: Server) -> Result:
    started = time.perf_counter()
    outcome, reason = await _outcome(case, server)
    reason = " ".join(reason.split())
    if len(reason) > LONGEST_REASON:
        reason = reason[: LONGEST_REASON - 3] + "..."
    return Result(case.id, case.sentence, outcome, reason, round(time.perf_counter() - started, 3))


async def _outcome(case: Case, server: Server) -> tuple[str, str]:
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            await case.check(server)
    except NotOffered as error:
        return NOT_OFFERED, str(error)
    except Failed as error:
        return FAIL, str(error)
    except TimeoutError:
        return FAIL, f"no end after {LIMIT_SECONDS:g} s"
    except httpx.TimeoutException:
        return FAIL, f"no answer within {READ_SECONDS:g} s"
    except httpx.HTTPError as error:
        return FAIL, f"{type(error).__name__}: {str(error) or 'no answer'}"
    except (KeyError, IndexError) as error:
        return FAIL, f"the answer lacks {error}"
    except Exception as error:  # whatever an answer of a wrong shape leads to must not end the suite
        return FAIL, f"the answer has another shape: {type(error).__name__}: {error}"
    return PASS, ""
