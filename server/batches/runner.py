"""Takes batches from `validating` to their end.

    validating ──► in_progress ──► finalizing ──► completed, or expired
        │               │
        └─► failed      └─► cancelling ──► cancelled      (from validating, too)

Laws:
1. The status on disk says what is to be done next, and doing it twice does no harm: a batch that was
   interrupted in any way goes on where its status and its results are.
2. A batch that is not final has one task, from `start` or its creation to its end or `stop`.
3. An owner's batches run one after another, different owners' side by side.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing, suppress
from itertools import islice
from pathlib import Path
from typing import Protocol

from server.batches.lines import (
    Answer,
    Line,
    check_lines,
    not_executed,
    parse_line,
    read_lines,
    success_or_failure,
)
from server.batches.objects import Batch, BatchErrors, BatchStatus
from server.batches.patience import final_answer
from server.batches.slots import Slots
from server.batches.store import Store
from server.errors import ConflictError, StorageError
from server.metrics import BatchMetrics

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
"""Between two looks whether the model is loaded."""
BUSY_SECONDS = 1.0
"""Before a line is tried again that found no room in the queue, or no engine."""
STORAGE_RETRY_SECONDS = 30.0
"""Before a batch goes on that the disk stopped."""
SWEEP_SECONDS = 600.0
"""Between two looks for files whose time is over."""
LINES_AT_ONCE = 16
"""Read in one visit to a thread."""
NO_LIMIT = 1 << 62
"""Bytes."""
RESULTS_AT_ONCE = 500
"""Written in one transaction."""


class Requests(Protocol):
    """Where lines are answered: the server's own routes."""

    @property
    def urls(self) -> Collection[str]:
        """What a line's `url` may be."""

    def model_names(self) -> Collection[str] | None:
        """None while the model is being loaded."""

    def is_idle(self) -> bool:
        """Whether nobody but batches has used the engine lately."""

    async def answer(self, url: str, body: bytes, owner: str) -> Answer:
        """As a client with the owner's key would be answered, but after everybody else."""


