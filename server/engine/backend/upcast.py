"""Multiplication with bf16 weights on CPUs that have no bf16 instructions.

There, PyTorch multiplies one row by a bf16 matrix at the speed of memory, but several rows far below the speed
of fp32: with AVX2 on two cores, [262144, 640] times 8 rows takes 155 ms in bf16 against 116 ms for converting
the matrix and multiplying in fp32, times 32 rows 554 against 185 ms; [4096, 640] times 128 rows 38.7 against
8.5 ms. A freshly allocated fp32 copy of the whole matrix would lose that again to page faults, so the matrix is
converted a block at a time into one buffer that stays in the cache.

Laws:

- A row's result does not depend on the other rows, nor on their number within the same of two ranges: up to
  `_MAX_SINGLE_ROWS` rows are multiplied one by one, more are padded to a multiple of `_ROW_TILE`. (MKL sums in
  another order where rows are left over from its tiles, which rounds to another bf16 now and then.)
- The result is rounded once, as that of a bf16 product with fp32 accumulation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_BYTES = 8 << 20
_MAX_SINGLE_ROWS = 5
"""Up to here, one product per row costs less than converting the matrix."""
_ROW_TILE = 8


class UpcastMatmul:
    """Owns the conversion buffer; one per back end. Not thread-safe."""

    def __init__(self) -> None:
        self._buffer = torch.empty(_BLOCK_BYTES // 4, dtype=torch.float32)

    @staticmethod
    def is_needed(device: torch.device, dtype: torch.dtype) -> bool:
        # With AVX-512, oneDNN multiplies bf16 itself.
        lacks_bf16 = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
        return device.type == "cpu" and dtype is torch.bfloat16 and lacks_bf16

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """x @ weight.T. [rows, in], [out, in] -> [rows, out], all bf16"""
        num_rows = x.shape[0]
        if num_rows <= _MAX_SINGLE_ROWS:
            return torch.cat([F.linear(row, weight) for row in x.split(1)])
        padded = torch.zeros(-(-num_rows // _ROW_TILE) * _ROW_TILE, x.shape[1])
        padded[:num_rows] = x
        out = torch.empty(padded.shape[0], weight.shape[0])
        for first in range(0, weight.shape[0], self._rows_per_block(weight)):
            part = weight[first : first + self._rows_per_block(weight)]
            converted = self._buffer[: part.numel()].view(part.shape).copy_(part)
            torch.mm(padded, converted.T, out=out[:, first : first + part.shape[0]])
        return out[:num_rows].to(x.dtype)

    def _rows_per_block(self, weight: Tensor) -> int:
        width = weight.shape[1]
        if self._buffer.numel() < width:
            self._buffer = torch.empty(width)
        return self._buffer.numel() // width
