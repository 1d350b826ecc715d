"""The engine in a child process, behind a socket pair.

End of file is death: both ends learn from the kernel at once that the other is gone, so there is no death
message to lose and no heartbeat to tune.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import sys

from server.engine import transport
from server.engine.types import EngineConfig, EngineInfo, Start, ToEngine
from server.frontend.mailbox import MailboxClient

logger = logging.getLogger(__name__)

STOP_SECONDS = 5.0
"""How long a child may take to end after its socket was closed, before it is killed."""


class ProcessClient(MailboxClient):
    def __init__(self, log_level: str = "info", log_format: str = "text") -> None:
        """Starts the process, which imports what it needs while its owner finds out what to serve."""
        super().__init__()
        self._connection, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "server.engine.loop"]
            command += ["--fd", str(theirs.fileno()), "--log-level", log_level, "--log-format", log_format]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._writer: asyncio.StreamWriter | None = None
        self._receiving: asyncio.Task[None] | None = None

    async def start(self, config: EngineConfig) -> EngineInfo:
        self._started = asyncio.get_running_loop().create_future()
        reader, self._writer = await asyncio.open_connection(sock=self._connection)
        self._receiving = asyncio.create_task(self._receive(reader))
        self._send(Start(config))
        return await self._started

    @property
    def pid(self) -> int:
        return self._process.pid

    def dump_stacks(self) -> None:
        """Have the engine print the stacks of its threads."""
        self._process.send_signal(signal.SIGUSR1)

    async def stop(self) -> None:
        self._stopping = True
        if self._receiving is not None:
            self._receiving.cancel()
        if self._writer is not None:
            self._writer.close()
        self._connection.close()
        try:
            await asyncio.to_thread(self._process.wait, STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        self._die("the engine was stopped")

    def _send(self, message: ToEngine) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(transport.encode_frame(message))

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                header = await reader.readexactly(transport.LENGTH_BYTES)
                payload = await reader.readexactly(int.from_bytes(header, "big"))
                self._deliver(transport.decode_from_engine(payload))
        except (asyncio.IncompleteReadError, OSError):
            code = await asyncio.to_thread(self._process.wait)
            self._die(f"the engine process ended with {_describe(code)}")
        except Exception:  # a bug; with nobody to receive, every request would wait for ever
            logger.exception("the engine's messages cannot be taken in")
            self._die("the engine cannot be understood")


def _describe(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
