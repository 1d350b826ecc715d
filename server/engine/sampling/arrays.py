"""What a sampler on a device needs to know of a batch: arrays with one entry for each row that samples.

They are made while the step before is still running, and know only what the host knows: a row's parameters, and
its random number, which depends on how many tokens came before and not on which (ADR 0006).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from server.engine.batch import ScheduledSequence
from server.engine.sampling.rng import uniforms
from server.engine.sampling.types import NOT_FINITE, NOTHING_LEFT, SampledToken, is_greedy

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

NOT_FINITE_ID = -1
"""Stands for the token of a row whose largest logit is NaN or infinite."""
NOTHING_LEFT_ID = -2
"""Stands for the token of a row all of whose logits are minus infinity."""


def sampling_arrays(sequences: Sequence[ScheduledSequence]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of `SAMPLING_ARRAYS` for the sequences that sample, in order; each of them samples once."""
    rows = [
        (0.0 if is_greedy(p) else p.temperature, p.top_p, p.min_p, p.top_k, p.seed, scheduled.num_generated)
        for scheduled in sequences
        if scheduled.samples
        for p in (scheduled.seq.params,)
    ]
    temperature, top_p, min_p, top_k, seed, index = zip(*rows, strict=True) if rows else ((),) * 6
    columns = {"temperature": temperature, "top_p": top_p, "min_p": min_p, "top_k": top_k}
    arrays = {name: np.array(column, dtype=SAMPLING_ARRAYS[name]) for name, column in columns.items()}
    return {**arrays, "uniform": uniforms(seed, index)}


def sampled_token(token_id: int) -> SampledToken:
    """What an id that a sampler on a device chose stands for."""
    if token_id >= 0:
        return SampledToken(token_id)
    return SampledToken(-1, error=NOTHING_LEFT if token_id == NOTHING_LEFT_ID else NOT_FINITE)
