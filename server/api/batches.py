"""/v1/batches: many requests in one file, answered when the server has nothing better to do."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field, StringConstraints

from server.api.field_types import WireModel
from server.api.files import DEFAULT_LIFETIME_SECONDS, LIFETIMES, runner_of
from server.api.openapi import body_of
from server.api.query import AFTER, limit_of, limits, parameters
from server.api.responses import json_response
from server.api.serving import owner_of, read_body
from server.batches.objects import Batch, Page, RequestCounts
from server.errors import InvalidRequestError, shown

router = APIRouter()

WINDOW_SECONDS = 24 * 3600
MAX_METADATA = 16
DEFAULT_LIMIT = 20
MAX_LIMIT = 100

_Key = Annotated[str, StringConstraints(max_length=64)]
_Value = Annotated[str, StringConstraints(max_length=512)]


class ExpiresAfter(WireModel):
    anchor: Literal["created_at"] = Field(description="The time from which on it is counted. Required.")
    seconds: int = Field(ge=LIFETIMES[0], le=LIFETIMES[1], description="How long the files are kept. Required.")


class CreateBatchRequest(WireModel):
    input_file_id: str = Field(
        description="A file of purpose `batch`, with one request in each line. Required."
    )
    endpoint: str = Field(description="The path that every line asks for. Required.")
    completion_window: Literal["24h"] = Field(description="What is not answered by then expires. Required.")
    metadata: dict[_Key, _Value] | None = Field(
        None, max_length=MAX_METADATA, description="Is kept with the batch and shown with it. Default: none."
    )
    output_expires_after: ExpiresAfter | None = Field(
        None, description="How long the output files are kept. Default: 30 days."
    )


@router.post(
    "/v1/batches", summary="Run the requests in a file", openapi_extra=body_of(CreateBatchRequest, answer=Batch)
)
async def create_batch(request: Request) -> Response:
    runner = runner_of(request)
    body, headers = await read_body(request, CreateBatchRequest)
    if body.endpoint not in runner.urls:
        raise InvalidRequestError(
            f"'endpoint' must be {' or '.join(sorted(runner.urls))}, got {shown(body.endpoint)}.",
            param="endpoint",
        )
    owner = owner_of(request)
    file = await runner.store.files.get(owner, body.input_file_id)
    if file.purpose != "batch":
        raise InvalidRequestError(
            f"'input_file_id' must name a file of purpose batch, got one of purpose {file.purpose}.",
            param="input_file_id",
        )
    now = int(time.time())
    batch = Batch(
        id=f"batch_{uuid.uuid4().hex}",
        endpoint=body.endpoint,
        input_file_id=file.id,
        created_at=now,
        expires_at=now + WINDOW_SECONDS,
        request_counts=RequestCounts(),
        metadata=body.metadata,
    )
    kept = body.output_expires_after
    await runner.submit(owner, batch, DEFAULT_LIFETIME_SECONDS if kept is None else kept.seconds)
    return json_response(batch, headers=headers)


@router.get(
    "/v1/batches",
    summary="List the batches of this API key, newest first",
    openapi_extra=parameters(after=AFTER, limit=limits(DEFAULT_LIMIT, MAX_LIMIT)),
)
async def list_batches(request: Request) -> Response:
    query = request.query_params
    limit = limit_of(query, DEFAULT_LIMIT, most=MAX_LIMIT)
    batches, has_more = await runner_of(request).store.batches.page(
        owner_of(request), after=query.get("after"), limit=limit
    )
    return json_response(Page.of(batches, has_more=has_more))


@router.get("/v1/batches/{batch_id}", summary="How far a batch is")
async def retrieve_batch(request: Request, batch_id: str) -> Response:
    return json_response(await runner_of(request).store.batches.get(owner_of(request), batch_id))


@router.post("/v1/batches/{batch_id}/cancel", summary="End a batch; what is answered is kept")
async def cancel_batch(request: Request, batch_id: str) -> Response:
    return json_response(await runner_of(request).cancel(owner_of(request), batch_id))
