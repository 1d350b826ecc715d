"""No process of the server outlives the one that started it."""

from __future__ import annotations

import ctypes
import signal
import sys


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, even while it loads or computes."""
    pr_set_pdeathsig = 1  # <sys/prctl.h>
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
