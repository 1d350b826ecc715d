"""API keys, as plain ASGI around every route."""

from __future__ import annotations

from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.error_responses import error_response, is_anthropic, no_such_route
from server.api_keys import KeyRing
from server.errors import ApiError, AuthenticationError, PermissionDeniedError

OPEN_PATHS = frozenset({"/livez", "/readyz", "/startupz", "/health", "/ping", "/metrics"})
"""What probes and scrapers, which carry no key, may ask for. All else needs a key, routes to come included."""
ADMIN_PREFIX = "/debug/"
"""What is behind it is there for admins' keys alone."""


class ApiKeyMiddleware:
    """Lets a request in if it has one of the keys, or if there are none, or if its path is open.

    The path is the one that routing uses, which no Host header can change. Puts the `tenant` into the request's
    state.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, open_paths: Collection[str | None]) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._open_paths:
            error = self._refusal(scope)
            if error is not None:
                await error_response(error, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        keys, path = self._keys, scope["path"]
        tenant = keys.anonymous
        if keys.is_needed:
            token, headers = _bearer_token(scope), "'Authorization: Bearer KEY'"
            if is_anthropic(path):
                token, headers = token or _header(scope, b"x-api-key"), f"{headers} or 'x-api-key: KEY'"
            found = keys.find(token)
            if found is None:
                return AuthenticationError(f"A valid API key is needed, as the header {headers}.")
            tenant = found
        scope["state"]["tenant"] = tenant
        if path.startswith(ADMIN_PREFIX) and not tenant.is_admin:
            if keys.has_admin:
                return PermissionDeniedError("This path needs an API key that is an admin's.")
            return no_such_route(scope["method"], path)
        return None


def _bearer_token(scope: Scope) -> bytes:
    """Empty, which is no key, unless there is one Authorization header of this scheme."""
    scheme, _, token = _header(scope, b"authorization").partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""


def _header(scope: Scope, wanted: bytes) -> bytes:
    """Empty unless there is exactly one of this name."""
    values = [bytes(value) for name, value in scope["headers"] if name == wanted]
    return values[0] if len(values) == 1 else b""
