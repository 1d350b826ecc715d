"""Matrices in 4 bits: what rounding them means, on the reference back end."""

from __future__ import annotations

import math

import pytest
import torch

from server.engine.backend import int4
from server.engine.backend.int4 import Int4Matrix
from server.engine.backend.reference import ReferenceBackend
from server.engine.dtype import DType

CPU = torch.device("cpu")


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_a_matrix_on_a_grid_of_its_range_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-5, 11, (8, 8, 32), generator=generator).float()
    codes[:, :, :2] = torch.tensor([-5.0, 10.0])  # the whole range occurs
    scales = 2.0 ** torch.randint(-9, 3, (8, 8, 1), generator=generator)
    weight = (codes * scales).view(8, 256)
    assert torch.equal(int4.quantize(weight).dequantize(), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_in_q4_0_is_not_rounded_again(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (8, 8, 32), generator=generator).float()
    codes[:, :, 5] = -8.0
    scales = torch.randn(8, 8, 1, generator=generator).half().float()  # of either sign
    weight = (codes * scales).view(8, 256).to(dtype)
    restored = int4.quantize(weight).dequantize()
    torch.testing.assert_close(restored, weight.float(), rtol=2**-7, atol=0)


def test_an_error_is_at_most_that_of_the_whole_range() -> None:
    weight = normal(16, 512)
    restored = int4.quantize(weight).dequantize()
    groups = weight.view(16, 16, 32)
    step = (groups.amax(2) - groups.amin(2)) / 15
    # The zero is rounded, too, and the ends of the range may be cut off by half a step.
    assert ((restored - weight).view(16, 16, 32).abs().amax(2) < 1.02 * step).all()
    # Numbers rounded to multiples of a step have a mean squared error of step^2 / 12.
    assert (restored - weight).square().mean() < 1.1 * step.square().mean() / 12


def test_a_matrix_is_rounded_in_blocks_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(7, 256)
    whole = int4.quantize(weight)
    monkeypatch.setattr(int4, "_QUANTIZED_AT_ONCE", 512)
    blocks = int4.quantize(weight)
    assert torch.equal(whole.codes, blocks.codes)
    assert torch.equal(whole.scaling, blocks.scaling)


def test_groups_of_zeros_and_of_one_sign_only() -> None:
    weight = torch.zeros(64, 384)
    weight[:, 128:256] = 3.0
    weight[:, 256:] = -0.5
    assert torch.equal(int4.quantize(weight).dequantize(), weight)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen(wrong: float) -> None:
    weight = torch.ones(64, 128)
    weight[5, 3] = wrong
    result = int4.multiply(torch.ones(2, 128), int4.quantize(weight))
    assert result[:, 5].isnan().all()
    assert result[:, :5].isfinite().all()


def test_a_product_is_that_of_the_rounded_numbers() -> None:
    x, weight = normal(3, 256), normal(64, 256)
    matrix = int4.quantize(weight)
    for dtype in (torch.float32, torch.bfloat16):
        exact = x.to(dtype).double() @ matrix.dequantize().to(dtype).double().T
        product = int4.multiply(x.to(dtype), matrix)
        torch.testing.assert_close(
            product, exact.to(dtype), rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-5
        )


def test_matrices_are_in_4_bits_and_the_embedding_is_not() -> None:
    backend = ReferenceBackend(CPU, DType.BFLOAT16, "int4")
    assert isinstance(backend.prepare_linear(torch.ones(64, 128)), Int4Matrix)
    assert isinstance(backend.prepare_linear(torch.ones(64, 192)), torch.Tensor), "which no kernel multiplies"
    assert isinstance(backend.prepare_embedding(torch.ones(64, 128)), torch.Tensor)
