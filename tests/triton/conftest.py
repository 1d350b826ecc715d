"""Triton's kernels on a GPU where there is one, and in Triton's interpreter on the CPU everywhere else."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined, so before any module with kernels is imported.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_ignore_collect() -> bool | None:
    """Triton exists for Linux alone."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return True
    return None


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
