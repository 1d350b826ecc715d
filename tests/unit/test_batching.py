"""What the scheduler plans, in which order, and how sequences end."""

from __future__ import annotations

import pytest

from server.batching import NeverFitsError, SchedulerConfig
from server.engine.sampling.types import SampledToken
from server.engine.sequence import SequenceStatus
from server.engine.types import FinishReason, TokenLogprob
from tests.unit.engine_simulation import (
    Engine,
    generate_alone,
    make_engine,
    make_request,
    make_sequence,
    next_token,
)


def planned(engine: Engine) -> list[tuple[str, int, int, bool]]:
    """(request id, start, new tokens, samples) of the next step, which is then carried out."""
    return [
        (scheduled.seq.request_id, scheduled.start, scheduled.num_new, scheduled.samples)
        for scheduled in engine.step().sequences
    ]


def sampled_by(prompt: list[int], count: int) -> list[int]:
    return generate_alone(make_request("", prompt, max_tokens=count), 1000)[0]


# --- order and budget --------------------------------------------------------------------------------------


def test_a_prompt_is_computed_in_chunks_and_samples_at_its_end() -> None:
    engine = make_engine(max_num_batched_tokens=8, long_prefill_threshold=5)
    engine.add(make_request("a", range(12)))
    assert [planned(engine) for _ in range(4)] == [
        [("a", 0, 5, False)],
        [("a", 5, 5, False)],
        [("a", 10, 2, True)],
        [("a", 12, 1, True)],
    ]


@pytest.mark.covers("K15")
def test_decodes_come_before_a_long_prefill_that_arrived_earlier() -> None:
    engine = make_engine(max_num_batched_tokens=8, long_prefill_threshold=6)
    engine.add(make_request("long", range(100, 140)))
    engine.add(make_request("short", [1, 2]))
    assert planned(engine) == [("long", 0, 6, False), ("short", 0, 2, True)]
    assert planned(engine) == [("short", 2, 1, True), ("long", 6, 6, False)]


@pytest.mark.covers("K15")
def test_beside_running_streams_prompts_get_no_more_than_they_are_given() -> None:
    engine = make_engine(max_num_batched_tokens=20, long_prefill_threshold=10, max_num_seqs=10)
    engine.max_prefill_tokens = 3
    streams = "abcdefgh"
    for request_id in streams:
        engine.add(make_request(request_id, [1, 2]))
    engine.step()
    engine.add(make_request("long", range(100, 140)))
    engine.add(make_request("other", range(200, 240)))
    assert planned(engine)[len(streams) :] == [("long", 0, 3, False)]
    engine.max_prefill_tokens = 12
    assert planned(engine)[len(streams) :] == [("long", 3, 10, False), ("other", 0, 2, False)]


@pytest.mark.covers("K15")
def test_prompts_that_crowd_the_streams_get_more_in_proportion() -> None:
    engine = make_engine(max_num_batched_tokens=50, long_prefill_threshold=10, max_num_seqs=6)
    engine.max_prefill_tokens = 3
    for request_id in "ab":
        engine.add(make_request(request_id, [1, 2]))
    engine.step()
    for request_id in ("w", "x", "y", "z", "no seat"):
        engine.add(make_request(request_id, range(100, 140)))
    # Four prompts have seats beside two streams: 3 * 4 * 4 / 2 tokens.
    assert planned(engine)[2:] == [("w", 0, 10, False), ("x", 0, 10, False), ("y", 0, 4, False)]


def test_several_long_prompts_share_the_budget_in_order_of_arrival() -> None:
    engine = make_engine(max_num_batched_tokens=10, long_prefill_threshold=4)
    for number, request_id in enumerate("abc"):
        engine.add(make_request(request_id, range(100 * number, 100 * number + 20)))
    assert planned(engine) == [("a", 0, 4, False), ("b", 0, 4, False), ("c", 0, 2, False)]
    assert planned(engine) == [("a", 4, 4, False), ("b", 4, 4, False), ("c", 2, 2, False)]


def test_seats_bound_what_runs_and_the_rest_waits_in_order() -> None:
    engine = make_engine(max_num_seqs=2)
    for number, request_id in enumerate("abcd"):
        engine.add(make_request(request_id, [number, 9], max_tokens=2))
    assert [item[0] for item in planned(engine)] == ["a", "b"]
    assert (len(engine.scheduler.running), len(engine.scheduler.waiting)) == (2, 2)
    assert [item[0] for item in planned(engine)] == ["a", "b"]
    assert [item[0] for item in planned(engine)] == ["c", "d"]


