"""What a back end offers whose steps can run on a device behind the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from server.engine.device_step.queue import DeviceQueue

if TYPE_CHECKING:
    from torch import Tensor

    DeviceSampler = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    """Logits [R, vocabulary] of any floating dtype, which may be overwritten, and the arrays of
    `SAMPLING_ARRAYS` as tensors -> ids [R], negative where none can be sampled. Never waits for the device."""


@runtime_checkable
class DeviceBackend(Protocol):
    """Beside `base.Backend`, whose steps are `DeviceInputs` and whose operations fit `DeviceQueue.record`."""

    def queue(self) -> DeviceQueue:
        """A queue of the back end's device; recordings of one queue share memory."""

    def device_sampler(self, vocab_size: int, suppress_token_ids: tuple[int, ...]) -> DeviceSampler:
        """Chooses tokens as `sampler` does, by `SAMPLING_ARRAYS` alone."""
