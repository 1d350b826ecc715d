"""What becomes of a step that fails: whom it costs, and when the engine must not go on.

Laws:
1. Each scheduled sequence that lives is either done, with all its sampled tokens, or failed.
2. What goes through as an exception leaves the device in an unknown state. All other faults end with the step.
3. A step that ran out of memory is tried again in two halves, and they likewise: only what does not fit alone
   fails.
4. Behind a step that went wrong nothing counts that was launched before this was known: a device computes in
   order, and what is computed again comes last.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Protocol

from msgspec import structs

from server.engine.batch import ScheduledBatch, ScheduledSequence
from server.engine.sampling.types import SampledToken

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
"""In a row. After more, it is not the sequences that are at fault."""
OUT_OF_MEMORY = "the step ran out of memory"
STEP_FAILED = "the step that computed the sequence failed"


class PendingStep(Protocol):
    def wait(self) -> list[SampledToken]:
        """Called once: blocks until the step is done. `num_sampled` results for each sequence, in the batch's
        order. Raises what went wrong."""


class Runner(Protocol):
    """Computes steps in the order in which they are launched."""

    def launch(self, batch: ScheduledBatch) -> PendingStep:
        """Begin to compute the batch, which has one sequence at least, and its tokens.

        All that is needed of the sequences is read before this returns. The step launched before may be in
        flight still: then this one is plain, and its `previous_row`s are rows of that one's tokens.
        """


@dataclass(frozen=True, slots=True)
class Executed:
    """A step after its computation."""

    done: tuple[ScheduledSequence, ...]
    sampled: list[SampledToken]
    """Of those, in order."""
    failed: tuple[ScheduledSequence, ...] = ()
    error: str = ""
    """Why they did."""
    is_clean: bool = True
    """Whether it was computed at once and as it was launched."""


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    batch: ScheduledBatch
    planned_at: float
    """When the planning of it began, by the engine's clock."""
    pending: PendingStep | None
    """None: it could not be launched, or there was nothing to."""
    error: Exception | None = None
    """Why it could not."""
    is_alone: bool = True
    """Whether nothing was in flight when it was launched."""


class GuardedRunner:
    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._num_failed_steps = 0

    def launch(self, batch: ScheduledBatch, planned_at: float, *, is_alone: bool) -> LaunchedStep:
        """Begin to compute a batch. What goes wrong shows when it is finished."""
        if not batch.sequences:
            return LaunchedStep(batch, planned_at, None)
        try:
            return LaunchedStep(batch, planned_at, self._runner.launch(batch), None, is_alone)
        except Exception as error:  # whatever it is, the step in flight goes on
            return LaunchedStep(batch, planned_at, None, error, is_alone)

    def finish(self, step: LaunchedStep, behind: LaunchedStep | None) -> Executed:
        """Wait for a step, the oldest in flight. `behind`: the one that was launched after it.

        If anything went wrong (`is_clean` is false), that one has been waited for and must be dropped. Raises
        what the runner raised if the device cannot be trusted any more.
        """
        error = step.error
        if step.pending is not None:
            try:
                executed = Executed(step.batch.sequences, step.pending.wait())
                self._num_failed_steps = 0
                return executed
            except Exception as raised:  # whatever it is, other sequences must go on
                error = raised
        if error is None:
            return Executed((), [])
        if behind is not None and behind.pending is not None:
            try:
                behind.pending.wait()
            except Exception as followed:  # it fails as what it builds on did
                if _poisons_device(followed):
                    raise
        if self._num_failed_steps == MAX_FAILED_STEPS or _poisons_device(error):
            raise error
        # The blocks of those that have ended may be another's by now. The tokens of the step before are known.
        sequences = tuple(
            structs.replace(scheduled, previous_row=-1) for scheduled in step.batch.living().sequences
        )
        is_shortage = _is_shortage(error)
        if not sequences:
            executed = Executed((), [])
        elif is_shortage and not (step.is_alone and behind is None) and _can_repeat(sequences):
            executed = self._try(sequences)  # it may fit alone
        else:
            executed = self._repair(sequences, error)
        has_failed = bool(executed.failed) or not is_shortage
        self._num_failed_steps = self._num_failed_steps + 1 if has_failed else 0
        return replace(executed, is_clean=False)

    def _repair(self, sequences: tuple[ScheduledSequence, ...], error: Exception) -> Executed:
        """What is done and failed of a step that raised `error`. Nothing is in flight."""
        if _poisons_device(error):
            raise error
        is_shortage = _is_shortage(error)
        if is_shortage and len(sequences) > 1 and _can_repeat(sequences):
            middle = len(sequences) // 2
            first, second = self._try(sequences[:middle]), self._try(sequences[middle:])
            return Executed(
                first.done + second.done,
                first.sampled + second.sampled,
                first.failed + second.failed,
                first.error or second.error,
            )
        logger.error(
            "a step of %d sequences with %d tokens failed: requests %s end with it",
            len(sequences),
            sum(scheduled.num_new for scheduled in sequences),
            " ".join(scheduled.seq.request_id for scheduled in sequences),
            exc_info=error,
        )
        return Executed((), [], sequences, OUT_OF_MEMORY if is_shortage else STEP_FAILED)

    def _try(self, sequences: tuple[ScheduledSequence, ...]) -> Executed:
        try:
            return Executed(sequences, self._runner.launch(ScheduledBatch(sequences, ())).wait())
        except Exception as error:  # whatever it is, other sequences must go on
            return self._repair(sequences, error)


def _is_shortage(error: Exception) -> bool:
    """Python's or torch's, which is known by its name here."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _poisons_device(error: Exception) -> bool:
    """Whether nothing can be computed behind it: CUDA reports a failed kernel again at every later call."""
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)


def _can_repeat(sequences: tuple[ScheduledSequence, ...]) -> bool:
    """Whether the step may have begun already: a grammar could have moved over the token that is now drawn."""
    return all(scheduled.seq.compiled_grammar is None for scheduled in sequences)