@pytest.mark.covers("K03")
def test_the_head_of_the_queue_is_not_overtaken_by_one_that_would_fit() -> None:
    engine = make_engine(num_blocks=(10,))
    engine.add(make_request("running", range(16), max_tokens=3))
    engine.step()
    engine.add(make_request("big", range(100, 130)))
    engine.add(make_request("small", [7]))
    assert planned(engine) == [("running", 16, 1, True)]
    assert planned(engine) == [("running", 17, 1, True)]
    assert [item[0] for item in planned(engine)] == ["big"]


def test_a_prompt_that_the_running_leave_no_room_for_is_not_admitted_by_its_first_chunk() -> None:
    engine = make_engine(num_blocks=(10,), max_num_batched_tokens=8, max_num_seqs=4, long_prefill_threshold=8)
    engine.add(make_request("a", range(20), max_tokens=8))
    for _ in range(3):
        engine.step()
    engine.add(make_request("b", range(100, 130)))
    engine.run()
    assert engine.num_preemptions == 0


def test_a_prompt_waits_for_the_room_that_those_before_it_have_yet_to_fill() -> None:
    for windows in [(None,), (None, 6)]:
        engine = make_engine(windows, [40] * len(windows), max_num_batched_tokens=8, long_prefill_threshold=4)
        for number, length in enumerate((100, 90, 110)):
            engine.add(make_request(str(number), [number] * length, max_tokens=9))
        num_computed = 0
        while engine.scheduler.has_work():
            num_computed += engine.step().num_tokens
        assert engine.num_preemptions == 0
        assert num_computed == 100 + 90 + 110 + 3 * 8, "each token once"


def test_prompts_that_fit_side_by_side_are_computed_side_by_side() -> None:
    engine = make_engine(num_blocks=(40,), max_num_batched_tokens=16, long_prefill_threshold=4)
    for number in range(3):
        engine.add(make_request(str(number), [number] * 40))
    assert [item[0] for item in planned(engine)] == ["0", "1", "2"]


@pytest.mark.covers("K08")
def test_a_prefix_hit_shortens_the_prefill_and_is_reported() -> None:
    engine = make_engine()
    engine.add(make_request("a", range(12), max_tokens=1))
    engine.run()
    seq = engine.add(make_request("b", range(11), max_tokens=1))
    batch = engine.scheduler.schedule()
    assert [(item.start, item.num_new) for item in batch.sequences] == [(8, 3)]
    counts = engine.scheduler.take_counts()
    assert (counts.prefix_cache_queries, counts.prefix_cache_hits) == (11, 8)
    [output] = engine.scheduler.update(batch, engine.model.execute(batch))
    assert output.num_cached_tokens == seq.num_cached_tokens == 8
    assert output.scheduled_at == 2.0, "it was the second to be scheduled"


@pytest.mark.covers("K09")
@pytest.mark.parametrize("count", [2, 8, 128])
def test_equal_prompts_in_one_step_do_not_read_from_each_other(count: int) -> None:
    engine = make_engine(
        windows=(None, 6),
        num_blocks=(999, 999),
        max_num_seqs=count,
        max_num_batched_tokens=17 * count,
        long_prefill_threshold=99,
    )
    for number in range(count):
        engine.add(make_request(str(number), range(17)))
    assert [item[1:3] for item in planned(engine)] == [(0, 17)] * count
    engine.run()
    assert engine.num_cached_tokens == 0
    assert len({tuple(engine.generated(str(number))) for number in range(count)}) == 1


def test_the_limits_of_a_step_are_checked() -> None:
    with pytest.raises(ValueError, match=r"max_num_batched_tokens \(4\) must be at least max_num_seqs \(8\)"):
        SchedulerConfig(8, 4, 100, 4)
    with pytest.raises(ValueError, match="long_prefill_threshold must be at least 1, not 0"):
        SchedulerConfig(8, 8, 100, 0)


# --- preemption --------------------------------------------------------------------------------------------


