"""What a whole step needs of a device that works through a queue, behind its host."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ResultT = TypeVar("ResultT")


class MemoryReport(NamedTuple):
    """Bytes of a device's memory, once all that was enqueued is done."""

    total: int
    free: int
    """Of the device, for any process."""
    allocated: int
    """In tensors of this process."""
    peak: int
    """The most that `allocated` was since the report before."""


class Mark(Protocol):
    """A point in the queue."""

    def wait(self) -> None:
        """Returns when everything before it is done. Raises what went wrong in any of that."""


class DeviceQueue(Protocol):
    """Work is done in the order in which it is enqueued. Only `Mark.wait` and `result` wait for it.

    Work that is enqueued may be torch operations on the queue's tensors alone: the host's memory may have
    changed by the time it is done.
    """

    def pinned(self, num_words: int) -> Tensor:
        """int32 [num_words] of the host's memory that the device reaches; what is in it is undefined."""

    def persistent(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor on the device that stays where it is; what is in it is undefined."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Enqueues a copy between `pinned` and `persistent` memory of one size. The host must leave both alone
        until a later mark is reached."""

    def run(self, work: Callable[[], object]) -> None:
        """Enqueues torch operations."""

    def result(self, work: Callable[[], ResultT]) -> ResultT:
        """Enqueues torch operations whose result the caller's own operations can use."""

    def record(self, work: Callable[[], object]) -> Callable[[], None]:
        """Records torch operations without doing them; the function that is returned enqueues them.

        `work` must have run before with tensors of the same shapes. It must not wait for the device, nor read
        the host's memory. Its tensors must live as long as the recording; those that it makes are lost at its
        end. Raises torch.OutOfMemoryError, behind which the queue goes on as if nothing had been recorded.
        """

    def mark(self) -> Mark:
        """Enqueues a mark."""

    def memory(self) -> MemoryReport:
        """Waits for the device, and gives memory that no tensor uses back to it."""
