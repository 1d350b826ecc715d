"""Matrices in 4 bits: how weights are rounded, and what a product with them means.

32 neighbouring weights of an output are a group, with a scale and a zero of their own: a weight is (code -
zero) times the scale, code and zero from 0 to 15, and then rounded to the dtype of what it is multiplied with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32
BLOCK = 128
"""Inputs whose codes are kept together, four groups."""
_LARGEST = 15
_MIDDLE = 8
_QUANTIZED_AT_ONCE = 1 << 22
"""Elements: a matrix is worked on in blocks of rows, so that it is never there in fp32."""


@dataclass(frozen=True, slots=True)
class Int4Matrix:
    codes: Tensor
    """[blocks, outputs, 16] int32: bits 4 i to 4 i + 3 of word j are the code of weight 16 i + j."""
    scaling: Tensor
    """[blocks, 4, outputs] int32: a group's scale, a bfloat16, in the upper half, its zero in the lower."""

    def dequantize(self) -> Tensor:
        """[outputs, inputs] fp32, exactly what the codes stand for."""
        pairs = self.codes[:, :, :, None].view(torch.uint8).transpose(2, 3)
        codes = torch.stack((pairs & 15, pairs >> 4), dim=3).flatten(2)
        zeros, scales = self.scaling[..., None].view(torch.int16).permute(3, 0, 2, 1)
        groups = codes.unflatten(2, (-1, GROUP)) - zeros[..., None].float()
        weights: Tensor = groups * scales.contiguous().view(torch.bfloat16)[..., None].float()
        return weights.flatten(2).transpose(0, 1).flatten(1)


def fits(shape: Sequence[int]) -> bool:
    """Whether kernels multiply with such a matrix in 4 bits: with all of Gemma's, but not with any part."""
    return shape[0] % 64 == 0 and shape[1] % BLOCK == 0


def quantize(weight: Tensor) -> Int4Matrix:
    """weight: [outputs, inputs], any float. A NaN or an infinity makes its group NaN."""
    outputs, blocks = weight.shape[0], weight.shape[1] // BLOCK
    codes = torch.empty((blocks, outputs, 16), dtype=torch.int32, device=weight.device)
    scaling = torch.empty((blocks, 4, outputs), dtype=torch.int32, device=weight.device)
    step = max(1, _QUANTIZED_AT_ONCE // weight.shape[1])
    for first in range(0, outputs, step):
        rows = slice(first, first + step)
        code, scale, zero = _round(weight[rows].float().unflatten(1, (-1, GROUP)))
        lower, upper = code.view(-1, blocks, 4, 2, 16).unbind(3)
        words = (lower | upper << 4).transpose(2, 3).contiguous().view(torch.int32)
        codes[:, rows] = words.squeeze(3).transpose(0, 1)
        halves = torch.stack((zero, scale.view(torch.int16)), dim=2)
        scaling[:, :, rows] = halves.view(torch.int32).view(-1, blocks, 4).permute(1, 2, 0)
    return Int4Matrix(codes, scaling)


def _round(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """values: fp32 [rows, groups, 32]. Returns codes (uint8), scales (bfloat16) and zeros (int16).

    Of two grids, each group has the one that leaves the smaller squared error: one from its smallest weight to
    its largest, and one from -8 to 7 with -8 the largest of either sign. The latter is llama.cpp's Q4_0, so
    that files in it are not rounded again.
    """
    low, high = values.amin(dim=2).clamp(max=0.0), values.amax(dim=2).clamp(min=0.0)
    of_range = _scale((high - low) / _LARGEST)
    of_largest = _scale(torch.where(high > -low, high, low) / -_MIDDLE)
    zero = (-low / of_range).round_().clamp_(0, _LARGEST)
    middle = torch.full_like(zero, _MIDDLE)
    # Where an error is NaN, so is the range's scale.
    takes_largest = _error(values, of_largest, middle) < _error(values, of_range, zero)
    scale = torch.where(takes_largest, of_largest, of_range)
    zero = torch.where(takes_largest, middle, zero)
    codes = _codes(values, scale, zero)
    return codes.nan_to_num_().to(torch.uint8), scale.bfloat16(), zero.nan_to_num_().to(torch.int16)


def _scale(exact: Tensor) -> Tensor:
    scale = exact.bfloat16().float()
    return torch.where(scale == 0.0, 1.0, scale)


def _codes(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (values / scale[:, :, None]).add_(zero[:, :, None]).round_().clamp_(0, _LARGEST)


def _error(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    codes = _codes(values, scale, zero)
    return codes.sub_(zero[:, :, None]).mul_(scale[:, :, None]).sub_(values).square_().sum(dim=2)


def multiply(x: Tensor, weight: Int4Matrix) -> Tensor:
    """x @ weight.T, summed in fp32 and rounded once to x's dtype. [rows, inputs] -> [rows, outputs]"""
    return (x.float() @ weight.dequantize().to(x.dtype).float().T).to(x.dtype)
