"""What every transport of the engine does alike, driven without an engine."""

from __future__ import annotations

import asyncio

import pytest

from server.engine.types import (
    Abort,
    Began,
    FinishReason,
    GenerateRequest,
    Ready,
    SamplingParams,
    SequenceOutput,
    StepOutput,
    StepStats,
    Submit,
    ToEngine,
    TokenLogprob,
    Vocabulary,
)
from server.frontend.client import (
    CrashingSequenceError,
    EngineDeadError,
    EngineLoss,
    LossCause,
    SequenceLostError,
)
from server.frontend.mailbox import MailboxClient, merge
from tests.api.support import make_info


class RecordingClient(MailboxClient):
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[ToEngine] = []
        """To the present engine."""
        self.has_submitted = asyncio.Event()
        self.losses: list[EngineLoss] = []
        self.on_loss = self.losses.append

    def _send(self, message: ToEngine) -> None:
        self.sent.append(message)
        if isinstance(message, Submit):
            self.has_submitted.set()

    def deliver(self, *outputs: SequenceOutput) -> None:
        self._deliver(StepOutput(list(outputs), StepStats()))

    def die(self, reason: str) -> None:
        self._die(reason)

    def begin(self, *request_ids: str) -> None:
        self._deliver(Began(list(request_ids)))

    def finish(self, request_id: str) -> None:
        self.deliver(SequenceOutput(request_id=request_id, token_ids=[9], finish_reason=FinishReason.STOP))

    def lose(self) -> None:
        self._lose(LossCause.ENDED, "signal 9")

    def come_back(self) -> None:
        self.sent.clear()
        self._deliver(Ready(make_info()))

    @property
    def submitted(self) -> list[str]:
        return [message.request.request_id for message in self.sent if isinstance(message, Submit)]


def make_request(request_id: str = "a", grammar: str | None = None) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        prompt_token_ids=[2, 3],
        params=SamplingParams(max_tokens=4, seed=0, grammar=grammar),
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


# --- one engine after another --------------------------------------------------------------------------------


async def submit(client: MailboxClient, *request_ids: str) -> dict[str, asyncio.Task[list[SequenceOutput]]]:
    readers = {each: asyncio.create_task(collect(client, make_request(each))) for each in request_ids}
    await asyncio.sleep(0)
    return readers


@pytest.mark.covers("E01")
async def test_the_next_engine_gets_what_had_no_output_in_its_order() -> None:
    client = RecordingClient()
    readers = await submit(client, *"abcde")
    client.begin(*"abc")
    client.deliver(SequenceOutput(request_id="b", token_ids=[5]))
    client.finish("c")
    client.lose()
    readers |= await submit(client, "f")
    with pytest.raises(SequenceLostError, match="signal 9"):
        await readers["b"]
    assert (await readers["c"])[-1].finish_reason is FinishReason.STOP
    assert [(loss.num_lost, loss.num_kept) for loss in client.losses] == [(1, 3)]
    client.come_back()
    assert client.submitted == ["a"], "it was begun and is tried alone"
    client.deliver(SequenceOutput(request_id="a", token_ids=[5]))
    assert client.submitted == list("adef")
    for each in "adef":
        client.finish(each)
    assert [len(outputs) for outputs in await asyncio.gather(*(readers[each] for each in "adef"))] == [1] * 4


async def test_a_reader_that_leaves_while_there_is_no_engine_is_forgotten() -> None:
    client = RecordingClient()
    readers = await submit(client, *"ab")
    client.lose()
    readers["a"].cancel()
    await asyncio.wait([readers["a"]])
    client.come_back()
    client.finish("b")
    await readers["b"]
    assert client.sent == [Submit(make_request("b"))]
    assert client._mailboxes == {}


async def test_a_request_that_crashes_engines_is_given_up_and_those_behind_it_are_not() -> None:
    client = RecordingClient()
    readers = await submit(client, *"abpcd")
    client.begin(*"abp")
    client.lose()
    client.come_back()
    client.finish("a")
    client.finish("b")
    assert client.submitted == list("abp")
    client.begin("p")
    client.lose()
    with pytest.raises(CrashingSequenceError):
        await readers["p"]
    client.come_back()
    assert client.submitted == list("cd"), "nobody else is suspected"
    for each in "cd":
        client.finish(each)
    await asyncio.gather(*(readers[each] for each in "abcd"))


@pytest.mark.parametrize("end", ["leaves", "fails"])
async def test_a_suspect_that_ends_makes_way(end: str) -> None:
    client = RecordingClient()
    readers = await submit(client, *"ab")
    client.begin("a")
    client.lose()
    client.come_back()
    assert client.submitted == ["a"]
    if end == "leaves":
        readers["a"].cancel()
    else:
        client.deliver(SequenceOutput(request_id="a", finish_reason=FinishReason.ERROR, error="no"))
    await asyncio.wait([readers["a"]])
    assert client.submitted == list("ab")
    client.finish("b")
    await readers["b"]


async def test_a_crash_that_overtakes_the_word_of_the_beginning_is_still_somebody_s() -> None:
    client = RecordingClient()
    readers = await submit(client, "p")
    for _ in range(2):
        client.lose()
        client.come_back()
    with pytest.raises(CrashingSequenceError):
        await readers["p"]


async def test_who_only_waited_is_never_given_up() -> None:
    client = RecordingClient()
    readers = await submit(client, "a", "w")
    for number in range(5):
        stream = await submit(client, str(number))
        client.begin(str(number))
        client.deliver(SequenceOutput(request_id=str(number), token_ids=[5]))
        client.lose()
        await asyncio.wait(stream.values())
        stream[str(number)].exception()
        client.come_back()
        assert client.submitted[:2] == ["a", "w"]
    client.finish("a")
    client.finish("w")
    await asyncio.gather(*readers.values())


async def test_each_engine_gets_the_vocabulary_before_the_first_grammar() -> None:
    client = RecordingClient()
    vocabulary = Vocabulary(b"", b"", 1)
    made = 0

    def make_vocabulary() -> Vocabulary:
        nonlocal made
        made += 1
        return vocabulary

    client.make_vocabulary = make_vocabulary
    reader = asyncio.create_task(collect(client, make_request("a", grammar="start: /a/")))
    await client.has_submitted.wait()
    assert client.sent[0] == vocabulary
    client.lose()
    client.come_back()
    assert [type(message) for message in client.sent] == [Vocabulary, Submit]
    client.finish("a")
    await reader
    assert made == 1
