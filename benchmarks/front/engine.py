"""A stand-in for the engine's process, which emits a token of each sequence in steps at a set rate.

It is started as the engine is, `python -m benchmarks.front.engine --fd N`, and told by the environment what to
do: GEMMA_FRONT_BENCHMARK is a `Plan` in JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import socket
import sys
import threading
import time
from pathlib import Path

import msgspec
import numpy as np

from server.engine import transport
from server.engine.pulse import Pulse
from server.engine.types import (
    Abort,
    EngineInfo,
    FinishReason,
    FromEngine,
    Ready,
    SequenceOutput,
    StepOutput,
    StepStats,
    Submit,
    ToEngine,
)

VARIABLE = "GEMMA_FRONT_BENCHMARK"
MAX_STEPS = 1 << 20


class Plan(msgspec.Struct, frozen=True):
    steps_per_second: float
    token_ids: list[int]
    """Step i emits the one at i modulo their number."""
    times_file: str
    """fp64 [MAX_STEPS]: gets `time.monotonic()` of each step."""
    vocab_size: int
    max_num_seqs: int


class StandIn:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._times = np.memmap(plan.times_file, dtype=np.float64, mode="r+", shape=(MAX_STEPS,))
        self._left: dict[str, int] = {}
        """Tokens that each sequence still gets."""
        self._number = 0

    def ready(self) -> Ready:
        most = 1 << 17
        return Ready(
            EngineInfo(
                device="none",
                dtype="bfloat16",
                quantization="none",
                backend="stand-in",
                max_model_len=most,
                max_num_seqs=self._plan.max_num_seqs,
                max_num_batched_tokens=most,
                max_sequence_tokens=most,
                vocab_size=self._plan.vocab_size,
                block_size=16,
                num_blocks={"full": 1},
                kv_cache_bytes=0,
                weight_bytes=0,
                start_seconds={},
            )
        )

    def handle(self, message: ToEngine) -> None:
        match message:
            case Submit(request):
                self._left[request.request_id] = request.params.max_tokens
            case Abort(request_ids):
                for request_id in request_ids:
                    self._left.pop(request_id, None)
            case _:
                pass

    def step(self) -> StepOutput:
        token_ids = [self._plan.token_ids[self._number % len(self._plan.token_ids)]]
        ended = [request_id for request_id, left in self._left.items() if left == 1]
        outputs = [
            SequenceOutput(
                request_id=request_id,
                token_ids=token_ids,
                finish_reason=FinishReason.LENGTH if left == 1 else None,
            )
            for request_id, left in self._left.items()
        ]
        for request_id in self._left:
            self._left[request_id] -= 1
        for request_id in ended:
            del self._left[request_id]
        self._times[self._number] = time.monotonic()
        self._number += 1
        return StepOutput(outputs, StepStats(num_running=len(outputs), num_decode_tokens=len(outputs)))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    connection = socket.socket(fileno=parser.parse_known_args()[0].fd)
    plan = msgspec.json.decode(os.environ[VARIABLE].encode(), type=Plan)
    stand_in, inbox = StandIn(plan), queue.SimpleQueue[ToEngine | None]()
    lock = threading.Lock()

    def send(message: FromEngine) -> None:
        with lock, contextlib.suppress(BrokenPipeError):
            connection.sendall(transport.encode_frame(message))

    def read() -> None:
        with contextlib.suppress(OSError):
            while (payload := transport.read_frame(connection)) is not None:
                inbox.put(transport.decode_to_engine(payload))
        os._exit(0)  # the front is gone

    threading.Thread(target=read, daemon=True).start()
    inbox.get()  # Start
    send(stand_in.ready())
    Pulse().beat(send)
    due = time.monotonic()
    while True:
        due = max(due + 1 / plan.steps_per_second, time.monotonic() - 1.0)
        time.sleep(max(0.0, due - time.monotonic()))
        while not inbox.empty():
            message = inbox.get()
            assert message is not None
            stand_in.handle(message)
        send(stand_in.step())


def steps_in(times_file: Path) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """When each step was, of those that were."""
    times = np.fromfile(times_file, dtype=np.float64)
    return times[: np.count_nonzero(times)]


if __name__ == "__main__":
    sys.exit(main())
