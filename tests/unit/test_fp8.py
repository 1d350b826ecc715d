"""Matrices in e4m3: what rounding them means, on the reference back end."""

from __future__ import annotations

import math

import pytest
import torch

from server.engine.backend import fp8
from server.engine.backend.reference import ReferenceBackend
from server.engine.dtype import DType

CPU = torch.device("cpu")


def test_the_largest_weight_of_an_output_is_exact_and_others_are_near() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    matrix = fp8.quantize(weight)
    restored = matrix.codes.float() * matrix.scales[:, None]
    largest = weight.abs().argmax(dim=1, keepdim=True)
    torch.testing.assert_close(restored.gather(1, largest), weight.gather(1, largest), rtol=1e-6, atol=0)
    # 3 bits of fraction; the smallest normal number is 2**-6 of the code, which is at most 448.
    error = (restored - weight).abs()
    assert (error <= weight.abs() / 16 + matrix.scales[:, None] * 2**-10).all()


def test_a_matrix_is_rounded_in_blocks_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    whole = fp8.quantize(weight)
    monkeypatch.setattr(fp8, "_QUANTIZED_AT_ONCE", 128)
    blocks = fp8.quantize(weight)
    assert torch.equal(whole.codes.view(torch.uint8), blocks.codes.view(torch.uint8))
    assert torch.equal(whole.scales, blocks.scales)


def test_a_product_is_that_of_the_rounded_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 64, generator=generator), torch.randn(64, 64, generator=generator)
    codes, scales = fp8.quantize_rows(x)
    matrix = fp8.quantize(weight)
    exact = (codes.double() * scales[:, None].double()) @ (matrix.codes.double() * matrix.scales[:, None]).T
    torch.testing.assert_close(fp8.multiply(x, matrix), exact.float(), rtol=1e-5, atol=1e-5)
    assert (exact - x.double() @ weight.double().T).norm() < 0.06 * exact.norm()


def test_what_is_not_finite_stays_so() -> None:
    x = torch.ones(2, 64)
    x[1, 3] = math.nan
    result = fp8.multiply(x, fp8.quantize(torch.ones(64, 64)))
    torch.testing.assert_close(result[0], torch.full((64,), 64.0))
    assert result[1].isnan().all()


def test_matrices_are_in_8_bits_and_the_embedding_is_not() -> None:
    backend = ReferenceBackend(CPU, DType.BFLOAT16, "fp8")
    assert isinstance(backend.prepare_linear(torch.ones(64, 128)), fp8.Fp8Matrix)
    assert isinstance(backend.prepare_linear(torch.ones(67, 32)), torch.Tensor), "which no kernel multiplies"
    assert isinstance(backend.prepare_embedding(torch.ones(64, 128)), torch.Tensor)
