"""Requests that come from a file instead of a socket, through the very routes that clients use.

There is no key to check, since the owner's was checked with the file, and no access to log.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Collection, Iterable

from fastapi import APIRouter
from fastapi.routing import APIRoute

from server.api.ignored_fields import HEADER
from server.api.inner import InnerRoutes
from server.api.responses import encode
from server.api.terms import Terms
from server.api_keys import Limits, Tenant
from server.batches.lines import Answer
from server.errors import ApiError, InternalError
from server.frontend.accounts import Account
from server.frontend.admission import Admission
from server.request_scope import RequestScope, request_scope
from server.runtime import Runtime

logger = logging.getLogger(__name__)

PRIORITY = 1_000_000
"""Behind every client that names no priority, and most that do."""
IDLE_SECONDS = 0.5
"""A client that asks again so soon after its last answer was never gone."""


class RouteRequests:
    """Answers lines of batches (`server.batches.runner.Requests`)."""

    def __init__(
        self, routes: InnerRoutes, runtime: Runtime, admission: Admission, routers: Iterable[APIRouter]
    ) -> None:
        """Lines may ask for what `routers`, which are among `routes`, answer at fixed paths to a POST.
        `admission` is that of clients."""
        self._routes = routes
        self._runtime = runtime
        self._admission = admission
        # Their own bound: however many lines run, no client finds the queue full for it. Limits of a key and
        # deadlines are for who waits for an answer: lines run in what is left, and a batch has a day.
        self._own_admission = Admission(runtime.config.max_queued_requests)
        self._own_account = Account(Limits())
        self.urls = post_paths(routers)

    def model_names(self) -> Collection[str] | None:
        return self._runtime.model.names if self._runtime.model is not None else None

    def is_idle(self) -> bool:
        since = time.monotonic() - self._admission.released_at
        return self._admission.in_flight == 0 and since >= IDLE_SECONDS

    async def answer(self, url: str, body: bytes, owner: str) -> Answer:
        """The route's answer, which is no stream. `owner` is the id of a tenant."""
        request_id, tenant = uuid.uuid4().hex, Tenant(owner)
        token = request_scope.set(RequestScope(request_id))
        state = {
            "request_id": request_id,
            "arrival": time.monotonic(),
            "client_left": False,
            "tenant": tenant,
            "terms": Terms(tenant, self._own_admission, self._own_account, least_priority=PRIORITY),
        }
        try:
            answer = await self._routes.answer(url, body, state)
        except Exception:  # whatever a route failed to expect is this line's error, and one in the log
            logger.exception("request %s of a batch failed", request_id)
            error: ApiError = InternalError(request_id)
            return Answer(error.status, encode(error.body()), request_id)
        finally:
            request_scope.reset(token)
        return Answer(
            answer.status,
            bytes(answer.body),
            request_id,
            answer.headers.get(HEADER.encode(), b"").decode("latin-1"),
        )


def post_paths(routers: Iterable[APIRouter]) -> frozenset[str]:
    """The fixed paths that they answer a POST at."""
    return frozenset(
        route.path
        for router in routers
        for route in router.routes
        if isinstance(route, APIRoute) and "POST" in (route.methods or ()) and "{" not in route.path
    )
