"""The back end for CPUs whose kernels are our own C++ (csrc/), at the instruction set level of the processor.

Laws:

- Its arithmetic is the reference back end's, with fp32 sums in another order.
- What it computes for a row is bit for bit the same whatever else is in the step, in however many chunks a
  prompt comes and with however many threads.
- It owns its threads and its scratch memory: two back ends share nothing. One step at a time.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Sequence
from ctypes import byref
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from server.engine.backend.base import Step
from server.engine.backend.native_calls import (
    BF16,
    F32,
    AttentionCall,
    EmbedCall,
    GegluCall,
    LinearCall,
    NormCall,
    PackCall,
    declare,
)
from server.engine.backend.native_library import NativeUnavailableError, load_library
from server.engine.backend.reference import AttentionLayer, Rope, rope_angles
from server.engine.backend.scratch import Scratch, zeros_on_demand
from server.engine.inputs import AttentionMetadata, ModelInputs
from server.engine.models.config import KVGroupSpec, LayerSpec

LEVELS: Final = ("avx2", "avx512")
"""From the lowest to the highest, as the library numbers them from 1."""
_TYPES = {torch.float32: F32, torch.bfloat16: BF16}
_PANEL = 16


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """[outputs, inputs] in the layout of csrc/calls.h."""

    data: Tensor
    outputs: int
    inputs: int


@dataclass(frozen=True, slots=True)
class PackedKV:
    """One layer's keys and values, 16 slots to a panel."""

    keys: Tensor
    values: Tensor


class _Addresses(NamedTuple):
    """Of a KV group's arrays, in the order of AttentionCall's fields."""

    sequences: int
    query_start: int
    seq_lens: int
    block_table: int
    table_width: int
    slots: int
    block_size: int

    @classmethod
    def of(cls, metadata: AttentionMetadata) -> _Addresses:
        return cls(
            metadata.seq_lens.shape[0],
            metadata.query_start.ctypes.data,
            metadata.seq_lens.ctypes.data,
            metadata.block_table.ctypes.data,
            metadata.block_table.shape[1],
            metadata.slot_mapping.ctypes.data,
            metadata.block_size,
        )


@dataclass(frozen=True, slots=True)
class NativeStep(Step):
    angles: dict[Rope, tuple[Tensor, Tensor]]
    """cos and sin, each [T, 1, head_dim / 2] fp32."""
    attention: tuple[AttentionMetadata, ...]
    """One for each KV group; kept because the addresses point into it."""
    addresses: tuple[_Addresses, ...]


