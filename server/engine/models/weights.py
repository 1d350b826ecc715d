"""A model's weights in a back end's form: from the copy that an earlier start made, or from the checkpoint.

torch is imported for the checkpoint alone, and its import takes longer than the rest of a start with the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from server.cache_directory import cache_directory
from server.engine.backend.base import AnyBackend, PreparedWeights
from server.engine.backend.native import NativeBackend
from server.engine.models.config import GemmaConfig
from server.engine.models.gemma import prepare_weights
from server.engine.parallel.shards import shard_config, shard_weights
from server.engine.weight_cache import WeightCache

if TYPE_CHECKING:
    from torch import Tensor

    from server.engine.models.loader import Checkpoint

ReportFraction = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Weights that were found, but may not have been read."""

    config: GemmaConfig
    load: Callable[[ReportFraction], PreparedWeights]
    """Can be called once. Raises ValueError (LoadError, GGUFError, ConfigError) and OSError."""


def open_weights(
    path: Path, backend: AnyBackend, device: str, use_cache: bool, rank: int = 0, num_ranks: int = 1
) -> WeightSource:
    """path: a .gguf file, or a directory with config.json and *.safetensors. rank, num_ranks: whose part of the
    model, of how many.

    Raises LoadError, GGUFError and ConfigError, which are ValueErrors, and OSError.
    """
    cache = None
    if use_cache and isinstance(backend, NativeBackend):
        cache = WeightCache(cache_directory(), path, backend.weight_form)
        cached = cache.read()
        if cached is not None:
            return WeightSource(cached.config, lambda _: cached.weights)

    from server.engine.models.loader import open_checkpoint

    checkpoint = open_checkpoint(path)
    config = shard_config(checkpoint.config, num_ranks)

    def load(report: ReportFraction) -> PreparedWeights:
        tensors = _reporting(checkpoint, backend, device, report)
        parts = shard_weights(checkpoint.config, tensors, rank, num_ranks)
        weights = prepare_weights(config, backend, parts)
        if cache is not None:
            cache.write(config, weights)
        return weights

    return WeightSource(config, load)


def _reporting(
    checkpoint: Checkpoint, backend: AnyBackend, device: str, report: ReportFraction
) -> Iterator[tuple[str, Tensor]]:
    num_done = 0
    report(0.0)
    for name, tensor in checkpoint.tensors(backend.dtype, device):
        num_done += tensor.numel()
        yield name, tensor
        report(num_done / checkpoint.num_parameters)
