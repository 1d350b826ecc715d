"""The queue of an NVIDIA GPU: the current stream, and CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from server.engine.device_step.queue import Mark, MemoryReport, ResultT


class CudaQueue:
    """Implements `queue.DeviceQueue`.

    All recordings share one pool of memory: they never run at the same time, and what one leaves there is lost.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def pinned(self, num_words: int) -> Tensor:
        return torch.empty(num_words, dtype=torch.int32, pin_memory=True)

    def persistent(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def run(self, work: Callable[[], object]) -> None:
        work()

    def result(self, work: Callable[[], ResultT]) -> ResultT:
        return work()  # the caller's operations follow in the same stream

    def record(self, work: Callable[[], object]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may use CUDA meanwhile, so only what this one does can spoil the recording.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        replay: Callable[[], None] = graph.replay
        return replay

    def mark(self) -> Mark:
        event = torch.cuda.Event()
        event.record()
        return _CudaMark(event)

    def memory(self) -> MemoryReport:
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        gc.collect()  # a recording and what refers to it may be a cycle
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return MemoryReport(total, free, torch.cuda.memory_allocated(self._device), peak)


class _CudaMark:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()