class BatchRunner:
    def __init__(
        self,
        store: Store,
        requests: Requests,
        metrics: BatchMetrics,
        *,
        concurrency: int,
        max_requests: int,
        max_line_bytes: int,
    ) -> None:
        self.store = store
        self._requests = requests
        self._metrics = metrics
        self._max_requests = max_requests
        self._max_line_bytes = max_line_bytes
        self._slots = Slots(concurrency, requests.is_idle)
        self._validation = asyncio.Lock()
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def urls(self) -> Collection[str]:
        return self._requests.urls

    async def start(self) -> None:
        """Go on with what an earlier process left. Raises StorageError."""
        for owner, batch_id in await self.store.batches.unfinished():
            self._begin(owner, batch_id)
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """Leave every batch as it is, for a later `start`."""
        tasks = [*self._tasks.values()] + ([self._sweeper] if self._sweeper else [])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def submit(self, owner: str, batch: Batch, output_seconds: int) -> None:
        """Raises as BatchStore.add does."""
        await self.store.batches.add(owner, batch, output_seconds)
        self._begin(owner, batch.id)

    async def cancel(self, owner: str, batch_id: str) -> Batch:
        """The batch, on its way to `cancelled`. Raises ObjectNotFoundError, and ConflictError at its end."""

        def change(batch: Batch) -> None:
            if batch.status.is_final or batch.status is BatchStatus.FINALIZING:
                raise ConflictError(f"A batch that is {batch.status} cannot be cancelled.")
            if batch.status is not BatchStatus.CANCELLING:
                batch.advance(BatchStatus.CANCELLING, _now())

        batch = await self.store.batches.change(owner, batch_id, change)
        task = self._tasks.get(batch_id)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._begin(owner, batch_id)
        return batch

    def _begin(self, owner: str, batch_id: str) -> None:
        task = asyncio.create_task(self._run(owner, batch_id))
        self._tasks[batch_id] = task
        self._metrics.unfinished.set(len(self._tasks))

        def ended(_: asyncio.Task[None]) -> None:
            if self._tasks.get(batch_id) is task:
                del self._tasks[batch_id]
                self._metrics.unfinished.set(len(self._tasks))

        task.add_done_callback(ended)

    async def _run(self, owner: str, batch_id: str) -> None:
        while True:
            try:
                await self._advance(owner, batch_id)
                return
            except StorageError as error:
                logger.error("%s waits: %s", batch_id, error.message)
                await asyncio.sleep(STORAGE_RETRY_SECONDS)
            except Exception:  # a bug; the batch stays as it is, so that a repaired server can go on with it
                logger.exception("%s cannot go on", batch_id)
                return

    async def _advance(self, owner: str, batch_id: str) -> None:
        batch = await self.store.batches.get(owner, batch_id)
        with suppress(TimeoutError):
            async with asyncio.timeout(batch.expires_at - time.time()):
                if batch.status is BatchStatus.VALIDATING:
                    batch = await self._validate(owner, batch)
                if batch.status is BatchStatus.IN_PROGRESS:
                    await self._model_names()
                    async with self._turns[owner]:
                        await self._answer_lines(owner, batch)
        await self._finish(owner, batch_id)

    async def _model_names(self) -> Collection[str]:
        """Once the model is loaded."""
        while (names := self._requests.model_names()) is None:  # noqa: ASYNC110  # nobody tells when
            await asyncio.sleep(POLL_SECONDS)
        return names

    async def _validate(self, owner: str, batch: Batch) -> Batch:
        models = await self._model_names()

        def check() -> tuple[int, BatchErrors | None]:
            with self._input(batch).open("rb") as file:
                total, errors = check_lines(
                    file,
                    max_bytes=self._max_line_bytes,
                    max_lines=self._max_requests,
                    urls={batch.endpoint},
                    models=models,
                )
            return total, BatchErrors(errors) if errors else None

        async with self._validation:
            total, errors = await asyncio.to_thread(check)

        def change(batch: Batch) -> None:
            if batch.status is not BatchStatus.VALIDATING:
                return  # it was cancelled meanwhile
            batch.model = next(iter(models), None)
            batch.errors = errors
            if errors is None:
                batch.request_counts.total = total
                batch.advance(BatchStatus.IN_PROGRESS, _now())
            else:
                batch.advance(BatchStatus.FAILED, _now())

        batch = await self.store.batches.change(owner, batch.id, change)
        if batch.status is BatchStatus.FAILED:
            self._metrics.ended(batch.status)
        return batch

    async def _answer_lines(self, owner: str, batch: Batch) -> None:
        """Raises StorageError."""
        # Without room for an answer there is no point in computing one.
        await self.store.batches.check_room(owner, batch.id)
        try:
            async with asyncio.TaskGroup() as group, aclosing(self._unanswered(batch)) as lines:
                async for line in lines:
                    await self._slots.take()
                    task = group.create_task(self._answer_line(owner, batch.id, line))
                    # Even a task that is cancelled before it began.
                    task.add_done_callback(lambda _: self._slots.give_back())
        except BaseExceptionGroup as group_error:
            raise group_error.exceptions[0] from None

    async def _answer_line(self, owner: str, batch_id: str, line: Line) -> None:
        answer = await final_answer(lambda: self._requests.answer(line.url, line.body, owner), BUSY_SECONDS)
        result = success_or_failure(line, answer)
        await self.store.batches.add_result(batch_id, result)
        self._metrics.answered(is_success=result.is_success)

    async def _finish(self, owner: str, batch_id: str) -> None:
        """Final, with its output files, unless it is already."""

        def finalize(batch: Batch) -> None:
            counts = batch.request_counts
            if batch.status in (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS):
                if batch.status is BatchStatus.VALIDATING or counts.completed + counts.failed < counts.total:
                    batch.expired_at = _now()
                batch.advance(BatchStatus.FINALIZING, _now())

        batch = await self.store.batches.change(owner, batch_id, finalize)
        if batch.status is BatchStatus.CANCELLING:
            outcome = BatchStatus.CANCELLED
        elif batch.status is BatchStatus.FINALIZING:
            outcome = BatchStatus.COMPLETED if batch.expired_at is None else BatchStatus.EXPIRED
        else:
            return
        if outcome is BatchStatus.EXPIRED and batch.in_progress_at is not None:
            await self._tell_unanswered(batch)
        await self.store.batches.finish(owner, batch_id, lambda batch: batch.advance(outcome, _now()))
        self._metrics.ended(outcome)
        await self.observe_storage()

    async def _tell_unanswered(self, batch: Batch) -> None:
        """Put what was not answered in time among the errors."""
        message = "This request could not be executed before the completion window expired."
        async with aclosing(self._unanswered(batch)) as lines:
            some = []
            async for line in lines:
                some.append(not_executed(line, "batch_expired", message))
                if len(some) == RESULTS_AT_ONCE:
                    await self.store.batches.add_last_results(batch.id, some)
                    some = []
        await self.store.batches.add_last_results(batch.id, some)

    async def observe_storage(self) -> None:
        """Tell the metrics how much is stored. Raises StorageError."""
        self._metrics.stored(*await self.store.files.totals())

    async def _unanswered(self, batch: Batch) -> AsyncGenerator[Line, None]:
        answered = await self.store.batches.answered(batch.id)
        with await asyncio.to_thread(self._input(batch).open, "rb") as file:
            lines = (
                parse_line(number, raw)
                for number, raw in read_lines(file, NO_LIMIT)  # which `_validate` has held them to
                if number not in answered
            )
            while some := await asyncio.to_thread(lambda: list(islice(lines, LINES_AT_ONCE))):
                for line in some:
                    yield line

    def _input(self, batch: Batch) -> Path:
        return self.store.files.path(batch.input_file_id)

    async def _sweep(self) -> None:
        while True:
            try:
                if num_deleted := await self.store.files.delete_expired(_now()):
                    logger.info("deleted %d files whose time was over", num_deleted)
                await self.observe_storage()
            except StorageError as error:
                logger.error("expired files cannot be deleted: %s", error.message)
            await asyncio.sleep(SWEEP_SECONDS)


def _now() -> int:
    return int(time.time())
