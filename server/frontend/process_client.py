"""The engine in a child process, and its supervisor: an engine that ends is replaced while the front stays up.

What becomes of the requests is the mailboxes' business. Laws:
1. At most one engine runs at a time, and the next one begins when the last one has ended.
2. The first engine is not replaced before it was ready: what kept it from it would keep the next one, too.
3. Engines that end one after another without having got anything done are given up on.
"""

from __future__ import annotations

import asyncio
import logging

from server.engine.types import EngineConfig, EngineInfo, Failed, FromEngine, Start, ToEngine
from server.frontend.client import LossCause
from server.frontend.engine_process import EngineProcess
from server.frontend.mailbox import MailboxClient
from server.frontend.watchdog import TICK_SECONDS, Restarts, Watchdog
from server.options import ServerConfig

logger = logging.getLogger(__name__)


class ProcessClient(MailboxClient):
    def __init__(self, config: ServerConfig) -> None:
        """Starts the first process, which imports what it needs while its owner finds out what to serve."""
        super().__init__()
        self._options = config
        self._process = self._new_process()
        self._restarts = Restarts(config.max_engine_restarts)
        self._supervising: asyncio.Task[None] | None = None

    def _new_process(self) -> EngineProcess:
        return EngineProcess(self._options.log_level, self._options.log_format)

    async def start(self, config: EngineConfig) -> EngineInfo:
        self._started = asyncio.get_running_loop().create_future()
        self._supervising = asyncio.create_task(self._supervise(self._started, Start(config)))
        return await self._started

    @property
    def pid(self) -> int:
        return self._process.pid

    def dump_stacks(self) -> None:
        """Have the engine print the stacks of its threads."""
        self._process.dump_stacks()

    async def stop(self) -> None:
        self._stopping = True
        if self._supervising is not None:
            self._supervising.cancel()
            await asyncio.gather(self._supervising, return_exceptions=True)
        if not self._is_up:
            self._process.kill(LossCause.ENDED, "the server was stopped")  # it would load on before it noticed
        await self._process.stop()
        self._die("the engine was stopped")

    def _send(self, message: ToEngine) -> None:
        self._process.send(message)

    async def _supervise(self, started: asyncio.Future[EngineInfo], start: Start) -> None:
        try:
            while True:
                cause, reason = await self._run(start)
                delay = self._restarts.ended() if started.done() else None
                if delay is None:
                    self._die(reason)
                    return
                self._lose(cause, reason)
                logger.info(
                    "the next engine starts in %.0f s; %d in a row have ended and had completed no request",
                    delay,
                    self._restarts.num_in_a_row,
                )
                await asyncio.sleep(delay)
                # Here and not in a thread: the kernel ends a process with the thread that made it.
                self._process = self._new_process()
        except Exception:  # no process to be had, or a bug: with no engine to come, every request would wait
            logger.exception("the engine cannot be replaced")
            self._die("the engine cannot be replaced")

    async def _run(self, start: Start) -> tuple[LossCause, str]:
        """From the present process's start to its end, and why it ended."""
        process = self._process
        watchdog = Watchdog(self._options.engine_silence_timeout, self._options.engine_step_timeout)

        def deliver(message: FromEngine) -> None:
            watchdog.heard(message)
            self._restarts.heard(message)
            if isinstance(message, Failed):
                process.kill(LossCause.ENDED, message.message)
            else:
                self._deliver(message)

        watching = asyncio.create_task(self._watch(process, watchdog))
        try:
            verdict = await process.run(start, deliver)
            await process.stop()
            return verdict
        finally:
            watching.cancel()

    async def _watch(self, process: EngineProcess, watchdog: Watchdog) -> None:
        was_silent = False
        while True:
            await asyncio.sleep(TICK_SECONDS)
            verdict = watchdog.tick()
            if watchdog.is_silent is not was_silent:
                was_silent = watchdog.is_silent
                self.on_silence(was_silent)
            if verdict is not None:
                process.kill(*verdict)
                return
