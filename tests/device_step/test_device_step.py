"""Steps on a device, launched ahead of their results, give the tokens of the synchronous engine."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine.device_step.layout import StepShape
from server.engine.device_step.sizes import RecordedShapes, decode_sizes
from server.engine.sampling.arrays import sampling_arrays
from server.engine.sequence import Sequence
from server.engine.types import GenerateRequest
from tests.device_step.driver import Driver, static_model
from tests.device_step.static_backend import sample
from tests.device_step.thread_queue import ThreadQueue
from tests.parity.harness import VOCAB, Engine, our_model, prompt, request

SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "min_p": 0.1, "top_k": 20},
]


@pytest.fixture
def queue() -> Iterator[ThreadQueue]:
    one = ThreadQueue()
    yield one
    one.close()


def requests(count: int, max_tokens: int, seed: int = 0) -> list[GenerateRequest]:
    """Of different lengths, greedy and random ones."""
    lengths = random.Random(seed).choices(range(1, 14), k=count)
    return [
        request(
            prompt(length, seed=seed + index),
            request_id=f"r{index}",
            **SAMPLING[index % len(SAMPLING)] | {"max_tokens": max_tokens, "seed": seed + index},
        )
        for index, length in enumerate(lengths)
    ]


def alone(name: str, one: GenerateRequest) -> list[int]:
    """What the synchronous engine generates."""
    return Engine(our_model(name)).generate([one])[0]


def prefill(driver: Driver, seqs: list[Sequence]) -> None:
    driver.launch([(seq, seq.num_tokens) for seq in seqs])


@pytest.mark.parametrize("name", ["gemma1", "gemma3"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9])
def test_decodes_around_the_edges_of_the_sizes_give_what_each_sequence_gives_alone(
    queue: ThreadQueue, name: str, count: int
) -> None:
    driver = Driver(static_model(name, queue))
    wanted = requests(count, max_tokens=10, seed=count)
    seqs = [Sequence.from_request(one) for one in wanted]
    prefill(driver, seqs)
    for _ in range(9):
        driver.launch([(seq, 1) for seq in seqs])
    for one, seq in zip(wanted, seqs, strict=True):
        assert driver.finish(seq) == alone(name, one)
    assert queue.num_recordings == 2
    assert queue.num_replays == 8


def test_a_step_takes_one_copy(queue: ThreadQueue) -> None:
    driver = Driver(static_model("gemma2", queue))
    seqs = [Sequence.from_request(one) for one in requests(3, max_tokens=4)]
    prefill(driver, seqs)
    for _ in range(3):
        driver.launch([(seq, 1) for seq in seqs])
    assert queue.num_copies_in == 4


@pytest.mark.parametrize("name", ["gemma1-multi-query", "gemma2", "gemma3-all-sliding"])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_any_course_of_steps_gives_what_each_sequence_gives_alone(
    queue: ThreadQueue, name: str, seed: int
) -> None:
    """Sequences join and leave, in prompts of several chunks beside decodes, in an order that changes."""
    rng = random.Random(seed)
    driver = Driver(static_model(name, queue))
    wanted = requests(14, max_tokens=16, seed=100 * seed)
    waiting = [Sequence.from_request(one) for one in wanted]
    running: list[Sequence] = []
    generated: dict[str, list[int]] = {}
    while waiting or running:
        while waiting and len(running) < 9 and rng.random() < 0.4:
            running.append(waiting.pop(0))
        rng.shuffle(running)
        plan = []
        for seq in running:
            left = seq.num_tokens - seq.num_computed
            if rng.random() < 0.9:
                plan.append((seq, rng.randint(1, left)))
        # Those with one token come first, as from the scheduler.
        plan.sort(key=lambda one: one[1] > 1)
        if plan:
            driver.launch(plan)
        for seq in [seq for seq in running if seq.num_generated >= 16]:
            running.remove(seq)
            generated[seq.request_id] = driver.finish(seq)[:16]
    for one in wanted:
        assert generated[one.request_id] == alone(name, one)
    assert queue.num_replays > 10


@pytest.mark.parametrize("name", ["gemma1", "gemma3"])
def test_a_row_has_the_same_logits_to_the_last_bit_in_any_company_and_size(
    queue: ThreadQueue, name: str
) -> None:
    def fingerprint(logits: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        return logits.view(torch.int32).long().sum(dim=1) % VOCAB

    one = request(prompt(5), request_id="one")
    generated = []
    for company in (0, 2, 8):
        driver = Driver(static_model(name, queue, fingerprint))
        seq = Sequence.from_request(one)
        others = [Sequence.from_request(other) for other in requests(company, max_tokens=9, seed=company)]
        prefill(driver, [*others, seq])
        for _ in range(8):
            driver.launch([(each, 1) for each in [*others, seq]])
        generated.append(driver.finish(seq))
    assert generated[0] == generated[1] == generated[2]
    assert len(set(generated[0])) > 4


def test_steps_whose_tokens_the_host_chooses_come_in_between(queue: ThreadQueue) -> None:
    driver = Driver(static_model("gemma3", queue))
    wanted = [request(prompt(length, seed=length), request_id=f"r{length}") for length in (9, 3, 5)]
    seqs = [Sequence.from_request(one) for one in wanted]
    driver.compute([(seq, seq.num_tokens) for seq in seqs])
    for index in range(12):
        step = driver.compute if index % 3 == 1 else driver.launch
        step([(seq, 1) for seq in seqs])
    for one, seq in zip(wanted, seqs, strict=True):
        assert driver.finish(seq) == alone("gemma3", one)[:13]


def test_a_row_that_cannot_be_sampled_does_not_hurt_the_step_behind_it(queue: ThreadQueue) -> None:
    def fail_first(logits: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        logits[0].fill_(torch.nan)
        return sample(logits, arrays)

    driver = Driver(static_model("gemma1", queue, fail_first))
    wanted = [request(prompt(4, seed=seed), request_id=f"r{seed}") for seed in range(2)]
    seqs = [Sequence.from_request(one) for one in wanted]
    prefill(driver, seqs)
    for _ in range(4):
        driver.launch([(seq, 1) for seq in seqs])
    assert driver.finish(seqs[1]) == alone("gemma1", wanted[1])[:5]
    assert driver.finish(seqs[0]) == [-1] * 5


def test_chunks_that_sample_nothing_may_be_launched_without_waiting_for_any() -> None:
    queue = ThreadQueue(max_delay=0.03)
    driver = Driver(static_model("gemma1", queue))
    one = request(prompt(30), request_id="r", max_tokens=4)
    seq = Sequence.from_request(one)
    for _ in range(6):
        driver.step.launch(driver.plan([(seq, 4)])[1], sampling_arrays([]))
        seq.num_computed += 4
    driver.launch([(seq, 6)])
    for _ in range(3):
        driver.launch([(seq, 1)])
    assert driver.finish(seq) == alone("gemma1", one)
    queue.close()


def test_the_sizes_are_few_and_fit() -> None:
    assert decode_sizes(1) == [1]
    assert decode_sizes(9) == [1, 2, 4, 8, 9]
    assert decode_sizes(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert decode_sizes(1000)[-3:] == [960, 992, 1000]
    assert len(decode_sizes(256)) < 25


@pytest.mark.parametrize(("num_seqs", "num_tokens"), [(1, 16), (9, 64), (9, 100), (256, 2048), (64, 512)])
def test_each_step_that_may_be_recorded_has_one_of_the_shapes_that_are_counted(
    num_seqs: int, num_tokens: int
) -> None:
    shapes = RecordedShapes(num_seqs, num_tokens)
    counted = shapes.chunks()
    assert counted == sorted(counted, reverse=True)
    assert len(counted) <= 32
    for tokens in range(2, min(num_tokens, 1024) + 1):
        for seqs in range(1, min(num_seqs, tokens - 1) + 1):
            shape = shapes.chunks_of(tokens, seqs)
            assert shape in counted
            assert shape.num_tokens >= tokens
            assert shape.num_seqs > seqs, "one is there for the rows that pad it"
            assert shape.num_tokens <= num_tokens
            assert shape.num_output_rows <= num_seqs
    assert shapes.chunks_of(min(num_tokens, 1024) + 1, 1) is None
    assert [shape.num_seqs for shape in shapes.decodes()] == decode_sizes(num_seqs)[::-1]
    assert all(shape.is_decodes for shape in shapes.decodes())
    assert not any(shape.is_decodes for shape in counted)


def test_steps_with_prompts_are_replayed_with_any_padding(queue: ThreadQueue) -> None:
    driver = Driver(static_model("gemma3", queue))
    for seed, lengths in enumerate([(16,), (17, 3), (15,), (11, 20, 1, 1), (2, 14), (32,), (1, 2)]):
        wanted = [
            request(prompt(length, seed=seed + index), request_id=f"r{seed}-{index}", max_tokens=3)
            for index, length in enumerate(lengths)
        ]
        seqs = [Sequence.from_request(one) for one in wanted]
        prefill(driver, seqs)
        driver.launch([(seq, 1) for seq in seqs])
        for one, seq in zip(wanted, seqs, strict=True):
            assert driver.finish(seq) == alone("gemma3", one)[:2]
    shapes = {StepShape(16, 9, 8), StepShape(32, 9, 8), StepShape(64, 9, 8)}
    assert queue.num_recordings == len(shapes) + 3, "and decodes of 1, 2 and 4"
