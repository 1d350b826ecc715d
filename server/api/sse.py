"""Streams of server-sent events.

What a client of OpenAI's older routes sees (CHUNKS): `data: {chunk}` events, comments (`: ping`) when nothing
else is to say, and `data: [DONE]` at the end. If generation fails after the stream began, the last event before
`[DONE]` is `data: {"error": {...}}`, which OpenAI's libraries raise as an exception. Other routes have events
with names, and say the same in their own way.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus, SendTimeoutError
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from server.api.responses import encode
from server.errors import ApiError, InternalError
from server.frontend.generation import Generation
from server.limits import SEND_SECONDS
from server.metrics import HttpMetrics
from server.options import ServerConfig

logger = logging.getLogger(__name__)
# It would log every chunk at `debug`: prompts and answers do not belong in a log.
logging.getLogger("sse_starlette").setLevel(logging.INFO)
# It would cut every stream as soon as the server is told to end, which has its own way of ending (http_server).
AppStatus.enable_automatic_graceful_drain = False


@dataclass(frozen=True, slots=True)
class EventFormat:
    """How a route writes its stream."""

    event: Callable[[object], bytes]
    error: Callable[[ApiError], bytes]
    end: bytes
    """What follows the last event."""
    ping: Callable[[], ServerSentEvent]


def comment_ping() -> ServerSentEvent:
    return ServerSentEvent(comment="ping", sep="\n")


def _chunk(chunk: object) -> bytes:
    return b"data: " + encode(chunk) + b"\n\n"


CHUNKS = EventFormat(
    event=_chunk,
    error=lambda error: _chunk(error.body()),
    end=b"data: [DONE]\n\n",
    ping=comment_ping,
)


def named_event(name: str, body: object) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + encode(body) + b"\n\n"


class GenerationStream(EventSourceResponse):
    """Sends `chunks`, which read `generation`. Laws:

    - Whatever ends the response (the end, a client that left, a shutdown), the generation has ended with it.
    - Nothing that goes wrong behind the first event is raised: the status is sent, so the stream must tell it.
    """

    def __init__(
        self,
        request: Request,
        generation: Generation,
        chunks: AsyncGenerator[object, None],
        *,
        config: ServerConfig,
        metrics: HttpMetrics,
        headers: dict[str, str],
        form: EventFormat = CHUNKS,
    ) -> None:
        self._request = request
        self._generation = generation
        self._metrics = metrics
        self._is_complete = False
        self._form = form
        self._frames = self._frame(chunks)
        super().__init__(
            self._frames,
            headers={"cache-control": "no-cache", **headers},
            ping=config.sse_keep_alive_interval,
            ping_message_factory=form.ping,
            send_timeout=SEND_SECONDS,  # of pings
            client_close_handler_callable=self._on_close,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._metrics.open_streams.inc()
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            self._client_left()
            raise  # so that the server closes the connection
        finally:
            self._metrics.open_streams.dec()
            await self._frames.aclose()
            self._generation.release()

    async def _stream_response(self, send: Send) -> None:
        """As the library's, but with one timer for all events, not one for each. Raises SendTimeoutError."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with asyncio.timeout(None) as limit:
                with _Sending(limit) as sending:
                    async for event in self._frames:
                        sending.since = sending.clock()
                        await send({"type": "http.response.body", "body": event, "more_body": True})
                        sending.since = None
        except TimeoutError:
            raise SendTimeoutError from None
        async with self._send_lock:
            self.active = False
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _frame(self, chunks: AsyncGenerator[object, None]) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield self._form.event(chunk)
        except ApiError as error:
            yield self._form.error(error)
        except Exception:  # the status is sent: the stream itself must say that it failed
            request_id: str = self._request.state.request_id
            logger.exception("request %s failed while streaming", request_id)
            yield self._form.error(InternalError(request_id))
        self._is_complete = True
        if self._form.end:
            yield self._form.end

    async def _on_close(self, message: Message) -> None:
        # The server says "disconnect" after a complete answer, too.
        if not self._is_complete:
            self._client_left()

    def _client_left(self) -> None:
        self._request.state.client_left = True
        self._metrics.disconnects.inc()


class _Sending:
    """Has `limit` expire once a send has taken SEND_SECONDS, or twice that at most."""

    def __init__(self, limit: asyncio.Timeout) -> None:
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self.clock = self._loop.time
        self.since: float | None = None
        """When the present send began, by `clock`."""

    def __enter__(self) -> Self:
        self._timer = self._loop.call_later(SEND_SECONDS, self._check)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        now = self.clock()
        if self.since is not None and now - self.since >= SEND_SECONDS:
            self._limit.reschedule(now)
        else:
            self._timer = self._loop.call_later(SEND_SECONDS, self._check)
