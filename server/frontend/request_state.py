"""What the front knows about one choice while the engine generates it: its text, its stops, its end.

The stop strings are matched character by character, so that the outcome does not depend on how the text was cut
into tokens or the tokens into messages: the match whose last character comes first ends the text, and of those
that end there the longest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import msgspec

from server.engine.types import FinishReason, SequenceOutput, TokenLogprob
from server.frontend.detokenizer import Detokenizer
from server.frontend.tool_plan import NO_TOOLS, ToolPlan
from server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class StopConditions:
    """What the front itself has to know about the end of a choice; stop tokens are the engine's task."""

    strings: tuple[str, ...] = ()
    """None of them empty."""
    include_in_output: bool = False
    """Whether the text keeps the stop string, or the text of the stop token, that ended it."""
    min_tokens: int = 0
    """A stop string ends the text only if its last character comes from a later token than so many."""
    tools: ToolPlan = NO_TOOLS
    """That the text may call. No stop string is looked for in a call, which it would leave incomplete."""
    silent_token_ids: frozenset[int] = frozenset()
    """Stop tokens that are not reported as `stop_reason`: those of the model, not of the request."""


class TextDelta(msgspec.Struct, frozen=True):
    """What one step added to a choice."""

    text: str
    token_ids: list[int]
    """The tokens whose text is complete with this delta; all deltas' together are those that begin before the
    end of the text, without the stop token. A token that a stop string cuts through belongs to them."""
    logprobs: list[TokenLogprob] | None
    """One for each of `token_ids`, where asked for."""
    generated_token_ids: list[int]
    """All tokens generated since the last delta, whatever became of their text; a stop token is one."""
    finish_reason: FinishReason | None
    """Set in the last delta, and only there. STOP while the engine's own output has no finish_reason means that
    a stop string was found: the engine's sequence is to be aborted."""
    stop_reason: str | int | None
    """The stop string or stop token of the request that ended it."""


