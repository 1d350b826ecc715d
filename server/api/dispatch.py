"""Requests that come from a file instead of a socket, through the very routes that clients use.

Below the middleware: there is no key to check, since the owner's was checked with the file, and no access to
log. Everything else, from the body's limits to the shape of an error, is the routes' own.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Collection, Iterable

from fastapi import APIRouter, FastAPI
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from fastapi.routing import APIRoute
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import Message, Receive, Scope

from server.api.ignored_fields import HEADER
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

    def __init__(self, app: FastAPI, runtime: Runtime, routers: Iterable[APIRouter]) -> None:
        """Lines may ask for what `routers`, which are part of `app`, answer at fixed paths to a POST."""
        self._app = app
        self._runtime = runtime
        self._admission: Admission = app.state.admission
        # Their own bound: however many lines run, no client finds the queue full for it. Limits of a key and
        # deadlines are for who waits for an answer: lines run in what is left, and a batch has a day.
        self._own_admission = Admission(runtime.config.max_queued_requests)
        self._own_account = Account(Limits())
        self._answering = ExceptionMiddleware(
            AsyncExitStackMiddleware(app.router), handlers=app.exception_handlers
        )
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
        collector = _Collector()
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": url,
            "raw_path": url.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))],
            "client": None,
            "server": None,
            "app": self._app,
            "state": {
                "request_id": request_id,
                "arrival": time.monotonic(),
                "client_left": False,
                "tenant": tenant,
                "terms": Terms(tenant, self._own_admission, self._own_account, least_priority=PRIORITY),
            },
        }
        try:
            await self._answering(scope, _sent_once(body), collector.send)
        except Exception:  # whatever a route failed to expect is this line's error, and one in the log
            logger.exception("request %s of a batch failed", request_id)
            error: ApiError = InternalError(request_id)
            return Answer(error.status, encode(error.body()), request_id)
        finally:
            request_scope.reset(token)
        return Answer(
            collector.status,
            bytes(collector.body),
            request_id,
            collector.headers.get(HEADER.encode(), b"").decode("latin-1"),
        )


def post_paths(routers: Iterable[APIRouter]) -> frozenset[str]:
    """The fixed paths that they answer a POST at."""
    return frozenset(
        route.path
        for router in routers
        for route in router.routes
        if isinstance(route, APIRoute) and "POST" in (route.methods or ()) and "{" not in route.path
    )


class _Collector:
    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = bytearray()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = dict(message["headers"])
        elif message["type"] == "http.response.body":
            self.body += message.get("body", b"")


def _sent_once(body: bytes) -> Receive:
    """The body as one message; a client that then waits for ever."""
    waiting = asyncio.Event()
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not messages:
            await waiting.wait()
        return messages.pop()

    return receive
