"""The server's port, and its end, which breaks no answer.

    serving ──signal──► leaving ──► finishing ──► ended

- leaving: /readyz says that others should be asked, and everything is served as before, for as long as
  balancers may take to notice (--shutdown-delay).
- finishing: what was accepted before is answered, and new requests for the model are refused with 503.
- ended: once nothing is in flight. After --shutdown-timeout what still is ends with an error that says so.

Laws:
1. The port answers until nothing is in flight.
2. Every request has an answer or a stream with an end, however the server ends, but for a second signal.
3. The process has ended `_FORCED_SECONDS` after the last deadline at the latest, and a second signal ends it at
   once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Generator
from typing import Any, cast

import uvicorn
from fastapi import FastAPI

from server.batches.runner import BatchRunner
from server.http_connection import Connection, Connections
from server.limits import KEEP_ALIVE_SECONDS, MAX_HEADER_BYTES
from server.runtime import Runtime

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_ERROR_SECONDS = 0.6
"""For streams to tell their clients that they were cut."""
_REFUSAL_SECONDS = 0.3
"""For what had not begun an answer to get an error instead."""
_FORCED_SECONDS = 1.9
"""After the deadline: a thread that computes, or an engine amid a step, is not waited for."""
_CLOSE = (b"connection", b"close")


class HttpServer(uvicorn.Server):
    def __init__(self, app: FastAPI, runtime: Runtime) -> None:
        config = runtime.config
        self.connections = Connections()
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                # On h11, which bounds the headers, and takes the body of a request that offers to upgrade, as
                # Java's client does; httptools does neither.
                http=cast(Any, self.connections),
                ws="none",  # with a websocket package installed it would log paths with their queries
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=1,  # of clients that take their time to read a complete answer
                log_config=None,
                access_log=False,
                server_header=False,
            )
        )
        self._app = app
        self._runtime = runtime
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._is_asked = False

    def on_signal(self, number: int) -> None:
        """SIGTERM or SIGINT: the first begins the end, the second is it. For a signal's handler."""
        if self._is_asked:
            os._exit(128 + number)
        self._is_asked = True
        config = self._runtime.config
        timer = threading.Timer(
            config.shutdown_delay + config.shutdown_timeout + _FORCED_SECONDS,
            lambda: os._exit(self._runtime.exit_code),
        )
        timer.daemon = True
        timer.start()
        self.end()

    def end(self) -> None:
        """Answer what was accepted, then leave. From any thread, or a signal's handler."""
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_to_drain)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield  # they belong to whoever runs the server

    async def startup(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    @property
    def num_in_flight(self) -> int:
        return len(self.server_state.tasks)

    def _begin_to_drain(self) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        config, runtime = self._runtime.config, self._runtime
        logger.info("shutting down: %d requests in flight", self.num_in_flight)
        runtime.is_draining = True
        runtime.metrics.draining.set(1)
        self._close_connections_with_their_answers()
        await asyncio.sleep(config.shutdown_delay)
        runtime.takes_requests = False
        batches: BatchRunner | None = self._app.state.batches
        if batches is not None:
            await batches.stop()
        if not await self._idle_within(config.shutdown_timeout):
            await self._cut()
        self.should_exit = True

    def _close_connections_with_their_answers(self) -> None:
        """Clients are to connect anew, which a balancer has them do elsewhere."""
        self.config.encoded_headers.append(_CLOSE)  # which uvicorn makes the default headers of, each second
        headers = self.server_state.default_headers = [*self.server_state.default_headers, _CLOSE]
        for connection in self.server_state.connections:
            assert isinstance(connection, Connection)
            if connection.cycle is not None:
                connection.cycle.default_headers = headers

    async def _cut(self) -> None:
        logger.warning("the time to shut down is over: %d requests are cut", self.num_in_flight)
        self._runtime.client.abandon()
        if await self._idle_within(_ERROR_SECONDS):
            return
        # What is left has not come to the engine yet, or its client does not read.
        for task in self.server_state.tasks:
            task.cancel()
        await self._idle_within(_REFUSAL_SECONDS)

    async def _idle_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.num_in_flight:  # noqa: ASYNC110  # the tasks are uvicorn's, which tells nobody
                    await asyncio.sleep(_POLL_SECONDS)
        return not self.num_in_flight
