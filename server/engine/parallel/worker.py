"""A rank other than 0: `python -m server.engine.parallel.worker`, which is told by JSON on its standard input.

It loads its part of the model and computes whatever rank 0 announces, until rank 0 is gone.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

import msgspec

from server import logs
from server.engine.device import resolve_device
from server.engine.lifeline import die_with_parent
from server.engine.parallel.places import HostPlace
from server.engine.types import EngineConfig

logger = logging.getLogger("server.engine.parallel.worker")  # whose name is __main__ in the process


class WorkerStart(msgspec.Struct, frozen=True):
    rank: int
    host: str
    """Of rank 0, with its port."""
    port: int
    config: EngineConfig


def start_workers(
    ranks: Sequence[int], place: HostPlace, host: str, port: int, config: EngineConfig
) -> list[subprocess.Popen[bytes]]:
    """A process for each of these ranks of this host. They end with the thread that called this."""
    processes = []
    for rank in ranks:
        process = subprocess.Popen(
            [sys.executable, "-m", "server.engine.parallel.worker"],
            stdin=subprocess.PIPE,
            env=os.environ | _device_of(rank - place.local_ranks.start),
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(WorkerStart(rank, host, port, config)))
        process.stdin.close()
        processes.append(process)
    return processes


def _device_of(index: int) -> dict[str, str]:
    """The environment in which the index-th of the GPUs at hand is the only one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else []
    return {"CUDA_VISIBLE_DEVICES": devices[index] if index < len(devices) else str(index)}


def run(start: WorkerStart) -> None:
    from server.engine.build import build_rank
    from server.engine.parallel.ranks import Ranks, open_store

    num_ranks = start.config.tensor_parallel_size
    store = open_store(start.host, start.port, num_ranks, is_leader=False)
    ranks = Ranks(start.rank, num_ranks, store, resolve_device(start.config.device))
    forward = build_rank(start.config, ranks)
    logger.info("rank %d of %d is ready", start.rank, num_ranks)
    while True:
        try:
            inputs = ranks.receive()
        except RuntimeError:  # rank 0 is gone
            return
        forward(inputs)


def main() -> int:
    start = msgspec.json.decode(sys.stdin.buffer.read(), type=WorkerStart)
    logs.configure("info", "text", "rank")
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run(start)
    except (ValueError, OSError) as error:
        logger.error("rank %d cannot start: %s", start.rank, error)
        return os.EX_CONFIG
    return 0


if __name__ == "__main__":
    sys.exit(main())
