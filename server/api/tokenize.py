"""POST /tokenize, POST /detokenize, as vLLM has them, and also under /v1, as SGLang has them."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from server.api.body import off_loop, read_as, validate
from server.api.chat_messages import chat_messages
from server.api.openapi import body_of
from server.api.prompts import chat_token_ids, text_token_ids
from server.api.protocol import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
    declared_tools,
)
from server.api.responses import Text, Tokens, json_response
from server.api.serving import ignored_headers, read_body, runtime_of, served_model
from server.api.tool_plans import plan_tools
from server.frontend.fitting import check_token_ids

router = APIRouter()

_TOKENIZE = "The token ids of a text or a conversation"
_TOKENIZE_BODY = body_of(TokenizeCompletionRequest, TokenizeChatRequest, answer=Tokens)
_DETOKENIZE = "The text of token ids"
_DETOKENIZE_BODY = body_of(DetokenizeRequest, answer=Text)


@router.post("/tokenize", summary=_TOKENIZE, openapi_extra=_TOKENIZE_BODY)
@router.post("/v1/tokenize", summary=_TOKENIZE, openapi_extra=_TOKENIZE_BODY)
async def tokenize(request: Request) -> Response:
    runtime = runtime_of(request)

    def make(
        value: dict[str, object],
    ) -> tuple[TokenizeChatRequest | TokenizeCompletionRequest, dict[str, str]]:
        body: TokenizeChatRequest | TokenizeCompletionRequest
        if "messages" in value:
            body = validate(TokenizeChatRequest, value)
        else:
            body = validate(TokenizeCompletionRequest, value)
        return body, ignored_headers(body, strict=runtime.config.strict)

    body, headers = await read_as(request, runtime.config.max_body_bytes, make)
    model = served_model(runtime, body.model)
    if isinstance(body, TokenizeChatRequest):
        messages = body.messages
        tools, _ = await plan_tools(declared_tools(body.tools), None, model, runtime.grammars, is_parallel=True)
        ids = await chat_token_ids(
            await off_loop(request, lambda: chat_messages(messages)),
            model,
            tools=tools,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
        )
    else:
        ids = await text_token_ids(body.prompt, model, add_bos=body.add_special_tokens is not False)
    strings = None
    if body.return_token_strs:
        strings = await off_loop(request, lambda: [model.tokenizer.token_text(token_id) for token_id in ids])
    return json_response(Tokens(len(ids), model.info.max_model_len, ids, strings), headers=headers)


@router.post("/detokenize", summary=_DETOKENIZE, openapi_extra=_DETOKENIZE_BODY)
@router.post("/v1/detokenize", summary=_DETOKENIZE, openapi_extra=_DETOKENIZE_BODY)
async def detokenize(request: Request) -> Response:
    body, headers = await read_body(request, DetokenizeRequest)
    model = served_model(runtime_of(request), body.model)
    check_token_ids(body.tokens, model.info, "tokens")
    # In a thread, since there may be millions.
    text = await asyncio.to_thread(model.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return json_response(Text(text), headers=headers)
