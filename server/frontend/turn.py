"""The model's turn in a conversation, as every dialect of the API tells it: text, calls, and an end.

Laws, for each choice:
1. A call's `CallBegun` comes before its `ArgumentPiece`s, and no text and no other call comes between.
2. The last delta, and no other, has a `finish_reason`; it is TOOL_CALLS only if every call is whole.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from server.engine.types import FinishReason, PromptTokenLogprob, TokenLogprob
from server.frontend.generation import Generation
from server.frontend.records import UsageCounts
from server.frontend.tool_forms import Parser
from server.frontend.tool_parser import ArgumentPiece, CallBegun, Piece, TextPiece
from server.frontend.tool_plan import ToolPlan
from server.tool_format import ToolCall

TOOL_CALLS = "tool_calls"
"""The finish reason of a turn that ended with calls; the others are the engine's."""


@dataclass(frozen=True, slots=True)
class TurnDelta:
    """What one choice gained at once."""

    index: int
    pieces: list[Piece]
    logprobs: list[TokenLogprob] | None
    """Of the tokens whose text is known now, those of calls included; where asked for."""
    token_ids: list[int]
    """Of all tokens generated since the last delta."""
    prompt_logprobs: list[PromptTokenLogprob | None] | None
    """In a choice's first delta, where asked for."""
    finish_reason: str | None
    stop_reason: str | int | None
    """The stop string or stop token of the request that ended it."""


@dataclass(slots=True)
class TurnChoice:
    """A choice that is complete."""

    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[PromptTokenLogprob | None] | None = None
    finish_reason: str = ""
    stop_reason: str | int | None = None


class Turn:
    """Reads an admitted generation, once."""

    def __init__(
        self, generation: Generation, prompt_token_ids: list[int], tools: ToolPlan, max_tokens: int
    ) -> None:
        self.generation = generation
        self.prompt_token_ids = prompt_token_ids
        self.max_tokens = max_tokens
        """Tokens of each choice at most."""
        self._tools = tools

    def usage(self) -> UsageCounts:
        return self.generation.usage()

    async def deltas(self) -> AsyncGenerator[TurnDelta, None]:
        """What the choices gain, as it comes. Raises as `Generation.deltas` does."""
        parsers: dict[int, Parser] = {}
        async with aclosing(self.generation.deltas()) as deltas:
            async for delta in deltas:
                index, text = delta.index, delta.text
                finish_reason: str | None = text.finish_reason
                if self._tools.names:
                    if index not in parsers:
                        parsers[index] = self._tools.form.parser(self._tools.names)
                    parser = parsers[index]
                    pieces = parser.push(text.text)
                    if finish_reason is not None:
                        pieces += parser.finish()
                    if finish_reason == FinishReason.STOP and parser.has_whole_calls:
                        finish_reason = TOOL_CALLS
                else:
                    pieces = [TextPiece(text.text)] if text.text else []
                yield TurnDelta(
                    index=index,
                    pieces=pieces,
                    logprobs=text.logprobs,
                    token_ids=text.generated_token_ids,
                    prompt_logprobs=delta.prompt_logprobs,
                    finish_reason=finish_reason,
                    stop_reason=text.stop_reason,
                )

    async def whole(self) -> list[TurnChoice]:
        """Every choice, when all are complete. Raises as `deltas` does."""
        choices: dict[int, TurnChoice] = {}
        texts: dict[int, list[str]] = {}
        calls: dict[int, list[tuple[CallBegun, list[str]]]] = {}
        async with aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                choice = choices.setdefault(delta.index, TurnChoice())
                for piece in delta.pieces:
                    match piece:
                        case TextPiece(text):
                            texts.setdefault(delta.index, []).append(text)
                        case CallBegun():
                            calls.setdefault(delta.index, []).append((piece, []))
                        case ArgumentPiece(_, text):
                            calls[delta.index][-1][1].append(text)
                if delta.logprobs is not None:
                    choice.logprobs = choice.logprobs or []
                    choice.logprobs += delta.logprobs
                choice.token_ids += delta.token_ids
                choice.prompt_logprobs = choice.prompt_logprobs or delta.prompt_logprobs
                choice.finish_reason = delta.finish_reason or ""
                choice.stop_reason = delta.stop_reason
        for index, choice in choices.items():
            choice.text = "".join(texts.get(index, ()))
            choice.calls = [
                ToolCall(begun.id, begun.name, "".join(pieces)) for begun, pieces in calls.get(index, ())
            ]
        return [choices[index] for index in sorted(choices)]
