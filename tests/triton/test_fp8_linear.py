"""Products in 8 bits against `backend.fp8`."""

from __future__ import annotations

import pytest
import torch

from server.engine.backend import fp8
from server.engine.backend.triton.fp8_linear import Fp8Linear
from tests.triton.layers import normal

SIDES = [(64, 64), (192, 128), (128, 640), (64, 2048)]
"""Of matrices: outputs and inputs."""


@pytest.mark.parametrize("num_rows", [1, 5, 16, 17, 33, 130])
@pytest.mark.parametrize(("outputs", "inputs"), SIDES)
@pytest.mark.parametrize("multiprocessors", [1, 132], ids=["whole", "in parts"])
def test_any_number_of_rows(
    device: torch.device, num_rows: int, outputs: int, inputs: int, multiprocessors: int
) -> None:
    x = normal(num_rows, inputs, dtype=torch.bfloat16, seed=1)
    matrix = fp8.quantize(normal(outputs, inputs, seed=2).to(device) / inputs**0.5)
    ours = Fp8Linear(multiprocessors)(x.to(device), matrix).cpu().float()
    expected = fp8.multiply(x, fp8.Fp8Matrix(matrix.codes.cpu(), matrix.scales.cpu())).float()
    assert (ours - expected).norm() < 3e-3 * expected.norm()


def test_the_width_is_cut_where_there_is_little_else_to_deal_out() -> None:
    linear = Fp8Linear(132)
    assert linear.plan(1, 2048, 16_384).parts > 1
    assert linear.plan(1, 32_768, 2048).parts == 1
    assert linear.plan(4096, 2048, 16_384).parts == 1
    for num_rows in (1, 20, 64, 300):
        launch = linear.plan(num_rows, 2560, 2048)
        assert 2560 % launch.block_n == 0
        assert 2048 % launch.block_k == 0


def test_a_row_has_the_same_result_in_any_company(device: torch.device) -> None:
    x = normal(16, 640, dtype=torch.bfloat16).to(device)
    matrix = fp8.quantize(normal(128, 640, seed=2).to(device))
    linear = Fp8Linear(132)
    together = linear(x, matrix)
    for row in (0, 7, 15):
        assert torch.equal(linear(x[row : row + 1].contiguous(), matrix)[0], together[row])


def test_rows_and_outputs_of_zeros(device: torch.device) -> None:
    x = torch.zeros(3, 64, dtype=torch.bfloat16, device=device)
    x[1] = 2.0
    weight = torch.zeros(64, 64, device=device)
    weight[5] = 0.5
    result = Fp8Linear(132)(x, fp8.quantize(weight))
    assert result[1, 5] == 64.0  # in bf16
    assert result.sum() == 64.0
