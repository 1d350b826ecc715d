"""What the compiler makes of the kernels for GPUs, none of which is needed to know."""

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


def output_of(module: str) -> list[str]:
    """Lines that a program prints which does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module]
    return subprocess.check_output(command, env=environment, cwd=ROOT, text=True).splitlines()


def test_a_step_of_another_shape_compiles_nothing() -> None:
    (line,) = output_of("tests.triton.variants")
    assert json.loads(line) == {"embed_rows": 1, "rotate_and_store": 1, "attend": 1}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_kernel_spills_registers_or_takes_more_shared_memory_than_there_is() -> None:
    kernels = [json.loads(line) for line in output_of("tests.triton.compilation")]
    assert {kernel["capability"] for kernel in kernels} == set(SHARED_MEMORY)
    for kernel in kernels:
        print(kernel)
        # The slow path of sin and cos, for large angles, keeps an array.
        assert kernel["stack"] <= (32 if "rotate" in kernel["kernel"] else 0), kernel
        assert kernel["shared_memory"] <= SHARED_MEMORY[kernel["capability"]], kernel
