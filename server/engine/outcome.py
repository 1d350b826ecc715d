"""What the tokens that a step sampled make of a sequence, and what the front is told of it."""

from __future__ import annotations

from server.engine.sampling.types import NOTHING_LEFT, SampledToken
from server.engine.sequence import Sequence
from server.engine.types import FinishReason, SequenceOutput


def append_sampled(
    seq: Sequence, tokens: list[SampledToken], draft: tuple[int, ...], max_sequence_tokens: int
) -> tuple[list[SampledToken], FinishReason | None]:
    """Append the tokens whose rows saw what the sequence now is: up to the first that is not as drafted.

    An error ends them, too; its row will be the first of the next step. Returns what was appended, and why the
    sequence ends, if it does.
    """
    taken: list[SampledToken] = []
    reason = None
    for index, token in enumerate(tokens):
        if token.error is not None:
            break
        seq.token_ids.append(token.token_id)
        taken.append(token)
        reason = FinishReason.STOP if token.completes else _finish_reason(seq, max_sequence_tokens)
        if reason is not None or draft[index : index + 1] != (token.token_id,):
            break
    return taken, reason


def ends_with_next(seq: Sequence, max_sequence_tokens: int) -> bool:
    """Whether the token that is being sampled is the last one, whatever it is."""
    num_expected = seq.num_expected
    return seq.num_sampling > 0 and (
        num_expected - seq.num_prompt_tokens >= seq.params.max_tokens or num_expected >= max_sequence_tokens
    )


def output_of(seq: Sequence, tokens: list[SampledToken], reason: FinishReason | None) -> SequenceOutput:
    """tokens: the newest, one at least. Takes the prompt's logprobs from the sequence."""
    is_first, last = seq.num_generated == len(tokens), tokens[-1]
    prompt_logprobs, seq.prompt_logprobs = seq.prompt_logprobs, []
    return SequenceOutput(
        request_id=seq.request_id,
        token_ids=[token.token_id for token in tokens],
        logprobs=[token.logprob for token in tokens if token.logprob is not None] or None,
        prompt_logprobs=prompt_logprobs if is_first and seq.params.prompt_logprobs is not None else None,
        finish_reason=reason,
        stop_token_id=last.token_id if reason is FinishReason.STOP and not last.completes else None,
        num_cached_tokens=seq.num_cached_tokens,
        scheduled_at=seq.scheduled_at,
    )


def error_of(seq: Sequence, error: str) -> SequenceOutput:
    return SequenceOutput(
        request_id=seq.request_id,
        finish_reason=FinishReason.ERROR,
        num_cached_tokens=seq.num_cached_tokens,
        scheduled_at=seq.scheduled_at,
        error=error,
        is_contradictory=seq.params.is_constrained and error == NOTHING_LEFT,
    )


def _finish_reason(seq: Sequence, max_sequence_tokens: int) -> FinishReason | None:
    params = seq.params
    if seq.token_ids[-1] in params.stop_token_ids and seq.num_generated >= params.min_tokens:
        return FinishReason.STOP
    if seq.num_generated >= params.max_tokens or seq.num_tokens >= max_sequence_tokens:
        return FinishReason.LENGTH
    return None
