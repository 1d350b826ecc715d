"""Products with matrices in 4 bits (`backend.int4`), whose codes are widened on their way to the tensor cores.

Laws:

- A row's result does not depend on the other rows.
- Sums over parts of the width are added up in one order: no atomic additions. In how many parts the width is
  cut follows from shapes alone, so a launch can be recorded.

The matrix's outputs are the rows of what the tensor cores compute, so that they take the weights from
registers, in which they are widened.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.engine.backend.int4 import BLOCK, Int4Matrix
from server.engine.backend.triton.parts import add_up, num_parts

_BLOCK = tl.constexpr(BLOCK)
_WORDS = tl.constexpr(BLOCK // 8)


@triton.jit
def _weights(words, scale, zero, BIT: tl.constexpr):
    """The weights whose codes begin at that bit, in fp32."""
    # Under the exponent of 2**(23 - BIT), a code at this bit of the fraction adds itself. From bit 8 on, and
    # with a scale of 8 bits, both products are exact, so the compiler may fuse them or not.
    bits = words & (15 << BIT) | (150 - BIT << 23)
    return bits.to(tl.float32, bitcast=True) * scale - ((1 << 23 - BIT) + zero) * scale


@triton.jit(do_not_specialize=["num_rows", "part_blocks"])
def multiply_int4(
    x,
    codes,
    scaling,
    out,
    num_rows,
    out_width,
    num_blocks,
    part_blocks,
    IS_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (blocks of outputs, blocks of rows, parts of the width).

    x: [num_rows, num_blocks * 128]; codes, scaling: as in `Int4Matrix`, with a multiple of BLOCK_N outputs.
    out: [num_rows, out_width], or with IS_SPLIT fp32 [parts, num_rows, out_width]. A part has part_blocks
    blocks.
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = rows < num_rows
    word = tl.arange(0, _WORDS)
    first = tl.program_id(2) * part_blocks
    x_at = x + (rows[:, None].to(tl.int64) * num_blocks + first) * _BLOCK + word[None, :]
    codes_at = codes + (first.to(tl.int64) * out_width + columns[:, None]) * _WORDS + word[None, :]
    scaling_at = scaling + first.to(tl.int64) * 4 * out_width + columns[:, None]
    product = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for _ in range(0, tl.minimum(part_blocks, num_blocks - first)):
        words = tl.load(codes_at)
        for group in tl.static_range(4):
            both = tl.load(scaling_at + group * out_width)
            scale = (both & -65536).to(tl.float32, bitcast=True)
            zero = (both & 15).to(tl.float32)
            # The group's codes, at bits 8 and 12.
            shifted = words << 8 if group == 0 else words >> 8 * group - 8
            lower = _weights(shifted, scale, zero, 8).to(x.dtype.element_ty)
            upper = _weights(shifted, scale, zero, 12).to(x.dtype.element_ty)
            x_lower = tl.load(x_at + 2 * group * _WORDS, mask=exists[:, None], other=0.0)
            x_upper = tl.load(x_at + (2 * group + 1) * _WORDS, mask=exists[:, None], other=0.0)
            product = tl.dot(lower, x_lower.T, product, input_precision="ieee")
            product = tl.dot(upper, x_upper.T, product, input_precision="ieee")
        x_at += _BLOCK
        codes_at += out_width * _WORDS
        scaling_at += out_width * 4
    if IS_SPLIT:
        out += tl.program_id(2).to(tl.int64) * num_rows * out_width
    place = rows[None, :].to(tl.int64) * out_width + columns[:, None]
    tl.store(out + place, product.to(out.dtype.element_ty), mask=exists[None, :])


class Launch(NamedTuple):
    """How `multiply_int4` is cut up."""

    block_m: int
    block_n: int
    parts: int
    num_warps: int
    num_stages: int


class Int4Linear:
    """Launches the kernels for one device."""

    def __init__(self, num_multiprocessors: int) -> None:
        self._num_multiprocessors = num_multiprocessors

    def __call__(self, x: Tensor, weight: Int4Matrix) -> Tensor:
        """As `int4.multiply`, with sums in another order. Nothing waits for the device."""
        num_rows = x.shape[0]
        num_blocks, out_width, _ = weight.codes.shape
        launch = self.plan(num_rows, out_width, num_blocks)
        out = x.new_empty((num_rows, out_width))
        is_split = launch.parts > 1
        target = x.new_empty((launch.parts, num_rows, out_width), dtype=torch.float32) if is_split else out
        multiply_int4[(out_width // launch.block_n, triton.cdiv(num_rows, launch.block_m), launch.parts)](
            x,
            weight.codes,
            weight.scaling,
            target,
            num_rows,
            out_width,
            num_blocks,
            triton.cdiv(num_blocks, launch.parts),
            IS_SPLIT=is_split,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        if is_split:
            add_up(target, out)
        return out

    def plan(self, num_rows: int, out_width: int, num_blocks: int) -> Launch:
        """For matrices whose outputs are a multiple of 64, as `int4.fits` has it."""
        block_m = min(128, max(16, triton.next_power_of_2(num_rows)))
        block_n = 128 if out_width % 128 == 0 else 64
        num_warps, num_stages = (4, 4) if block_m <= 32 else (8, 3) if block_m == 128 else (4, 3)
        num_programs = (out_width // block_n) * triton.cdiv(num_rows, block_m)
        parts = num_parts(num_programs, self._num_multiprocessors, most=num_blocks // 4)
        return Launch(block_m, block_n, parts, num_warps, num_stages)
