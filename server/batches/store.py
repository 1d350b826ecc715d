"""A directory of the server's own, with what must outlive it.

DIRECTORY/store.sqlite3    what there is, and the results of batches that are not finished
DIRECTORY/files/ID         contents
DIRECTORY/lock             held while a server uses the directory
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path

from server.batches.batch_store import BatchStore
from server.batches.database import Database
from server.batches.file_store import FileStore
from server.config import OptionError


class Store:
    """Belongs to one process at a time; only its user may look into the directory."""

    def __init__(self, directory: Path, *, max_bytes: int, max_files: int) -> None:
        """`max_bytes` of files and results of all owners, `max_files` of each owner. Raises OptionError."""
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise OptionError(f"--data-dir {directory}: {error}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._database = Database(directory / "store.sqlite3")
            self.files = FileStore(
                self._database, directory / "files", max_bytes=max_bytes, max_files=max_files
            )
        except BlockingIOError:
            os.close(self._lock)
            raise OptionError(f"--data-dir {directory}: another server uses it") from None
        except (OSError, sqlite3.Error) as error:
            os.close(self._lock)
            raise OptionError(f"--data-dir {directory}: {error}") from None
        self.batches = BatchStore(self._database, self.files)

    async def close(self) -> None:
        """Once nothing uses it any more."""
        await self._database.close()
        os.close(self._lock)
