"""The SQLite database of a store, and the one thread that uses it."""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import sqlite3
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar

from server.errors import ObjectNotFoundError, StorageError, StorageFullError, shown

logger = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL,
    purpose TEXT NOT NULL, bytes INTEGER NOT NULL, expires_at INTEGER, object BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL,
    input_file_id TEXT NOT NULL, output_seconds INTEGER NOT NULL, is_final INTEGER NOT NULL,
    object BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS results (
    batch_id TEXT NOT NULL, number INTEGER NOT NULL, is_success INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL, generated_tokens INTEGER NOT NULL,
    line BLOB NOT NULL, PRIMARY KEY (batch_id, number)
);
CREATE TABLE IF NOT EXISTS stored (bytes INTEGER NOT NULL);
INSERT INTO stored SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM stored);
CREATE TRIGGER IF NOT EXISTS file_added AFTER INSERT ON files
    BEGIN UPDATE stored SET bytes = bytes + NEW.bytes; END;
CREATE TRIGGER IF NOT EXISTS file_deleted AFTER DELETE ON files
    BEGIN UPDATE stored SET bytes = bytes - OLD.bytes; END;
CREATE TRIGGER IF NOT EXISTS result_added AFTER INSERT ON results
    BEGIN UPDATE stored SET bytes = bytes + length(NEW.line); END;
CREATE TRIGGER IF NOT EXISTS result_deleted AFTER DELETE ON results
    BEGIN UPDATE stored SET bytes = bytes - length(OLD.line); END;
"""
_LAST_ROW = 2**63 - 1

Table = Literal["files", "batches"]


class Database:
    """Laws:

    1. What a transaction has returned from survives the death of the process; it does all or nothing.
    2. One thread of its own runs the transactions: none blocks the event loop, and none runs beside another.
    3. `stored_bytes` is the size of all files and results, at any time.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError, sqlite3.Error."""
        self._path = path
        self.connection = self._connect()
        self.connection.executescript(_SCHEMA)
        self.thread = ThreadPoolExecutor(1, "store")

    async def close(self) -> None:
        """Once nothing uses it any more."""
        await asyncio.to_thread(self.thread.shutdown)
        self.connection.close()

    def stored_bytes(self) -> int:
        return self.number("SELECT bytes FROM stored")

    def number(self, query: str, *parameters: str) -> int:
        """The one number that a query yields."""
        return int(self.connection.execute(query, parameters).fetchone()[0])

    def object(self, table: Table, owner: str, object_id: str) -> bytes:
        """The JSON of a file or a batch. Raises ObjectNotFoundError, for another owner's, too."""
        content: bytes = self._row(table, "object", owner, object_id, f"{_NOUNS[table]}_id")
        return content

    def page_start(self, table: Table, owner: str, after: str | None, *, ascending: bool) -> int:
        """The `seq` beyond which a page begins. Raises ObjectNotFoundError for an unknown `after`."""
        if after is None:
            return 0 if ascending else _LAST_ROW
        return int(self._row(table, "seq", owner, after, "after"))

    def _row(self, table: Table, column: str, owner: str, object_id: str, param: str) -> Any:
        row = self.connection.execute(
            f"SELECT {column} FROM {table} WHERE id = ? AND owner = ?", (object_id, owner)
        ).fetchone()
        if row is None:
            raise ObjectNotFoundError(f"There is no {_NOUNS[table]} {shown(object_id)}.", param=param)
        return row[0]

    @contextmanager
    def reader(self) -> Iterator[sqlite3.Connection]:
        """A connection for a long read in any thread, which holds nobody up."""
        connection = self._connect()
        try:
            yield connection
        finally:
            connection.close()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, check_same_thread=False)
        # A write-ahead log survives the process without a flush for each line, and lets readers go on.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        return connection


_NOUNS = {"files": "file", "batches": "batch"}


@contextmanager
def storage_errors() -> Iterator[None]:
    """What the disk refuses becomes a StorageError, or StorageFullError."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        logger.error("the data directory failed: %s", error)
        is_full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        if is_full or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageFullError("The server's disk is full.") from error
        raise StorageError("The server's data directory failed.") from error


class _HasDatabase(Protocol):
    @property
    def database(self) -> Database: ...


_Self = TypeVar("_Self", bound=_HasDatabase)
_P = ParamSpec("_P")
_R = TypeVar("_R")


def transaction(
    method: Callable[Concatenate[_Self, _P], _R],
) -> Callable[Concatenate[_Self, _P], Coroutine[Any, Any, _R]]:
    """The method as a coroutine that runs as one transaction in the database's thread."""

    async def call(self: _Self, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        def run() -> _R:
            with storage_errors(), self.database.connection:
                return method(self, *args, **kwargs)

        return await asyncio.get_running_loop().run_in_executor(self.database.thread, run)

    functools.update_wrapper(call, method)
    return call
