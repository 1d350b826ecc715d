"""Masks of whole batches: which rows have one, what is in it, and that the samplers keep to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from server.engine.batch import ScheduledSequence
from server.engine.sampling.constraints import TokenConstraints
from server.engine.sampling.types import SampledToken
from tests.unit.grammars import EOS, LANGUAGES, PIECES, make_vocabulary
from tests.unit.samplers import every_sampler, make_sampler
from tests.unit.sampling_oracle import sequence

__all__ = ["every_sampler"]  # a fixture

VOCABULARY = make_vocabulary()
SIZE = len(PIECES)


def scheduled(seq, draft=(), samples=True):
    return ScheduledSequence(seq, seq.num_tokens - 1, 1 + len(draft), samples, draft)


def with_grammar(name, generated=(), **params):
    seq = sequence(generated=generated, grammar=LANGUAGES[name].grammar, stop_token_ids=(EOS,), **params)
    seq.compiled_grammar = VOCABULARY.compile(LANGUAGES[name].grammar)
    return seq


def ids_in(mask, size=SIZE):
    return {token_id for token_id in range(size) if mask[token_id // 32] >> token_id % 32 & 1}


def test_only_rows_that_ask_for_something_have_a_mask():
    batch = [
        scheduled(sequence(), draft=(3, 4)),
        scheduled(sequence(allowed_token_ids=(5, 7)), draft=(5,)),
        scheduled(sequence(bad_words=((3,),)), samples=False),
        scheduled(with_grammar("choices")),
    ]
    masks = TokenConstraints(SIZE).masks(batch)
    assert set(masks) == {3, 4, 5}
    assert ids_in(masks[3]) == ids_in(masks[4]) == {5, 7}
    assert ids_in(masks[5]) == LANGUAGES["choices"].allowed(b"", (EOS,))
    assert TokenConstraints(SIZE).masks(batch[:1]) == {}


def test_a_bad_word_loses_its_last_token_behind_the_others_and_only_there():
    words = ((3,), (4, 5), (4, 4, 6))
    everything = set(range(SIZE))
    constraints = TokenConstraints(SIZE)
    for generated, forbidden in [
        ((), {3}),
        ((4,), {3, 5}),
        ((4, 4), {3, 5, 6}),
        ((5, 4, 4), {3, 5, 6}),
        ((4, 7), {3}),
    ]:
        seq = sequence(prompt=(4, 4), generated=generated, bad_words=words)
        (mask,) = constraints.masks([scheduled(seq)]).values()
        assert ids_in(mask) == everything - forbidden, "the prompt does not count"
    seq = sequence(bad_words=words)
    masks = constraints.masks([scheduled(seq, draft=(4, 4))])
    assert [ids_in(masks[row]) for row in range(3)] == [
        everything - {3},
        everything - {3, 5},
        everything - {3, 5, 6},
    ]


def test_all_kinds_hold_at_once():
    seq = with_grammar("choices", allowed_token_ids=(3, 6, EOS), bad_words=((6,),))
    (mask,) = TokenConstraints(SIZE).masks([scheduled(seq)]).values()
    assert ids_in(mask) == {3}


def test_the_tokens_that_the_scheduler_takes_move_the_grammar_and_its_end_is_noted():
    constraints = TokenConstraints(SIZE)
    seq = with_grammar("choices")
    item = scheduled(seq, draft=(6, 5))
    constraints.masks([item])
    taken = constraints.take([item], [SampledToken(6), SampledToken(5), SampledToken(-1)])
    assert taken == [SampledToken(6), SampledToken(5, completes=True), SampledToken(-1)]

    other = with_grammar("choices")
    item = scheduled(other, draft=(6, 5))
    constraints.masks([item])
    constraints.take([item], [SampledToken(3), SampledToken(5), SampledToken(-1)])
    other.token_ids.append(3)
    (mask,) = constraints.masks([scheduled(other)]).values()
    assert ids_in(mask) == LANGUAGES["choices"].allowed(b"a", (EOS,)), "the guess was wrong, and is forgotten"


def test_a_grammar_that_fails_ends_its_sequence_alone():
    constraints = TokenConstraints(SIZE)
    bad, good = with_grammar("choices"), with_grammar("choices")
    items = [scheduled(bad), scheduled(good)]
    constraints.masks(items)
    first, second = constraints.take(items, [SampledToken(4), SampledToken(3)])
    assert first.token_id == -1
    assert first.error
    assert second == SampledToken(3)
    constraints.masks(items)
    assert constraints.take(items, [SampledToken(4), SampledToken(EOS)])[0].error == first.error


@pytest.mark.parametrize("size", [31, 32, 33, 100, 5000])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.2}])
def test_a_sampler_takes_what_the_mask_allows_as_if_nothing_else_were_there(size, params):
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn((2, size), generator=generator) * 3
    allowed = sorted(set(torch.randint(size, (7,), generator=generator).tolist()))
    seqs = [sequence(seed=seed, logprobs=2, **params) for seed in range(2)]
    constrained = [
        sequence(seed=seed, logprobs=2, allowed_token_ids=tuple(allowed), **params) for seed in range(2)
    ]
    alone = torch.full_like(logits, -torch.inf)
    alone[:, allowed] = logits[:, allowed]
    sampler = make_sampler(size)
    expected = [token.token_id for token in sampler.sample(alone, seqs)]
    masks = TokenConstraints(size).masks([scheduled(seq) for seq in constrained])
    raw = torch.log_softmax(logits, dim=1)
    sampled = sampler.sample(logits.clone(), constrained, masks)
    assert [token.token_id for token in sampled] == expected
    for row, token in enumerate(sampled):
        assert token.token_id in allowed
        assert token.logprob is not None
        assert np.isclose(token.logprob.logprob, raw[row, token.token_id], atol=1e-4), "of the model's logits"


def test_a_mask_concerns_its_row_alone():
    logits = torch.zeros((3, 40))
    logits[:, 7] = 5
    seqs = [sequence(temperature=0.0), sequence(temperature=0.0, bad_words=((7,),)), sequence(temperature=0.0)]
    masks = TokenConstraints(40).masks([scheduled(seq) for seq in seqs])
    assert [token.token_id for token in make_sampler(40).sample(logits, seqs, masks)] == [7, 0, 7]
