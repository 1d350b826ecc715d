"""The matrix product of two tiles, for tensor cores and for Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b):
    """a @ b in fp32, of two tiles of one dtype; products of fp32 are exact, not tf32's."""
    if _IS_INTERPRETED:
        # It takes the bits of a bfloat16 for an integer. In fp32 the products are the same.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
