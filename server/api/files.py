"""/v1/files: the inputs and outputs of batches."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping

from fastapi import APIRouter, Request, Response
from starlette.datastructures import FormData, UploadFile
from starlette.responses import FileResponse
from starlette.types import Message

from server.api.ignored_fields import HEADER, header_value
from server.api.query import AFTER, limit_of, limits, one_of, parameters
from server.api.responses import json_response
from server.api.serving import owner_of, runtime_of
from server.batches.database import storage_errors
from server.batches.objects import DeletedFile, Page
from server.batches.runner import BatchRunner
from server.errors import (
    BodyTooLargeError,
    FeatureOffError,
    InvalidRequestError,
    ObjectNotFoundError,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
    shown,
)

router = APIRouter()

UPLOAD_TIMEOUT_SECONDS = 600.0
"""An upload that is not complete by then is given up."""
FORM_OVERHEAD_BYTES = 1 << 16
"""What an upload may have beside the file."""
MOST_FIELDS = 16
LONGEST_FILENAME = 255
DEFAULT_LIFETIME_SECONDS = 30 * 24 * 3600
"""As OpenAI keeps the files of batches."""
LIFETIMES = (3600, 30 * 24 * 3600)
"""Shortest and longest that a client may ask for."""
DEFAULT_LIMIT = 10_000

_FORM_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": LIFETIMES[0],
                            "maximum": LIFETIMES[1],
                        },
                    },
                }
            }
        },
    }
}


def runner_of(request: Request) -> BatchRunner:
    """Raises FeatureOffError where the server keeps no files."""
    runner: BatchRunner | None = request.app.state.batches
    if runner is None:
        raise FeatureOffError(
            "Files and batches are off: they keep what clients send, so the server has to be started with "
            "--data-dir DIRECTORY."
        )
    return runner


@router.post("/v1/files", summary="Upload the input of a batch", openapi_extra=_FORM_SCHEMA)
async def upload_file(request: Request) -> Response:
    runner = runner_of(request)
    max_bytes = runtime_of(request).config.max_file_bytes
    owner = owner_of(request)
    await runner.store.files.check_room(owner, 0)
    form = await _read_form(request, max_bytes)
    try:
        upload = form.get("file")
        if not isinstance(upload, UploadFile):
            raise InvalidRequestError("'file' is required, as a file.", param="file")
        if form.get("purpose") != "batch":
            raise InvalidRequestError(
                f"'purpose' must be batch, got {shown(form.get('purpose'))}.", param="purpose"
            )
        size = upload.size or 0
        if size > max_bytes:
            raise BodyTooLargeError(f"The file has {size} bytes, more than the {max_bytes} that are taken.")
        file = await runner.store.files.add(
            owner, _plain_name(upload.filename), upload.file, size, _lifetime(form)
        )
    finally:
        await form.close()
    await runner.observe_storage()
    return json_response(file, headers=_ignored(form))


@router.get(
    "/v1/files",
    summary="List the files of this API key",
    openapi_extra=parameters(
        purpose={"type": "string", "enum": ["batch", "batch_output"]},
        after=AFTER,
        limit=limits(DEFAULT_LIMIT, DEFAULT_LIMIT),
        order={"type": "string", "enum": ["desc", "asc"], "default": "desc"},
    ),
)
async def list_files(request: Request) -> Response:
    runner = runner_of(request)
    query = request.query_params
    files, has_more = await runner.store.files.page(
        owner_of(request),
        purpose=query.get("purpose"),
        after=query.get("after"),
        limit=limit_of(query, DEFAULT_LIMIT, most=DEFAULT_LIMIT),
        ascending=one_of(query, "order", ("desc", "asc")) == "asc",
    )
    return json_response(Page.of(files, has_more=has_more))


@router.get("/v1/files/{file_id}", summary="Describe a file")
async def retrieve_file(request: Request, file_id: str) -> Response:
    return json_response(await runner_of(request).store.files.get(owner_of(request), file_id))


@router.get("/v1/files/{file_id}/content", summary="Download a file")
async def download_file(request: Request, file_id: str) -> Response:
    store = runner_of(request).store
    file = await store.files.get(owner_of(request), file_id)
    path = store.files.path(file.id)
    if not await asyncio.to_thread(path.exists):
        raise ObjectNotFoundError("The file was deleted.", param="file_id")
    return FileResponse(path, media_type="application/octet-stream")


@router.delete("/v1/files/{file_id}", summary="Delete a file")
async def delete_file(request: Request, file_id: str) -> Response:
    runner = runner_of(request)
    await runner.store.files.delete(owner_of(request), file_id)
    await runner.observe_storage()
    return json_response(DeletedFile(file_id))


async def _read_form(request: Request, max_bytes: int) -> FormData:
    """The fields of the body; a file among them lies in memory or, if it is large, in the system's temporary
    directory. Raises an ApiError that says what is wrong."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        raise UnsupportedMediaTypeError(
            f"The Content-Type must be multipart/form-data, got {shown(media_type)}."
        )
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > max_bytes + FORM_OVERHEAD_BYTES:
            raise BodyTooLargeError(f"The file has more than the {max_bytes} bytes that are taken.")
        return message

    bounded = Request(request.scope, receive)
    try:
        async with asyncio.timeout(UPLOAD_TIMEOUT_SECONDS):
            with storage_errors():
                # Raises HTTPException, which has an answer, for what is no such form.
                return await bounded.form(max_files=1, max_fields=MOST_FIELDS, max_part_size=1024)
    except TimeoutError:
        raise RequestTimeoutError(
            f"The file was not complete after {UPLOAD_TIMEOUT_SECONDS:.0f} seconds."
        ) from None


def _plain_name(name: str | None) -> str:
    """The last part of a client's name for a file, printable. It is shown, and never used as a path."""
    last = re.split(r"[/\\]", name or "")[-1]
    return "".join(character for character in last if character.isprintable())[:LONGEST_FILENAME] or "file"


def _lifetime(form: Mapping[str, object]) -> int:
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return DEFAULT_LIFETIME_SECONDS
    if anchor != "created_at":
        raise InvalidRequestError(
            f"'expires_after[anchor]' must be created_at, got {shown(anchor)}.", param="expires_after[anchor]"
        )
    least, most = LIFETIMES
    if not (isinstance(seconds, str) and re.fullmatch(r"\d{1,9}", seconds) and least <= int(seconds) <= most):
        raise InvalidRequestError(
            f"'expires_after[seconds]' must be {least} to {most}, got {shown(seconds)}.",
            param="expires_after[seconds]",
        )
    return int(seconds)


_FIELDS = frozenset({"file", "purpose", "expires_after[anchor]", "expires_after[seconds]"})


def _ignored(form: FormData) -> dict[str, str]:
    ignored = set(form) - _FIELDS
    return {HEADER: header_value(ignored)} if ignored else {}
