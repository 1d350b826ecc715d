"""What every transport of the engine does alike, driven without an engine."""

from __future__ import annotations

import asyncio

import pytest

from server.engine.types import (
    Abort,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    SequenceOutput,
    StepOutput,
    StepStats,
    Submit,
    ToEngine,
    TokenLogprob,
)
from server.frontend.client import EngineDeadError
from server.frontend.mailbox import MailboxClient, merge


class RecordingClient(MailboxClient):
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[ToEngine] = []

    def _send(self, message: ToEngine) -> None:
        self.sent.append(message)

    def deliver(self, *outputs: SequenceOutput) -> None:
        self._deliver(StepOutput(list(outputs), StepStats()))

    def die(self, reason: str) -> None:
        self._die(reason)


def make_request(request_id: str = "a") -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id, prompt_token_ids=[2, 3], params=SamplingParams(max_tokens=4, seed=0)
    )


async def collect(client: MailboxClient, request: GenerateRequest) -> list[SequenceOutput]:
    return [output async for output in client.generate(request)]


async def test_outputs_that_wait_are_merged_into_one() -> None:
    client = RecordingClient()
    reader = asyncio.create_task(collect(client, make_request()))
    await asyncio.sleep(0)
    client.deliver(SequenceOutput(request_id="a", token_ids=[5], num_cached_tokens=7, scheduled_at=1.0))
    client.deliver(SequenceOutput(request_id="a", token_ids=[6], finish_reason=FinishReason.LENGTH))
    assert await reader == [
        SequenceOutput(
            request_id="a",
            token_ids=[5, 6],
            finish_reason=FinishReason.LENGTH,
            num_cached_tokens=7,
            scheduled_at=1.0,
        )
    ]
    assert client.sent == [Submit(make_request())]


async def test_a_reader_that_leaves_aborts_its_sequence_and_no_other() -> None:
    client = RecordingClient()
    stream, other = client.generate(make_request("a")), asyncio.create_task(collect(client, make_request("b")))
    await asyncio.sleep(0)
    first = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    client.deliver(SequenceOutput(request_id="a", token_ids=[5]))
    await first
    await stream.aclose()
    client.deliver(SequenceOutput(request_id="a", token_ids=[6]), SequenceOutput(request_id="b", token_ids=[7]))
    client.deliver(SequenceOutput(request_id="b", token_ids=[8], finish_reason=FinishReason.STOP))
    assert [output.token_ids for output in await other] == [[7, 8]]
    assert [message for message in client.sent if isinstance(message, Abort)] == [Abort(["a"])]


async def test_a_cancelled_reader_aborts_its_sequence() -> None:
    client = RecordingClient()
    reader = asyncio.create_task(collect(client, make_request()))
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert client.sent[-1] == Abort(["a"])


async def test_a_request_that_cannot_be_sent_leaves_no_mailbox() -> None:
    class Mute(RecordingClient):
        def _send(self, message: ToEngine) -> None:
            if isinstance(message, Submit):
                raise OverflowError("no such integer in msgpack")

    client = Mute()
    with pytest.raises(OverflowError):
        await collect(client, make_request())
    assert client._mailboxes == {}


async def test_a_dead_engine_ends_every_reader_after_what_it_had_said() -> None:
    client = RecordingClient()
    deaths: list[str] = []
    client.on_death = deaths.append
    stream = client.generate(make_request())
    first = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    client.deliver(SequenceOutput(request_id="a", token_ids=[5]))
    client.die("signal 9")
    client.die("again")
    assert (await first).token_ids == [5]
    with pytest.raises(EngineDeadError, match="signal 9"):
        await anext(stream)
    with pytest.raises(EngineDeadError, match="signal 9"):
        await collect(client, make_request("b"))
    assert deaths == ["signal 9"]
    assert not any(isinstance(message, Abort) for message in client.sent)


def test_merging_keeps_logprobs_in_order() -> None:
    one, two = TokenLogprob(5, -0.1, []), TokenLogprob(6, -0.2, [])
    first = SequenceOutput(request_id="a", token_ids=[5], logprobs=[one], prompt_logprobs=[None])
    merged = merge(first, SequenceOutput(request_id="a", token_ids=[6], logprobs=[two]))
    assert (merged.logprobs, merged.prompt_logprobs) == ([one, two], [None])
