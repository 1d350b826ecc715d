"""What the engine tells of itself when it is asked: counts, times and states, and nobody's tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from itertools import islice

from server.batching import Scheduler
from server.engine.sequence import Sequence
from server.engine.types import SequenceSnapshot, Snapshot

_STEPS_KEPT = 16


class StepLog:
    """How long the last steps took."""

    def __init__(self) -> None:
        self.count = 0
        self.ended_at: float | None = None
        """When the last one did, by the engine's clock."""
        self.seconds: deque[float] = deque(maxlen=_STEPS_KEPT)

    def add(self, started: float, ended: float) -> None:
        self.count += 1
        self.ended_at = ended
        self.seconds.append(ended - started)


def snapshot_of(
    number: int,
    max_waiting: int,
    scheduler: Scheduler,
    compiling: Collection[Sequence],
    steps: StepLog,
    now: float,
) -> Snapshot:
    """`compiling`: sequences whose grammar is not there yet. `now`: seconds of the engine's clock."""
    described = [_describe(seq, "waiting", now) for seq in islice(scheduler.waiting, max_waiting)]
    room = max_waiting - len(described)
    described += [_describe(seq, "compiling", now) for seq in islice(compiling, room)]
    return Snapshot(
        number=number,
        running=[_describe(seq, "running", now) for seq in scheduler.running],
        waiting=described,
        num_waiting=len(scheduler.waiting) + len(compiling),
        pools=scheduler.kv_pools(),
        num_steps=steps.count,
        last_step_ago=None if steps.ended_at is None else now - steps.ended_at,
        step_seconds=list(steps.seconds),
    )


def _describe(seq: Sequence, status: str, now: float) -> SequenceSnapshot:
    return SequenceSnapshot(
        request_id=seq.request_id,
        client_request_id=seq.request.client_request_id,
        tenant=seq.request.tenant,
        status=status,
        priority=seq.request.priority,
        age_seconds=now - seq.arrived_at,
        num_prompt_tokens=seq.num_prompt_tokens,
        num_generated_tokens=seq.num_generated,
        max_tokens=seq.params.max_tokens,
        num_computed_tokens=seq.num_computed,
        num_cached_tokens=seq.num_cached_tokens,
        num_preemptions=seq.num_preemptions,
    )
