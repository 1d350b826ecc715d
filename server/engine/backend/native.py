"""The back end for CPUs whose kernels are our own C++ (csrc/), at the instruction set level of the processor.

Laws:

- Its arithmetic is the reference back end's, with fp32 sums in another order.
- What it computes for a row is bit for bit the same whatever else is in the step, in however many chunks a
  prompt comes and with however many threads.
- It owns its threads and its scratch memory: two back ends share nothing. One step at a time.
- A step is one native call: `capture` records the decoder's operations (native_program).
- torch is not imported, unless weights come as its tensors.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from ctypes import byref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from server.engine.backend.base import AttentionLayer
from server.engine.backend.memory import Bytes, huge_pages, zeros_on_demand
from server.engine.backend.native_calls import (
    BF16,
    F32,
    INT8,
    AttentionCall,
    EmbedCall,
    GegluCall,
    LinearCall,
    NormCall,
    PackCall,
    declare,
)
from server.engine.backend.native_library import NativeUnavailableError, library_name, load_library
from server.engine.backend.native_program import Array, Recording, Register
from server.engine.dtype import DType
from server.engine.inputs import ModelInputs
from server.engine.models.config import KVGroupSpec
from server.engine.sampling.native_sampler import NativeSampler

if TYPE_CHECKING:
    from torch import Tensor

LEVELS: Final = ("avx2", "avx512", "avx512_bf16", "amx")
"""From the lowest to the highest, as the library numbers them from 1."""
_TYPES: dict[DType, tuple[int, np.dtype[Any]]] = {
    DType.FLOAT32: (F32, np.dtype(np.float32)),
    DType.BFLOAT16: (BF16, np.dtype(np.uint16)),
}
"""The library's number of each type, and what numpy holds it in (which has no bf16)."""
_PANEL = 16

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """[outputs, inputs] in the layout of csrc/calls.h."""

    data: Bytes
    type: int
    """Of csrc/calls.h."""
    outputs: int
    inputs: int


@dataclass(frozen=True, slots=True)
class PackedKV:
    """One layer's keys and values, 16 slots to a panel."""

    keys: Bytes
    values: Bytes


