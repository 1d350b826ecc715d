"""The native back end's operations against the reference back end's, at every level."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.one_torch_thread import one_torch_thread
from tests.unit.native_backends import (
    REFERENCE,
    THREADS,
    Native,
    every_dtype,
    every_level,
    every_width,
)

__all__ = ["one_torch_thread"]  # a fixture

ROWS = [*range(1, 18), 31, 32, 33, 40, 49]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(ours: Tensor, expected: Tensor, fp32: float = 2e-6) -> None:
    """Values of size 1. In bf16, a sum near the middle between two numbers may round to the other one."""
    assert ours.dtype == expected.dtype
    if ours.dtype is torch.bfloat16:
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=2**-7)
    else:
        torch.testing.assert_close(ours, expected, atol=fp32, rtol=fp32)


# --- linear ------------------------------------------------------------------------------------------------


@every_level
@every_dtype
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (16, 16), (15, 33), (40, 640), (97, 511), (64, 1031)])
def test_linear_equals_the_reference_for_every_number_of_rows(
    level: str, dtype: torch.dtype, outputs: int, inputs: int
) -> None:
    native = Native(dtype, level)
    weight = normal(outputs, inputs, dtype=dtype) / math.sqrt(inputs)
    packed = native.backend.prepare_linear(weight)
    x = normal(max(ROWS), inputs, dtype=dtype, seed=1)
    expected = (x.double() @ weight.double().T).to(dtype)
    for rows in ROWS:
        assert_near(native.linear(x[:rows], packed), expected[:rows], fp32=3e-6)


@every_level
@every_dtype
def test_linear_equals_the_reference_for_more_rows_and_panels_than_a_block(
    level: str, dtype: torch.dtype
) -> None:
    native = Native(dtype, level)
    weight, x = normal(2000, 96, dtype=dtype) / math.sqrt(96), normal(250, 96, dtype=dtype, seed=1)
    assert_near(
        native.linear(x, native.backend.prepare_linear(weight)), (x.double() @ weight.double().T).to(dtype)
    )


@every_level
@every_dtype
def test_a_row_of_a_product_does_not_depend_on_the_rows_beside_it(level: str, dtype: torch.dtype) -> None:
    packed = Native(dtype, level).backend.prepare_linear(normal(333, 1100, dtype=dtype))
    x = normal(250, 1100, dtype=dtype, seed=1)
    of_all = Native(dtype, level).linear(x, packed)
    for num_threads in THREADS:
        native = Native(dtype, level, num_threads)
        for rows in (*ROWS, 119, 120, 121, 250):
            assert torch.equal(native.linear(x[-rows:], packed), of_all[-rows:])


@every_level
@every_dtype
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logits_are_rounded_as_a_linear_layers_output_and_then_soft_capped(
    level: str, dtype: torch.dtype, softcap: float | None
) -> None:
    assert_logits_are_rounded_then_capped(Native(dtype, level), softcap)


def assert_logits_are_rounded_then_capped(native: Native, softcap: float | None) -> None:
    weight, hidden = normal(77, 40, dtype=native.dtype), normal(9, 40, dtype=native.dtype, seed=1)
    packed = native.backend.prepare_embedding(weight)
    rounded = native.linear(hidden, packed).float()
    expected = rounded if softcap is None else softcap * torch.tanh(rounded.double() / softcap).float()
    ours = native.logits(hidden, packed, softcap)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


@every_level
@every_dtype
@pytest.mark.parametrize("inputs", [31, 34, 545])
def test_an_infinite_weight_shows_in_its_own_output_alone(level: str, dtype: torch.dtype, inputs: int) -> None:
    """Where a row of weights ends in the middle of what is read at once, the next one's are not read."""
    native = Native(dtype, level)
    weight = normal(64, inputs, dtype=dtype)
    weight[16::16, 0] = math.inf
    ours = native.linear(normal(33, inputs, dtype=dtype, seed=1), native.backend.prepare_linear(weight))
    finite = torch.ones(64, dtype=torch.bool)
    finite[16::16] = False
    assert ours[:, finite].isfinite().all()
    assert not ours[:, ~finite].isfinite().any()


