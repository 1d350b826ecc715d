"""Where a request's outputs wait for its reader, and what every transport of the engine does alike.

Laws:
1. A mailbox exists from the submission of its request until its reader is done; later outputs are dropped.
2. Outputs that arrive faster than they are read are merged, so that a slow reader costs memory for its tokens
   and nothing else.
3. A reader that leaves before the terminal output causes exactly one Abort, if the engine knows its request.
4. An engine that ends takes along those that had an output. The others are sent to the next one, in their
   order: a reader never sees the beginning of two answers.
5. A request is begun by at most 1 + MAX_RERUNS engines that end before its first output. From the second on it
   is alone to blame: until that output nothing behind it is sent.
"""

from __future__ import annotations

import abc
import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Callable

import msgspec

from server.engine.types import (
    Abort,
    Began,
    EngineInfo,
    Failed,
    FromEngine,
    GenerateRequest,
    Heartbeat,
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
from server.frontend.client import (
    AbandonedError,
    CrashingSequenceError,
    EngineDeadError,
    EngineLoss,
    LossCause,
    SequenceLostError,
)

MAX_RERUNS = 1


def no_vocabulary() -> Vocabulary:
    """Of an engine that is sent no grammars."""
    raise NotImplementedError


class _Mailbox:
    __slots__ = (
        "_arrived",
        "_error",
        "_pending",
        "has_begun",
        "has_output",
        "is_over",
        "is_sent",
        "num_crashes",
        "request",
    )

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.is_sent = False
        """Whether the present engine has the request."""
        self.has_begun = False
        """Whether it has begun with it."""
        self.has_output = False
        self.is_over = False
        """Whether its last output or an error has come."""
        self.num_crashes = 0
        """Engines that ended after they had begun with it."""
        self._pending: SequenceOutput | None = None
        self._error: EngineDeadError | None = None
        self._arrived = asyncio.Event()

    def put(self, output: SequenceOutput) -> None:
        self.has_output = True
        self.is_over = output.finish_reason is not None
        self._pending = output if self._pending is None else merge(self._pending, output)
        self._arrived.set()

    def fail(self, error: EngineDeadError) -> None:
        self._error = error
        self.is_over = True
        self._arrived.set()

    async def get(self) -> SequenceOutput:
        await self._arrived.wait()
        self._arrived.clear()
        if self._pending is not None:
            output, self._pending = self._pending, None
            if self._error is not None:
                self._arrived.set()
            return output
        assert self._error is not None
        raise self._error


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
    """An EngineClient but for the transport: subclasses send messages and call `_deliver`, `_lose`, `_die`."""

    def __init__(self) -> None:
        self.on_loading: Callable[[Loading], None] = lambda loading: None
        self.on_step: Callable[[StepStats], None] = lambda stats: None
        self.on_loss: Callable[[EngineLoss], None] = lambda loss: None
        self.on_return: Callable[[EngineInfo], None] = lambda info: None
        self.on_silence: Callable[[bool], None] = lambda is_silent: None
        self.on_death: Callable[[str], None] = lambda reason: None
        self.make_vocabulary: Callable[[], Vocabulary] = no_vocabulary
        self._making_vocabulary: asyncio.Task[None] | None = None
        self._vocabulary: Vocabulary | None = None
        self._mailboxes: dict[str, _Mailbox] = {}
        """In order of arrival."""
        self._unsent: deque[_Mailbox] = deque()
        """Those that no engine has, in the same order."""
        self._suspect: _Mailbox | None = None
        """Sent, without an output, and begun by an engine that ended."""
        self._is_up = True
        """Whether there is an engine to send requests to."""
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
            self._making_vocabulary = self._making_vocabulary or asyncio.create_task(self._make_vocabulary())
            await asyncio.shield(self._making_vocabulary)
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        mailbox = self._mailboxes[request.request_id] = _Mailbox(request)
        finished = False
        try:
            self._unsent.append(mailbox)
            self._send_unsent()
            while not finished:
                output = await mailbox.get()
                finished = output.finish_reason is not None
                yield output
        finally:
            del self._mailboxes[request.request_id]
            if mailbox in self._unsent:
                self._unsent.remove(mailbox)
            elif not finished and mailbox.is_sent and self._dead is None:
                self._send(Abort([request.request_id]))
            self._clear(mailbox)

    def abandon(self) -> None:
        for mailbox in self._mailboxes.values():
            mailbox.fail(AbandonedError())

    async def inspect(self, max_waiting: int) -> Snapshot:
        if self._dead is not None or not self._is_up:
            raise EngineDeadError(self._dead or "the engine is being replaced")
        number = next(self._numbers)
        answer: asyncio.Future[Snapshot] = asyncio.get_running_loop().create_future()
        self._inspections[number] = answer
        try:
            self._send(Inspect(number, max_waiting))
            return await answer
        finally:
            del self._inspections[number]

    async def _make_vocabulary(self) -> None:
        self._vocabulary = await asyncio.to_thread(self.make_vocabulary)
        if self._is_up:
            self._send(self._vocabulary)

    def _send_unsent(self) -> None:
        while self._unsent and self._is_up and self._suspect is None:
            mailbox = self._unsent.popleft()
            mailbox.is_sent = True
            if mailbox.num_crashes:
                self._suspect = mailbox
            self._send(Submit(mailbox.request))

    def _clear(self, mailbox: _Mailbox) -> None:
        """It can be suspected no more: it has had an output, or is over."""
        if mailbox is self._suspect:
            self._suspect = None
            self._send_unsent()

    def _deliver(self, message: FromEngine) -> None:
        match message:
            case StepOutput(outputs, stats):
                for output in outputs:
                    mailbox = self._mailboxes.get(output.request_id)
                    if mailbox is not None:
                        mailbox.put(output)
                        self._clear(mailbox)
                self.on_step(stats)
            case Began(request_ids):
                for request_id in request_ids:
                    mailbox = self._mailboxes.get(request_id)
                    if mailbox is not None:
                        mailbox.has_begun = True
            case Heartbeat():
                pass  # it did what it is for when it came
            case Snapshot():
                inspection = self._inspections.get(message.number)
                if inspection is not None and not inspection.done():
                    inspection.set_result(message)
            case Loading():
                self.on_loading(message)
            case Ready(info):
                self._take_up(info)
            case Failed(reason):
                self._die(reason)

    def _take_up(self, info: EngineInfo) -> None:
        if self._started is not None and not self._started.done():
            self._started.set_result(info)
            return
        if self._vocabulary is not None:
            self._send(self._vocabulary)
        self._is_up = True
        self.on_return(info)
        self._send_unsent()

    def _lose(self, cause: LossCause, reason: str) -> None:
        """The engine is gone and another one will come: end what it took along, and keep the rest."""
        self._is_up = False
        self._suspect = None
        open_ones = [mailbox for mailbox in self._mailboxes.values() if not mailbox.is_over]
        lost = [mailbox for mailbox in open_ones if mailbox.has_output]
        kept = [mailbox for mailbox in open_ones if not mailbox.has_output]
        for mailbox in lost:
            mailbox.fail(SequenceLostError(reason))
        blamed = [mailbox for mailbox in kept if mailbox.is_sent and mailbox.has_begun]
        if not blamed and not lost:
            # The end may have overtaken the word of the beginning.
            blamed = [mailbox for mailbox in kept if mailbox.is_sent]
        for mailbox in blamed:
            mailbox.num_crashes += 1
            if mailbox.num_crashes > MAX_RERUNS:
                mailbox.fail(CrashingSequenceError(reason))
                kept.remove(mailbox)
                lost.append(mailbox)
        for mailbox in self._mailboxes.values():
            mailbox.is_sent = mailbox.has_begun = False
        self._unsent = deque(kept)
        self._fail_inspections(reason)
        self.on_loss(EngineLoss(cause, reason, len(lost), len(kept)))

    def _fail_inspections(self, reason: str) -> None:
        for inspection in self._inspections.values():
            if not inspection.done():
                inspection.set_exception(EngineDeadError(reason))

    def _die(self, reason: str) -> None:
        if self._dead is not None:
            return
        self._dead = reason
        for mailbox in self._mailboxes.values():
            mailbox.fail(EngineDeadError(reason))
        self._fail_inspections(reason)
        if self._started is not None and not self._started.done():
            self._started.set_exception(EngineDeadError(reason))
        elif not self._stopping:
            self.on_death(reason)
