"""A decoder step as a list of native operations, recorded once and run in one call for each step.

Laws:

- While it is recorded, an array is a `Register`: a width and a name for what an operation will write.
- Registers get memory when the recording ends. Two share it only if the last use of one is before the first
  of the other, so a step needs memory for a handful of arrays, however many layers there are.
- Memory, weights and caches stay where they are, so a recorded operation holds addresses. What changes from
  step to step (tokens, block tables) is in the StepCall.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from ctypes import byref
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from server.engine.backend.base import Rope
from server.engine.backend.memory import zeros_on_demand
from server.engine.backend.native_calls import (
    KINDS,
    AttentionGroup,
    Operation,
    ProgramCall,
    RopeFrequencies,
    StepCall,
)
from server.engine.inputs import AttentionMetadata, ModelInputs

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Register:
    """[tokens of the step, width], written by an operation of a recording."""

    recording: Recording
    width: int


class _Recorded(NamedTuple):
    call: ctypes.Structure
    registers: dict[str, Register]
    """By the field of the call that will hold the register's address."""


@dataclass(slots=True)
class Recording:
    """The step that a decoder's forward pass sees while it is recorded."""

    element: np.dtype[Any]
    """Of every register."""
    _operations: list[_Recorded] = field(default_factory=list)
    _ropes: dict[Rope, int] = field(default_factory=dict)
    _num_groups: int = 0

    def register(self, width: int) -> Register:
        return Register(self, width)

    def append(self, call: ctypes.Structure, **registers: Register) -> None:
        """registers: by the fields of `call` that are to hold their addresses."""
        self._operations.append(_Recorded(call, registers))

    def rope(self, rope: Rope) -> int:
        """The index of a rotary embedding in the program."""
        return self._ropes.setdefault(rope, len(self._ropes))

    def group(self, group: int) -> int:
        """Notes that the step needs the arrays of this KV group."""
        self._num_groups = max(self._num_groups, group + 1)
        return group

    def finish(self, results: tuple[Register, ...], max_tokens: int, owner: object) -> Program:
        """results: registers whose contents are wanted when the program has run. owner: keeps alive what the
        recorded calls point to."""
        last_use = {
            register: index
            for index, operation in enumerate(self._operations)
            for register in operation.registers.values()
        }
        last_use |= dict.fromkeys(results, len(self._operations))
        memory: dict[Register, Array] = {}
        free: defaultdict[int, list[Array]] = defaultdict(list)
        for index, (call, registers) in enumerate(self._operations):
            for name, register in registers.items():
                if register not in memory:
                    pool = free[register.width]
                    memory[register] = pool.pop() if pool else self._allocate(max_tokens, register.width)
                setattr(call, name, memory[register].ctypes.data)
            for register in set(registers.values()):
                if last_use[register] == index:
                    free[register.width].append(memory[register])
        calls = [operation.call for operation in self._operations]
        frequencies = [rope_frequencies(rope) for rope in self._ropes]
        return Program(calls, frequencies, self._num_groups, memory, owner)

    def _allocate(self, max_tokens: int, width: int) -> Array:
        size = max_tokens * width * self.element.itemsize
        return zeros_on_demand(size).view(self.element).reshape(max_tokens, width)


class Program:
    """Runs what was recorded, for one step at a time."""

    def __init__(
        self,
        calls: list[ctypes.Structure],
        frequencies: list[Array],
        num_groups: int,
        memory: dict[Register, Array],
        owner: object,
    ) -> None:
        self._num_groups = num_groups
        self._memory = memory
        self._pointed_to = calls, frequencies, owner
        self._operations = (Operation * len(calls))(
            *(Operation(KINDS[type(call)], ctypes.addressof(call)) for call in calls)
        )
        self._ropes = (RopeFrequencies * len(frequencies))(
            *(RopeFrequencies(each.ctypes.data, len(each)) for each in frequencies)
        )
        self._call = ProgramCall(
            ctypes.addressof(self._operations),
            len(calls),
            ctypes.addressof(self._ropes),
            len(frequencies),
            num_groups,
        )

    def rows(self, register: Register) -> Array:
        """[max_tokens, width]: the memory of a register."""
        return self._memory[register]

    def run(self, library: ctypes.CDLL, engine: ctypes.c_void_p, inputs: ModelInputs) -> None:
        groups = (AttentionGroup * self._num_groups)(*map(_group, inputs.attention))
        step = StepCall(
            len(inputs.token_ids),
            inputs.token_ids.ctypes.data,
            inputs.positions.ctypes.data,
            ctypes.addressof(groups),
        )
        library.gemma_run(engine, byref(self._call), byref(step))


def rope_frequencies(rope: Rope) -> Array:
    """Radians per position, fp32 [head_dim / 2]: Su et al., arXiv 2104.09864, with linear scaling."""
    exponents = np.arange(0, rope.head_dim, 2, dtype=np.float64) / rope.head_dim
    return (1.0 / rope.theta**exponents / rope.scale).astype(np.float32)


def _group(metadata: AttentionMetadata) -> AttentionGroup:
    return AttentionGroup(
        metadata.seq_lens.shape[0],
        metadata.query_start.ctypes.data,
        metadata.seq_lens.ctypes.data,
        metadata.block_table.ctypes.data,
        metadata.block_table.shape[1],
        metadata.slot_mapping.ctypes.data,
        metadata.block_size,
    )
