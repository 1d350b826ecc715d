"""A host that only lends its devices: `gemma-server serve` in a LeaderWorkerSet's group, but on its first host.

It has no port, and opens nothing that is for clients: no keys, no data directory, no traces. Its ranks load
their parts of the model, and compute for the engine on the first host until that ends or is replaced; then this
process ends, too, and whoever started it starts it anew.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Sequence

from server.engine.device import resolve_device
from server.engine.parallel.leader import check_devices
from server.engine.parallel.places import PORT, HostPlace
from server.engine.parallel.worker import start_workers
from server.engine_options import engine_config
from server.model_source import ModelSourceError, resolve
from server.options import ServerConfig

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2


def serve_ranks(config: ServerConfig, place: HostPlace) -> int:
    """Runs this host's ranks to their end. Returns the exit code."""
    assert place.leader is not None
    try:
        check_devices(place, resolve_device(config.device))
        files = resolve(config.model, revision=config.revision, download_dir=config.download_dir)
    except (ModelSourceError, ValueError, OSError) as error:
        logger.error("%s", error)
        return os.EX_CONFIG
    logger.info("host %d of %d computes for %s", place.index, place.num_hosts, place.leader)
    workers = start_workers(place.local_ranks, place, place.leader, PORT, engine_config(config, files.path))
    return _first_to_end(workers)


def _first_to_end(workers: Sequence[subprocess.Popen[bytes]]) -> int:
    """Ends all as soon as one has ended. An end without a fault is one for which the first host is to blame."""
    while not any(worker.poll() is not None for worker in workers):
        time.sleep(_POLL_SECONDS)
    codes = [worker.returncode for worker in workers if worker.returncode]
    for worker in workers:
        worker.kill()
        worker.wait()
    logger.error("the ranks of this host have ended")
    return codes[0] if codes and codes[0] > 0 else os.EX_UNAVAILABLE