class NativeBackend:
    """Implements `base.Backend` for bf16 and fp32 on a CPU, with weights in the same or in 8 bits."""

    name = "native"

    def __init__(self, dtype: DType, num_threads: int, level: str = "auto", quantization: str = "none") -> None:
        """level: one of LEVELS, or auto for the highest that the processor has. quantization: none or int8.

        Raises NativeUnavailableError where there is no library and none can be built, or none for this
        processor, dtype or level.
        """
        if dtype not in _TYPES:
            raise NativeUnavailableError(f"they compute in bfloat16 and float32, not in {dtype}")
        self.dtype = dtype
        self._type, self._element = _TYPES[dtype]
        self._quantization = quantization
        self._library = load_library()
        declare(self._library)
        number = _level_number(level, self._library)
        self.level = LEVELS[number - 1]
        engine = self._library.gemma_create(number, num_threads)
        if engine is None:
            raise NativeUnavailableError("their threads cannot be started")
        self._engine = ctypes.c_void_p(engine)
        self._logits = np.empty((0, 1), dtype=np.float32)
        weakref.finalize(self, self._library.gemma_destroy, self._engine)

    # --- once, at load -------------------------------------------------------------------------------------

    @property
    def weight_form(self) -> str:
        """Two back ends can use each other's prepared weights if this is the same."""
        return f"{library_name()} {self.dtype} {self._quantization}"

    def prepare_linear(self, weight: Tensor) -> PackedMatrix:
        import torch

        from server.engine.backend import int8

        weight = weight.to(getattr(torch, self.dtype)).contiguous()
        if self._quantization == "int8":
            quantized = int8.quantize(weight)
            return self._pack(INT8, quantized.integers, quantized.scales.data_ptr())
        return self._pack(self._type, weight, None)

    def _pack(self, weight_type: int, weight: Tensor, scales: int | None) -> PackedMatrix:
        outputs, inputs = weight.shape
        data = huge_pages(self._library.gemma_packed_size(weight_type, outputs, inputs))
        call = PackCall(weight_type, weight.data_ptr(), scales, data.ctypes.data, outputs, inputs)
        self._library.gemma_pack(self._engine, byref(call))
        return PackedMatrix(data, weight_type, outputs, inputs)

    def prepare_embedding(self, weight: Tensor) -> PackedMatrix:
        return self.prepare_linear(weight)

    def prepare_norm(self, weight: Tensor) -> Floats:
        norm: Floats = weight.float().numpy() + np.float32(1.0)
        return norm

    def kv_bytes_per_block(self, group: KVGroupSpec, block_size: int) -> int:
        per_slot = 2 * group.num_kv_heads * _padded(group.head_dim) * self.dtype.itemsize
        return per_slot * block_size * len(group.layer_indices)

    def allocate_kv(self, group: KVGroupSpec, num_blocks: int, block_size: int) -> list[PackedKV]:
        num_slots = _padded((num_blocks + 1) * block_size)
        size = num_slots * group.num_kv_heads * _padded(group.head_dim) * self.dtype.itemsize
        return [PackedKV(zeros_on_demand(size), zeros_on_demand(size)) for _ in group.layer_indices]

    def capture(
        self, forward: Callable[[Recording], Register], max_tokens: int
    ) -> Callable[[ModelInputs], Array]:
        recording = self.record()
        result = forward(recording)
        program = recording.finish((result,), max_tokens, owner=forward)

        def run(inputs: ModelInputs) -> Array:
            program.run(self._library, self._engine, inputs)
            hidden: Array = program.rows(result)[inputs.output_rows]
            return hidden

        return run

    def sampler(self, vocab_size: int, suppress_token_ids: tuple[int, ...]) -> NativeSampler:
        return NativeSampler(self._library, self._engine, vocab_size, suppress_token_ids)

    def record(self) -> Recording:
        """An empty recording, whose registers the operations below take."""
        return Recording(self._element)

    # --- in a step: each records an operation ---------------------------------------------------------------

    def embed(self, table: PackedMatrix, scale: float, step: Recording) -> Register:
        out = step.register(table.inputs)
        call = EmbedCall(
            type=self._type,
            weight_type=table.type,
            packed=_address(table.data),
            inputs=table.inputs,
            scale=scale,
        )
        step.append(call, out=out)
        return out

    def linear(self, x: Register, weight: PackedMatrix) -> Register:
        out = x.recording.register(weight.outputs)
        x.recording.append(self._linear_call(weight), x=x, out=out)
        return out

    def rms_norm(self, x: Register, weight: Floats, eps: float) -> Register:
        out = x.recording.register(x.width)
        call = NormCall(type=self._type, weight=_address(weight), eps=eps, width=x.width)
        x.recording.append(call, x=x, out=out)
        return out

    def add_rms_norm(
        self, residual: Register, update: Register, weight: Floats, eps: float
    ) -> tuple[Register, Register]:
        """Overwrites both: the residual with the sum, the update with its norm."""
        call = NormCall(type=self._type, weight=_address(weight), eps=eps, width=update.width)
        update.recording.append(call, x=update, residual=residual, out=update)
        return residual, update

    def attention(
        self, qkv: Register, layer: AttentionLayer[Floats], cache: PackedKV, step: Recording
    ) -> Register:
        spec = layer.spec
        out = step.register(spec.num_heads * spec.head_dim)
        call = AttentionCall(
            type=self._type,
            heads=spec.num_heads,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            window=spec.window or 0,
            scale=spec.scale,
            softcap=spec.softcap or 0.0,
            q_norm=None if layer.q_norm is None else _address(layer.q_norm),
            k_norm=None if layer.k_norm is None else _address(layer.k_norm),
            eps=layer.eps,
            keys=_address(cache.keys),
            values=_address(cache.values),
            group=step.group(layer.group),
            rope=step.rope(layer.rope),
        )
        step.append(call, qkv=qkv, out=out)
        return out

    def geglu(self, gate_up: Register) -> Register:
        out = gate_up.recording.register(gate_up.width // 2)
        gate_up.recording.append(GegluCall(type=self._type, width=out.width), gate_up=gate_up, out=out)
        return out

    # --- after a step --------------------------------------------------------------------------------------

    def logits(self, hidden: Array, table: PackedMatrix, softcap: float | None) -> Floats:
        rows = len(hidden)
        # Fresh memory of this size would come from the system page by page, at every step.
        if self._logits.shape[1] != table.outputs or len(self._logits) < rows:
            self._logits = np.empty((rows, table.outputs), dtype=np.float32)
        out = self._logits[:rows]
        hidden = np.ascontiguousarray(hidden)
        call = self._linear_call(table)
        call.x, call.rows, call.out = _address(hidden), rows, _address(out)
        call.logits, call.softcap = True, softcap or 0.0
        self._library.gemma_linear(self._engine, byref(call))
        return out

    def _linear_call(self, weight: PackedMatrix) -> LinearCall:
        return LinearCall(
            type=self._type,
            weight_type=weight.type,
            packed=_address(weight.data),
            outputs=weight.outputs,
            inputs=weight.inputs,
        )


def _level_number(level: str, library: ctypes.CDLL) -> int:
    """The library's number of a level. Raises NativeUnavailableError."""
    processor, built = library.gemma_processor_level(), library.gemma_built_level()
    if processor == 0:
        raise NativeUnavailableError("the processor has no AVX2")
    number = min(processor, built) if level == "auto" else LEVELS.index(level) + 1
    if number > processor:
        highest = LEVELS[processor - 1]
        raise NativeUnavailableError(f"the processor has no {level}; its highest level is {highest}")
    if number > built:
        highest = LEVELS[built - 1]
        raise NativeUnavailableError(f"their compiler knew no {level}; its highest level is {highest}")
    return number


def _padded(size: int) -> int:
    return -(-size // _PANEL) * _PANEL


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.ctypes.data)
