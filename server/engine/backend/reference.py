"""The back end that defines the arithmetic: plain PyTorch on any device, the oracle of every other one.

Sources: google/gemma_pytorch (gemma/model.py) and transformers' modeling_gemma{,2,3}.py; where the two round
differently in bf16, this rounds later: norms, rotation, scores and soft-caps are fp32 from end to end.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from server.engine.backend import fp8, int4, int8
from server.engine.backend.base import AttentionLayer, Rope
from server.engine.backend.fp8 import Fp8Matrix
from server.engine.backend.int4 import Int4Matrix
from server.engine.backend.int8 import QuantizedMatrix
from server.engine.backend.memory import zeros_on_demand
from server.engine.backend.reference_attention import (
    AttentionPlan,
    KVCache,
    kv_bytes,
    paged_attention,
    plan_attention,
)
from server.engine.backend.rounding import rounded
from server.engine.backend.scratch import Scratch
from server.engine.backend.upcast import UpcastMatmul
from server.engine.dtype import DType
from server.engine.inputs import ModelInputs
from server.engine.models.config import KVGroupSpec
from server.engine.sampling.sampler import Sampler

Table = Tensor | QuantizedMatrix
Matrix = Table | Fp8Matrix | Int4Matrix


class ReferenceStep:
    """A step's arrays on the device; what layers have in common is computed when the first of them asks."""

    def __init__(self, inputs: ModelInputs, device: torch.device) -> None:
        self.token_ids = torch.from_numpy(inputs.token_ids).to(device)
        self._positions = torch.from_numpy(inputs.positions).to(device)
        self._attention = inputs.attention
        self._angles: dict[Rope, tuple[Tensor, Tensor]] = {}
        self._plans: dict[int, AttentionPlan] = {}

    def angles(self, rope: Rope) -> tuple[Tensor, Tensor]:
        """cos and sin, each [T, 1, head_dim / 2] fp32."""
        if rope not in self._angles:
            self._angles[rope] = rope_angles(rope, self._positions)
        return self._angles[rope]

    def plan(self, layer: AttentionLayer[Tensor]) -> AttentionPlan:
        group = layer.group
        if group not in self._plans:
            window = layer.spec.window
            self._plans[group] = plan_attention(self._attention[group], window, self._positions.device)
        return self._plans[group]


class ReferenceBackend:
    """Implements `base.Backend`. Matrices are as they come or in 8 or 4 bits, norms 1 + weight in fp32."""

    name = "reference"

    def __init__(
        self, device: torch.device, dtype: DType, quantization: str = "none", kv_cache_dtype: str = "auto"
    ) -> None:
        """quantization: none, int8, fp8 or int4. kv_cache_dtype: auto, which is dtype, or fp8."""
        self.dtype = dtype
        self._quantization = quantization
        self._device = device
        self._torch_dtype: torch.dtype = getattr(torch, dtype)
        self._kv_dtype = fp8.CODES if kv_cache_dtype == "fp8" else self._torch_dtype
        self._scratch = Scratch(device)
        self._matmul = UpcastMatmul() if UpcastMatmul.is_needed(device, self._torch_dtype) else F.linear

    def prepare_linear(self, weight: Tensor) -> Matrix:
        if self._quantization == "int8":
            return self.prepare_embedding(weight)
        return rounded(weight.to(self._device, self._torch_dtype), self._quantization)

    def prepare_embedding(self, weight: Tensor) -> Table:
        weight = weight.to(self._device, self._torch_dtype)
        return int8.quantize(weight) if self._quantization == "int8" else weight

    def prepare_norm(self, weight: Tensor) -> Tensor:
        return 1.0 + weight.to(self._device, torch.float32)

    def kv_bytes_per_block(self, group: KVGroupSpec, block_size: int) -> int:
        per_layer = kv_bytes((1, block_size, group.num_kv_heads, group.head_dim), self._kv_dtype)
        return per_layer * len(group.layer_indices)

    def allocate_kv(self, group: KVGroupSpec, num_blocks: int, block_size: int) -> list[KVCache]:
        shape = (num_blocks + 1, block_size, group.num_kv_heads, group.head_dim)
        return [KVCache.allocate(shape, self._kv_dtype, self._zeros) for _ in group.layer_indices]

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros, because a masked slot is still multiplied by 0."""
        if self._device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=self._device)
        memory = torch.from_numpy(zeros_on_demand(math.prod(shape) * dtype.itemsize))
        return memory.view(dtype).view(shape)

    def capture(
        self, forward: Callable[[ReferenceStep], Tensor], max_tokens: int
    ) -> Callable[[ModelInputs], Tensor]:
        @torch.inference_mode()
        def run(inputs: ModelInputs) -> Tensor:
            rows = torch.from_numpy(inputs.output_rows).to(self._device)
            return forward(ReferenceStep(inputs, self._device)).index_select(0, rows)

        return run

    def sampler(self, vocab_size: int, suppress_token_ids: tuple[int, ...]) -> Sampler:
        return Sampler(vocab_size, suppress_token_ids, self._device)

    def embed(self, table: Table, scale: float, step: ReferenceStep) -> Tensor:
        if isinstance(table, QuantizedMatrix):
            return (int8.rows(table, step.token_ids) * scale).to(self._torch_dtype)
        return F.embedding(step.token_ids, table) * scale

    def linear(self, x: Tensor, weight: Matrix) -> Tensor:
        if isinstance(weight, Fp8Matrix):
            return fp8.multiply(x, weight)
        if isinstance(weight, Int4Matrix):
            return int4.multiply(x, weight)
        return int8.multiply(x, weight) if isinstance(weight, QuantizedMatrix) else self._matmul(x, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # Multiply, then cast, unlike Llama's (huggingface/transformers pull request 29402).
        return _rms_norm(x.float(), weight, eps).to(x.dtype)

    def add_rms_norm(
        self, residual: Tensor, update: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        residual = residual.add_(update)
        return residual, self.rms_norm(residual, weight, eps)

    def attention(
        self, qkv: Tensor, layer: AttentionLayer[Tensor], cache: KVCache, step: ReferenceStep
    ) -> Tensor:
        spec = layer.spec
        heads = qkv.view(qkv.shape[0], -1, spec.head_dim)
        q, k, v = heads.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
        cos, sin = step.angles(layer.rope)
        q = _rotate(
            q.float() if layer.q_norm is None else _rms_norm(q.float(), layer.q_norm, layer.eps), cos, sin
        )
        k = _rotate(
            k.float() if layer.k_norm is None else _rms_norm(k.float(), layer.k_norm, layer.eps), cos, sin
        )
        attended = paged_attention(q, k.to(qkv.dtype), v, cache, spec, step.plan(layer), self._scratch)
        return attended.to(qkv.dtype)

    def geglu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh").mul_(up)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, table: Table, softcap: float | None) -> Tensor:
        logits = self.linear(hidden, table).float()
        return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def rope_angles(rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of each position's angles, [T, 1, head_dim / 2], fp32 from the integer positions: in bf16 the
    positions above 256 would already be wrong."""
    angles = positions.float()[:, None, None] * rope_frequencies(rope, positions.device)
    return angles.cos(), angles.sin()


def rope_frequencies(rope: Rope, device: torch.device) -> Tensor:
    """Radians for each position and pair of dimensions, fp32 [head_dim / 2]."""
    exponents = torch.arange(0, rope.head_dim, 2, device=device).float() / rope.head_dim
    return 1.0 / rope.theta**exponents / rope.scale


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates dimension i with dimension i + head_dim / 2 (the "NeoX" layout). x: [T, heads, head_dim] fp32"""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight
