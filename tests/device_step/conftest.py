from __future__ import annotations

from tests.one_torch_thread import one_torch_thread

__all__ = ["one_torch_thread"]
