"""A stand-in for a GPU's queue: a thread that works late, and is as unforgiving as CUDA graphs are.

- Memory that nobody has written is poison, a pinned buffer is after its copy, and so is what a recording made
  once it has run: with a GPU, the next recording uses that memory.
- A recording that is replayed must do what it did when it was recorded: the same operations on tensors of the
  same shapes, the same persistent memory and the same numbers. With a GPU, whatever else would be ignored.
- While recording, all that would wait for the device or read the host's memory is refused.
"""

from __future__ import annotations

import os
import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from server.engine.device_step.queue import Mark, MemoryReport, ResultT

POISON = 0x5A5A5A5A
"""As an int32; as a float32 it is 1.5e16, and as a token or a block no allocation has it."""
_MAKE_UNDEFINED = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
_WAIT_FOR_DEVICE = {
    "_local_scalar_dense",
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "is_nonzero",
    "repeat_interleave.Tensor",
}
_READ_HOST = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"}
_FROM_HOST = {"tensor", "as_tensor", "from_numpy", "frombuffer"}
_INTERPRETER = os.path.join("triton", "runtime", "interpreter.py")


class RecordingError(RuntimeError):
    """What a recording would do with a GPU is not what its author meant."""


class ThreadQueue:
    """Implements `device_step.queue.DeviceQueue` on the CPU."""

    def __init__(self, max_delay: float = 0.002, seed: int = 0) -> None:
        """max_delay: seconds that each piece of work may come late."""
        self.num_recordings = 0
        self.num_replays = 0
        self.num_copies_in = 0
        self._max_delay = max_delay
        self._random = random.Random(seed)
        self._pinned: dict[int, Tensor] = {}
        """By address; kept, so that nothing else comes to lie there."""
        self._error: Exception | None = None
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()

    def pinned(self, num_words: int) -> Tensor:
        memory = torch.full((num_words,), POISON, dtype=torch.int32)
        self._pinned[_address(memory)] = memory
        return memory

    def persistent(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return _poison(torch.empty(shape, dtype=dtype))

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert target.shape == source.shape
        assert target.dtype == source.dtype
        assert target.is_contiguous()
        assert source.is_contiguous()
        is_from_host = _address(source) in self._pinned
        assert is_from_host != (_address(target) in self._pinned)
        self.num_copies_in += is_from_host

        def work() -> None:
            target.copy_(source)
            if is_from_host:
                source.fill_(POISON)

        if not is_from_host:
            target.fill_(POISON)
        self._put(work)

    def run(self, work: Callable[[], object]) -> None:
        self._put(work)

    def result(self, work: Callable[[], ResultT]) -> ResultT:
        results: list[ResultT] = []
        self._put(lambda: results.append(work()))
        self.mark().wait()
        return results[0]

    def record(self, work: Callable[[], object]) -> Callable[[], None]:
        self.num_recordings += 1
        recorded: list[_Trace] = []

        def record() -> None:
            trace = _Trace(None)
            with trace.kept():
                work()
            recorded.append(trace)

        def replay() -> None:
            with _Trace(recorded[0]) as trace, _HostIsOutOfReach():
                work()
            trace.end()

        def enqueue() -> None:
            self.num_replays += 1
            self._put(replay)

        self._put(record)
        self.mark().wait()  # where it is recorded, what is wrong with it shows
        return enqueue

    def mark(self) -> Mark:
        reached = threading.Event()
        self._work.put(reached.set)
        return _ThreadMark(self, reached)

    def memory(self) -> MemoryReport:
        self.mark().wait()
        return MemoryReport(total=0, free=0, allocated=0, peak=0)

    def raise_error(self) -> None:
        if self._error is not None:
            raise RuntimeError(f"CUDA error: {self._error}") from self._error

    def _put(self, work: Callable[[], object]) -> None:
        def late() -> None:
            if self._error is None:  # behind an error nothing is computed any more
                time.sleep(self._random.random() * self._max_delay)
                work()

        self._work.put(late)

    def _run(self) -> None:
        torch.set_num_threads(1)  # it counts for the thread that says so
        while (work := self._work.get()) is not None:
            try:
                work()
            except Exception as error:
                self._error = error


class _ThreadMark:
    def __init__(self, owner: ThreadQueue, reached: threading.Event) -> None:
        self._owner = owner
        self._reached = reached

    def wait(self) -> None:
        assert self._reached.wait(timeout=60), "the queue is stuck"
        self._owner.raise_error()


class _HostIsOutOfReach(TorchFunctionMode):
    """Refuses what reads a tensor on the host, or brings the host's memory to the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        to_host = name == "to" and any(
            isinstance(arg, torch.device | str) for arg in tree_leaves((args, kwargs))
        )
        if _is_in_kernel():
            return func(*args, **(kwargs or {}))
        if name in _READ_HOST or to_host:
            raise RecordingError(f"{name} waits for the device")
        if name in _FROM_HOST:
            raise RecordingError(f"{name} reads the host's memory")
        return func(*args, **(kwargs or {}))


class _Trace(TorchDispatchMode):
    """The operations that work consists of; compared with an earlier trace of it, if there is one."""

    def __init__(self, expected: _Trace | None) -> None:
        super().__init__()
        self._expected = expected
        self._operations: list[tuple[Any, ...]] = []
        self._made: dict[int, Tensor] = {}
        """By address: memory that these operations have allocated, kept until their end."""
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        """By address: persistent memory that they have written, and what was in it."""

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Records; what was written meanwhile is as before, for nothing is done while a GPU records."""
        with self, _HostIsOutOfReach():
            yield
        with torch.inference_mode():
            for memory, content in self._before.values():
                memory.copy_(content)
        self._lose_made()

    def end(self) -> None:
        """To be called when all operations of a replay have run."""
        assert self._expected is not None
        if len(self._operations) != len(self._expected._operations):
            raise RecordingError("a replay has fewer operations than were recorded")
        self._lose_made()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_in_kernel():
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name in _WAIT_FOR_DEVICE or f"{name}.{func._overloadname}" in _WAIT_FOR_DEVICE:
            raise RecordingError(f"{name} waits for the device")
        if name in ("index", "index_put_", "index_put"):
            masks = [one for one in tree_leaves(args[1]) if isinstance(one, Tensor) and one.dtype == torch.bool]
            if masks:
                raise RecordingError("indexing with a mask waits for the device")
        leaves = tree_leaves((args, kwargs))
        self._add((name, func._overloadname, *map(self._described, leaves)))
        if self._expected is None:
            self._save_written(func, args, kwargs)
        out = func(*args, **kwargs)
        known = {_address(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _address(tensor) not in known:
                self._made[_address(tensor)] = tensor
                if name in _MAKE_UNDEFINED:
                    _poison(tensor)
        return out

    def _add(self, operation: tuple[Any, ...]) -> None:
        if self._expected is not None:
            index = len(self._operations)
            recorded = self._expected._operations[index : index + 1]
            if recorded != [operation]:
                raise RecordingError(f"recorded was {recorded}, and now it is {operation}")
        self._operations.append(operation)

    def _described(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return repr(leaf)
        address = _address(leaf)
        place = None if address in self._made else (address, leaf.storage_offset())
        return (tuple(leaf.shape), leaf.stride(), leaf.dtype, place)

    def _save_written(self, func: Any, args: Any, kwargs: Any) -> None:
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            if isinstance(value, Tensor) and _address(value) not in self._made | self._before.keys():
                memory = _whole(value)
                self._before[_address(value)] = (memory, memory.clone())

    def _lose_made(self) -> None:
        with torch.inference_mode():
            for tensor in self._made.values():
                _poison(_whole(tensor))
        self._made.clear()


def _is_in_kernel() -> bool:
    """Whether Triton's interpreter asks, which stands for a device: what it does itself is not recorded."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.endswith(_INTERPRETER):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _whole(tensor: Tensor) -> Tensor:
    """All of the memory that a tensor is a view of."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


def _poison(tensor: Tensor) -> Tensor:
    if tensor.dtype.is_floating_point:
        return tensor.fill_(float("nan"))
    return tensor.fill_(1 if tensor.dtype == torch.bool else POISON & torch.iinfo(tensor.dtype).max)
