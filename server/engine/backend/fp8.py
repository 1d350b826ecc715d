"""8 bits of floating point (e4m3): how numbers are rounded to them, and what a product of such matrices means.

Each output of a matrix has a scale of its own, the largest of its weights over 448, the largest of e4m3; so has
each row of what is multiplied with it, and each head of a key or value that is stored, found when it comes. A
number is its code times its scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CODES = torch.float8_e4m3fn
LARGEST = 448.0
_QUANTIZED_AT_ONCE = 1 << 22
"""Elements: a matrix is worked on in blocks of rows, so that it is never there in fp32."""


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    codes: Tensor
    """[outputs, inputs] float8_e4m3fn"""
    scales: Tensor
    """[outputs] fp32"""


def fits(shape: Sequence[int]) -> bool:
    """Whether kernels multiply with such a matrix in 8 bits: with all of Gemma's, but not with any part."""
    return shape[0] % 64 == 0 and shape[1] % 64 == 0


def quantize(weight: Tensor) -> Fp8Matrix:
    """weight: [outputs, inputs], any float. A NaN or an infinity makes its output NaN."""
    codes = torch.empty(weight.shape, dtype=CODES, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    step = max(1, _QUANTIZED_AT_ONCE // weight.shape[1])
    for first in range(0, weight.shape[0], step):
        codes[first : first + step], scales[first : first + step] = quantize_rows(weight[first : first + step])
    return Fp8Matrix(codes, scales)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., width] of any float -> its codes, and fp32 [...] by which they are multiplied."""
    wide = x.float()
    largest = wide.abs().amax(dim=-1)
    scales = torch.where(largest > 0, largest / LARGEST, 1.0)
    return (wide / scales[..., None]).to(CODES), scales


def multiply(x: Tensor, weight: Fp8Matrix) -> Tensor:
    """x @ weight.T, of codes, summed in fp32, scaled, and rounded once to x's dtype. [rows, outputs]"""
    codes, scales = quantize_rows(x)
    # Products of two e4m3 numbers are exact in fp32.
    product = codes.float() @ weight.codes.float().T
    return (product * scales[:, None] * weight.scales).to(x.dtype)
