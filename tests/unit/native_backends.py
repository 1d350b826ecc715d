"""Native back ends of every level and number of threads, for tests; skipped where they cannot be."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from server.engine.backend.native import LEVELS, NativeBackend
from server.engine.backend.native_library import NativeUnavailableError
from server.engine.backend.reference import ReferenceBackend

THREADS = (1, 2)


@cache
def native_backend(dtype: torch.dtype, level: str = "auto", num_threads: int = 2) -> NativeBackend:
    try:
        return NativeBackend(dtype, num_threads, level)
    except NativeUnavailableError as error:
        pytest.skip(f"no native kernels: {error}")


REFERENCE = {dtype: ReferenceBackend(torch.device("cpu"), dtype) for dtype in (torch.float32, torch.bfloat16)}
"""What the native ones are compared with."""

every_level = pytest.mark.parametrize("level", LEVELS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
