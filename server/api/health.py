"""Three probes with three meanings, for an orchestrator's three questions.

- /livez: should the process be left alone? Its event loop answers, and it has not given up on its engine.
- /startupz: is the load over? 503 before, with how far it is.
- /readyz, /health as vLLM calls it, /ping as Model Garden does: should traffic come here? The model is
  loaded, its engine shows signs of life, and the server was not told to end.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from server import __version__
from server.api.responses import Progress, Version, json_response
from server.api.serving import runtime_of
from server.errors import RETRY_AFTER_LOADING_SECONDS
from server.runtime import Phase, Runtime

router = APIRouter()


@router.get("/livez", summary="Is the process in order?")
async def livez(request: Request) -> Response:
    runtime = runtime_of(request)
    return _probe(runtime, passes=runtime.phase is not Phase.FAILED)


@router.get("/startupz", summary="Is the model loaded?")
async def startupz(request: Request) -> Response:
    runtime = runtime_of(request)
    return _probe(runtime, passes=runtime.model is not None)


@router.get("/readyz", summary="Can requests be served?")
@router.get("/health", summary="Can requests be served?")
@router.get("/ping", summary="Can requests be served?")
async def readyz(request: Request) -> Response:
    runtime = runtime_of(request)
    return _probe(runtime, passes=runtime.phase is Phase.READY and not runtime.is_draining)


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
