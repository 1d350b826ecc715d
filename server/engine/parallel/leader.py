"""What rank 0 does so that the others are there."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from server.engine.parallel.places import PORT, HostPlace, PlaceError
from server.engine.parallel.ranks import START_SECONDS, Ranks, open_store, presence_key
from server.engine.parallel.worker import start_workers
from server.engine.types import EngineConfig

if TYPE_CHECKING:
    import subprocess

    from torch.distributed import TCPStore  # type: ignore[attr-defined]

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1


class RankError(ValueError):
    """A rank does not come."""


def gather_ranks(config: EngineConfig, device: str) -> Ranks:
    """Starts this host's other ranks, and waits for those of all hosts. Raises PlaceError, RankError,
    RuntimeError."""
    place = HostPlace.of(config.tensor_parallel_size)
    check_devices(place, device)
    num_ranks = place.num_ranks
    if place.leader is None:
        # Also for the workers. Gloo would ask the host's name for an address, which may lead nowhere.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = open_store("127.0.0.1", 0, num_ranks, is_leader=True)
        host = "127.0.0.1"
    else:
        store = open_store("0.0.0.0", PORT, num_ranks, is_leader=True)
        host = place.leader
    workers = start_workers(place.local_ranks[1:], place, host, store.port, config)
    logger.info("waiting for the other %d ranks on %d host(s)", num_ranks - 1, place.num_hosts)
    await_ranks(store, num_ranks, workers)
    return Ranks(0, num_ranks, store, device)


def await_ranks(
    store: TCPStore, num_ranks: int, workers: Sequence[subprocess.Popen[bytes]], limit: float = START_SECONDS
) -> None:
    """Returns when all are there. workers: those of this host. Raises RankError."""
    deadline = time.monotonic() + limit
    while not store.check([presence_key(rank) for rank in range(1, num_ranks)]):
        if any(worker.poll() is not None for worker in workers):
            raise RankError("one of the ranks ended before it was there: its log says why")
        if time.monotonic() > deadline:
            raise RankError(f"not all of the {num_ranks} ranks were there after {limit:.0f} s")
        time.sleep(_POLL_SECONDS)


def check_devices(place: HostPlace, device: str) -> None:
    """Raises PlaceError if this host has fewer GPUs than ranks."""
    if device != "cuda":
        return
    import torch

    wanted, there = len(place.local_ranks), torch.cuda.device_count()
    if there < wanted:
        raise PlaceError(
            f"--tensor-parallel-size {place.num_ranks} needs {wanted} GPUs on each host, and there are {there}"
        )
