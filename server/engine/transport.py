"""Frames on the socket between front and engine: a 4-byte big-endian length, then one msgpack message.

Only msgspec decodes them, against the closed unions of `server.engine.types`: no pickle on any socket.
"""

from __future__ import annotations

import socket
from typing import Any

import msgspec

from server.engine.types import FromEngine, ToEngine

LENGTH_BYTES = 4
MAX_FRAME_BYTES = 1 << 30
"""Several times what the logprobs of the longest prompts take; a length above is none."""

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


class FrameError(ValueError):
    """What is on the socket is no frame."""


def encode_frame(message: ToEngine | FromEngine) -> bytes:
    payload = _encoder.encode(message)
    return len(payload).to_bytes(LENGTH_BYTES, "big") + payload


def frame_size(header: bytes) -> int:
    """Bytes of the payload behind these LENGTH_BYTES. Raises FrameError."""
    size = int.from_bytes(header, "big")
    if size > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {size} bytes was announced; {MAX_FRAME_BYTES} is the limit")
    return size


def decode_to_engine(payload: bytes) -> ToEngine:
    """Raises msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError or RecursionError."""
    message: Any = _to_engine.decode(payload)
    return message  # type: ignore[no-any-return]  # msgspec's Decoder cannot express a union of structs


def decode_from_engine(payload: bytes) -> FromEngine:
    """Raises what `decode_to_engine` does."""
    message: Any = _from_engine.decode(payload)
    return message  # type: ignore[no-any-return]  # as above


def read_frame(connection: socket.socket) -> bytes | None:
    """The next frame's payload; None when the other side has closed. Blocks. Raises FrameError, OSError."""
    header = _read_exactly(connection, LENGTH_BYTES)
    return None if header is None else _read_exactly(connection, frame_size(header))


def _read_exactly(connection: socket.socket, size: int) -> bytes | None:
    received = bytearray()
    while len(received) < size:
        part = connection.recv(min(size - len(received), 1 << 20))
        if not part:
            return None
        received += part
    return bytes(received)
