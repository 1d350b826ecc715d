"""GET /debug/engine: what runs, what waits and what the KV cache holds, for whoever looks for trouble.

Ids, counts and times; no text and no token.
"""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter, Request, Response
from msgspec import UNSET, Struct, UnsetType, to_builtins

from server.api.responses import json_response
from server.api.serving import runtime_of
from server.engine.types import Snapshot
from server.errors import (
    ApiError,
    EngineRestartingError,
    EngineSilentError,
    EngineUnavailableError,
    ModelLoadingError,
)
from server.frontend.admission import Admission
from server.frontend.client import EngineDeadError
from server.runtime import Phase, Runtime

router = APIRouter()

ANSWER_SECONDS = 2.0
"""How long the engine may take: a step is far shorter."""
MAX_WAITING = 100
"""Waiting sequences that are described."""


class FrontState(Struct):
    phase: Phase
    stage: str
    """What is being done while it starts or restarts."""
    admitted_sequences: int
    """That wait or run, of clients."""
    max_admitted_sequences: int
    open_streams: int
    engine_pid: int


class DebugAnswer(Struct):
    front: FrontState
    engine: dict[str, object] | None
    """A Snapshot (`server.engine.types`)."""
    answer_seconds: float | None
    """What the engine took to answer: up to a step, and what came before in its queue."""
    error: dict[str, str | None] | UnsetType = UNSET
    """Why the engine says nothing."""


@router.get("/debug/engine", summary="What runs, what waits and what the KV cache holds")
async def debug_engine(request: Request) -> Response:
    runtime = runtime_of(request)
    front = _front_state(runtime, request.app.state.admission)
    started = time.monotonic()
    try:
        snapshot = await _snapshot(runtime)
    except ApiError as error:
        # The front's half is of use above all when there is no other.
        answer = DebugAnswer(front, None, None, error.body()["error"])
        return json_response(answer, status=error.status, headers=error.headers)
    engine: dict[str, object] = to_builtins(snapshot)
    for of_the_message in ("type", "number"):
        del engine[of_the_message]
    return json_response(DebugAnswer(front, engine, time.monotonic() - started))


async def _snapshot(runtime: Runtime) -> Snapshot:
    """Raises EngineSilentError, EngineRestartingError, EngineUnavailableError, ModelLoadingError."""
    if runtime.phase is Phase.STARTING:
        raise ModelLoadingError("The engine answers once the model is loaded.")
    if runtime.phase is Phase.RESTARTING:
        raise EngineRestartingError
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await runtime.client.inspect(MAX_WAITING)
    except TimeoutError:
        raise EngineSilentError(
            f"The engine did not answer within {ANSWER_SECONDS:g} seconds: it is stopped, or a step takes that "
            "long."
        ) from None
    except EngineDeadError:
        raise EngineUnavailableError from None


def _front_state(runtime: Runtime, admission: Admission) -> FrontState:
    return FrontState(
        phase=runtime.phase,
        stage=runtime.stage if runtime.phase in (Phase.STARTING, Phase.RESTARTING) else "",
        admitted_sequences=admission.in_flight,
        max_admitted_sequences=admission.max_sequences,
        open_streams=int(runtime.metrics.registry.get_sample_value("gemma_sse_open_streams") or 0),
        engine_pid=runtime.client.pid,
    )
