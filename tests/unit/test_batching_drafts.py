"""Guessed tokens in the scheduler's steps: when there is room for them, and what becomes of them.

The simulated engine's guesses are right up to a token that the history picks.
"""

from __future__ import annotations

import pytest

from server.engine.sampling.types import SampledToken
from server.engine.types import FinishReason, SequenceOutput, TokenLogprob
from tests.unit.engine_simulation import Engine, generate_alone, make_engine, make_request


def drafts(engine: Engine) -> list[int]:
    """Guessed tokens of each sequence of the next step, which is then carried out."""
    return [len(scheduled.draft) for scheduled in engine.step().sequences]


def step_with(engine: Engine, guess: tuple[int, ...], sampled: list[SampledToken]) -> list[SequenceOutput]:
    """The outputs of a step in which the only sequence has this guess, and `sampled` comes out."""
    engine.speculator.next_guess = guess
    batch = engine.scheduler.schedule()
    assert [scheduled.draft for scheduled in batch.sequences] == [guess]
    return engine.scheduler.update(batch, sampled)


def tokens(*ids: int) -> list[SampledToken]:
    return [SampledToken(token_id=token_id, logprob=TokenLogprob(token_id, -0.5, [])) for token_id in ids]


def test_guesses_take_the_rows_that_are_left_of_a_small_step_the_first_to_arrive_first() -> None:
    engine = make_engine(max_draft_tokens=4)
    engine.add(make_request("a", [1, 2], max_tokens=50))
    assert drafts(engine) == [3], "two rows are the prompt's"
    assert drafts(engine) == [4]
    engine.add(make_request("b", [3], max_tokens=50))
    assert drafts(engine) == [3, 0]
    for request_id in "cde":
        engine.add(make_request(request_id, [4], max_tokens=50))
    assert drafts(engine) == [0, 0, 0, 0, 0]
    engine.scheduler.abort("a")
    assert drafts(engine) == [1, 0, 0, 0]


def test_there_are_no_guesses_beside_a_chunk_that_samples_nothing() -> None:
    engine = make_engine(max_draft_tokens=9, long_prefill_threshold=4)
    engine.add(make_request("a", range(10)))
    assert drafts(engine) == [0]
    assert drafts(engine) == [0]
    assert drafts(engine) == [3]


def test_a_step_with_guesses_keeps_to_the_token_budget() -> None:
    engine = make_engine(max_draft_tokens=9, max_num_batched_tokens=4, max_num_seqs=2)
    engine.add(make_request("a", [1], max_tokens=50))
    assert drafts(engine) == [3]


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 7])
def test_no_more_is_guessed_than_may_still_be_generated(max_tokens: int) -> None:
    engine = make_engine(max_draft_tokens=9)
    engine.add(make_request("a", [1, 2], max_tokens=max_tokens))
    assert drafts(engine) == [min(8, max_tokens - 1)]
    context = make_engine(max_draft_tokens=9, max_model_len=2 + max_tokens)
    context.add(make_request("a", [1, 2], max_tokens=50))
    assert drafts(context) == [min(8, max_tokens - 1)]


def test_without_a_free_block_nothing_is_guessed_and_nobody_is_preempted() -> None:
    engine = make_engine(num_blocks=(4,), max_draft_tokens=3, max_num_seqs=2, max_num_batched_tokens=32)
    engine.add(make_request("a", [1] * 7, max_tokens=9))
    engine.add(make_request("b", [2] * 7, max_tokens=1))
    engine.step()
    assert engine.num_draft_tokens == 0
    engine.add(make_request("c", [3] * 7, max_tokens=1))
    assert drafts(engine) == [0, 0]
    engine.run()
    assert engine.num_preemptions == 0
    assert engine.num_draft_tokens > 0
    assert engine.generated("a") == generate_alone(make_request("a", [1] * 7, max_tokens=9), 16)[0]


def test_tokens_are_taken_up_to_the_first_that_was_guessed_wrong() -> None:
    engine = make_engine(max_draft_tokens=3)
    seq = engine.add(make_request("a", [1], max_tokens=50, logprobs=0))
    [output] = step_with(engine, (4, 5, 6), tokens(4, 5, 0, 3))
    assert output.token_ids == [4, 5, 0]
    assert [logprob.token_id for logprob in output.logprobs or []] == [4, 5, 0]
    assert (seq.token_ids, seq.num_computed) == ([1, 4, 5, 0], 3)
    [output] = step_with(engine, (4, 5, 6), tokens(4, 5, 6, 3))
    assert output.token_ids == [4, 5, 6, 3]
    assert (seq.num_tokens, seq.num_computed) == (8, 7)
    [output] = step_with(engine, (4, 5), tokens(1, 4, 5))
    assert output.token_ids == [1]
    counts = engine.scheduler.take_counts()
    assert (counts.num_drafts, counts.num_draft_tokens, counts.num_accepted_tokens) == (3, 8, 5)


def test_a_stop_token_ends_a_sequence_in_the_midst_of_a_right_guess() -> None:
    engine = make_engine(max_draft_tokens=3)
    engine.add(make_request("a", [1], max_tokens=50, stop_token_ids=(5,), min_tokens=2))
    [output] = step_with(engine, (5, 5, 6), tokens(5, 5, 6, 3))
    assert output.token_ids == [5, 5], "the first came too early to end it"
    assert (output.finish_reason, output.stop_token_id) == (FinishReason.STOP, 5)
    assert engine.kv.usage() == {"full": 0.0}


def test_a_row_after_a_wrong_guess_may_be_bad() -> None:
    engine = make_engine(max_draft_tokens=3)
    engine.add(make_request("a", [1], max_tokens=50))
    bad = SampledToken(token_id=-1, error="NaN")
    [output] = step_with(engine, (4, 5), [*tokens(3, 5), bad])
    assert (output.token_ids, output.finish_reason) == ([3], None)


def test_a_bad_row_after_right_guesses_ends_its_sequence_in_the_next_step() -> None:
    engine = make_engine(max_draft_tokens=3)
    seq = engine.add(make_request("a", [1], max_tokens=50))
    bad = SampledToken(token_id=-1, error="NaN")
    [output] = step_with(engine, (4, 5), [*tokens(4), bad, bad])
    assert (output.token_ids, output.finish_reason) == ([4], None)
    assert seq.num_computed == 1, "the row is to come again"
    [output] = step_with(engine, (5,), [bad, bad])
    assert (output.token_ids, output.finish_reason, output.error) == ([], FinishReason.ERROR, "NaN")


def test_prompt_logprobs_leave_with_the_first_tokens() -> None:
    engine = make_engine(max_draft_tokens=9)
    engine.add(make_request("a", range(6), max_tokens=9, prompt_logprobs=0))
    engine.run()
    first, *later = engine.outputs["a"]
    assert len(first.prompt_logprobs or []) == 6
    assert all(output.prompt_logprobs is None for output in later)


def test_blocks_filled_by_right_guesses_can_be_found_and_those_of_wrong_ones_not() -> None:
    engine = make_engine(max_draft_tokens=12, block_size=2)
    engine.add(make_request("a", [1], max_tokens=50))
    step_with(engine, (4, 5, 6, 3, 2), tokens(4, 5, 6, 1, 1, 1))
    engine.scheduler.abort("a")
    assert engine.kv.find_cached_prefix(engine.add(make_request("right", [1, 4, 5, 6, 1, 1, 1, 1]))) == 4
    assert engine.kv.find_cached_prefix(engine.add(make_request("wrong", [1, 4, 5, 6, 3, 2, 1]))) == 4
    assert engine.kv.usage() == {"full": 0.0}
