"""One engine in a child process, behind a socket pair, from its start to its end.

End of file is death: both ends learn from the kernel at once that the other is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

from server.engine import transport
from server.engine.types import FromEngine, ToEngine
from server.frontend.client import LossCause

logger = logging.getLogger(__name__)

ENGINE_MODULE = "server.engine.loop"
STOP_SECONDS = 5.0
"""How long a child may take to end after its socket was closed, before it is killed."""


class EngineProcess:
    def __init__(self, log_level: str, log_format: str) -> None:
        """Starts the process, which imports what it needs while its owner finds out what to serve.

        To be called in a thread that lives as long as this process: the kernel ends the child with it.
        """
        self._connection, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", ENGINE_MODULE]
            command += ["--fd", str(theirs.fileno()), "--log-level", log_level, "--log-format", log_format]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._writer: asyncio.StreamWriter | None = None
        self._verdict: tuple[LossCause, str] | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    def dump_stacks(self) -> None:
        self._process.send_signal(signal.SIGUSR1)

    async def run(self, start: ToEngine, deliver: Callable[[FromEngine], None]) -> tuple[LossCause, str]:
        """Send `start`, and hand over what comes until the process has ended. Returns why it did."""
        reader, self._writer = await asyncio.open_connection(sock=self._connection)
        self.send(start)
        try:
            while True:
                header = await reader.readexactly(transport.LENGTH_BYTES)
                payload = await reader.readexactly(transport.frame_size(header))
                deliver(transport.decode_from_engine(payload))
        except (asyncio.IncompleteReadError, OSError):
            code = await self._wait()
            return self._verdict or (LossCause.ENDED, f"the engine process ended with {_describe(code)}")
        except Exception:  # garbage, or a bug: with nobody to receive, every request would wait for ever
            logger.exception("what the engine sent cannot be taken in")
            await self._kill_and_wait()
            return LossCause.GARBAGE, "the engine could not be understood"

    def send(self, message: ToEngine) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(transport.encode_frame(message))

    def kill(self, cause: LossCause, reason: str) -> None:
        """End it at once, for this reason, which `run` returns."""
        self._verdict = (cause, reason)
        self._process.kill()

    async def stop(self) -> None:
        """Have it end, and wait until it has. Again does no harm."""
        if self._writer is not None:
            self._writer.close()
        self._connection.close()
        await self._wait()

    async def _wait(self) -> int:
        """The exit code of a process that is ending, or is made to."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return await asyncio.to_thread(self._process.wait, STOP_SECONDS)
        return await self._kill_and_wait()

    async def _kill_and_wait(self) -> int:
        self._process.kill()
        return await asyncio.to_thread(self._process.wait)


def _describe(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
