"""Steps that fail in the engine's core: whom they cost, and that nothing of them is found later."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from server.engine.batch import ScheduledBatch
from server.engine.core import EngineCore
from server.engine.faults import MAX_FAILED_STEPS
from server.engine.grammar.compiler import GrammarCompiler
from server.engine.model_runner import ModelRunner
from server.engine.pacing import PrefillPacer
from server.engine.sampling.types import SampledToken
from server.engine.types import FinishReason, GenerateRequest, SequenceOutput
from server.frontend.mailbox import merge
from tests.unit.engine_simulation import Engine, HostRunner, generate_alone, make_engine, make_request


class Faulty(HostRunner):
    """The simulated model, which fails where it is told to, after it has written to the cache."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.core = EngineCore(engine.scheduler, PrefillPacer(100.0, 64), self, GrammarCompiler())
        self.fault: Callable[[ScheduledBatch], Exception | None] = lambda batch: None
        self.sizes: list[int] = []
        """Of the batches that were computed."""
        self.outputs: dict[str, SequenceOutput] = {}

    def execute(self, batch: ScheduledBatch) -> list[SampledToken]:
        sampled = self.engine.model.execute(batch)
        error = self.fault(batch)
        if error is not None:
            raise error
        self.sizes.append(len(batch.sequences))
        return sampled

    def step(self) -> None:
        for output in self.core.step().outputs:
            earlier = self.outputs.get(output.request_id)
            assert earlier is None or earlier.finish_reason is None, "something came behind the end"
            self.outputs[output.request_id] = output if earlier is None else merge(earlier, output)
        self.engine.kv.check(self.engine.scheduler.sequences)

    def run(self) -> None:
        while self.core.has_work():
            self.step()
        assert set(self.engine.kv.usage().values()) == {0.0}, "blocks leaked"

    def is_right(self, request: GenerateRequest) -> bool:
        output = self.outputs[request.request_id]
        return (output.token_ids, output.finish_reason) == generate_alone(request, 1000)

    def ended_with_error(self) -> set[str]:
        return {key for key, output in self.outputs.items() if output.finish_reason is FinishReason.ERROR}


def make_faulty(**options: int) -> Faulty:
    return Faulty(make_engine(**{"max_num_batched_tokens": 64, "long_prefill_threshold": 64, **options}))  # type: ignore[arg-type]


def ids(batch: ScheduledBatch) -> set[str]:
    return {scheduled.seq.request_id for scheduled in batch.sequences}


@pytest.mark.covers("E04")
@pytest.mark.parametrize("max_draft_tokens", [0, 5])
def test_a_step_that_fails_costs_its_sequences_and_no_others(max_draft_tokens: int) -> None:
    faulty = make_faulty(max_num_seqs=3, max_draft_tokens=max_draft_tokens)
    requests = [make_request(str(number), [number, 1, 2, 3, 4], 6) for number in range(7)]
    for request in requests:
        faulty.core.add(request)
    faulty.step()
    faulty.fault = lambda batch: ZeroDivisionError("a bug")
    faulty.step()
    faulty.fault = lambda batch: None
    faulty.run()
    assert faulty.ended_with_error() == {"0", "1", "2"}
    assert all(faulty.is_right(request) for request in requests[3:])


@pytest.mark.covers("E04")
def test_nothing_of_a_failed_step_is_found_in_the_prefix_cache() -> None:
    faulty = make_faulty(long_prefill_threshold=8)
    prompt = [number % 7 for number in range(30)]
    faulty.core.add(make_request("first", prompt))
    faulty.step()
    faulty.step()  # four blocks are full and published
    faulty.fault = lambda batch: RuntimeError("a kernel failed")
    faulty.step()
    faulty.fault = lambda batch: None
    again = make_request("again", prompt)
    faulty.core.add(again)
    faulty.run()
    assert faulty.ended_with_error() == {"first"}
    assert faulty.is_right(again)
    assert faulty.outputs["again"].num_cached_tokens == 0
    third = make_request("third", prompt)
    faulty.core.add(third)
    faulty.run()
    assert faulty.outputs["third"].num_cached_tokens == 28, "the cache works again"


