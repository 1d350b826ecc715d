"""Steps that are not recorded: there is no memory for it, or nobody wants it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing

import pytest
import torch

from server.engine.sequence import Sequence
from tests.device_step.driver import Driver, static_model
from tests.device_step.test_device_step import alone, prefill, requests
from tests.device_step.thread_queue import ThreadQueue
from tests.parity.harness import prompt, request


class Tight(ThreadQueue):
    """Has memory for so many recordings."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self.num_refused = 0

    def record(self, work: Callable[[], object]) -> Callable[[], None]:
        if self.num_recordings == self._room:
            self.num_refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return super().record(work)


@pytest.mark.parametrize("room", [0, 1, 2])
def test_steps_of_a_shape_that_finds_no_memory_go_on_unrecorded_after_one_warning(
    room: int, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = requests(3, max_tokens=12)
    seqs = [Sequence.from_request(one) for one in wanted]
    with closing(Tight(room)) as queue, caplog.at_level(logging.WARNING):
        driver = Driver(static_model("gemma3", queue))
        prefill(driver, seqs)
        for step in range(10):
            # Decodes of 2 and, with padding, of 4: with the prompts' that makes three shapes.
            driver.launch([(seq, 1) for seq in seqs[: 3 if step % 2 else 2]])
        generated = [driver.finish(seq)[:6] for seq in seqs]
    assert generated == [alone("gemma3", one)[:6] for one in wanted]
    assert queue.num_recordings == room
    assert queue.num_refused == 3 - room, "each shape is tried once"
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 3 - room
    assert "steps of 4 tokens" in warnings[-1]
    assert "--gpu-memory-utilization" in warnings[-1]


def test_steps_whose_tokens_the_host_chooses_go_on_unrecorded_too() -> None:
    one = request(prompt(5), max_tokens=5)
    seq = Sequence.from_request(one)
    with closing(Tight(0)) as queue:
        driver = Driver(static_model("gemma3", queue))
        driver.compute([(seq, seq.num_tokens)])
        for _ in range(4):
            driver.compute([(seq, 1)])
        assert driver.finish(seq) == alone("gemma3", one)
    assert queue.num_refused == 1


def test_without_recordings_steps_of_any_shape_give_what_each_sequence_gives_alone() -> None:
    wanted = requests(3, max_tokens=12)
    seqs = [Sequence.from_request(one) for one in wanted]
    with closing(ThreadQueue()) as queue:
        driver = Driver(static_model("gemma3", queue), records=False)
        driver.step.warm_up()
        prefill(driver, seqs)
        for step in range(10):
            driver.launch([(seq, 1) for seq in seqs[: 3 if step % 2 else 2]])
        driver.compute([(seqs[0], 1)])
        generated = [driver.finish(seq)[:6] for seq in seqs]
    assert generated == [alone("gemma3", one)[:6] for one in wanted]
    assert queue.num_recordings == queue.num_replays == 0
