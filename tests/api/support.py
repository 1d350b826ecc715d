"""A server over an engine that follows a script, and a client's view of it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
from fastapi import FastAPI

from server.app import create_app
from server.batches.store import Store
from server.engine.types import (
    EngineConfig,
    EngineInfo,
    FinishReason,
    GenerateRequest,
    Loading,
    PromptTokenLogprob,
    SamplingParams,
    SequenceOutput,
    Snapshot,
    StepStats,
    TokenLogprob,
)
from server.frontend.client import AbandonedError, EngineDeadError, EngineLoss
from server.frontend.mailbox import no_vocabulary
from server.frontend.served_model import ServedModel
from server.http_server import HttpServer
from server.options import ServerConfig
from server.runtime import Phase, Runtime, end_token_ids
from server.tokenizer import Tokenizer
from server.tracing import RequestTracer
from tests.fixtures_tokenizers import make_tiny_tokenizer

MODEL = "google/gemma-tiny"
ADMIN_KEY = "an-admin's"
ALIAS = "tiny"
TOKENIZER = make_tiny_tokenizer()
VOCAB_SIZE = TOKENIZER.vocab_size
MAX_MODEL_LEN = 64
MAX_SEQUENCE_TOKENS = 60
EOS = TOKENIZER.eos_id
END_OF_TURN = TOKENIZER.end_of_turn_id


@dataclass
class Script:
    """What the engine does with every request until the next test."""

    text: str = "ab user 日 model"
    token_ids: list[int] | None = None
    """Instead of the text's."""
    delay: float = 0.0
    """Seconds before each token."""
    ends_with_stop: bool = True
    """Whether an end-of-turn token follows the text; else it starts over until `max_tokens`."""
    error_after: int | None = None
    """Tokens after which the engine gives up on a sequence."""
    death_after: int | None = None
    """Tokens after which the engine dies."""
    death: type[EngineDeadError] = EngineDeadError
    crash_after: int | None = None
    """Tokens after which something unforeseen happens."""
    cached_tokens: int = 0
    logprob: float = -0.5
    logprob_of_seed: dict[int, float] = field(default_factory=dict)
    """Of each generated token of a sequence with this seed, instead of `logprob`."""
    tokens_per_output: int = 1
    crash: Exception = field(default_factory=lambda: ZeroDivisionError("secret /path"))
    """What happens then."""
    inspection_error: Exception | None = None


