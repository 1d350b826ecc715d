"""What the model would read: POST /v1/chat/completions/render, POST /v1/completions/render."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal

from fastapi import APIRouter, Request, Response
from msgspec import Struct

from server.api.body import off_loop
from server.api.chat_messages import chat_messages
from server.api.completions import prompts_of
from server.api.openapi import body_of
from server.api.prompts import chat_prompt, truncated
from server.api.protocol import ChatCompletionRequest, CompletionRequest
from server.api.responses import json_response
from server.api.serving import read_body, runtime_of, served_model
from server.api.tool_plans import plan_chat_tools
from server.frontend.served_model import ServedModel

router = APIRouter()


class Prompt(Struct):
    prompt: str
    """The text of all its tokens, control tokens included. Encoding it again may give others: what a client
    typed is text even where it looks like a control token."""
    token_ids: list[int]
    count: int
    max_model_len: int
    notes: list[str]
    """What was folded, merged or cut off, in sentences for people."""


class PromptList(Struct):
    data: list[Prompt]
    object: Literal["list"] = "list"


@router.post(
    "/v1/chat/completions/render",
    summary="The prompt that a conversation becomes",
    openapi_extra=body_of(ChatCompletionRequest, answer=Prompt),
)
async def render_chat_completion(request: Request) -> Response:
    runtime = runtime_of(request)
    body, headers = await read_body(request, ChatCompletionRequest)
    model = served_model(runtime, body.model)
    tools = await plan_chat_tools(body, model, runtime.grammars, headers)
    rendered = await chat_prompt(
        await off_loop(request, lambda: chat_messages(body.messages)),
        model,
        tools=tools,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
    )
    requested = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    token_ids = truncated(rendered.token_ids, body, model, requested)
    notes = [*rendered.notes, *_cut(len(rendered.token_ids), len(token_ids))]
    return json_response(await _prompt(token_ids, notes, model), headers=headers)


@router.post(
    "/v1/completions/render",
    summary="The prompts of a completion",
    openapi_extra=body_of(CompletionRequest, answer=PromptList),
)
async def render_completion(request: Request) -> Response:
    body, headers = await read_body(request, CompletionRequest)
    model = served_model(runtime_of(request), body.model)
    whole = await prompts_of(body.model_copy(update={"truncate_prompt_tokens": None}), model)
    prompts = [
        await _prompt(token_ids, _cut(len(before), len(token_ids)), model)
        for before, token_ids in zip(whole, await prompts_of(body, model), strict=True)
    ]
    return json_response(PromptList(prompts), headers=headers)


async def _prompt(token_ids: list[int], notes: Sequence[str], model: ServedModel) -> Prompt:
    # In a thread, since there may be millions.
    text = await asyncio.to_thread(model.tokenizer.decode, token_ids, skip_special_tokens=False)
    return Prompt(text, token_ids, len(token_ids), model.info.max_model_len, list(notes))


def _cut(num_before: int, num_after: int) -> list[str]:
    if num_before == num_after:
        return []
    return [f"{num_before - num_after} of {num_before} tokens were cut off by 'truncate_prompt_tokens'"]