@every_level
@every_dtype
def test_what_an_earlier_product_left_in_the_scratch_memory_does_not_leak(
    level: str, dtype: torch.dtype
) -> None:
    native = Native(dtype, level)
    wide, narrow = (native.backend.prepare_linear(normal(16, n, dtype=dtype)) for n in (2000, 33))
    native.linear(torch.full((40, 2000), math.nan, dtype=dtype), wide)
    assert native.linear(normal(40, 33, dtype=dtype, seed=1), narrow).isfinite().all()


# --- embedding, norms, activation --------------------------------------------------------------------------


@every_width
@every_dtype
@pytest.mark.parametrize("width", [3, 16, 40, 641])
def test_embedding_rows_are_those_of_the_table_times_the_scale(
    level: str, dtype: torch.dtype, width: int
) -> None:
    table, ids = normal(50, width, dtype=dtype), torch.tensor([0, 49, 17, 16, 15, 15])
    native = Native(dtype, level)
    ours = native.embed(native.backend.prepare_embedding(table), ids, 25.25)
    assert torch.equal(ours, torch.nn.functional.embedding(ids, table) * 25.25)


@every_width
@every_dtype
@pytest.mark.parametrize("width", [1, 16, 40, 641])
def test_norms_equal_the_reference(level: str, dtype: torch.dtype, width: int) -> None:
    native, reference = Native(dtype, level), REFERENCE[dtype]
    weight = 0.3 * normal(width, dtype=dtype)
    x, residual = normal(9, width, dtype=dtype, seed=1), normal(9, width, dtype=dtype, seed=2)
    ours = native.rms_norm(x, native.backend.prepare_norm(weight), 1e-6)
    assert_near(ours, reference.rms_norm(x, reference.prepare_norm(weight), 1e-6))
    expected = reference.add_rms_norm(residual.clone(), x.clone(), reference.prepare_norm(weight), 1e-6)
    total, normed = native.add_rms_norm(residual, x, native.backend.prepare_norm(weight), 1e-6)
    assert torch.equal(total, expected[0])
    assert_near(normed, expected[1])


@every_width
@every_dtype
def test_the_epsilon_is_added_to_the_mean_square(level: str, dtype: torch.dtype) -> None:
    native = Native(dtype, level)
    ours = native.rms_norm(
        torch.full((1, 8), 2.0**-10, dtype=dtype), native.backend.prepare_norm(torch.zeros(8)), 2.0**-20
    )
    torch.testing.assert_close(ours.float(), torch.full((1, 8), math.sqrt(0.5)), atol=2e-3, rtol=0)


@every_width
@every_dtype
def test_geglu_equals_the_reference_over_the_whole_range(level: str, dtype: torch.dtype) -> None:
    gate = torch.cat((torch.linspace(-12, 12, 1003), torch.tensor([-300.0, -1e-4, 0.0, 1e-4, 300.0])))
    gate_up = torch.cat((gate, normal(1008)))[None].to(dtype)
    ours, expected = Native(dtype, level).geglu(gate_up), REFERENCE[dtype].geglu(gate_up)
    assert_near(ours, expected)
    # Below -3 the 1 + tanh of the reference cancels. Were the activation not rounded, a quarter would differ.
    differs = (ours != expected)[0, gate > -3]
    assert dtype is torch.float32 or differs.float().mean() < 0.02


@every_level
@every_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_stay_visible(level: str, dtype: torch.dtype, value: float) -> None:
    """A row that overflowed must end in a NaN or an infinity, for the sampler to refuse it."""
    native = Native(dtype, level)
    x = normal(2, 32, dtype=dtype)
    x[0, 5] = value
    weight = native.backend.prepare_linear(normal(16, 32, dtype=dtype))
    for result in (
        native.linear(x, weight),
        native.logits(x, weight, None),
        native.logits(x, weight, 30.0) if math.isnan(value) else native.logits(x, weight, None),
        native.rms_norm(x, native.backend.prepare_norm(torch.zeros(32)), 1e-6),
        native.geglu(x),
    ):
        assert not result[0].isfinite().all()
        assert result[1].isfinite().all()
