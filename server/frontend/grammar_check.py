"""Whether a grammar compiles, found out before its request is accepted.

A grammar is a client's program. It is first compiled in a child process, which may take as long as it may and
crash as it likes: the child is killed, and the client told. Laws:

1. The event loop never waits for the child, and at most `_MAX_WAITING` grammars do.
2. Only a grammar that has compiled is handed out: whatever else happens is an error.
3. The child starts with the first grammar, and ends with the front at the latest.
"""

from __future__ import annotations

import asyncio
import logging
import select
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from server.engine.types import Vocabulary
from server.errors import QueueFullError
from server.frontend.grammar_worker import Question, Verdict, read_frame, write_frame
from server.grammar_library import MAX_GRAMMAR_CHARS, GrammarError

logger = logging.getLogger(__name__)

COMPILE_SECONDS = 2.0
_START_SECONDS = 30.0
_MAX_WAITING = 16
_CACHED = 256
_CACHED_CHARS = 8 * MAX_GRAMMAR_CHARS


class GrammarChecker:
    def __init__(self, make_vocabulary: Callable[[], Vocabulary]) -> None:
        """make_vocabulary: called in a thread, for each child."""
        self._make_vocabulary = make_vocabulary
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-check")
        self._process: subprocess.Popen[bytes] | None = None
        self._num_waiting = 0
        self._cache: OrderedDict[Question, Verdict] = OrderedDict()

    async def check(self, question: Question) -> str:
        """The grammar, as the engine takes it. Raises GrammarError and QueueFullError."""
        verdict = self._cache.get(question)
        if verdict is None:
            verdict = await self._judge(question)
            self._cache[question] = verdict
        self._cache.move_to_end(question)
        while len(self._cache) > _CACHED or sum(len(asked.text) for asked in self._cache) > _CACHED_CHARS:
            self._cache.popitem(last=False)
        if verdict.error is not None:
            raise GrammarError(verdict.error)
        return verdict.grammar

    def close(self) -> None:
        """End the child, and with it the check that runs."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._end()

    async def _judge(self, question: Question) -> Verdict:
        if len(question.text) > MAX_GRAMMAR_CHARS:
            size = len(question.text)
            raise GrammarError(f"it has {size} characters; at most {MAX_GRAMMAR_CHARS} are allowed")
        if self._num_waiting >= _MAX_WAITING:
            raise QueueFullError(f"{self._num_waiting} grammars wait to be compiled, as many as may.")
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._ask, question)
        finally:
            self._num_waiting -= 1

    def _ask(self, question: Question) -> Verdict:
        """Raises GrammarError for what the child does not survive, which next time may be another matter."""
        process = self._process
        if process is None or process.poll() is not None:
            self._end()
            process = self._start()
        assert process.stdin is not None
        started = time.monotonic()
        try:
            write_frame(process.stdin, question)
            payload = _read(process, COMPILE_SECONDS)
        except (BrokenPipeError, TimeoutError):
            payload = None
        if payload is not None:
            return msgspec.msgpack.decode(payload, type=Verdict)
        in_time = time.monotonic() - started < COMPILE_SECONDS
        self._end()
        if in_time:
            raise GrammarError("it is too deep or too large to be compiled")
        raise GrammarError(f"it takes more than {COMPILE_SECONDS:.0f} seconds to compile")

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "server.frontend.grammar_worker"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._process = process
        assert process.stdin is not None
        try:
            write_frame(process.stdin, self._make_vocabulary())
            is_ready = _read(process, _START_SECONDS) is not None
        except (BrokenPipeError, TimeoutError):
            is_ready = False
        if not is_ready:
            self._end()
            raise RuntimeError("the process that checks grammars does not start")
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with process:  # waits, and closes the pipes
                pass


def _read(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """The next frame; None if the child has ended. Raises TimeoutError."""
    assert process.stdout is not None
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    if not poll.poll(seconds * 1000):
        raise TimeoutError
    return read_frame(process.stdout)
