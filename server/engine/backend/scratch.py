"""Memory that outlives a step, because fresh large tensors cost more in page faults than in arithmetic."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Scratch:
    """One growing buffer per name. A tensor from `take` is valid until the next `take` of that name."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor."""
        size = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = torch.empty(size, dtype=torch.uint8, device=self._device)
        return buffer[:size].view(dtype).view(shape)
