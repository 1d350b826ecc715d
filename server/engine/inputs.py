"""Turns a scheduled batch into the arrays that one forward pass reads.

Everything is numpy on the host: a back end moves what it needs to its device once per step. T is the number of
tokens in the step, B the number of sequences, R the number of rows whose hidden state is asked for.

    sequences        |--- s0 (3 new) ---|- s1 (1) -|--- s2 (2 new) ---|
    token_ids        t5   t6   t7        t9         t0   t1              [T]
    previous_rows    -1   -1   -1        -1         -1   -1              [T]
    query_start      0                   3          4                 6  [B+1]
    seq_lens         8                   10         2                    [B]
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from server.engine.batch import ScheduledSequence
from server.engine.kv_cache.block_pool import NULL_BLOCK

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where one KV group's layers find and put the keys and values of a step."""

    query_start: Int32Array
    """[B+1]: sequence b's new tokens are rows query_start[b] .. query_start[b+1]-1."""
    seq_lens: Int32Array
    """[B]: tokens of each sequence once this step is done."""
    block_table: Int32Array
    """[B, blocks]: block of positions [i * block_size, (i+1) * block_size); 0 where there is none."""
    slot_mapping: Int64Array
    """[T]: block * block_size + offset at which each new token's keys and values are stored."""
    block_size: int


@dataclass(frozen=True, slots=True)
class ModelInputs:
    token_ids: Int64Array
    """[T]; 0 where the token is known on the device alone."""
    previous_rows: Int32Array
    """[T]: which of the tokens that the step before sampled, in its batch's order, each of these is; -1 where
    token_ids has it."""
    positions: Int64Array
    """[T]"""
    output_rows: Int64Array
    """[R]: rows whose hidden state is wanted: first the sampled ones in batch order, then those that predict
    prompt tokens."""
    attention: tuple[AttentionMetadata, ...]
    """One for each KV group."""


@dataclass(frozen=True, slots=True)
class PromptRows:
    """The rows of one sequence in this step that predict tokens of its prompt."""

    scheduled: ScheduledSequence
    first_position: int
    """Row k is at position first_position + k and predicts the prompt token after it."""
    count: int


def missing_prompt_rows(scheduled: ScheduledSequence) -> PromptRows | None:
    """Which of this step's rows (perhaps none) give entries that the sequence's prompt_logprobs lack.

    None if the sequence wants no such entries, or no more.
    """
    seq = scheduled.seq
    # The prompt's logprobs leave with the first token; a sequence recomputed after that needs them no more.
    if seq.params.prompt_logprobs is None or seq.num_generated > 0:
        return None
    # The entry of token p comes from the row of p - 1; entry 0 is None.
    first = max(scheduled.start, len(seq.prompt_logprobs) - 1, 0)
    end = min(scheduled.start + scheduled.num_new, seq.num_prompt_tokens - 1)
    return PromptRows(scheduled, first, max(0, end - first))


