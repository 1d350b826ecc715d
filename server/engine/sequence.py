"""A sequence: one prompt being continued, from its arrival until its last token."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from server.engine.types import GenerateRequest, PromptTokenLogprob, SamplingParams
from server.grammar_library import Matcher


class SequenceStatus(enum.Enum):
    WAITING = enum.auto()
    """Not in a batch: new, or preempted and to be recomputed."""
    RUNNING = enum.auto()
    """Holds KV blocks and is considered for every step."""
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """The engine's state of one request. Laws:

    - `token_ids` is the prompt followed by the generated tokens and only ever grows.
    - The KV entries of `token_ids[:num_computed]` are in the cache; `num_computed < num_tokens` while the
      sequence lives, since the newest token has always yet to be computed.
    - There is no prefill or decode phase: a step computes some of `token_ids[num_computed:]`, and samples
      when it reaches the end.
    - `block_tables[g][i]` is the block of KV group g that holds positions [i * block_size, (i+1) * block_size).
    """

    request: GenerateRequest
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed: int = 0
    block_tables: list[list[int]] = field(default_factory=list)
    status: SequenceStatus = SequenceStatus.WAITING
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when the sequence was first scheduled."""
    num_preemptions: int = 0
    arrived_at: float = 0.0
    scheduled_at: float = 0.0
    prompt_logprobs: list[PromptTokenLogprob | None] = field(default_factory=list)
    """Grows with the prefill, where asked for."""
    compiled_grammar: Matcher | None = None
    """That of `params.grammar`, at the beginning of the text; set before the sequence is scheduled."""

    @classmethod
    def from_request(cls, request: GenerateRequest) -> Sequence:
        return cls(
            request=request,
            token_ids=list(request.prompt_token_ids),
            num_prompt_tokens=len(request.prompt_token_ids),
        )

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def followed_by(self, token_ids: Iterable[int]) -> Sequence:
        """What the sequence would be after these tokens, to look at: the rest it shares with the sequence."""
        return replace(self, token_ids=[*self.token_ids, *token_ids])