class NativeBackend:
    """Implements `base.Backend` for bf16 and fp32 on a CPU."""

    name = "native"

    def __init__(self, dtype: torch.dtype, num_threads: int, level: str = "auto") -> None:
        """level: one of LEVELS, or auto for the highest that the processor has.

        Raises NativeUnavailableError where there is no library and none can be built, or none for this
        processor, dtype or level.
        """
        if dtype not in _TYPES:
            raise NativeUnavailableError(f"they compute in bfloat16 and float32, not in {dtype}")
        self.device = torch.device("cpu")
        self.dtype = dtype
        self._library = load_library()
        declare(self._library)
        best = self._library.gemma_best_level()
        if best == 0:
            raise NativeUnavailableError("the processor has no AVX2")
        number = best if level == "auto" else LEVELS.index(level) + 1
        if number > best:
            raise NativeUnavailableError(
                f"the processor has no {level}; its highest level is {LEVELS[best - 1]}"
            )
        self.level = LEVELS[number - 1]
        self._type = _TYPES[dtype]
        engine = self._library.gemma_create(number, num_threads)
        if engine is None:
            raise NativeUnavailableError("their threads cannot be started")
        self._engine = ctypes.c_void_p(engine)
        self._scratch = Scratch(self.device)
        weakref.finalize(self, self._library.gemma_destroy, self._engine)

    # --- once, at load -------------------------------------------------------------------------------------

    def prepare_linear(self, weight: Tensor) -> PackedMatrix:
        weight = weight.contiguous()
        outputs, inputs = weight.shape
        data = _huge_pages(self._library.gemma_packed_size(self._type, outputs, inputs))
        call = PackCall(self._type, weight.data_ptr(), data.data_ptr(), outputs, inputs)
        self._library.gemma_pack(self._engine, byref(call))
        return PackedMatrix(data, outputs, inputs)

    def prepare_embedding(self, weight: Tensor) -> PackedMatrix:
        return self.prepare_linear(weight)

    def prepare_norm(self, weight: Tensor) -> Tensor:
        return 1.0 + weight.to(torch.float32).contiguous()

    def prepare_attention(
        self, spec: LayerSpec, group: int, q_norm: Tensor | None, k_norm: Tensor | None, eps: float
    ) -> AttentionLayer:
        rope = Rope(spec.attention.head_dim, spec.rope_theta, spec.rope_scale)
        return AttentionLayer(spec.attention, rope, group, q_norm, k_norm, eps)

    def kv_bytes_per_block(self, group: KVGroupSpec, block_size: int) -> int:
        per_slot = 2 * group.num_kv_heads * _padded(group.head_dim) * self.dtype.itemsize
        return per_slot * block_size * len(group.layer_indices)

    def allocate_kv(self, group: KVGroupSpec, num_blocks: int, block_size: int) -> list[PackedKV]:
        num_slots = _padded((num_blocks + 1) * block_size)
        size = num_slots * group.num_kv_heads * _padded(group.head_dim) * self.dtype.itemsize
        return [PackedKV(zeros_on_demand(size), zeros_on_demand(size)) for _ in group.layer_indices]

    # --- once a step ---------------------------------------------------------------------------------------

    def begin_step(self, inputs: ModelInputs, attention_layers: Sequence[AttentionLayer]) -> NativeStep:
        positions = torch.from_numpy(inputs.positions)
        return NativeStep(
            token_ids=torch.from_numpy(inputs.token_ids),
            output_rows=torch.from_numpy(inputs.output_rows),
            angles={rope: rope_angles(rope, positions) for rope in {layer.rope for layer in attention_layers}},
            attention=inputs.attention,
            addresses=tuple(map(_Addresses.of, inputs.attention)),
        )

    # --- in a step -----------------------------------------------------------------------------------------

    def embed(self, table: PackedMatrix, token_ids: Tensor, scale: float) -> Tensor:
        rows = token_ids.shape[0]
        out = torch.empty(rows, table.inputs, dtype=self.dtype)
        call = EmbedCall(
            self._type, table.data.data_ptr(), table.inputs, token_ids.data_ptr(), rows, scale, out.data_ptr()
        )
        self._library.gemma_embed(self._engine, byref(call))
        return out

    def linear(self, x: Tensor, weight: PackedMatrix) -> Tensor:
        out = torch.empty(x.shape[0], weight.outputs, dtype=self.dtype)
        self._multiply(x, weight, out, logits=False, softcap=None)
        return out

    def logits(self, hidden: Tensor, table: PackedMatrix, softcap: float | None) -> Tensor:
        # A fresh tensor of this size would come from the system page by page, at every step.
        out = self._scratch.take("logits", (hidden.shape[0], table.outputs), torch.float32)
        self._multiply(hidden, table, out, logits=True, softcap=softcap)
        return out

    def _multiply(
        self, x: Tensor, weight: PackedMatrix, out: Tensor, logits: bool, softcap: float | None
    ) -> None:
        x = x.contiguous()
        call = LinearCall(
            type=self._type,
            x=x.data_ptr(),
            rows=x.shape[0],
            packed=weight.data.data_ptr(),
            outputs=weight.outputs,
            inputs=weight.inputs,
            out=out.data_ptr(),
            logits=logits,
            softcap=softcap or 0.0,
        )
        self._library.gemma_linear(self._engine, byref(call))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        self._norm(x, None, weight, eps, out)
        return out

    def add_rms_norm(
        self, residual: Tensor, update: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Overwrites both: the residual with the sum, the update with its norm."""
        self._norm(update, residual, weight, eps, update)
        return residual, update

    def _norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
        rows, width = x.shape
        into = None if residual is None else residual.data_ptr()
        call = NormCall(self._type, x.data_ptr(), into, weight.data_ptr(), eps, rows, width, out.data_ptr())
        self._library.gemma_norm(self._engine, byref(call))

    def attention(self, qkv: Tensor, layer: AttentionLayer, cache: PackedKV, step: NativeStep) -> Tensor:
        spec = layer.spec
        cos, sin = step.angles[layer.rope]
        out = torch.empty(qkv.shape[0], spec.num_heads * spec.head_dim, dtype=self.dtype)
        call = AttentionCall(
            self._type,
            qkv.data_ptr(),
            qkv.shape[0],
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.window or 0,
            spec.scale,
            spec.softcap or 0.0,
            None if layer.q_norm is None else layer.q_norm.data_ptr(),
            None if layer.k_norm is None else layer.k_norm.data_ptr(),
            layer.eps,
            cos.data_ptr(),
            sin.data_ptr(),
            cache.keys.data_ptr(),
            cache.values.data_ptr(),
            *step.addresses[layer.group],
            out=out.data_ptr(),
        )
        self._library.gemma_attention(self._engine, byref(call))
        return out

    def geglu(self, gate_up: Tensor) -> Tensor:
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(rows, width, dtype=self.dtype)
        call = GegluCall(self._type, gate_up.data_ptr(), rows, width, out.data_ptr())
        self._library.gemma_geglu(self._engine, byref(call))
        return out


def _padded(size: int) -> int:
    return -(-size // _PANEL) * _PANEL


def _huge_pages(size: int) -> Tensor:
    """Uninitialised bytes. Weights are read whole at every step, and with 4 KiB pages the reading is bound by
    misses of the TLB."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
