"""What a rank has of a model: some of its heads and of its MLP's columns (Shoeybi et al., arXiv 1909.08053).

    q, k, v, gate, up    rows of the rank                 no exchange
    o, down              columns of the rank              partial sums, which all ranks add up
    embedding, norms     whole on each rank               no exchange

Where there are fewer KV heads than ranks, several ranks have the same one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from server.engine.models.config import ConfigError, GemmaConfig

if TYPE_CHECKING:
    from torch import Tensor


def shard_config(config: GemmaConfig, num_ranks: int) -> GemmaConfig:
    """The model as one rank sees it. Raises ConfigError where it cannot be dealt out evenly."""
    if num_ranks == 1:
        return config
    option = f"--tensor-parallel-size {num_ranks}"
    if config.intermediate_size % num_ranks:
        raise ConfigError(f"{option} does not divide the model's MLP, {config.intermediate_size} columns wide")
    layers = []
    for layer in config.layers:
        spec = layer.attention
        if spec.num_heads % num_ranks:
            raise ConfigError(f"{option} does not divide the model's {spec.num_heads} heads")
        if spec.num_kv_heads % num_ranks and num_ranks % spec.num_kv_heads:
            raise ConfigError(
                f"{option} neither divides the model's {spec.num_kv_heads} KV heads nor is divided"
            )
        own = replace(
            spec,
            num_heads=spec.num_heads // num_ranks,
            num_kv_heads=max(1, spec.num_kv_heads // num_ranks),
        )
        layers.append(replace(layer, attention=own))
    return replace(config, layers=tuple(layers), intermediate_size=config.intermediate_size // num_ranks)


def shard_weights(
    config: GemmaConfig, tensors: Iterable[tuple[str, Tensor]], rank: int, num_ranks: int
) -> Iterator[tuple[str, Tensor]]:
    """The rank's part of each tensor of a checkpoint. config: of the whole model."""
    for name, tensor in tensors:
        yield name, tensor if num_ranks == 1 else _part(config, name, tensor, rank, num_ranks)


def _part(config: GemmaConfig, name: str, tensor: Tensor, rank: int, num_ranks: int) -> Tensor:
    """A tensor of its own, so that the whole one can be let go of."""
    kind = name.removesuffix(".weight").rpartition(".")[2]
    if kind in ("q_proj", "gate_proj", "up_proj"):
        return tensor.chunk(num_ranks, dim=0)[rank].clone()
    if kind in ("o_proj", "down_proj"):
        return tensor.chunk(num_ranks, dim=1)[rank].clone()
    if kind in ("k_proj", "v_proj"):
        layer = int(name.split(".")[1])
        num_parts = min(num_ranks, config.layers[layer].attention.num_kv_heads)
        # Neighbouring ranks have the query heads that share a KV head.
        return tensor.chunk(num_parts, dim=0)[rank * num_parts // num_ranks].clone()
    return tensor
