"""Where the server keeps what it made once and can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """`gemma-server` in the user's cache directory (XDG_CACHE_HOME, or ~/.cache); may not exist yet."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification has relative paths ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "gemma-server"
