"""Weights on their way to a GPU."""

from __future__ import annotations

import pytest
import torch

from server.engine.models import staged_copy
from server.engine.models.staged_copy import to_gpu


def test_a_gpu_gets_every_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged_copy, "_STAGED_BYTES", 1 << 12)  # so that tensors come in many parts
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{index}": torch.randn((index + 1, 1023), generator=generator).to(dtype)
        for index, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16) * 7)
    }
    results = dict(to_gpu(tensors.items(), torch.device("cuda")))
    assert list(results) == list(tensors)
    for name, tensor in tensors.items():
        assert results[name].is_cuda
        assert torch.equal(results[name].cpu(), tensor)
