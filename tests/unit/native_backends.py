"""Native back ends of every level and number of threads, for tests; what the processor lacks is emulated."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from server.engine.backend import native
from server.engine.backend.native import LEVELS, NativeBackend
from server.engine.backend.native_calls import declare
from server.engine.backend.native_library import NativeUnavailableError, load_library
from server.engine.backend.native_program import Recording, Register
from server.engine.backend.reference import ReferenceBackend, ReferenceStep
from server.engine.dtype import DType
from server.engine.inputs import ModelInputs
from tests.emulated.library import emulated_library

THREADS = (1, 2)


def dtype_of(dtype: torch.dtype) -> DType:
    return DType(str(dtype).removeprefix("torch."))


@cache
def native_backend(
    dtype: torch.dtype, level: str = "auto", num_threads: int = 2, quantization: str = "none"
) -> NativeBackend:
    """Skips where there is no compiler, or not even AVX2."""
    try:
        if level == "auto" or LEVELS.index(level) < processor_level():
            return NativeBackend(dtype_of(dtype), num_threads, level, quantization)
        with mock.patch.object(native, "load_library", emulated_library):
            return NativeBackend(dtype_of(dtype), num_threads, level, quantization)
    except NativeUnavailableError as error:
        pytest.skip(f"no native kernels: {error}")


@cache
def processor_level() -> int:
    """The number of levels that run here without emulation."""
    library = load_library()
    declare(library)
    level: int = library.gemma_processor_level()
    if level == 0:
        raise NativeUnavailableError("the processor has no AVX2")
    return level


REFERENCE = {
    dtype: ReferenceBackend(torch.device("cpu"), dtype_of(dtype)) for dtype in (torch.float32, torch.bfloat16)
}
"""What the native ones are compared with."""

every_level = pytest.mark.parametrize("level", LEVELS)
every_width = pytest.mark.parametrize("level", ["avx2", "avx512"])
"""For what the levels above AVX-512 take from it: all but linear layers in bf16."""
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])

CPU = torch.device("cpu")


class Native:
    """A native back end's operations on torch tensors, one at a time, as the reference back end has them."""

    def __init__(
        self, dtype: torch.dtype, level: str = "auto", num_threads: int = 2, quantization: str = "none"
    ) -> None:
        self.backend = native_backend(dtype, level, num_threads, quantization)
        self.dtype = dtype

    def linear(self, x: Tensor, weight: Any) -> Tensor:
        return self.run(lambda _, x: (self.backend.linear(x, weight),), x)[0]

    def rms_norm(self, x: Tensor, weight: Any, eps: float) -> Tensor:
        return self.run(lambda _, x: (self.backend.rms_norm(x, weight, eps),), x)[0]

    def add_rms_norm(self, residual: Tensor, update: Tensor, weight: Any, eps: float) -> tuple[Tensor, ...]:
        return self.run(lambda _, *both: self.backend.add_rms_norm(*both, weight, eps), residual, update)

    def geglu(self, gate_up: Tensor) -> Tensor:
        return self.run(lambda _, x: (self.backend.geglu(x),), gate_up)[0]

    def embed(self, table: Any, token_ids: Tensor, scale: float) -> Tensor:
        inputs = ModelInputs(*(token_ids.numpy(),) * 4, attention=())
        return self.run(lambda step: (self.backend.embed(table, scale, step),), inputs=inputs)[0]

    def attention(self, qkv: Tensor, layer: Any, cache: Any, inputs: ModelInputs) -> Tensor:
        return self.run(
            lambda step, qkv: (self.backend.attention(qkv, layer, cache, step),), qkv, inputs=inputs
        )[0]

    def logits(self, hidden: Tensor, table: Any, softcap: float | None) -> Tensor:
        bits = hidden.contiguous().view(self._storage).numpy().view(self.backend.record().element)
        return torch.from_numpy(self.backend.logits(bits, table, softcap).copy())

    def run(
        self,
        forward: Callable[..., tuple[Register, ...]],
        *arrays: Tensor,
        inputs: ModelInputs | None = None,
    ) -> tuple[Tensor, ...]:
        """Records `forward(step, *registers)` and runs it once, on these arrays."""
        recording: Recording = self.backend.record()
        registers = [recording.register(array.shape[1]) for array in arrays]
        results = forward(recording, *registers)
        rows = len(arrays[0]) if arrays else len(inputs.token_ids) if inputs else 0
        program = recording.finish(results, rows, forward)
        for array, register in zip(arrays, registers, strict=True):
            torch.from_numpy(program.rows(register).view(f"i{self._storage.itemsize}")).copy_(
                array.view(self._storage)
            )
        if inputs is None:
            positions = np.zeros(rows, dtype=np.int64)
            inputs = ModelInputs(*(positions,) * 4, attention=())
        program.run(self.backend._library, self.backend._engine, inputs)
        return tuple(
            torch.from_numpy(program.rows(result).view(f"i{self._storage.itemsize}").copy()).view(self.dtype)
            for result in results
        )

    @property
    def _storage(self) -> torch.dtype:
        return torch.int16 if self.dtype is torch.bfloat16 else torch.int32


class Reference:
    """The reference back end with the same interface."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.backend = REFERENCE[dtype]
        self.dtype = dtype

    def attention(self, qkv: Tensor, layer: Any, cache: Any, inputs: ModelInputs) -> Tensor:
        return self.backend.attention(qkv, layer, cache, ReferenceStep(inputs, CPU))
