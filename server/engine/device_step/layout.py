"""How the arrays of one step lie in one buffer, so that one copy brings all of them to the device.

A buffer of 32-bit words, in the order of `_fields`. Block tables come last and column by column, so that what a
step copies ends with the longest sequence's last block:

    sampling, sampled_slots │ token_ids, positions, previous_slots │ query_start, seq_lens │ ...
    ... output_rows │ slot_mapping │ column 0 │ column 1 │ ...
                                     └ num_groups * B words

Laws:

- Where an array lies depends on the shape alone, never on what is in it: a recorded step reads it there again.
- `pack` writes every word that it says is to be copied. Rows that pad a step are sequences of one token in the
  null block, which see themselves; the last of these sequences has all the rows that are left, and others none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from server.engine.inputs import Int32Array, ModelInputs
from server.engine.kv_cache.block_pool import NULL_BLOCK

_ALIGNMENT = 4
"""Words: kernels load 16 bytes at a time."""


class StepShape(NamedTuple):
    """What decides where arrays lie, and what a recorded step is recorded for."""

    num_tokens: int
    """T"""
    num_seqs: int
    """B"""
    num_output_rows: int
    """R; where the step samples on the device, each of them samples."""

    @classmethod
    def of(cls, inputs: ModelInputs) -> StepShape:
        num_seqs = len(inputs.attention[0].seq_lens)
        return cls(len(inputs.token_ids), num_seqs, len(inputs.output_rows))

    @classmethod
    def of_decodes(cls, num_seqs: int) -> StepShape:
        """One new token of each sequence, after which each samples."""
        return cls(num_seqs, num_seqs, num_seqs)

    @property
    def is_decodes(self) -> bool:
        return self == StepShape.of_decodes(self.num_seqs)


@dataclass(frozen=True, slots=True)
class Field:
    """Where one array lies."""

    first_word: int
    num_words: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Of the array, in elements."""
        return prod(self.shape)

    def of(self, buffer: Int32Array) -> npt.NDArray[Any]:
        """The array in a buffer of words."""
        words = buffer[self.first_word : self.first_word + self.num_words]
        return words.view(self.dtype)[: self.size].reshape(self.shape)


class StepLayout:
    """The places of all arrays of a step of one shape."""

    def __init__(
        self, shape: StepShape, num_groups: int, max_blocks: int, sampling: Mapping[str, np.dtype[Any]]
    ) -> None:
        """max_blocks: columns of a block table at most. sampling: name and type of each array [R] of the
        sampler's."""
        self.shape = shape
        self.num_groups = num_groups
        self.max_blocks = max_blocks
        self.sampling = tuple(sampling)
        self.fields: dict[str, Field] = {}
        self._num_words = 0
        num_tokens, num_seqs, num_rows = shape
        for name, dtype in sampling.items():
            self._add(name, dtype, (num_rows,))
        int32 = np.dtype(np.int32)
        self._add("sampled_slots", int32, (num_rows,))
        for name in ("token_ids", "positions", "previous_slots"):
            self._add(name, int32, (num_tokens,))
        self._add("query_start", int32, (num_seqs + 1,))
        self._add("seq_lens", int32, (num_seqs,))
        self._add("output_rows", int32, (num_rows,))
        self._add("slot_mapping", int32, (num_groups, num_tokens))
        self._add("block_table", int32, (max_blocks, num_groups, num_seqs))

    @property
    def num_words(self) -> int:
        """Of the whole buffer."""
        return self._num_words

    def pack(
        self,
        buffer: Int32Array,
        inputs: ModelInputs,
        sampling: Mapping[str, npt.NDArray[Any]],
        previous_slot: int,
        sampled_slot: int,
    ) -> int:
        """Writes a step that is this shape or smaller, in which case it has a sequence less at least. Returns
        the words from 0 on to be copied.

        sampling: the sampler's arrays by name, each [R].
        previous_slot, sampled_slot: where the sampled tokens of the step before begin, and where this one's go.
        """
        num_tokens, num_seqs, _ = StepShape.of(inputs)
        ends, last = self._padding(num_tokens, num_seqs)
        view = {name: field.of(buffer) for name, field in self.fields.items()}
        for name in self.sampling:
            _fill(view[name], sampling[name])
        view["sampled_slots"][:] = np.arange(sampled_slot, sampled_slot + self.shape.num_output_rows)
        _fill(view["token_ids"], inputs.token_ids)
        _fill(view["positions"], inputs.positions)
        if last > 0:
            view["positions"][-last:] = np.arange(last)
        rows = inputs.previous_rows
        _fill(view["previous_slots"], np.where(rows < 0, -1, rows + previous_slot), -1)
        first = inputs.attention[0]
        _fill(view["query_start"], first.query_start, ends)
        _fill(view["seq_lens"], first.seq_lens, 1)
        if last > 0:
            view["seq_lens"][-1] = last
        _fill(view["output_rows"], inputs.output_rows, self.shape.num_tokens - 1)
        num_columns = first.block_table.shape[1]
        table = view["block_table"][: max(num_columns, -(-last // first.block_size))]
        table[:, :, num_seqs:] = NULL_BLOCK
        table[num_columns:] = NULL_BLOCK
        for group, metadata in enumerate(inputs.attention):
            _fill(view["slot_mapping"][group], metadata.slot_mapping)
            table[:num_columns, group, :num_seqs] = metadata.block_table.T
        return self.fields["block_table"].first_word + table.size

    def _padding(self, num_tokens: int, num_seqs: int) -> tuple[Int32Array, int]:
        """Where the rows of each sequence that pads the step end, and how many the last of them has."""
        num_more = self.shape.num_seqs - num_seqs
        assert num_more > 0 or num_tokens == self.shape.num_tokens
        ends = np.arange(num_tokens, num_tokens + num_more + 1, dtype=np.int32).clip(max=self.shape.num_tokens)
        ends[-1] = self.shape.num_tokens
        return ends[1:], int(ends[-1] - ends[-2]) if num_more > 0 else 0

    def _add(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        num_words = -(-dtype.itemsize * prod(shape) // 4)
        self.fields[name] = Field(self._num_words, num_words, dtype, shape)
        self._num_words += -(-num_words // _ALIGNMENT) * _ALIGNMENT


def _fill(target: npt.NDArray[Any], values: npt.NDArray[Any], padding: npt.ArrayLike = 0) -> None:
    target[: len(values)] = values
    target[len(values) :] = padding
