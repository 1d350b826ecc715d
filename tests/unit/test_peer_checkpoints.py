"""The checkpoints that `make bench-peers` writes for the engines: the same weights in both layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from torch import Tensor
from transformers import AutoConfig

from benchmarks.peers.checkpoints import in_both_layouts, random_weights, write_directory, write_gguf
from server.engine.dtype import DType
from server.engine.models.config import GemmaConfig, expected_weights
from server.engine.models.config_reader import read_hf
from server.engine.models.gguf import Metadata, read_metadata
from server.engine.models.loader import open_checkpoint
from server.gguf_tokenizer import tokenizer_json
from tests.fixtures_tokenizers import tiny_vocabulary

_TINY: dict[str, Any] = {
    "vocab_size": len(tiny_vocabulary()[0]),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": 8,
    "query_pre_attn_scalar": 16,
}
GEMMA_1 = read_hf({"model_type": "gemma", **_TINY})
GEMMA_3 = read_hf({"model_type": "gemma3_text", **_TINY})
each_family = pytest.mark.parametrize("config", [GEMMA_1, GEMMA_3], ids=["gemma", "gemma3"])


def vocabulary() -> Metadata:
    tokens, types, scores = tiny_vocabulary()
    return {
        "general.name": "not a part of the vocabulary",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
    }


def weights_with_norms(config: GemmaConfig) -> dict[str, Tensor]:
    """Random, and norms that differ from each other, so that a swapped pair shows."""
    return {
        name: torch.randn(tensor.shape).bfloat16() if name.endswith("norm.weight") else tensor
        for name, tensor in random_weights(config, seed=1)
    }


def load(path: Path) -> tuple[GemmaConfig, dict[str, Tensor]]:
    checkpoint = open_checkpoint(path)
    return checkpoint.config, dict(checkpoint.tensors(DType.BFLOAT16, "cpu"))


@each_family
def test_a_directory_holds_the_weights_and_the_configuration(config: GemmaConfig, tmp_path: Path) -> None:
    weights = weights_with_norms(config)
    write_directory(tmp_path / "m", config, weights.items(), vocabulary())
    read_config, loaded = load(tmp_path / "m")
    assert read_config == config
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name].bfloat16(), tensor) for name, tensor in weights.items())


@each_family
def test_transformers_reads_the_configuration_as_we_do(config: GemmaConfig, tmp_path: Path) -> None:
    write_directory(tmp_path / "m", config, random_weights(config, seed=1), vocabulary())
    assert read_hf(AutoConfig.from_pretrained(tmp_path / "m").to_dict()) == config


@each_family
def test_a_gguf_file_holds_what_the_directory_holds(config: GemmaConfig, tmp_path: Path) -> None:
    weights = weights_with_norms(config)
    write_directory(tmp_path / "m", config, weights.items(), vocabulary())
    write_gguf(tmp_path / "m.gguf", tmp_path / "m", vocabulary())
    read_config, loaded = load(tmp_path / "m.gguf")
    # GGUF keeps numbers in float32.
    assert replace(read_config, rms_norm_eps=config.rms_norm_eps) == config
    assert read_config.rms_norm_eps == pytest.approx(config.rms_norm_eps, rel=1e-6)
    for name, tensor in load(tmp_path / "m")[1].items():
        # A norm is stored as 1 + w in float32, which rounds w.
        tolerance = 1e-6 if name.endswith("norm.weight") else 0.0
        torch.testing.assert_close(loaded[name], tensor, rtol=tolerance, atol=tolerance)


def test_a_smaller_vocabulary_is_the_beginning_of_the_larger(tmp_path: Path) -> None:
    size = _TINY["vocab_size"] - 5
    config = read_hf({"model_type": "gemma", **_TINY, "vocab_size": size})
    write_directory(tmp_path / "m", config, random_weights(config, seed=1), vocabulary())
    write_gguf(tmp_path / "m.gguf", tmp_path / "m", vocabulary())
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json"))
    pieces = tiny_vocabulary()[0]
    assert tokenizer.get_vocab_size() == size
    assert [tokenizer.id_to_token(index) for index in range(size)] == pieces[:size]
    metadata = read_metadata(tmp_path / "m.gguf")
    assert metadata["tokenizer.ggml.tokens"] == pieces[:size]
    assert tokenizer_json(metadata) == (tmp_path / "m" / "tokenizer.json").read_bytes()


def test_random_weights_repeat_with_their_seed_and_keep_activations_of_one_size() -> None:
    first, again, other = (dict(random_weights(GEMMA_1, seed)) for seed in (1, 1, 2))
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == expected_weights(GEMMA_1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "layers.0.mlp.down_proj.weight"
    assert not torch.equal(first[name], other[name])
    outputs = first[name].float() @ torch.randn(96, 200, generator=torch.Generator().manual_seed(0))
    assert 0.8 < outputs.std().item() < 1.2


def test_what_was_cut_off_is_written_again_and_what_is_complete_is_kept(tmp_path: Path) -> None:
    written: list[Path] = []

    def write(directory: Path) -> None:
        written.append(directory)
        write_directory(directory, GEMMA_1, random_weights(GEMMA_1, seed=1), vocabulary())

    def cut_off(directory: Path) -> None:
        directory.mkdir()
        (directory / "config.json").write_text("{")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_both_layouts(tmp_path, "m", vocabulary(), cut_off)
    for _ in range(2):
        weights = in_both_layouts(tmp_path, "m", vocabulary(), write)
    assert len(written) == 1
    assert load(weights.directory)[1].keys() == load(weights.gguf)[1].keys() == expected_weights(GEMMA_1).keys()