def test_memory_is_taken_from_the_later_half_with_the_fewest_computed_tokens() -> None:
    engine = make_engine(num_blocks=(11,), enable_prefix_caching=False, max_num_batched_tokens=64)
    for request_id, length, max_tokens in [("a", 8, 4), ("b", 4, 30), ("c", 7, 30), ("d", 12, 30)]:
        engine.add(make_request(request_id, [ord(request_id)] * length, max_tokens))
    batch = engine.step()
    while not batch.preempted:
        batch = engine.step()
    [victim] = batch.preempted
    assert victim.request_id == "c", "of c and d, it has less to compute again"
    assert (victim.status, victim.num_computed, victim.block_tables) == (SequenceStatus.WAITING, 0, [])
    assert (victim.num_preemptions, victim.num_generated) == (1, 2), "the tokens stay"
    while len(engine.scheduler.waiting):
        assert engine.step().num_tokens > 0
    assert [item[0] for item in planned(engine)] == ["b", "c", "d"], "it is back in its place"


@pytest.mark.covers("K03")
def test_nothing_is_admitted_in_a_step_that_preempts_and_the_victim_comes_back_before_newer_ones() -> None:
    engine = make_engine(num_blocks=(6,), max_num_batched_tokens=64)
    engine.add(make_request("a", [1] * 8, max_tokens=14))
    engine.add(make_request("b", [2] * 8, max_tokens=12))
    batch = engine.step()
    engine.add(make_request("new", [3]))
    while not batch.preempted:
        assert "new" not in {item.seq.request_id for item in batch.sequences}
        batch = engine.step()
    assert [item.seq.request_id for item in batch.sequences] == ["a"]
    admitted: list[str] = []
    while engine.scheduler.has_work():
        admitted += [item.seq.request_id for item in engine.step().sequences if item.seq.request_id != "a"]
    assert admitted.index("b") < admitted.index("new")


@pytest.mark.covers("K03")
def test_a_victim_that_was_planned_leaves_the_plan_and_refunds_its_budget() -> None:
    engine = make_engine(num_blocks=(6,), max_num_batched_tokens=5, long_prefill_threshold=4, max_num_seqs=2)
    engine.add(make_request("long", [1] * 20, max_tokens=2))
    engine.add(make_request("short", [2], max_tokens=20))
    assert planned(engine) == [("long", 0, 4, False), ("short", 0, 1, True)]
    for step in range(1, 4):
        assert planned(engine) == [("short", step, 1, True), ("long", 4 * step, 4, False)]
    # The decode comes first and takes the sixth block, which the older prompt then lacks.
    batch = engine.step()
    assert [seq.request_id for seq in batch.preempted] == ["short"]
    assert [(item.seq.request_id, item.start, item.num_new) for item in batch.sequences] == [("long", 16, 4)]
    engine.run()
    assert engine.generated("short") == sampled_by([2], 20)
    assert engine.generated("long") == sampled_by([1] * 20, 2)


@pytest.mark.covers("K01")
def test_a_pool_for_exactly_one_sequence_of_the_longest_kind_serves_all_in_turn() -> None:
    engine = make_engine(num_blocks=(8,), max_num_seqs=4)
    requests = [make_request(str(number), [number] * 20, max_tokens=12) for number in range(4)]
    for request in requests:
        engine.add(request)
    engine.run()
    for request in requests:
        assert (engine.generated(request.request_id), FinishReason.LENGTH) == generate_alone(request, 32)


@pytest.mark.covers("K01")
def test_32_requests_on_a_pool_for_3_generate_what_they_generate_alone() -> None:
    engine = make_engine(windows=(None, 8), num_blocks=(15, 15), max_num_seqs=8)
    requests = [
        make_request(str(number), [number % 5] * (3 + number % 6), max_tokens=12) for number in range(32)
    ]
    for request in requests:
        engine.add(request)
    engine.run()
    for request in requests:
        assert engine.generated(request.request_id) == generate_alone(request, 1000)[0]
    assert engine.num_preemptions > 0


