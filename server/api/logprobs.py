"""Log probabilities in OpenAI's two shapes, and the prompt's in vLLM's."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from server.api.responses import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)
from server.engine.types import PromptTokenLogprob, TokenLogprob
from server.tokenizer import BYTE_REPLACEMENT, Tokenizer

INLINE_ENTRIES = 2000
"""More log probabilities of a prompt are written in a thread: some microseconds each add up."""

TokenNames = Callable[[int], str]
Written = TypeVar("Written")


def token_names(tokenizer: Tokenizer, *, as_ids: bool | None) -> TokenNames:
    """How tokens are written: as their text or, since two may have the same, `as_ids`."""
    return "token_id:{}".format if as_ids else tokenizer.token_text


def chat_logprobs(tokens: Iterable[TokenLogprob], tokenizer: Tokenizer, names: TokenNames) -> ChatLogprobs:
    def entry(token_id: int, logprob: float) -> TopLogprob:
        return TopLogprob(names(token_id), logprob, list(tokenizer.token_bytes(token_id)))

    content = []
    for token in tokens:
        chosen = entry(token.token_id, token.logprob)
        top = [entry(*alternative) for alternative in token.top]
        content.append(ChatTokenLogprob(chosen.token, chosen.logprob, chosen.bytes, top))
    return ChatLogprobs(content)


async def written(num_tokens: int, num_top: int, write: Callable[[], Written]) -> Written:
    """What `write` makes of so many tokens of a prompt with so many alternatives each."""
    is_short = num_tokens * (1 + num_top) <= INLINE_ENTRIES
    return write() if is_short else await asyncio.to_thread(write)


async def prompt_logprobs(
    entries: Sequence[PromptTokenLogprob | None], num_top: int, tokenizer: Tokenizer
) -> PromptLogprobs:
    """At each position the prompt's own token and the `num_top` likeliest."""

    def write() -> PromptLogprobs:
        return [None if entry is None else _ranked(entry, num_top, tokenizer) for entry in entries]

    return await written(len(entries), num_top, write)


def _ranked(entry: PromptTokenLogprob, num_top: int, tokenizer: Tokenizer) -> dict[int, PromptLogprob]:
    own = (entry.rank or None, entry.token_id, entry.logprob)
    likeliest = [(rank, *pair) for rank, pair in enumerate(entry.top[:num_top], start=1)]
    return {
        token_id: PromptLogprob(logprob, rank, tokenizer.token_text(token_id))
        for rank, token_id, logprob in (own, *likeliest)
    }


class CompletionLogprobsWriter:
    """Writes the log probabilities of one choice of a completion, in as many parts as it comes in.

    `text_offset` is the place in the choice's whole text at which a token's text begins: of a character made of
    several tokens, the place of the character.
    """

    def __init__(self, tokenizer: Tokenizer, names: TokenNames, *, skip_special_tokens: bool) -> None:
        """skip_special_tokens: of the output; its text does not show them."""
        self._tokenizer = tokenizer
        self._names = names
        self._silent_ids = tokenizer.control_token_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")(BYTE_REPLACEMENT)
        self._offset = 0

    def prompt(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprob | None],
        num_top: int,
        *,
        hide_bos: bool,
    ) -> CompletionLogprobs:
        """An echoed prompt's; its first token has none. `hide_bos`: the echoed text does not show the first
        token."""
        part = CompletionLogprobs([], [], [], [])
        for position, (token_id, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
            top = logprob.top[:num_top] if logprob is not None else []
            self._write(part, token_id, logprob, top, is_visible=not (hide_bos and position == 0))
        return part

    def output(self, logprobs: Iterable[TokenLogprob]) -> CompletionLogprobs:
        """Generated tokens'."""
        part = CompletionLogprobs([], [], [], [])
        for token in logprobs:
            is_visible = token.token_id not in self._silent_ids
            self._write(part, token.token_id, token, token.top, is_visible=is_visible)
        return part

    def _write(
        self,
        part: CompletionLogprobs,
        token_id: int,
        logprob: TokenLogprob | None,
        top: list[tuple[int, float]],
        *,
        is_visible: bool,
    ) -> None:
        part.tokens.append(self._names(token_id))
        part.text_offset.append(self._offset)
        if is_visible:
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        if logprob is None:
            part.token_logprobs.append(None)
            part.top_logprobs.append(None)
            return
        part.token_logprobs.append(logprob.logprob)
        by_name: dict[str, float] = {}
        # Two tokens may have one text; the likelier comes first and stays.
        for alternative, value in (*top, (token_id, logprob.logprob)):
            by_name.setdefault(self._names(alternative), value)
        part.top_logprobs.append(by_name)


def extend(whole: CompletionLogprobs, part: CompletionLogprobs) -> None:
    whole.tokens += part.tokens
    whole.token_logprobs += part.token_logprobs
    whole.top_logprobs += part.top_logprobs
    whole.text_offset += part.text_offset
