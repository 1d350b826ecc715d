"""Tensors on their way to a GPU, several at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from server.engine.models.safetensors_dir import StoredTensor, read_tensors
from server.engine.models.staged_copy import in_threads


def numbered(count: int) -> Iterator[tuple[str, Tensor]]:
    for index in range(count):
        yield f"t{index}", torch.tensor([index])


def test_tensors_come_in_order_however_long_each_takes_and_a_few_at_a_time() -> None:
    lock, at_a_time, most = threading.Lock(), 0, 0

    def copied(tensor: Tensor) -> Tensor:
        nonlocal at_a_time, most
        with lock:
            at_a_time += 1
            most = max(most, at_a_time)
        time.sleep(0.01 * (3 - int(tensor) % 4))
        with lock:
            at_a_time -= 1
        return tensor + 100

    results = [(name, int(tensor)) for name, tensor in in_threads(copied, numbered(11), num_threads=3)]
    assert results == [(f"t{index}", 100 + index) for index in range(11)]
    assert 1 < most <= 3


def test_no_more_tensors_are_taken_than_are_being_copied() -> None:
    taken = []

    def source() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in numbered(20):
            taken.append(name)
            yield name, tensor

    for count, _ in enumerate(in_threads(lambda tensor: tensor, source(), num_threads=4)):
        assert len(taken) <= count + 4


def test_an_error_ends_the_threads_and_is_raised() -> None:
    def copied(tensor: Tensor) -> Tensor:
        if int(tensor) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tensor

    results = in_threads(copied, numbered(9), num_threads=2)
    with pytest.raises(torch.OutOfMemoryError):
        list(results)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights")]


def test_what_was_read_of_a_file_outlives_the_file_s_turn(tmp_path: Path) -> None:
    """Threads still copy from one file when the reading has gone on to the next."""
    stored = {}
    for index in range(2):
        file = tmp_path / f"{index}.safetensors"
        save_file({f"t{index}": torch.full((1 << 16,), float(index))}, file)
        stored[f"t{index}"] = StoredTensor(f"t{index}", f"t{index}", file, (1 << 16,))
    tensors = dict(read_tensors(stored))
    assert tensors["t0"].unique().tolist() == [0.0]
    assert tensors["t1"].unique().tolist() == [1.0]
