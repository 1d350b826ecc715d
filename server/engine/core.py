"""The engine, without processes or sockets: the file to read first.

One step: the scheduler plans which tokens of which sequences to compute, the runner computes them and samples,
and the scheduler takes the result in. Laws:

1. Each added request yields exactly one output with a finish_reason, whatever happens to it.
2. Only `runner.execute` touches the device. Nothing here imports torch.
3. A step that fails ends the sequences that it computed and no others (`server/engine/faults.py`); of what it
   wrote nothing is found again.
4. An exception out of `step` means that KV cache or device are in an unknown state: the owner must let the
   engine die.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from server.batching import NeverFitsError, ScheduledBatch, ScheduledSequence, Scheduler
from server.engine.faults import GuardedRunner, Runner
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


class EngineCore:
    """Owns the scheduler and the runner. Not thread-safe: one thread calls everything."""

    def __init__(
        self,
        scheduler: Scheduler,
        pacer: PrefillPacer,
        runner: Runner,
        grammars: GrammarCompiler,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
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
        return self._scheduler.has_work() or bool(self._terminal) or is_compiled

    def step(self) -> StepOutput:
        """Advance every running sequence by one step."""
        started = self._clock()
        waiting, self._compiling = self._compiling, {}
        for seq in waiting.values():
            self._add(seq)
        batch = self._scheduler.schedule(self._pacer.max_prefill_tokens())
        for seq in batch.preempted:
            logger.info(
                "preempted request=%s tokens=%d preemptions=%d: no KV block is free, it will be computed again",
                seq.request_id,
                seq.num_tokens,
                seq.num_preemptions,
                extra={"fields": {"request_id": seq.request.client_request_id}},
            )
        if begun := [scheduled.seq.request_id for scheduled in batch.sequences if _begins(scheduled)]:
            self.on_begun(begun)
        executed = self._runner.execute(batch)
        outputs = self._scheduler.fail(executed.failed, executed.error)
        outputs += self._scheduler.update(ScheduledBatch(executed.done, batch.preempted), executed.sampled)
        finished = self._clock()
        num_streams = sum(scheduled.num_new - len(scheduled.draft) == 1 for scheduled in batch.sequences)
        num_prefill_tokens = batch.num_tokens - batch.num_draft_tokens - num_streams
        if not executed.failed:
            self._pacer.record(num_streams, num_prefill_tokens, finished - started)
        self._steps.add(started, finished)
        outputs, self._terminal = self._terminal + outputs, []
        return StepOutput(outputs=outputs, stats=self._stats(batch, finished - started))

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

    def _stats(self, batch: ScheduledBatch, seconds: float) -> StepStats:
        num_decode_tokens = sum(
            1 for scheduled in batch.sequences if scheduled.start >= scheduled.seq.num_prompt_tokens
        )
        counts = self._scheduler.take_counts()
        return StepStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting) + len(self._compiling),
            kv_usage=self._scheduler.kv_usage(),
            num_preemptions=counts.num_preemptions,
            prefix_cache_queries=counts.prefix_cache_queries,
            prefix_cache_hits=counts.prefix_cache_hits,
            num_prefill_tokens=batch.num_tokens - batch.num_draft_tokens - num_decode_tokens,
            num_decode_tokens=num_decode_tokens + counts.num_accepted_tokens,
            num_drafts=counts.num_drafts,
            num_draft_tokens=counts.num_draft_tokens,
            num_accepted_tokens=counts.num_accepted_tokens,
            step_seconds=seconds,
        )


def _begins(scheduled: ScheduledSequence) -> bool:
    return scheduled.seq.num_preemptions == 0 and scheduled.start == scheduled.seq.num_cached_tokens
