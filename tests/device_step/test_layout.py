"""A step's arrays in one buffer."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch

from server.engine.batch import ScheduledSequence
from server.engine.device_step.inputs import StepArrays
from server.engine.device_step.layout import StepLayout, StepShape
from server.engine.inputs import ModelInputs, build_inputs
from server.engine.sequence import Sequence
from server.engine.types import GenerateRequest, SamplingParams

SAMPLING = {"flag": np.dtype(np.bool_), "share": np.dtype(np.float32), "uniform": np.dtype(np.float64)}
STALE = 0x5A5A5A5A


def scheduled(num_tokens: int, start: int, tables: list[list[int]]) -> ScheduledSequence:
    params = SamplingParams(max_tokens=8, seed=0)
    request = GenerateRequest(
        request_id="r", prompt_token_ids=list(range(100, 100 + num_tokens)), params=params
    )
    seq = Sequence.from_request(request)
    seq.block_tables = [array("i", table) for table in tables]
    return ScheduledSequence(seq, start, num_tokens - start, samples=True)


def packed(
    layout: StepLayout, inputs: ModelInputs, previous_slot: int = 0, sampled_slot: int = 0
) -> tuple[StepArrays, int]:
    count = len(inputs.output_rows)
    sampling = {
        "flag": np.array([True, False, True][:count]),
        "share": np.array([0.1, 0.5, 0.7][:count], dtype=np.float32),
        "uniform": np.array([1 - 2.0**-53, 0.25, 0.125][:count]),
    }
    buffer = np.full(layout.num_words, STALE, dtype=np.int32)
    num_words = layout.pack(buffer, inputs, sampling, previous_slot, sampled_slot)
    assert (buffer[num_words:] == STALE).all(), "written, and not copied"
    device = torch.full((layout.num_words,), STALE, dtype=torch.int32)
    device[:num_words] = torch.from_numpy(buffer[:num_words])
    return StepArrays.of(device, layout, block_size=4, max_query_len=1, max_seq_len=32), num_words


def test_a_mixed_step_comes_out_as_it_went_in() -> None:
    batch = [scheduled(3, 2, [[4], [6]]), scheduled(9, 6, [[5, 2, 9], [0, 7, 1]])]
    inputs = build_inputs(batch, [], num_groups=2, block_size=4)
    inputs.previous_rows[0] = 1
    layout = StepLayout(StepShape.of(inputs), num_groups=2, max_blocks=8, sampling=SAMPLING)
    arrays, num_words = packed(layout, inputs, previous_slot=16, sampled_slot=0)
    assert arrays.inputs.token_ids.tolist() == [102, 106, 107, 108]
    assert arrays.inputs.positions.tolist() == [2, 6, 7, 8]
    assert arrays.previous_slots.tolist() == [17, -1, -1, -1]
    assert arrays.inputs.query_start.tolist() == [0, 1, 4]
    assert arrays.inputs.seq_lens.tolist() == [3, 9]
    assert arrays.output_rows.tolist() == [0, 3]
    assert arrays.sampled_slots.tolist() == [0, 1]
    for group, metadata in zip(arrays.inputs.groups, inputs.attention, strict=True):
        assert group.block_table.shape == (2, 8)
        assert group.block_table[:, :3].tolist() == metadata.block_table.tolist()
        assert group.slot_mapping.tolist() == metadata.slot_mapping.tolist()
    assert arrays.sampling["flag"].tolist() == [True, False]
    assert arrays.sampling["share"].tolist() == pytest.approx([0.1, 0.5])
    assert arrays.sampling["uniform"].tolist() == [1 - 2.0**-53, 0.25]
    assert num_words == layout.num_words - (8 - 3) * 2 * 2, "columns that no sequence has are not copied"


def test_rows_that_pad_a_step_see_themselves_in_the_null_block() -> None:
    batch = [scheduled(5, 4, [[3, 8]]), scheduled(2, 1, [[2]]), scheduled(4, 3, [[7]])]
    inputs = build_inputs(batch, [], num_groups=1, block_size=4)
    layout = StepLayout(StepShape.of_decodes(5), num_groups=1, max_blocks=8, sampling=SAMPLING)
    arrays, _ = packed(layout, inputs, sampled_slot=16)
    assert arrays.inputs.token_ids.tolist() == [104, 101, 103, 0, 0]
    assert arrays.inputs.positions.tolist() == [4, 1, 3, 0, 0]
    assert arrays.previous_slots.tolist() == [-1] * 5
    assert arrays.inputs.query_start.tolist() == [0, 1, 2, 3, 4, 5]
    assert arrays.inputs.seq_lens.tolist() == [5, 2, 4, 1, 1]
    assert arrays.output_rows.tolist() == [0, 1, 2, 4, 4], "whichever, for nobody reads them"
    assert arrays.sampled_slots.tolist() == [16, 17, 18, 19, 20]
    (group,) = arrays.inputs.groups
    assert group.block_table[:, :2].tolist() == [[3, 8], [2, 0], [7, 0], [0, 0], [0, 0]]
    assert group.slot_mapping.tolist() == [32, 9, 31, 0, 0]
    assert arrays.sampling["uniform"][3:].tolist() == [0.0, 0.0]


def test_the_last_sequence_that_pads_a_step_has_the_rows_that_are_left() -> None:
    batch = [scheduled(3, 2, [[4]]), scheduled(6, 3, [[5, 2]])]
    inputs = build_inputs(batch, [], num_groups=1, block_size=4)
    layout = StepLayout(StepShape(16, 4, 3), num_groups=1, max_blocks=8, sampling=SAMPLING)
    arrays, num_words = packed(layout, inputs)
    assert arrays.inputs.query_start.tolist() == [0, 1, 4, 5, 16]
    assert arrays.inputs.seq_lens.tolist() == [3, 6, 1, 11]
    assert arrays.inputs.positions.tolist() == [2, 3, 4, 5, 0, *range(11)]
    assert arrays.output_rows.tolist() == [0, 3, 15]
    (group,) = arrays.inputs.groups
    # The third column is there for the padding alone.
    assert group.block_table[:, :3].tolist() == [[4, 0, 0], [5, 2, 0], [0, 0, 0], [0, 0, 0]]
    assert group.slot_mapping.tolist() == [18, 23, 8, 9, *[0] * 12]
    assert num_words == layout.num_words - (8 - 3) * 4


def test_sequences_that_pad_a_full_step_have_no_rows() -> None:
    batch = [scheduled(3, 2, [[4]]), scheduled(6, 3, [[5, 2]])]
    inputs = build_inputs(batch, [], num_groups=1, block_size=4)
    layout = StepLayout(StepShape(4, 5, 4), num_groups=1, max_blocks=8, sampling=SAMPLING)
    arrays, _ = packed(layout, inputs)
    assert arrays.inputs.query_start.tolist() == [0, 1, 4, 4, 4, 4]
    assert arrays.inputs.seq_lens.tolist() == [3, 6, 1, 1, 1]
    assert arrays.inputs.positions.tolist() == [2, 3, 4, 5]
    assert arrays.output_rows.tolist() == [0, 3, 3, 3]


def test_tokens_of_the_step_before_take_their_place() -> None:
    batch = [scheduled(5, 4, [[3, 8]]), scheduled(2, 1, [[2]]), scheduled(4, 3, [[7]])]
    inputs = build_inputs(batch, [], num_groups=1, block_size=4)
    inputs.previous_rows[:] = [1, -1, 0]
    layout = StepLayout(StepShape.of(inputs), num_groups=1, max_blocks=8, sampling=SAMPLING)
    arrays, _ = packed(layout, inputs, previous_slot=2)
    sampled = torch.tensor([STALE, STALE, -1, 50], dtype=torch.int32)
    # -1: it could not be sampled, and must not be where the embedding is read.
    assert arrays.with_tokens_of(sampled).token_ids.tolist() == [50, 101, 0]


def test_where_an_array_lies_depends_on_the_shape_alone() -> None:
    layouts = [StepLayout(StepShape(6, 3, 2), 2, 5, SAMPLING) for _ in range(2)]
    assert layouts[0].fields == layouts[1].fields
    ends = 0
    for field in layouts[0].fields.values():
        assert field.first_word >= ends
        assert field.first_word % 4 == 0
        ends = field.first_word + field.num_words
