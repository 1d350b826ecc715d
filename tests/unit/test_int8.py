"""Weights in 8 bits: their rounding, and the products of both back ends against exact arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from server.engine.backend import int8
from server.engine.backend.int8 import QuantizedMatrix
from server.engine.backend.reference import ReferenceBackend, ReferenceStep
from server.engine.inputs import ModelInputs
from tests.one_torch_thread import one_torch_thread
from tests.unit.native_backends import CPU, THREADS, Native, dtype_of, every_dtype, every_level
from tests.unit.test_native_ops import assert_logits_are_rounded_then_capped, normal

__all__ = ["one_torch_thread"]  # a fixture

ROWS = [*range(1, 15), 32, 119, 120, 121, 130]
SHAPES = [(1, 1), (16, 16), (15, 33), (40, 640), (97, 511), (64, 1031), (33, 2050)]


def native(dtype: torch.dtype, level: str, num_threads: int = 2) -> Native:
    return Native(dtype, level, num_threads, "int8")


def reference(dtype: torch.dtype) -> ReferenceBackend:
    return ReferenceBackend(CPU, dtype_of(dtype), "int8")


def exact(x: Tensor, weight: QuantizedMatrix) -> Tensor:
    """With x as it is, in float64."""
    return x.double() @ weight.integers.double().T * weight.scales.double()


def bound(x: Tensor, weight: QuantizedMatrix) -> Tensor:
    """How far a product may be off whose x was rounded to 15 bits and a sign: each input by half a unit."""
    unit = x.double().abs().amax(dim=1, keepdim=True) / 32767
    return unit / 2 * weight.integers.double().abs().sum(dim=1) * weight.scales.double()


# --- rounding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 100, 40_000])
def test_weights_are_rounded_to_the_nearest_of_255_multiples(rows: int) -> None:
    weight = normal(rows, 7) * torch.logspace(-3, 3, rows)[:, None]
    quantized = int8.quantize(weight)
    assert quantized.integers.dtype is torch.int8
    assert torch.equal(quantized.scales, weight.abs().amax(dim=1) / 127)
    assert (quantized.integers.int().abs().amax(dim=1) == 127).all()
    error = quantized.integers.double() * quantized.scales[:, None].double() - weight.double()
    assert (error.abs() <= quantized.scales[:, None] * (0.5 + 1e-5)).all()


def test_halves_are_rounded_to_even() -> None:
    assert int8.quantize(torch.tensor([[127.0, 0.5, 1.5, -2.5]])).integers.tolist() == [[127, 0, 2, -2]]


def test_rows_without_a_weight_and_with_tiny_ones_have_integers_in_range() -> None:
    quantized = int8.quantize(torch.tensor([[0.0, 0.0], [1e-44, -1e-44], [1e-40, 0.0]]))
    assert quantized.integers[0].tolist() == [0, 0]
    assert quantized.integers.int().abs().max() <= 127
    assert quantized.scales.isfinite().all()


def test_quantizing_leaves_the_weights_as_they_were() -> None:
    weight = normal(3, 5)
    int8.quantize(weight)
    assert torch.equal(weight, normal(3, 5))


# --- the reference -----------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize(("outputs", "inputs"), [*SHAPES, (3000, 512)])
def test_the_references_product_is_that_of_the_rounded_weights(
    dtype: torch.dtype, outputs: int, inputs: int
) -> None:
    weight = normal(outputs, inputs, dtype=dtype) / math.sqrt(inputs)
    x = normal(9, inputs, dtype=dtype, seed=1)
    ours = reference(dtype).linear(x, reference(dtype).prepare_linear(weight))
    assert ours.dtype is dtype
    expected = exact(x, int8.quantize(weight))
    unit = 2**-8 if dtype is torch.bfloat16 else 2**-20
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=unit)


# --- the native kernels ------------------------------------------------------------------------------------


@every_level
@every_dtype
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_a_product_is_off_by_no_more_than_the_rounding_of_its_rows(
    level: str, dtype: torch.dtype, outputs: int, inputs: int
) -> None:
    backend = native(dtype, level)
    weight = normal(outputs, inputs, dtype=dtype)
    packed = backend.backend.prepare_linear(weight)
    quantized = int8.quantize(weight)
    x = normal(max(ROWS), inputs, dtype=dtype, seed=1)
    x[1, inputs // 2] = 3000.0  # an outlier
    x[2] = 0.0
    expected = exact(x, quantized)
    # Beside that, some roundings of the sum in fp32, and one to bf16.
    unit = 2**-8 if dtype is torch.bfloat16 else 2**-21
    allowed = bound(x, quantized) + expected.abs() * unit + 1e-30
    for rows in ROWS:
        error = (backend.linear(x[:rows], packed).double() - expected[:rows]).abs()
        assert (error <= allowed[:rows]).all()
        assert rows < 3 or error[2].max() == 0


@every_level
def test_sums_of_the_largest_integers_do_not_overflow(level: str) -> None:
    """All weights and all inputs at their largest: 32767 * 127 * 512 is just below 2^31."""
    backend = native(torch.float32, level)
    packed = backend.backend.prepare_linear(torch.full((16, 2048), -1.0))
    ours = backend.linear(torch.full((7, 2048), 1.0), packed)
    torch.testing.assert_close(ours, torch.full((7, 16), -2048.0), atol=0, rtol=1e-6)


@every_level
@every_dtype
def test_a_row_of_a_product_does_not_depend_on_the_rows_beside_it(level: str, dtype: torch.dtype) -> None:
    packed = native(dtype, level).backend.prepare_linear(normal(333, 1100, dtype=dtype))
    x = normal(250, 1100, dtype=dtype, seed=1)
    of_all = native(dtype, level).linear(x, packed)
    for num_threads in THREADS:
        backend = native(dtype, level, num_threads)
        for rows in (*ROWS, 250):
            assert torch.equal(backend.linear(x[-rows:], packed), of_all[-rows:])


@every_level
@every_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_stay_visible_in_their_row_alone(
    level: str, dtype: torch.dtype, value: float
) -> None:
    backend = native(dtype, level)
    weight = backend.backend.prepare_embedding(normal(20, 70, dtype=dtype))
    x = normal(9, 70, dtype=dtype)
    clean = backend.linear(x, weight)
    x[4, 68] = value
    for result in (backend.linear(x, weight), backend.logits(x, weight, 30.0)):
        assert not result[4].isfinite().any()
    assert torch.equal(backend.linear(x, weight)[[0, 3, 5, 8]], clean[[0, 3, 5, 8]])


@every_level
def test_rows_and_weights_of_nothing_or_next_to_nothing_give_zeros(level: str) -> None:
    backend = native(torch.float32, level)
    x = normal(3, 40)
    x[1] = 0.0
    x[2] = 1e-42
    ours = backend.linear(x, backend.backend.prepare_linear(torch.cat((torch.zeros(3, 40), normal(5, 40)))))
    assert (ours[:, :3] == 0).all()
    assert (ours[1:] == 0).all()
    assert (ours[0, 3:] != 0).all()


@every_level
@every_dtype
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logits_are_rounded_as_a_linear_layers_output_and_then_soft_capped(
    level: str, dtype: torch.dtype, softcap: float | None
) -> None:
    assert_logits_are_rounded_then_capped(native(dtype, level), softcap)


@every_level
@every_dtype
@pytest.mark.parametrize("width", [3, 16, 40, 641])
def test_embedding_rows_equal_the_references(level: str, dtype: torch.dtype, width: int) -> None:
    table, ids = normal(50, width, dtype=dtype), torch.tensor([0, 49, 17, 16, 15, 15])
    backend, other = native(dtype, level), reference(dtype)
    ours = backend.embed(backend.backend.prepare_embedding(table), ids, 25.25)
    step = ReferenceStep(ModelInputs(*(ids.numpy(),) * 4, attention=()), CPU)
    assert torch.equal(ours, other.embed(other.prepare_embedding(table), 25.25, step))
    assert not torch.equal(ours, table[ids] * 25.25)
