"""What of the server's configuration an engine is told."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from server.engine.types import EngineConfig
from server.options import ServerConfig


def engine_config(
    config: ServerConfig, model_path: Path, suppress_token_ids: Iterable[int] = ()
) -> EngineConfig:
    return EngineConfig(
        model_path=str(model_path),
        dtype=config.dtype,
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
        device=config.device,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        prefill_stretch=config.prefill_stretch,
        async_scheduling=config.async_scheduling,
        enforce_eager=config.enforce_eager,
        tensor_parallel_size=config.tensor_parallel_size,
        speculative_ngram_tokens=config.speculative_ngram_tokens,
        block_size=config.block_size,
        enable_prefix_caching=config.enable_prefix_caching,
        gpu_memory_utilization=config.gpu_memory_utilization,
        kv_cache_memory_bytes=config.kv_cache_memory_bytes,
        num_blocks_override=config.num_gpu_blocks_override,
        num_threads=config.num_threads,
        backend=config.backend,
        cpu_isa=config.cpu_isa,
        weight_cache=config.weight_cache,
        suppress_token_ids=tuple(suppress_token_ids),
    )