@pytest.mark.covers("R19")
def test_a_sequence_that_outgrows_the_whole_pool_through_a_bug_ends_instead_of_hanging(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(num_blocks=(4,), max_num_batched_tokens=20, long_prefill_threshold=20)
    monkeypatch.setattr(engine.scheduler, "_max_sequence_tokens", 1000)
    engine.add(make_request("grows", [1] * 10, max_tokens=50))
    engine.add(make_request("never", [2] * 30))
    engine.add(make_request("at once", [3] * 17))
    engine.run()
    for request_id in ("grows", "never", "at once"):
        assert engine.finish_reason(request_id) is FinishReason.ERROR
        assert "KV cache cannot hold" in (engine.outputs[request_id][-1].error or "")
    assert engine.generated("grows") == generate_alone(make_request("grows", [1] * 10, max_tokens=7), 1000)[0]


# --- ends --------------------------------------------------------------------------------------------------


def test_a_stop_token_ends_a_sequence_and_is_named() -> None:
    tokens = sampled_by([3, 4], 20)
    stop = next(token for token in tokens if token != tokens[0])
    engine = make_engine()
    engine.add(make_request("a", [3, 4], max_tokens=20, stop_token_ids=(stop,)))
    engine.run()
    assert engine.generated("a") == tokens[: tokens.index(stop) + 1]
    assert engine.finish_reason("a") is FinishReason.STOP
    assert engine.outputs["a"][-1].stop_token_id == stop
    assert engine.outputs["a"][0].stop_token_id is None


def test_a_stop_token_before_min_tokens_does_not_end_a_sequence() -> None:
    tokens = sampled_by([3, 4], 20)
    engine = make_engine()
    engine.add(make_request("a", [3, 4], max_tokens=20, min_tokens=5, stop_token_ids=tuple(range(7))))
    engine.run()
    assert engine.generated("a") == tokens[:5]
    assert engine.finish_reason("a") is FinishReason.STOP


def test_max_tokens_the_context_and_the_pool_each_end_a_sequence_with_length() -> None:
    engine = make_engine(max_model_len=10)
    engine.add(make_request("max_tokens", range(5), max_tokens=3))
    engine.add(make_request("context", range(5), max_tokens=30))
    engine.run()
    small = make_engine(num_blocks=(2,))
    small.add(make_request("pool", range(5), max_tokens=30))
    small.run()
    assert [len(engine.generated("max_tokens")), engine.finish_reason("max_tokens")] == [3, FinishReason.LENGTH]
    assert [len(engine.generated("context")), engine.finish_reason("context")] == [5, FinishReason.LENGTH]
    assert [len(small.generated("pool")), small.finish_reason("pool")] == [3, FinishReason.LENGTH]


@pytest.mark.covers("R18", "R19")
@pytest.mark.parametrize(("num_blocks", "max_model_len"), [(2, 1000), (64, 8)])
def test_a_prompt_that_can_never_fit_is_refused_with_the_numbers(num_blocks: int, max_model_len: int) -> None:
    engine = make_engine(num_blocks=(num_blocks,), max_model_len=max_model_len)
    with pytest.raises(NeverFitsError, match=r"8 tokens, which must be 1 to 7: .* limited to 8"):
        engine.add(make_request("a", range(8)))
    with pytest.raises(NeverFitsError, match="0 tokens"):
        engine.add(make_request("a", []))
    assert not engine.scheduler.has_work()
    engine.add(make_request("a", range(7)))
    engine.run()
    assert len(engine.generated("a")) == 1


def test_an_id_in_use_is_refused_and_the_first_sequence_goes_on() -> None:
    engine = make_engine()
    engine.add(make_request("a", range(5)))
    with pytest.raises(ValueError, match="'a' is in use"):
        engine.add(make_request("a", range(6)))
    engine.run()
    assert len(engine.generated("a")) == 4
    engine.add(make_request("a", range(5)))


@pytest.mark.covers("E05", "K04")
def test_a_bad_row_ends_its_sequence_alone_and_leaves_nothing_in_the_prefix_cache() -> None:
    engine = make_engine(max_num_batched_tokens=64, long_prefill_threshold=8)
    engine.add(make_request("good", range(12)))
    engine.add(make_request("bad", range(50, 62)))
    engine.model.bad_rows.add("bad")
    engine.run()
    assert engine.finish_reason("bad") is FinishReason.ERROR
    assert engine.outputs["bad"][-1].error == "NaN"
    assert engine.generated("bad") == []
    assert engine.generated("good") == sampled_by(list(range(12)), 4)
    engine.add(make_request("again", range(50, 62)))
    assert planned(engine)[0][:2] == ("again", 0)


@pytest.mark.covers("K04", "K17")
def test_abort_frees_at_once_wherever_the_sequence_is_and_is_idempotent() -> None:
    engine = make_engine(max_num_seqs=1, long_prefill_threshold=4)
    running, waiting = engine.add(make_request("a", range(9))), engine.add(make_request("b", range(5)))
    engine.step()
    assert engine.scheduler.abort("b") is waiting
    assert engine.scheduler.abort("a") is running
    assert running.status is SequenceStatus.FINISHED
    assert engine.scheduler.abort("a") is None
    assert engine.scheduler.abort("never seen") is None
    assert not engine.scheduler.has_work()
    assert engine.kv.usage() == {"full": 0.0}
    engine.kv.check([])


@pytest.mark.covers("K04", "K17")
def test_a_preempted_sequence_can_be_aborted() -> None:
    engine = make_engine(num_blocks=(6,))
    for number, request_id in enumerate("ab"):
        engine.add(make_request(request_id, [number] * 8, max_tokens=14))
    batch = engine.step()
    while not batch.preempted:
        batch = engine.step()
    assert engine.scheduler.abort("b") is batch.preempted[0]
    engine.run()
    assert engine.finish_reason("a") is FinishReason.LENGTH


@pytest.mark.covers("K17")
def test_a_sequence_aborted_during_the_forward_pass_gives_no_output() -> None:
    engine = make_engine()
    engine.add(make_request("a", range(5)))
    engine.add(make_request("b", range(7)))
    engine.step(during=lambda: engine.scheduler.abort("a"))
    assert list(engine.outputs) == ["b"]
    engine.run()
    assert engine.generated("b") == sampled_by(list(range(7)), 4)


def test_results_that_do_not_match_the_batch_are_refused() -> None:
    engine = make_engine()
    engine.add(make_request("a", range(5)))
    batch = engine.scheduler.schedule()
    with pytest.raises(ValueError, match="0 sampled tokens"):
        engine.scheduler.update(batch, [])


# --- logprobs ----------------------------------------------------------------------------------------------


def test_logprobs_ride_on_their_token() -> None:
    engine = make_engine()
    engine.add(make_request("a", range(5)))
    batch = engine.scheduler.schedule()
    logprob = TokenLogprob(3, -0.5, [])
    [output] = engine.scheduler.update(batch, [SampledToken(token_id=3, logprob=logprob, error=None)])
    assert (output.token_ids, output.logprobs) == ([3], [logprob])


@pytest.mark.covers("K02")
@pytest.mark.parametrize("num_blocks", [64, 7])
def test_prompt_logprobs_leave_once_with_the_first_token_whatever_was_preempted(num_blocks: int) -> None:
    engine = make_engine(num_blocks=(num_blocks,), max_num_batched_tokens=8, max_num_seqs=3)
    prompts = {"a": [1] * 9, "b": [2] * 9, "c": [3] * 9}
    for request_id, prompt in prompts.items():
        engine.add(make_request(request_id, prompt, max_tokens=16, prompt_logprobs=0))
    engine.run()
    for request_id, prompt in prompts.items():
        first, *later = engine.outputs[request_id]
        assert first.prompt_logprobs is not None
        assert [item and item.token_id for item in first.prompt_logprobs] == [None, *prompt[1:]]
        assert all(output.prompt_logprobs is None for output in later)
    assert (engine.num_preemptions > 0) == (num_blocks == 7)


@pytest.mark.covers("K03")
@pytest.mark.parametrize("caching", [False, True])
def test_a_sequence_is_recomputed_from_all_its_tokens_after_preemption(caching: bool) -> None:
    engine = make_engine(num_blocks=(8,), enable_prefix_caching=caching)
    requests = [make_request(name, [number] * 8, max_tokens=14) for number, name in enumerate("ab")]
    for request in requests:
        engine.add(request)
    restarts = []
    while engine.scheduler.has_work():
        restarts += [
            (item.start, item.num_new, item.seq.num_generated)
            for item in engine.step().sequences
            if item.seq.num_preemptions and item.num_new > 1
        ]
    [(start, num_new, num_generated)] = restarts
    assert start + num_new == 8 + num_generated - 1, "all but the token that this step samples"
    assert start == (8 if caching else 0), "the other sequence took the tail of what was freed"
    for request in requests:
        first, *later = [
            (output.num_cached_tokens, output.scheduled_at) for output in engine.outputs[request.request_id]
        ]
        assert first == (0, float(request.request_id == "b") + 1), "as when it was first scheduled"
        assert set(later) == {(0, 0.0)}, "it was told before"
        assert engine.generated(request.request_id) == generate_alone(request, 1000)[0]


def test_next_token_of_the_simulation_depends_on_the_history() -> None:
    assert len({next_token(hash((0, number))) for number in range(50)}) > 3
    assert make_sequence("a", [1]).num_tokens == 1
