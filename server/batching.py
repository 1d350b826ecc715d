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
6. A step can be planned behind one in flight, if it is plain and takes no memory from anybody. What it computes
   of a sequence that turns out to have ended is not taken in.
7. Pure policy: no tensors, no I/O, and the time only for stamping sequences.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from msgspec import structs

from server.engine.batch import ScheduledBatch, ScheduledSequence
from server.engine.kv_cache.manager import KVCacheManager
from server.engine.outcome import append_sampled, error_of, output_of
from server.engine.precedence import Precedence
from server.engine.sampling.types import SampledToken
from server.engine.sequence import Sequence, SequenceStatus
from server.engine.speculation import NgramSpeculator
from server.engine.step_counts import StepCounts
from server.engine.types import PoolSnapshot, SequenceOutput

SPARE_FOR_RUNNING = 0.01
"""Share of each pool that admissions leave free, lest the growth of what runs preempts them at once."""

STREAMS_PER_PROMPT = 4
"""With fewer streams for each prompt, prompts get more than `max_prefill_tokens`, in proportion."""

_Plan = dict[Sequence, ScheduledSequence]


class NeverFitsError(ValueError):
    """The sequence could not be computed even with the whole server to itself."""


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
    """Plans steps, and takes each in by `update`, or drops it, in the order of planning.

    `schedule` plans one while none is in flight, `schedule_ahead` one behind the only one that is. `add` and
    `abort` may come at any time between calls.
    """

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
        self._holds_back = False
        """Whether one that needs a step of its own could have been admitted behind a step in flight."""

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
        seq.token_limit = min(seq.num_prompt_tokens + seq.params.max_tokens, limit)
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
        """Plan a step and take the KV blocks for it. Even if nothing is planned, `update` must follow.

        max_prefill_tokens: tokens of chunks beside sequences with one token; but see STREAMS_PER_PROMPT.
        """
        self._holds_back = False
        plan: _Plan = {}
        preempted: list[Sequence] = []
        in_turn, num_streams = self._in_turn()
        budget = self._budget(max_prefill_tokens, num_streams)
        for seq in in_turn:
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
                plan[seq] = ScheduledSequence.of(seq, seq.num_computed, num_new)
                budget -= num_new
        if not preempted:
            self._admit(plan, budget, ahead=False)
            self._draft(plan)
        return ScheduledBatch.launched(plan.values(), preempted)

    def schedule_ahead(self, max_prefill_tokens: int = sys.maxsize) -> ScheduledBatch | None:
        """As `schedule`, behind a step in flight, whose tokens count as there, though nobody knows them.

        None if the next step depends on what they are: that one has to be taken in, and `schedule` is next.
        """
        may_draft = 0 < len(self._running) <= self._speculator.max_tokens
        if self._holds_back or may_draft:
            return None
        plan: _Plan = {}
        in_turn, num_streams = self._in_turn()
        budget = self._budget(max_prefill_tokens, num_streams)
        for seq in in_turn:
            if budget == 0:
                break
            if len(seq.token_ids) + seq.num_sampling >= seq.token_limit:
                continue  # the token in flight ends it, whatever it is
            start = seq.num_computed + seq.num_computing
            num_new = self._chunk(seq, start, budget)
            scheduled = ScheduledSequence.of(seq, start, num_new)
            # An end that is in flight may make the room for which somebody would be preempted now.
            has_room = start + num_new <= seq.has_room_until or self._kv.allocate(seq, 0, num_new)
            if not scheduled.is_plain or not has_room:
                return None
            plan[seq] = scheduled
            budget -= num_new
        self._admit(plan, budget, ahead=True)
        return ScheduledBatch.launched(plan.values(), ())

    def _in_turn(self) -> tuple[list[Sequence], int]:
        """The running, those with one token first, and how many these are."""
        streams: list[Sequence] = []
        chunks: list[Sequence] = []
        for seq in self._running:
            num_left = len(seq.token_ids) + seq.num_sampling - seq.num_computed - seq.num_computing
            (streams if num_left == 1 else chunks).append(seq)
        return streams + chunks, len(streams)

    def _budget(self, max_prefill_tokens: int, num_streams: int) -> int:
        """Tokens of the next step."""
        budget = self._config.max_num_batched_tokens
        if num_streams > 0:
            num_seated = min(len(self._running) + len(self._waiting), self._config.max_num_seqs)
            crowding = STREAMS_PER_PROMPT * (num_seated - num_streams) / num_streams
            budget = min(budget, num_streams + int(max_prefill_tokens * max(1.0, crowding)))
        return budget

    def _admit(self, plan: _Plan, budget: int, *, ahead: bool) -> None:
        if not self._waiting:
            return
        growing = [seq for seq in self._running if seq.num_expected - seq.num_planned > 1]
        while self._waiting and budget > 0 and len(self._running) < self._config.max_num_seqs:
            seq = self._waiting[0]
            num_cached = self._kv.find_cached_prefix(seq)
            if self._running and not self._kv.has_room(seq, num_cached, growing, SPARE_FOR_RUNNING):
                break
            num_new = self._chunk(seq, num_cached, budget)
            scheduled = ScheduledSequence.of(seq, num_cached, num_new)
            if ahead and not scheduled.is_plain:
                self._holds_back = True
                break
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
            plan[seq] = scheduled
            growing.append(seq)
            budget -= num_new

    def _draft(self, plan: _Plan) -> None:
        """Have the step check guesses where it is so small that more rows cost next to nothing."""
        most_rows = min(1 + self._speculator.max_tokens, self._config.max_num_batched_tokens)
        room = most_rows - sum(scheduled.num_new for scheduled in plan.values())
        for seq, scheduled in plan.items():
            if room < 1:
                break
            if not scheduled.samples:
                continue
            draft = self._speculator.propose(seq, min(room, seq.token_limit - seq.num_tokens - 1))
            num_new = scheduled.num_new + len(draft)
            if draft and self._kv.allocate(seq, 0, num_new):
                plan[seq] = structs.replace(scheduled, num_new=num_new, draft=draft, is_plain=False)
                room -= len(draft)

    def _chunk(self, seq: Sequence, start: int, budget: int) -> int:
        num_left = len(seq.token_ids) + seq.num_sampling - start
        return 1 if num_left == 1 else min(num_left, budget, self._config.long_prefill_threshold)

    def _preempt_one(self) -> Sequence | None:
        """Send one of the running back to the queue; None if only one runs. Nothing is in flight."""
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

        Another step may be in flight behind this one.

        `sampled` has `num_sampled` entries for each scheduled sequence, in order; ValueError otherwise.
        Sequences that have ended since `schedule` are passed over.
        """
        outputs, self._failed = self._failed, []
        if len(sampled) != batch.num_sampled:
            raise ValueError(f"{len(sampled)} sampled tokens do not match the batch")
        finished = SequenceStatus.FINISHED
        row = 0
        for scheduled in batch.sequences:
            seq, draft = scheduled.seq, scheduled.draft
            first_row = row
            if scheduled.samples:
                row += 1 + len(draft)
            if seq.status is finished:
                continue
            scheduled.land()
            tokens = sampled[first_row:row]
            if tokens and tokens[0].error is not None:
                outputs.append(self._spoil(seq, tokens[0].error))
                continue
            taken, reason = append_sampled(seq, tokens, draft)
            seq.num_computed = scheduled.start + scheduled.num_new
            if draft:
                num_accepted = len(taken) - 1
                seq.num_computed -= len(draft) - num_accepted
                self._speculator.record(seq, len(draft), num_accepted)
                self._counts.num_drafts += 1
                self._counts.num_draft_tokens += len(draft)
                self._counts.num_accepted_tokens += num_accepted
            if draft or seq.num_computed >= seq.settled_until:
                self._kv.commit(seq)
            if reason is not None:
                self._retire(seq)
            if taken:
                outputs.append(output_of(seq, taken, reason))
        return outputs

    def drop(self, batch: ScheduledBatch) -> None:
        """In place of `update`: as if the batch had not been planned. What lives is computed again."""
        for scheduled in batch.sequences:
            if scheduled.seq.status is not SequenceStatus.FINISHED:
                scheduled.land()

    def fail(self, sequences: Iterable[ScheduledSequence], error: str) -> list[SequenceOutput]:
        """End those of the planned step that could not be computed. `update` follows with the others."""
        lost = [scheduled.seq for scheduled in sequences]
        return [self._spoil(seq, error) for seq in lost if seq.status is not SequenceStatus.FINISHED]

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
        return error_of(seq, error)

    def _retire(self, seq: Sequence) -> None:
        """The only way out."""
        (self._running if seq.status is SequenceStatus.RUNNING else self._waiting).remove(seq)
        del self._sequences[seq.request_id]
        self._precedence.leave(seq)
        seq.status = SequenceStatus.FINISHED
        self._speculator.forget(seq)
        self._kv.free(seq)
