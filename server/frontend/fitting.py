"""What can never be served, whatever the load: too long for the model or for the KV pools, or no token of it.

Law: what passed `resolve_max_tokens` fits the model's context and, alone, the engine's KV pools.
"""

from __future__ import annotations

from collections.abc import Collection

from server.engine.types import EngineInfo
from server.errors import ContextLengthError, InvalidRequestError

LONGEST_PIECE_CHARS = 32
"""No piece of Gemma's vocabularies is longer (the longest are runs of 31 spaces or line feeds), so n tokens
cannot come from more than 32 n characters."""


def check_text_length(num_chars: int, max_model_len: int, param: str) -> None:
    """Refuse a text that is too long whatever its tokens are, before it costs anything."""
    if num_chars > LONGEST_PIECE_CHARS * max_model_len:
        raise ContextLengthError(
            f"'{param}' has {num_chars} characters, which are more than the model's {max_model_len} tokens of "
            "context can hold.",
            param=param,
        )


def check_token_ids(token_ids: Collection[int], info: EngineInfo, param: str) -> None:
    """Refuse ids that the model has no embedding for."""
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < info.vocab_size:
            raise InvalidRequestError(
                f"'{param}' holds the token id {token_id}; this model's ids are 0 to {info.vocab_size - 1}.",
                param=param,
            )


def resolve_max_tokens(
    num_prompt: int,
    requested: int | None,
    info: EngineInfo,
    *,
    param: str,
    max_tokens_param: str,
    default: int | None = None,
) -> int:
    """The number of tokens to generate at most: as requested or, without a request, `default` or what fits.

    Raises ContextLengthError, naming prompt and limit, if prompt and output cannot fit.
    """
    for limit, what in (
        (info.max_model_len, "the model's context length"),
        (info.max_sequence_tokens, "what the server's KV cache (KV pool) can hold"),
    ):
        if num_prompt >= limit:
            raise ContextLengthError(
                f"'{param}' has {num_prompt} tokens and leaves no room for output: {what} is {limit} tokens.",
                param=param,
            )
        if requested is not None and num_prompt + requested > limit:
            raise ContextLengthError(
                f"'{max_tokens_param}' is {requested} and '{param}' has {num_prompt} tokens, together "
                f"{num_prompt + requested}: {what} is {limit} tokens.",
                param=max_tokens_param,
            )
    if requested is not None:
        return requested
    room = min(info.max_model_len, info.max_sequence_tokens) - num_prompt
    return room if default is None else min(default, room)
