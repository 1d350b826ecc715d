"""Matrices in 4 bits: how weights are rounded, and what a product with them means.

128 neighbouring weights of an output are a group, with a scale and a zero of their own: a weight is (code -
zero) times the scale, code and zero from 0 to 15. What is multiplied with them stays as it comes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 128
_LARGEST = 15
_SHRINKINGS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Parts of a group's range that are tried: what lies outside is cut off, and the rest rounded less."""
_QUANTIZED_AT_ONCE = 1 << 22
"""Elements: a matrix is worked on in blocks of rows, so that it is never there in fp32."""


@dataclass(frozen=True, slots=True)
class Int4Matrix:
    codes: Tensor
    """[groups, outputs, 64] uint8: the lower half of byte i is the group's weight i, the upper weight 64 + i.
    The bytes that a kernel needs at a time lie together so."""
    scales: Tensor
    """[groups, outputs] bfloat16"""
    zeros: Tensor
    """[groups, outputs] uint8"""

    def dequantize(self) -> Tensor:
        """[outputs, inputs] fp32, exactly what the codes stand for."""
        halves = torch.stack((self.codes & 15, self.codes >> 4), dim=2).float()
        weights = (halves - self.zeros[:, :, None, None]) * self.scales[:, :, None, None].float()
        return weights.flatten(2).transpose(0, 1).flatten(1)


def fits(weight: Tensor) -> bool:
    """Whether kernels multiply with it in 4 bits: with all of Gemma's matrices, but not with any."""
    return weight.shape[0] % 64 == 0 and weight.shape[1] % GROUP == 0


def quantize(weight: Tensor) -> Int4Matrix:
    """weight: [outputs, inputs], any float. A NaN or an infinity makes its group NaN."""
    outputs, groups = weight.shape[0], weight.shape[1] // GROUP
    device = weight.device
    codes = torch.empty((groups, outputs, GROUP // 2), dtype=torch.uint8, device=device)
    scales = torch.empty((groups, outputs), dtype=torch.bfloat16, device=device)
    zeros = torch.empty((groups, outputs), dtype=torch.uint8, device=device)
    step = max(1, _QUANTIZED_AT_ONCE // weight.shape[1])
    for first in range(0, outputs, step):
        rows = slice(first, first + step)
        values = weight[rows].view(-1, groups, GROUP).transpose(0, 1).float()
        code, scales[:, rows], zeros[:, rows] = _round(values)
        lower, upper = code.chunk(2, dim=2)
        codes[:, rows] = lower | upper << 4
    return Int4Matrix(codes, scales, zeros)


def _round(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """values: fp32 [groups, outputs, 128]. Returns codes, not packed, scales and zeros.

    Of the shrunken ranges, each group has the one with the least squared error.
    """
    low, high = values.amin(dim=2).clamp(max=0.0), values.amax(dim=2).clamp(min=0.0)
    best_error = torch.full_like(low, torch.inf)
    scales = torch.full_like(low, torch.nan)
    zeros = torch.zeros_like(low)
    for shrinking in _SHRINKINGS:
        scale = ((high - low) * (shrinking / _LARGEST)).bfloat16().float()
        scale = torch.where(scale == 0.0, 1.0, scale)
        zero = (-low * shrinking / scale).round_().clamp_(0, _LARGEST)
        error = (_restored(_codes(values, scale, zero), scale, zero) - values).square_().sum(dim=2)
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        scales = torch.where(is_better, scale, scales)
        zeros = torch.where(is_better, zero, zeros)
    codes = _codes(values, scales, zeros).nan_to_num_()
    return codes.to(torch.uint8), scales.bfloat16(), zeros.to(torch.uint8)


def _codes(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (values / scale[:, :, None]).add_(zero[:, :, None]).round_().clamp_(0, _LARGEST)


def _restored(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (codes - zero[:, :, None]).mul_(scale[:, :, None])


def multiply(x: Tensor, weight: Int4Matrix) -> Tensor:
    """x @ weight.T, summed in fp32 and rounded once to x's dtype. [rows, inputs] -> [rows, outputs]"""
    return (x.float() @ weight.dequantize().T).to(x.dtype)
