"""Starts one engine, says when it answered first and what memory it takes, and ends all its processes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from benchmarks.load import first_model
from benchmarks.peers.environments import VLLMInstallation
from benchmarks.serve import free_port

MAX_SEQUENCES = 32
CONTEXT = 2048
"""Tokens of one sequence at most; the longest that the scenarios of all engines need is 1,025."""
START_LIMIT = 1800.0
"""Seconds. Some engines compile, and the largest model is 5 GB."""

_POLL_INTERVAL = 0.02


class ServerError(RuntimeError):
    """The engine did not come up; the message ends with what it wrote last."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How one engine is started."""

    command: tuple[str, ...]
    """Without the port."""
    health: str
    """The path that answers 200 once the engine can answer."""
    environment: Mapping[str, str] = field(default_factory=dict)

    def shown(self) -> str:
        """Variables and command for the reader: files by their names alone."""
        variables = [f"{name}={_names(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, *(Path(part).name if "/" in part else part for part in self.command)])


@dataclass(frozen=True, slots=True)
class RunningServer:
    url: str
    model: str
    process: subprocess.Popen[bytes]
    start_seconds: float
    """From the start of its process to the end of its first answer, one token."""

    def memory_bytes(self) -> int:
        """Proportional set size of all its processes: a page that n of them share counts one n-th in each."""
        root = psutil.Process(self.process.pid)
        return sum(process.memory_full_info().pss for process in (root, *root.children(recursive=True)))


def launch_ours(model: Path, options: tuple[str, ...] = ()) -> Launch:
    command = (sys.executable, "-m", "server", "serve", "--model", str(model), "--disable-access-log", *options)
    return Launch(command, "/readyz")


def launch_vllm(vllm: VLLMInstallation, model: Path, dtype: str, cache: Path) -> Launch:
    """Settings of its CPU documentation: a bounded KV cache, threads bound to cores, libraries preloaded."""
    last_core = len(os.sched_getaffinity(0)) - 1
    command = (
        *(
            str(vllm.python),
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(model),
            "--dtype",
            dtype,
        ),
        *("--max-model-len", str(CONTEXT), "--max-num-seqs", str(MAX_SEQUENCES)),
    )
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; 32 sequences of the scenarios take 1.4 in float32
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{last_core}",
        "LD_PRELOAD": ":".join(map(str, vllm.preload)),
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return Launch(command, "/health", environment)


def launch_llama_cpp(server: Path, model: Path) -> Launch:
    """As many slots as requests come at once, each with the whole context. Its cache of whole prompts in main
    memory is off, since no prompt comes twice.
    """
    threads = str(len(os.sched_getaffinity(0)))
    command = (
        *(str(server), "-m", str(model), "-t", threads, "-tb", threads),
        *("-np", str(MAX_SEQUENCES), "-c", str(MAX_SEQUENCES * CONTEXT), "-cram", "0"),
    )
    return Launch(command, "/health")


@asynccontextmanager
async def serving(launch: Launch, log: Path) -> AsyncIterator[RunningServer]:
    """Start the engine on a free port, its output in `log`; end it on leaving. Raises ServerError."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    started = time.perf_counter()
    process = _start(launch, port, log)
    try:
        model = await _first_answer(url, launch.health, process)
        yield RunningServer(url, model, process, time.perf_counter() - started)
    except ServerError as error:
        raise ServerError(f"{launch.shown()} {error}; it wrote last:\n{_tail(log)}") from error
    finally:
        _end(process)


def _start(launch: Launch, port: int, log: Path) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            [*launch.command, "--port", str(port)],
            env=os.environ | launch.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


async def _first_answer(url: str, health: str, process: subprocess.Popen[bytes]) -> str:
    """Wait until the engine has answered a request, and return the name of its model."""
    deadline = time.monotonic() + START_LIMIT
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=START_LIMIT) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                break
            try:
                if (await client.get(health)).status_code == 200:
                    model = await first_model(url)
                    body = {"model": model, "prompt": "One", "max_tokens": 1, "temperature": 0}
                    (await client.post("/v1/completions", json=body)).raise_for_status()
                    return model
            except httpx.TransportError:
                pass  # The port is not open yet, or the engine drops what comes too early.
            await asyncio.sleep(_POLL_INTERVAL)
    if process.poll() is not None:
        raise ServerError(f"ended with exit code {process.returncode}")
    raise ServerError(f"did not answer within {START_LIMIT:g} s")


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-2000:]


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the first process, then SIGKILL to whatever is left of its family."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=30)


def _names(value: str) -> str:
    return ":".join(Path(part).name if "/" in part else part for part in value.split(":"))
