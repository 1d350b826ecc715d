"""The engine in a thread of this process: for tests and for debuggers. It shares the GIL with the front."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import traceback

from server.engine import loop as engine_loop
from server.engine.pulse import Pulse
from server.engine.types import EngineConfig, EngineInfo, FromEngine, Start, ToEngine
from server.frontend.mailbox import MailboxClient


class InprocClient(MailboxClient):
    def __init__(self) -> None:
        super().__init__()
        self._inbox: engine_loop.Inbox = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def start(self, config: EngineConfig) -> EngineInfo:
        event_loop = asyncio.get_running_loop()
        self._started = event_loop.create_future()

        def send(message: FromEngine) -> None:
            event_loop.call_soon_threadsafe(self._deliver, message)

        def run() -> None:
            try:
                engine_loop.serve(self._inbox, send, Pulse())
                reason = "the engine was stopped"
            except BaseException as error:  # a thread has no exit code: this stands for it
                traceback.print_exc()
                reason = f"the engine failed: {error}"
            event_loop.call_soon_threadsafe(self._die, reason)

        self._thread = threading.Thread(target=run, name="engine", daemon=True)
        self._thread.start()
        self._send(Start(config))
        return await self._started

    @property
    def pid(self) -> int:
        return os.getpid()

    async def stop(self) -> None:
        self._stopping = True
        if self._thread is not None:
            self._inbox.put(None)
            await asyncio.to_thread(self._thread.join)
            # Let what the thread posted last reach this loop.
            await asyncio.sleep(0)

    def _send(self, message: ToEngine) -> None:
        self._inbox.put(message)
