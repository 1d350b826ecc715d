"""Requests down to the bytes, for clients that behave as no library does."""

from __future__ import annotations

import http.client
import json
import socket
import struct
from typing import Any

from tests.api.support import LiveServer

GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"


def post(path: str, body: bytes, *, announced: int | None = None) -> bytes:
    """A POST as it is sent; `announced`: bytes of body that its header promises, if not what there are."""
    length = len(body) if announced is None else announced
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length}\r\n\r\n".encode() + body


def send_request(server: LiveServer, path: str = "/v1/completions", **fields: Any) -> socket.socket:
    """A connection that has sent a completion, unless `path` wants something else."""
    sock = server.connect()
    sock.sendall(post(path, json.dumps({"prompt": "ab", "max_tokens": 50, **fields}).encode()))
    return sock


def read_to_end(sock: socket.socket) -> bytes:
    """All that comes until the server closes the connection; closes it, too."""
    data = b""
    with sock:
        while received := sock.recv(65536):
            data += received
    return data


def response_of(sock: socket.socket) -> http.client.HTTPResponse:
    answer = http.client.HTTPResponse(sock)
    answer.begin()
    return answer


def is_closed(sock: socket.socket) -> bool:
    """Whether the server has closed the connection, or does within the socket's timeout."""
    try:
        while sock.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def reset(sock: socket.socket) -> None:
    """Close with RST, as a crashed client does."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
