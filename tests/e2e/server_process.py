"""The server as its users run it: a process, a port, signals."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

START_SECONDS = 90.0


class ServerProcess:
    """`gemma-server serve` on a free port, with its log in a file."""

    def __init__(
        self,
        model: Path | str,
        *options: str,
        port: int = 0,
        log: int | None = None,
        max_files: int | None = None,
    ) -> None:
        """log: a file descriptor, instead of the file that `log` reads and `wait_ready` needs to find the port
        if that is 0. max_files: as `ulimit -n`.
        """
        self._log = tempfile.NamedTemporaryFile(mode="w+", suffix=".log")  # noqa: SIM115  # closed by `close`
        command = [
            sys.executable,
            "-m",
            "server",
            "serve",
            "--model",
            str(model),
            "--port",
            str(port),
            *options,
        ]
        if max_files is not None:
            command = ["sh", "-c", f'ulimit -n {max_files}; exec "$@"', "sh", *command]
        # Checkpoints of tests last for a test, and their copies would stay.
        environment = {"GEMMA_SERVER_WEIGHT_CACHE": "false"} | os.environ
        output = self._log if log is None else log
        self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        self.url = f"http://127.0.0.1:{port}"

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text()

    @property
    def engine(self) -> psutil.Process:
        children = psutil.Process(self.process.pid).children()
        (engine,) = (child for child in children if "server.engine.loop" in child.cmdline())
        return engine

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60.0, **options)

    def wait_ready(self) -> None:
        """Waits for the port, then for the model. Fails with the log."""
        self.wait_port()
        self._until(self._is_ready, "readiness")

    def wait_port(self) -> None:
        if self.url.endswith(":0"):
            found = self._until(lambda: re.search(r"running on http://127\.0\.0\.1:(\d+)", self.log), "a port")
            self.url = f"http://127.0.0.1:{found[1]}"

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=60.0).status_code == 200
        except httpx.ConnectError:
            return False

    def wait_exit(self, seconds: float = 20.0) -> int:
        return self.process.wait(seconds)

    def assert_refuses(self, said: str) -> None:
        """It ends before it serves, and says so and why in one line."""
        assert self.wait_exit(60) == 78
        errors = [line for line in self.log.splitlines() if " ERROR " in line]
        assert len(errors) == 1
        assert said in errors[0]
        assert "Traceback" not in self.log

    def metric(self, name: str) -> float:
        """The sum of a metric's series."""
        with self.client() as client:
            lines = client.get("/metrics").text.splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if re.match(re.escape(name) + r"[{ ]", line)]
        assert values, f"no metric {name}"
        return sum(values)

    def wait_metric(self, name: str, value: float, seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while (found := self.metric(name)) != value:
            assert time.monotonic() < deadline, f"{name} is {found}, not {value}"
            time.sleep(0.05)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        self._log.close()

    def _until(self, condition: Any, what: str) -> Any:
        deadline = time.monotonic() + START_SECONDS
        while not (found := condition()):
            assert self.process.poll() is None, f"the server ended while {what} was awaited:\n{self.log}"
            assert time.monotonic() < deadline, f"no {what} within {START_SECONDS} s:\n{self.log}"
            time.sleep(0.05)
        return found


@contextmanager
def running_server(model: Path | str, *options: str) -> Iterator[ServerProcess]:
    server = ServerProcess(model, *options)
    try:
        server.wait_ready()
        yield server
    finally:
        server.close()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
