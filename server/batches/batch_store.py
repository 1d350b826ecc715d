"""Batches and the results of those that are not finished. Laws:

1. A line of a batch has at most one result.
2. A batch's results are rows until it is final, and files from then on; never both, never neither.
3. Everything has an owner, and every method that a client can reach asks for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import msgspec

from server.batches.database import Database, storage_errors, transaction
from server.batches.file_store import FileStore, new_file
from server.batches.lines import Result
from server.batches.objects import Batch, BatchUsage, File, RequestCounts
from server.cache_directory import written_whole
from server.errors import ConflictError, StorageFullError

MAX_UNFINISHED_BATCHES = 100
"""Of one owner."""
KEPT_BATCHES = 1000
"""Finished ones of one owner; older ones are forgotten."""

Change = Callable[[Batch], None]


class BatchStore:
    def __init__(self, database: Database, files: FileStore) -> None:
        self.database = database
        self._files = files

    @transaction
    def add(self, owner: str, batch: Batch, output_seconds: int) -> None:
        """`output_seconds`: how long its output files are kept. Raises ObjectNotFoundError without the input
        file, ConflictError for one batch too many."""
        self.database.object("files", owner, batch.input_file_id)
        unfinished = self.database.number(
            "SELECT count(*) FROM batches WHERE owner = ? AND NOT is_final", owner
        )
        if unfinished >= MAX_UNFINISHED_BATCHES:
            raise ConflictError(
                f"A key may have at most {MAX_UNFINISHED_BATCHES} batches that are not finished."
            )
        self.database.connection.execute(
            "INSERT INTO batches (id, owner, input_file_id, output_seconds, is_final, object)"
            " VALUES (?, ?, ?, ?, 0, ?)",
            (batch.id, owner, batch.input_file_id, output_seconds, msgspec.json.encode(batch)),
        )
        self.database.connection.execute(
            "DELETE FROM batches WHERE is_final AND owner = ? AND seq <= (SELECT seq FROM batches"
            " WHERE is_final AND owner = ? ORDER BY seq DESC LIMIT 1 OFFSET ?)",
            (owner, owner, KEPT_BATCHES),
        )

    @transaction
    def get(self, owner: str, batch_id: str) -> Batch:
        """With the counts of this moment. Raises ObjectNotFoundError."""
        return self._get(owner, batch_id)

    @transaction
    def page(self, owner: str, *, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """Batches of a list, newest first, and whether more follow. Raises ObjectNotFoundError for an unknown
        `after`."""
        start = self.database.page_start("batches", owner, after, ascending=False)
        rows = self.database.connection.execute(
            "SELECT object FROM batches WHERE owner = ? AND seq < ? ORDER BY seq DESC LIMIT ?",
            (owner, start, limit + 1),
        ).fetchall()
        return [self._counted(_decode(row[0])) for row in rows[:limit]], len(rows) > limit

    @transaction
    def unfinished(self) -> list[tuple[str, str]]:
        """(owner, id) of every batch that is not final, oldest first."""
        return self.database.connection.execute(
            "SELECT owner, id FROM batches WHERE NOT is_final ORDER BY seq"
        ).fetchall()

    @transaction
    def change(self, owner: str, batch_id: str, change: Change) -> Batch:
        """The batch after `change`, which may raise to leave it as it was. Raises ObjectNotFoundError."""
        batch = self._get(owner, batch_id)
        change(batch)
        self._save(batch)
        return batch

    @transaction
    def check_room(self, owner: str, batch_id: str) -> None:
        """Raises StorageError if no result could be stored now."""
        self._check_limit(0)
        self._save(self._get(owner, batch_id))  # whether the disk takes anything is known when it has

    @transaction
    def add_result(self, batch_id: str, result: Result) -> None:
        """Raises StorageError."""
        self._check_limit(len(result.line))
        self._insert_results(batch_id, [result])

    @transaction
    def add_last_results(self, batch_id: str, results: list[Result]) -> None:
        """Those of lines that a batch leaves undone. They are small, and kept beyond the limit, too: a batch
        must be able to end."""
        self._insert_results(batch_id, results)

    @transaction
    def answered(self, batch_id: str) -> set[int]:
        """Numbers of the lines that have a result."""
        rows = self.database.connection.execute("SELECT number FROM results WHERE batch_id = ?", (batch_id,))
        return {row[0] for row in rows}

    async def finish(self, owner: str, batch_id: str, change: Change) -> Batch:
        """Turn the results into output files and have `change` make the batch final. Raises StorageError."""
        seconds = await self._output_seconds(batch_id)
        output = await self._write_results(
            batch_id, True, new_file("batch_output", f"{batch_id}_output.jsonl", 0, seconds)
        )
        errors = await self._write_results(
            batch_id, False, new_file("batch_output", f"{batch_id}_error.jsonl", 0, seconds)
        )
        return await self._finish(owner, batch_id, output, errors, change)

    async def _write_results(self, batch_id: str, is_success: bool, file: File) -> File | None:
        """`file` with its content, the results in the order of the input; None if there are none."""
        path = self._files.path(file.id)

        def write() -> int:
            with storage_errors(), self.database.reader() as connection, written_whole(path) as target:
                rows = connection.execute(
                    "SELECT line FROM results WHERE batch_id = ? AND is_success = ? ORDER BY number",
                    (batch_id, is_success),
                )
                return sum(target.write(row[0]) for row in rows)

        file.bytes = await asyncio.to_thread(write)
        if file.bytes:
            return file
        path.unlink()
        return None

    @transaction
    def _output_seconds(self, batch_id: str) -> int:
        return self.database.number("SELECT output_seconds FROM batches WHERE id = ?", batch_id)

    @transaction
    def _finish(
        self, owner: str, batch_id: str, output: File | None, errors: File | None, change: Change
    ) -> Batch:
        batch = self._get(owner, batch_id)  # its counts come from the results, which go
        change(batch)
        assert batch.status.is_final
        batch.output_file_id = None if output is None else output.id
        batch.error_file_id = None if errors is None else errors.id
        self._save(batch)
        self.database.connection.execute("DELETE FROM results WHERE batch_id = ?", (batch_id,))
        for file in (output, errors):
            if file is not None:
                self._files.insert(owner, file)
        return batch

    def _check_limit(self, size: int) -> None:
        limit = self._files.max_bytes
        if self.database.stored_bytes() + size >= limit:
            raise StorageFullError(f"A result would exceed the {limit} bytes that may be stored.")

    def _get(self, owner: str, batch_id: str) -> Batch:
        return self._counted(_decode(self.database.object("batches", owner, batch_id)))

    def _counted(self, batch: Batch) -> Batch:
        if not batch.status.is_final:
            row = self.database.connection.execute(
                "SELECT total(is_success), count(*), total(prompt_tokens), total(cached_tokens),"
                " total(generated_tokens) FROM results WHERE batch_id = ?",
                (batch.id,),
            ).fetchone()
            completed, answered, *tokens = (int(value) for value in row)
            batch.request_counts = RequestCounts(batch.request_counts.total, completed, answered - completed)
            batch.usage = BatchUsage.of(*tokens)
        return batch

    def _save(self, batch: Batch) -> None:
        self.database.connection.execute(
            "UPDATE batches SET is_final = ?, object = ? WHERE id = ?",
            (batch.status.is_final, msgspec.json.encode(batch), batch.id),
        )

    def _insert_results(self, batch_id: str, results: Iterable[Result]) -> None:
        self.database.connection.executemany(
            "INSERT OR IGNORE INTO results VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    batch_id,
                    result.number,
                    result.is_success,
                    result.tokens.prompt,
                    result.tokens.cached,
                    result.tokens.generated,
                    result.line,
                )
                for result in results
            ],
        )


_decode = msgspec.json.Decoder(Batch).decode
