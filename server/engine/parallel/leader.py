"""What rank 0 does so that the others are there."""

from __future__ import annotations

import logging
import os

from server.engine.parallel.places import PORT, HostPlace, PlaceError
from server.engine.parallel.ranks import Ranks, open_store
from server.engine.parallel.worker import start_workers
from server.engine.types import EngineConfig

logger = logging.getLogger(__name__)


def gather_ranks(config: EngineConfig, device: str) -> Ranks:
    """Starts this host's other ranks, and waits for those of all hosts. Raises PlaceError, RuntimeError."""
    place = HostPlace.of(config.tensor_parallel_size)
    check_devices(place, device)
    num_ranks = place.num_ranks
    if place.leader is None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store = open_store("127.0.0.1", 0, num_ranks, is_leader=True)
        host = "127.0.0.1"
    else:
        store = open_store("0.0.0.0", PORT, num_ranks, is_leader=True)
        host = place.leader
    start_workers(place.local_ranks[1:], place, host, store.port, config)
    logger.info("waiting for the other %d ranks on %d host(s)", num_ranks - 1, place.num_hosts)
    return Ranks(0, num_ranks, store, device)


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
