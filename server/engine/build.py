"""Builds an engine from its configuration: finds device and dtype, loads weights, sizes and allocates pools."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from server.batching import Scheduler, SchedulerConfig
from server.engine.backend.base import AnyBackend
from server.engine.backend.choose import choose_backend
from server.engine.core import EngineCore
from server.engine.device import check_dtype, default_num_threads, resolve_device, resolve_dtype
from server.engine.device_step.backend import DeviceBackend
from server.engine.dtype import DType
from server.engine.grammar.compiler import GrammarCompiler
from server.engine.kv_cache.manager import KVCacheManager
from server.engine.kv_cache.tensors import KVTensors
from server.engine.memory import (
    MIB,
    OutOfMemoryError,
    PoolLimits,
    activation_bytes,
    allowed_bytes,
    available_bytes,
    size_kv_pools,
    weight_bytes,
)
from server.engine.model_runner import ModelRunner
from server.engine.models.config import GemmaConfig
from server.engine.models.gemma import GemmaModel
from server.engine.models.weights import open_weights
from server.engine.pacing import PrefillPacer
from server.engine.speculation import NgramSpeculator
from server.engine.stages import StageTimes
from server.engine.types import EngineConfig, EngineInfo

if TYPE_CHECKING:
    from server.engine.device_step.assemble import StepMaker
    from server.engine.inputs import ModelInputs
    from server.engine.parallel.ranks import Ranks

Progress = Callable[[str, float], None]
"""Called with a stage's name and the fraction of it that is done."""


class StartError(ValueError):
    """The engine cannot start, for a reason that a person can act on."""


@dataclass(frozen=True)
class _DeviceDefaults:
    max_num_seqs: int
    max_num_batched_tokens: int
    memory_share: float
    """See `memory.allowed_bytes`."""
    max_kv_bytes: int | None
    """Pools are not made larger than this (or than one sequence of max_model_len) unless asked for."""
    steps_in_flight: int
    """That the pools have room for: a back end on a GPU may run ahead."""


_DEFAULTS = {
    "cpu": _DeviceDefaults(32, 512, 0.8, 4096 * MIB, 1),
    "cuda": _DeviceDefaults(256, 2048, 0.9, None, 2),
}


_SPECULATIVE_TOKENS = {"native": 5}
"""By back end: so many tokens beside one take less than twice its time, for the weights are read once."""


def build_engine(
    config: EngineConfig, progress: Progress, wake: Callable[[], None] = lambda: None
) -> tuple[EngineCore, EngineInfo]:
    """Loads the model and readies everything for the first step. Raises StartError.

    wake: called in another thread when the core has work that no message brought.
    """
    stages = StageTimes("device")

    def enter(stage: str, fraction: float) -> None:
        stages.enter(stage)
        progress(stage, fraction)

    try:
        core, info = _build(config, enter, wake)
        return core, msgspec.structs.replace(info, start_seconds=stages.seconds())
    except ValueError as error:
        # The refusals of all the parts are ValueErrors with a message for people.
        raise StartError(str(error)) from error
    except (OSError, MemoryError, RuntimeError) as error:
        # torch.OutOfMemoryError is a RuntimeError; the others of its kind are bugs.
        if isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError":
            raise
        raise StartError(f"cannot load {config.model_path}: {error}") from error


def build_rank(config: EngineConfig, ranks: Ranks) -> Callable[[ModelInputs], object]:
    """Loads what a rank other than 0 has of the model. Returns what computes its part of a step.

    Raises ValueError, OSError, RuntimeError.
    """
    device = resolve_device(config.device)
    backend = _backend(config, device, resolve_dtype(config.dtype))
    source = open_weights(
        Path(config.model_path), backend, device, config.weight_cache, ranks.rank, ranks.num_ranks
    )
    limits = _limits(config, source.config, _DEFAULTS[device])
    model = ranks.model(source.config, backend, source.load(lambda fraction: None))
    groups = source.config.kv_groups()
    kv = KVTensors(backend, groups, ranks.broadcast([0] * len(groups)), limits.block_size)
    return model.capture(kv.by_layer, limits.max_num_batched_tokens)


def _backend(config: EngineConfig, device: str, dtype: DType) -> AnyBackend:
    name = config.backend
    if config.tensor_parallel_size > 1 and device == "cpu":
        if name == "native":
            raise StartError("--backend native computes in one process: leave --tensor-parallel-size out")
        name = "reference"
    return choose_backend(
        name,
        config.cpu_isa,
        device,
        dtype,
        config.num_threads or default_num_threads(),
        config.quantization,
        config.kv_cache_dtype,
    )


