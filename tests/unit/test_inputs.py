"""From a scheduled batch to the arrays of a forward pass."""

from __future__ import annotations

from array import array

from server.engine.batch import ScheduledSequence
from server.engine.inputs import PromptRows, build_inputs, missing_prompt_rows
from server.engine.sequence import Sequence
from server.engine.types import GenerateRequest, SamplingParams


def sequence(token_ids: list[int], tables: list[list[int]], prompt_logprobs: int | None = None) -> Sequence:
    params = SamplingParams(max_tokens=8, seed=0, prompt_logprobs=prompt_logprobs)
    seq = Sequence.from_request(GenerateRequest(request_id="r", prompt_token_ids=token_ids, params=params))
    seq.block_tables = [array("i", table) for table in tables]
    return seq


def test_rows_positions_slots_and_tables_of_a_mixed_batch() -> None:
    chunk = sequence(list(range(10, 20)), [[5, 2, 9], [0, 7, 1]])
    decode = sequence([30, 31, 32], [[4], [6]])
    start = sequence([40, 41, 42, 43, 44], [[3, 8], [2, 3]])
    batch = [
        ScheduledSequence(decode, 2, 1, samples=True),
        ScheduledSequence(chunk, 6, 3, samples=False),
        ScheduledSequence(start, 0, 5, samples=True),
    ]
    inputs = build_inputs(batch, [], num_groups=2, block_size=4)
    assert inputs.token_ids.tolist() == [32, 16, 17, 18, 40, 41, 42, 43, 44]
    assert inputs.positions.tolist() == [2, 6, 7, 8, 0, 1, 2, 3, 4]
    assert inputs.output_rows.tolist() == [0, 8]
    full, sliding = inputs.attention
    assert full.query_start.tolist() == [0, 1, 4, 9]
    assert full.seq_lens.tolist() == [3, 9, 5]
    assert full.block_table.tolist() == [[4, 0, 0], [5, 2, 9], [3, 8, 0]]
    assert sliding.block_table.tolist() == [[6, 0, 0], [0, 7, 1], [2, 3, 0]]
    assert full.slot_mapping.tolist() == [18, 10, 11, 36, 12, 13, 14, 15, 32]
    assert sliding.slot_mapping.tolist() == [26, 30, 31, 4, 8, 9, 10, 11, 12]


def test_rows_for_prompt_logprobs_follow_the_sampling_rows() -> None:
    first = sequence(list(range(6)), [[1, 2]], prompt_logprobs=0)
    second = sequence(list(range(4)), [[3]])
    batch = [ScheduledSequence(first, 2, 4, samples=True), ScheduledSequence(second, 0, 4, samples=True)]
    inputs = build_inputs(batch, [PromptRows(batch[0], 3, 2)], num_groups=1, block_size=4)
    assert inputs.output_rows.tolist() == [3, 7, 1, 2]


def test_every_prompt_token_but_the_first_gets_one_row_over_the_chunks() -> None:
    seq = sequence(list(range(7)), [[1, 2]], prompt_logprobs=2)
    predicted = []
    for start, num_new in ((0, 3), (3, 3), (6, 1)):
        rows = missing_prompt_rows(ScheduledSequence(seq, start, num_new, samples=start == 6))
        assert rows is not None
        predicted += range(rows.first_position + 1, rows.first_position + 1 + rows.count)
        seq.prompt_logprobs = [None] * (predicted[-1] + 1)
    assert predicted == [1, 2, 3, 4, 5, 6]


def test_rows_are_not_asked_for_where_nobody_wants_them_or_they_were_delivered() -> None:
    plain = sequence([1, 2, 3], [[1]])
    assert missing_prompt_rows(ScheduledSequence(plain, 0, 3, samples=True)) is None
    recomputed = sequence([1, 2, 3], [[1]], prompt_logprobs=0)
    recomputed.token_ids.append(4)
    assert missing_prompt_rows(ScheduledSequence(recomputed, 0, 4, samples=True)) is None


def test_a_draft_follows_what_is_known_and_every_row_from_the_last_known_on_is_sampled() -> None:
    guessing = sequence([30, 31, 32], [[4, 7]])
    chunk = sequence([40, 41, 42, 43], [[3, 5]])
    batch = [
        ScheduledSequence(guessing, 2, 4, samples=True, draft=(50, 51, 52)),
        ScheduledSequence(chunk, 0, 3, samples=False),
        ScheduledSequence(chunk, 2, 3, samples=True, draft=(60,)),
    ]
    inputs = build_inputs(batch, [], num_groups=1, block_size=4)
    assert inputs.token_ids.tolist() == [32, 50, 51, 52, 40, 41, 42, 42, 43, 60]
    assert inputs.positions.tolist() == [2, 3, 4, 5, 0, 1, 2, 2, 3, 4]
    assert inputs.output_rows.tolist() == [0, 1, 2, 3, 8, 9]
    assert inputs.attention[0].seq_lens.tolist() == [6, 3, 5]
    assert inputs.attention[0].slot_mapping.tolist()[:4] == [18, 19, 28, 29]
