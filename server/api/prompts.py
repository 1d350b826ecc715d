"""From the texts of a request to token ids that the model can take."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from server.chat_template import ChatMessage, ChatTemplateError, render_chat
from server.errors import InvalidRequestError
from server.frontend.admission import check_text_length
from server.frontend.served_model import ServedModel
from server.tokenizer import InvalidTextError

INLINE_CHARS = 4000
"""Longer texts are tokenized in a thread: the event loop must not stand still for tens of milliseconds."""

Result = TypeVar("Result")


async def chat_token_ids(
    messages: Sequence[ChatMessage],
    model: ServedModel,
    *,
    declarations: str = "",
    add_generation_prompt: bool = True,
    param: str = "messages",
) -> list[int]:
    """The rendered conversation. `param` is what the request calls it. Raises InvalidRequestError."""
    num_chars = len(declarations) + sum(
        len(message.text) + sum(len(call.name) + len(call.arguments) for call in message.calls)
        for message in messages
    )
    check_text_length(num_chars, model.info.max_model_len, param)

    def render() -> list[int]:
        chat = render_chat(messages, model.tokenizer, add_generation_prompt, declarations)
        return chat.token_ids(model.tokenizer)

    return await _run(render, num_chars, param)


async def prompt_token_ids(prompts: Sequence[str | list[int]], model: ServedModel) -> list[list[int]]:
    """Raw prompts, in which control tokens are real; ids stay as they are. Raises InvalidRequestError."""
    lengths = [len(prompt) for prompt in prompts if isinstance(prompt, str)]
    check_text_length(max(lengths, default=0), model.info.max_model_len, "prompt")
    encode = model.tokenizer.encode_prompt

    def encode_all() -> list[list[int]]:
        return [encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]

    return await _run(encode_all, sum(lengths), "prompt")


async def text_token_ids(text: str, model: ServedModel, *, add_bos: bool) -> list[int]:
    """The ids of a text that is not to be generated from: it may be empty. Raises InvalidRequestError."""
    check_text_length(len(text), model.info.max_model_len, "prompt")
    encode = model.tokenizer.encode_prompt if add_bos else model.tokenizer.encode_controls
    return await _run(lambda: encode(text), len(text), "prompt")


async def _run(encode: Callable[[], Result], num_chars: int, param: str) -> Result:
    try:
        return encode() if num_chars <= INLINE_CHARS else await asyncio.to_thread(encode)
    except ChatTemplateError as error:
        raise InvalidRequestError(str(error), param=error.param) from None
    except InvalidTextError as error:
        raise InvalidRequestError(f"'{param}': {error}", param=param) from None
