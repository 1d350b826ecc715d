"""What becomes of a step that fails: whom it costs, and when the engine must not go on.

Laws:
1. Each scheduled sequence is either done, with all its sampled tokens, or failed.
2. What goes through as an exception leaves the device in an unknown state. All other faults end with the step.
3. A step that ran out of memory is tried again in two halves, and they likewise: only what does not fit alone
   fails.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

from server.batching import ScheduledBatch, ScheduledSequence
from server.engine.sampling.types import SampledToken

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
"""In a row. After more, it is not the sequences that are at fault."""
OUT_OF_MEMORY = "the step ran out of memory"
STEP_FAILED = "the step that computed the sequence failed"


class Runner(Protocol):
    def execute(self, batch: ScheduledBatch) -> list[SampledToken]:
        """Compute the batch's tokens; `num_sampled` results for each sequence, in the batch's order."""


@dataclass(frozen=True, slots=True)
class Executed:
    """A step after its computation."""

    done: tuple[ScheduledSequence, ...]
    sampled: list[SampledToken]
    """Of those, in order."""
    failed: tuple[ScheduledSequence, ...] = ()
    error: str = ""
    """Why they did."""


class GuardedRunner:
    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._num_failed_steps = 0

    def execute(self, batch: ScheduledBatch) -> Executed:
        """Raises what the runner raised if the device cannot be trusted any more."""
        if not batch.sequences:
            return Executed((), [])
        executed = self._try(batch.sequences, is_last_chance=self._num_failed_steps == MAX_FAILED_STEPS)
        self._num_failed_steps = self._num_failed_steps + 1 if executed.failed else 0
        return executed

    def _try(self, sequences: tuple[ScheduledSequence, ...], *, is_last_chance: bool) -> Executed:
        try:
            return Executed(sequences, self._runner.execute(ScheduledBatch(sequences, ())))
        except Exception as error:  # whatever it is, other sequences must go on
            if is_last_chance or _poisons_device(error):
                raise
            is_shortage = _is_shortage(error)
            if is_shortage and len(sequences) > 1 and _can_repeat(sequences):
                middle = len(sequences) // 2
                first = self._try(sequences[:middle], is_last_chance=False)
                second = self._try(sequences[middle:], is_last_chance=False)
                return Executed(
                    first.done + second.done,
                    first.sampled + second.sampled,
                    first.failed + second.failed,
                    first.error or second.error,
                )
            logger.exception(
                "a step of %d sequences with %d tokens failed: requests %s end with it",
                len(sequences),
                sum(scheduled.num_new for scheduled in sequences),
                " ".join(scheduled.seq.request_id for scheduled in sequences),
            )
            return Executed((), [], sequences, OUT_OF_MEMORY if is_shortage else STEP_FAILED)


def _is_shortage(error: Exception) -> bool:
    """Python's or torch's, which is known by its name here."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _poisons_device(error: Exception) -> bool:
    """Whether nothing can be computed behind it: CUDA reports a failed kernel again at every later call."""
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)


def _can_repeat(sequences: tuple[ScheduledSequence, ...]) -> bool:
    """Whether the step may have begun already: a grammar could have moved over the token that is now drawn."""
    return all(scheduled.seq.compiled_grammar is None for scheduled in sequences)
