"""What the kernels take of an H100 and an L4, as the compiler has it: no GPU is needed to know."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.triton.compilation import SHARED_MEMORY

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_kernel_spills_registers_or_takes_more_shared_memory_than_there_is() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    lines = subprocess.check_output(
        [sys.executable, "-m", "tests.triton.compilation"], env=environment, cwd=ROOT, text=True
    ).splitlines()
    kernels = [json.loads(line) for line in lines]
    assert {kernel["capability"] for kernel in kernels} == set(SHARED_MEMORY)
    for kernel in kernels:
        print(kernel)
        # The slow path of sin and cos, for large angles, keeps an array.
        assert kernel["stack"] <= (32 if "rotate" in kernel["kernel"] else 0), kernel
        assert kernel["shared_memory"] <= SHARED_MEMORY[kernel["capability"]], kernel
