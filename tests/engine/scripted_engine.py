"""An engine's process with the real loop, core and scheduler, over a model that does what prompts tell it to.

It starts in a fraction of a second, and dies in every way there is.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.engine import loop
from server.engine.batch import ScheduledBatch
from server.engine.core import EngineCore
from server.engine.grammar.compiler import GrammarCompiler
from server.engine.pacing import PrefillPacer
from server.engine.sampling.types import SampledToken
from server.engine.types import EngineConfig, EngineInfo
from tests.unit.engine_simulation import HostRunner, make_engine

KILLED, FAULT, HANGS, BREATHLESS, GARBAGE, OVERSIZE, SLOW, KILLED_LATER = range(100, 108)
"""First tokens of prompts, and what happens in the step that computes them."""
STEP_SECONDS = 0.01


class ScriptedRunner(HostRunner):
    def __init__(self, execute: Callable[[ScheduledBatch], list[SampledToken]]) -> None:
        self._execute = execute

    def execute(self, batch: ScheduledBatch) -> list[SampledToken]:
        time.sleep(STEP_SECONDS)
        for scheduled in batch.sequences:
            _act(scheduled.seq.token_ids[0], scheduled.seq.num_generated)
        return self._execute(batch)


def _act(command: int, num_generated: int) -> None:
    if command == KILLED or (command == KILLED_LATER and num_generated == 3):
        os.kill(os.getpid(), signal.SIGSEGV)
    elif command == FAULT:
        raise ZeroDivisionError("a fault of the kernel")
    elif command == HANGS:
        time.sleep(1000)
    elif command == BREATHLESS:
        os.kill(os.getpid(), signal.SIGSTOP)
    elif command in (GARBAGE, OVERSIZE):
        os.write(_socket(), b"\x00\x00\x00\x05junk!" if command == GARBAGE else b"\xff" * 64)
        time.sleep(1000)
    elif command == SLOW:
        time.sleep(0.1)


def _socket() -> int:
    return int(sys.argv[sys.argv.index("--fd") + 1])


class StartError(ValueError):
    pass


def build_engine(
    config: EngineConfig, progress: Callable[[str, float], None], wake: Callable[[], None]
) -> tuple[EngineCore, EngineInfo]:
    """`config.model_path` is a directory. Each line of a file `starts` in it says how one start goes."""
    plan = Path(config.model_path, "starts")
    way, *others = plan.read_text().split() if plan.exists() else ["well"]
    if plan.exists() and others:
        plan.write_text("\n".join(others))
    if way == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "refuses":
        raise StartError("there is no room")
    progress("weights", 0.5)
    if way == "slowly":
        time.sleep(1.0)
    engine = make_engine(num_blocks=(1000,), max_num_seqs=config.max_num_seqs or 4, max_num_batched_tokens=64)
    runner = ScriptedRunner(engine.model.execute)
    info = EngineInfo(
        device="cpu",
        dtype="float32",
        quantization="none",
        backend="scripted",
        max_model_len=1000,
        max_num_seqs=config.max_num_seqs or 4,
        max_num_batched_tokens=64,
        max_sequence_tokens=1000,
        vocab_size=7,
        block_size=4,
        num_blocks={"full": 1000},
        kv_cache_bytes=1,
        weight_bytes=1,
        start_seconds={"weights": 0.5},
    )
    return EngineCore(engine.scheduler, PrefillPacer(100.0, 64), runner, GrammarCompiler(wake)), info


if __name__ == "__main__":
    stand_in: Any = types.ModuleType("server.engine.build")
    stand_in.build_engine, stand_in.StartError = build_engine, StartError
    sys.modules[stand_in.__name__] = stand_in
    sys.exit(loop.main())
