"""Masks and ends against lists of all texts that a grammar has."""

from __future__ import annotations

import random
import time
from contextlib import suppress

import numpy as np
import pytest

from server.engine.grammar.state import GrammarState, set_token
from server.grammar_library import MAX_GRAMMAR_CHARS, GrammarError
from tests.unit.grammars import COMMA, END, EOS, LANGUAGES, PIECES, make_vocabulary, text_of

VOCABULARY = make_vocabulary()
STOPS = [(), (EOS,), (EOS, END), (END, COMMA)]
"""Control tokens and, in the last, one that is text as well."""


def rows(count):
    return list(np.full((count, 1), 0xFFFFFFFF, dtype=np.uint32))


def ids_in(mask):
    return {token_id for token_id in range(32) if mask[0] >> token_id & 1}


@pytest.mark.parametrize("stops", STOPS)
@pytest.mark.parametrize("language", LANGUAGES.values(), ids=LANGUAGES)
def test_masks_allow_what_some_text_goes_on_with_behind_every_guess(language, stops):
    compiled = VOCABULARY.compile(language.grammar)
    chance = random.Random(0)
    num_guessed = num_complete = 0
    for _ in range(60):
        state, generated = GrammarState(compiled, stops), []
        while len(text_of(generated)) < language.longest:
            allowed = sorted(language.allowed(text_of(generated), stops))
            if not allowed:
                break
            draft: list[int] = []
            for _ in range(chance.randrange(4)):
                likely = sorted(language.allowed(text_of(generated + draft), stops)) or [0]
                draft.append(chance.choice(likely) if chance.random() < 0.8 else chance.randrange(len(PIECES)))
            masks = rows(1 + len(draft))
            filled = state.fill_masks(draft, masks)
            for count in range(filled):
                expected = language.allowed(text_of(generated + draft[:count]), stops)
                assert ids_in(masks[count]) == expected, (generated, draft, count)
            if filled <= len(draft):
                wrong = draft[filled - 1]
                before = generated + draft[: filled - 1]
                assert (
                    wrong in stops
                    or wrong not in language.allowed(text_of(before), stops)
                    or language.is_complete(text_of([*before, wrong]))
                ), "a guess that matches has no mask"
            num_guessed += filled - 1
            token_id = chance.choice(allowed)
            completes = state.move_over(token_id)
            if token_id in stops:
                assert not completes
                break
            generated.append(token_id)
            assert completes == language.is_complete(text_of(generated))
            if completes:
                num_complete += 1
                break
    assert num_guessed > 20
    # A walk along a list mostly meets a stop token before it is full.
    assert num_complete > 5 or language is LANGUAGES["open"] or (language is LANGUAGES["list"] and stops)


def test_a_grammar_that_counts_tokens_and_cannot_go_back_forgets_guesses_too():
    compiled = VOCABULARY.compile('start: x "c"\nx[max_tokens=3]: /[ab]*/')
    with_guesses, without = GrammarState(compiled, (EOS,)), GrammarState(compiled, (EOS,))
    for token_id in (3, 6, 4):
        masks, expected = rows(3), rows(1)
        with_guesses.fill_masks((3, 3), masks)
        without.fill_masks((), expected)
        assert ids_in(masks[0]) == ids_in(expected[0])
        assert with_guesses.move_over(token_id) == without.move_over(token_id)


def test_a_token_that_does_not_match_is_an_error_of_its_state_alone():
    compiled = VOCABULARY.compile(LANGUAGES["choices"].grammar)
    bad, good = GrammarState(compiled, ()), GrammarState(compiled, ())
    with pytest.raises(GrammarError):
        bad.move_over(4)
    with pytest.raises(GrammarError):
        bad.fill_masks((), rows(1))
    assert good.move_over(6) is False


def test_ids_beyond_the_mask_are_passed_over():
    mask = np.zeros(1, dtype=np.uint32)
    set_token(mask, 31, allowed=True)
    set_token(mask, 32, allowed=True)
    assert ids_in(mask) == {31}
    set_token(mask, 31, allowed=False)
    assert ids_in(mask) == set()


@pytest.mark.parametrize(
    "grammar",
    [
        "",
        "start: (",
        'start: "a',
        "start: other",
        "start: /(?<=x)a/",
        "start: <nothing>",
        "{",
        '{"grammars": []}',
        '{"grammars": [{"json_schema": {"type": "foo"}}]}',
        '{"grammars": [{"json_schema": {"uniqueItems": true}}]}',
        'start: "a" // \0',
        "start: " + "(" * 60_000 + '"a"' + ")" * 60_000,
        "//" + "x" * MAX_GRAMMAR_CHARS,
    ],
    ids=lambda grammar: grammar[:40],
)
def test_what_is_no_grammar_is_refused(grammar):
    with pytest.raises(GrammarError):
        VOCABULARY.compile(grammar)


def test_each_mask_of_a_hostile_grammar_takes_bounded_time_or_is_an_error():
    # A lexer without limits would have a state for every set of places at which an "a" was in 900 letters.
    matcher = VOCABULARY.compile("start: /((a|b)*a(a|b){900}c)+/")
    mask = np.zeros(1, dtype=np.uint32)
    chance = random.Random(0)
    longest = 0.0
    with suppress(GrammarError):
        for _ in range(20_000):
            started = time.perf_counter()
            matcher.fill_mask(mask.ctypes.data, mask.nbytes)
            longest = max(longest, time.perf_counter() - started)
            matcher.consume([chance.choice((3, 4))])
    assert longest < 0.5
