"""Which ranks are where: how many on this host, and where rank 0 is.

Several hosts are those of a LeaderWorkerSet's group, whose controller tells each pod by LWS_GROUP_SIZE,
LWS_WORKER_INDEX and LWS_LEADER_ADDRESS (sigs.k8s.io/lws). Each has as many ranks as the others.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

PORT = 29400
"""Of rank 0, where there are several hosts."""


class PlaceError(ValueError):
    """The ranks cannot be dealt out to the hosts."""


@dataclass(frozen=True, slots=True)
class HostPlace:
    """One host among those that compute a model together."""

    index: int
    num_hosts: int
    num_ranks: int
    """On all hosts."""
    leader: str | None
    """Address of the host with rank 0; None if there is but one host."""

    @classmethod
    def of(cls, num_ranks: int, environment: Mapping[str, str] = os.environ) -> HostPlace:
        """Raises PlaceError."""
        num_hosts = _number(environment, "LWS_GROUP_SIZE", 1)
        if num_ranks == 1 or num_hosts == 1:
            return cls(0, 1, num_ranks, None)
        leader = environment.get("LWS_LEADER_ADDRESS")
        if not leader:
            raise PlaceError("LWS_GROUP_SIZE is set and LWS_LEADER_ADDRESS is not: set both, or neither")
        if num_ranks % num_hosts:
            raise PlaceError(
                f"--tensor-parallel-size {num_ranks} cannot be dealt out to {num_hosts} hosts (LWS_GROUP_SIZE)"
            )
        index = _number(environment, "LWS_WORKER_INDEX", 0)
        if not 0 <= index < num_hosts:
            raise PlaceError(f"LWS_WORKER_INDEX is {index}, and LWS_GROUP_SIZE {num_hosts}")
        return cls(index, num_hosts, num_ranks, leader)

    @property
    def local_ranks(self) -> range:
        """Of this host, one for each of its devices, in their order."""
        count = self.num_ranks // self.num_hosts
        return range(self.index * count, (self.index + 1) * count)


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    if not text:
        return default
    if not text.isdecimal():
        raise PlaceError(f"{name} must be a number, got {text!r}")
    return int(text)
