from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.engine.sequence import Sequence
from tests.unit.samplers import every_sampler, make_sampler
from tests.unit.sampling_oracle import adjusted, sequence

__all__ = ["every_sampler"]  # a fixture

VOCAB = 12
token = st.integers(0, VOCAB - 1)
sequences = st.builds(
    sequence,
    prompt=st.lists(token, min_size=1, max_size=8).map(tuple),
    generated=st.lists(token, max_size=12).map(tuple),
    repetition_penalty=st.sampled_from([1.0, 0.6, 1.0, 1.8]),
    presence_penalty=st.sampled_from([0.0, -2.0, 1.25]),
    frequency_penalty=st.sampled_from([0.0, -0.5, 0.75]),
    logit_bias=st.dictionaries(token, st.floats(-100, 100, width=32), max_size=3),
    min_tokens=st.integers(0, 12),
    stop_token_ids=st.lists(token, max_size=3).map(tuple),
)


def after(logits: torch.Tensor, *seqs: Sequence) -> torch.Tensor:
    changed = logits.clone()
    make_sampler(logits.shape[1]).adjust(changed, seqs)
    return changed


@given(seqs=st.lists(sequences, min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_a_batch_is_changed_as_the_definition_changes_each_row(seqs, seed):
    logits = torch.randn(len(seqs), VOCAB, generator=torch.Generator().manual_seed(seed)) * 5
    changed = after(logits, *seqs)
    for row, seq in enumerate(seqs):
        np.testing.assert_allclose(
            changed[row].numpy(), adjusted(logits[row].numpy(), seq), rtol=1e-6, atol=1e-5
        )


def test_repetition_penalty_counts_prompt_and_generated_tokens_once_and_lowers_either_sign():
    seq = sequence(prompt=(0, 0), generated=(1, 1, 1), repetition_penalty=2.0)
    assert after(torch.tensor([[4.0, -4.0, 4.0]]), seq).tolist() == [[2.0, -8.0, 4.0]]


def test_presence_and_frequency_penalties_ignore_the_prompt():
    seq = sequence(prompt=(0, 0), generated=(1, 1, 1, 2), presence_penalty=0.5, frequency_penalty=1.0)
    assert after(torch.zeros(1, 3), seq).tolist() == [[0.0, -3.5, -1.5]]


def test_repetition_penalty_sees_the_biased_logit():
    seq = sequence(prompt=(0,), logit_bias={0: -3.0}, repetition_penalty=2.0)
    assert after(torch.tensor([[1.0, 0.0]]), seq).tolist() == [[-4.0, 0.0]]


def test_a_forbidden_stop_token_stays_forbidden_under_bias_and_penalties():
    raised = {"logit_bias": {1: 100.0}, "repetition_penalty": 0.5, "presence_penalty": -2.0}
    seq = sequence(prompt=(1,), generated=(1,), stop_token_ids=(1,), min_tokens=2, **raised)
    assert after(torch.zeros(1, 2), seq).tolist() == [[0.0, -torch.inf]]


def test_rows_that_ask_for_nothing_stay_bitwise_the_same():
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    changed = after(logits, sequence(), sequence(logit_bias={1: 2.0}), sequence(generated=(1, 2)))
    assert torch.equal(changed[[0, 2]], logits[[0, 2]])
    assert changed[1].tolist() != logits[1].tolist()
