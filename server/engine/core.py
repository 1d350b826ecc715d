"""The engine, without processes or sockets: the file to read first.

One step: the scheduler plans which tokens of which sequences to compute, the runner computes them and samples,
and the scheduler takes the result in. Where the runner can, a plain step is planned and launched while the one
before it is on the device, so that the device never waits for the host. Laws:

1. Each added request yields exactly one output with a finish_reason, whatever happens to it.
2. Only the runner touches the device. Nothing here imports torch.
3. A step that fails ends the sequences that it computed and no others (`server/engine/faults.py`); of what it
   wrote nothing is found again.
4. At most two steps are launched and not taken in, between calls at most one. They are taken in in order.
5. An exception out of `step` means that KV cache or device are in an unknown state: the owner must let the
   engine die.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from server.batching import NeverFitsError, Scheduler
from server.engine.batch import ScheduledBatch
from server.engine.faults import GuardedRunner, LaunchedStep, Runner
from server.engine.grammar.compiler import GrammarCompiler
from server.engine.inspection import StepLog, snapshot_of
from server.engine.pacing import PrefillPacer
from server.engine.sequence import Sequence
from server.engine.types import (
    FinishReason,
    GenerateRequest,
    SequenceOutput,
    Snapshot,
    StepOutput,
    StepStats,
    Vocabulary,
)
from server.grammar_library import GrammarError

logger = logging.getLogger(__name__)

_NOTHING = ScheduledBatch((), ())


class EngineCore:
    """Owns the scheduler and the runner. Not thread-safe: one thread calls everything."""

    def __init__(
        self,
        scheduler: Scheduler,
        pacer: PrefillPacer,
        runner: Runner,
        grammars: GrammarCompiler,
        clock: Callable[[], float] = time.monotonic,
        *,
        runs_ahead: bool = False,
    ) -> None:
        """runs_ahead: whether a step is launched while the one before it is computed."""
        self.on_begun: Callable[[list[str]], None] = lambda request_ids: None
        """Called before a step with the sequences that no step has computed before."""
        self._scheduler = scheduler
        self._pacer = pacer
        self._runner = GuardedRunner(runner)
        self._grammars = grammars
        self._compiling: dict[str, Sequence] = {}
        """Those whose grammar is not there yet, by request id; the scheduler does not know them."""
        self._clock = clock
        self._terminal: list[SequenceOutput] = []
        """Ends that came about between steps; they leave with the next output."""
        self._steps = StepLog()
        self._runs_ahead = runs_ahead
        self._in_flight: LaunchedStep | None = None
        self._taken_at = 0.0
        """When the last step was."""

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """What grammars are matched against; once, before the first of them."""
        self._grammars.set_vocabulary(vocabulary)

    def add(self, request: GenerateRequest) -> None:
        seq = Sequence.from_request(request)
        seq.arrived_at = self._clock()
        self._add(seq)

    def abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            aborted = self._compiling.pop(request_id, None) or self._scheduler.abort(request_id)
            if aborted is not None:
                self._terminal.append(SequenceOutput(request_id=request_id, finish_reason=FinishReason.ABORT))

    def has_work(self) -> bool:
        is_compiled = bool(self._compiling) and self._grammars.has_news
        return self._scheduler.has_work() or bool(self._terminal) or is_compiled or self._in_flight is not None

    def step(self) -> StepOutput:
        """Launch a step, take one in, or both: with one call or the next every running sequence gets on."""
        started = self._clock()
        waiting, self._compiling = self._compiling, {}
        for seq in waiting.values():
            self._add(seq)
        oldest, newest = self._in_flight, self._launch_next(started)
        if oldest is None and newest is not None and not self._may_stay_in_flight(newest):
            oldest, newest = newest, None
        self._in_flight = newest
        outputs, stats = self._take(oldest) if oldest is not None else ([], self._stats(_NOTHING, 0.0, 0.0))
        outputs, self._terminal = self._terminal + outputs, []
        return StepOutput(outputs=outputs, stats=stats)

    def _launch_next(self, planned_at: float) -> LaunchedStep | None:
        """None if there is nothing to do, or nothing that can be done before the step in flight is taken in."""
        oldest, limit = self._in_flight, self._pacer.max_prefill_tokens()
        if oldest is None:
            batch = self._scheduler.schedule(limit)
        elif oldest.error is not None:
            return None
        else:
            ahead = self._scheduler.schedule_ahead(limit)
            if ahead is None or not ahead.sequences:
                return None
            batch = ahead
        for seq in batch.preempted:
            logger.info(
                "preempted request=%s tokens=%d preemptions=%d: no KV block is free, it will be computed again",
                seq.request_id,
                seq.num_tokens,
                seq.num_preemptions,
                extra={"fields": {"request_id": seq.request.client_request_id}},
            )
        begun = [scheduled.seq for scheduled in batch.sequences if not scheduled.seq.has_begun]
        if begun:
            self.on_begun([seq.request_id for seq in begun])
        for seq in begun:
            seq.has_begun = True
        return self._runner.launch(batch, planned_at, is_alone=oldest is None)

    def _may_stay_in_flight(self, step: LaunchedStep) -> bool:
        return self._runs_ahead and step.error is None and step.pending is not None and step.batch.is_plain

    def _take(self, step: LaunchedStep) -> tuple[list[SequenceOutput], StepStats]:
        """Take in the oldest step. If it went wrong, the one in flight behind it goes."""
        waited_from = self._clock()
        executed = self._runner.finish(step, self._in_flight)
        finished = self._clock()
        if not executed.is_clean and self._in_flight is not None:
            self._scheduler.drop(self._in_flight.batch)
            self._in_flight = None
        living = step.batch.living()
        outputs = self._scheduler.fail(executed.failed, executed.error)
        outputs += self._scheduler.update(ScheduledBatch(executed.done, step.batch.preempted), executed.sampled)
        taken = self._clock()
        # Before the last one was taken in, the device had that one to compute.
        seconds, self._taken_at = taken - max(step.planned_at, self._taken_at), taken
        num_streams = sum(scheduled.num_new - len(scheduled.draft) == 1 for scheduled in living.sequences)
        num_prefill_tokens = living.num_tokens - living.num_draft_tokens - num_streams
        if not executed.failed:
            self._pacer.record(num_streams, num_prefill_tokens, seconds)
        self._steps.add(taken - seconds, taken)
        return outputs, self._stats(living, seconds, finished - waited_from)

    def snapshot(self, number: int, max_waiting: int) -> Snapshot:
        """See `server.engine.types.Inspect`. Between two steps."""
        return snapshot_of(
            number, max_waiting, self._scheduler, self._compiling.values(), self._steps, self._clock()
        )

    def _add(self, seq: Sequence) -> None:
        """Queue a sequence that is ready, or have it wait for its grammar."""
        try:
            if seq.params.grammar is not None:
                answer = self._grammars.compiled(seq.params.grammar)
                if answer is None:
                    self._compiling[seq.request_id] = seq
                    return
                if isinstance(answer, GrammarError):
                    raise answer
                seq.compiled_grammar = answer
            self._scheduler.add(seq)
        except (NeverFitsError, GrammarError) as error:
            reason = str(error) if isinstance(error, NeverFitsError) else "its grammar does not compile"
            self._terminal.append(
                SequenceOutput(request_id=seq.request_id, finish_reason=FinishReason.ERROR, error=reason)
            )

    def _stats(self, taken: ScheduledBatch, seconds: float, wait_seconds: float) -> StepStats:
        num_decode_tokens = sum(
            1 for scheduled in taken.sequences if scheduled.start >= scheduled.seq.num_prompt_tokens
        )
        counts = self._scheduler.take_counts()
        return StepStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting) + len(self._compiling),
            kv_usage=self._scheduler.kv_usage(),
            num_preemptions=counts.num_preemptions,
            prefix_cache_queries=counts.prefix_cache_queries,
            prefix_cache_hits=counts.prefix_cache_hits,
            num_prefill_tokens=taken.num_tokens - taken.num_draft_tokens - num_decode_tokens,
            num_decode_tokens=num_decode_tokens + counts.num_accepted_tokens,
            num_drafts=counts.num_drafts,
            num_draft_tokens=counts.num_draft_tokens,
            num_accepted_tokens=counts.num_accepted_tokens,
            step_seconds=seconds,
            wait_seconds=wait_seconds,
        )
