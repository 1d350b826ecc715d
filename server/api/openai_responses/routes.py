"""POST /v1/responses, and what is said to those who look for an earlier response."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request, Response

from server.api import ignored_fields
from server.api.body import off_loop
from server.api.openai_responses.answers import ResponseEvent, ResponseObject
from server.api.openai_responses.conversation import (
    check_stateless,
    conversation,
    declared_tools,
    response_format,
)
from server.api.openai_responses.protocol import LOGPROBS, ResponsesRequest, TextFormat
from server.api.openai_responses.writer import EVENTS, IN_PROGRESS, ResponseWriter
from server.api.openapi import body_of
from server.api.params import DEFAULT_TEMPERATURE, DEFAULT_TOP_P, Logprobs, check_logprobs
from server.api.protocol import GenerationFields
from server.api.serving import answer, read_body, runtime_of, served_model, stream
from server.api.terms import ENTERING
from server.api.tool_plans import plan_tools
from server.api.tools import ToolChoice
from server.api.turns import begin_turn
from server.errors import InvalidRequestError, ResponseNotFoundError

router = APIRouter()

_CHAT_FORMAT = "response_format"


@router.post(
    "/v1/responses",
    dependencies=[ENTERING],
    summary="Continue a conversation, as OpenAI's Responses API does",
    openapi_extra=body_of(ResponsesRequest, answer=ResponseObject, stream=ResponseEvent),
)
async def create_response(request: Request) -> Response:
    runtime = runtime_of(request)
    body, headers = await read_body(request, ResponsesRequest)
    model = served_model(runtime, body.model)
    ignored_fields.add_to_header(headers, check_stateless(body))
    messages = await off_loop(request, lambda: conversation(body))
    tools, loose = await plan_tools(
        declared_tools(body),
        body.tool_choice,
        model,
        runtime.grammars,
        is_parallel=body.parallel_tool_calls is not False,
    )
    ignored_fields.add_to_header(headers, loose)
    fields = GenerationFields.model_construct(
        temperature=body.temperature, top_p=body.top_p, response_format=response_format(body)
    )
    try:
        turn = await begin_turn(
            request,
            model,
            messages,
            fields,
            tools=tools,
            max_tokens=body.max_output_tokens,
            logprobs=_logprobs(body, runtime.config.max_logprobs),
            messages_param="input",
            max_tokens_param="max_output_tokens",
        )
    except InvalidRequestError as error:
        raise _in_own_terms(error) from None
    writer = ResponseWriter(turn, _begun(body, model.names[0]), model.tokenizer)
    if body.stream:
        return stream(request, turn.generation, writer.events(), headers, EVENTS)
    return await answer(request, turn.generation, writer.whole(), headers)


@router.get("/v1/responses/{response_id}", summary="Nothing: responses are not kept")
async def retrieve_response(response_id: str) -> Response:
    raise ResponseNotFoundError(
        "Responses are not kept by this server, so that none can be retrieved.", param="response_id"
    )


def _in_own_terms(error: InvalidRequestError) -> InvalidRequestError:
    """A mistake in the output's form, as this API names it."""
    if error.param is None or not error.param.startswith(_CHAT_FORMAT):
        return error
    for theirs, ours in ((_CHAT_FORMAT + ".json_schema", "text.format"), (_CHAT_FORMAT, "text.format")):
        error.message = error.message.replace(theirs, ours)
        error.param = error.param.replace(theirs, ours)
    return error


def _logprobs(body: ResponsesRequest, max_logprobs: int) -> Logprobs:
    if body.top_logprobs is None and LOGPROBS not in (body.include or ()):
        return Logprobs()
    top = body.top_logprobs or 0
    check_logprobs(top, max_logprobs, "top_logprobs")
    return Logprobs(output=top)


def _begun(body: ResponsesRequest, model: str) -> ResponseObject:
    format = body.text.format if body.text is not None else None
    format = format or TextFormat.model_validate({"type": "text"})
    return ResponseObject(
        id=f"resp_{uuid.uuid4().hex}",
        created_at=int(time.time()),
        status=IN_PROGRESS,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        temperature=DEFAULT_TEMPERATURE if body.temperature is None else body.temperature,
        text={"format": format.model_dump(by_alias=True, exclude_none=True)},
        tool_choice=_shown_choice(body.tool_choice, has_tools=bool(body.tools)),
        tools=[tool.model_dump() for tool in body.tools or ()],
        top_p=DEFAULT_TOP_P if body.top_p is None else body.top_p,
    )


def _shown_choice(choice: ToolChoice | None, *, has_tools: bool) -> str | dict[str, Any]:
    if choice is None:
        return "auto" if has_tools else "none"
    if choice.names is None:
        return choice.mode
    named = [{"type": "function", "name": name} for name in choice.names]
    if choice.is_named:
        return named[0]
    return {"type": "allowed_tools", "mode": choice.mode, "tools": named}
