"""What the tokens that a step sampled make of a sequence, and what the front is told of it."""

from __future__ import annotations

from server.engine.sampling.types import NOTHING_LEFT, SampledToken
from server.engine.sequence import Sequence
from server.engine.types import FinishReason, SequenceOutput


def append_sampled(
    seq: Sequence, tokens: list[SampledToken], draft: tuple[int, ...]
) -> tuple[list[SampledToken], FinishReason | None]:
    """Append the tokens whose rows saw what the sequence now is: up to the first that is not as drafted.

    An error ends them, too; its row will be the first of the next step. Returns what was appended, and why the
    sequence ends, if it does.
    """
    reason = None
    for index, token in enumerate(tokens):
        if token.error is not None:
            return tokens[:index], reason
        seq.token_ids.append(token.token_id)
        reason = _finish_reason(seq, token)
        if reason is not None or draft[index : index + 1] != (token.token_id,):
            return tokens[: index + 1], reason
    return tokens, reason


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


def _finish_reason(seq: Sequence, newest: SampledToken) -> FinishReason | None:
    if newest.completes:
        return FinishReason.STOP
    params = seq.params
    if newest.token_id in params.stop_token_ids and seq.num_generated >= params.min_tokens:
        return FinishReason.STOP
    return FinishReason.LENGTH if len(seq.token_ids) >= seq.token_limit else None
