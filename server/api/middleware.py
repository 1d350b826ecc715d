"""Around every route, as plain ASGI (a wrapped request would hide disconnects and buffer streams):
the request's id, the access log, HTTP metrics, what is left of the limits, the load for gateways that ask, and
the last catch for errors."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.error_responses import error_response
from server.api.load_report import load_headers
from server.api.terms import quota_headers
from server.errors import InternalError, ShuttingDownError
from server.metrics import Metrics
from server.request_scope import RequestScope, request_scope, trace_parent

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("server.access")

CLIENT_LEFT = 499
"""nginx's code for a client that did not wait for its answer."""
LONGEST_LOGGED_PATH = 200

_SAFE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


class RequestContextMiddleware:
    """Gives each request an id (the client's own, if it is short and plain), times it, counts and logs it.

    Never logs a body, a query or a header. Puts `request_id`, `arrival` (`time.monotonic()` seconds) and
    `client_left` into the request's state.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, *, access_log: bool) -> None:
        self._app = app
        self._metrics = metrics
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        request_id = state["request_id"] = _request_id(scope)
        # Each request has a task of its own, with which its scope ends.
        request_scope.set(RequestScope(request_id, trace_parent(scope["headers"])))
        arrival = state["arrival"] = time.monotonic()
        state["client_left"] = False
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [
                    (b"x-request-id", request_id.encode()),
                    *quota_headers(scope),
                    *load_headers(scope, self._metrics.newest_step),
                ]
                message["headers"] = [*message["headers"], *own]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:  # the server ends, and nobody else cancels a request
            if status:
                raise
            error = ShuttingDownError("The server was shut down before this request was answered.")
            await error_response(error, scope["path"])(scope, receive, send_with_id)
        except Exception:  # whatever a route failed to expect becomes an answer here, and a line in the log
            logger.exception("request %s failed", request_id)
            if status:
                raise  # too late for an answer: the server closes the connection
            await error_response(InternalError(request_id), scope["path"])(scope, receive, send_with_id)
        finally:
            if state["client_left"]:
                status = CLIENT_LEFT
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.http.answered(route, status or CLIENT_LEFT)
            if self._access_log:
                _log_access(scope, status or CLIENT_LEFT, time.monotonic() - arrival)


def _log_access(scope: Scope, status: int, seconds: float) -> None:
    method, path = scope["method"], quote(scope["path"][:LONGEST_LOGGED_PATH])
    request = {
        "requestMethod": method,
        "requestUrl": path,
        "status": status,
        "latency": f"{seconds:.4f}s",
    }
    access_logger.info(
        "%s %s %d %.1f ms %s",
        method,
        path,
        status,
        seconds * 1000,
        scope["state"]["request_id"],
        extra={"fields": {"httpRequest": request}},
    )


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SAFE_REQUEST_ID.fullmatch(value):
            return str(value.decode("ascii"))
    return uuid.uuid4().hex
