"""The sequences of one request, as one stream of what each of them adds.

Laws:
1. Whatever ends `deltas` (its end, an error, a deadline, a cancelled or closing reader), every sequence of the
   request has ended or been aborted when it returns. Permit and charge are the answering side's to give back,
   with `release`: a request whose client leaves early enough never reads `deltas`.
2. The last delta of each choice, and no other, has a `finish_reason`.
3. An error of one sequence ends the request: the others are aborted and the error is raised.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from server.engine.types import (
    FinishReason,
    GenerateRequest,
    PromptTokenLogprob,
    SamplingParams,
    SequenceOutput,
)
from server.errors import (
    ContradictionError,
    CrashingRequestError,
    DeadlineError,
    EngineUnavailableError,
    GenerationError,
    GenerationLostError,
    ShuttingDownError,
)
from server.frontend.accounts import Charge
from server.frontend.admission import Permit
from server.frontend.client import (
    AbandonedError,
    CrashingSequenceError,
    EngineClient,
    EngineDeadError,
    SequenceLostError,
)
from server.frontend.deadlines import Deadlines, within
from server.frontend.records import RequestRecord, SequenceRecord, UsageCounts
from server.frontend.request_state import RequestState, StopConditions, TextDelta
from server.metrics import RequestMetrics
from server.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

CHOICES_AT_ONCE = 32
"""Begun, before others have their turn on the event loop."""


@dataclass(frozen=True, slots=True)
class ChoiceRequest:
    """One sequence to generate. Its index among the request's is its place in the list."""

    prompt_index: int
    prompt_token_ids: list[int]
    sampling: SamplingParams
    stop: StopConditions
    skip_special_tokens: bool = True
    """Whether control tokens have no text."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose sequences they are, and what that means in the engine: see GenerateRequest."""

    tenant: str
    cache_salt: str
    priority: int
    client_request_id: str


class ChoiceDelta(msgspec.Struct, frozen=True):
    """What one choice gained."""

    index: int
    text: TextDelta
    prompt_logprobs: list[PromptTokenLogprob | None] | None
    """In the first delta of a choice, where asked for."""


