"""`gemma-server run-batch`: a batch without a server, from a file of requests to a file of results.

Laws:
1. A line of output is written whole, when its request is answered. An output file that was begun is gone on
   with, and no request that has a line there is computed again.
2. Nothing but results goes to the output, which may be the standard one.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from server import logs
from server.batches.lines import (
    LINE_OVERHEAD_BYTES,
    Line,
    Result,
    check_lines,
    parse_line,
    read_lines,
    success_or_failure,
)
from server.batches.patience import final_answer
from server.config import OptionError, load_config
from server.options import ServerConfig

if TYPE_CHECKING:
    from server.api.dispatch import RouteRequests
    from server.moderation import Policy
    from server.runtime import Runtime
    from server.tracing import RequestTracer

USAGE = """\
usage: gemma-server run-batch INPUT OUTPUT [options]

Answers the requests in INPUT, one JSON object in each line as in OpenAI's batches:

  {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {...}}

and writes a line of OUTPUT for each as soon as it is answered. If OUTPUT is there, what it has is kept, and
only the rest is computed. `-` is the standard input or output. The options are those of `gemma-server serve`.

The exit code is 0 if every request succeeded, 1 if one failed, and 65 if INPUT cannot be used."""

EXIT_FAILURES = 1
EXIT_BAD_USAGE = 2
POLL_SECONDS = 0.05
BUSY_SECONDS = 0.1
RESULT_START = b'{"id":"batch_req_'
QUEUED_PER_SEAT = 2
"""Requests on their way for each that the engine computes, so that it always has a next one."""


def run_batch(arguments: Sequence[str]) -> int:
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if len(arguments) < 2 or any(each.startswith("-") and each != "-" for each in arguments[:2]):
        print(USAGE, file=sys.stderr)
        return EXIT_BAD_USAGE
    from server.moderation import load_policies
    from server.tracing import RequestTracer

    try:
        config = load_config(arguments[2:])
        policies = load_policies(config.moderation_policies)
        tracer = None if config.otlp_traces_endpoint is None else RequestTracer(config.otlp_traces_endpoint)
    except OptionError as error:
        return _fail(str(error), os.EX_CONFIG)
    logs.configure(config.log_level, config.log_format, "front")
    # What is about single requests would drown the progress.
    logging.getLogger("server.api").setLevel(logging.WARNING)
    try:
        with (
            _seekable(arguments[0]) as source,
            _opened_output(arguments[1], source) as (output, answered),
        ):
            return _answer(config, policies, tracer, source, output, answered)
    except _InputError as error:
        return _fail(str(error), os.EX_DATAERR)
    except OSError as error:
        return _fail(str(error), os.EX_IOERR)
    except KeyboardInterrupt:
        return 130


class _InputError(ValueError):
    pass


@contextmanager
def _seekable(name: str) -> Iterator[BinaryIO]:
    if name != "-":
        with Path(name).open("rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as file:
        while data := sys.stdin.buffer.read(1 << 20):
            file.write(data)
        file.seek(0)
        yield file


@contextmanager
def _opened_output(name: str, source: BinaryIO) -> Iterator[tuple[BinaryIO, dict[str, bool]]]:
    """The output at its end and, of each request that has a line there, whether it succeeded."""
    if name == "-":
        yield sys.stdout.buffer, {}
        return
    answered: dict[str, bool] = {}
    with Path(name).open("a+b") as file:
        if os.path.sameopenfile(source.fileno(), file.fileno()):
            raise _InputError("INPUT and OUTPUT are one file")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _InputError(f"{name}: another process writes it") from None
        file.seek(0)
        whole = 0  # bytes
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n") and RESULT_START.startswith(raw[: len(RESULT_START)]):
                break  # a process died while it wrote this
            whole += len(raw)
            try:
                line = _outputs.decode(raw)
            except msgspec.DecodeError:
                raise _InputError(f"{name}: line {number} is not the result of a batch") from None
            answered[line.custom_id] = line.response is not None and 200 <= line.response.status_code < 300
        file.truncate(whole)
        yield file, answered


def _answer(
    config: ServerConfig,
    policies: Sequence[Policy],
    tracer: RequestTracer | None,
    source: BinaryIO,
    output: BinaryIO,
    answered: dict[str, bool],
) -> int:
    # These take a second, which mistakes in the arguments need not wait for.
    from server.api.dispatch import post_paths
    from server.api_keys import KeyRing
    from server.app import BATCH_ROUTERS, create_app
    from server.frontend.process_client import ProcessClient
    from server.runtime import Runtime

    max_bytes = config.max_body_bytes + LINE_OVERHEAD_BYTES
    total, errors = check_lines(
        source, max_bytes=max_bytes, max_lines=sys.maxsize, urls=post_paths(BATCH_ROUTERS), models=None
    )
    if errors:
        raise _InputError("\n".join(f"line {error.line}: {error.message}" for error in errors))
    runtime = Runtime(config, ProcessClient(config))
    no_keys = KeyRing(load_config([], {}))  # nobody connects
    app = create_app(runtime, policies=policies, keys=no_keys, tracer=tracer)
    requests: RouteRequests = app.state.requests
    source.seek(0)
    lines = (
        line
        for number, raw in read_lines(source, max_bytes)
        if (line := parse_line(number, raw)).custom_id not in answered
    )
    run = _Run(requests, output, _Progress(total, answered.values()))
    try:
        exit_code = asyncio.run(_with_engine(runtime, run, lines))
    finally:
        if tracer is not None:
            tracer.close()
    return exit_code or (EXIT_FAILURES if run.progress.num_failed else 0)


async def _with_engine(runtime: Runtime, run: _Run, lines: Iterator[Line]) -> int:
    """The exit code of an engine that failed, or 0."""
    failed = asyncio.Event()
    runtime.on_failure = failed.set
    await runtime.start()
    try:
        while runtime.model is None and not failed.is_set():  # noqa: ASYNC110  # nobody tells when
            await asyncio.sleep(POLL_SECONDS)
        if runtime.model is not None:
            working = asyncio.create_task(run.answer(lines, QUEUED_PER_SEAT * runtime.model.info.max_num_seqs))
            ending = asyncio.create_task(failed.wait())
            await asyncio.wait((working, ending), return_when=asyncio.FIRST_COMPLETED)
            ending.cancel()
            if failed.is_set():
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)
            else:
                await working
        return runtime.exit_code
    finally:
        await runtime.stop()


class _Run:
    """Answers lines, several at a time, and writes what comes of them."""

    def __init__(self, requests: RouteRequests, output: BinaryIO, progress: _Progress) -> None:
        self._requests = requests
        self._output = output
        self.progress = progress

    async def answer(self, lines: Iterator[Line], concurrency: int) -> None:
        """All of `lines`, which each worker takes its next one from. Raises OSError for the output's sake."""

        async def work() -> None:
            for line in lines:
                result = await self._result(line)
                self._output.write(result.line)
                self._output.flush()
                self.progress.add(result)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(work())
        except BaseExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        finally:
            self.progress.end()

    async def _result(self, line: Line) -> Result:
        answer = await final_answer(lambda: self._requests.answer(line.url, line.body, ""), BUSY_SECONDS)
        return success_or_failure(line, answer)


