"""What sampling on a device needs to know of a batch, as arrays with one entry for each row that samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from server.engine.batch import ScheduledSequence
from server.engine.sampling.rng import uniform
from server.engine.sampling.types import is_greedy

SAMPLING_ARRAYS: dict[str, np.dtype[Any]] = {
    "temperature": np.dtype(np.float32),
    "top_k": np.dtype(np.int32),
    "top_p": np.dtype(np.float32),
    "min_p": np.dtype(np.float32),
    "uniform": np.dtype(np.float64),
}
"""Their names and types. All zeros are a greedy row.

temperature: 0 where the likeliest token is taken. top_k: 0 where it is off. uniform: of ADR 0006, in [0, 1).
"""


def sampling_arrays(sequences: Sequence[ScheduledSequence]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of `SAMPLING_ARRAYS` for the sequences that sample, in order; each of them samples once."""
    rows = []
    for scheduled in sequences:
        if scheduled.samples:
            params = scheduled.seq.params
            temperature = 0.0 if is_greedy(params) else params.temperature
            number = uniform(params.seed, scheduled.num_generated)
            rows.append((temperature, params.top_k, params.top_p, params.min_p, number))
    columns = zip(*rows, strict=True) if rows else ([] for _ in SAMPLING_ARRAYS)
    return {
        name: np.array(column, dtype=dtype)
        for (name, dtype), column in zip(SAMPLING_ARRAYS.items(), columns, strict=True)
    }