class RequestState:
    """Turns the engine's outputs for one sequence into text deltas. Laws:

    - The deltas' texts joined are a prefix of what the detokenizer makes of all the tokens: all of it, or what
      comes before the first stop. Their `generated_token_ids` are all the tokens, `num_generated` in number.
    - Text is held back only while it may be the beginning of a stop string or of a character.
    - Exactly one delta has a finish_reason, and none follows it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: StopConditions, *, skip_special_tokens: bool = True) -> None:
        """Raises ValueError for an empty stop string."""
        self._stop = stop
        tools = stop.tools
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens, tools.form.marks)
        self._matchers = [_StopMatcher(string) for string in self._stop.strings]
        self._calls = tools.form.finder(tools.names) if tools.names and stop.strings else None
        self._tokens: deque[_HeldToken] = deque()
        self._held_text = ""  # the text from self._released on
        self._released = 0  # characters
        self._match: str | None = None
        self._has_logprobs = False
        self._untold: list[int] = []
        self.num_generated = 0
        """Tokens generated so far, to the one that completed a stop string, the stop token included."""
        self.sum_of_logprobs = 0.0
        """Of those tokens, as far as logprobs were asked for."""
        self.num_cached_tokens = 0
        """Prompt tokens that came from the prefix cache."""
        self.is_finished = False

    def update(self, output: SequenceOutput) -> TextDelta | None:
        """Take in one output. None: it adds nothing to be told, or the choice has ended before."""
        if self.is_finished:
            return None
        if (delta := self._update_plain(output)) is not None:
            return delta
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        self._has_logprobs = self._has_logprobs or output.logprobs is not None
        for index, token_id in enumerate(output.token_ids):
            self.num_generated += 1
            self._untold.append(token_id)
            logprob = output.logprobs[index] if output.logprobs is not None else None
            self.sum_of_logprobs += logprob.logprob if logprob is not None else 0.0
            is_stop_token = output.stop_token_id is not None and index == len(output.token_ids) - 1
            if is_stop_token and not self._stop.include_in_output:
                break
            self._add_token(token_id, logprob)
            if self._match is not None:
                break
        if output.finish_reason is not None and self._match is None:
            self._add_text(self._detokenizer.finish())
        return self._delta(output)

    def _update_plain(self, output: SequenceOutput) -> TextDelta | None:
        """What `update` comes to where nothing is held back, stops or has logprobs, as for most tokens of most
        streams; None, and nothing has changed, where that is not so."""
        token_ids = output.token_ids
        is_plain = output.finish_reason is None and output.logprobs is None and output.num_cached_tokens == 0
        if not is_plain or self._matchers or self._tokens or self._held_text or self._has_logprobs:
            return None
        text = self._detokenizer.whole(token_ids) if token_ids else None
        if text is None:
            return None
        self.num_generated += len(token_ids)
        self._released += len(text)
        untold, self._untold = self._untold, []
        return TextDelta(text, token_ids, None, untold + token_ids, None, None)

    def _add_token(self, token_id: int, logprob: TokenLogprob | None) -> None:
        start = self._released + len(self._held_text)
        text = self._detokenizer.push(token_id)
        # The character that a token leaves incomplete is not in `text` yet.
        end = start + len(text) + self._detokenizer.has_incomplete_character
        self._tokens.append(_HeldToken(token_id, logprob, start, end))
        self._add_text(text)

    def _add_text(self, text: str) -> None:
        if self._matchers and text:
            may_stop = self.num_generated > self._stop.min_tokens
            num_searched, is_in_call = self._find_call(text)
            for length, character in enumerate(text[:num_searched], start=1):
                matched = [matcher.string for matcher in self._matchers if matcher.push(character)]
                if matched and may_stop:
                    self._match = max(matched, key=len)
                    kept = self._held_text + text[:length]
                    self._held_text = kept if self._stop.include_in_output else kept[: -len(self._match)]
                    return
            if is_in_call:
                self._matchers = []
        self._held_text += text

    def _find_call(self, text: str) -> tuple[int, bool]:
        """How much of `text` is searched for stop strings, and whether the rest belongs to a call."""
        if self._calls is None:
            return len(text), False
        end = self._calls.text_end(text)
        return (len(text), False) if end is None else (end, True)

    def _delta(self, output: SequenceOutput) -> TextDelta | None:
        finish_reason, stop_reason = self._finish(output)
        self.is_finished = finish_reason is not None
        if self.is_finished:
            text, self._held_text = self._held_text, ""
        else:
            num_held = max((matcher.num_matched for matcher in self._matchers), default=0)
            cut = len(self._held_text) - num_held
            text, self._held_text = self._held_text[:cut], self._held_text[cut:]
        self._released += len(text)
        tokens = self._release_tokens()
        if not text and not tokens and finish_reason is None:
            return None
        logprobs = (
            [token.logprob for token in tokens if token.logprob is not None] if self._has_logprobs else None
        )
        untold, self._untold = self._untold, []
        return TextDelta(
            text=text,
            token_ids=[token.token_id for token in tokens],
            logprobs=logprobs,
            generated_token_ids=untold,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )

    def _finish(self, output: SequenceOutput) -> tuple[FinishReason | None, str | int | None]:
        if self._match is not None:
            return FinishReason.STOP, self._match
        if output.stop_token_id in self._stop.silent_token_ids:
            return output.finish_reason, None
        return output.finish_reason, output.stop_token_id

    def _release_tokens(self) -> list[_HeldToken]:
        tokens: list[_HeldToken] = []
        while self._tokens:
            token = self._tokens[0]
            is_kept = token.end <= self._released
            if self.is_finished:  # a stop string may have cut through a token, or before it
                is_kept = is_kept or token.start < self._released or self._match is None
            if not is_kept:
                break
            tokens.append(self._tokens.popleft())
        return tokens


class _HeldToken(NamedTuple):
    token_id: int
    logprob: TokenLogprob | None
    start: int
    """Characters of text before it."""
    end: int


class _StopMatcher:
    """Finds one string in a text given character by character (Knuth, Morris and Pratt 1977).

    `num_matched` is the length of the longest beginning of the string that the text ends with, at any time.
    """

    def __init__(self, string: str) -> None:
        if not string:
            raise ValueError("a stop string must not be empty")
        self.string = string
        self.num_matched = 0
        self._fallback = _borders(string)

    def push(self, character: str) -> bool:
        """Whether the string ends with this character."""
        matched = self.num_matched
        while matched and self.string[matched] != character:
            matched = self._fallback[matched]
        if self.string[matched] == character:
            matched += 1
        is_match = matched == len(self.string)
        self.num_matched = self._fallback[matched] if is_match else matched
        return is_match


@lru_cache(maxsize=64)  # the choices of a request share theirs: there may be a thousand
def _borders(string: str) -> Sequence[int]:
    """[n]: length of the longest proper beginning of string[:n] that string[:n] also ends with."""
    borders = [0, 0]
    for character in string[1:]:
        length = borders[-1]
        while length and string[length] != character:
            length = borders[length]
        borders.append(length + 1 if string[length] == character else 0)
    return tuple(borders)
