"""Which ranks are on which host."""

from __future__ import annotations

import pytest

from server.engine.parallel.places import HostPlace, PlaceError
from server.engine.parallel.worker import _device_of


def group(size: int, index: int, leader: str = "model-0.model") -> dict[str, str]:
    return {"LWS_GROUP_SIZE": str(size), "LWS_WORKER_INDEX": str(index), "LWS_LEADER_ADDRESS": leader}


@pytest.mark.parametrize("environment", [{}, group(1, 0), {"LWS_GROUP_SIZE": ""}])
def test_one_host_has_all_ranks(environment: dict[str, str]) -> None:
    place = HostPlace.of(4, environment)
    assert (place.index, place.num_hosts, place.leader) == (0, 1, None)
    assert place.local_ranks == range(4)


def test_hosts_of_a_group_have_their_ranks_in_order() -> None:
    places = [HostPlace.of(8, group(2, index)) for index in range(2)]
    assert [place.local_ranks for place in places] == [range(4), range(4, 8)]
    assert {place.leader for place in places} == {"model-0.model"}


def test_a_group_whose_model_is_not_dealt_out_has_nothing_to_do_with_it() -> None:
    assert HostPlace.of(1, group(2, 1)) == HostPlace(0, 1, 1, None)


@pytest.mark.parametrize(
    ("num_ranks", "environment", "message"),
    [
        (3, group(2, 0), "--tensor-parallel-size 3 cannot be dealt out to 2 hosts"),
        (2, group(2, 2), "LWS_WORKER_INDEX is 2, and LWS_GROUP_SIZE 2"),
        (2, group(2, 0, leader=""), "LWS_GROUP_SIZE is set and LWS_LEADER_ADDRESS is not"),
        (2, {"LWS_GROUP_SIZE": "two"}, "LWS_GROUP_SIZE must be a number, got 'two'"),
    ],
)
def test_what_makes_no_sense_is_refused(num_ranks: int, environment: dict[str, str], message: str) -> None:
    with pytest.raises(PlaceError, match=message):
        HostPlace.of(num_ranks, environment)


def test_each_rank_of_a_host_has_one_of_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _device_of(1) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert _device_of(1) == {"CUDA_VISIBLE_DEVICES": "3"}
