"""Triton's kernels on a GPU where there is one, and in Triton's interpreter on the CPU everywhere else."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined, so before any module with kernels is imported.
    os.environ["TRITON_INTERPRET"] = "1"

try:
    import triton  # noqa: F401
except ImportError:
    collect_ignore_glob = ["test_*.py"]  # Triton exists for Linux alone
else:
    from tests.triton.interpreter import mend_interpreter

    mend_interpreter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # A GPU's exp returns infinity without a word; numpy's, on which the interpreter runs, warns.
        item.add_marker(pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero)"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