@pytest.mark.covers("E06")
@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
@pytest.mark.parametrize("fits", [1, 3])
def test_a_step_that_does_not_fit_is_computed_in_parts(error: type[Exception], fits: int) -> None:
    faulty = make_faulty()
    requests = [make_request(str(number), [number % 7, number], 4) for number in range(7)]
    for request in requests:
        faulty.core.add(request)
    faulty.fault = lambda batch: error() if len(batch.sequences) > fits else None
    faulty.run()
    assert all(faulty.is_right(request) for request in requests)
    assert max(faulty.sizes) <= fits


@pytest.mark.covers("E06")
def test_what_does_not_fit_alone_fails_alone() -> None:
    faulty = make_faulty()
    requests = [make_request(str(number), [number], 4) for number in range(6)]
    for request in requests:
        faulty.core.add(request)
    faulty.fault = lambda batch: MemoryError() if "2" in ids(batch) else None
    faulty.run()
    assert faulty.ended_with_error() == {"2"}
    assert faulty.outputs["2"].error == "the step ran out of memory"
    assert all(faulty.is_right(request) for request in requests if request.request_id != "2")


@pytest.mark.covers("E07")
@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("device-side assert triggered"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_a_poisoned_device_is_the_engine_s_end(error: Exception) -> None:
    faulty = make_faulty()
    faulty.core.add(make_request("a", [1, 2]))
    faulty.fault = lambda batch: error
    with pytest.raises(type(error)):
        faulty.step()


@pytest.mark.covers("E04")
def test_an_engine_whose_every_step_fails_ends() -> None:
    faulty = make_faulty(max_num_seqs=1)
    faulty.fault = lambda batch: ZeroDivisionError("a bug") if "good" not in ids(batch) else None
    names = [*map(str, range(MAX_FAILED_STEPS)), "good", *"abcd"]
    for number, name in enumerate(names):
        faulty.core.add(make_request(name, [number], 1))
    for _ in range(2 * MAX_FAILED_STEPS + 1):
        faulty.step()
    assert faulty.ended_with_error() == {*names} - {"good", "d"}, "a step that worked is a new beginning"
    with pytest.raises(ZeroDivisionError):
        faulty.step()


def test_the_beginning_of_each_sequence_is_told_once_and_before_the_step() -> None:
    faulty = make_faulty(num_blocks=(6,), max_num_seqs=3, long_prefill_threshold=3)  # type: ignore[arg-type]
    begun: list[str] = []

    def on_begun(request_ids: list[str]) -> None:
        begun.extend(request_ids)

    def check(batch: ScheduledBatch) -> None:
        assert ids(batch) <= set(begun)

    faulty.core.on_begun = on_begun
    faulty.fault = check
    for number in range(6):
        faulty.core.add(make_request(str(number), [number, 1, 2, 3, 4, 5, 6], 9))
    faulty.run()
    assert sorted(begun) == list("012345")
    assert any(output for output in faulty.outputs.values())


def test_a_token_beyond_the_vocabulary_never_gets_into_a_sequence() -> None:
    class Stray:
        """A model and its sampler, which does not keep to the vocabulary."""

        config = SimpleNamespace(vocab_size=7)
        token_id = 6

        def capture(self, kv: object, num_tokens: int) -> Callable[[object], list[int]]:
            return lambda inputs: [0]

        def compute_logits(self, hidden: object) -> object:
            return hidden

        def sample(self, logits: object, seqs: object, masks: object) -> list[SampledToken]:
            return [SampledToken(self.token_id)]

    stray = Stray()
    kv: Any = SimpleNamespace(num_groups=1, block_size=4, by_layer=None)
    runner = ModelRunner(stray, kv, stray, 16)  # type: ignore[arg-type]  # stand-ins
    faulty = make_faulty()
    core = EngineCore(faulty.engine.scheduler, PrefillPacer(100.0, 64), runner, GrammarCompiler())
    core.add(make_request("a", [1, 2], 9))
    assert core.step().outputs[0].token_ids == [6]
    stray.token_id = 7
    assert core.step().outputs[0].finish_reason is FinishReason.ERROR
