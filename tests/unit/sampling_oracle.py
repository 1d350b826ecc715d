"""The sampler's definition, written for the reader and not for speed: whole rows, sorted, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from server.engine.sequence import Sequence
from server.engine.types import GenerateRequest, SamplingParams


def sequence(
    prompt: tuple[int, ...] = (1,), generated: tuple[int, ...] = (), seed: int = 0, **params: object
) -> Sequence:
    """A sequence that has generated `generated` so far."""
    sampling = SamplingParams(max_tokens=100, seed=seed, **params)  # type: ignore[arg-type]
    seq = Sequence.from_request(GenerateRequest(request_id="r", prompt_token_ids=list(prompt), params=sampling))
    seq.token_ids.extend(generated)
    return seq


def adjusted(logits: NDArray[np.float32], seq: Sequence) -> NDArray[np.float32]:
    """Bias, min_tokens and penalties, one token at a time."""
    params = seq.params
    result = logits.astype(np.float32)
    generated = seq.token_ids[seq.num_prompt_tokens :]
    for token in range(len(result)):
        x = result[token] + np.float32(params.logit_bias.get(token, 0.0))
        if len(generated) < params.min_tokens and token in params.stop_token_ids:
            x = np.float32(-np.inf)
        if token in seq.token_ids:
            penalty = np.float32(params.repetition_penalty)
            x = x / penalty if x > 0 else x * penalty
        if token in generated:
            x -= np.float32(params.presence_penalty + params.frequency_penalty * generated.count(token))
        result[token] = x
    return result


def survivors(
    logits: NDArray[np.float32], params: SamplingParams
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The ids that may be drawn, in the order in which they are drawn, and their weights."""
    ids = np.lexsort((np.arange(len(logits)), -logits))
    x = logits.astype(np.float64)[ids]
    weights = np.exp((x - x[0]) / params.temperature)
    if params.min_p > 0:
        keep = weights >= params.min_p
        ids, weights = ids[keep], weights[keep]
    if params.top_k > 0:
        ids, weights = ids[: params.top_k], weights[: params.top_k]
    if params.top_p < 1:
        count = int(np.searchsorted(weights.cumsum(), params.top_p * weights.sum(), side="left")) + 1
        ids, weights = ids[:count], weights[:count]
    if params.min_p == 0 and not 0 < params.top_k < len(logits) and params.top_p == 1:
        order = np.argsort(ids)  # nothing was truncated: vocabulary order
        ids, weights = ids[order], weights[order]
    return ids, weights


def token_at(logits: NDArray[np.float32], params: SamplingParams, u: float) -> int:
    """The token that the uniform number `u` draws."""
    ids, weights = survivors(logits, params)
    cumulative = weights.cumsum()
    return int(ids[np.searchsorted(cumulative, u * cumulative[-1], side="right")])


def probabilities(logits: NDArray[np.float32], params: SamplingParams) -> NDArray[np.float64]:
    """The target distribution over the vocabulary."""
    ids, weights = survivors(logits, params)
    result = np.zeros(len(logits))
    result[ids] = weights / weights.sum()
    return result