class FakeEngineClient:
    def __init__(self) -> None:
        self.on_loading: Callable[[Loading], None] = lambda loading: None
        self.on_step: Callable[[StepStats], None] = lambda stats: None
        self.on_loss: Callable[[EngineLoss], None] = lambda loss: None
        self.on_return: Callable[[EngineInfo], None] = lambda info: None
        self.on_silence: Callable[[bool], None] = lambda is_silent: None
        self.on_death: Callable[[str], None] = lambda reason: None
        self.make_vocabulary = no_vocabulary
        self.script = Script()
        self.submitted: list[GenerateRequest] = []
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self.is_stopped = False
        self._abandoned = asyncio.Event()
        self.pid = os.getpid()
        self.snapshot = Snapshot(
            number=0,
            running=[],
            waiting=[],
            num_waiting=0,
            pools={},
            num_steps=0,
            last_step_ago=None,
            step_seconds=[],
        )

    def abandon(self) -> None:
        self._abandoned.set()

    async def start(self, config: EngineConfig) -> EngineInfo:
        raise NotImplementedError

    async def stop(self) -> None:
        self.is_stopped = True

    async def inspect(self, max_waiting: int) -> Snapshot:
        if self.script.inspection_error is not None:
            raise self.script.inspection_error
        await asyncio.sleep(self.script.delay)
        return self.snapshot

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[SequenceOutput, None]:
        self.submitted.append(request)
        self.running.add(request.request_id)
        finished = False
        try:
            async for output in self._outputs(request):
                finished = output.finish_reason is not None
                yield output
        except EngineDeadError:
            finished = True
            raise
        finally:
            self.running.remove(request.request_id)
            if not finished:
                self.aborted.append(request.request_id)

    async def _outputs(self, request: GenerateRequest) -> AsyncGenerator[SequenceOutput, None]:
        script, params = self.script, request.params
        scheduled_at = time.monotonic()
        pending: list[int] = []
        for number, token_id in enumerate(self._token_ids()):
            with suppress(TimeoutError):
                async with asyncio.timeout(script.delay):
                    await self._abandoned.wait()
                    raise AbandonedError
            if number == script.error_after:
                yield SequenceOutput(
                    request_id=request.request_id,
                    finish_reason=FinishReason.ERROR,
                    error="secret /path of a fault",
                )
                return
            if number == script.death_after:
                raise script.death("killed by signal 9 in /secret/path")
            if number == script.crash_after:
                raise script.crash
            pending.append(token_id)
            is_stop = token_id in params.stop_token_ids
            is_last = is_stop or number + 1 == params.max_tokens
            if len(pending) < script.tokens_per_output and not is_last:
                continue
            first = number < script.tokens_per_output
            yield SequenceOutput(
                request_id=request.request_id,
                token_ids=pending,
                logprobs=None
                if params.logprobs is None
                else [self._logprob(token, params) for token in pending],
                prompt_logprobs=None
                if params.prompt_logprobs is None or not first
                else [
                    None,
                    *(
                        self._prompt_logprob(token, params.prompt_logprobs)
                        for token in request.prompt_token_ids[1:]
                    ),
                ],
                finish_reason=(FinishReason.STOP if is_stop else FinishReason.LENGTH) if is_last else None,
                stop_token_id=token_id if is_stop else None,
                num_cached_tokens=script.cached_tokens,
                scheduled_at=scheduled_at,
            )
            pending = []
            if is_last:
                return

    def _token_ids(self) -> Iterator[int]:
        """The script's tokens, over and over."""
        ids = self.script.token_ids or TOKENIZER.encode_text(self.script.text)
        assert END_OF_TURN is not None
        while True:
            yield from ids
            if self.script.ends_with_stop:
                yield END_OF_TURN

    def _logprob(self, token_id: int, params: SamplingParams) -> TokenLogprob:
        named = [(named_id, -float(named_id)) for named_id in params.logprob_token_ids]
        logprob = self._logprob_of(params)
        return TokenLogprob(token_id, logprob, self._top(token_id, logprob, params.logprobs or 0) + named)

    def _prompt_logprob(self, token_id: int, num_top: int) -> PromptTokenLogprob:
        logprob = self.script.logprob
        return PromptTokenLogprob(token_id, logprob, self._top(token_id, logprob, num_top), rank=1)

    def _top(self, token_id: int, logprob: float, num_top: int) -> list[tuple[int, float]]:
        return [(token_id, logprob), (EOS, -9999.0)][:num_top]

    def _logprob_of(self, params: SamplingParams) -> float:
        return self.script.logprob_of_seed.get(params.seed, self.script.logprob)


class ScriptedRuntime(Runtime):
    """Loads when it is told to."""

    async def start(self) -> None: ...

    async def stop(self) -> None:
        self.grammars.close()
        await self.client.stop()

    def load(self, max_model_len: int = MAX_MODEL_LEN, tokenizer: Tokenizer = TOKENIZER) -> None:
        self.model = ServedModel(
            names=(MODEL, ALIAS),
            root="embedded",
            created=1_700_000_000,
            tokenizer=tokenizer,
            info=make_info(max_model_len, tokenizer.vocab_size),
            stop_token_ids=end_token_ids(tokenizer),
        )
        self.phase = Phase.READY
        self.metrics.set_model(self.model, 1.5, self.model.info.start_seconds)


def make_info(max_model_len: int = MAX_MODEL_LEN, vocab_size: int = VOCAB_SIZE) -> EngineInfo:
    return EngineInfo(
        device="cpu",
        dtype="float32",
        quantization="none",
        backend="reference",
        max_model_len=max_model_len,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_sequence_tokens=max_model_len - MAX_MODEL_LEN + MAX_SEQUENCE_TOKENS,
        vocab_size=vocab_size,
        block_size=16,
        num_blocks={"full": 40, "sliding": 20},
        kv_cache_bytes=1,
        weight_bytes=1,
        start_seconds={"weights": 0.5},
    )


