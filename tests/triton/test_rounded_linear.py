"""Products with rounded matrices against `backend.fp8` and `backend.int4`."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from server.engine.backend import fp8, int4
from server.engine.backend.triton.fp8_linear import Fp8Linear
from server.engine.backend.triton.int4_linear import Int4Linear
from tests.triton.layers import normal

FORMATS: dict[str, tuple[Any, Any]] = {"fp8": (fp8, Fp8Linear), "int4": (int4, Int4Linear)}
SIDES = {
    "fp8": [(64, 64), (192, 128), (128, 640), (64, 2048)],
    "int4": [(64, 128), (192, 384), (128, 640), (64, 2048)],
}
"""Of matrices: outputs and inputs."""


def on_cpu(matrix: Any) -> Any:
    return replace(matrix, **{field.name: getattr(matrix, field.name).cpu() for field in fields(matrix)})


@pytest.mark.parametrize("num_rows", [1, 5, 16, 17, 33, 130])
@pytest.mark.parametrize(
    ("name", "outputs", "inputs"), [(name, *sides) for name, all_sides in SIDES.items() for sides in all_sides]
)
@pytest.mark.parametrize("multiprocessors", [1, 132], ids=["whole", "in parts"])
def test_any_number_of_rows(
    device: torch.device, num_rows: int, name: str, outputs: int, inputs: int, multiprocessors: int
) -> None:
    form, linear = FORMATS[name]
    x = normal(num_rows, inputs, dtype=torch.bfloat16, seed=1)
    matrix = form.quantize(normal(outputs, inputs, seed=2).to(device) / inputs**0.5)
    ours = linear(multiprocessors)(x.to(device), matrix).cpu().float()
    expected = form.multiply(x, on_cpu(matrix)).float()
    assert (ours - expected).norm() < 3e-3 * expected.norm()


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_has_the_same_result_in_any_company(device: torch.device, name: str) -> None:
    form, linear_of = FORMATS[name]
    x = normal(16, 640, dtype=torch.bfloat16).to(device)
    matrix = form.quantize(normal(128, 640, seed=2).to(device))
    linear = linear_of(132)
    together = linear(x, matrix)
    for row in (0, 7, 15):
        assert torch.equal(linear(x[row : row + 1].contiguous(), matrix)[0], together[row])


def test_the_width_is_cut_where_there_is_little_else_to_deal_out_in_8_bits() -> None:
    linear = Fp8Linear(132)
    assert linear.plan(1, 2048, 16_384).parts > 1
    assert linear.plan(1, 32_768, 2048).parts == 1
    assert linear.plan(4096, 2048, 16_384).parts == 1
    for num_rows in (1, 20, 64, 300):
        launch = linear.plan(num_rows, 2560, 2048)
        assert 2560 % launch.block_n == 0
        assert 2048 % launch.block_k == 0


def test_the_width_is_cut_where_there_is_little_else_to_deal_out_in_4_bits() -> None:
    linear = Int4Linear(132)
    assert linear.plan(1, 2048, num_blocks=128).parts > 1
    assert linear.plan(1, 32_768, num_blocks=16).parts == 1
    assert linear.plan(4096, 2048, num_blocks=128).parts == 1
    for num_rows in (1, 20, 64, 300):
        assert 2560 % linear.plan(num_rows, 2560, num_blocks=16).block_n == 0


def test_rows_and_outputs_of_zeros_in_8_bits(device: torch.device) -> None:
    x = torch.zeros(3, 64, dtype=torch.bfloat16, device=device)
    x[1] = 2.0
    weight = torch.zeros(64, 64, device=device)
    weight[5] = 0.5
    result = Fp8Linear(132)(x, fp8.quantize(weight))
    assert result[1, 5] == 64.0  # in bf16
    assert result.sum() == 64.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_in_4_bits(device: torch.device, dtype: torch.dtype) -> None:
    x = normal(9, 640, dtype=dtype, seed=1)
    matrix = int4.quantize(normal(128, 640, seed=2).to(device) / 640**0.5)
    ours = Int4Linear(132)(x.to(device), matrix)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.cpu(), int4.multiply(x, on_cpu(matrix)), rtol=1e-3, atol=1e-5)


def test_blocks_that_cannot_be_dealt_out_evenly_in_4_bits(device: torch.device) -> None:
    linear = Int4Linear(132)
    inputs = 128 * 27
    assert linear.plan(1, 64, num_blocks=27).parts == 4
    x = normal(1, inputs, dtype=torch.bfloat16, seed=1)
    matrix = int4.quantize(normal(64, inputs, seed=2).to(device))
    expected = int4.multiply(x, on_cpu(matrix)).float()
    assert (linear(x.to(device), matrix).cpu().float() - expected).norm() < 3e-3 * expected.norm()
