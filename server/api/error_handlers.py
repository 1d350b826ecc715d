"""Every error as a response in its dialect's shape."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from server.api.error_responses import error_response, no_such_route
from server.api.middleware import CLIENT_LEFT
from server.api.serving import runtime_of
from server.errors import (
    ApiError,
    InvalidRequestError,
    MethodNotAllowedError,
    shown,
)


def install(app: FastAPI) -> None:
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    if error.status in (429, 503):
        runtime_of(request).metrics.http.rejected(error.code)
    return error_response(error, request.scope["path"])


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """The framework's own: no such route, or not with this method."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    if error.status_code == 404:
        return error_response(no_such_route(request.method, path), path)
    if error.status_code == 405:
        allow = (error.headers or {}).get("Allow")
        message = f"There is no {request.method} {shown(path)[1:-1]}; the path takes {allow}."
        return error_response(MethodNotAllowedError(message, allow), path)
    return error_response(InvalidRequestError(str(error.detail)), path)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    return error_response(InvalidRequestError("The path or the query is not valid."), request.scope["path"])


async def _on_disconnect(request: Request, error: Exception) -> Response:
    request.state.client_left = True
    runtime_of(request).metrics.http.disconnects.inc()
    return Response(status_code=CLIENT_LEFT)  # which nobody reads
