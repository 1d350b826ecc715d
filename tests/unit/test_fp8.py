"""Matrices in e4m3: what rounding them means, on the reference back end."""

from __future__ import annotations

import math

import pytest
import torch

from server.engine.backend import fp8
from server.engine.backend.choose import BackendError, choose_backend
from server.engine.backend.reference import ReferenceBackend
from server.engine.dtype import DType
from server.engine.memory import weight_bytes
from server.engine.models.config import expected_weights
from server.engine.models.config_reader import read_hf
from tests.parity.harness import CONFIGS

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


WIDE = CONFIGS["gemma1"] | {"hidden_size": 64, "intermediate_size": 128}


def test_matrices_are_in_8_bits_and_the_embedding_is_not() -> None:
    backend = ReferenceBackend(CPU, DType.BFLOAT16, "fp8")
    assert isinstance(backend.prepare_linear(torch.ones(64, 128)), fp8.Fp8Matrix)
    assert isinstance(backend.prepare_linear(torch.ones(67, 32)), torch.Tensor), "which no kernel multiplies"
    assert isinstance(backend.prepare_embedding(torch.ones(64, 128)), torch.Tensor)


def test_the_account_of_weights_is_true() -> None:
    config = read_hf(WIDE | {"head_dim": 64})
    backend = ReferenceBackend(CPU, DType.BFLOAT16, "fp8")
    size = 0
    for name, shape in expected_weights(config).items():
        tensor = torch.ones(shape)
        if name.endswith("norm.weight"):
            size += 4 * shape[0]
        elif name == "embed_tokens.weight":
            size += backend.prepare_embedding(tensor).nbytes
        else:
            matrix = backend.prepare_linear(tensor)
            assert isinstance(matrix, fp8.Fp8Matrix)
            size += matrix.codes.nbytes + matrix.scales.nbytes
    assert weight_bytes(config, 2, "fp8") == size


def test_the_native_kernels_do_not_have_it() -> None:
    with pytest.raises(BackendError, match="--quantization fp8: the native CPU kernels do not have it"):
        choose_backend("auto", "auto", "cpu", DType.BFLOAT16, 1, "fp8")
