"""Decodes the quantised tensors of a GGUF file.

The formulas and bit layouts are those of dequantize_row_* in llama.cpp's ggml-quants.c. In float32 the results
are bit for bit those of the `gguf` package's reference: the same operations in the same order, never fused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from server.engine.models.gguf import GGMLType, GGUFFile, GGUFTensor

_SLICE_ELEMENTS = 1 << 19
"""Elements that a thread decodes at a time: the intermediate results stay in the processor's cache."""


def read_tensor(file: GGUFFile, tensor: GGUFTensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Decode one tensor to a new one of shape `tensor.shape`, of `dtype`, on `device`.

    Decoded on the CPU in slices of rows, as many at a time as torch has threads, so that the memory needed
    beyond the result is a few MB for each. Values are computed in float32 and rounded once.
    """
    row_elements = tensor.shape[-1]
    result = torch.empty((tensor.num_rows, row_elements), dtype=dtype, device=device)
    rows_per_slice = max(1, _SLICE_ELEMENTS // row_elements)

    def decode_slice(row: int) -> None:
        target = result[row : row + rows_per_slice]
        buffer = bytearray(len(target) * tensor.row_bytes)
        file.read_rows_into(tensor, row, memoryview(buffer))
        encoded = torch.frombuffer(buffer, dtype=torch.uint8)
        target.copy_(decode_blocks(encoded, tensor.type).view(len(target), row_elements))

    with _independent_threads() as pool:
        for _ in pool.map(decode_slice, range(0, tensor.num_rows, rows_per_slice)):
            pass
    return result.view(tensor.shape)


@contextmanager
def _independent_threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that never wait for each other: in each of them torch's operations run on that thread alone.

    torch would split every operation among its threads and join them again. Where the processors have other
    work too, one of them is always late: on two busy cores that made the decoding 20 times slower.
    """
    num_threads = torch.get_num_threads()
    # A new thread takes over the number that is set when it first uses torch.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(num_threads) as pool:
            yield pool
    finally:
        torch.set_num_threads(num_threads)


def decode_blocks(encoded: Tensor, kind: GGMLType) -> Tensor:
    """uint8 [number of blocks * kind.block_bytes] -> [number of blocks, kind.block_size], float32.

    The unquantised types are returned as they are stored: F16 as float16, BF16 as bfloat16.
    """
    return _DECODERS[kind](encoded.view(-1, kind.block_bytes))


def _stored_as(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def view(blocks: Tensor) -> Tensor:
        return blocks.view(dtype)

    return view


def _q4_0(blocks: Tensor) -> Tensor:
    """2 bytes d, 16 bytes of nibbles: d * (q - 8)"""
    d, nibbles = _half(blocks, 0), _nibbles(blocks[:, 2:])
    return _floats(nibbles.view(-1, 32).view(torch.int8) - 8).mul_(d)


def _q4_1(blocks: Tensor) -> Tensor:
    """2 bytes d, 2 bytes m, 16 bytes of nibbles: d * q + m"""
    d, m, nibbles = _half(blocks, 0), _half(blocks, 2), _nibbles(blocks[:, 4:])
    return _floats(nibbles.view(-1, 32)).mul_(d).add_(m)


def _q5_0(blocks: Tensor) -> Tensor:
    """2 bytes d, 4 bytes of fifth bits, 16 bytes of nibbles: d * (q - 16)"""
    d, nibbles = _half(blocks, 0), _nibbles(blocks[:, 6:])
    q = nibbles.view(-1, 32).bitwise_or_(_fifth_bits(blocks[:, 2:6]))
    return _floats(q.view(torch.int8) - 16).mul_(d)


def _q5_1(blocks: Tensor) -> Tensor:
    """2 bytes d, 2 bytes m, 4 bytes of fifth bits, 16 bytes of nibbles: d * q + m"""
    d, m, nibbles = _half(blocks, 0), _half(blocks, 2), _nibbles(blocks[:, 8:])
    q = nibbles.view(-1, 32).bitwise_or_(_fifth_bits(blocks[:, 4:8]))
    return _floats(q).mul_(d).add_(m)


def _q8_0(blocks: Tensor) -> Tensor:
    """2 bytes d, 32 signed bytes: d * q"""
    return _floats(blocks[:, 2:].view(torch.int8)).mul_(_half(blocks, 0))


# The K types: 256 elements in sub-blocks of 16 or 32, each with its own small scale, which the half-precision
# numbers d (and dmin) scale in turn.


def _q2_k(blocks: Tensor) -> Tensor:
    """16 bytes (4 bits scale, 4 bits minimum), 64 bytes of 2-bit q, d, dmin: d * scale * q - dmin * minimum"""
    scales, packed = blocks[:, :16], blocks[:, 16:80].view(-1, 2, 32)
    scale = _floats(scales & 15).mul_(_half(blocks, 80)).unsqueeze(-1)
    minimum = _floats(scales >> 4).mul_(_half(blocks, 82)).unsqueeze(-1)
    q = _crumbs(packed).view(-1, 16, 16)
    return _floats(q).mul_(scale).sub_(minimum).view(-1, 256)


def _q3_k(blocks: Tensor) -> Tensor:
    """32 bytes of third bits, 64 bytes of 2-bit q, 12 bytes of 6-bit scales, d: d * (scale - 32) * (q - 4)"""
    third, packed = blocks[:, :32], blocks[:, 32:96].view(-1, 2, 32)
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    # Sixteen scales: low 4 bits in bytes 0-7 (low nibbles, then high nibbles), high 2 bits in bytes 8-11.
    scale = _nibbles(low).view(-1, 16) | _crumbs(high.unsqueeze(1)).view(-1, 16) << 4
    d = _floats(scale.view(torch.int8) - 32).mul_(_half(blocks, 108)).unsqueeze(-1)
    q = _crumbs(packed).view(-1, 8, 32) | _bit_planes(third) << 2
    return _floats((q.view(torch.int8) - 4).view(-1, 16, 16)).mul_(d).view(-1, 256)


def _q4_k(blocks: Tensor) -> Tensor:
    """d, dmin, 12 bytes of 6-bit scales and minima, 128 bytes of nibbles: d * scale * q - dmin * minimum"""
    scale, minimum = _scales_and_minima(blocks)
    q = _nibbles(blocks[:, 16:].view(-1, 4, 32)).view(-1, 8, 32)
    return _floats(q).mul_(scale).sub_(minimum).view(-1, 256)


def _q5_k(blocks: Tensor) -> Tensor:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles."""
    scale, minimum = _scales_and_minima(blocks)
    q = _nibbles(blocks[:, 48:].view(-1, 4, 32)).view(-1, 8, 32)
    q |= _bit_planes(blocks[:, 16:48]) << 4
    return _floats(q).mul_(scale).sub_(minimum).view(-1, 256)


def _q6_k(blocks: Tensor) -> Tensor:
    """128 bytes of nibbles, 64 bytes of 2-bit high parts, 16 signed scales, d: d * scale * (q - 32)"""
    d = _floats(blocks[:, 192:208].view(torch.int8)).mul_(_half(blocks, 208)).unsqueeze(-1)
    q = _nibbles(blocks[:, :128].view(-1, 2, 64)).view(-1, 8, 32)
    q |= _crumbs(blocks[:, 128:192].view(-1, 2, 32)).view(-1, 8, 32) << 4
    return _floats((q.view(torch.int8) - 32).view(-1, 16, 16)).mul_(d).view(-1, 256)


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and minima of Q4_K and Q5_K, [blocks, 8, 1] each, already multiplied by d and dmin.

    Twelve bytes hold eight of each in 6 bits: bytes 0-3 scale 0-3, bytes 4-7 minimum 0-3; the rest have their
    low 4 bits in bytes 8-11 (scale low nibble, minimum high nibble) and their high 2 bits atop the bytes 0-7.
    """
    first, second, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat((first & 63, rest & 15 | first >> 2 & 48), dim=1)
    minimum = torch.cat((second & 63, rest >> 4 | second >> 2 & 48), dim=1)
    return (
        _floats(scale).mul_(_half(blocks, 0)).unsqueeze(-1),
        _floats(minimum).mul_(_half(blocks, 2)).unsqueeze(-1),
    )


def _half(blocks: Tensor, offset: int) -> Tensor:
    """The half-precision number at byte `offset` of each block: [blocks, 1], float32."""
    return _floats(blocks[:, offset : offset + 2].contiguous().view(torch.float16))


def _floats(values: Tensor) -> Tensor:
    """A contiguous float32 copy."""
    return values.to(torch.float32, memory_format=torch.contiguous_format)


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., n] -> [..., 2, n]: the low nibbles of the n bytes, then their high ones."""
    return torch.stack((packed & 15, packed >> 4), dim=-2)


def _crumbs(packed: Tensor) -> Tensor:
    """uint8 [..., n] -> [..., 4, n]: bits 0-1 of the n bytes, then bits 2-3, 4-5 and 6-7."""
    return torch.stack((packed & 3, packed >> 2 & 3, packed >> 4 & 3, packed >> 6), dim=-2)


def _bit_planes(packed: Tensor) -> Tensor:
    """uint8 [..., n] -> [..., 8, n]: bit 0 of the n bytes, then bit 1, and so on."""
    return torch.stack([packed >> bit & 1 for bit in range(8)], dim=-2)


# Entry b: eight bytes, the k-th of which is bit k of b, shifted to the place of a fifth bit. One look-up per
# eight elements is many times faster than a shift by a tensor of shifts.
_FIFTH_BITS = (
    ((torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1) << 4).to(torch.uint8).view(torch.int64).squeeze(1)
)


def _fifth_bits(packed: Tensor) -> Tensor:
    """uint8 [blocks, 4] -> [blocks, 32]: bit i of the 32-bit number is 16 times element i."""
    return _FIFTH_BITS[packed.to(torch.int64)].view(torch.uint8)


_DECODERS: dict[GGMLType, Callable[[Tensor], Tensor]] = {
    GGMLType.F32: _stored_as(torch.float32),
    GGMLType.F16: _stored_as(torch.float16),
    GGMLType.BF16: _stored_as(torch.bfloat16),
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q2_K: _q2_k,
    GGMLType.Q3_K: _q3_k,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
}
