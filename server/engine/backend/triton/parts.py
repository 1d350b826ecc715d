"""Into how many parts the work of a program is dealt out where a GPU would have too few programs, and how what
the parts of a product give is added up."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_COLUMNS_ADDED = 512


def num_parts(num_programs: int, num_multiprocessors: int, most: int) -> int:
    """A power of two, such that there are about two programs for each multiprocessor. most: at least 1 is
    returned all the same."""
    wanted = 2 * num_multiprocessors // num_programs
    return 1 << max(0, min(wanted, most).bit_length() - 1)


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def add_parts(parts, x_scales, weight_scales, out, num_rows, out_width, num_parts, BLOCK: tl.constexpr):
    """out: [num_rows, out_width], the sum of fp32 parts [num_parts, num_rows, out_width] in their order.

    x_scales, weight_scales: fp32 [num_rows], [out_width], by which the sum is multiplied, or None both.
    Grid: (num_rows, blocks of columns).
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < out_width
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(num_parts):
        place = (part * num_rows + row) * out_width + column
        total += tl.load(parts + place, mask=inside, other=0.0)
    if x_scales is not None:
        total *= tl.load(x_scales + row) * tl.load(weight_scales + column, mask=inside, other=0.0)
    tl.store(out + row * out_width + column, total.to(out.dtype.element_ty), mask=inside)


def add_up(
    parts: Tensor, out: Tensor, x_scales: Tensor | None = None, weight_scales: Tensor | None = None
) -> None:
    """Launches `add_parts`."""
    count, num_rows, out_width = parts.shape
    add_parts[(num_rows, triton.cdiv(out_width, _COLUMNS_ADDED))](
        parts,
        x_scales,
        weight_scales,
        out,
        num_rows,
        out_width,
        count,
        BLOCK=_COLUMNS_ADDED,
        num_warps=4,
    )
