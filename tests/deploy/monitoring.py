"""A real Prometheus that scrapes a real server, with the rules of deploy/observability."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.e2e.server_process import ServerProcess
from tools.gen_rules import RULES

SCALE = 15
"""The rules' times are divided by it, so that five minutes pass in twenty seconds."""
RATE_INTERVAL = "20s"


def scaled(rules: str) -> str:
    """The rules with shorter windows and waits; nothing else of them is touched."""

    def shorter(match: re.Match[str]) -> str:
        seconds = int(match["number"]) * {"m": 60, "h": 3600}[match["unit"]] // SCALE
        return f"{match['before']}{seconds}s"

    return re.sub(r"(?P<before>\[|for: )(?P<number>\d+)(?P<unit>[mh])", shorter, rules)


class Prometheus:
    def __init__(self, directory: Path, server_url: str, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        (directory / "rules.yml").write_text(scaled(RULES.read_text(encoding="utf-8")))
        config = yaml.safe_load((RULES.parent / "prometheus.yml").read_text(encoding="utf-8"))
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [server_url.removeprefix("http://")]
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={directory}/prometheus.yml",
                f"--storage.tsdb.path={directory}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def get(self, path: str, **parameters: str | float) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def query(self, expression: str) -> list[float]:
        """The values of an instant query, numbers only."""
        values = [float(each["value"][1]) for each in self.get("query", query=expression)["result"]]
        return [value for value in values if value == value]  # NaN is none

    def firing(self) -> set[str]:
        return {
            each["labels"]["alertname"] for each in self.get("alerts")["alerts"] if each["state"] == "firing"
        }


@contextmanager
def monitored(
    model: str, directory: Path, port: int, *options: str
) -> Iterator[tuple[ServerProcess, Prometheus]]:
    server = ServerProcess(model, *options)
    prometheus = None
    try:
        server.wait_port()
        prometheus = Prometheus(directory, server.url, port)
        server.wait_ready()
        yield server, prometheus
    finally:
        if prometheus is not None:
            prometheus.process.terminate()
            prometheus.process.wait()
        server.close()


@contextmanager
def load(server: ServerProcess, concurrency: int) -> Iterator[Callable[[int], None]]:
    """Streams with a common beginning, `concurrency` at a time, 32 at most; what is yielded changes that."""
    ended = threading.Event()
    running = concurrency

    def set_concurrency(wanted: int) -> None:
        nonlocal running
        running = wanted

    def ask(number: int) -> None:
        with server.client() as client:
            for turn in range(10**9):
                while number >= running and not ended.is_set():
                    time.sleep(0.1)
                if ended.is_set():
                    return
                prompt = "The rivers of Europe, in order of their length. " * 4 + f"{number} {turn}"
                body = {"prompt": prompt, "max_tokens": 8 + 5 * (turn % 9), "stream": True}
                with client.stream("POST", "/v1/completions", json=body) as answer:
                    for _ in answer.iter_lines():
                        pass

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    try:
        yield set_concurrency
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def wait_for(what: str, condition: Callable[[], bool], seconds: float) -> float:
    """Seconds until it held."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.5)
    return time.monotonic() - started


@contextmanager
def stopped(server: ServerProcess) -> Iterator[None]:
    """Its engine, for this time."""
    engine = server.engine
    engine.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        engine.send_signal(signal.SIGCONT)
