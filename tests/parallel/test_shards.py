"""Which part of a model a rank has."""

from __future__ import annotations

import pytest
import torch

from server.engine.backend import int4
from server.engine.models.config import ConfigError, expected_weights
from server.engine.models.config_reader import read_hf
from server.engine.parallel.shards import shard_config, shard_weights
from tests.parity.harness import CONFIGS, WIDE


@pytest.mark.parametrize("name", ["gemma1", "gemma1-multi-query", "gemma3"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_parts_have_the_shapes_that_the_rank_s_model_expects(name: str, num_ranks: int) -> None:
    config = read_hf(CONFIGS[name])
    part = shard_config(config, num_ranks)
    whole = {key: torch.randn(shape) for key, shape in expected_weights(config).items()}
    for rank in range(num_ranks):
        shapes = {key: tuple(t.shape) for key, t in shard_weights(config, whole.items(), rank, num_ranks)}
        assert shapes == expected_weights(part)


def test_each_rank_has_the_kv_head_of_its_query_heads() -> None:
    config = read_hf(CONFIGS["gemma1"])  # 4 heads, of which each 2 share one of 2 KV heads
    key = torch.arange(2).repeat_interleave(16)[:, None].expand(32, 32)
    name = "layers.0.self_attn.k_proj.weight"
    owners = []
    for rank in range(4):
        ((_, part),) = shard_weights(config, [(name, key)], rank, 4)
        assert part.shape == (16, 32)
        owners.append(int(part[0, 0]))
    assert owners == [0, 0, 1, 1]


def test_the_parts_in_4_bits_are_those_of_the_whole_in_4_bits() -> None:
    config = read_hf(WIDE)
    whole = {name: torch.randn(shape) for name, shape in expected_weights(config).items() if len(shape) == 2}
    rounded = [(name, int4.quantize(tensor).dequantize()) for name, tensor in whole.items()]
    for rank in range(2):
        parts = shard_weights(config, whole.items(), rank, 2)
        for (name, part), (_, expected) in zip(parts, shard_weights(config, rounded, rank, 2), strict=True):
            assert torch.equal(int4.quantize(part).dequantize(), expected), name


@pytest.mark.parametrize(
    ("changes", "num_ranks", "message"),
    [
        ({}, 3, "3 does not divide the model's 4 heads"),
        ({}, 8, "8 does not divide the model's 4 heads"),
        ({"intermediate_size": 49}, 2, "2 does not divide the model's MLP, 49 columns wide"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 3},
            2,
            "2 neither divides the model's 3 KV heads nor is divided",
        ),
    ],
)
def test_what_cannot_be_dealt_out_evenly_is_refused(
    changes: dict[str, int], num_ranks: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        shard_config(read_hf(CONFIGS["gemma1"] | changes), num_ranks)
