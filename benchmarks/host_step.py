"""`make bench-host`: what an engine step costs the host, whatever the device takes beside it.

Steps of decodes only, one step ahead, on a stand-in for a GPU that does nothing and has each step's tokens at
once. All else is the engine's own: planning, the arrays of a step and their packing, taking the tokens in, and
the frame for the front.
"""

from __future__ import annotations

import argparse
import gc
import socket
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from statistics import median
from types import SimpleNamespace
from typing import TypeVar, cast

import torch
from torch import Tensor

from benchmarks.machine import describe_machine
from server.batching import Scheduler, SchedulerConfig
from server.engine import transport
from server.engine.batch import ScheduledBatch
from server.engine.core import EngineCore
from server.engine.device_step.queue import MemoryReport
from server.engine.device_step.step import DeviceModel, DeviceStep
from server.engine.dtype import DType
from server.engine.faults import PendingStep
from server.engine.grammar.compiler import GrammarCompiler
from server.engine.kv_cache.manager import KVCacheManager
from server.engine.kv_cache.tensors import KVTensors
from server.engine.memory import PoolLimits
from server.engine.model_runner import ModelRunner
from server.engine.models.config import KVGroupSpec
from server.engine.models.gemma import GemmaModel
from server.engine.pacing import PrefillPacer
from server.engine.sampling.arrays import SAMPLING_ARRAYS
from server.engine.sampling.types import SampledToken
from server.engine.speculation import NgramSpeculator
from server.engine.types import GenerateRequest, SamplingParams, SequenceOutput

BLOCK_SIZE = 16
WARM_UP_STEPS = 32
ResultT = TypeVar("ResultT")


@dataclass
class Clock:
    """Seconds of each part of each step."""

    parts: dict[str, list[float]] = field(
        default_factory=lambda: {part: [] for part in ("plan", "launch", "update", "send", "all")}
    )

    def timed(self, part: str, work: Callable[[], ResultT]) -> ResultT:
        started = time.perf_counter()
        result = work()
        self.parts[part].append(time.perf_counter() - started)
        return result


