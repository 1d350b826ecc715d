"""Who may go to the engine: a bound on sequences in flight, and what can never fit.

Laws:
1. `in_flight` is the number of sequences whose permits are held, and never exceeds `limit`.
2. A permit is released exactly once, whatever ends its request.
3. What passed `resolve_max_tokens` fits the model's context and, alone, the engine's KV pools.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection

from server.engine.types import EngineInfo
from server.errors import ContextLengthError, InvalidRequestError, QueueFullError

LONGEST_PIECE_CHARS = 32
"""No piece of Gemma's vocabularies is longer (the longest are runs of 31 spaces or line feeds), so n tokens
cannot come from more than 32 n characters."""


class Permit:
    """Room for some sequences. Release it when they are over; again does no harm."""

    def __init__(self, admission: Admission, count: int) -> None:
        self._admission = admission
        self._count = count

    def release(self) -> None:
        self._admission.in_flight -= self._count
        if self._count:
            self._admission.released_at = time.monotonic()
        self._count = 0


class Admission:
    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self.released_at = -math.inf
        """`time.monotonic()` seconds at which a permit was last given back."""

    def acquire(self, count: int) -> Permit:
        """Room for `count` sequences, now or not at all.

        Raises QueueFullError, and InvalidRequestError as `check_count` does.
        """
        self.check_count(count)
        if self.in_flight + count > self.limit:
            raise QueueFullError(
                f"The server is full: {self.in_flight} of at most {self.limit} sequences wait or run."
            )
        self.in_flight += count
        return Permit(self, count)

    def check_count(self, count: int) -> None:
        """Refuse more sequences than could ever be admitted, before any of them costs something."""
        if count > self.limit:
            raise InvalidRequestError(
                f"A request may ask for at most {self.limit} sequences (prompts times 'n'), got {count}.",
                param="n",
            )


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
