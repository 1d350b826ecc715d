"""The back end for NVIDIA GPUs: Triton kernels around cuBLAS's matrix products.

Its step is a `DeviceInputs`: tensors that are on the device already. No operation waits for the device or has a
shape that depends on what is in them, so that `server.engine.device_step` can record and replay a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from server.engine.backend import fp8
from server.engine.backend.base import AttentionLayer, Rope
from server.engine.backend.fp8 import Fp8Matrix
from server.engine.backend.int4 import Int4Matrix
from server.engine.backend.reference import rope_frequencies
from server.engine.backend.reference_attention import KVCache, kv_bytes
from server.engine.backend.rounding import rounded
from server.engine.backend.triton import pointwise
from server.engine.backend.triton.attention import PagedAttention
from server.engine.backend.triton.fp8_linear import Fp8Linear
from server.engine.backend.triton.int4_linear import Int4Linear
from server.engine.backend.triton.rotary import apply_rotary
from server.engine.backend.triton.sampling import DeviceSampler
from server.engine.device_step.cuda import CudaQueue
from server.engine.device_step.inputs import DeviceGroup, DeviceInputs
from server.engine.dtype import DType
from server.engine.inputs import ModelInputs
from server.engine.models.config import KVGroupSpec
from server.engine.sampling.sampler import Sampler

Matrix = Tensor | Fp8Matrix | Int4Matrix


class TritonBackend:
    """Implements `base.Backend`. Matrices are as they come, in e4m3 or in 4 bits, norms 1 + weight in fp32."""

    name = "triton"

    def __init__(
        self, device: torch.device, dtype: DType, kv_cache_dtype: str = "auto", quantization: str = "none"
    ) -> None:
        """device: a GPU, or the CPU with the interpreter. kv_cache_dtype: auto, which is dtype, or fp8.
        quantization: none, fp8 or int4."""
        self.dtype = dtype
        self._quantization = quantization
        self._device = device
        self._torch_dtype: torch.dtype = getattr(torch, dtype)
        self._kv_dtype = fp8.CODES if kv_cache_dtype == "fp8" else self._torch_dtype
        self._attention = PagedAttention.on(device)
        self._fp8_linear = Fp8Linear(self._attention.num_multiprocessors)
        self._int4_linear = Int4Linear(self._attention.num_multiprocessors)
        self._frequencies: dict[Rope, Tensor] = {}

    def prepare_linear(self, weight: Tensor) -> Matrix:
        return rounded(self.prepare_embedding(weight), self._quantization)

    def prepare_embedding(self, weight: Tensor) -> Tensor:
        return weight.to(self._device, self._torch_dtype)

    def prepare_norm(self, weight: Tensor) -> Tensor:
        return 1.0 + weight.to(self._device, torch.float32)

    def kv_bytes_per_block(self, group: KVGroupSpec, block_size: int) -> int:
        per_layer = kv_bytes((1, block_size, group.num_kv_heads, group.head_dim), self._kv_dtype)
        return per_layer * len(group.layer_indices)

    def allocate_kv(self, group: KVGroupSpec, num_blocks: int, block_size: int) -> list[KVCache]:
        shape = (num_blocks + 1, block_size, group.num_kv_heads, group.head_dim)

        def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        return [KVCache.allocate(shape, self._kv_dtype, zeros) for _ in group.layer_indices]

    def capture(
        self, forward: Callable[[DeviceInputs], Tensor], max_tokens: int
    ) -> Callable[[ModelInputs], Tensor]:
        @torch.inference_mode()
        def run(inputs: ModelInputs) -> Tensor:
            rows = torch.from_numpy(inputs.output_rows).to(self._device)
            return forward(self._on_device(inputs)).index_select(0, rows)

        return run

    def queue(self) -> CudaQueue:
        return CudaQueue(self._device)

    def device_sampler(
        self, vocab_size: int, suppress_token_ids: tuple[int, ...]
    ) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
        return DeviceSampler(vocab_size, suppress_token_ids, self._device).launch

    def sampler(self, vocab_size: int, suppress_token_ids: tuple[int, ...]) -> Sampler:
        return Sampler(vocab_size, suppress_token_ids, self._device)

    def embed(self, table: Tensor, scale: float, step: DeviceInputs) -> Tensor:
        return pointwise.embed(table, step.token_ids, scale)

    def linear(self, x: Tensor, weight: Matrix) -> Tensor:
        if isinstance(weight, Fp8Matrix):
            return self._fp8_linear(x, weight)
        return self._int4_linear(x, weight) if isinstance(weight, Int4Matrix) else F.linear(x, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return pointwise.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, residual: Tensor, update: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return pointwise.add_rms_norm(residual, update, weight, eps)

    def attention(
        self, qkv: Tensor, layer: AttentionLayer[Tensor], cache: KVCache, step: DeviceInputs
    ) -> Tensor:
        if layer.rope not in self._frequencies:
            self._frequencies[layer.rope] = rope_frequencies(layer.rope, self._device)
        q = apply_rotary(qkv, layer, self._frequencies[layer.rope], cache, step)
        return self._attention(q, cache, layer.spec, layer.group, step).flatten(1)

    def geglu(self, gate_up: Tensor) -> Tensor:
        return pointwise.geglu(gate_up)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, table: Tensor, softcap: float | None) -> Tensor:
        logits = F.linear(hidden, table)
        # The sampler reads any dtype: a copy in fp32 would take longer than the choice of the tokens.
        return logits if softcap is None else pointwise.softcap(logits, softcap)

    def _on_device(self, inputs: ModelInputs) -> DeviceInputs:
        def tensor(values: npt.NDArray[np.integer]) -> Tensor:
            return torch.from_numpy(values.astype(np.int32)).to(self._device)

        metadata = inputs.attention[0]
        return DeviceInputs(
            token_ids=tensor(inputs.token_ids),
            positions=tensor(inputs.positions),
            query_start=tensor(metadata.query_start),
            seq_lens=tensor(metadata.seq_lens),
            groups=tuple(
                DeviceGroup(tensor(group.block_table), tensor(group.slot_mapping)) for group in inputs.attention
            ),
            block_size=metadata.block_size,
            max_query_len=int(np.diff(metadata.query_start).max()),
            max_seq_len=int(metadata.seq_lens.max()),
        )