class NoQueue:
    """A `DeviceQueue` and its marks: whatever is enqueued is done, and left every tensor as it was."""

    def pinned(self, num_words: int) -> Tensor:
        return torch.zeros(num_words, dtype=torch.int32)

    def persistent(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def copy(self, target: Tensor, source: Tensor) -> None:
        pass

    def run(self, work: Callable[[], object]) -> None:
        pass

    def result(self, work: Callable[[], ResultT]) -> ResultT:
        return work()

    def record(self, work: Callable[[], object]) -> Callable[[], None]:
        return lambda: None

    def mark(self) -> NoQueue:
        return self

    def wait(self) -> None:
        pass

    def memory(self) -> MemoryReport:
        return MemoryReport(0, 0, 0, 0)


class TimedScheduler(Scheduler):
    clock = Clock()

    def schedule_ahead(self, max_prefill_tokens: int = sys.maxsize) -> ScheduledBatch | None:
        return self.clock.timed("plan", lambda: super(TimedScheduler, self).schedule_ahead(max_prefill_tokens))

    def update(self, batch: ScheduledBatch, sampled: list[SampledToken]) -> list[SequenceOutput]:
        return self.clock.timed("update", lambda: super(TimedScheduler, self).update(batch, sampled))


class TimedRunner(ModelRunner):
    clock = Clock()

    def launch(self, batch: ScheduledBatch) -> PendingStep:
        return self.clock.timed("launch", lambda: super(TimedRunner, self).launch(batch))


def _engine(num_seqs: int, num_tokens: int, windows: list[int | None], clock: Clock) -> EngineCore:
    """num_tokens: of one sequence at most."""
    limits = PoolLimits(BLOCK_SIZE, num_tokens, num_seqs, max(2048, num_seqs))
    groups = [
        KVGroupSpec("full" if window is None else "sliding", window, (0,), num_kv_heads=1, head_dim=1)
        for window in windows
    ]
    num_blocks = [2 * limits.blocks_of_all(group) for group in groups]
    manager = KVCacheManager(groups, num_blocks, BLOCK_SIZE, True, limits.max_num_batched_tokens)
    config = SchedulerConfig(num_seqs, limits.max_num_batched_tokens, num_tokens, limits.max_num_batched_tokens)
    scheduler = TimedScheduler(config, manager, NgramSpeculator(0), time.monotonic)
    device_model = DeviceModel(_never, _never, _never, SAMPLING_ARRAYS, hidden_size=1, dtype=DType.FLOAT32)
    step = DeviceStep(NoQueue(), device_model, limits, len(groups))
    model = cast(GemmaModel, SimpleNamespace(config=SimpleNamespace(vocab_size=256_000)))
    kv = cast(KVTensors, SimpleNamespace(num_groups=len(groups), block_size=BLOCK_SIZE))
    runner = TimedRunner(model, kv, _never, limits.max_num_batched_tokens, step)  # type: ignore[arg-type]
    scheduler.clock = runner.clock = clock
    return EngineCore(
        scheduler,
        PrefillPacer(2.0, limits.max_num_batched_tokens),
        runner,
        GrammarCompiler(lambda: None),
        runs_ahead=True,
    )


def _never(*_: object) -> Tensor:
    raise AssertionError("the stand-in computes nothing")


def measure(num_seqs: int, context: int, windows: list[int | None], num_steps: int) -> Clock:
    """Steps of `num_seqs` decodes that begin at `context` tokens, blocks filling up in turns."""
    clock = Clock()
    max_tokens = WARM_UP_STEPS + num_steps + BLOCK_SIZE + num_seqs * context // 2048 + 64
    core = _engine(num_seqs, context + BLOCK_SIZE + max_tokens, windows, clock)
    for number in range(num_seqs):
        core.add(
            GenerateRequest(
                request_id=f"chatcmpl-{number:032x}-0",
                prompt_token_ids=[number + 10] * (context + number % BLOCK_SIZE),
                params=SamplingParams(
                    max_tokens=max_tokens, seed=number, temperature=0.7, top_p=0.95, stop_token_ids=(1, 106)
                ),
            )
        )
    while core.step().stats.num_decode_tokens < num_seqs:
        pass
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs):
        for number in range(WARM_UP_STEPS + num_steps):
            if number == WARM_UP_STEPS:
                gc.collect()
                gc.freeze()
                for seconds in clock.parts.values():
                    seconds.clear()
            started = time.perf_counter()
            output = core.step()
            clock.timed("send", lambda output=output: ours.sendall(transport.encode_frame(output)))  # type: ignore[misc]
            clock.parts["all"].append(time.perf_counter() - started)
            assert len(output.outputs) == num_seqs
            transport.read_frame(theirs)
    gc.unfreeze()
    return clock


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-host", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--window", type=int, default=512, help="of the second KV group; 0: there is none")
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    machine = describe_machine()
    print(
        f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}; ms: least / median of a step"
    )
    print(
        "{:>9} {:>13} {:>13} {:>13} {:>13} {:>13} {:>13}".format(
            "sequences", "all", "plan", "launch", "update", "send", "rest"
        )
    )
    windows = [None, arguments.window] if arguments.window else [None]
    for num_seqs in arguments.sequences:
        parts = measure(num_seqs, arguments.context, windows, arguments.steps).parts
        named = [parts[part] for part in ("plan", "launch", "update", "send")]
        rest = [total - sum(others) for total, *others in zip(parts["all"], *named, strict=True)]
        cells = [f"{1e3 * min(one):.3f} / {1e3 * median(one):.3f}" for one in (parts["all"], *named, rest)]
        print(f"{num_seqs:9}", *(cell.rjust(13) for cell in cells), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
