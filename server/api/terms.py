"""On what terms a generating request is served: whose it is, what its sender may use, how long it may take.

Every generating route has the dependency ENTERING, which settles them before the body is read, so that a
refusal costs next to nothing. Requests that come from a batch bring terms of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from fastapi import Depends
from starlette.requests import Request
from starlette.types import Scope

from server.api.error_responses import is_anthropic
from server.api_keys import LOWEST_PRIORITY_NUMBER, Tenant
from server.errors import InvalidRequestError, shown
from server.frontend.accounts import Account, Quota
from server.frontend.admission import Admission
from server.frontend.deadlines import NO_DEADLINES, Deadlines

TIMEOUT_HEADER = "x-request-timeout"
LONGEST_TIMEOUT_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class Terms:
    tenant: Tenant
    admission: Admission
    account: Account
    deadlines: Deadlines = NO_DEADLINES
    least_priority: int = LOWEST_PRIORITY_NUMBER
    """What a lower `priority` is raised to."""
    has_others: bool = False
    """Whether there are other tenants, to whom room is to be left."""

    @property
    def held(self) -> int:
        """As `Admission.acquire` takes it."""
        return self.account.in_flight if self.has_others else 0


def tenant_of(request: Request) -> Tenant:
    """Whose key was presented; whoever asks, if the server asks for none."""
    tenant: Tenant = getattr(request.state, "tenant", None) or request.app.state.keys.anonymous
    return tenant


def terms_of(request: Request) -> Terms:
    """Of a request to a generating route."""
    terms: Terms = request.state.terms
    return terms


async def _enter(request: Request) -> None:
    """Raises QueueFullError, RateLimitError, and InvalidRequestError for a header."""
    if hasattr(request.state, "terms"):
        return  # from a batch
    state, tenant = request.app.state, tenant_of(request)
    terms = Terms(
        tenant,
        state.admission,
        state.accounts.of(tenant),
        _deadlines(request),
        has_others=state.keys.num_tenants > 1,
    )
    request.state.terms = terms
    terms.admission.check_room(terms.held)
    terms.account.take_request()


ENTERING = Depends(_enter)


def _deadlines(request: Request) -> Deadlines:
    """The server's, or the client's own if that is earlier."""
    config = request.app.state.runtime.config
    given = request.headers.get(TIMEOUT_HEADER)
    if given is None:
        return Deadlines(config.queue_timeout, config.request_timeout)
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= LONGEST_TIMEOUT_SECONDS:
        raise InvalidRequestError(
            f"The header '{TIMEOUT_HEADER}' must be seconds, more than 0 and at most "
            f"{LONGEST_TIMEOUT_SECONDS:.0f}, got {shown(given)}.",
            param=TIMEOUT_HEADER,
        )
    return Deadlines(config.queue_timeout, min(seconds, config.request_timeout or seconds))


def quota_headers(scope: Scope) -> list[tuple[bytes, bytes]]:
    """How much of its limits for a minute the client has left, as OpenAI or Anthropic say it; none without."""
    terms: Terms | None = scope["state"].get("terms")
    if terms is None:
        return []
    headers: list[tuple[bytes, bytes]] = []
    for kind, quota in (("requests", terms.account.requests), ("tokens", terms.account.tokens)):
        if quota is not None:
            write = _anthropic_headers if is_anthropic(scope["path"]) else _openai_headers
            headers += [(name.encode(), value.encode()) for name, value in write(kind, quota).items()]
    return headers


def _openai_headers(kind: str, quota: Quota) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{kind}": str(quota.limit),
        f"x-ratelimit-remaining-{kind}": str(quota.remaining),
        f"x-ratelimit-reset-{kind}": _duration(quota.reset_seconds),
    }


def _anthropic_headers(kind: str, quota: Quota) -> dict[str, str]:
    reset = datetime.now(UTC) + timedelta(seconds=math.ceil(quota.reset_seconds))
    return {
        f"anthropic-ratelimit-{kind}-limit": str(quota.limit),
        f"anthropic-ratelimit-{kind}-remaining": str(quota.remaining),
        f"anthropic-ratelimit-{kind}-reset": reset.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _duration(seconds: float) -> str:
    """`6ms`, `1.5s`, `1m0s`: as OpenAI writes it, which is as Go does."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes}m{rest / 1000:g}s" if minutes else f"{rest / 1000:g}s"
