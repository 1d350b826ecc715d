"""Copies tensors from mapped files to a GPU, several at a time.

A mapped page is read from the disk when it is touched, and one thread that touches pages and copies them has
neither the disk nor the bus busy. So several threads do it, each through pinned memory of its own, from which
the GPU fetches one half while the other is filled.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

_NUM_THREADS = 4
_STAGED_BYTES = 32 << 20
"""Of one half of a thread's pinned memory."""


def to_gpu(tensors: Iterable[tuple[str, Tensor]], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The same names and tensors in the same order, each a new one on the device."""
    staging = threading.local()

    def copied(tensor: Tensor) -> Tensor:
        if not hasattr(staging, "copy"):
            staging.copy = _StagedCopy(device, _STAGED_BYTES)
        result: Tensor = staging.copy(tensor)
        return result

    return in_threads(copied, tensors, _NUM_THREADS)


def in_threads(
    copied: Callable[[Tensor], Tensor], tensors: Iterable[tuple[str, Tensor]], num_threads: int
) -> Iterator[tuple[str, Tensor]]:
    """(name, copied(tensor)) in order, of which as many as there are threads are made at a time.

    What `copied` or `tensors` raises is raised here, once no thread uses a tensor any more.
    """
    tensors = iter(tensors)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="weights") as threads:
        pending: deque[tuple[str, Future[Tensor]]] = deque()
        while True:
            for name, tensor in itertools.islice(tensors, num_threads - len(pending)):
                pending.append((name, threads.submit(copied, tensor)))
            if not pending:
                return
            name, future = pending.popleft()
            yield name, future.result()


class _StagedCopy:
    """Of one thread."""

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._halves = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._fetched = [torch.cuda.Event() for _ in range(2)]

    def __call__(self, tensor: Tensor) -> Tensor:
        target = torch.empty_like(tensor, device=self._device, memory_format=torch.contiguous_format)
        # Its memory may have been another tensor's, which work that is under way still reads.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        halves = itertools.cycle(zip(self._halves, self._fetched, strict=True))
        size = len(self._halves[0])
        source_parts = tensor.contiguous().view(-1).view(torch.uint8).split(size)
        target_parts = target.view(-1).view(torch.uint8).split(size)
        with torch.cuda.stream(self._stream):
            for source, part, (half, fetched) in zip(source_parts, target_parts, halves, strict=False):
                fetched.synchronize()
                staged = half[: len(source)]
                staged.copy_(source)
                part.copy_(staged, non_blocking=True)
                fetched.record()
        self._stream.synchronize()
        return target
