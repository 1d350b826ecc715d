"""From an EngineConfig to a running engine, on a tiny checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from server.engine import build
from server.engine.build import StartError, build_engine
from server.engine.models.config import expected_weights
from server.engine.models.config_reader import read_hf
from server.engine.types import EngineConfig, EngineInfo, FinishReason, GenerateRequest, SamplingParams
from tests.cores import generated

CONFIG = {
    "model_type": "gemma3_text",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "sliding_window": 8,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory: Path = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"model.{name}": torch.randn(shape, generator=generator).bfloat16()
        for name, shape in expected_weights(read_hf(CONFIG)).items()
    }
    save_file(weights, directory / "model.safetensors")
    return str(directory)


def config(model_path: str, **changes: Any) -> EngineConfig:
    return EngineConfig(
        **{"model_path": model_path, "device": "cpu", "num_threads": 1, "weight_cache": False} | changes
    )


def test_an_engine_says_what_it_is_and_generates(model_path: str) -> None:
    stages: list[tuple[str, float]] = []
    core, info = build_engine(
        config(model_path, backend="reference"), lambda stage, fraction: stages.append((stage, fraction))
    )
    assert (info.device, info.dtype, info.backend, info.vocab_size) == ("cpu", "bfloat16", "reference", 40)
    assert (info.max_model_len, info.max_sequence_tokens, info.block_size) == (256, 256, 16)
    assert info.num_blocks["full"] == 32 * 256 // 16
    assert info.num_blocks["sliding"] < info.num_blocks["full"]
    assert info.weight_bytes == 2 * sum(
        torch.Size(shape).numel() for shape in expected_weights(read_hf(CONFIG)).values()
    )
    assert [stage for stage, fraction in stages if fraction == 0.0] == ["weights", "kv cache", "warm-up"]
    assert ("weights", 1.0) in stages
    assert list(info.start_seconds) == ["device", "weights", "kv cache", "warm-up"]
    assert all(seconds >= 0.0 for seconds in info.start_seconds.values())

    params = SamplingParams(max_tokens=5, seed=0, temperature=0.0)
    core.add(GenerateRequest(request_id="r", prompt_token_ids=[2, 3, 4], params=params))
    outputs = []
    while core.has_work():
        outputs += core.step().outputs
    assert sum(len(output.token_ids) for output in outputs) == 5
    assert outputs[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_weights_in_8_bits_take_less_and_generate(model_path: str, backend: str) -> None:
    core, info = build_engine(config(model_path, backend=backend, quantization="int8"), lambda *_: None)
    shapes = expected_weights(read_hf(CONFIG)).values()
    assert (info.dtype, info.quantization) == ("bfloat16", "int8")
    assert info.weight_bytes == sum(
        shape[0] * shape[1] + 4 * shape[0] if len(shape) == 2 else 4 * shape[0] for shape in shapes
    )
    assert len(generated(core, [2, 3, 4], max_tokens=5, seed=0, temperature=0.0)) == 5


def test_suppressed_ids_are_never_sampled(model_path: str) -> None:
    only = 7
    suppressed = tuple(token_id for token_id in range(40) if token_id != only)
    core, _ = build_engine(config(model_path, suppress_token_ids=suppressed), lambda *_: None)
    assert generated(core, [2], max_tokens=9, seed=0, temperature=2.0) == [only] * 9


def test_limits_that_are_given_are_kept(model_path: str) -> None:
    changes = {"max_model_len": 100, "max_num_seqs": 3, "max_num_batched_tokens": 20, "block_size": 8}
    _, info = build_engine(config(model_path, **changes), lambda *_: None)
    assert (info.max_model_len, info.block_size) == (100, 8)
    assert info.num_blocks["full"] == 3 * 13
    _, info = build_engine(config(model_path, num_blocks_override=9), lambda *_: None)
    assert info.num_blocks == {"full": 9, "sliding": 9}
    assert info.max_sequence_tokens == 9 * 16
    _, info = build_engine(config(model_path, max_num_batched_tokens=8), lambda *_: None)
    assert info.num_blocks["full"] == 8 * 256 // 16, "no more sequences than tokens in a step"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_model_len": 257}, "--max-model-len 257 is more than the model's context, 256"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "--max-num-batched-tokens 8 .*--max-num-seqs 9"),
        ({"dtype": "float16"}, "--dtype float16"),
        ({"kv_cache_memory_bytes": 1000}, "lower --max-model-len"),
        ({"gpu_memory_utilization": 1e-9}, "only 0 MiB are left"),
        ({"async_scheduling": True}, "--async-scheduling: the .* back end on the cpu cannot run ahead"),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_message_for_people(
    model_path: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(StartError, match=message):
        build_engine(config(model_path, **changes), lambda *_: None)


def test_a_missing_file_is_refused_by_name() -> None:
    with pytest.raises(StartError, match=r"nonexistent/model\.gguf"):
        build_engine(config("/nonexistent/model.gguf"), lambda *_: None)


@pytest.mark.covers("L09")
def test_the_pools_shrink_with_the_memory_until_not_one_sequence_fits(
    model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(free_bytes: int) -> EngineInfo:
        monkeypatch.setattr(build, "available_bytes", lambda device: free_bytes)
        return build_engine(config(model_path), lambda *_: None)[1]

    ample = start(1 << 30)
    assert ample.num_blocks["full"] == 32 * 256 // 16
    too_little, needed = 0, 1 << 30
    while needed - too_little > 1 << 16:
        middle = (too_little + needed) // 2
        too_little, needed = (too_little, middle) if can_start(start, middle) else (middle, needed)
    tight = start(needed)
    assert tight.num_blocks["full"] < ample.num_blocks["full"]
    assert tight.weight_bytes + tight.kv_cache_bytes < needed
    with pytest.raises(StartError, match=r"lower --max-model-len, or .* the container's limit"):
        start(too_little)
    with pytest.raises(StartError, match=r"the weights take 0 MiB in bfloat16, but only 0 MiB"):
        start(1000)


def can_start(start: Callable[[int], object], free_bytes: int) -> bool:
    try:
        start(free_bytes)
    except StartError:
        return False
    return True
