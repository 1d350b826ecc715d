"""The engine as a server builds it on a GPU, against the one that a CPU computes step by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from server.engine.build import build_engine
from server.engine.core import EngineCore
from server.engine.types import EngineConfig, GenerateRequest, SamplingParams, SequenceOutput
from tests.parity.harness import CONFIGS, VOCAB, checkpoint

PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.2, "top_k": 7, "min_p": 0.02},
    {"temperature": 0.0, "stop_token_ids": frozenset({3, 11, 17})},
    {"temperature": 0.9, "logprobs": 2},
    {"temperature": 0.0, "frequency_penalty": 0.9},
]
"""The last two are sampled by the host."""


def requests(count: int) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            request_id=str(index),
            prompt_token_ids=[(3 + index + 7 * place) % VOCAB for place in range(1 + 11 * (index % 5))],
            params=SamplingParams(max_tokens=5 + 3 * index, seed=index, **PARAMS[index % len(PARAMS)]),
        )
        for index in range(count)
    ]


def generated(core: EngineCore, wanted: list[GenerateRequest], together: bool) -> dict[str, list[int]]:
    """together: they arrive one after the other, and run at a time; otherwise each runs alone."""
    tokens: dict[str, list[int]] = {request.request_id: [] for request in wanted}

    def step() -> None:
        for output in core.step().outputs:
            assert output.error is None
            tokens[output.request_id] += output.token_ids

    for request in wanted:
        core.add(request)
        step()
        while not together and core.has_work():
            step()
    while core.has_work():
        step()
    return tokens


def engine(changes: EngineConfig) -> EngineCore:
    core, info = build_engine(changes, lambda *_: None)
    assert info.backend == ("triton" if info.device == "cuda" else "reference")
    return core


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory: Path = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(CONFIGS["gemma3"]))
    weights = {f"model.{name}": tensor.bfloat16() for name, tensor in checkpoint("gemma3")}
    save_file(weights, directory / "model.safetensors")
    return str(directory)


def config(model_path: str, **changes: Any) -> EngineConfig:
    return EngineConfig(
        model_path=model_path, dtype="float32", max_model_len=256, weight_cache=False, **changes
    )


@pytest.fixture(scope="module")
def on_gpu(model_path: str) -> EngineCore:
    return engine(
        config(
            model_path,
            device="cuda",
            max_num_seqs=12,
            max_num_batched_tokens=64,
            kv_cache_memory_bytes=1 << 22,
        )
    )


def test_sequences_in_company_get_the_tokens_that_each_gets_alone_on_a_cpu(
    model_path: str, on_gpu: EngineCore
) -> None:
    wanted = requests(21)
    alone = generated(engine(config(model_path, device="cpu", backend="reference")), wanted, together=False)
    assert generated(on_gpu, wanted, together=True) == alone
    # Once more, when all steps that occur have been recorded, and the prompts are in the prefix cache.
    again = [request for request in requests(21)]
    assert generated(on_gpu, again, together=True) == alone


def test_an_aborted_sequence_leaves_the_others_alone(model_path: str, on_gpu: EngineCore) -> None:
    wanted = requests(6)
    whole = generated(on_gpu, wanted, together=False)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in wanted}

    def take(outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            tokens[output.request_id] += output.token_ids

    for request in requests(6):
        on_gpu.add(request)
    for _ in range(4):
        take(list(on_gpu.step().outputs))
    on_gpu.abort(["2", "5"])
    while on_gpu.has_work():
        take(list(on_gpu.step().outputs))
    for request_id in ("0", "1", "3", "4"):
        assert tokens[request_id] == whole[request_id]
    for request_id in ("2", "5"):
        assert tokens[request_id] == whole[request_id][: len(tokens[request_id])]
