"""The test of the kernels at start: it passes where they are right, and finds each of them when it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from server.engine.backend.triton.backend import TritonBackend
from server.engine.backend.triton.self_test import SelfTestError, self_test
from server.engine.dtype import DType


@pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype", "quantization"),
    [(DType.BFLOAT16, "auto", "int4"), (DType.FLOAT32, "auto", "none"), (DType.BFLOAT16, "fp8", "fp8")],
)
def test_it_passes(device: torch.device, dtype: DType, kv_cache_dtype: str, quantization: str) -> None:
    self_test(device, dtype, kv_cache_dtype, quantization)


@pytest.mark.parametrize("operation", ["rms_norm", "add_rms_norm", "geglu", "linear", "attention"])
def test_a_wrong_number_or_none_is_found(
    device: torch.device, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(TritonBackend, operation)

    for wrong in (0.3, torch.nan):

        def spoiled(*arguments: Any, wrong: float = wrong) -> Any:
            result = right(*arguments)
            (result[1] if isinstance(result, tuple) else result).view(-1)[-1] += wrong
            return result

        monkeypatch.setattr(TritonBackend, operation, spoiled)
        with pytest.raises(SelfTestError, match=operation):
            self_test(device, DType.FLOAT32, "auto")
