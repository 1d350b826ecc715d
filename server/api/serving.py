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
from server.api.body import read_as, validate
from server.api.protocol import GenerationFields, StreamOptions
from server.api.responses import Usage, json_response
from server.api.sse import CHUNKS, EventFormat, GenerationStream
from server.api.terms import tenant_of, terms_of
from server.api_keys import Tenant
from server.errors import (
    ApiError,
    EngineRestartingError,
    EngineUnavailableError,
    InvalidRequestError,
    ModelLoadingError,
    ModelNotFoundError,
    ShuttingDownError,
    shown,
)
from server.frontend.generation import ChoiceRequest, Generation, Origin
from server.frontend.served_model import ServedModel
from server.request_scope import request_scope
from server.runtime import Phase, Runtime
from server.tracing import RequestTracer

Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result")


def runtime_of(request: Request) -> Runtime:
    runtime: Runtime = request.app.state.runtime
    return runtime


def owner_of(request: Request) -> str:
    """Under whom files and batches are kept: the tenant's id, which is empty if the server asks for no key."""
    return tenant_of(request).id


async def read_body(request: Request, model: type[Body]) -> tuple[Body, dict[str, str]]:
    """The request's body, and the response headers that tell what of it was ignored."""
    config = runtime_of(request).config

    def make(value: dict[str, object]) -> tuple[Body, dict[str, str]]:
        body = validate(model, value)
        return body, ignored_headers(body, strict=config.strict)

    return await read_as(request, config.max_body_bytes, make)


def ignored_headers(body: BaseModel, *, strict: bool) -> dict[str, str]:
    ignored = ignored_fields.ignored_fields(body, strict=strict)
    return {ignored_fields.HEADER: ignored_fields.header_value(ignored)} if ignored else {}


def served_model(runtime: Runtime, name: str | None = None) -> ServedModel:
    """The model, if it is there and is called `name`. Raises ShuttingDownError, ModelLoadingError,
    EngineUnavailableError, ModelNotFoundError."""
    if not runtime.takes_requests:
        raise ShuttingDownError("The server is shutting down and takes no more requests.")
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
    """Room for `choices`, which `body` asks for.

    Raises EngineRestartingError, QueueFullError, RateLimitError, InvalidRequestError.
    """
    runtime, terms = runtime_of(request), terms_of(request)
    if runtime.phase is Phase.RESTARTING:
        raise EngineRestartingError
    tenant = terms.tenant
    priority = max(_priority(body.priority, tenant), terms.least_priority)
    num_prompt_tokens = sum(
        len(token_ids)
        for token_ids in {choice.prompt_index: choice.prompt_token_ids for choice in choices}.values()
    )
    num_output_tokens = sum(choice.sampling.max_tokens for choice in choices)
    held = terms.held  # before the charge, which counts, too
    charge = terms.account.charge(len(choices), num_prompt_tokens + num_output_tokens)
    try:
        permit = terms.admission.acquire(len(choices), num_prompt_tokens, held)
    except ApiError:
        charge.settle(0)
        raise
    tracer: RequestTracer | None = request.app.state.tracer
    cache_salt = _cache_salt(tenant.id, body.cache_salt or "")
    origin = Origin(tenant.id, cache_salt, priority, client_request_id=request.state.request_id)
    return Generation(
        choices,
        client=runtime.client,
        tokenizer=model.tokenizer,
        metrics=runtime.metrics.requests,
        permit=permit,
        charge=charge,
        arrival=request.state.arrival,
        deadlines=terms.deadlines,
        origin=origin,
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
    """The result of `work`, which reads `generation`, as an answer. Raises as `unless_disconnected` does."""
    try:
        return json_response(await unless_disconnected(request, work), headers=headers)
    finally:
        generation.release()


async def unless_disconnected(request: Request, work: Coroutine[None, None, Result]) -> Result:
    """The result of `work`, which a client that leaves ends: raises ClientDisconnect."""
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


def _priority(asked: int | None, tenant: Tenant) -> int:
    """Raises InvalidRequestError for one that is more urgent than the API key allows."""
    if asked is not None and asked < tenant.least_priority:
        raise InvalidRequestError(
            f"'priority' must be at least {tenant.least_priority} with this API key, got {asked}.",
            param="priority",
        )
    return max(0, tenant.least_priority) if asked is None else asked


def _cache_salt(tenant_id: str, client_salt: str) -> str:
    """Tenants do not share prefixes: the time to a first token would tell one what another has asked for.

    No id has a slash, so that no salt can make up another's.
    """
    return f"{tenant_id}/{client_salt}" if tenant_id or client_salt else ""
