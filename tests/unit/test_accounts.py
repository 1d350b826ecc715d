"""Limits of a tenant, and how long it takes until there is room, by a clock that the tests move."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest

from server.api_keys import Limits, Tenant
from server.errors import InvalidRequestError, RateLimitError
from server.frontend.accounts import Account, Accounts
from server.frontend.release_rate import MOST_SECONDS, ReleaseRate
from tests.unit.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


def account(clock: Clock, **limits: int) -> Account:
    return Account(Limits(**limits), clock)


def retry_after(caught: pytest.ExceptionInfo[RateLimitError]) -> int:
    return int(caught.value.headers["retry-after"])


def test_requests_come_back_at_an_even_rate(clock: Clock) -> None:
    limited = account(clock, requests_per_minute=6)
    for _ in range(6):
        limited.take_request()
    with pytest.raises(RateLimitError, match="6 requests in a minute") as caught:
        limited.take_request()
    assert retry_after(caught) == 10
    clock.now += 9.9
    with pytest.raises(RateLimitError) as caught:
        limited.take_request()
    assert retry_after(caught) == 1
    clock.now += 0.1
    limited.take_request()
    with pytest.raises(RateLimitError):
        limited.take_request()
    clock.now += 3600
    for _ in range(6):
        limited.take_request()
    with pytest.raises(RateLimitError):
        limited.take_request()


def test_a_request_that_comes_when_it_was_told_to_is_let_in(clock: Clock) -> None:
    chance = random.Random(1)
    limited = account(clock, requests_per_minute=7)
    for _ in range(500):
        clock.now += chance.random() * 9
        try:
            limited.take_request()
        except RateLimitError as error:
            clock.now += int(error.headers["retry-after"])
            limited.take_request()


def test_what_a_request_reserved_and_did_not_use_is_given_back(clock: Clock) -> None:
    limited = account(clock, tokens_per_minute=600)
    charge = limited.charge(1, 500)
    assert limited.tokens is not None
    assert limited.tokens.remaining == 100
    with pytest.raises(RateLimitError, match="600 tokens in a minute") as caught:
        limited.charge(1, 101)
    assert retry_after(caught) == 1
    charge.settle(50)
    charge.settle(50)
    assert limited.tokens.remaining == 550
    assert limited.tokens.reset_seconds == pytest.approx(5)
    assert limited.in_flight == 0


def test_one_that_asks_for_more_than_a_minute_s_tokens_takes_a_full_minute_and_owes_the_rest(
    clock: Clock,
) -> None:
    limited = account(clock, tokens_per_minute=600)
    charge = limited.charge(1, 10_000)
    clock.now += 60
    charge.settle(1800)  # all that came back meanwhile, and as much again
    with pytest.raises(RateLimitError):
        limited.take_request()
    clock.now += 59.5
    with pytest.raises(RateLimitError):
        limited.take_request()
    clock.now += 1
    limited.take_request()
    with pytest.raises(RateLimitError):
        limited.charge(1, 10_000)


def test_over_any_while_no_more_tokens_are_used_than_the_rate_allows(clock: Clock) -> None:
    chance = random.Random(2)
    limited = account(clock, tokens_per_minute=1000)
    used, started, open_charges = 0, clock.now, []
    for _ in range(3000):
        clock.now += chance.random() * 2
        if open_charges and chance.random() < 0.5:
            charge, most = open_charges.pop(chance.randrange(len(open_charges)))
            spent = chance.randrange(most + 1)
            charge.settle(spent)
            used += spent
        most = chance.randrange(1, 400)
        with suppress(RateLimitError):
            open_charges.append((limited.charge(1, most), most))
        assert used <= 1000 + (clock.now - started) * 1000 / 60
    assert used > 0.3 * (clock.now - started) * 1000 / 60


def test_no_more_sequences_than_the_limit(clock: Clock) -> None:
    limited = account(clock, max_sequences=3)
    with pytest.raises(InvalidRequestError, match="at most 3"):
        limited.charge(4, 1)
    first = limited.charge(2, 1)
    with pytest.raises(RateLimitError):
        limited.charge(2, 1)
    limited.charge(1, 1)
    with pytest.raises(RateLimitError, match="3 sequences"):
        limited.take_request()
    first.settle(0)
    first.settle(0)
    assert limited.in_flight == 1
    limited.take_request()


def test_without_limits_nothing_is_refused_and_nothing_said(clock: Clock) -> None:
    free = account(clock)
    for _ in range(1000):
        free.take_request()
        free.charge(100, 10**9)
    assert (free.requests, free.tokens) == (None, None)


def test_new_limits_hold_at_once_and_keep_what_is_in_flight() -> None:
    accounts = Accounts()
    before = accounts.of(Tenant("a", Limits(max_sequences=5)))
    charge = before.charge(4, 10)
    assert accounts.of(Tenant("b")) is not before
    after = accounts.of(Tenant("a", Limits(max_sequences=2, tokens_per_minute=100)))
    with pytest.raises(RateLimitError):
        after.take_request()
    charge.settle(10)
    after.take_request()
    assert after.tokens is not None
    assert after.tokens.remaining == 100


@pytest.mark.parametrize("before", [None, 6000])
def test_what_was_reserved_under_other_limits_is_not_given_back_to_these(
    clock: Clock, before: int | None
) -> None:
    changed = Account(Limits(tokens_per_minute=before), clock)
    old = changed.charge(1, 3000)
    changed.apply(Limits(tokens_per_minute=600))
    changed.charge(1, 500)
    old.settle(10)
    assert changed.tokens is not None
    assert changed.tokens.remaining == 100
    assert changed.in_flight == 1


# --- how long until there is room --------------------------------------------------------------------------


def test_the_wait_is_what_is_missing_over_what_comes_back(clock: Clock) -> None:
    rate = ReleaseRate(clock)
    for _ in range(100):
        clock.now += 0.5
        rate.add(1)
    assert rate.seconds_for(10) == 5
    assert rate.seconds_for(1) == 1
    assert rate.seconds_for(10_000) == MOST_SECONDS


def test_the_rate_is_known_from_the_first_seconds_on(clock: Clock) -> None:
    rate = ReleaseRate(clock)
    for _ in range(4):
        clock.now += 0.5
        rate.add(1)
    assert rate.seconds_for(20) in (9, 10, 11)


def test_a_rate_that_falls_is_noticed(clock: Clock) -> None:
    rate = ReleaseRate(clock)
    for _ in range(50):
        clock.now += 0.1
        rate.add(1)
    soon = rate.seconds_for(100)
    clock.now += 30
    assert rate.seconds_for(100) > 3 * soon


def test_idle_time_is_no_slowness(clock: Clock) -> None:
    rate = ReleaseRate(clock)
    rate.add(1)
    clock.now += 3600
    rate.begin()
    assert rate.seconds_for(5) == 1
    clock.now += 1
    rate.add(5)
    assert rate.seconds_for(5) in (1, 2)


def test_where_nothing_comes_back_the_wait_grows_with_the_time(clock: Clock) -> None:
    rate = ReleaseRate(clock)
    rate.begin()
    clock.now += 20
    assert rate.seconds_for(1) == 20
    clock.now += 500
    assert rate.seconds_for(1) == MOST_SECONDS
