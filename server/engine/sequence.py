"""A sequence: one prompt being continued, from its arrival until its last token."""

from __future__ import annotations

import enum
import sys
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from server.engine.sampling.arrays import sampling_record
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
    - While steps are in flight, `num_computing` more entries are being computed and `num_sampling` more tokens
      sampled. Both are 0 otherwise, and at preemption.
    - `block_tables[g][i]` is the block of KV group g that holds positions [i * block_size, (i+1) * block_size).
    """

    request: GenerateRequest
    request_id: str = field(init=False)
    params: SamplingParams = field(init=False)
    """Both the request's: they are looked up for each token."""
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed: int = 0
    num_computing: int = 0
    num_sampling: int = 0
    sampled_row: int = -1
    """While a token is being sampled: which of its step's it is."""
    block_tables: list[array[int]] = field(default_factory=list)
    """int32, so that they can be copied whole."""
    has_room_until: int = 0
    """Tokens for which its blocks have room; the KV cache's own, as is the next."""
    settled_until: int = 0
    """Computed tokens below which no block of these can be published or released."""
    token_limit: int = sys.maxsize
    """Tokens that end the sequence, whatever they are: by max_tokens, the context, or the size of the KV cache.
    Set when it is queued."""
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
    plain_from: int = 0
    """Tokens from which on the next one follows from its logits, `temperature`, `top_k`, `top_p` and
    `min_p` alone, and nothing is reported beside it; `sys.maxsize`: never."""
    sampling_record: bytes = field(init=False)
    """See `server.engine.sampling.arrays.sampling_record`."""
    has_begun: bool = False
    """Whether a step with some of it was launched."""

    def __post_init__(self) -> None:
        self.request_id = self.request.request_id
        self.params = self.request.params
        self.sampling_record = sampling_record(self.params, self.num_prompt_tokens)

    @classmethod
    def from_request(cls, request: GenerateRequest) -> Sequence:
        return cls(
            request=request,
            token_ids=list(request.prompt_token_ids),
            num_prompt_tokens=len(request.prompt_token_ids),
            plain_from=len(request.prompt_token_ids) + _num_before_plain(request.params),
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_planned(self) -> int:
        """Tokens whose entries are there once all that is in flight has been taken in."""
        return self.num_computed + self.num_computing

    @property
    def num_expected(self) -> int:
        """Tokens that are there then."""
        return len(self.token_ids) + self.num_sampling

    def followed_by(self, token_ids: Iterable[int]) -> Sequence:
        """What the sequence would be after these tokens, to look at: the rest it shares with the sequence."""
        return replace(self, token_ids=[*self.token_ids, *token_ids])


def _num_before_plain(params: SamplingParams) -> int:
    """Generated tokens before `Sequence.plain_from`."""
    has_penalties = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
    if params.is_constrained or has_penalties or params.logit_bias or params.logprobs is not None:
        return sys.maxsize
    with_first = 0 if params.prompt_logprobs is None else 1
    return max(with_first, params.min_tokens if params.stop_token_ids else 0)
