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
    token_ids, params = seq.token_ids, seq.params
    for index, token in enumerate(tokens):
        if token.error is not None:
            return tokens[:index], None
        token_ids.append(token.token_id)
        reason = None
        is_stop = token.token_id in params.stop_token_ids and seq.num_generated >= params.min_tokens
        if is_stop or token.completes:
            reason = FinishReason.STOP
        elif len(token_ids) >= seq.token_limit:
            reason = FinishReason.LENGTH
        if reason is not None or index == len(draft) or draft[index] != token.token_id:
            return tokens[: index + 1], reason
    return tokens, None


def output_of(seq: Sequence, tokens: list[SampledToken], reason: FinishReason | None) -> SequenceOutput:
    """tokens: the newest, one at least. Takes the prompt's logprobs from the sequence."""
    token_ids, last = seq.token_ids[-len(tokens) :], tokens[-1]
    is_first = len(seq.token_ids) - seq.num_prompt_tokens == len(tokens)
    if not is_first and reason is None and last.logprob is None:
        return SequenceOutput(request_id=seq.request_id, token_ids=token_ids)
    prompt_logprobs, seq.prompt_logprobs = seq.prompt_logprobs or None, []
    return SequenceOutput(
        request_id=seq.request_id,
        token_ids=token_ids,
        logprobs=None if last.logprob is None else [token.logprob for token in tokens if token.logprob],
        prompt_logprobs=prompt_logprobs,
        finish_reason=reason,
        stop_token_id=last.token_id if reason is FinishReason.STOP and not last.completes else None,
        num_cached_tokens=seq.num_cached_tokens if is_first else 0,
        scheduled_at=seq.scheduled_at if is_first else 0.0,
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
