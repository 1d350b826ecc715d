"""Products with matrices in 4 bits (`backend.int4`), whose codes are widened on their way to the tensor cores.

Laws:

- A row's result does not depend on the other rows.
- Sums over parts of the width are added up in one order: no atomic additions. In how many parts the width is
  cut follows from shapes alone, so a launch can be recorded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.engine.backend.int4 import GROUP, Int4Matrix
from server.engine.backend.triton.parts import Launch, add_up, num_parts

_GROUP = tl.constexpr(GROUP)
_HALF = tl.constexpr(GROUP // 2)
_FEW_ROWS = 32


@triton.jit(do_not_specialize=["num_rows", "part_groups"])
def multiply_int4(
    x,
    codes,
    scales,
    zeros,
    out,
    num_rows,
    out_width,
    num_groups,
    part_groups,
    IS_SPLIT: tl.constexpr,
    FEW_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (blocks of columns, blocks of rows, parts of the width).

    x: [num_rows, num_groups * 128]; codes, scales, zeros: as in `Int4Matrix`, whose outputs are a multiple of
    BLOCK_N. out: [num_rows, out_width], or with IS_SPLIT fp32 [parts, num_rows, out_width]. A part has
    part_groups groups. With FEW_ROWS, the matrix's outputs are the rows of what the tensor cores compute.
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = rows < num_rows
    half = tl.arange(0, _HALF)
    first = tl.program_id(2) * part_groups
    x_at = x + (rows[:, None].to(tl.int64) * num_groups + first) * _GROUP + half[None, :]
    at = first.to(tl.int64) * out_width + columns
    codes_at = codes + at[:, None] * _HALF + half[None, :]
    scales_at, zeros_at = scales + at, zeros + at
    product = tl.zeros([BLOCK_N, BLOCK_M] if FEW_ROWS else [BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, tl.minimum(part_groups, num_groups - first)):
        pair = tl.load(codes_at)
        zero = tl.load(zeros_at).to(tl.int8)[:, None]
        scale = tl.load(scales_at).to(tl.float32)
        # Differences of codes are exact in any dtype, so that only the sum is multiplied by the scale.
        lower = ((pair & 15).to(tl.int8) - zero).to(x.dtype.element_ty)
        upper = ((pair >> 4).to(tl.int8) - zero).to(x.dtype.element_ty)
        x_lower = tl.load(x_at, mask=exists[:, None], other=0.0)
        x_upper = tl.load(x_at + _HALF, mask=exists[:, None], other=0.0)
        if FEW_ROWS:
            of_group = tl.dot(lower, x_lower.T, input_precision="ieee")
            of_group = tl.dot(upper, x_upper.T, of_group, input_precision="ieee")
            product += of_group * scale[:, None]
        else:
            of_group = tl.dot(x_lower, lower.T, input_precision="ieee")
            of_group = tl.dot(x_upper, upper.T, of_group, input_precision="ieee")
            product += of_group * scale[None, :]
        x_at += _GROUP
        codes_at += out_width * _HALF
        scales_at += out_width
        zeros_at += out_width
    if FEW_ROWS:
        place = rows[None, :].to(tl.int64) * out_width + columns[:, None]
        mask = exists[None, :]
    else:
        place = rows[:, None].to(tl.int64) * out_width + columns[None, :]
        mask = exists[:, None]
    if IS_SPLIT:
        out += tl.program_id(2).to(tl.int64) * num_rows * out_width
    tl.store(out + place, product.to(out.dtype.element_ty), mask=mask)


class Int4Linear:
    """Launches the kernels for one device."""

    def __init__(self, num_multiprocessors: int) -> None:
        self._num_multiprocessors = num_multiprocessors

    def __call__(self, x: Tensor, weight: Int4Matrix) -> Tensor:
        """As `int4.multiply`, with sums in another order. Nothing waits for the device."""
        num_rows = x.shape[0]
        num_groups, out_width = weight.scales.shape
        launch = self.plan(num_rows, out_width, num_groups)
        out = x.new_empty((num_rows, out_width))
        is_split = launch.parts > 1
        target = x.new_empty((launch.parts, num_rows, out_width), dtype=torch.float32) if is_split else out
        multiply_int4[(out_width // launch.block_n, triton.cdiv(num_rows, launch.block_m), launch.parts)](
            x,
            weight.codes,
            weight.scales,
            weight.zeros,
            target,
            num_rows,
            out_width,
            num_groups,
            triton.cdiv(num_groups, launch.parts),
            IS_SPLIT=is_split,
            FEW_ROWS=launch.few_rows,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        if is_split:
            add_up(target, out)
        return out

    def plan(self, num_rows: int, out_width: int, num_groups: int) -> Launch:
        """For matrices whose outputs are a multiple of 64, as `int4.fits` has it."""
        few_rows = num_rows <= _FEW_ROWS
        if few_rows:
            block_m, block_n, num_warps, num_stages = 16 if num_rows <= 16 else 32, 64, 4, 4
        else:
            block_m = 64 if num_rows <= 64 else 128
            block_n = 128 if out_width % 128 == 0 else 64
            num_warps, num_stages = (4 if block_m == 64 else 8), 3
        num_programs = (out_width // block_n) * triton.cdiv(num_rows, block_m)
        parts = num_parts(num_programs, self._num_multiprocessors, most=num_groups // 4)
        return Launch(few_rows, block_m, block_n, GROUP, parts, num_warps, num_stages)
