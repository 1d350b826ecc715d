"""Who is let in, and what those are told who are not."""

from __future__ import annotations

import pytest

from server.errors import InvalidRequestError, QueueFullError
from server.frontend.admission import Admission


def test_no_more_permits_than_the_limit() -> None:
    admission = Admission(3)
    first = admission.acquire(2, 10)
    with pytest.raises(QueueFullError):
        admission.acquire(2, 10)
    admission.check_room()
    admission.acquire(1, 10)
    with pytest.raises(QueueFullError):
        admission.check_room()
    with pytest.raises(QueueFullError):
        admission.acquire(1, 10)
    first.release()
    assert admission.in_flight == 1
    admission.acquire(2, 10)


def test_releasing_twice_releases_once() -> None:
    admission = Admission(3)
    permit = admission.acquire(2, 10)
    admission.acquire(1, 5)
    permit.release()
    permit.release()
    permit.computed(10)
    assert (admission.in_flight, admission.queued_tokens) == (1, 5)


def test_what_could_never_be_admitted_is_a_mistake_not_a_full_queue() -> None:
    with pytest.raises(InvalidRequestError, match="3"):
        Admission(3).acquire(4, 1)


def test_prompts_wait_until_they_are_computed_and_no_more_of_them_than_the_limit() -> None:
    admission = Admission(100, max_queued_tokens=50)
    first = admission.acquire(1, 30)
    second = admission.acquire(1, 20)
    for refused in (admission.check_room, lambda: admission.acquire(1, 1)):
        with pytest.raises(QueueFullError, match="50"):
            refused()
    first.computed(30)
    first.computed(30)
    assert admission.queued_tokens == 20
    admission.check_room()
    with pytest.raises(QueueFullError):
        admission.acquire(1, 31)
    admission.acquire(1, 30)
    second.release()
    first.release()
    assert admission.queued_tokens == 30


def test_a_prompt_that_is_longer_than_may_wait_is_served_when_nobody_waits() -> None:
    admission = Admission(100, max_queued_tokens=50)
    alone = admission.acquire(1, 500)
    with pytest.raises(QueueFullError):
        admission.acquire(1, 1)
    alone.computed(500)
    other = admission.acquire(1, 1)
    with pytest.raises(QueueFullError):
        admission.acquire(1, 500)
    other.release()
    admission.acquire(1, 500)


@pytest.mark.covers("K16")
def test_where_there_are_others_one_tenant_cannot_take_all_of_the_queue() -> None:
    admission = Admission(90)

    def most() -> int:
        """What one that comes now can get."""
        for held in range(1000):
            try:
                admission.acquire(1, 1, held)
            except QueueFullError:
                with pytest.raises(QueueFullError, match="for others"):
                    admission.check_room(held)
                return held
        raise AssertionError("there is no end")

    assert most() == 80
    assert most() >= 8
    while admission.in_flight < 90:
        admission.acquire(1, 1, 0)


@pytest.mark.covers("K13")
def test_a_refusal_says_when_there_will_be_room_as_fast_as_room_was_made_lately() -> None:
    now = 0.0
    admission = Admission(10, max_queued_tokens=100, clock=lambda: now)
    permits = [admission.acquire(1, 10) for _ in range(10)]
    for _ in range(20):  # one in two seconds
        now += 2.0
        permits.pop(0).release()
        permits.append(admission.acquire(1, 10))

    def retry_after(count: int, num_tokens: int) -> int:
        with pytest.raises(QueueFullError) as caught:
            admission.acquire(count, num_tokens)
        return int(caught.value.headers["retry-after"])

    assert retry_after(1, 1) in (1, 2, 3)
    assert retry_after(8, 1) in range(13, 19)
    permits.pop().release()
    assert retry_after(1, 60) in range(8, 13)
    now += 10_000
    assert retry_after(8, 1) == 60
