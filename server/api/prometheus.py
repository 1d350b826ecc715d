"""GET /metrics"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from server.api.serving import runtime_of
from server.metrics import CONTENT_TYPE

router = APIRouter()


@router.get("/metrics", summary="Metrics for Prometheus, in its text format")
async def metrics(request: Request) -> Response:
    return Response(runtime_of(request).metrics.render(), headers={"content-type": CONTENT_TYPE})
