"""The overlays' limits fit the accelerators that they name, by the server's own arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

from server.config import load_config
from server.engine.memory import (
    OutOfMemoryError,
    PoolLimits,
    activation_bytes,
    size_kv_pools,
    weight_bytes,
)
from server.engine.models.config import GemmaConfig, KVGroupSpec
from server.engine.models.config_reader import read_hf
from tests.deploy.objects import environment, quantity, server_pod
from tools.manifests import K8S, Combination

GIB = 2**30
GPU_BYTES = {"nvidia-l4": 21.8 * GIB, "nvidia-tesla-a100": 39.0 * GIB}
"""Assumed of a GPU with 24 and 40 GB, and not measured."""
DEFAULT_SHARE, DEFAULT_BATCHED_TOKENS, ITEM_BYTES = 0.9, 2048, 2
DISK_BYTES = 1.5
"""Room for the weights on /cache, as a multiple of them."""


def model(name: str) -> GemmaConfig:
    wide = name == "google/gemma-7b-it"
    config: dict[str, Any] = {
        "model_type": "gemma",
        "vocab_size": 256_000,
        "hidden_size": 3072 if wide else 2048,
        "intermediate_size": 24_576 if wide else 16_384,
        "num_hidden_layers": 28 if wide else 18,
        "num_attention_heads": 16 if wide else 8,
        "num_key_value_heads": 16 if wide else 1,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "eos_token_id": 1,
    }
    return read_hf(config)


def bytes_per_block(group: KVGroupSpec, block_size: int) -> int:
    return 2 * block_size * group.num_kv_heads * group.head_dim * ITEM_BYTES * len(group.layer_indices)


def cache_tokens(gemma: GemmaConfig, quantization: str, limits: PoolLimits, allowed: float) -> int:
    """allowed: bytes for weights, steps and cache."""
    weights = weight_bytes(gemma, ITEM_BYTES, quantization)
    groups = gemma.kv_groups()
    (blocks,) = size_kv_pools(
        groups,
        [bytes_per_block(group, limits.block_size) for group in groups],
        int(allowed) - weights - activation_bytes(gemma, ITEM_BYTES, limits),
        limits,
    )
    return blocks * limits.block_size


@pytest.mark.parametrize("overlay", ["gemma-2b-l4", "gemma-7b-l4", "gemma-7b-a100"])
def test_weights_and_cache_fit_and_the_readme_says_how_much(overlay: str) -> None:
    combination = Combination(overlay)
    values = environment(combination)
    config = load_config([], values)
    (name,) = config.served_model_name
    gemma = model(name)
    limits = PoolLimits(
        config.block_size,
        config.max_model_len or gemma.max_position,
        config.max_num_seqs or 0,
        config.max_num_batched_tokens or DEFAULT_BATCHED_TOKENS,
    )
    pod = server_pod(combination)
    weights = weight_bytes(gemma, ITEM_BYTES, config.quantization)
    total = GPU_BYTES[pod.spec["nodeSelector"]["cloud.google.com/gke-accelerator"]]
    share = config.gpu_memory_utilization or DEFAULT_SHARE
    tokens = cache_tokens(gemma, config.quantization, limits, share * total)
    readme = (K8S / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in readme.splitlines() if line.startswith(f"| `{overlay}` ")]
    assert f"{tokens:,} tokens" in row
    assert row.rstrip(" |").endswith(str(pod.workload["spec"]["replicas"]))
    # The loader maps the files, whose pages count as the pod's memory while they are read.
    assert weights < quantity(pod.container["resources"]["limits"]["memory"])
    assert DISK_BYTES * weights < quantity(pod.volumes["cache"]["emptyDir"]["sizeLimit"])


@pytest.mark.parametrize(("quantization", "gib"), [("fp8", 8.7), ("int4", 6.0)])
def test_the_7b_fits_an_l4_with_its_whole_context_when_its_weights_are_rounded(
    quantization: str, gib: float
) -> None:
    gemma = model("google/gemma-7b-it")
    assert round(weight_bytes(gemma, ITEM_BYTES, quantization) / GIB, 1) == gib
    allowed = DEFAULT_SHARE * GPU_BYTES["nvidia-l4"]
    of_a_gpu = PoolLimits(16, gemma.max_position, 256, DEFAULT_BATCHED_TOKENS, steps_in_flight=2)
    with pytest.raises(OutOfMemoryError, match="--max-model-len 8192"):
        cache_tokens(gemma, "none", of_a_gpu, allowed)
    tokens = cache_tokens(gemma, quantization, of_a_gpu, allowed)
    assert tokens > 2 * gemma.max_position
    readme = (K8S / "README.md").read_text(encoding="utf-8")
    assert f"{gib} GiB and leave room for {tokens:,} tokens" in " ".join(readme.split())
