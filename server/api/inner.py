"""The application's routes, asked from inside: no key is checked, and no access logged.

Everything else, from the body's limits to the shape of an error, is the routes' own.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import Message, Receive, Scope, Send


@dataclass(slots=True)
class InnerAnswer:
    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = dict(message["headers"])
        elif message["type"] == "http.response.body":
            self.body += message.get("body", b"")


class InnerRoutes:
    def __init__(self, app: FastAPI) -> None:
        """`app` has all its routes and handlers."""
        self._app = app
        self._answering = ExceptionMiddleware(
            AsyncExitStackMiddleware(app.router), handlers=app.exception_handlers
        )

    async def answer(self, url: str, body: bytes, state: dict[str, Any]) -> InnerAnswer:
        """The answer, which is no stream, to a POST of JSON.

        state: what the middleware puts into a request's state, its `terms` included. Raises what the route
        failed to expect.
        """
        answer = InnerAnswer()
        await self.forward(url, body, state, _waiting_client, answer.send)
        return answer

    async def forward(self, url: str, body: bytes, state: dict[str, Any], receive: Receive, send: Send) -> None:
        """Have a POST of JSON answered to `send`; from `receive` nothing is taken but the client's leaving."""
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
            "state": state,
        }
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_body_first() -> Message:
            return messages.pop() if messages else await receive()

        await self._answering(scope, receive_body_first, send)


async def _waiting_client() -> Message:
    await asyncio.Event().wait()
    raise AssertionError("nothing sets the event")