def _build(config: EngineConfig, progress: Progress, wake: Callable[[], None]) -> tuple[EngineCore, EngineInfo]:
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype)
    free_bytes = available_bytes(device)
    backend = _backend(config, device, dtype)
    source = open_weights(
        Path(config.model_path), backend, device, config.weight_cache, 0, config.tensor_parallel_size
    )
    check_dtype(dtype, source.config)
    limits = _limits(config, source.config, _DEFAULTS[device])
    ranks = None
    if config.tensor_parallel_size > 1:
        from server.engine.parallel.leader import gather_ranks

        progress("other ranks", 0.0)
        ranks = gather_ranks(config, device)
    weights_size = weight_bytes(source.config, dtype.itemsize, config.quantization)
    if weights_size > free_bytes:
        form = dtype if config.quantization == "none" else config.quantization
        raise OutOfMemoryError(
            f"the weights take {weights_size / MIB:.0f} MiB in {form}, but only {free_bytes / MIB:.0f} MiB of "
            f"memory are free on the {device}"
        )
    share = config.gpu_memory_utilization or _DEFAULTS[device].memory_share
    has_size = config.kv_cache_memory_bytes is not None or config.num_blocks_override is not None
    allowed = free_bytes if has_size else allowed_bytes(device, share, free_bytes)
    maker = _step_maker(backend, config, limits)
    weights = source.load(lambda fraction: progress("weights", fraction))
    model = (ranks.model if ranks is not None else GemmaModel)(source.config, backend, weights)

    progress("kv cache", 0.0)
    groups = source.config.kv_groups()
    bytes_per_block = [backend.kv_bytes_per_block(group, limits.block_size) for group in groups]
    if config.num_blocks_override is not None:
        num_blocks = (config.num_blocks_override,) * len(groups)
    else:
        budget = config.kv_cache_memory_bytes
        if budget is None:
            needed = weights_size + activation_bytes(source.config, dtype.itemsize, limits)
            used = needed if maker is None else maker.measure(model).total
            least = sum(
                (limits.blocks_of_one(group) + 1) * size
                for group, size in zip(groups, bytes_per_block, strict=True)
            )
            budget = _kv_budget(config, _DEFAULTS[device], allowed - used, least)
        num_blocks = size_kv_pools(groups, bytes_per_block, budget, limits)
    if ranks is not None:
        ranks.broadcast(num_blocks)
    kv = KVTensors(backend, groups, num_blocks, limits.block_size)
    manager = KVCacheManager(
        groups, num_blocks, limits.block_size, config.enable_prefix_caching, limits.max_num_batched_tokens
    )

    progress("warm-up", 0.0)
    sampler = backend.sampler(source.config.vocab_size, config.suppress_token_ids)
    step = None if maker is None else maker.make(model, kv)
    runner = ModelRunner(model, kv, sampler, limits.max_num_batched_tokens, step)
    runner.warm_up()
    runs_ahead = _runs_ahead(config, runner.can_run_ahead, backend.name, device)

    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_model_len=limits.max_model_len,
            long_prefill_threshold=max(1, limits.max_num_batched_tokens // 2),
        ),
        manager,
        NgramSpeculator(_speculative_tokens(config, backend.name)),
        time.monotonic,
    )
    info = EngineInfo(
        device=device,
        dtype=dtype,
        quantization=config.quantization,
        backend=backend.name,
        max_model_len=limits.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_sequence_tokens=min(manager.max_sequence_tokens(), limits.max_model_len),
        vocab_size=source.config.vocab_size,
        block_size=limits.block_size,
        num_blocks={group.name: count for group, count in zip(groups, num_blocks, strict=True)},
        kv_cache_bytes=kv.num_bytes,
        weight_bytes=weights_size,
        start_seconds={},
    )
    pacer = PrefillPacer(config.prefill_stretch, limits.max_num_batched_tokens)
    return EngineCore(scheduler, pacer, runner, GrammarCompiler(wake), runs_ahead=runs_ahead), info


def _step_maker(backend: AnyBackend, config: EngineConfig, limits: PoolLimits) -> StepMaker | None:
    """None if the back end computes while the host waits, or other ranks have to hear of each step."""
    if config.tensor_parallel_size > 1 or not isinstance(backend, DeviceBackend):
        return None
    from server.engine.device_step.assemble import StepMaker  # imports torch, as such a back end has done

    return StepMaker(backend, config.suppress_token_ids, limits)


def _runs_ahead(config: EngineConfig, is_possible: bool, backend: str, device: str) -> bool:
    if config.async_scheduling and not is_possible:
        raise StartError(
            f"--async-scheduling: the {backend} back end on the {device} cannot run ahead of the host"
        )
    return is_possible if config.async_scheduling is None else config.async_scheduling


def _speculative_tokens(config: EngineConfig, backend: str) -> int:
    if config.speculative_ngram_tokens is not None:
        return config.speculative_ngram_tokens
    return _SPECULATIVE_TOKENS.get(backend, 0)


def _limits(config: EngineConfig, model: GemmaConfig, defaults: _DeviceDefaults) -> PoolLimits:
    max_model_len = config.max_model_len or model.max_position
    if max_model_len > model.max_position:
        raise StartError(
            f"--max-model-len {max_model_len} is more than the model's context, {model.max_position}"
        )
    max_num_seqs = config.max_num_seqs or min(
        defaults.max_num_seqs, config.max_num_batched_tokens or sys.maxsize
    )
    max_num_batched_tokens = config.max_num_batched_tokens or max(defaults.max_num_batched_tokens, max_num_seqs)
    if max_num_batched_tokens < max_num_seqs:
        raise StartError(
            f"--max-num-batched-tokens {max_num_batched_tokens} must be at least --max-num-seqs {max_num_seqs}"
        )
    return PoolLimits(
        config.block_size, max_model_len, max_num_seqs, max_num_batched_tokens, defaults.steps_in_flight
    )


def _kv_budget(config: EngineConfig, defaults: _DeviceDefaults, left: int, least: int) -> int:
    """Bytes for the pools. left: beside weights and steps; least: for one sequence."""
    if config.gpu_memory_utilization is not None or defaults.max_kv_bytes is None:
        return left
    return min(left, max(defaults.max_kv_bytes, least))
