"""Continuous batching: which tokens of which sequences the next step computes.

There is no prefill or decode phase. Each sequence has `num_computed` chase `num_tokens`, and a step computes
any mix of single tokens and prompt chunks. Laws:

1. A step computes at most `max_num_batched_tokens` tokens of at most `max_num_seqs` sequences.
2. Sequences with one token to go come before chunks, so that a long prompt never stalls a running stream.
   Within both kinds, and among those that wait, the order is that of `Precedence`; nobody overtakes the head.
3. Memory that runs out is taken from one of the last in that order, which is recomputed: its tokens stay, its
   blocks go. The first of the running is never preempted, so every step gets something done.
4. Each sequence added leaves once, by a terminal output of `update` or `fail`, or by `abort`, and its blocks go
   free.
5. A draft takes rows and blocks that nobody wants in this step, and gives back what it did not need.
6. Pure policy: no tensors, no I/O, and the time only for stamping sequences.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

from server.engine.kv_cache.manager import KVCacheManager
from server.engine.precedence import Precedence
from server.engine.sampling.types import NOTHING_LEFT, SampledToken
from server.engine.sequence import Sequence, SequenceStatus
from server.engine.speculation import NgramSpeculator
from server.engine.step_counts import StepCounts
from server.engine.types import FinishReason, PoolSnapshot, SequenceOutput

SPARE_FOR_RUNNING = 0.01
"""Share of each pool that admissions leave free, lest the growth of what runs preempts them at once."""

STREAMS_PER_PROMPT = 4
"""With fewer streams for each prompt, prompts get more than `max_prefill_tokens`, in proportion."""


class NeverFitsError(ValueError):
    """The sequence could not be computed even with the whole server to itself."""


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

    @property
    def num_sampled(self) -> int:
        return 1 + len(self.draft) if self.samples else 0


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


@dataclass(frozen=True)
class SchedulerConfig:
    max_num_seqs: int
    """Sequences that run at a time."""
    max_num_batched_tokens: int
    """Tokens in one step; at least `max_num_seqs`, so that nobody's single token has to wait."""
    max_model_len: int
    """Prompt plus generated tokens of one sequence."""
    long_prefill_threshold: int
    """Tokens of one sequence in one step, so that a long prompt leaves room for others."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least"
                f" max_num_seqs ({self.max_num_seqs})"
            )


class Scheduler:
    """Alternate `schedule` and `update`; `add` and `abort` may come at any time between calls."""

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVCacheManager,
        speculator: NgramSpeculator,
        clock: Callable[[], float],
    ) -> None:
        """`clock` gives monotonic seconds, for `Sequence.scheduled_at`."""
        self._config = config
        self._kv = kv
        self._speculator = speculator
        self._clock = clock
        self._max_sequence_tokens = min(config.max_model_len, kv.max_sequence_tokens())
        self._sequences: dict[str, Sequence] = {}
        """All that live, by request id."""
        self._precedence = Precedence()
        """The order in which the two lists are kept."""
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._failed: list[SequenceOutput] = []
        """Ends that `schedule` decided; `update` hands them out."""
        self._counts = StepCounts()

    # --- the queue ----------------------------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. Raises NeverFitsError, or ValueError for an id that is in use."""
        limit = self._max_sequence_tokens
        if seq.num_tokens == 0 or seq.num_tokens + 1 > limit:
            raise NeverFitsError(
                f"the prompt has {seq.num_tokens} tokens, which must be 1 to {limit - 1}: prompt and generated"
                f" tokens are limited to {limit}, by max_model_len ({self._config.max_model_len}) and by"
                f" the size of the KV cache ({self._kv.max_sequence_tokens()})"
            )
        if seq.request_id in self._sequences:
            raise ValueError(f"request id {seq.request_id!r} is in use")
        self._sequences[seq.request_id] = seq
        self._precedence.enter(seq)
        self._precedence.insert(seq, self._waiting)

    def abort(self, request_id: str) -> Sequence | None:
        """End a sequence, wherever it is; its blocks are free at once. None if no such sequence lives."""
        seq = self._sequences.get(request_id)
        if seq is not None:
            self._retire(seq)
        return seq

    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._sequences or self._failed)

    @property
    def sequences(self) -> Collection[Sequence]:
        """All that live, in order of arrival."""
        return self._sequences.values()

    @property
    def running(self) -> Collection[Sequence]:
        return self._running

    @property
    def waiting(self) -> Collection[Sequence]:
        """In the order in which they will be admitted."""
        return self._waiting

    def kv_usage(self) -> dict[str, float]:
        """Share of each KV pool that live sequences hold, by name."""
        return self._kv.usage()

    def kv_pools(self) -> dict[str, PoolSnapshot]:
        """Blocks of each KV pool, by name."""
        return self._kv.snapshot()

    def take_counts(self) -> StepCounts:
        counts, self._counts = self._counts, StepCounts()
        return counts

    # --- planning a step ----------------------------------------------------------------------------------

    def schedule(self, max_prefill_tokens: int = sys.maxsize) -> ScheduledBatch:
        """Plan a step and take the KV blocks for it. `update` must follow, even if nothing is planned.

        max_prefill_tokens: tokens of chunks beside sequences with one token; but see STREAMS_PER_PROMPT.
        """
        plan: dict[Sequence, ScheduledSequence] = {}
        preempted: list[Sequence] = []
        budget = self._config.max_num_batched_tokens
        num_streams = sum(seq.num_tokens - seq.num_computed == 1 for seq in self._running)
        if num_streams > 0:
            num_seated = min(len(self._running) + len(self._waiting), self._config.max_num_seqs)
            crowding = STREAMS_PER_PROMPT * (num_seated - num_streams) / num_streams
            budget = min(budget, num_streams + int(max_prefill_tokens * max(1.0, crowding)))
        for seq in sorted(self._running, key=lambda seq: seq.num_tokens - seq.num_computed > 1):
            if budget == 0:
                break
            if seq.status is not SequenceStatus.RUNNING:  # gave way to one before it
                continue
            num_new = self._chunk(seq, seq.num_computed, budget)
            while not self._kv.allocate(seq, 0, num_new):
                victim = self._preempt_one()
                if victim is None:
                    self._fail(seq)
                    break
                preempted.append(victim)
                if victim in plan:
                    budget += plan.pop(victim).num_new
                if victim is seq:
                    break
            else:
                plan[seq] = _scheduled(seq, num_new)
                budget -= num_new
        if not preempted:
            self._admit(plan, budget)
            self._draft(plan)
        return ScheduledBatch(tuple(plan.values()), tuple(preempted))

    def _admit(self, plan: dict[Sequence, ScheduledSequence], budget: int) -> None:
        growing = [seq for seq in self._running if seq.num_tokens - seq.num_computed > 1]
        while self._waiting and budget > 0 and len(self._running) < self._config.max_num_seqs:
            seq = self._waiting[0]
            num_cached = self._kv.find_cached_prefix(seq)
            if self._running and not self._kv.has_room(seq, num_cached, growing, SPARE_FOR_RUNNING):
                break
            num_new = self._chunk(seq, num_cached, budget)
            if not self._kv.allocate(seq, num_cached, num_new):
                if self._running:
                    break
                self._fail(seq)
                continue
            del self._waiting[0]
            self._precedence.insert(seq, self._running)
            self._precedence.admit(seq)
            seq.status = SequenceStatus.RUNNING
            seq.num_computed = num_cached
            if seq.num_preemptions == 0:
                self._note_first_admission(seq, num_cached)
            plan[seq] = _scheduled(seq, num_new)
            growing.append(seq)
            budget -= num_new

    def _draft(self, plan: dict[Sequence, ScheduledSequence]) -> None:
        """Have the step check guesses where it is so small that more rows cost next to nothing."""
        most_rows = min(1 + self._speculator.max_tokens, self._config.max_num_batched_tokens)
        room = most_rows - sum(scheduled.num_new for scheduled in plan.values())
        for seq, scheduled in plan.items():
            if room < 1:
                break
            if not scheduled.samples:
                continue
            most_generated = min(
                seq.params.max_tokens - seq.num_generated, self._max_sequence_tokens - seq.num_tokens
            )
            draft = self._speculator.propose(seq, min(room, most_generated - 1))
            num_new = scheduled.num_new + len(draft)
            if draft and self._kv.allocate(seq, 0, num_new):
                plan[seq] = replace(scheduled, num_new=num_new, draft=draft)
                room -= len(draft)

    def _chunk(self, seq: Sequence, start: int, budget: int) -> int:
        return min(seq.num_tokens - start, budget, self._config.long_prefill_threshold)

    def _preempt_one(self) -> Sequence | None:
        """Send one of the running back to the queue; None if only one runs."""
        victim = self._precedence.victim(self._running)
        if victim is None:
            return None
        self._kv.free(victim)
        self._running.remove(victim)
        self._precedence.insert(victim, self._waiting)
        victim.status = SequenceStatus.WAITING
        victim.num_computed = 0
        victim.num_preemptions += 1
        victim.prompt_logprobs = []  # they grow again with the prompt's rows
        self._counts.num_preemptions += 1
        return victim

    def _note_first_admission(self, seq: Sequence, num_cached: int) -> None:
        seq.scheduled_at = self._clock()
        seq.num_cached_tokens = num_cached
        if self._kv.uses_prefix_cache(seq):
            self._counts.prefix_cache_queries += seq.num_tokens
            self._counts.prefix_cache_hits += num_cached

    # --- taking a step's results in -----------------------------------------------------------------------

    def update(self, batch: ScheduledBatch, sampled: list[SampledToken]) -> list[SequenceOutput]:
        """Advance the batch's sequences after the forward pass, and end those that are done.

        `sampled` has `num_sampled` entries for each scheduled sequence, in order; ValueError otherwise.
        Sequences that were aborted since `schedule` are passed over.
        """
        outputs, self._failed = self._failed, []
        rows = iter(sampled)
        if len(sampled) != sum(scheduled.num_sampled for scheduled in batch.sequences):
            raise ValueError(f"{len(sampled)} sampled tokens do not match the batch")
        for scheduled in batch.sequences:
            seq, tokens = scheduled.seq, list(itertools.islice(rows, scheduled.num_sampled))
            if seq.status is SequenceStatus.FINISHED:
                continue
            if tokens and tokens[0].error is not None:
                outputs.append(self._spoil(seq, tokens[0].error))
                continue
            taken, reason = self._take(seq, tokens, scheduled.draft)
            num_accepted = max(0, len(taken) - 1)
            seq.num_computed = scheduled.start + scheduled.num_new - len(scheduled.draft) + num_accepted
            self._kv.commit(seq)
            if scheduled.draft:
                self._speculator.record(seq, len(scheduled.draft), num_accepted)
                self._counts.num_drafts += 1
                self._counts.num_draft_tokens += len(scheduled.draft)
                self._counts.num_accepted_tokens += num_accepted
            if taken:
                outputs.append(self._output(seq, taken, reason))
        return outputs

    def fail(self, sequences: Iterable[ScheduledSequence], error: str) -> list[SequenceOutput]:
        """End those of the planned step that could not be computed. `update` follows with the others."""
        lost = [scheduled.seq for scheduled in sequences]
        return [self._spoil(seq, error) for seq in lost if seq.status is not SequenceStatus.FINISHED]

    def _take(
        self, seq: Sequence, tokens: list[SampledToken], draft: tuple[int, ...]
    ) -> tuple[list[SampledToken], FinishReason | None]:
        """Append the tokens whose rows saw what the sequence now is: up to the first that is not as drafted.

        An error ends them, too; its row will be the first of the next step.
        """
        taken: list[SampledToken] = []
        reason = None
        for index, token in enumerate(tokens):
            if token.error is not None:
                break
            seq.token_ids.append(token.token_id)
            taken.append(token)
            reason = FinishReason.STOP if token.completes else self._finish_reason(seq)
            if reason is not None or draft[index : index + 1] != (token.token_id,):
                break
        return taken, reason

    def _output(self, seq: Sequence, tokens: list[SampledToken], reason: FinishReason | None) -> SequenceOutput:
        if reason is not None:
            self._retire(seq)
        is_first, last = seq.num_generated == len(tokens), tokens[-1]
        prompt_logprobs, seq.prompt_logprobs = seq.prompt_logprobs, []
        return SequenceOutput(
            request_id=seq.request_id,
            token_ids=[token.token_id for token in tokens],
            logprobs=[token.logprob for token in tokens if token.logprob is not None] or None,
            prompt_logprobs=prompt_logprobs if is_first and seq.params.prompt_logprobs is not None else None,
            finish_reason=reason,
            stop_token_id=last.token_id if reason is FinishReason.STOP and not last.completes else None,
            num_cached_tokens=seq.num_cached_tokens,
            scheduled_at=seq.scheduled_at,
        )

    def _finish_reason(self, seq: Sequence) -> FinishReason | None:
        params = seq.params
        if seq.token_ids[-1] in params.stop_token_ids and seq.num_generated >= params.min_tokens:
            return FinishReason.STOP
        if seq.num_generated >= params.max_tokens or seq.num_tokens >= self._max_sequence_tokens:
            return FinishReason.LENGTH
        return None

    # --- ends ---------------------------------------------------------------------------------------------

    def _fail(self, seq: Sequence) -> None:
        """Give up on a sequence that the whole cache cannot hold. `add` keeps them out; never hang on a bug."""
        error = f"the KV cache cannot hold the sequence's {seq.num_tokens} tokens"
        self._failed.append(self._end(seq, error))

    def _spoil(self, seq: Sequence, error: str) -> SequenceOutput:
        """A bad row or step can come from bad entries or leave some: they must not be handed on."""
        self._kv.discard(seq)
        return self._end(seq, error)

    def _end(self, seq: Sequence, error: str) -> SequenceOutput:
        self._retire(seq)
        return SequenceOutput(
            request_id=seq.request_id,
            finish_reason=FinishReason.ERROR,
            num_cached_tokens=seq.num_cached_tokens,
            scheduled_at=seq.scheduled_at,
            error=error,
            is_contradictory=seq.params.is_constrained and error == NOTHING_LEFT,
        )

    def _retire(self, seq: Sequence) -> None:
        """The only way out."""
        (self._running if seq.status is SequenceStatus.RUNNING else self._waiting).remove(seq)
        del self._sequences[seq.request_id]
        self._precedence.leave(seq)
        seq.status = SequenceStatus.FINISHED
        self._speculator.forget(seq)
        self._kv.free(seq)


def _scheduled(seq: Sequence, num_new: int) -> ScheduledSequence:
    start = seq.num_computed
    return ScheduledSequence(seq, start, num_new, samples=start + num_new == seq.num_tokens)
