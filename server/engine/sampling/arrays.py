"""What a sampler on a device needs to know of a batch: arrays with one entry for each row that samples.

They are made while the step before is still running, and know only what the host knows: a row's parameters, and
its random number, which depends on how many tokens came before and not on which (ADR 0006).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from server.engine.sampling.rng import stream_of, uniforms
from server.engine.sampling.types import NOT_FINITE, NOTHING_LEFT, SampledToken, is_greedy
from server.engine.types import SamplingParams

if TYPE_CHECKING:
    from server.engine.batch import ScheduledSequence

SAMPLING_ARRAYS: dict[str, np.dtype[Any]] = {
    "temperature": np.dtype(np.float64),
    "top_p": np.dtype(np.float64),
    "min_p": np.dtype(np.float64),
    "uniform": np.dtype(np.float64),
    "top_k": np.dtype(np.int32),
}
"""Their names and types. Zeros all through are a greedy row.

temperature: 0 where the likeliest token is taken, whatever the others say. top_p: 1 is off. min_p, top_k: 0 is
off. uniform: in [0, 1). In the precision of the host's sampler, so that cuts fall where its cuts do.
"""

_RECORD = np.dtype(
    [
        *((name, SAMPLING_ARRAYS[name]) for name in ("temperature", "top_p", "min_p", "top_k")),
        ("num_prompt_tokens", np.int32),
        ("stream", np.uint64),
    ]
)
_RECORD_FORMAT = struct.Struct("=dddiiQ")

NOT_FINITE_ID = -1
"""Stands for the token of a row whose largest logit is NaN or infinite."""
NOTHING_LEFT_ID = -2
"""Stands for the token of a row all of whose logits are minus infinity."""


def sampling_record(params: SamplingParams, num_prompt_tokens: int) -> bytes:
    """What of a sequence's rows is the same at each step, so that a batch's are put together by one copy."""
    temperature = 0.0 if is_greedy(params) else params.temperature
    return _RECORD_FORMAT.pack(
        temperature, params.top_p, params.min_p, params.top_k, num_prompt_tokens, stream_of(params.seed)
    )


def sampling_arrays(sequences: Sequence[ScheduledSequence]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of `SAMPLING_ARRAYS` for the sequences that sample, in order; each of them samples once."""
    sampling = [scheduled for scheduled in sequences if scheduled.samples]
    records = np.frombuffer(b"".join([scheduled.seq.sampling_record for scheduled in sampling]), dtype=_RECORD)
    # A row that samples is the last one of all tokens, those in flight included.
    num_tokens = np.array([scheduled.start + scheduled.num_new for scheduled in sampling], dtype=np.int64)
    arrays = {name: records[name] for name in SAMPLING_ARRAYS if name != "uniform"}
    return {**arrays, "uniform": uniforms(records["stream"], num_tokens - records["num_prompt_tokens"])}


def sampled_tokens(token_ids: Iterable[int]) -> list[SampledToken]:
    """What ids that a sampler on a device chose stand for."""
    return [SampledToken(id_) if id_ >= 0 else _no_token(id_) for id_ in token_ids]


def _no_token(token_id: int) -> SampledToken:
    return SampledToken(-1, error=NOTHING_LEFT if token_id == NOTHING_LEFT_ID else NOT_FINITE)
