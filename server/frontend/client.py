"""The front's view of the engine, whatever carries the messages."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
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


class EngineClient(Protocol):
    """One engine. All methods belong to the event loop's thread."""

    on_loading: Callable[[Loading], None]
    """Called with each report of progress while the engine loads."""
    on_step: Callable[[StepStats], None]
    """Called once for each finished step."""
    on_death: Callable[[str], None]
    """Called once, with the reason, if the engine ends without having been asked to."""
    make_vocabulary: Callable[[], Vocabulary]
    """Called in a thread, once, when the first request with a grammar comes."""

    async def start(self, config: EngineConfig) -> EngineInfo:
        """Load the model. Raises EngineDeadError, with the reason, if that fails."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[SequenceOutput, None]:
        """Run one sequence; the last output has a `finish_reason`.

        Outputs that arrive faster than they are read are merged into one. Closing the generator, or
        cancelling whoever reads it, aborts the sequence. Raises EngineDeadError.
        """

    async def inspect(self, max_waiting: int) -> Snapshot:
        """The engine's state, with up to `max_waiting` of the waiting sequences. It answers between two steps,
        and not at all while it is stopped, or before it is loaded. Raises EngineDeadError."""

    @property
    def pid(self) -> int:
        """The engine's process."""

    async def stop(self) -> None:
        """End the engine; idempotent. Sequences that still run raise EngineDeadError."""
