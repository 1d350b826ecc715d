"""The decoder with rounded weights on the Triton back end, against the reference back end with the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine.backend.base import AnyBackend
from server.engine.backend.fp8 import Fp8Matrix
from server.engine.backend.int4 import Int4Matrix
from server.engine.backend.reference import ReferenceBackend
from server.engine.backend.triton.backend import TritonBackend
from server.engine.dtype import DType
from server.engine.models.config import expected_weights
from server.engine.models.config_reader import read_hf
from server.engine.models.gemma import GemmaModel, prepare_weights
from tests.parity.harness import CONFIGS, Engine, our_logits, prompt, request

CONFIG = read_hf(CONFIGS["gemma3-all-sliding"] | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64})
MATRICES = {"fp8": Fp8Matrix, "int4": Int4Matrix}


def tensors() -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for name, shape in expected_weights(CONFIG).items():
        spread = 0.3 if len(shape) == 1 else 1.5 / math.sqrt(shape[1])
        yield name, spread * torch.randn(shape, generator=generator)


def model(backend: AnyBackend, matrix: type) -> GemmaModel:
    weights = prepare_weights(CONFIG, backend, tensors())
    rounded = [name for name, weight in weights.items() if isinstance(weight, matrix)]
    assert len(rounded) == 4 * len(CONFIG.layers)
    return GemmaModel(CONFIG, backend, weights)


@pytest.fixture(scope="module", params=[pytest.param("fp8", marks=pytest.mark.slow), "int4"])
def models(request: pytest.FixtureRequest) -> tuple[GemmaModel, GemmaModel]:
    """Reference and Triton."""
    quantization: Any = request.param
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    matrix = MATRICES[quantization]
    return (
        model(ReferenceBackend(torch.device("cpu"), DType.FLOAT32, quantization), matrix),
        model(TritonBackend(device, DType.FLOAT32, "auto", quantization), matrix),
    )


def test_logits_are_the_reference_s(models: tuple[GemmaModel, GemmaModel]) -> None:
    token_ids = prompt(24)
    expected, ours = (our_logits(each, token_ids, chunk=19, block_size=4).cpu() for each in models)
    # An activation at the edge between two codes of e4m3 may get the other.
    assert (ours - expected).norm() < 0.02 * expected.norm()


@pytest.mark.slow
def test_greedy_tokens_are_the_reference_s(models: tuple[GemmaModel, GemmaModel]) -> None:
    requests = [request(prompt(n, seed=n), request_id=f"r{n}", max_tokens=6) for n in (12, 1, 20)]
    expected, ours = (Engine(each, chunk=16).generate(requests, arrive_every=2) for each in models)
    assert ours == expected
