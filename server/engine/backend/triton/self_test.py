"""Whether the kernels compute, on this very device, what the reference back end does.

A driver, a compiler or a card that nobody has tried may make of correct kernels wrong numbers. Two steps of one
small layer, with whole prompts, a later chunk and single tokens, take a second, most of it for compiling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.engine.backend.base import AttentionLayer, Rope
from server.engine.backend.reference import ReferenceBackend
from server.engine.backend.triton.backend import TritonBackend
from server.engine.dtype import DType
from server.engine.inputs import AttentionMetadata, ModelInputs
from server.engine.models.config import AttentionSpec, KVGroupSpec

_SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=256, scale=1 / 16, window=40, softcap=50.0)
_EPS = 1e-6
_BLOCK_SIZE = 16
_BLOCKS_OF_EACH = 6
_STEPS = (([0, 0, 0], [70, 1, 33]), ([70, 1, 33], [1, 20, 1]), ([71, 21, 34], [1, 1, 1]))
"""Tokens of three sequences before each step, and new ones."""
_TOLERANCE = {DType.FLOAT32: 1e-3, DType.FLOAT16: 1e-2, DType.BFLOAT16: 4e-2}
"""Of numbers around 1; both compute in fp32 and round differently often."""


class SelfTestError(RuntimeError):
    """The back end's results are not the reference's; the message says where and by how much."""


def self_test(device: torch.device, dtype: DType, kv_cache_dtype: str, quantization: str = "none") -> None:
    """Raises SelfTestError, or whatever compiling or launching a kernel raises."""
    ours = _results(TritonBackend(device, dtype, kv_cache_dtype, quantization), device)
    expected = _results(ReferenceBackend(device, dtype, quantization, kv_cache_dtype), device)
    for (name, result), (_, right) in zip(ours, expected, strict=True):
        difference = (result.float() - right.float()).abs() / right.float().abs().clamp(min=1.0)
        largest = float(difference.nan_to_num(nan=torch.inf).max())
        if largest > _TOLERANCE[dtype]:
            raise SelfTestError(f"{name} differs from the reference by {largest:.2g} in {dtype}")


def _results(backend: Any, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    torch_dtype = getattr(torch, backend.dtype)

    def normal(*shape: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(device, torch_dtype)

    norm = backend.prepare_norm(0.1 * normal(512, seed=1))
    x, update = normal(3, 512, seed=2), normal(3, 512, seed=3)
    yield "rms_norm", backend.rms_norm(x, norm, _EPS)
    yield "add_rms_norm", backend.add_rms_norm(x.clone(), update, norm, _EPS)[1]
    yield "geglu", backend.geglu(x)
    for num_rows, width in ((3, 2048), (70, 512)):  # in parts, and at once
        matrix = backend.prepare_linear(normal(128, width, seed=10) / width**0.5)
        yield f"linear of {num_rows} rows", backend.linear(normal(num_rows, width, seed=11), matrix)

    head_norm = backend.prepare_norm(0.1 * normal(_SPEC.head_dim, seed=4))
    layer = AttentionLayer(_SPEC, Rope(_SPEC.head_dim, 1e4, 1.0), 0, head_norm, head_norm, _EPS)
    group = KVGroupSpec("self-test", _SPEC.window, (0,), _SPEC.num_kv_heads, _SPEC.head_dim)
    cache = backend.allocate_kv(group, 3 * _BLOCKS_OF_EACH, _BLOCK_SIZE)[0]
    for number, (before, new) in enumerate(_STEPS):
        inputs = _inputs(np.array(before), np.array(new))
        width = (_SPEC.num_heads + 2 * _SPEC.num_kv_heads) * _SPEC.head_dim
        qkv = normal(len(inputs.positions), width, seed=5 + number)
        yield f"attention in step {number}", _run(backend, inputs, qkv, layer, cache)


def _run(backend: Any, inputs: ModelInputs, qkv: Tensor, layer: AttentionLayer[Any], cache: Any) -> Tensor:
    forward: Callable[[Any], Tensor] = lambda step: backend.attention(qkv, layer, cache, step)  # noqa: E731
    result: Tensor = backend.capture(forward, len(qkv))(inputs)
    return result


def _inputs(before: np.ndarray, new: np.ndarray) -> ModelInputs:
    """Each sequence has the blocks after its predecessor's, in reverse order."""
    num_seqs = len(new)
    table = 1 + np.arange(num_seqs * _BLOCKS_OF_EACH, dtype=np.int32).reshape(num_seqs, -1)[:, ::-1]
    owner = np.repeat(np.arange(num_seqs), new)
    query_start = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    positions = np.arange(len(owner)) - query_start[owner] + before[owner]
    slots = table[owner, positions // _BLOCK_SIZE].astype(np.int64) * _BLOCK_SIZE + positions % _BLOCK_SIZE
    metadata = AttentionMetadata(
        query_start, (before + new).astype(np.int32), np.ascontiguousarray(table), slots, _BLOCK_SIZE
    )
    return ModelInputs(
        token_ids=np.zeros_like(positions),
        previous_rows=np.full(len(positions), -1, dtype=np.int32),
        positions=positions,
        output_rows=np.arange(len(positions)),
        attention=(metadata,),
    )
