"""How fast this machine reads main memory: the floor of a decode step, which reads every weight once."""

from __future__ import annotations

import time

import torch

_BYTES = 1 << 30
_REPEATS = 7


def read_bandwidth() -> float:
    """Bytes per second at best, summing an array far larger than the caches on all cores."""
    values = torch.ones(_BYTES // 4, dtype=torch.float32)
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - started)
    return _BYTES / best
