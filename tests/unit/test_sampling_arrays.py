from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.engine.batch import ScheduledSequence
from server.engine.sampling.arrays import (
    NOT_FINITE_ID,
    NOTHING_LEFT_ID,
    SAMPLING_ARRAYS,
    sampled_tokens,
    sampling_arrays,
)
from server.engine.sampling.rng import stream_of, uniform, uniforms
from server.engine.sampling.types import NOT_FINITE, NOTHING_LEFT, SampledToken
from server.engine.sequence import Sequence
from tests.unit.sampling_oracle import sequence


def scheduled(seq: Sequence, samples: bool = True, previous_row: int = -1) -> ScheduledSequence:
    # The newest token, be it known or in flight.
    start = seq.num_tokens - (previous_row < 0)
    return ScheduledSequence(seq, start, 1, samples, previous_row=previous_row)


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**31)), max_size=20))
def test_numbers_of_many_streams_are_those_of_each(pairs):
    streams, indices = [stream_of(seed) for seed, _ in pairs], [index for _, index in pairs]
    assert uniforms(streams, indices).tolist() == [uniform(*pair) for pair in pairs]


def test_the_largest_seed_at_the_first_index_warns_of_no_overflow():
    assert uniforms([stream_of(2**64 - 1)], [0]).tolist() == [uniform(2**64 - 1, 0)]


def test_a_row_for_each_sequence_that_samples():
    batch = [
        scheduled(sequence(seed=1, temperature=0.7, top_p=0.9, generated=(4, 5))),
        scheduled(sequence(seed=2), samples=False),
        scheduled(sequence(seed=3, top_k=40, min_p=0.1, temperature=1.5)),
    ]
    arrays = sampling_arrays(batch)
    assert {name: array.dtype for name, array in arrays.items()} == SAMPLING_ARRAYS
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "temperature": [0.7, 1.5],
        "top_p": [0.9, 1.0],
        "min_p": [0.0, 0.1],
        "top_k": [0, 40],
        "uniform": [uniform(1, 2), uniform(3, 0)],
    }


def test_a_token_in_flight_counts():
    [number] = sampling_arrays([scheduled(sequence(seed=9, generated=(7,)), previous_row=0)])["uniform"]
    assert number == uniform(9, 2)


def test_greedy_rows_have_no_temperature():
    greedy = [{"temperature": 0.0}, {"temperature": 1e-6}, {"temperature": 2.0, "top_k": 1}]
    arrays = sampling_arrays([scheduled(sequence(**params)) for params in greedy])
    assert not arrays["temperature"].any()


def test_a_batch_in_which_none_samples_has_empty_arrays():
    arrays = sampling_arrays([scheduled(sequence(), samples=False)])
    assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == {
        name: ((0,), dtype) for name, dtype in SAMPLING_ARRAYS.items()
    }


def test_ids_say_why_there_is_no_token():
    assert sampled_tokens([7, NOT_FINITE_ID, 0, NOTHING_LEFT_ID]) == [
        SampledToken(7),
        SampledToken(-1, error=NOT_FINITE),
        SampledToken(0),
        SampledToken(-1, error=NOTHING_LEFT),
    ]
