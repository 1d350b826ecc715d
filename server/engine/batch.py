"""What one step computes: made by the scheduler, read by the runner, and handed back with the results.

A step may be planned while the one before it is still on the device ("in flight"). Its sequences' newest tokens
are then known there alone, and a batch says which row of the other step's samples each of them is.
"""

from __future__ import annotations

from dataclasses import dataclass

from server.engine.sequence import Sequence, SequenceStatus


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
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

    @classmethod
    def behind(cls, seq: Sequence, num_new: int) -> ScheduledSequence:
        """The next num_new positions behind those that are computed and in flight."""
        row = seq.sampled_row if seq.num_sampling else -1
        return cls._plain_or_not(seq, seq.num_planned, num_new, row)

    @classmethod
    def first(cls, seq: Sequence, num_cached: int, num_new: int) -> ScheduledSequence:
        """num_new positions of one that has yet to be admitted, behind those found in the prefix cache."""
        return cls._plain_or_not(seq, num_cached, num_new, -1)

    @classmethod
    def _plain_or_not(cls, seq: Sequence, start: int, num_new: int, row: int) -> ScheduledSequence:
        samples = start + num_new == seq.num_expected
        num_generated = seq.num_expected - seq.num_prompt_tokens
        if samples:
            is_plain = num_generated >= seq.plain_from
        else:
            is_plain = num_generated > 0 or seq.params.prompt_logprobs is None
        return cls(seq, start, num_new, samples, (), row, is_plain)


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step's work. Sequences with one token, not counting drafts, come first."""

    sequences: tuple[ScheduledSequence, ...]
    preempted: tuple[Sequence, ...]

    @property
    def num_tokens(self) -> int:
        return sum(scheduled.num_new for scheduled in self.sequences)

    @property
    def num_draft_tokens(self) -> int:
        return sum(len(scheduled.draft) for scheduled in self.sequences)

    @property
    def is_plain(self) -> bool:
        """Whether it asks the host for nothing but its token ids.

        It has no draft, no logprobs to report, and no row whose logits the host changes, be it after a look at
        the newest token (a grammar, penalties, bad words, min_tokens) or not (a bias, allowed tokens).
        """
        return all(scheduled.is_plain for scheduled in self.sequences)

    def living(self) -> tuple[ScheduledSequence, ...]:
        """Without those that have ended since."""
        finished = SequenceStatus.FINISHED
        return tuple(scheduled for scheduled in self.sequences if scheduled.seq.status is not finished)
