"""Large arrays in main memory, straight from the system."""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def zeros_on_demand(num_bytes: int) -> Bytes:
    """Zeros that take no memory until they are written (numpy asks the system for zeroed pages)."""
    return np.zeros(num_bytes, dtype=np.uint8)


def huge_pages(num_bytes: int) -> Bytes:
    """Zeros for what is read whole at every step: with 4 KiB pages, misses of the TLB slow the reading down."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)
