"""Where a request's outputs wait for its reader, and what every transport of the engine does alike.

Laws:
1. A mailbox exists from the submission of its request until its reader is done; later outputs are dropped.
2. Outputs that arrive faster than they are read are merged, so that a slow reader costs memory for its tokens
   and nothing else.
3. A reader that leaves before the terminal output causes exactly one Abort.
"""

from __future__ import annotations

import abc
import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable

import msgspec

from server.engine.types import (
    Abort,
    EngineInfo,
    Failed,
    FromEngine,
    GenerateRequest,
    Inspect,
    Loading,
    Ready,
    SequenceOutput,
    Snapshot,
    StepOutput,
    StepStats,
    Submit,
    ToEngine,
    Vocabulary,
)
from server.frontend.client import EngineDeadError


def no_vocabulary() -> Vocabulary:
    """Of an engine that is sent no grammars."""
    raise NotImplementedError


class _Mailbox:
    __slots__ = ("_arrived", "_error", "_pending")

    def __init__(self) -> None:
        self._pending: SequenceOutput | None = None
        self._error: str | None = None
        self._arrived = asyncio.Event()

    def put(self, output: SequenceOutput) -> None:
        self._pending = output if self._pending is None else merge(self._pending, output)
        self._arrived.set()

    def fail(self, reason: str) -> None:
        self._error = reason
        self._arrived.set()

    async def get(self) -> SequenceOutput:
        await self._arrived.wait()
        self._arrived.clear()
        if self._pending is not None:
            output, self._pending = self._pending, None
            if self._error is not None:
                self._arrived.set()
            return output
        raise EngineDeadError(self._error)


def merge(first: SequenceOutput, second: SequenceOutput) -> SequenceOutput:
    """One output that says what two consecutive ones of the same sequence say."""
    logprobs = None
    if first.logprobs is not None or second.logprobs is not None:
        logprobs = (first.logprobs or []) + (second.logprobs or [])
    return msgspec.structs.replace(
        second,
        token_ids=first.token_ids + second.token_ids,
        logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs or second.prompt_logprobs,
        num_cached_tokens=first.num_cached_tokens or second.num_cached_tokens,
        scheduled_at=first.scheduled_at or second.scheduled_at,
    )


class MailboxClient(abc.ABC):
    """An EngineClient but for the transport: subclasses send messages and call `_deliver` and `_die`."""

    def __init__(self) -> None:
        self.on_loading: Callable[[Loading], None] = lambda loading: None
        self.on_step: Callable[[StepStats], None] = lambda stats: None
        self.on_death: Callable[[str], None] = lambda reason: None
        self.make_vocabulary: Callable[[], Vocabulary] = no_vocabulary
        self._sending_vocabulary: asyncio.Task[None] | None = None
        self._mailboxes: dict[str, _Mailbox] = {}
        self._inspections: dict[int, asyncio.Future[Snapshot]] = {}
        self._numbers = itertools.count()
        self._started: asyncio.Future[EngineInfo] | None = None
        self._dead: str | None = None
        self._stopping = False

    @abc.abstractmethod
    def _send(self, message: ToEngine) -> None:
        """Hand one message to the engine; never blocks, and does nothing if the engine is gone."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[SequenceOutput, None]:
        if request.params.grammar is not None:
            # One task for all: a client that leaves meanwhile must not take it along.
            self._sending_vocabulary = self._sending_vocabulary or asyncio.create_task(self._send_vocabulary())
            await asyncio.shield(self._sending_vocabulary)
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        mailbox = self._mailboxes[request.request_id] = _Mailbox()
        finished = False
        try:
            self._send(Submit(request))
            while not finished:
                output = await mailbox.get()
                finished = output.finish_reason is not None
                yield output
        finally:
            del self._mailboxes[request.request_id]
            if not finished and self._dead is None:
                self._send(Abort([request.request_id]))

    async def inspect(self, max_waiting: int) -> Snapshot:
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        number = next(self._numbers)
        answer: asyncio.Future[Snapshot] = asyncio.get_running_loop().create_future()
        self._inspections[number] = answer
        try:
            self._send(Inspect(number, max_waiting))
            return await answer
        finally:
            del self._inspections[number]

    async def _send_vocabulary(self) -> None:
        self._send(await asyncio.to_thread(self.make_vocabulary))

    def _deliver(self, message: FromEngine) -> None:
        match message:
            case StepOutput(outputs, stats):
                for output in outputs:
                    mailbox = self._mailboxes.get(output.request_id)
                    if mailbox is not None:
                        mailbox.put(output)
                self.on_step(stats)
            case Snapshot():
                inspection = self._inspections.get(message.number)
                if inspection is not None and not inspection.done():
                    inspection.set_result(message)
            case Loading():
                self.on_loading(message)
            case Ready(info):
                if self._started is not None and not self._started.done():
                    self._started.set_result(info)
            case Failed(reason):
                self._die(reason)

    def _die(self, reason: str) -> None:
        if self._dead is not None:
            return
        self._dead = reason
        for mailbox in self._mailboxes.values():
            mailbox.fail(reason)
        for inspection in self._inspections.values():
            if not inspection.done():
                inspection.set_exception(EngineDeadError(reason))
        if self._started is not None and not self._started.done():
            self._started.set_exception(EngineDeadError(reason))
        elif not self._stopping:
            self.on_death(reason)
