"""What one step computes: made by the scheduler, read by the runner, and handed back with the results.

A step may be planned while the one before it is still on the device ("in flight"). Its sequences' newest tokens
are then known there alone, and a batch says which row of the other step's samples each of them is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import msgspec

from server.engine.sequence import Sequence, SequenceStatus


class ScheduledSequence(msgspec.Struct, frozen=True, gc=False):
    """Positions start .. start + num_new - 1 of one sequence, of which the last ones may be a draft."""

    seq: Sequence
    start: int
    num_new: int
    samples: bool
    """Whether they reach the end of what is known, so that a token is sampled."""
    draft: tuple[int, ...] = ()
    """Guessed tokens after what is known, each of which is sampled after, too."""
    previous_row: int = -1
    """Which of the tokens that the step before samples is the one at `start`, the only position then; -1 where
    `seq.token_ids` has all of them."""
    is_plain: bool = False
    """See `ScheduledBatch.is_plain`."""

    @property
    def num_sampled(self) -> int:
        return 1 + len(self.draft) if self.samples else 0

    @property
    def num_generated(self) -> int:
        """Generated tokens in front of the first one that is sampled here: the random number's index."""
        return self.seq.num_generated + (self.previous_row >= 0)

    def land(self) -> None:
        """Its step is not in flight any more."""
        self.seq.num_computing -= self.num_new
        self.seq.num_sampling -= self.samples

    @classmethod
    def of(cls, seq: Sequence, start: int, num_new: int) -> ScheduledSequence:
        """num_new positions behind those that are computed and in flight, or found in the prefix cache."""
        num_sampling = seq.num_sampling
        num_expected = len(seq.token_ids) + num_sampling
        samples = start + num_new == num_expected
        if samples:
            is_plain = num_expected >= seq.plain_from
        else:
            is_plain = num_expected > seq.num_prompt_tokens or seq.params.prompt_logprobs is None
        return cls(seq, start, num_new, samples, (), seq.sampled_row if num_sampling else -1, is_plain)


@dataclass(frozen=True)
class ScheduledBatch:
    """One step's work. Sequences with one token, not counting drafts, come first."""

    sequences: tuple[ScheduledSequence, ...]
    preempted: tuple[Sequence, ...]

    @classmethod
    def launched(cls, sequences: Iterable[ScheduledSequence], preempted: Iterable[Sequence]) -> ScheduledBatch:
        """A planned step, in flight from now on."""
        launched, row = tuple(sequences), 0
        for scheduled in launched:
            seq = scheduled.seq
            seq.num_computing += scheduled.num_new
            if scheduled.samples:
                seq.num_sampling += 1
                seq.sampled_row = row
                row += 1 + len(scheduled.draft)
        return cls(launched, tuple(preempted))

    @cached_property
    def num_tokens(self) -> int:
        return sum(scheduled.num_new for scheduled in self.sequences)

    @cached_property
    def num_sampled(self) -> int:
        return sum(1 + len(scheduled.draft) for scheduled in self.sequences if scheduled.samples)

    @cached_property
    def num_draft_tokens(self) -> int:
        return sum(len(scheduled.draft) for scheduled in self.sequences)

    @cached_property
    def is_plain(self) -> bool:
        """Whether it asks the host for nothing but its token ids.

        It has no draft, no logprobs to report, and no row whose logits the host changes, be it after a look at
        the newest token (a grammar, penalties, bad words, min_tokens) or not (a bias, allowed tokens).
        """
        return all(scheduled.is_plain for scheduled in self.sequences)

    def living(self) -> ScheduledBatch:
        """Without those that have ended since."""
        finished = SequenceStatus.FINISHED
        living = tuple([scheduled for scheduled in self.sequences if scheduled.seq.status is not finished])
        return self if len(living) == len(self.sequences) else ScheduledBatch(living, self.preempted)
