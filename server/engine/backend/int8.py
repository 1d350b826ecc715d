"""Matrices in 8 bits: how weights are rounded, and the multiplication that defines what they stand for.

Each output has a scale of its own, the largest of its weights over 127, and its weights are rounded to the
nearest multiple of it: symmetric, with no zero point. A weight is its integer times its output's scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST = 127
# Elements of a block: matrices are worked on a block of rows at a time, in fp32 that stays in the cache.
_QUANTIZED_AT_ONCE = 1 << 15
_MULTIPLIED_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    integers: Tensor
    """[outputs, inputs] int8, between -127 and 127."""
    scales: Tensor
    """[outputs] fp32"""


def quantize(weight: Tensor) -> QuantizedMatrix:
    """weight: [outputs, inputs], any float. A NaN or an infinity makes its output's scale NaN or infinite."""
    integers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    step = max(1, _QUANTIZED_AT_ONCE // weight.shape[1])
    for first in range(0, weight.shape[0], step):
        block = weight[first : first + step].float()
        scale = block.abs().amax(dim=1) / _LARGEST
        scales[first : first + step] = scale
        multiples = block / torch.where(scale > 0, scale, 1.0)[:, None]
        # The bound matters where the scale is so small that it is itself a rounded number of few bits.
        integers[first : first + step] = multiples.round_().clamp_(-_LARGEST, _LARGEST)
    return QuantizedMatrix(integers, scales)


def rows(matrix: QuantizedMatrix, indices: Tensor) -> Tensor:
    """[len(indices), inputs] fp32"""
    return matrix.integers[indices] * matrix.scales[indices, None]


def multiply(x: Tensor, weight: QuantizedMatrix) -> Tensor:
    """x @ weight.T, summed in fp32 and rounded once to x's dtype. [rows, inputs] -> [rows, outputs]"""
    wide = x.float()
    outputs, inputs = weight.integers.shape
    out = torch.empty(x.shape[0], outputs, device=x.device)
    step = max(1, _MULTIPLIED_AT_ONCE // inputs)
    for first in range(0, outputs, step):
        block = weight.integers[first : first + step].float()
        torch.mm(wide, block.T, out=out[:, first : first + step])
    return out.mul_(weight.scales).to(x.dtype)