class _Progress:
    """One line on a terminal; nothing where the standard error is none."""

    def __init__(self, total: int, before: Iterable[bool]) -> None:
        """before: of each request that was answered by an earlier run, whether it succeeded."""
        kept = list(before)
        self._total = total
        self._num_kept = self._num_done = len(kept)
        self.num_failed = kept.count(False)
        self._num_tokens = 0
        self._started = time.monotonic()
        self._shown_at = 0.0
        self._is_shown = sys.stderr.isatty()

    def add(self, result: Result) -> None:
        self._num_done += 1
        self.num_failed += not result.is_success
        self._num_tokens += result.tokens.generated
        now = time.monotonic()
        if self._is_shown and (now - self._shown_at > 0.1 or self._num_done == self._total):
            self._shown_at = now
            print(f"\r\x1b[K{self._text(now - self._started)}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._is_shown:
            print(file=sys.stderr)

    def _text(self, seconds: float) -> str:
        left = (self._total - self._num_done) * seconds / (self._num_done - self._num_kept)
        failed = f", {self.num_failed} failed" if self.num_failed else ""
        return (
            f"{self._num_done} of {self._total} requests{failed}, {self._num_tokens / seconds:.0f} tokens/s, "
            f"{int(left) // 60}:{int(left) % 60:02} left"
        )


class _Response(msgspec.Struct):
    status_code: int = 0


class _Written(msgspec.Struct):
    custom_id: str
    response: _Response | None = None


_outputs = msgspec.json.Decoder(_Written)


def _fail(message: str, exit_code: int) -> int:
    print(f"gemma-server run-batch: {message}", file=sys.stderr)
    return exit_code
