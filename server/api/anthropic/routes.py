"""POST /v1/messages, POST /v1/messages/count_tokens"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from server.api import ignored_fields
from server.api.anthropic.answers import (
    EVENTS,
    MessageAnswer,
    MessageEvent,
    TokenCount,
    events,
    new_message_id,
    whole,
)
from server.api.anthropic.conversation import conversation, tool_plan
from server.api.anthropic.protocol import CountTokensRequest, MessagesRequest
from server.api.body import off_loop
from server.api.openapi import body_of
from server.api.prompts import chat_token_ids
from server.api.protocol import GenerationFields
from server.api.responses import json_response
from server.api.serving import answer, read_body, runtime_of, served_model, stream
from server.api.terms import ENTERING
from server.api.turns import begin_turn

router = APIRouter()


@router.post(
    "/v1/messages",
    dependencies=[ENTERING],
    summary="Continue a conversation, as Anthropic's API does",
    openapi_extra=body_of(MessagesRequest, answer=MessageAnswer, stream=MessageEvent),
)
async def create_message(request: Request) -> Response:
    runtime = runtime_of(request)
    body, headers = await read_body(request, MessagesRequest)
    model = served_model(runtime, body.model)
    messages = await off_loop(request, lambda: conversation(body))
    tools, loose = await tool_plan(body, model, runtime.grammars)
    ignored_fields.add_to_header(headers, loose)
    fields = GenerationFields.model_construct(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=tuple(body.stop_sequences or ()),
    )
    turn = await begin_turn(
        request, model, messages, fields, tools=tools, max_tokens_if_they_fit=body.max_tokens
    )
    told = (turn, new_message_id(), model.names[0], body.max_tokens)
    if body.stream:
        return stream(request, turn.generation, events(*told), headers, EVENTS)
    return await answer(request, turn.generation, whole(*told), headers)


@router.post(
    "/v1/messages/count_tokens",
    summary="The number of tokens of a conversation",
    openapi_extra=body_of(CountTokensRequest, answer=TokenCount),
)
async def count_tokens(request: Request) -> Response:
    body, headers = await read_body(request, CountTokensRequest)
    runtime = runtime_of(request)
    model = served_model(runtime, body.model)
    tools, _ = await tool_plan(body, model, runtime.grammars)
    messages = await off_loop(request, lambda: conversation(body))
    ids = await chat_token_ids(messages, model, tools=tools)
    return json_response(TokenCount(len(ids)), headers=headers)
