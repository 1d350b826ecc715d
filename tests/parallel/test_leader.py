"""Rank 0's wait for the others, which may never come."""

from __future__ import annotations

import subprocess
import sys

import pytest

from server.engine.parallel.leader import RankError, await_ranks
from server.engine.parallel.ranks import open_store, presence_key


def test_it_ends_when_all_are_there() -> None:
    store = open_store("127.0.0.1", 0, 3, is_leader=True)
    for rank in (1, 2):
        store.set(presence_key(rank), "here")
    await_ranks(store, 3, [], limit=0.0)


def test_a_rank_that_ended_is_not_waited_for() -> None:
    store = open_store("127.0.0.1", 0, 2, is_leader=True)
    with (
        subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"]) as worker,
        pytest.raises(RankError, match="ended before it was there"),
    ):
        await_ranks(store, 2, [worker], limit=30.0)


def test_another_host_s_ranks_are_waited_for_so_long_and_no_longer() -> None:
    store = open_store("127.0.0.1", 0, 2, is_leader=True)
    with pytest.raises(RankError, match="not all of the 2 ranks were there after 0 s"):
        await_ranks(store, 2, [], limit=0.2)
