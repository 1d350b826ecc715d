"""Errors as responses: in OpenAI's shape, and under `/v1/messages` in Anthropic's, whatever raised them."""

from __future__ import annotations

from starlette.responses import Response

from server.api.responses import json_response
from server.errors import ApiError, RouteNotFoundError, shown

_MESSAGES = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_response(error: ApiError, path: str) -> Response:
    """`path`: as routing sees it."""
    body = anthropic_body(error) if is_anthropic(path) else error.body()
    return json_response(body, status=error.status, headers=error.headers)


def no_such_route(method: str, path: str) -> RouteNotFoundError:
    return RouteNotFoundError(f"There is no {method} {shown(path)[1:-1]}.")


def is_anthropic(path: str) -> bool:
    """Whether clients of Anthropic's API ask for this path."""
    return path == _MESSAGES or path.startswith(_MESSAGES + "/")


def anthropic_body(error: ApiError) -> dict[str, object]:
    default = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = _ANTHROPIC_TYPES.get(error.status, default)
    return {"type": "error", "error": {"type": kind, "message": error.message}}
