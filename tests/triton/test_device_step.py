"""Triton's kernels in whole steps on a device that computes behind the host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from server.engine.backend.triton.backend import TritonBackend
from server.engine.device_step.backend import DeviceBackend
from server.engine.device_step.cuda import CudaQueue
from server.engine.device_step.queue import DeviceQueue
from server.engine.dtype import DType
from server.engine.models.config_reader import read_hf
from server.engine.sequence import Sequence
from tests.device_step.driver import Driver
from tests.device_step.thread_queue import ThreadQueue
from tests.parity.harness import CONFIGS, Engine, checkpoint, load_model, our_model, prompt, request


class QueuedBackend(TritonBackend):
    """On a thread where there is no GPU."""

    def __init__(self, device: torch.device, queue: DeviceQueue) -> None:
        super().__init__(device, DType.FLOAT32)
        self._queue = queue

    def queue(self) -> DeviceQueue:
        return self._queue


@pytest.fixture
def queue(device: torch.device) -> Iterator[DeviceQueue]:
    if device.type == "cuda":
        yield CudaQueue(device)
        return
    one = ThreadQueue()
    yield one
    one.close()


def test_the_back_end_for_gpus_computes_behind_the_host(device: torch.device) -> None:
    assert isinstance(TritonBackend(device, DType.FLOAT32), DeviceBackend)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gemma1", "gemma2", "gemma3")]


@pytest.mark.parametrize("name", ["gemma1-multi-query", *SLOW])
def test_recorded_steps_of_kernels_give_what_each_sequence_gives_alone(
    name: str, device: torch.device, queue: DeviceQueue
) -> None:
    backend = QueuedBackend(device, queue)
    driver = Driver(load_model(read_hf(CONFIGS[name]), backend, checkpoint(name)))
    wanted = [
        request(prompt(length, seed=length), request_id=f"r{length}", temperature=length % 2, seed=length)
        for length in (9, 3, 6)
    ]
    seqs = [Sequence.from_request(one) for one in wanted]
    driver.launch([(seq, seq.num_tokens) for seq in seqs])
    for index in range(4):
        driver.launch([(seq, 1) for seq in (seqs if index % 3 else seqs[:2])])
    for one, seq in zip(wanted, seqs, strict=True):
        generated = driver.finish(seq)
        assert generated == Engine(our_model(name)).generate([one])[0][: len(generated)]
