"""The front's view of the engine, whatever carries the messages."""

from __future__ import annotations

import enum
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Protocol

from server.engine.types import (
    EngineConfig,
    EngineInfo,
    GenerateRequest,
    Loading,
    SequenceOutput,
    Snapshot,
    StepStats,
    Vocabulary,
)


class EngineDeadError(Exception):
    """The engine ended, or could not start; the message says what is known about why."""


class AbandonedError(EngineDeadError):
    """The engine lives, but the server ends and gives up what runs."""


class SequenceLostError(EngineDeadError):
    """The engine ended while the sequence had some of its outputs. Another one is being started."""


class CrashingSequenceError(EngineDeadError):
    """The engine ended each time that it began with this sequence. Another one is being started."""


class LossCause(enum.StrEnum):
    ENDED = "ended"
    """The process ended by itself, or was killed."""
    SILENT = "silent"
    """No heartbeat came for too long."""
    STUCK = "stuck"
    """One step took too long."""
    GARBAGE = "garbage"
    """What it sent was not in the protocol."""


@dataclass(frozen=True, slots=True)
class EngineLoss:
    """An engine that ended and is being replaced."""

    cause: LossCause
    reason: str
    """For the log."""
    num_lost: int
    """Sequences that ended with it."""
    num_kept: int
    """Sequences without an output, which will be run by the next one."""


class EngineClient(Protocol):
    """One engine, or one after another. All methods belong to the event loop's thread."""

    on_loading: Callable[[Loading], None]
    """Called with each report of progress while the engine loads."""
    on_step: Callable[[StepStats], None]
    """Called once for each finished step."""
    on_loss: Callable[[EngineLoss], None]
    """Called when the engine has ended and another one will be started; `on_loading` tells how far that is."""
    on_return: Callable[[EngineInfo], None]
    """Called when that one is ready."""
    on_silence: Callable[[bool], None]
    """Called with True when the engine shows no sign of life any more, with False when it does again."""
    on_death: Callable[[str], None]
    """Called once, with the reason, if the engine has ended for good without having been asked to."""
    make_vocabulary: Callable[[], Vocabulary]
    """Called in a thread, once, when the first request with a grammar comes."""

    async def start(self, config: EngineConfig) -> EngineInfo:
        """Load the model. Raises EngineDeadError, with the reason, if that fails."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[SequenceOutput, None]:
        """Run one sequence; the last output has a `finish_reason`.

        Outputs that arrive faster than they are read are merged into one. Closing the generator, or
        cancelling whoever reads it, aborts the sequence. While the engine is being replaced the sequence waits.
        Raises EngineDeadError, SequenceLostError, CrashingSequenceError.
        """

    def abandon(self) -> None:
        """Give up what runs: each sequence raises AbandonedError, and is aborted."""

    async def inspect(self, max_waiting: int) -> Snapshot:
        """The engine's state, with up to `max_waiting` of the waiting sequences. It answers between two steps,
        and not at all while it is stopped, or before it is loaded. Raises EngineDeadError."""

    @property
    def pid(self) -> int:
        """The engine's process."""

    async def stop(self) -> None:
        """End the engine; idempotent. Sequences that still run raise EngineDeadError."""