class Generation:
    """Runs the sequences of one admitted request, once."""

    def __init__(
        self,
        choices: Sequence[ChoiceRequest],
        *,
        client: EngineClient,
        tokenizer: Tokenizer,
        metrics: RequestMetrics,
        permit: Permit,
        charge: Charge,
        arrival: float,
        deadlines: Deadlines,
        origin: Origin,
        on_end: Callable[[RequestRecord], None] | None = None,
    ) -> None:
        """`arrival`: `time.monotonic()` seconds at which the request came in. `on_end`: called once."""
        self._choices = [
            _Choice(
                index, request, client, tokenizer, metrics, self._prompt_computed, arrival, deadlines, origin
            )
            for index, request in enumerate(choices)
        ]
        self._waiting = {choice.prompt_index: len(choice.prompt_token_ids) for choice in choices}
        """Tokens of the prompts, by index, that no choice has gone on from yet."""
        self._permit = permit
        self._charge = charge
        self._metrics = metrics
        self._arrival = arrival
        self._client_request_id = origin.client_request_id
        self._on_end = on_end
        metrics.observe("request_params_n", sum(choice.prompt_index == 0 for choice in choices))

    def usage(self) -> UsageCounts:
        """What was spent so far. A prompt counts once, however many choices it has."""
        firsts = {choice.request.prompt_index: choice for choice in reversed(self._choices)}.values()
        return UsageCounts(
            prompt_tokens=sum(len(choice.request.prompt_token_ids) for choice in firsts),
            completion_tokens=sum(choice.state.num_generated for choice in self._choices),
            cached_tokens=sum(choice.state.num_cached_tokens for choice in firsts),
        )

    def mean_logprob(self, index: int) -> float:
        """Of the tokens that choice `index` has so far, where they have logprobs."""
        state = self._choices[index].state
        return state.sum_of_logprobs / max(state.num_generated, 1)

    async def deltas(self) -> AsyncGenerator[ChoiceDelta, None]:
        """What the choices gain, as it comes.

        Raises GenerationError, ContradictionError, EngineUnavailableError, ShuttingDownError, DeadlineError.
        """
        try:
            source = self._choices[0].deltas() if len(self._choices) == 1 else self._merged()
            async with aclosing(source):
                async for delta in source:
                    yield delta
        except CrashingSequenceError:
            raise CrashingRequestError from None
        except SequenceLostError:
            raise GenerationLostError from None
        except AbandonedError:
            raise ShuttingDownError("The server was shut down before the answer was complete.") from None
        except EngineDeadError:
            raise EngineUnavailableError from None
        except DeadlineError:
            self._metrics.timeouts.inc()
            raise

    def release(self) -> None:
        """Give permit and charge back. Once all is over; again does no harm."""
        self._permit.release()
        usage = self.usage()
        self._charge.settle(usage.prompt_tokens + usage.completion_tokens)
        if self._on_end is not None:
            sequences = [choice.record() for choice in self._choices]
            self._on_end(RequestRecord(self._client_request_id, self._arrival, usage, sequences))
            self._on_end = None

    def _prompt_computed(self, prompt_index: int) -> None:
        self._permit.computed(self._waiting.pop(prompt_index, 0))

    async def _merged(self) -> AsyncGenerator[ChoiceDelta, None]:
        # Bounded, so that a slow reader makes the outputs wait, and be merged, where the client holds them.
        queue: asyncio.Queue[ChoiceDelta | BaseException | None] = asyncio.Queue(maxsize=len(self._choices))

        async def pump(choice: _Choice) -> None:
            try:
                async with aclosing(choice.deltas()) as deltas:
                    async for delta in deltas:
                        await queue.put(delta)
                await queue.put(None)
            except Exception as error:  # whatever it is, it is raised again where the request is read
                await queue.put(error)

        pumps: list[asyncio.Task[None]] = []
        try:
            for choice in self._choices:
                pumps.append(asyncio.create_task(pump(choice)))
                if len(pumps) % CHOICES_AT_ONCE == 0:
                    await asyncio.sleep(0)
            num_running = len(pumps)
            while num_running:
                item = await queue.get()
                if item is None:
                    num_running -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)


