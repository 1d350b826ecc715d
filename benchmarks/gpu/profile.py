"""How long the device itself works."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile


def busy_seconds(step: Callable[[], object], num_steps: int) -> float | None:
    """Seconds of each step during which the device computed or copied anything.

    None if the profiler (CUPTI) saw nothing: it needs rights that a container may not give. It slows the host
    down and hardly the device, so this is compared with the time of steps without it.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(num_steps):
            step()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or []
        if event.device_type == DeviceType.CUDA
    ]
    return covered(spans) * 1e-6 / num_steps if spans else None


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end) spans."""
    total, end_so_far = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, end_so_far))
        end_so_far = max(end_so_far, end)
    return total
