"""The engine behind both of its clients: in a process of its own, and in a thread."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path

import msgspec
import psutil
import pytest

from server.engine.types import (
    EngineConfig,
    FinishReason,
    GenerateRequest,
    Loading,
    SamplingParams,
    SequenceOutput,
    StepStats,
)
from server.frontend.client import EngineClient, EngineDeadError
from server.frontend.inproc_client import InprocClient
from server.frontend.mailbox import merge
from server.frontend.process_client import ProcessClient
from server.options import ServerConfig


class Watched:
    """A started client, and what it reported."""

    def __init__(self, client: EngineClient) -> None:
        self.client = client
        self.loading: list[Loading] = []
        self.steps: list[StepStats] = []
        self.deaths: list[str] = []
        client.on_loading = self.loading.append
        client.on_step = self.steps.append
        client.on_death = self.deaths.append

    async def run(self, request: GenerateRequest) -> SequenceOutput:
        whole: SequenceOutput | None = None
        async for output in self.client.generate(request):
            whole = output if whole is None else merge(whole, output)
        assert whole is not None
        return whole

    async def wait_idle(self) -> None:
        for _ in range(200):
            if self.steps and self.steps[-1].num_running == self.steps[-1].num_waiting == 0:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"the engine is not idle: {self.steps[-1]}")


def make_request(
    request_id: str, max_tokens: int = 8, prompt: tuple[int, ...] = (2, 70, 71)
) -> GenerateRequest:
    params = SamplingParams(max_tokens=max_tokens, seed=1, temperature=0.0)
    return GenerateRequest(request_id=request_id, prompt_token_ids=list(prompt), params=params)


def make_config(checkpoint: Path) -> EngineConfig:
    return EngineConfig(
        model_path=str(checkpoint), dtype="float32", device="cpu", num_threads=1, weight_cache=False
    )


def make_process_client() -> ProcessClient:
    return ProcessClient(ServerConfig(max_engine_restarts=0))


@pytest.fixture(params=[make_process_client, InprocClient])
async def engine(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> AsyncGenerator[Watched, None]:
    watched = Watched(request.param())
    info = await watched.client.start(make_config(tiny_checkpoint))
    assert (info.device, info.dtype, info.max_model_len) == ("cpu", "float32", 512)
    yield watched
    await watched.client.stop()
    assert watched.deaths == []


async def test_each_sequence_gets_its_tokens_and_one_end(engine: Watched) -> None:
    whole = await engine.run(make_request("a"))
    assert len(whole.token_ids) == 8
    assert whole.finish_reason is FinishReason.LENGTH
    crowd = await asyncio.gather(*(engine.run(make_request(f"b{index}")) for index in range(5)))
    assert {tuple(output.token_ids) for output in crowd} == {tuple(whole.token_ids)}
    assert {loading.stage for loading in engine.loading} >= {"weights"}
    assert sum(step.num_decode_tokens for step in engine.steps) == 6 * 7


async def test_a_reader_that_stops_frees_the_sequence(engine: Watched) -> None:
    stream = engine.client.generate(make_request("a", max_tokens=500))
    await anext(stream)
    await stream.aclose()
    await engine.wait_idle()
    assert engine.steps[-1].kv_usage == {"full": 0.0, "sliding": 0.0}
    assert sum(step.num_decode_tokens for step in engine.steps) < 400


@pytest.mark.covers("R18")
async def test_what_can_never_fit_is_ended_with_a_reason(engine: Watched) -> None:
    whole = await engine.run(make_request("a", prompt=(2,) * 512))
    assert whole.finish_reason is FinishReason.ERROR
    assert whole.error is not None
    assert "512" in whole.error


async def test_stopping_twice_is_stopping_once_and_ends_who_still_reads(engine: Watched) -> None:
    reader = asyncio.create_task(engine.run(make_request("a", max_tokens=500)))
    await asyncio.sleep(0.1)
    await engine.client.stop()
    await engine.client.stop()
    with pytest.raises(EngineDeadError):
        await reader


async def test_an_engine_tells_its_state_whether_it_has_work_or_none(engine: Watched) -> None:
    idle = await engine.client.inspect(10)
    assert (idle.running, idle.waiting, idle.num_steps) == ([], [], 0)
    assert {pool.num_held for pool in idle.pools.values()} == {0}
    request = msgspec.structs.replace(make_request("a", max_tokens=500), client_request_id="client-a")
    async with aclosing(engine.client.generate(request)) as outputs:
        await anext(outputs)
        first, second = await asyncio.gather(engine.client.inspect(10), engine.client.inspect(10))
        (running,) = first.running
        assert (running.request_id, running.client_request_id) == ("a", "client-a")
        assert running.num_prompt_tokens == 3
        assert running.num_computed_tokens == 2 + running.num_generated_tokens
        assert second.number != first.number
        assert min(pool.num_held for pool in first.pools.values()) > 0
    await engine.wait_idle()
    assert (await engine.client.inspect(10)).running == []


async def test_a_stopped_engine_tells_nothing_until_it_goes_on(tiny_checkpoint: Path) -> None:
    client = make_process_client()
    await client.start(make_config(tiny_checkpoint))
    os.kill(client.pid, signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.inspect(1), 0.2)
    os.kill(client.pid, signal.SIGCONT)
    await asyncio.wait_for(client.inspect(1), 10)
    os.kill(client.pid, signal.SIGSTOP)
    waiting = asyncio.create_task(client.inspect(1))
    await asyncio.sleep(0.01)
    os.kill(client.pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError):
        await waiting
    with pytest.raises(EngineDeadError):
        await client.inspect(1)
    await client.stop()


@pytest.mark.parametrize("kind", [make_process_client, InprocClient])
async def test_a_model_that_cannot_be_loaded_is_an_error_with_the_reason(
    kind: Callable[[], ProcessClient | InprocClient], tmp_path: Path
) -> None:
    watched = Watched(kind())
    with pytest.raises(EngineDeadError, match=r"config\.json"):
        await watched.client.start(make_config(tmp_path))
    await watched.client.stop()
    assert watched.deaths == []


async def test_an_engine_whose_messages_cannot_be_taken_in_counts_as_dead(tiny_checkpoint: Path) -> None:
    def fail(stats: StepStats) -> None:
        raise ZeroDivisionError("a bug")

    watched = Watched(make_process_client())
    await watched.client.start(make_config(tiny_checkpoint))
    watched.client.on_step = fail
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(watched.run(make_request("a", max_tokens=500)), 20)
    assert len(watched.deaths) == 1
    await watched.client.stop()


async def test_a_killed_engine_is_noticed(tiny_checkpoint: Path) -> None:
    watched = Watched(make_process_client())
    await watched.client.start(make_config(tiny_checkpoint))
    outputs = watched.client.generate(make_request("a", max_tokens=500))
    await anext(outputs)
    next(child for child in psutil.Process().children() if "server.engine.loop" in child.cmdline()).kill()
    with pytest.raises(EngineDeadError, match="signal 9"):
        async for _ in outputs:
            pass
    assert watched.deaths == ["the engine process ended with signal 9"]
    await watched.client.stop()
