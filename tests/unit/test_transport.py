"""What the engine does with what is on its socket and no message: it drops it or ends, and never hangs."""

from __future__ import annotations

import queue
import random
import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest

from server.engine import transport
from server.engine.loop import Inbox, _read
from server.engine.types import Abort, Submit, ToEngine
from tests.unit.engine_simulation import make_request

VALID = [Submit(make_request("a", [1, 2, 3], stop_token_ids=(4,))), Abort(["a", "b"])]


class Reader:
    """The engine's reading thread, and the other end of its socket."""

    def __init__(self) -> None:
        self.connection, self._theirs = socket.socketpair()
        self.inbox: Inbox = queue.SimpleQueue()
        self.thread = threading.Thread(target=_read, args=(self._theirs, self.inbox), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.connection.close()
        self.thread.join(10)
        self._theirs.close()

    def send(self, payload: bytes) -> None:
        self.connection.sendall(len(payload).to_bytes(transport.LENGTH_BYTES, "big") + payload)

    def received(self) -> list[ToEngine]:
        """All messages, once the thread has ended."""
        self.thread.join(10)
        assert not self.thread.is_alive()
        messages = []
        while (message := self.inbox.get(timeout=1)) is not None:
            messages.append(message)
        return messages  # type: ignore[return-value]  # nobody wakes it


@pytest.fixture
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.close()


@pytest.mark.covers("E11")
def test_garbage_in_a_frame_is_dropped_and_what_follows_is_taken(
    reader: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(0)
    good = [msgspec.msgpack.encode(message) for message in VALID]
    garbage = [b"", b"\xc1", b"\x80", b"\x81\xa4type\xa5Start", b"\x9f" * 10_000, b"\xa4\xff\xfe\xfd\xfc"]
    garbage += [b"\x82\xa4type\xa5Abort\xa1x" + b"\x91" * 100_000, b"\x80\x04\x95pickle."]
    garbage += [chance.randbytes(chance.randrange(1, 60)) for _ in range(500)]
    for _ in range(500):
        damaged = bytearray(chance.choice(good))
        damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        garbage.append(bytes(damaged))
    for payload in garbage:
        reader.send(payload)
    for message in VALID:
        reader.connection.sendall(transport.encode_frame(message))
    reader.connection.close()
    received = reader.received()
    assert received[-2:] == VALID
    assert all(isinstance(message, Submit | Abort) for message in received)
    assert caplog.text.count("dropped a message") == len(garbage) + 2 - len(received) > 600


@pytest.mark.covers("E11")
@pytest.mark.parametrize("size", [transport.MAX_FRAME_BYTES + 1, 0xFFFFFFFF])
def test_a_frame_too_long_to_be_one_ends_the_engine_without_being_read(
    reader: Reader, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    reader.connection.sendall(transport.encode_frame(VALID[1]) + size.to_bytes(4, "big"))
    assert reader.received() == [VALID[1]]
    assert f"a frame of {size} bytes was announced" in caplog.text


@pytest.mark.covers("E11")
@pytest.mark.parametrize("sent", [b"\x00\x00", b"\x00\x00\x00\x09abc"])
def test_a_frame_that_breaks_off_ends_the_engine(reader: Reader, sent: bytes) -> None:
    reader.connection.sendall(sent)
    reader.connection.close()
    assert reader.received() == []
