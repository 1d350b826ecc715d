"""Products in 8 bits (`backend.fp8`): activations are rounded row by row, then multiplied with an e4m3 matrix.

Laws:

- A row's result does not depend on the other rows.
- Sums over parts of the width are added up in one order: no atomic additions. In how many parts the width is
  cut follows from shapes alone, so a launch can be recorded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.engine.backend.fp8 import CODES, Fp8Matrix
from server.engine.backend.triton.e4m3 import scale_of
from server.engine.backend.triton.parts import add_up, num_parts

_FEW_ROWS = 32


@triton.jit
def quantize_rows(x, codes, scales, width, BLOCK: tl.constexpr):
    """A row for each program. x, codes: [rows, width]; scales: fp32 [rows]."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(value), axis=0))
    tl.store(scales + row, scale)
    tl.store(codes + start + column, (value / scale).to(codes.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "part_blocks"])
def multiply_codes(
    x,
    x_scales,
    weight,
    weight_scales,
    out,
    num_rows,
    out_width,
    width,
    part_blocks,
    IS_SPLIT: tl.constexpr,
    FEW_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (blocks of columns, blocks of rows, parts of the width).

    x: codes [num_rows, width]; weight: codes [out_width, width]; scales: fp32 [num_rows], [out_width]. out:
    [num_rows, out_width], or with IS_SPLIT fp32 [parts, num_rows, out_width], not scaled. A part has
    part_blocks blocks of the width, which is a multiple of BLOCK_K, as out_width is one of BLOCK_N. With
    FEW_ROWS, the matrix's outputs are the rows of what the tensor cores compute, of which they want more than x
    has.
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = rows < num_rows
    first = tl.program_id(2) * part_blocks * BLOCK_K
    places = first + tl.arange(0, BLOCK_K)
    x_at = x + rows[:, None].to(tl.int64) * width + places[None, :]
    weight_at = weight + columns[:, None].to(tl.int64) * width + places[None, :]
    product = tl.zeros([BLOCK_N, BLOCK_M] if FEW_ROWS else [BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, tl.minimum(part_blocks * BLOCK_K, width - first), BLOCK_K):
        value = tl.load(x_at, mask=exists[:, None], other=0.0)
        matrix = tl.load(weight_at)
        product = tl.dot(matrix, value.T, product) if FEW_ROWS else tl.dot(value, matrix.T, product)
        x_at += BLOCK_K
        weight_at += BLOCK_K
    if FEW_ROWS:
        place = rows[None, :].to(tl.int64) * out_width + columns[:, None]
        mask = exists[None, :]
        x_scale = tl.load(x_scales + rows, mask=exists, other=0.0)[None, :]
        weight_scale = tl.load(weight_scales + columns)[:, None]
    else:
        place = rows[:, None].to(tl.int64) * out_width + columns[None, :]
        mask = exists[:, None]
        x_scale = tl.load(x_scales + rows, mask=exists, other=0.0)[:, None]
        weight_scale = tl.load(weight_scales + columns)[None, :]
    if IS_SPLIT:
        part = tl.program_id(2).to(tl.int64) * num_rows * out_width
        tl.store(out + part + place, product, mask=mask)
    else:
        tl.store(out + place, (product * x_scale * weight_scale).to(out.dtype.element_ty), mask=mask)


class Launch(NamedTuple):
    """How `multiply_codes` is cut up."""

    few_rows: bool
    block_m: int
    block_n: int
    block_k: int
    parts: int
    num_warps: int
    num_stages: int


class Fp8Linear:
    """Launches the kernels for one device."""

    def __init__(self, num_multiprocessors: int) -> None:
        self._num_multiprocessors = num_multiprocessors

    def __call__(self, x: Tensor, weight: Fp8Matrix) -> Tensor:
        """As `fp8.multiply`, with sums in another order. Nothing waits for the device."""
        num_rows, width = x.shape
        out_width = weight.codes.shape[0]
        codes = torch.empty_like(x, dtype=CODES)
        scales = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(width)
        quantize_rows[(num_rows,)](
            x, codes, scales, width, BLOCK=block, num_warps=max(1, min(16, block // 512))
        )
        launch = self.plan(num_rows, out_width, width)
        out = x.new_empty((num_rows, out_width))
        is_split = launch.parts > 1
        target = x.new_empty((launch.parts, num_rows, out_width), dtype=torch.float32) if is_split else out
        grid = (out_width // launch.block_n, triton.cdiv(num_rows, launch.block_m), launch.parts)
        multiply_codes[grid](
            codes,
            scales,
            weight.codes,
            weight.scales,
            target,
            num_rows,
            out_width,
            width,
            triton.cdiv(width // launch.block_k, launch.parts),
            IS_SPLIT=is_split,
            FEW_ROWS=launch.few_rows,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            BLOCK_K=launch.block_k,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        if is_split:
            add_up(target, out, scales, weight.scales)
        return out

    def plan(self, num_rows: int, out_width: int, width: int) -> Launch:
        """For matrices whose sides are multiples of 64, as `fp8.fits` has it."""
        few_rows = num_rows <= _FEW_ROWS
        block_k = 128 if width % 128 == 0 else 64
        if few_rows:
            block_m, block_n, num_warps, num_stages = 16 if num_rows <= 16 else 32, 64, 4, 4
        else:
            block_m = 64 if num_rows <= 64 else 128
            block_n = 128 if out_width % 128 == 0 else 64
            num_warps, num_stages = (4 if block_m == 64 else 8), 3
        num_programs = (out_width // block_n) * triton.cdiv(num_rows, block_m)
        parts = num_parts(num_programs, self._num_multiprocessors, most=width // (4 * block_k))
        return Launch(few_rows, block_m, block_n, block_k, parts, num_warps, num_stages)
