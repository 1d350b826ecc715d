"""`make chaos`: the engine is killed, stopped and crashed under load, again and again."""

from __future__ import annotations

import signal
import statistics
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.chaos.load import Load
from tests.e2e.server_process import ServerProcess, running_server

ATTACKS = (signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV, signal.SIGKILL, signal.SIGSTOP)
NUM_ATTACKS = 20
CONCURRENCY = 16
SECONDS_BETWEEN = 3.0
"""Of service, so that there is something to lose."""
ALLOWED_ENDS = {
    "complete",
    "complete stream",
    "503 engine_unavailable",
    "503 engine_lost",
    "stream, engine_lost",
    "500 engine_crashed",
    "stream, engine_crashed",
}
"""The last two: who was just beginning at two ends in a row is taken for the cause."""


def seconds_until(client: httpx.Client, *, ready: bool, limit: float = 60.0) -> float:
    started = time.monotonic()
    while (client.get("/readyz").status_code == 200) is not ready:
        assert time.monotonic() - started < limit, f"not {'ready' if ready else 'unready'} after {limit} s"
        assert client.get("/livez").status_code == 200
        time.sleep(0.01)
    return time.monotonic() - started


def attack(engine: psutil.Process, number: signal.Signals) -> float:
    """Seconds that the attack may take to be noticed, in which the server seems ready."""
    engine.send_signal(number)
    return 15.0 if number is signal.SIGSTOP else 2.0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.covers("E01", "E03")
def test_whatever_happens_to_the_engine_every_client_gets_an_end(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--dtype", "float32", "--num-threads", "1", "--engine-silence-timeout", "6")
    with running_server(tiny_checkpoint, *options) as server, server.client() as client:
        unnoticed, away = [], []
        with Load(server.url, CONCURRENCY) as load:
            for number in range(NUM_ATTACKS):
                time.sleep(SECONDS_BETWEEN)
                limit = attack(server.engine, ATTACKS[number % len(ATTACKS)])
                unnoticed.append(seconds_until(client, ready=False, limit=limit))
                away.append(seconds_until(client, ready=True))
            time.sleep(SECONDS_BETWEEN)
        with capsys.disabled():
            print(_summary(load, server, unnoticed, away))
        assert load.faults == []
        assert set(load.ends) <= ALLOWED_ENDS
        assert min(load.ends["complete"], load.ends["complete stream"]) > NUM_ATTACKS
        assert server.metric("gemma_engine_restarts_total") == NUM_ATTACKS
        assert server.metric("gemma_engine_sequences_rerun_total") > 0
        for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            server.wait_metric(f"vllm:{gauge}", 0)
        assert server.metric("gemma_sse_open_streams") == 0


def _summary(load: Load, server: ServerProcess, unnoticed: list[float], away: list[float]) -> str:
    rows = [
        ("engines ended", f"{NUM_ATTACKS}: {', '.join(each.name for each in ATTACKS)}, over and over"),
        ("clients", f"{CONCURRENCY}, half of them streaming"),
        ("until not ready", _spread([seconds for seconds in unnoticed if seconds < 2.0])),
        ("  if stopped", _spread([seconds for seconds in unnoticed if seconds >= 2.0])),
        ("until ready again", _spread(away)),
        ("run by the next engine", f"{server.metric('gemma_engine_sequences_rerun_total'):.0f}"),
        *((f"ended: {end}", str(count)) for end, count in sorted(load.ends.items())),
        ("faults", str(len(load.faults))),
    ]
    return "\n" + "\n".join(f"{name:<32}{value}" for name, value in rows)


def _spread(seconds: list[float]) -> str:
    return f"{min(seconds):.2f} / {statistics.median(seconds):.2f} / {max(seconds):.2f} s (min / median / max)"
