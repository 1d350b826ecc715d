"""Native back ends of every level and number of threads, for tests; skipped where they cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch

from server.engine.backend.native import LEVELS, NativeBackend
from server.engine.backend.native_library import NativeUnavailableError

THREADS = (1, 2)


@cache
def native_backend(dtype: torch.dtype, level: str = "auto", num_threads: int = 2) -> NativeBackend:
    try:
        return NativeBackend(dtype, num_threads, level)
    except NativeUnavailableError as error:
        pytest.skip(f"no native kernels: {error}")


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """For the reference: on busy cores, torch's threads wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


every_level = pytest.mark.parametrize("level", LEVELS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
