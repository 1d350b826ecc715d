"""Log probabilities in OpenAI's two shapes."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from server.api.responses import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob
from server.engine.types import TokenLogprob
from server.tokenizer import BYTE_REPLACEMENT, Tokenizer


def chat_logprobs(tokens: Iterable[TokenLogprob], tokenizer: Tokenizer) -> ChatLogprobs:
    def entry(token_id: int, logprob: float) -> TopLogprob:
        return TopLogprob(tokenizer.token_text(token_id), logprob, list(tokenizer.token_bytes(token_id)))

    content = []
    for token in tokens:
        chosen = entry(token.token_id, token.logprob)
        top = [entry(*alternative) for alternative in token.top]
        content.append(ChatTokenLogprob(chosen.token, chosen.logprob, chosen.bytes, top))
    return ChatLogprobs(content)


class CompletionLogprobsWriter:
    """Writes the log probabilities of one choice of a completion, in as many parts as it comes in.

    `text_offset` is the place in the choice's whole text at which a token's text begins: of a character made of
    several tokens, the place of the character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(BYTE_REPLACEMENT)
        self._offset = 0

    def prompt(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None], *, hide_bos: bool
    ) -> CompletionLogprobs:
        """An echoed prompt's; its first token has none. `hide_bos`: the echoed text does not show the first
        token."""
        written = CompletionLogprobs([], [], [], [])
        for position, (token_id, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
            self._write(written, token_id, logprob, is_visible=not (hide_bos and position == 0))
        return written

    def output(self, logprobs: Iterable[TokenLogprob]) -> CompletionLogprobs:
        """Generated tokens'; control tokens among them have no text."""
        written = CompletionLogprobs([], [], [], [])
        for token in logprobs:
            is_visible = token.token_id not in self._tokenizer.control_token_ids
            self._write(written, token.token_id, token, is_visible=is_visible)
        return written

    def _write(
        self, written: CompletionLogprobs, token_id: int, logprob: TokenLogprob | None, *, is_visible: bool
    ) -> None:
        written.tokens.append(self._tokenizer.token_text(token_id))
        written.text_offset.append(self._offset)
        if is_visible:
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        if logprob is None:
            written.token_logprobs.append(None)
            written.top_logprobs.append(None)
            return
        written.token_logprobs.append(logprob.logprob)
        top: dict[str, float] = {}
        # Two tokens may have one text; the likelier comes first and stays.
        for alternative, value in (*logprob.top, (token_id, logprob.logprob)):
            top.setdefault(self._tokenizer.token_text(alternative), value)
        written.top_logprobs.append(top)


def extend(whole: CompletionLogprobs, part: CompletionLogprobs) -> None:
    whole.tokens += part.tokens
    whole.token_logprobs += part.token_logprobs
    whole.top_logprobs += part.top_logprobs
    whole.text_offset += part.text_offset
