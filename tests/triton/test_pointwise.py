"""Norms, GeGLU, embedding and soft-cap against the reference back end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine.backend.reference import ReferenceBackend
from server.engine.backend.triton import pointwise
from tests.triton.layers import dtype_of, normal

CPU = torch.device("cpu")
WIDTHS = [1, 7, 64, 640, 2048, 3072]

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def reference(dtype: torch.dtype) -> ReferenceBackend:
    return ReferenceBackend(CPU, dtype_of(dtype))


def assert_near(ours: Tensor, expected: Tensor) -> None:
    """To the last place of bf16, or nearly that of fp32."""
    tolerance = 1e-6 if expected.dtype is torch.float32 else 2**-7
    torch.testing.assert_close(ours.cpu(), expected, rtol=tolerance, atol=1e-6)


@every_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_norms(device: torch.device, width: int, dtype: torch.dtype) -> None:
    x, update = (3 * normal(3, width, dtype=dtype, seed=seed) for seed in (0, 1))
    weight = 1.0 + 0.2 * normal(width, seed=2)
    ours = pointwise.rms_norm(x.to(device), weight.to(device), 1e-6)
    assert_near(ours, reference(dtype).rms_norm(x, weight, 1e-6))
    residual, normed = pointwise.add_rms_norm(
        x.to(device, copy=True), update.to(device), weight.to(device), 1e-6
    )
    expected = reference(dtype).add_rms_norm(x.clone(), update, weight, 1e-6)
    assert torch.equal(residual.cpu(), expected[0])
    assert_near(normed, expected[1])


@every_dtype
def test_the_epsilon_is_added_to_the_mean_square(device: torch.device, dtype: torch.dtype) -> None:
    x, weight = torch.zeros(1, 64, dtype=dtype), torch.ones(64)
    assert torch.equal(pointwise.rms_norm(x.to(device), weight.to(device), 1e-6).cpu(), x)


@every_dtype
@pytest.mark.parametrize("width", [1, 96, 1024, 1500])
def test_geglu(device: torch.device, width: int, dtype: torch.dtype) -> None:
    gate = torch.linspace(-30, 30, 2 * width, dtype=torch.float32).view(2, width)
    gate_up = torch.cat([gate, normal(2, width)], dim=1).to(dtype)
    # In fp32 and rounded once; the reference back end rounds the gelu, too.
    expected = reference(torch.float32).geglu(gate_up.float()).to(dtype)
    assert_near(pointwise.geglu(gate_up.to(device)), expected)


@every_dtype
def test_embedding(device: torch.device, dtype: torch.dtype) -> None:
    table = normal(50, 96, dtype=dtype)
    tokens = torch.tensor([0, 49, 7, 7], dtype=torch.int32)
    scale = float(torch.tensor(96.0).sqrt().to(dtype))
    step: Any = type("Step", (), {"token_ids": tokens.long()})
    expected = reference(dtype).embed(table, scale, step)
    assert torch.equal(pointwise.embed(table.to(device), tokens.to(device), scale).cpu(), expected)


@every_dtype
def test_softcap(device: torch.device, dtype: torch.dtype) -> None:
    logits = 40 * normal(2, 2500, dtype=dtype)
    expected = 30.0 * torch.tanh(logits.float() / 30.0)
    ours = pointwise.softcap(logits.to(device), 30.0)
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours.cpu(), expected, rtol=1e-6, atol=1e-5)
