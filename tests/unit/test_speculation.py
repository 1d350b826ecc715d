"""What is guessed from a sequence's own tokens, and when."""

from __future__ import annotations

import random

import pytest

from server.engine.speculation import NgramSpeculator
from tests.unit.engine_simulation import make_sequence


def grown(speculator: NgramSpeculator, prompt: list[int]) -> tuple[int, ...]:
    """The guess after `prompt` where guesses have been right often enough to be long."""
    seq = make_sequence("a", prompt)
    speculator.propose(seq, 1)
    speculator.record(seq, num_drafted=8, num_accepted=8)
    return speculator.propose(seq, 4)


def test_what_followed_the_newest_tokens_before_is_guessed() -> None:
    assert grown(NgramSpeculator(4), [1, 2, 3, 4, 5, 6, 7, 9, 1, 2, 3]) == (4, 5, 6, 7)


def test_the_last_occurrence_counts() -> None:
    assert grown(NgramSpeculator(4), [1, 2, 3, 4, 4, 4, 4, 1, 2, 3, 5, 6, 7, 8, 1, 2, 3]) == (5, 6, 7, 8)


def test_an_occurrence_of_three_tokens_is_preferred_to_a_later_one_of_two() -> None:
    assert grown(NgramSpeculator(4), [1, 2, 3, 4, 5, 6, 7, 0, 2, 3, 9, 9, 9, 9, 1, 2, 3]) == (4, 5, 6, 7)
    assert grown(NgramSpeculator(4), [0, 2, 3, 9, 8, 7, 6, 1, 2, 3]) == (9, 8, 7, 6)


@pytest.mark.parametrize("period", [1, 2, 3])
def test_a_loop_goes_round(period: int) -> None:
    loop = list(range(10, 10 + period))
    ids = (loop * 12)[: 3 * period + 2]
    expected = tuple((loop * 12)[len(ids) : len(ids) + 4])
    assert grown(NgramSpeculator(4), [7, 8, *ids]) == expected


@pytest.mark.parametrize("prompt", [[], [1], [1, 2], [1, 2, 3], list(range(50)), [*range(50), 0]])
def test_nothing_is_guessed_where_nothing_repeats(prompt: list[int]) -> None:
    assert grown(NgramSpeculator(4), prompt) == ()


def test_what_is_looked_up_is_what_a_search_through_all_tokens_finds() -> None:
    chance = random.Random(1)
    speculator = NgramSpeculator(3)
    seq = make_sequence("a", [chance.randrange(4) for _ in range(5)])
    num_guesses = 0
    for _ in range(300):
        guess = speculator.propose(seq, 1)
        ids, expected = seq.token_ids, ()
        for size in (3, 2):
            ends = [end for end in range(size, len(ids)) if ids[end - size : end] == ids[-size:]]
            if ends and not expected:
                expected = (ids[ends[-1]],)
        assert guess == expected
        num_guesses += bool(guess)
        if guess:
            speculator.record(seq, 1, 1)
        seq.token_ids += [chance.randrange(4) for _ in range(chance.randrange(1, 4))]
    assert num_guesses > 200


def test_guesses_grow_while_they_are_right_and_shrink_to_what_was_right() -> None:
    speculator = NgramSpeculator(8)
    seq = make_sequence("a", [5] * 20)
    lengths = []
    for num_wrong in (0, 0, 0, 0, 5, 0):
        lengths.append(len(speculator.propose(seq, 8)))
        speculator.record(seq, lengths[-1], lengths[-1] - num_wrong)
        seq.token_ids.append(5)
    assert lengths == [1, 2, 4, 8, 8, 4]
    assert len(speculator.propose(seq, 3)) == 3


def test_wrong_guesses_become_rare_and_a_right_one_makes_up_for_them() -> None:
    speculator = NgramSpeculator(8)
    seq, other = make_sequence("a", [5] * 20), make_sequence("b", [5] * 20)
    guessed_at = []
    for position in range(300):
        if speculator.propose(seq, 8):
            guessed_at.append(position)
            speculator.record(seq, 1, 0)
        seq.token_ids.append(5)
    assert guessed_at == [0, 2, 6, 14, 30, 62, 126, 190, 254]
    assert len(speculator.propose(other, 8)) == 1, "each sequence for itself"
    seq.token_ids += [5] * 64
    assert len(speculator.propose(seq, 8)) == 1
    speculator.record(seq, 1, 1)
    seq.token_ids.append(5)
    assert len(speculator.propose(seq, 8)) == 2


@pytest.mark.parametrize("limit", [-3, 0])
def test_no_room_means_no_guess(limit: int) -> None:
    assert NgramSpeculator(8).propose(make_sequence("a", [5] * 20), limit) == ()


def test_a_sequence_is_forgotten_whether_it_was_known_or_not() -> None:
    speculator = NgramSpeculator(8)
    seq = make_sequence("a", [5] * 20)
    speculator.forget(seq)
    speculator.propose(seq, 1)
    speculator.record(seq, 1, 0)
    assert speculator.propose(seq, 1) == ()
    speculator.forget(seq)
    assert speculator.propose(seq, 1) == (5,)
