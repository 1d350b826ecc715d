"""How kernels find the scale of what is rounded to e4m3: as `backend.fp8` does."""

from __future__ import annotations

import triton
import triton.language as tl

from server.engine.backend.fp8 import LARGEST

_LARGEST = tl.constexpr(LARGEST)


@triton.jit
def scale_of(largest):
    """By which the codes are multiplied, such that the largest magnitude becomes that of e4m3."""
    return tl.where(largest > 0.0, largest / _LARGEST, 1.0)
