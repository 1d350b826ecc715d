"""One client's connection: uvicorn's, with the bounds that it has no options for.

Laws:
1. A connection without a request costs one place in `Connections.waiting` and a timer, and is closed by it.
2. What a client does not read is kept up to the transport's high-water mark, or one answer, and for
   SEND_SECONDS without progress at most.
3. Whatever arrives at once, the event loop is kept from its other work for one slice of it at a time.
"""

from __future__ import annotations

import asyncio
import resource
from collections import OrderedDict
from http import HTTPStatus
from typing import Any, cast

import h11
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from server.api.responses import encode
from server.errors import ApiError, InvalidHttpError, RequestTimeoutError, TooManyConnectionsError
from server.limits import HEADER_SECONDS, MAX_CONNECTIONS, RESERVED_FILES, SEND_SECONDS

SLICE_BYTES = 1 << 12
"""Of a chunked body, this much may hold seven hundred chunks, of ten microseconds each."""


class Connections:
    """What the connections of one server have in common. Called by uvicorn to make one."""

    def __init__(self, most: int | None = None) -> None:
        """`most`: open at once; as many as the limit of open files allows, if not given."""
        self.most = most_connections() if most is None else most
        self.waiting: OrderedDict[Connection, None] = OrderedDict()
        """Those that wait for a request, the longest first."""

    def __call__(self, **its: Any) -> Connection:
        return Connection(self, **its)


def most_connections() -> int:
    """How many fit, once the limit of open files is raised as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, soft - RESERVED_FILES)


class _Flow(FlowControl):
    """Leaves the transport paused as long as the connection has not taken in what it has read."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection.transport)
        self._connection = connection

    def resume_reading(self) -> None:
        if self._connection.has_unfed:
            self.read_paused = False
        else:
            super().resume_reading()


class Connection(H11Protocol):
    def __init__(self, shared: Connections, **its: Any) -> None:
        super().__init__(**its)
        self.access_log = False  # whatever handlers its logger has: it would log queries
        self._shared = shared
        self._header_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._unsent = 0
        self._unfed = b""

    # --- from the transport --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))  # uvloop's is none by its class
        self.flow = _Flow(self)
        if len(self.connections) > self._shared.most and not self._make_room():
            self._refuse(TooManyConnectionsError(self._shared.most))
            return
        self._shared.waiting[self] = None
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._has_headers()
        self._cancel_send_timer()
        self._unfed = b""
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unfed += data
        self._feed()

    @property
    def has_unfed(self) -> bool:
        """Whether bytes wait here that were read, in which case no more are."""
        return bool(self._unfed)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_send_timer()

    # --- requests ------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._has_no_request and not self.transport.is_closing():
            self._shared.waiting[self] = None

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # which closing would wait for
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidHttpError())

    # --- parts ---------------------------------------------------------------------------------------------

    def _feed(self) -> None:
        if self.transport.is_closing():
            return
        data, self._unfed = self._unfed[:SLICE_BYTES], self._unfed[SLICE_BYTES:]
        super().data_received(data)
        # Behind that, which resumes reading at the end of a body that was answered before. To read then would
        # have this called more often than there are slices, and h11 takes no bytes for the connection's end.
        if self._unfed:
            self.transport.pause_reading()
            self.loop.call_soon(self._feed)
        elif not self.flow.read_paused:
            self.transport.resume_reading()
        if self._has_no_request:
            self._expect_headers()
        else:
            self._has_headers()

    @property
    def _has_no_request(self) -> bool:
        """Whether nothing is left to answer: what comes is the next request, or a body behind its answer."""
        return self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE

    def _expect_headers(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self._headers_are_late)

    def _has_headers(self) -> None:
        self._shared.waiting.pop(self, None)
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _headers_are_late(self) -> None:
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(
                RequestTimeoutError(f"The headers were not complete after {HEADER_SECONDS:g} seconds.")
            )
        else:
            self.transport.close()

    def _make_room(self) -> bool:
        """Close the connection that has waited longest for a request."""
        if not self._shared.waiting:
            return False
        longest, _ = self._shared.waiting.popitem(last=False)
        longest.transport.abort()
        return True

    def _refuse(self, error: ApiError) -> None:
        """Answer what is no request, or is not taken as one, and close the connection."""
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            body = encode(error.body())
            headers = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "connection": "close",
                **error.headers,
            }
            lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()

    def _expect_reading(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self._send_timer = self.loop.call_later(SEND_SECONDS, self._check_reading)

    def _check_reading(self) -> None:
        if self.transport.get_write_buffer_size() < self._unsent:
            self._expect_reading()
        else:
            self.transport.abort()

    def _cancel_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
