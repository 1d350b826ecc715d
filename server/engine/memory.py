"""How much memory there is, and how it is divided between the KV pools.

Units are bytes and blocks. Nothing here allocates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from server.engine.kv_cache.manager import sliding_pool_blocks
from server.engine.models.config import GemmaConfig, KVGroupSpec, expected_weights

MIB = 1 << 20


class OutOfMemoryError(ValueError):
    """The model with its KV cache does not fit; the message says what to change."""


def available_bytes(device: str) -> int:
    """Memory that can be taken now without swapping, or breaking the container's limit."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    available = _meminfo_available(Path("/proc/meminfo"))
    of_cgroup = _cgroup_available(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    return available if of_cgroup is None else min(available, of_cgroup)


def allowed_bytes(device: str, share: float, free_bytes: int) -> int:
    """What weights, KV pools and steps may take together.

    share: of what is free; of all that a GPU has, as vLLM counts. free_bytes: before loading. Raises
    OutOfMemoryError if so much is not free on a GPU.
    """
    if device == "cpu":
        return int(share * free_bytes)
    import torch

    total_bytes = torch.cuda.mem_get_info(device)[1]
    allowed = int(share * total_bytes)
    if allowed > free_bytes:
        raise OutOfMemoryError(
            f"--gpu-memory-utilization {share:g} of the GPU's {total_bytes / MIB:.0f} MiB is "
            f"{allowed / MIB:.0f} MiB, but only {free_bytes / MIB:.0f} MiB are free: lower it, or end what "
            "else uses the GPU"
        )
    return allowed


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """What the sizes of the pools follow from, beside the budget."""

    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    steps_in_flight: int = 1
    """Steps that are planned and not taken in, at most."""

    def blocks_of_one(self, group: KVGroupSpec) -> int:
        """Blocks with which one sequence of max_model_len tokens can run."""
        return self._blocks(group, 1)

    def blocks_of_all(self, group: KVGroupSpec) -> int:
        """Blocks that max_num_seqs such sequences can use at most."""
        return self._blocks(group, self.max_num_seqs)

    def _blocks(self, group: KVGroupSpec, num_seqs: int) -> int:
        if group.window is None:
            return num_seqs * -(-self.max_model_len // self.block_size)
        return sliding_pool_blocks(
            group.window,
            self.block_size,
            num_seqs,
            self.max_num_batched_tokens,
            self.max_model_len,
            self.steps_in_flight,
        )


def weight_bytes(config: GemmaConfig, itemsize: int, quantization: str) -> int:
    """Of the loaded weights. quantization: none, int8, fp8 or int4. With fp8 and int4, the embedding is as
    without, and so are matrices that the kernels do not take."""
    shapes = [*expected_weights(config).values()]
    if quantization == "none":
        return itemsize * sum(map(prod, shapes))
    embedding = 0 if quantization == "int8" else itemsize * prod(shapes.pop(0))
    matrices = [shape for shape in shapes if len(shape) == 2]
    norms = sum(4 * shape[0] for shape in shapes if len(shape) == 1)
    return embedding + norms + sum(_matrix_bytes(shape, itemsize, quantization) for shape in matrices)


def _matrix_bytes(shape: Sequence[int], itemsize: int, quantization: str) -> int:
    """In 8 bits, each row has a scale in fp32; in 4 bits, 32 weights have 4 bytes beside."""
    in_8_bits = prod(shape) + 4 * shape[0]
    if quantization == "int8":
        return in_8_bits
    from server.engine.backend import fp8, int4  # which import torch, as the back ends that have them do

    if quantization == "fp8" and fp8.fits(shape):
        return in_8_bits
    return 5 * prod(shape) // 8 if quantization == "int4" and int4.fits(shape) else itemsize * prod(shape)


def activation_bytes(config: GemmaConfig, itemsize: int, limits: PoolLimits) -> int:
    """An upper estimate of what one step needs beside weights and KV pools."""
    attention = config.layers[0].attention
    qkv_width = (attention.num_heads + 2 * attention.num_kv_heads) * attention.head_dim
    widths = 3 * config.intermediate_size + 4 * config.hidden_size + 2 * qkv_width
    of_tokens = limits.max_num_batched_tokens * widths * (itemsize + 4)
    of_logits = 3 * limits.max_num_seqs * config.vocab_size * 4  # the sampler works on copies
    gathered_kv = 2 * limits.max_model_len * attention.num_kv_heads * attention.head_dim * (itemsize + 4)
    return of_tokens + of_logits + gathered_kv


def size_kv_pools(
    groups: Sequence[KVGroupSpec], bytes_per_block: Sequence[int], budget: int, limits: PoolLimits
) -> tuple[int, ...]:
    """Usable blocks of each group, such that the pools with their null blocks take at most the budget.

    The sliding pool gets what all sequences can ever use, the full pool the rest, up to what they can ever use.
    If that leaves the full pool smaller, both get the same number of blocks: no sequence holds more blocks of
    the sliding pool than of the full one. Raises OutOfMemoryError if not one sequence of max_model_len fits.
    """
    least = [limits.blocks_of_one(group) for group in groups]
    most = [limits.blocks_of_all(group) for group in groups]
    left = budget - sum(bytes_per_block)  # the null blocks
    needed = sum(count * size for count, size in zip(least, bytes_per_block, strict=True))
    if needed > left:
        raise OutOfMemoryError(
            f"the KV cache of one sequence of --max-model-len {limits.max_model_len} tokens takes "
            f"{needed / MIB:.0f} MiB, but only {max(left, 0) / MIB:.0f} MiB are left for it after the weights "
            "and a step: lower --max-model-len, or --max-num-batched-tokens and --max-num-seqs, or give the "
            "server more memory (--gpu-memory-utilization, --kv-cache-memory-bytes, the container's limit)"
        )
    if len(groups) == 1:
        return (min(most[0], left // bytes_per_block[0]),)
    full, sliding = (0, 1) if groups[0].window is None else (1, 0)
    equal = min(left // sum(bytes_per_block), most[sliding])
    blocks = [0, 0]
    at_least_full = max(least[full], equal) * bytes_per_block[full]
    blocks[sliding] = min(
        most[sliding], max(least[sliding], (left - at_least_full) // bytes_per_block[sliding])
    )
    blocks[full] = min(most[full], (left - blocks[sliding] * bytes_per_block[sliding]) // bytes_per_block[full])
    return tuple(blocks)


def _meminfo_available(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{meminfo} does not tell MemAvailable")


def _cgroup_available(root: Path, own: Path) -> int | None:
    """Limit minus use, the least of this process's memory cgroup and those above it; None without a limit."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    room: list[int | None] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, usage_file = root, "memory.current"
            # Above memory.high nobody is killed, but all are slowed down until they hardly move.
            limit_files = ["memory.max", "memory.high"]
            inactive_key = "inactive_file"
        elif "memory" in controllers.split(","):
            base, usage_file = root / "memory", "memory.usage_in_bytes"
            limit_files = ["memory.limit_in_bytes"]
            inactive_key = "total_inactive_file"
        else:
            continue
        # Inside a container the path may be the host's; then only the root of the mount exists.
        here = base / path.lstrip("/")
        for level in (here, *here.parents):
            room += [_room_in(level, file, usage_file, inactive_key) for file in limit_files]
            if level == base:
                break
    return min((level for level in room if level is not None), default=None)


def _room_in(directory: Path, limit_file: str, usage_file: str, inactive_key: str) -> int | None:
    try:
        limit = (directory / limit_file).read_text().strip()
        if limit == "max":
            return None
        usage = int((directory / usage_file).read_text())
        stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    # The kernel gives up clean page cache before it refuses memory.
    return max(0, int(limit) - usage + int(stat.get(inactive_key, 0)))
