"""What the generating routes have in common: from the body to an admitted generation, and to its answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from functools import partial
from typing import TypeVar

from msgspec import UNSET, UnsetType
from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from server.api import ignored_fields
from server.api.body import read_object, validate
from server.api.protocol import GenerationFields, StreamOptions
from server.api.responses import Usage, json_response
from server.api.sse import CHUNKS, EventFormat, GenerationStream
from server.errors import EngineUnavailableError, ModelLoadingError, ModelNotFoundError, shown
from server.frontend.admission import Admission
from server.frontend.generation import ChoiceRequest, Generation
from server.frontend.served_model import ServedModel
from server.request_scope import request_scope
from server.runtime import Phase, Runtime
from server.tracing import RequestTracer

Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result")


def runtime_of(request: Request) -> Runtime:
    runtime: Runtime = request.app.state.runtime
    return runtime


def admission_of(request: Request) -> Admission:
    """The bound that applies: a request that comes from a batch brings that of batches."""
    admission: Admission = getattr(request.state, "admission", request.app.state.admission)
    return admission


def owner_of(request: Request) -> str:
    """The id of the API key that was presented; empty if the server asks for none."""
    return getattr(request.state, "key_id", "")


async def read_body(request: Request, model: type[Body]) -> tuple[Body, dict[str, str]]:
    """The request's body, and the response headers that tell what of it was ignored."""
    config = runtime_of(request).config
    body = validate(model, await read_object(request, config.max_body_bytes))
    return body, ignored_headers(body, strict=config.strict)


def ignored_headers(body: BaseModel, *, strict: bool) -> dict[str, str]:
    ignored = ignored_fields.ignored_fields(body, strict=strict)
    return {ignored_fields.HEADER: ignored_fields.header_value(ignored)} if ignored else {}


def served_model(runtime: Runtime, name: str | None = None) -> ServedModel:
    """The model, if it is there and is called `name`. Raises ModelLoadingError, EngineUnavailableError,
    ModelNotFoundError."""
    if runtime.phase is Phase.FAILED:
        raise EngineUnavailableError
    if runtime.model is None:
        raise ModelLoadingError(f"The model is being loaded: {runtime.stage}, {runtime.fraction:.0%}.")
    if name is not None and name not in runtime.model.names:
        served = ", ".join(runtime.model.names)
        raise ModelNotFoundError(
            f"The model {shown(name)} does not exist; this server has {served}.", param="model"
        )
    return runtime.model


def admit(
    request: Request, model: ServedModel, choices: Sequence[ChoiceRequest], body: GenerationFields
) -> Generation:
    """Room for `choices`, which `body` asks for, or QueueFullError."""
    runtime = runtime_of(request)
    permit = admission_of(request).acquire(len(choices))
    tracer: RequestTracer | None = request.app.state.tracer
    return Generation(
        choices,
        client=runtime.client,
        tokenizer=model.tokenizer,
        metrics=runtime.metrics.requests,
        permit=permit,
        arrival=request.state.arrival,
        cache_salt=_cache_salt(owner_of(request), body.cache_salt or ""),
        priority=max(body.priority or 0, _least_priority(request)),
        client_request_id=request.state.request_id,
        on_end=None if tracer is None else partial(tracer.record, model.names[0], request_scope.get()),
    )


class ChunkUsage:
    """The `usage` of a stream's chunks, as its `stream_options` want it."""

    def __init__(self, options: StreamOptions | None, usage: Callable[[], Usage]) -> None:
        self._usage = usage
        self._is_continuous = options is not None and options.continuous_usage_stats
        self.has_last_chunk = options is not None and options.include_usage
        """Whether one more chunk, without choices, has the whole usage."""

    def of_chunk(self) -> Usage | UnsetType | None:
        if self._is_continuous:
            return self._usage()
        return None if self.has_last_chunk else UNSET


def stream(
    request: Request,
    generation: Generation,
    chunks: AsyncGenerator[object, None],
    headers: dict[str, str],
    form: EventFormat = CHUNKS,
) -> Response:
    runtime = runtime_of(request)
    return GenerationStream(
        request,
        generation,
        chunks,
        config=runtime.config,
        metrics=runtime.metrics.http,
        headers=headers,
        form=form,
    )


async def answer(
    request: Request, generation: Generation, work: Coroutine[None, None, object], headers: dict[str, str]
) -> Response:
    """The result of `work`, which reads `generation`. A client that leaves ends it: raises ClientDisconnect."""
    try:
        return json_response(await _unless_disconnected(request, work), headers=headers)
    finally:
        generation.release()


async def _unless_disconnected(request: Request, work: Coroutine[None, None, Result]) -> Result:
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    # The body was read, so that nothing but the disconnect is left to come.
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _least_priority(request: Request) -> int:
    """What a request cannot be more urgent than: those of batches come behind others."""
    return getattr(request.state, "least_priority", -(2**63))


def _cache_salt(key_id: str, client_salt: str) -> str:
    """Keys do not share prefixes: the time to a first token would tell one what another has asked for."""
    return f"{key_id}/{client_salt}" if key_id or client_salt else ""