class LiveServer:
    """A server on a real socket, its event loop in a thread."""

    def __init__(
        self,
        server: HttpServer,
        runtime: ScriptedRuntime,
        client: FakeEngineClient,
        port: int,
        thread: threading.Thread,
    ) -> None:
        self._thread = thread
        self.http_server = server
        self.runtime = runtime
        self.engine = client
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(
            base_url=self.url, timeout=20, event_hooks={"response": [check_reveals_nothing]}
        )

    @property
    def script(self) -> Script:
        return self.engine.script

    @property
    def app(self) -> FastAPI:
        app = self.http_server.config.app
        assert isinstance(app, FastAPI)
        return app

    @property
    def in_flight(self) -> int:
        in_flight: int = self.app.state.admission.in_flight
        return in_flight

    def chat(self, content: str = "ab", **fields: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": content}], **fields}
        return self.http.post("/v1/chat/completions", json=body)

    def complete(self, prompt: Any = "ab", **fields: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"prompt": prompt, **fields})

    def metric(self, series: str) -> float:
        """The value of a series, given with its labels; 0 if there is none."""
        for line in self.http.get("/metrics").text.splitlines():
            name, _, value = line.rpartition(" ")
            if name == series:
                return float(value)
        return 0.0

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def end(self) -> None:
        """End the server, whatever runs."""
        self.http_server.should_exit = True

    def drain(self) -> None:
        """What SIGTERM does, which cannot reach a server in a thread."""
        self.http_server.end()
        wait_until(lambda: self.runtime.is_draining)

    def wait_end(self, seconds: float = 10.0) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive()

    def assert_idle(self) -> None:
        """Soon nothing runs and no permit is held."""
        wait_until(lambda: not self.engine.running and self.in_flight == 0)


def fresh(live: LiveServer) -> Iterator[LiveServer]:
    """A fixture's server for one test: with a new script before, and idle again after it."""
    live.engine.script = Script()
    live.engine.submitted.clear()
    live.engine.aborted.clear()
    yield live
    live.assert_idle()


@contextmanager
def live_server(
    *,
    loaded: bool = True,
    max_model_len: int = MAX_MODEL_LEN,
    tokenizer: Tokenizer = TOKENIZER,
    tracer: RequestTracer | None = None,
    make_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
    **options: Any,
) -> Iterator[LiveServer]:
    engine = FakeEngineClient()
    config = ServerConfig(**options)
    runtime = ScriptedRuntime(config, engine)
    store = None
    if config.data_dir is not None:
        store = Store(config.data_dir, max_bytes=config.max_stored_bytes, max_files=config.max_stored_files)
    if loaded:
        runtime.load(max_model_len, tokenizer)
    # Named as TCP, or asyncio would leave Nagle's algorithm on, which costs each answer 40 ms.
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        server = HttpServer(create_app(runtime, store, tracer=tracer), runtime)

        def run() -> None:
            with asyncio.Runner(loop_factory=make_loop) as runner:
                runner.run(server.serve(sockets=[listener]))

        thread = threading.Thread(target=run, daemon=True)
        live = LiveServer(server, runtime, engine, port, thread)
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield live
        finally:
            live.http.close()
            live.end()
            live.wait_end()


def check_reveals_nothing(response: httpx.Response) -> None:
    """Of every error that any test of the API meets."""
    if response.status_code >= 400:
        response.read()
        asked = f"{response.request.url} {getattr(response.request, '_content', b'')!r}"
        revealed = [found for found in INSIDES.findall(response.text) if found not in asked]
        assert not revealed, f"an error tells of the server's insides: {response.text}"


INSIDES = re.compile(
    r"Traceback|, line \d|\.py\b|site-packages|0x[0-9a-f]{6}|object at 0x|<class|<function|tensor\(|torch\.|"
    r"dtype\(|server\.(?:api|engine|frontend)|pydantic|msgspec|starlette|llguidance|errno|\bErrno\b|\b\w+Exception\b|"
    r"\b(?:Value|Type|Key|Index|Attribute|Runtime|Assertion|ZeroDivision|OS|Unicode\w+)Error\b|"
    r"/(?:usr|home|root|tmp|opt|var|proc|etc|lib|mnt|srv)/|/secret"
)
"""Paths, addresses, types and pieces of tracebacks of ours."""


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


def events(response_text: str) -> list[str]:
    """The payloads of a stream's events, which are one line each, or comments, and end with one `[DONE]`."""
    payloads = []
    for block in response_text.removesuffix("\n\n").split("\n\n"):
        assert "\n" not in block, f"not one line: {block!r}"
        if block.startswith(": "):
            continue
        assert block.startswith("data: "), f"neither event nor comment: {block!r}"
        payloads.append(block.removeprefix("data: "))
    assert payloads.count("[DONE]") == 1
    assert payloads[-1] == "[DONE]"
    return payloads[:-1]


def named_events(response: httpx.Response) -> list[dict[str, Any]]:
    """The data of a stream whose events have names: those of their types."""
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(payload) for payload in events(response.text)]


def assert_error(
    response: httpx.Response, status: int, *, param: str | None = None, code: str | None = None
) -> str:
    """It is an error in OpenAI's shape; returns the message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert "Traceback" not in response.text
    assert "/secret" not in response.text
    if param is not None:
        assert error["param"] == param, error
    if code is not None:
        assert error["code"] == code, error
    message: str = error["message"]
    return message
