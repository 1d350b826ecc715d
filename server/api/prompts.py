"""From the texts of a request to token ids that the model can take."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from server.api.protocol import GenerationFields
from server.chat_template import ChatMessage, ChatTemplateError, RenderedChat
from server.errors import InvalidRequestError
from server.frontend.fitting import check_text_length
from server.frontend.served_model import ServedModel
from server.frontend.tool_plan import NO_TOOLS, ToolPlan
from server.tokenizer import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, InvalidTextError

INLINE_CHARS = 4000
"""Longer texts are tokenized in a thread: the event loop must not stand still for tens of milliseconds."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    token_ids: list[int]
    notes: tuple[str, ...]
    """What was folded or merged, in sentences for people."""


async def chat_token_ids(
    messages: Sequence[ChatMessage],
    model: ServedModel,
    *,
    tools: ToolPlan = NO_TOOLS,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | None = None,
    param: str = "messages",
) -> list[int]:
    """As `chat_prompt`, without the notes."""
    prompt = await chat_prompt(
        messages,
        model,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        param=param,
    )
    return prompt.token_ids


async def chat_prompt(
    messages: Sequence[ChatMessage],
    model: ServedModel,
    *,
    tools: ToolPlan = NO_TOOLS,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | None = None,
    param: str = "messages",
) -> ChatPrompt:
    """The rendered conversation. `param` is what the request calls it. Raises InvalidRequestError."""
    if add_generation_prompt and continue_final_message:
        raise InvalidRequestError(
            "'continue_final_message' and 'add_generation_prompt' cannot both be true: either the last message"
            " goes on or a new one begins.",
            param="continue_final_message",
        )
    begins = add_generation_prompt is not False
    continues = bool(continue_final_message)
    num_chars = tools.num_chars + sum(
        len(message.text) + sum(len(call.name) + len(call.arguments) for call in message.calls)
        for message in messages
    )
    check_text_length(num_chars, model.info.max_model_len, param)

    def render() -> ChatPrompt:
        rendered = model.tool_form.render(
            messages,
            model.tokenizer,
            tools.tools,
            is_parallel=tools.is_parallel,
            add_generation_prompt=begins,
            continue_final_message=continues,
        )
        return ChatPrompt(rendered.token_ids(model.tokenizer), rendered.notes)

    return await _run(render, num_chars, param)


async def rendered_token_ids(chats: Sequence[RenderedChat], model: ServedModel, param: str) -> list[list[int]]:
    """The ids of what was rendered. Raises InvalidRequestError."""
    lengths = [len(chat.text) for chat in chats]
    check_text_length(max(lengths, default=0), model.info.max_model_len, param)
    return await _run(lambda: [chat.token_ids(model.tokenizer) for chat in chats], sum(lengths), param)


async def prompt_token_ids(
    prompts: Sequence[str | list[int]], model: ServedModel, *, add_bos: bool
) -> list[list[int]]:
    """Raw prompts, in which control tokens are real; ids stay as they are. Raises InvalidRequestError."""
    lengths = [len(prompt) for prompt in prompts if isinstance(prompt, str)]
    check_text_length(max(lengths, default=0), model.info.max_model_len, "prompt")
    encode = model.tokenizer.encode_prompt if add_bos else model.tokenizer.encode_controls

    def encode_all() -> list[list[int]]:
        return [encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]

    encoded = await _run(encode_all, sum(lengths), "prompt")
    if not all(encoded):
        raise InvalidRequestError(
            "'prompt' has no tokens: it is empty, and 'add_special_tokens' is false.", param="prompt"
        )
    return encoded


async def infill_token_ids(
    prompts: Sequence[str | list[int]], suffix: str, model: ServedModel, *, add_bos: bool
) -> list[list[int]]:
    """What asks for the text between each prompt and `suffix`, both of which are text throughout: a client's
    control tokens come only from prompts in ids. Raises InvalidRequestError.

    The form is that of "CodeGemma: Open Code Models Based on Gemma", 2024: prefix, suffix, then the middle.
    """
    ids, tokenizer = model.tokenizer.fim_ids, model.tokenizer
    if not ids.keys() >= {FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE}:
        raise InvalidRequestError(
            f"'suffix' is not supported by this model: its tokenizer has no {FIM_PREFIX}, {FIM_SUFFIX} and"
            f" {FIM_MIDDLE} tokens. Models of the CodeGemma family have them.",
            param="suffix",
            code="unsupported_parameter",
        )
    lengths = [len(prompt) for prompt in prompts if isinstance(prompt, str)]
    check_text_length(len(suffix), model.info.max_model_len, "suffix")
    check_text_length(max(lengths, default=0), model.info.max_model_len, "prompt")
    bos = [tokenizer.bos_id]

    def encode_all() -> list[list[int]]:
        end = [ids[FIM_SUFFIX], *tokenizer.encode_text(suffix), ids[FIM_MIDDLE]]
        prefixes = [tokenizer.encode_text(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        return [
            [*(bos if add_bos else []), ids[FIM_PREFIX], *prefix[prefix[:1] == bos :], *end]
            for prefix in prefixes
        ]

    return await _run(encode_all, sum(lengths) + len(suffix), "suffix")


def truncated(
    token_ids: list[int], body: GenerationFields, model: ServedModel, num_output: int | None
) -> list[int]:
    """A prompt as `truncate_prompt_tokens` leaves it. A `<bos>` that begins it stays, and counts.

    num_output: tokens to leave room for with -1; None: for one.
    """
    limit = body.truncate_prompt_tokens
    if limit == -1:
        room = min(model.info.max_model_len, model.info.max_sequence_tokens)
        limit = max(1, room - max(1, num_output or 0))
    if limit is None or len(token_ids) <= limit:
        return token_ids
    num_fixed = int(token_ids[0] == model.tokenizer.bos_id)
    fixed, rest = token_ids[:num_fixed], token_ids[num_fixed:]
    num_kept = limit - num_fixed
    return fixed + (rest[:num_kept] if body.truncation_side == "right" else rest[len(rest) - num_kept :])


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
