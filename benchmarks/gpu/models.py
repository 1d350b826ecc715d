"""Model directories with random weights of true size, made on the device that will serve them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers.checkpoints import SHAPE_2B, write_directory
from server import embedded_model
from server.engine.models.config import GemmaConfig, expected_weights
from server.engine.models.config_reader import read_hf
from server.engine.models.gguf import read_metadata

SHAPE_7B = read_hf(
    {
        "model_type": "gemma",
        "vocab_size": 256_000,
        "hidden_size": 3072,
        "intermediate_size": 24_576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
    }
)
"""Gemma 1 7B (arXiv 2403.08295, table 1)."""

_SHAPE_TINY = read_hf(
    {
        "model_type": "gemma",
        "vocab_size": 256_000,  # the letters are among the last pieces
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 256,
    }
)
"""For the benchmark's own tests."""

SHAPES = {"2b": SHAPE_2B, "7b": SHAPE_7B, "tiny": _SHAPE_TINY}


def make_model(folder: Path, name: str, device: str) -> Path:
    """The directory below `folder` of the model called `name` (a key of SHAPES), made unless it is there."""
    directory = folder / f"gemma-{name}-random"
    if not directory.exists():
        partial = directory.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        vocabulary = read_metadata(embedded_model.locate())
        write_directory(partial, SHAPES[name], _random_weights(SHAPES[name], device), vocabulary)
        partial.rename(directory)
    return directory


def _random_weights(config: GemmaConfig, device: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for every weight: normal, scaled so that activations keep their size; norms are zero."""
    generator = torch.Generator(device).manual_seed(0)
    for name, shape in expected_weights(config).items():
        if name.endswith("norm.weight"):
            yield name, torch.zeros(shape)
        else:
            values = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(generator=generator)
            yield name, values.mul_(shape[-1] ** -0.5).cpu()
