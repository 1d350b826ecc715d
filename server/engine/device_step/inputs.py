"""A step's arrays on the device: views of one packed buffer (`layout`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.engine.device_step.layout import StepLayout

_TORCH_TYPES: dict[np.dtype[Any], torch.dtype] = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.bool_): torch.bool,
}


@dataclass(frozen=True, slots=True)
class DeviceGroup:
    """Where one KV group's layers find and put keys and values."""

    block_table: Tensor
    """int32 [B, blocks], of any strides: block of positions [i * block_size, (i+1) * block_size). What lies
    behind the ceil(seq_len / block_size) blocks of a row is undefined."""
    slot_mapping: Tensor
    """int32 [T]: block * block_size + offset at which each new token's keys and values are stored."""


@dataclass(frozen=True, slots=True)
class DeviceInputs:
    """What `ModelInputs` says, for a back end.

    Rows that pad a batch are sequences of one token, at position 0 and with all their keys in the null block.
    """

    token_ids: Tensor
    """int32 [T]"""
    positions: Tensor
    """int32 [T]"""
    query_start: Tensor
    """int32 [B+1]"""
    seq_lens: Tensor
    """int32 [B]: at least 1."""
    groups: tuple[DeviceGroup, ...]
    block_size: int
    max_query_len: int
    """No sequence has more new tokens; 1: each row is a sequence, and T = B."""
    max_seq_len: int
    """No sequence has more tokens."""


@dataclass(frozen=True, slots=True)
class StepArrays:
    """All that a step reads, in tensors that stay where they are."""

    inputs: DeviceInputs
    """With the token ids that the host knows."""
    previous_slots: Tensor
    """int32 [T]: slot of the sampled tokens that has the row's token; -1: `inputs.token_ids` has it."""
    output_rows: Tensor
    """int32 [R]: rows whose hidden states are wanted."""
    sampled_slots: Tensor
    """int32 [R]: where the token that is sampled from each of them goes."""
    sampling: Mapping[str, Tensor]
    """The sampler's arrays, each [R], by name."""

    @classmethod
    def of(
        cls, buffer: Tensor, layout: StepLayout, block_size: int, max_query_len: int, max_seq_len: int
    ) -> StepArrays:
        """Views of the int32 buffer into which steps of this layout are copied."""

        def view(name: str) -> Tensor:
            field = layout.fields[name]
            words = buffer[field.first_word : field.first_word + field.num_words]
            values = words.view(_TORCH_TYPES[field.dtype])
            return values[: field.size].view(field.shape)

        tables, slots = view("block_table"), view("slot_mapping")
        inputs = DeviceInputs(
            token_ids=view("token_ids"),
            positions=view("positions"),
            query_start=view("query_start"),
            seq_lens=view("seq_lens"),
            groups=tuple(DeviceGroup(tables[:, g].t(), slots[g]) for g in range(layout.num_groups)),
            block_size=block_size,
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
        )
        return cls(
            inputs,
            previous_slots=view("previous_slots"),
            output_rows=view("output_rows"),
            sampled_slots=view("sampled_slots"),
            sampling={name: view(name) for name in layout.sampling},
        )

    def with_tokens_of(self, sampled: Tensor) -> DeviceInputs:
        """The inputs with all token ids. sampled: int32 [slots]"""
        slots = self.previous_slots
        previous = sampled.index_select(0, slots.clamp(min=0))
        # A row that could not be sampled has a negative id, and its sequence ends when the host hears of it.
        token_ids = torch.where(slots < 0, self.inputs.token_ids, previous).clamp_(min=0)
        return replace(self.inputs, token_ids=token_ids)
