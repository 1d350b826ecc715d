"""Models whose matrices are rounded, on the reference back end."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from server.engine.backend.choose import BackendError, choose_backend
from server.engine.backend.fp8 import Fp8Matrix
from server.engine.backend.int4 import Int4Matrix
from server.engine.backend.reference import ReferenceBackend
from server.engine.build import StartError, build_engine
from server.engine.dtype import DType
from server.engine.memory import weight_bytes
from server.engine.models.config import expected_weights
from server.engine.models.config_reader import read_hf
from server.engine.types import EngineConfig
from tests.cores import generated
from tests.parity.harness import WIDE

CPU = torch.device("cpu")
FORMATS: dict[str, tuple[type, int]] = {"fp8": (Fp8Matrix, 64), "int4": (Int4Matrix, 128)}
"""What its matrices are, and of what their inputs have to be a multiple."""


@pytest.mark.parametrize("mlp_width", [256, 192])
@pytest.mark.parametrize("quantization", FORMATS)
def test_the_account_of_weights_is_true(quantization: str, mlp_width: int) -> None:
    kind, multiple = FORMATS[quantization]
    config = read_hf(WIDE | {"intermediate_size": mlp_width})
    backend = ReferenceBackend(CPU, DType.BFLOAT16, quantization)
    size = 0
    for name, shape in expected_weights(config).items():
        tensor = torch.ones(shape)
        if name.endswith("norm.weight"):
            size += 4 * shape[0]
        elif name == "embed_tokens.weight":
            size += backend.prepare_embedding(tensor).nbytes
        else:
            matrix = backend.prepare_linear(tensor)
            assert isinstance(matrix, kind) == (shape[1] % multiple == 0)
            size += matrix.nbytes if isinstance(matrix, Tensor) else _num_bytes(matrix)
    assert weight_bytes(config, 2, quantization) == size


def _num_bytes(matrix: Any) -> int:
    return sum(getattr(matrix, part.name).nbytes for part in fields(matrix))


@pytest.mark.parametrize("quantization", FORMATS)
def test_the_native_kernels_do_not_have_it(quantization: str) -> None:
    said = f"--quantization {quantization}: the native CPU kernels do not have it"
    for name in ("auto", "native"):
        with pytest.raises(BackendError, match=said):
            choose_backend(name, "auto", "cpu", DType.BFLOAT16, 1, quantization)


@pytest.mark.parametrize("quantization", FORMATS)
def test_a_cpu_has_it_with_the_reference_back_end(tmp_path: Path, quantization: str) -> None:
    config = read_hf(WIDE)
    (tmp_path / "config.json").write_text(json.dumps(WIDE))
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"model.{name}": torch.randn(shape, generator=generator).bfloat16()
        for name, shape in expected_weights(config).items()
    }
    save_file(weights, tmp_path / "model.safetensors")
    on_cpu = EngineConfig(model_path=str(tmp_path), device="cpu", num_threads=1, quantization=quantization)
    with pytest.raises(StartError, match="take int8, or --backend reference"):
        build_engine(on_cpu, lambda *_: None)
    core, info = build_engine(msgspec.structs.replace(on_cpu, backend="reference"), lambda *_: None)
    assert (info.backend, info.quantization) == ("reference", quantization)
    assert info.weight_bytes == weight_bytes(config, 2, quantization)
    assert len(generated(core, [2, 3, 4], max_tokens=5, seed=0, temperature=0.0)) == 5
