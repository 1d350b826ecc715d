"""Where the server keeps what it made once and can make again, and how it writes it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def cache_directory() -> Path:
    """`gemma-server` in the user's cache directory (XDG_CACHE_HOME, or ~/.cache); may not exist yet."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification has relative paths ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "gemma-server"


@contextmanager
def written_whole(target: Path) -> Iterator[BinaryIO]:
    """A file beside the target that takes its name on leaving, so that others see the whole file or none.

    Makes the directory. An exception leaves the target as it was, and nothing beside it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
