"""What a card is and what it can do: bandwidth and bf16 matrix products, measured.

    python -m benchmarks.gpu.card --device cuda

prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch

from benchmarks.machine import describe_machine

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class _Sizes:
    num_bytes: int
    """Of each array: far more than a card's caches hold."""
    products: tuple[tuple[int, int, int], ...]
    """(M, N, K). The last ones are the MLPs of 2B and 7B with 4,096 and 8,192 tokens."""
    seconds: float
    """That each figure is measured for."""


_FULL = _Sizes(
    4 * GIB,
    ((8192, 8192, 8192), (16384, 8192, 8192), (4096, 32768, 2048), (8192, 49152, 3072), (8192, 3072, 24576)),
    1.0,
)
_TINY = _Sizes(1 << 22, ((128, 128, 128), (128, 256, 128)), 0.02)


def measure_card(device: str, *, is_tiny: bool) -> dict[str, Any]:
    """Names, versions, bytes/s of copies and of reads, and bf16 FLOP/s by shape."""
    sizes = _TINY if is_tiny else _FULL
    source = torch.randn(sizes.num_bytes // 4, device=device)
    target = torch.empty_like(source)
    copy = _seconds(partial(target.copy_, source), device, sizes.seconds)
    # Of the operations that read and hardly write, a maximum is known to be bound by memory.
    read = _seconds(source.amax, device, sizes.seconds)
    products = {}
    for m, n, k in sizes.products:
        left = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        right = torch.randn(n, k, device=device, dtype=torch.bfloat16)
        out = torch.empty(m, n, device=device, dtype=torch.bfloat16)
        product = partial(torch.mm, left, right.t(), out=out)
        products[f"{m}x{n}x{k}"] = 2 * m * n * k / _seconds(product, device, sizes.seconds)
    return {
        **_names(device),
        "copy_bytes_per_second": 2 * sizes.num_bytes / copy,
        "read_bytes_per_second": sizes.num_bytes / read,
        "gemm_flops_per_second": products,
    }


def _names(device: str) -> dict[str, Any]:
    machine = describe_machine()
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": _version("triton")}
    if device == "cpu":
        return {"name": machine["cpu"], "versions": versions, "machine": machine}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "versions": versions,
        "machine": machine,  # the driver's version is in "gpus"
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _seconds(work: Callable[[], object], device: str, limit: float) -> float:
    """Of one call in a row of them, the best of three rows that take `limit` seconds together."""
    work()
    _synchronize(device)
    once = _row(work, device, 2) / 2
    count = max(2, int(limit / 3 / max(once, 1e-7)))
    return min(_row(work, device, count) for _ in range(3)) / count


def _row(work: Callable[[], object], device: str, count: int) -> float:
    _synchronize(device)
    started = time.perf_counter()
    for _ in range(count):
        work()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps(measure_card(arguments.device, is_tiny=arguments.tiny)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
