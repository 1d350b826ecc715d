"""Files that clients uploaded, and those that batches wrote. Laws:

1. Paths are made of ids that were made here. What a client calls its file is never part of one.
2. A file has a row only while its content is whole: the content is written first and deleted last.
3. Everything has an owner, and every method that a client can reach asks for it.
"""

from __future__ import annotations

import asyncio
import shutil
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from server.batches.database import Database, storage_errors, transaction
from server.batches.objects import File
from server.cache_directory import written_whole
from server.errors import ConflictError, StorageFullError


class FileStore:
    def __init__(self, database: Database, directory: Path, *, max_bytes: int, max_files: int) -> None:
        """`max_bytes` of files and results of all owners, `max_files` of each owner. Raises OSError."""
        self.database = database
        self.max_bytes = max_bytes
        self._max_files = max_files
        self._directory = directory
        directory.mkdir(mode=0o700, exist_ok=True)
        self._remove_orphans()

    def path(self, file_id: str) -> Path:
        """The content of a file that is known to exist."""
        return self._directory / file_id

    async def add(self, owner: str, filename: str, source: BinaryIO, size: int, lifetime: int | None) -> File:
        """A batch's input with the rest of `source` as its content; `lifetime` in seconds, None: for ever.

        Raises StorageError.
        """
        await self.check_room(owner, size)
        file = new_file("batch", filename, size, lifetime)

        def copy() -> None:
            with storage_errors(), written_whole(self.path(file.id)) as target:
                shutil.copyfileobj(source, target, 1 << 20)

        await asyncio.to_thread(copy)
        await self._insert(owner, file)
        return file

    @transaction
    def check_room(self, owner: str, size: int) -> None:
        """Raises StorageFullError."""
        stored = self.database.stored_bytes()
        if stored + size > self.max_bytes:
            raise StorageFullError(
                f"The server keeps at most {self.max_bytes} bytes and has {stored}, which leaves no room for "
                f"{size} more: delete files."
            )
        if self.database.number("SELECT count(*) FROM files WHERE owner = ?", owner) >= self._max_files:
            raise StorageFullError(f"The server keeps at most {self._max_files} files of one key: delete some.")

    @transaction
    def get(self, owner: str, file_id: str) -> File:
        """Raises ObjectNotFoundError."""
        return self._get(owner, file_id)

    @transaction
    def page(
        self, owner: str, *, purpose: str | None, after: str | None, limit: int, ascending: bool
    ) -> tuple[list[File], bool]:
        """Files of a list, and whether more follow. Raises ObjectNotFoundError for an unknown `after`."""
        order, beyond = ("ASC", ">") if ascending else ("DESC", "<")
        rows = self.database.connection.execute(
            f"SELECT object FROM files WHERE owner = ? AND seq {beyond} ? AND purpose = coalesce(?, purpose)"
            f" ORDER BY seq {order} LIMIT ?",
            (
                owner,
                self.database.page_start("files", owner, after, ascending=ascending),
                purpose,
                limit + 1,
            ),
        ).fetchall()
        return [_decode(row[0]) for row in rows[:limit]], len(rows) > limit

    @transaction
    def delete(self, owner: str, file_id: str) -> None:
        """Raises ObjectNotFoundError, and ConflictError for the input of a batch that is not finished."""
        file = self._get(owner, file_id)
        user = self.database.connection.execute(
            "SELECT id FROM batches WHERE NOT is_final AND input_file_id = ?", (file_id,)
        ).fetchone()
        if user is not None:
            raise ConflictError(
                f"The file is the input of {user[0]}, which is not finished: cancel that first."
            )
        self._delete([file])

    @transaction
    def delete_expired(self, now: int) -> int:
        """Delete files whose time is over, unless a batch still reads them; returns how many."""
        rows = self.database.connection.execute(
            "SELECT object FROM files WHERE expires_at <= ?"
            " AND id NOT IN (SELECT input_file_id FROM batches WHERE NOT is_final)",
            (now,),
        )
        expired = [_decode(row[0]) for row in rows]
        self._delete(expired)
        return len(expired)

    @transaction
    def totals(self) -> tuple[int, int]:
        """Number of files, and bytes of files and results."""
        return self.database.number("SELECT count(*) FROM files"), self.database.stored_bytes()

    def insert(self, owner: str, file: File) -> None:
        """Add the row of a file whose content is written. To be called within a transaction."""
        self.database.connection.execute(
            "INSERT INTO files (id, owner, purpose, bytes, expires_at, object) VALUES (?, ?, ?, ?, ?, ?)",
            (file.id, owner, file.purpose, file.bytes, file.expires_at, msgspec.json.encode(file)),
        )

    @transaction
    def _insert(self, owner: str, file: File) -> None:
        self.insert(owner, file)

    def _get(self, owner: str, file_id: str) -> File:
        return _decode(self.database.object("files", owner, file_id))

    def _delete(self, files: Iterable[File]) -> None:
        for file in files:
            self.database.connection.execute("DELETE FROM files WHERE id = ?", (file.id,))
        self.database.connection.commit()
        for file in files:
            self.path(file.id).unlink(missing_ok=True)

    def _remove_orphans(self) -> None:
        """Contents that a process wrote, and then died before it could say so."""
        known = {row[0] for row in self.database.connection.execute("SELECT id FROM files")}
        for path in self._directory.iterdir():
            if path.name not in known:
                path.unlink()


def new_file(purpose: Literal["batch", "batch_output"], filename: str, size: int, lifetime: int | None) -> File:
    now = int(time.time())
    return File(
        id=f"file-{uuid.uuid4().hex}",
        bytes=size,
        created_at=now,
        filename=filename,
        purpose=purpose,
        expires_at=None if lifetime is None else now + lifetime,
    )


_decode = msgspec.json.Decoder(File).decode
