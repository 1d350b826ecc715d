"""Triton's kernels on a GPU where there is one, and in Triton's interpreter on the CPU everywhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

try:
    import triton  # noqa: F401
except ImportError:
    collect_ignore_glob = ["test_*.py"]  # Triton exists for Linux alone
else:
    from tests.triton.interpreter import mend_interpreter

    mend_interpreter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        # A GPU's exp returns infinity without a word; numpy's, on which the interpreter runs, warns.
        item.add_marker(pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero)"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
