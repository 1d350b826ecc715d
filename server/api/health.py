"""Three probes with three meanings, for an orchestrator's three questions.

- /livez: should the process be left alone? Its event loop answers, and it has not given up on its engine.
- /startupz: is the load over? 503 before, with how far it is.
- /readyz, /health as vLLM calls it, /ping as Model Garden does: should traffic come here? The model is
  loaded, its engine shows signs of life, and the server was not told to end.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request, Response

from server import __version__
from server.api.responses import Progress, Version, json_response
from server.api.serving import runtime_of
from server.errors import RETRY_AFTER_LOADING_SECONDS
from server.runtime import Phase, Runtime

router = APIRouter()

_READY = "Can requests be served?"


def add_probe(
    router: APIRouter, path: str, probe: Callable[[Request], Awaitable[Response]], summary: str = _READY
) -> None:
    """HEAD asks as GET does: some load balancers know no other way."""
    router.get(path, summary=summary)(probe)
    router.head(path, include_in_schema=False)(probe)


async def livez(request: Request) -> Response:
    runtime = runtime_of(request)
    return _probe(runtime, passes=runtime.phase is not Phase.FAILED)


async def startupz(request: Request) -> Response:
    runtime = runtime_of(request)
    return _probe(runtime, passes=runtime.model is not None)


async def readyz(request: Request) -> Response:
    runtime = runtime_of(request)
    return _probe(runtime, passes=runtime.phase is Phase.READY and not runtime.is_draining)


add_probe(router, "/livez", livez, "Is the process in order?")
add_probe(router, "/startupz", startupz, "Is the model loaded?")
for _path in ("/readyz", "/health", "/ping"):
    add_probe(router, _path, readyz)


@router.get("/version", summary="The server's version")
async def version() -> Response:
    return json_response(Version(__version__))


def _probe(runtime: Runtime, *, passes: bool) -> Response:
    is_draining = runtime.is_draining and runtime.phase is not Phase.FAILED
    progress = Progress("draining" if is_draining else runtime.phase)
    # A failure's reason may name paths; probes need no key, so that it is only in the log.
    if runtime.phase in (Phase.STARTING, Phase.RESTARTING):
        progress.stage, progress.fraction = runtime.stage, runtime.fraction
        if runtime.download is not None:
            progress.downloaded_bytes = runtime.download.done_bytes
            progress.download_bytes = runtime.download.total_bytes
    if passes:
        return json_response(progress)
    return json_response(progress, status=503, headers={"retry-after": str(RETRY_AFTER_LOADING_SECONDS)})
