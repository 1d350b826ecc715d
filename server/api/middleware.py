"""Around every route, as plain ASGI (a wrapped request would hide disconnects and buffer streams):
the request's id, the access log, HTTP metrics, the last catch for errors, and API keys."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.error_responses import error_response, is_anthropic
from server.errors import AuthenticationError, InternalError
from server.metrics import HttpMetrics
from server.request_scope import RequestScope, request_scope, trace_parent

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("server.access")

CLIENT_LEFT = 499
"""nginx's code for a client that did not wait for its answer."""
LONGEST_LOGGED_PATH = 200
OPEN_PATHS = frozenset({"/livez", "/readyz", "/startupz", "/health", "/metrics"})
"""What probes and scrapers, which carry no key, may ask for. All else needs a key, routes to come included."""

_SAFE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


class RequestContextMiddleware:
    """Gives each request an id (the client's own, if it is short and plain), times it, counts and logs it.

    Never logs a body, a query or a header. Puts `request_id`, `arrival` (`time.monotonic()` seconds) and
    `client_left` into the request's state.
    """

    def __init__(self, app: ASGIApp, metrics: HttpMetrics, *, access_log: bool) -> None:
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
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:  # whatever a route failed to expect becomes an answer here, and a line in the log
            logger.exception("request %s failed", request_id)
            if status:
                raise  # too late for an answer: the server closes the connection
            await error_response(InternalError(request_id), scope["path"])(scope, receive, send_with_id)
        finally:
            if state["client_left"]:
                status = CLIENT_LEFT
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.answered(route, status or CLIENT_LEFT)
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


class ApiKeyMiddleware:
    """Lets a request in if it has one of the keys, or if there are none, or if its path is open.

    The path is the one that routing uses, which no Host header can change. Keys are kept as hashes, and each is
    compared, so that the time taken tells nothing. Puts `key_id` into the request's state.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._digests or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        token, headers = _bearer_token(scope), "'Authorization: Bearer KEY'"
        if is_anthropic(scope["path"]):
            token, headers = token or _header(scope, b"x-api-key"), f"{headers} or 'x-api-key: KEY'"
        digest = self._matching(token)
        if digest is None:
            error = AuthenticationError(f"A valid API key is needed, as the header {headers}.")
            await error_response(error, scope["path"])(scope, receive, send)
            return
        scope["state"]["key_id"] = digest.hex()
        await self._app(scope, receive, send)

    def _matching(self, token: bytes) -> bytes | None:
        if not token:
            return None  # not even an empty key, which a half-set environment variable may yield
        given = hashlib.sha256(token).digest()
        found = None
        for digest in self._digests:
            if hmac.compare_digest(digest, given):
                found = digest
        return found


def _bearer_token(scope: Scope) -> bytes:
    """Empty, which is no key, unless there is one Authorization header of this scheme."""
    scheme, _, token = _header(scope, b"authorization").partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""


def _header(scope: Scope, wanted: bytes) -> bytes:
    """Empty unless there is exactly one of this name."""
    values = [bytes(value) for name, value in scope["headers"] if name == wanted]
    return values[0] if len(values) == 1 else b""