def build_inputs(
    sequences: SequenceOf[ScheduledSequence],
    prompt_rows: SequenceOf[PromptRows],
    num_groups: int,
    block_size: int,
) -> ModelInputs:
    """The forward pass's arrays for a non-empty batch whose KV blocks are allocated."""
    starts = np.array([scheduled.start for scheduled in sequences], dtype=np.int64)
    counts = np.array([scheduled.num_new for scheduled in sequences], dtype=np.int64)
    query_start = np.zeros(len(sequences) + 1, dtype=np.int32)
    np.cumsum(counts, out=query_start[1:])
    num_rows = int(query_start[-1])

    if num_rows == len(sequences):
        owner, positions = query_start[:-1], starts
    else:
        owner = np.repeat(np.arange(len(sequences), dtype=np.int32), counts)  # [T]: the sequence of each row
        positions = np.arange(num_rows, dtype=np.int64) + (starts - query_start[:-1])[owner]
    token_ids, previous_rows = _tokens(sequences, query_start, num_rows)

    output_rows = [_sampled_rows(sequences, query_start)]
    if prompt_rows:
        first_rows = dict(zip((scheduled.seq for scheduled in sequences), query_start.tolist(), strict=False))
        for rows in prompt_rows:
            first = first_rows[rows.scheduled.seq] + rows.first_position - rows.scheduled.start
            output_rows.append(np.arange(first, first + rows.count, dtype=np.int64))

    seq_lens = (starts + counts).astype(np.int32)
    num_blocks = -(-int(seq_lens.max()) // block_size)
    block, offset = np.divmod(positions, block_size)
    attention = []
    for block_table in _block_tables(sequences, num_groups, num_blocks):
        slots = block_table[owner, block].astype(np.int64) * block_size + offset
        attention.append(AttentionMetadata(query_start, seq_lens, block_table, slots, block_size))
    return ModelInputs(token_ids, previous_rows, positions, np.concatenate(output_rows), tuple(attention))


def null_inputs(counts: Int32Array, seq_lens: Int32Array, num_groups: int, block_size: int) -> ModelInputs:
    """A step for nothing but its costs, with all keys in the null block.

    counts: [B] new tokens of each sequence. seq_lens: [B] its tokens then. The last row of each is wanted.
    """
    query_start = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    num_rows = int(query_start[-1])
    metadata = AttentionMetadata(
        query_start=query_start,
        seq_lens=seq_lens,
        block_table=np.full((len(counts), -(-int(seq_lens.max()) // block_size)), NULL_BLOCK, dtype=np.int32),
        slot_mapping=np.zeros(num_rows, dtype=np.int64),
        block_size=block_size,
    )
    return ModelInputs(
        token_ids=np.zeros(num_rows, dtype=np.int64),
        previous_rows=np.full(num_rows, -1, dtype=np.int32),
        positions=np.concatenate(
            [np.arange(end - new, end, dtype=np.int64) for new, end in zip(counts, seq_lens, strict=True)]
        ),
        output_rows=(query_start[1:] - 1).astype(np.int64),
        attention=(metadata,) * num_groups,
    )


def _tokens(
    sequences: SequenceOf[ScheduledSequence], query_start: Int32Array, num_rows: int
) -> tuple[Int64Array, Int32Array]:
    """token_ids and previous_rows, both [T]."""
    previous = np.array([scheduled.previous_row for scheduled in sequences], dtype=np.int32)
    if num_rows == len(sequences):
        newest = [
            scheduled.seq.token_ids[scheduled.start] if scheduled.previous_row < 0 else 0
            for scheduled in sequences
        ]
        return np.array(newest, dtype=np.int64), previous
    token_ids: list[int] = []
    for scheduled in sequences:
        if scheduled.previous_row < 0:
            token_ids += scheduled.seq.token_ids[scheduled.start : scheduled.start + scheduled.num_new]
            token_ids += scheduled.draft
        else:
            token_ids.append(0)
    previous_rows = np.full(num_rows, -1, dtype=np.int32)
    previous_rows[query_start[:-1]] = previous  # where it is not -1, that row is all there is of its sequence
    return np.array(token_ids, dtype=np.int64), previous_rows


def _sampled_rows(sequences: SequenceOf[ScheduledSequence], query_start: Int32Array) -> Int64Array:
    """The last rows of each sequence that samples, as many as it samples."""
    counts = np.array([scheduled.samples + len(scheduled.draft) for scheduled in sequences], dtype=np.int64)
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1]), dtype=np.int64) + np.repeat(query_start[1:] - ends, counts)


def _block_tables(
    sequences: SequenceOf[ScheduledSequence], num_groups: int, num_blocks: int
) -> list[Int32Array]:
    """[B, num_blocks] of each group, of tables that may be longer or shorter, but not differ among groups.

    One copy for all: a table has hundreds of entries.
    """
    tables = [scheduled.seq.block_tables for scheduled in sequences]
    lengths = np.array([len(table[0]) for table in tables], dtype=np.int32)
    columns = np.arange(max(num_blocks, int(lengths.max())), dtype=np.int32)
    is_used = columns < lengths[:, None]
    padded = []
    for group in range(num_groups):
        block_table = np.full(is_used.shape, NULL_BLOCK, dtype=np.int32)
        block_table[is_used] = np.frombuffer(b"".join([table[group] for table in tables]), dtype=np.int32)
        padded.append(np.ascontiguousarray(block_table[:, :num_blocks]))
    return padded
