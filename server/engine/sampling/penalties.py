"""What a request adds to and takes from its logits before a token is chosen.

The order is vLLM's: logit_bias, min_tokens, repetition_penalty, then presence_penalty and frequency_penalty.
Token counts are taken from the sequence at each step, so there is no state to keep beside `Sequence.token_ids`.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.engine.sequence import Sequence

_Entry = tuple[int, NDArray[np.int64], NDArray[np.float32]]
"""A row, some token ids (each once), and a number for each."""


def adjust_logits(logits: Tensor, seqs: Seq[Sequence]) -> None:
    """Changes logits [S, V] (float32) in place, only in rows that ask for it; row i belongs to seqs[i].

    An id beyond V has no logit, so a bias on it or its being a stop token changes nothing.
    """
    if found := _gather(_bias(seqs), logits):
        rows, ids, bias = found
        logits.index_put_((rows, ids), bias, accumulate=True)
    if found := _gather(_early_stops(seqs), logits):
        rows, ids, forbidden = found
        logits.index_put_((rows, ids), forbidden)
    if found := _gather(_repetition(seqs), logits):
        rows, ids, penalty = found
        before = logits[rows, ids]
        logits.index_put_((rows, ids), torch.where(before > 0, before / penalty, before * penalty))
    if found := _gather(_presence_and_frequency(seqs), logits):
        rows, ids, penalty = found
        logits.index_put_((rows, ids), -penalty, accumulate=True)


def _bias(seqs: Seq[Sequence]) -> Iterator[_Entry]:
    for row, seq in enumerate(seqs):
        if bias := seq.params.logit_bias:
            yield row, _ids(list(bias)), np.array(list(bias.values()), dtype=np.float32)


def _early_stops(seqs: Seq[Sequence]) -> Iterator[_Entry]:
    for row, seq in enumerate(seqs):
        if seq.num_generated < seq.params.min_tokens:
            ids = np.unique(_ids(list(seq.params.stop_token_ids)))
            yield row, ids, np.full(len(ids), -np.inf, dtype=np.float32)


def _repetition(seqs: Seq[Sequence]) -> Iterator[_Entry]:
    """Over prompt and generated tokens alike, as in transformers and vLLM (Keskar et al., "CTRL", 2019)."""
    for row, seq in enumerate(seqs):
        if seq.params.repetition_penalty != 1.0:
            ids = np.unique(_ids(seq.token_ids))
            yield row, ids, np.full(len(ids), seq.params.repetition_penalty, dtype=np.float32)


def _presence_and_frequency(seqs: Seq[Sequence]) -> Iterator[_Entry]:
    """Over generated tokens only: OpenAI's API reference, "Frequency and presence penalties"."""
    for row, seq in enumerate(seqs):
        params = seq.params
        if params.presence_penalty or params.frequency_penalty:
            ids, counts = np.unique(_ids(seq.token_ids[seq.num_prompt_tokens :]), return_counts=True)
            yield row, ids, (params.presence_penalty + params.frequency_penalty * counts).astype(np.float32)


def _ids(token_ids: list[int]) -> NDArray[np.int64]:
    return np.array(token_ids, dtype=np.int64)


def _gather(entries: Iterator[_Entry], logits: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """All entries as three flat tensors (row, id, number) on the logits' device; None if there are none."""
    rows, ids, numbers = [], [], []
    for row, row_ids, row_numbers in entries:
        known = row_ids < logits.shape[1]
        rows.append(np.full(known.sum(), row, dtype=np.int64))
        ids.append(row_ids[known])
        numbers.append(row_numbers[known])
    if not rows:
        return None
    flat = (np.concatenate(part) for part in (rows, ids, numbers))
    row_index, id_index, number = (torch.from_numpy(part).to(logits.device) for part in flat)
    return row_index, id_index, number
