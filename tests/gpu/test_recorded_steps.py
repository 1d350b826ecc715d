"""The same steps on a GPU, through CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from server.engine.device_step.cuda import CudaQueue
from server.engine.sequence import Sequence
from tests.device_step.driver import Driver, static_model
from tests.parity.harness import Engine, our_model, prompt, request


@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3"])
def test_graphs_give_what_each_sequence_gives_alone_on_a_cpu(name: str) -> None:
    driver = Driver(static_model(name, CudaQueue(torch.device("cuda")), device="cuda"))
    wanted = [
        request(prompt(length, seed=length), request_id=f"r{length}", temperature=length % 2, seed=length)
        for length in (9, 3, 5, 1, 12)
    ]
    seqs = [Sequence.from_request(one) for one in wanted]
    driver.launch([(seq, seq.num_tokens) for seq in seqs])
    for index in range(15):
        company = seqs if index % 5 else seqs[:3]
        driver.launch([(seq, 1) for seq in company])
    for one, seq in zip(wanted, seqs, strict=True):
        generated = driver.finish(seq)
        assert generated == Engine(our_model(name)).generate([one])[0][: len(generated)]


def test_a_recording_without_memory_for_it_leaves_the_queue_as_it_was() -> None:
    device = torch.device("cuda")
    queue = CudaQueue(device)
    state = queue.persistent((1,), torch.float32)
    state.zero_()
    too_much = torch.cuda.mem_get_info(device)[1]  # bytes, for as many floats

    def work() -> None:
        state.add_(1)
        torch.empty(too_much, device=device).add_(1)

    stream = torch.cuda.current_stream(device)
    with pytest.raises(torch.OutOfMemoryError):
        queue.record(work)
    assert torch.cuda.current_stream(device) == stream
    replay = queue.record(lambda: state.add_(10))
    replay()
    queue.mark().wait()
    assert state.item() == 10
