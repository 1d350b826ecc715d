"""The stand-in for a GPU refuses what a GPU would get wrong in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.device_step.thread_queue import POISON, ThreadQueue


@pytest.fixture
def queue() -> Iterator[ThreadQueue]:
    one = ThreadQueue(max_delay=0.02)
    yield one
    one.close()


def upload(queue: ThreadQueue, target: Tensor, values: list[int]) -> None:
    pinned = queue.pinned(len(values))
    pinned.numpy()[:] = values
    queue.copy(target, pinned)


def on_host(queue: ThreadQueue, source: Tensor) -> list[int]:
    pinned = queue.pinned(source.numel())
    queue.copy(pinned, source)
    queue.mark().wait()
    values: list[int] = pinned.tolist()
    return values


def test_a_buffer_that_is_written_before_its_copy_is_done_spoils_the_copy(queue: ThreadQueue) -> None:
    target, pinned = queue.persistent((1,), torch.int32), queue.pinned(1)
    pinned.numpy()[:] = 1
    queue.copy(target, pinned)
    pinned.numpy()[:] = 2  # too early
    assert on_host(queue, target) == [2]
    assert pinned.tolist() == [POISON]


def test_a_recording_does_nothing_and_a_replay_does_it_in_the_order_of_the_queue(queue: ThreadQueue) -> None:
    source, target = queue.persistent((2,), torch.int32), queue.persistent((2,), torch.int32)
    upload(queue, source, [1, 2])
    upload(queue, target, [10, 20])
    replay = queue.record(lambda: target.add_(source * 2))
    assert on_host(queue, target) == [10, 20]
    replay()
    upload(queue, source, [5, 5])
    replay()
    assert on_host(queue, target) == [10 + 2 + 10, 20 + 4 + 10]


REFUSED: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "a condition": lambda x: x.add_(1) if x[0] > 0 else x,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "nonzero": lambda x: x.nonzero(),
    "a mask as an index": lambda x: x[x > 0],
    "a mask as a target": lambda x: x.__setitem__(x > 0, 1),
    "unique": lambda x: x.unique(),
    "repeats on the device": lambda x: x.repeat_interleave(x),
    "a tensor from the host": lambda x: x.add_(torch.tensor([1, 2], dtype=torch.int32)),
}


@pytest.mark.parametrize("work", REFUSED.values(), ids=REFUSED)
def test_a_recording_that_would_wait_for_the_device_is_refused(
    queue: ThreadQueue, work: Callable[[Tensor], object]
) -> None:
    source = queue.persistent((2,), torch.int32)
    upload(queue, source, [1, 2])
    queue.mark().wait()
    with pytest.raises(RuntimeError, match=r"CUDA error: .*(waits for the device|reads the host)"):
        queue.record(lambda: work(source))


def changing_number(x: Tensor, state: list[int]) -> object:
    state.append(0)
    return x.add_(len(state))


def changing_shape(x: Tensor, state: list[int]) -> object:
    state.append(0)
    return x[: len(state)].add_(1)


def changing_memory(x: Tensor, state: list[Tensor]) -> object:
    state.append(torch.zeros(4, dtype=torch.int32))
    return x.add_(state[-2] if len(state) > 1 else state[0])


def changing_operations(x: Tensor, state: list[int]) -> object:
    state.append(0)
    return x.add_(1) if len(state) > 2 else x.mul_(2).add_(1)


@pytest.mark.parametrize(
    "work", [changing_number, changing_shape, changing_memory, changing_operations], ids=lambda f: f.__name__
)
def test_a_replay_that_is_not_what_was_recorded_is_refused(
    queue: ThreadQueue, work: Callable[[Tensor, list[object]], object]
) -> None:
    source = queue.persistent((4,), torch.int32)
    state: list[object] = []
    upload(queue, source, [1, 2, 3, 4])
    queue.run(lambda: work(source, state))
    replay = queue.record(lambda: work(source, state))
    replay()
    with pytest.raises(RuntimeError, match="CUDA error: recorded was"):
        queue.mark().wait()


def test_memory_that_nobody_wrote_and_what_a_replay_left_behind_are_poison(queue: ThreadQueue) -> None:
    source = queue.persistent((2,), torch.int32)
    upload(queue, source, [1, 2])
    kept: list[Tensor] = []

    def work() -> None:
        kept.append(source + 1)
        source.copy_(torch.empty(2, dtype=torch.int32))

    queue.record(work)()
    assert on_host(queue, source) == [POISON, POISON]
    assert kept[-1].tolist() == [POISON, POISON]