class _Choice:
    """One sequence: its text, and the clock readings that its metrics are made of."""

    def __init__(
        self,
        index: int,
        request: ChoiceRequest,
        client: EngineClient,
        tokenizer: Tokenizer,
        metrics: RequestMetrics,
        on_first_token: Callable[[int], None],
        arrival: float,
        deadlines: Deadlines,
        origin: Origin,
    ) -> None:
        """`on_first_token` is called with the prompt's index."""
        self.index = index
        self.request = request
        self.state = RequestState(tokenizer, request.stop, skip_special_tokens=request.skip_special_tokens)
        self._client = client
        self._metrics = metrics
        self._on_first_token = on_first_token
        self._arrival = arrival
        self._deadlines = deadlines
        self._origin = origin
        self._finish_reason = FinishReason.ABORT
        self._scheduled_at = 0.0
        self._first_token_at = 0.0
        self._last_token_at = 0.0
        self._ended_at = 0.0

    async def deltas(self) -> AsyncGenerator[ChoiceDelta, None]:
        finish_reason = FinishReason.ABORT
        prompt_logprobs = None
        request = GenerateRequest(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=self.request.prompt_token_ids,
            params=self.request.sampling,
            cache_salt=self._origin.cache_salt,
            priority=self._origin.priority,
            tenant=self._origin.tenant,
            client_request_id=self._origin.client_request_id,
        )
        logger.debug(
            "request %s: sequence %s begins, prompt_tokens=%d max_tokens=%d",
            self._origin.client_request_id,
            request.request_id,
            len(request.prompt_token_ids),
            request.params.max_tokens,
        )
        try:
            # Closing the engine's outputs early, as after a stop string, aborts the sequence.
            source = self._client.generate(request)
            if self._deadlines:
                source = within(self._deadlines, self._arrival, source)
            async with aclosing(source) as outputs:
                async for output in outputs:
                    if output.finish_reason is FinishReason.ERROR:
                        finish_reason = FinishReason.ERROR
                        if output.is_contradictory:
                            raise ContradictionError(self.state.num_generated + len(output.token_ids))
                        logger.error(
                            "request %s: the engine gave sequence %s up: %s",
                            self._origin.client_request_id,
                            request.request_id,
                            output.error,
                        )
                        raise GenerationError("The engine could not complete this request.")
                    prompt_logprobs = prompt_logprobs or output.prompt_logprobs
                    num_before = self.state.num_generated
                    text = self.state.update(output)
                    self._observe_tokens(output, self.state.num_generated - num_before)
                    if text is None:
                        continue
                    if text.finish_reason is not None:
                        finish_reason = text.finish_reason
                    yield ChoiceDelta(self.index, text, prompt_logprobs)
                    prompt_logprobs = None
                    if text.finish_reason is not None:
                        return
        except EngineDeadError:
            finish_reason = FinishReason.ERROR
            raise
        finally:
            self._finish_reason = finish_reason
            self._ended_at = time.monotonic()
            self._observe_end(finish_reason)
            logger.debug(
                "request %s: sequence %s ends, reason=%s generated_tokens=%d cached_tokens=%d seconds=%.3f",
                self._origin.client_request_id,
                request.request_id,
                finish_reason,
                self.state.num_generated,
                self.state.num_cached_tokens,
                self._ended_at - self._arrival,
            )

    def record(self) -> SequenceRecord:
        """Once it is over."""
        is_whole = self._finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        return SequenceRecord(
            params=self.request.sampling,
            finish_reason=self._finish_reason,
            scheduled_at=self._scheduled_at,
            first_token_at=self._first_token_at,
            ended_at=self._last_token_at if is_whole else self._ended_at or time.monotonic(),
        )

    def _observe_tokens(self, output: SequenceOutput, num_new: int) -> None:
        self._scheduled_at = self._scheduled_at or output.scheduled_at
        if not num_new:
            return
        now = time.monotonic()
        metrics = self._metrics
        if not self._first_token_at:
            self._first_token_at = now
            self._on_first_token(self.request.prompt_index)
            metrics.prompt_tokens.inc(len(self.request.prompt_token_ids))
            metrics.observe("time_to_first_token_seconds", now - self._arrival)
        else:
            # An output that holds several tokens is several that were merged on the way.
            metrics.observe("inter_token_latency_seconds", (now - self._last_token_at) / num_new, num_new)
        self._last_token_at = now
        metrics.generation_tokens.inc(num_new)

    def _observe_end(self, finish_reason: FinishReason) -> None:
        metrics, num_generated = self._metrics, self.state.num_generated
        metrics.ended(finish_reason)
        if finish_reason is FinishReason.ABORT:
            metrics.aborted(has_begun=self._first_token_at > 0)
        metrics.observe("request_prompt_tokens", len(self.request.prompt_token_ids))
        metrics.observe("request_generation_tokens", num_generated)
        metrics.observe("request_params_max_tokens", self.request.sampling.max_tokens)
        if finish_reason not in (FinishReason.STOP, FinishReason.LENGTH) or not self._first_token_at:
            return
        scheduled_at = self._scheduled_at or self._first_token_at
        decode_seconds = self._last_token_at - self._first_token_at
        metrics.observe("e2e_request_latency_seconds", self._last_token_at - self._arrival)
        metrics.observe("request_queue_time_seconds", scheduled_at - self._arrival)
        metrics.observe("request_prefill_time_seconds", self._first_token_at - scheduled_at)
        metrics.observe("request_inference_time_seconds", self._last_token_at - scheduled_at)
        metrics.observe("request_decode_time_seconds", decode_seconds)
        if num_generated > 1:
            metrics.observe("request_time_per_output_token_seconds", decode_seconds / (num_generated - 1))
