"""The sampler whose work on the logits is csrc/sampling.cpp: one native call for a whole batch.

Laws: those of sampler.py. Beside them:

1. No torch, here or in what is imported.
2. What is kept for a sequence is a function of the sequence, and goes when it goes.
3. A step's work in Python is some microseconds a row, whatever the vocabulary and the context.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from ctypes import byref
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from server.engine.backend.native_calls import LogprobsCall, SampleCall, SampleResult, SampleRow
from server.engine.sampling.rng import uniform
from server.engine.sampling.token_counts import TokenCounts
from server.engine.sampling.types import NOT_FINITE, NOTHING_LEFT, SampledToken, TokenMask, is_greedy
from server.engine.sequence import Sequence
from server.engine.types import PromptTokenLogprob, TokenLogprob

Logits = NDArray[np.float32]

_FEW = 256
"""So many candidates are sorted without more ado: at most 1024 (kParts)."""
_FAULTS = (None, NOT_FINITE, NOTHING_LEFT)
"""As csrc/sampling_calls.h numbers them."""


class NativeSampler:
    """Chooses tokens below `vocab_size` that are not in `suppress_token_ids`.

    `library` has been declared by native_calls.py; `engine` is one of its engines, whose threads it borrows.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        engine: ctypes.c_void_p,
        vocab_size: int,
        suppress_token_ids: tuple[int, ...],
    ) -> None:
        self._library = library
        self._engine = engine
        self._vocab_size = vocab_size
        self._suppressed = _known(suppress_token_ids, vocab_size)
        self._prepared: WeakKeyDictionary[Sequence, _PreparedRow] = WeakKeyDictionary()

    def sample(
        self, logits: Logits, seqs: Seq[Sequence], masks: Mapping[int, TokenMask] | None = None
    ) -> list[SampledToken]:
        """One token for each row of logits [S, V] (float32, contiguous, V >= vocab_size), which are changed.

        Row i belongs to seqs[i]. `seqs[i].num_generated` picks the random number.

        Args:
            masks: by row; what they do not allow is suppressed.
        """
        if not seqs:
            return []
        rows = (SampleRow * len(seqs))()
        for i, seq in enumerate(seqs):
            prepared = self._prepared.get(seq)
            if prepared is None:
                prepared = self._prepared[seq] = _PreparedRow(seq, self._vocab_size)
            rows[i] = prepared.at_step(seq)
        for i, mask in (masks or {}).items():
            rows[i].allowed = mask.ctypes.data
        results = (SampleResult * len(seqs))()
        top = _TopTable([min(max(row.num_top, 0), logits.shape[1]) + row.num_listed for row in rows])
        call = SampleCall(
            logits.ctypes.data,
            *logits.shape,
            self._vocab_size,
            *_address_and_length(self._suppressed),
            rows,
            _FEW,
            results,
            *top.fields,
        )
        self._library.gemma_sample(self._engine, byref(call))
        return [
            SampledToken(-1, error=_FAULTS[result.fault])
            if result.fault
            else SampledToken(result.token, None if seq.params.logprobs is None else top.logprob(i, result))
            for i, (seq, result) in enumerate(zip(seqs, results, strict=True))
        ]

    def gather_logprobs(self, logits: Logits, chosen: Seq[int], num_top: Seq[int]) -> list[PromptTokenLogprob]:
        """The log-softmax of logits [S, V] (float32, contiguous, left unchanged) at `chosen[i]` and at the
        `num_top[i]` likeliest, as `logprobs.prompt_logprobs` has it."""
        if not chosen:
            return []
        chosen_ids, counts = array("q", chosen), array("q", num_top)
        results = (SampleResult * len(chosen))()
        top = _TopTable([min(count, logits.shape[1]) for count in num_top])
        call = LogprobsCall(
            logits.ctypes.data,
            *logits.shape,
            chosen_ids.buffer_info()[0],
            counts.buffer_info()[0],
            results,
            *top.fields,
        )
        self._library.gemma_logprobs(self._engine, byref(call))
        return [
            PromptTokenLogprob(result.token, result.logprob, top.listed(i, result), result.rank)
            for i, result in enumerate(results)
        ]


class _PreparedRow:
    """A sequence's SampleRow. Its arrays live here, for ctypes keeps addresses only."""

    def __init__(self, seq: Sequence, vocab_size: int) -> None:
        params = seq.params
        bias = {token: value for token, value in params.logit_bias.items() if token < vocab_size}
        self._bias_ids, self._bias = array("i", bias), array("f", bias.values())
        self._stop_ids = _known(params.stop_token_ids, vocab_size)
        self._random = not is_greedy(params)
        self._counts: TokenCounts | None = None
        repeats = params.repetition_penalty != 1.0
        if repeats or params.presence_penalty or params.frequency_penalty:
            self._counts = TokenCounts(seq, vocab_size, with_prompt=repeats)
        self._row = SampleRow(
            temperature=params.temperature if self._random else 0.0,
            top_p=params.top_p,
            min_p=params.min_p,
            top_k=min(params.top_k, vocab_size),
            num_top=-1 if params.logprobs is None else params.logprobs,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
        )
        self._row.bias_ids, self._row.num_bias = _address_and_length(self._bias_ids)
        self._row.bias = self._bias.buffer_info()[0]
        self._row.banned_ids = self._stop_ids.buffer_info()[0]
        self._listed_ids = array("i", [token for token in params.logprob_token_ids if token < vocab_size])
        self._row.listed_ids, self._row.num_listed = _address_and_length(self._listed_ids)

    def at_step(self, seq: Sequence) -> SampleRow:
        """The row for the sequence's next token, valid until the next call."""
        row, params = self._row, seq.params
        if self._random:
            row.uniform = uniform(params.seed, seq.num_generated)
        if params.min_tokens:
            row.num_banned = len(self._stop_ids) if seq.num_generated < params.min_tokens else 0
        if self._counts is not None:
            self._counts.update(seq)
            row.seen_ids, row.num_seen = _address_and_length(self._counts.ids)
            row.seen_counts = self._counts.counts.buffer_info()[0]
        return row


class _TopTable:
    """Room for what is listed of each row."""

    def __init__(self, lengths: Seq[int]) -> None:
        """lengths: of the rows, at most."""
        width = max(lengths)
        self._ids = np.empty((len(lengths), width), dtype=np.int32)
        self._logprobs = np.empty((len(lengths), width), dtype=np.float64)
        self.fields = (width, self._ids.ctypes.data, self._logprobs.ctypes.data)
        """Of the calls: top_width, top_ids, top_logprobs."""

    def logprob(self, row: int, result: SampleResult) -> TokenLogprob:
        return TokenLogprob(result.token, result.logprob, self.listed(row, result))

    def listed(self, row: int, result: SampleResult) -> list[tuple[int, float]]:
        """(token id, logprob), each id once."""
        length = result.num_top
        ids, logprobs = self._ids[row, :length].tolist(), self._logprobs[row, :length].tolist()
        return list(dict(zip(ids, logprobs, strict=True)).items())


def _known(token_ids: Seq[int], vocab_size: int) -> array[int]:
    """The distinct ones that have a logit."""
    return array("i", sorted({token for token in token_ids if token < vocab_size}))


def _address_and_length(numbers: array[int]) -> tuple[int, int]:
    return numbers.buffer_info()
