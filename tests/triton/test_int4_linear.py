"""Products with matrices in 4 bits against `backend.int4`."""

from __future__ import annotations

import pytest
import torch

from server.engine.backend import int4
from server.engine.backend.int4 import Int4Matrix
from server.engine.backend.triton.int4_linear import Int4Linear
from tests.triton.layers import normal

SIDES = [(64, 128), (192, 384), (128, 640), (64, 2048)]
"""Of matrices: outputs and inputs."""


def on_cpu(matrix: Int4Matrix) -> Int4Matrix:
    return Int4Matrix(matrix.codes.cpu(), matrix.scaling.cpu())


@pytest.mark.parametrize("num_rows", [1, 16, 17, 33, 130])
@pytest.mark.parametrize(("outputs", "inputs"), SIDES)
@pytest.mark.parametrize("multiprocessors", [1, 132], ids=["whole", "in parts"])
def test_any_number_of_rows(
    device: torch.device, num_rows: int, outputs: int, inputs: int, multiprocessors: int
) -> None:
    x = normal(num_rows, inputs, dtype=torch.bfloat16, seed=1)
    matrix = int4.quantize(normal(outputs, inputs, seed=2).to(device) / inputs**0.5)
    ours = Int4Linear(multiprocessors)(x.to(device), matrix).cpu().float()
    expected = int4.multiply(x, on_cpu(matrix)).float()
    assert (ours - expected).norm() < 3e-3 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_in_other_dtypes(device: torch.device, dtype: torch.dtype) -> None:
    x = normal(9, 640, dtype=dtype, seed=1)
    matrix = int4.quantize(normal(128, 640, seed=2).to(device) / 640**0.5)
    ours = Int4Linear(132)(x.to(device), matrix)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.cpu(), int4.multiply(x, on_cpu(matrix)), rtol=1e-3, atol=1e-5)


def test_the_width_is_cut_where_there_is_little_else_to_deal_out() -> None:
    linear = Int4Linear(132)
    assert linear.plan(1, 2048, num_blocks=128).parts > 1
    assert linear.plan(1, 32_768, num_blocks=16).parts == 1
    assert linear.plan(4096, 2048, num_blocks=128).parts == 1
    for num_rows in (1, 20, 64, 300):
        assert 2560 % linear.plan(num_rows, 2560, num_blocks=16).block_n == 0


def test_blocks_that_cannot_be_dealt_out_evenly(device: torch.device) -> None:
    linear = Int4Linear(132)
    inputs = 128 * 27
    assert linear.plan(1, 64, num_blocks=27).parts == 4
    x = normal(1, inputs, dtype=torch.bfloat16, seed=1)
    matrix = int4.quantize(normal(64, inputs, seed=2).to(device))
    expected = int4.multiply(x, on_cpu(matrix)).float()
    assert (linear(x.to(device), matrix).cpu().float() - expected).norm() < 3e-3 * expected.norm()


def test_a_row_has_the_same_result_in_any_company(device: torch.device) -> None:
    x = normal(16, 640, dtype=torch.bfloat16).to(device)
    matrix = int4.quantize(normal(128, 640, seed=2).to(device))
    linear = Int4Linear(132)
    together = linear(x, matrix)
    for row in (0, 7, 15):
        assert torch.equal(linear(x[row : row + 1].contiguous(), matrix)[0], together[row])
