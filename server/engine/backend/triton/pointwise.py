"""Norms, GeGLU, embedding and soft-cap: one pass over memory each, fp32 inside, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_GEGLU_BLOCK = 1024
_SOFTCAP_BLOCK = 2048


@triton.jit
def rms_norm_rows(
    x,
    update,
    residual,
    out,
    weight,
    width,
    eps,
    HAS_UPDATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row for each program: out = norm(x), or with HAS_UPDATE residual = x + update and out = norm(residual).

    x, update, residual, out: [T, width]; weight: fp32 [width]. x and residual may be the same memory.
    """
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row + column, mask=inside, other=0.0)
    if HAS_UPDATE:
        value = value.to(tl.float32) + tl.load(update + row + column, mask=inside, other=0.0).to(tl.float32)
        value = value.to(residual.dtype.element_ty)
        tl.store(residual + row + column, value, mask=inside)
    value = value.to(tl.float32)
    factor = 1.0 / tl.sqrt_rn(tl.sum(value * value, axis=0) / width + eps)
    normed = value * factor * tl.load(weight + column, mask=inside, other=0.0)
    tl.store(out + row + column, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def geglu_rows(gate_up, out, width, BLOCK: tl.constexpr):
    """Grid: (T, blocks of columns). gate_up: [T, 2 * width], out: [T, width].

    gelu(x) = x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x**3)), which is the tanh form (Hendrycks and
    Gimpel, arXiv 1606.08415), as 1 + tanh(u) = 2 * sigmoid(2u).
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    twice_u = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    result = gate * tl.sigmoid(twice_u) * up
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["token_ids"])
def embed_rows(table, token_ids, out, width, scale, BLOCK: tl.constexpr):
    """A row for each program. table: [vocabulary, width], token_ids: int32 [T], out: [T, width]."""
    row = tl.program_id(0)
    token = tl.load(token_ids + row).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(table + token * width + column, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(out + row.to(tl.int64) * width + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def softcap_rows(x, out, width, softcap, BLOCK: tl.constexpr):
    """Grid: (rows, blocks of columns). out, fp32, may not be x."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    value = softcap * (2.0 * tl.sigmoid(2.0 * value / softcap) - 1.0)
    tl.store(out + row * width + column, value, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [T, width]; weight: fp32 [width], the factor itself."""
    out = torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    rms_norm_rows[(x.shape[0],)](
        x, x, x, out, weight, x.shape[1], eps, HAS_UPDATE=False, BLOCK=block, num_warps=_warps(block)
    )
    return out


def add_rms_norm(residual: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(residual + update, its norm), of which the first overwrites residual."""
    out = torch.empty_like(residual)
    width = residual.shape[1]
    block = triton.next_power_of_2(width)
    rms_norm_rows[(residual.shape[0],)](
        residual,
        update,
        residual,
        out,
        weight,
        width,
        eps,
        HAS_UPDATE=True,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return residual, out


def geglu(gate_up: Tensor) -> Tensor:
    """[T, 2 * ffn] -> [T, ffn]"""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((num_rows, width))
    grid = (num_rows, triton.cdiv(width, _GEGLU_BLOCK))
    geglu_rows[grid](gate_up, out, width, BLOCK=_GEGLU_BLOCK, num_warps=4)
    return out


def embed(table: Tensor, token_ids: Tensor, scale: float) -> Tensor:
    """table: [vocabulary, hidden]; token_ids: int32 [T] -> [T, hidden] in the table's dtype"""
    out = table.new_empty((token_ids.shape[0], table.shape[1]))
    block = triton.next_power_of_2(table.shape[1])
    embed_rows[(token_ids.shape[0],)](
        table, token_ids, out, table.shape[1], scale, BLOCK=block, num_warps=_warps(block)
    )
    return out


def softcap(logits: Tensor, cap: float) -> Tensor:
    """[S, vocabulary] -> fp32 of the same shape"""
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    grid = (logits.shape[0], triton.cdiv(logits.shape[1], _SOFTCAP_BLOCK))
    softcap_rows[grid](logits, out, logits.shape[1], cap, BLOCK=_SOFTCAP_BLOCK, num_warps=4)
    return out


def _warps(block: int) -> int:
    return max(1, min(8, block // 512))
