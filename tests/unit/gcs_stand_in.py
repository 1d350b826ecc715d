"""A small Cloud Storage on a local port, with the faults that an emulator does not have."""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

BUCKET = "models"


@dataclass
class GcsStandIn:
    objects: dict[str, bytes] = field(default_factory=dict)
    """Of the bucket BUCKET."""
    generation: int = 7
    """Of all objects."""
    cut: int = 0
    """So many reads break off half way."""
    unavailable: int = 0
    """So many reads are answered with 503."""
    spoiled: int = 0
    """So many reads have a wrong byte."""
    status: int | None = None
    """If set, each request is answered with it."""
    replaced: bool = False
    """The objects have another generation by the time they are read."""
    delay: float = 0.0
    """Seconds that each read takes."""
    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    """Object, first byte and end of each read that was answered in full."""
    most_at_once: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    at_once: int = 0

    def take(self, fault: str) -> bool:
        with self.lock:
            left: int = getattr(self, fault)
            setattr(self, fault, max(0, left - 1))
            return left > 0


@contextmanager
def running(gcs: GcsStandIn) -> Iterator[GcsStandIn]:
    class Handler(_Handler):
        stand_in = gcs

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    gcs.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield gcs
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    stand_in: GcsStandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        gcs, url = self.stand_in, urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if gcs.status is not None:
            self._send(gcs.status, b'{"error": {"message": "told to"}}')
        elif url.path == f"/storage/v1/b/{BUCKET}/o":
            self._list(query["prefix"])
        elif match := re.fullmatch(rf"/download/storage/v1/b/{BUCKET}/o/(.+)", url.path):
            self._read(unquote(match[1]), query)
        else:
            self._send(404, b'{"error": {"message": "no such bucket"}}')

    def _list(self, prefix: str) -> None:
        gcs = self.stand_in
        items = [
            {
                "name": name,
                "bucket": BUCKET,
                "generation": str(gcs.generation),
                "size": str(len(data)),
                "crc32c": base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode(),
            }
            for name, data in gcs.objects.items()
            if name.startswith(prefix) and "/" not in name[len(prefix) :]
        ]
        self._send(200, json.dumps({"kind": "storage#objects", "items": items}).encode())

    def _read(self, name: str, query: dict[str, str]) -> None:
        gcs = self.stand_in
        with gcs.lock:
            gcs.at_once += 1
            gcs.most_at_once = max(gcs.most_at_once, gcs.at_once)
        try:
            time.sleep(gcs.delay)
            if gcs.replaced or query.get("ifGenerationMatch") != str(gcs.generation):
                self._send(412, b"{}")
            elif gcs.take("unavailable"):
                self._send(503, b"{}")
            else:
                self._send_range(name)
        finally:
            with gcs.lock:
                gcs.at_once -= 1

    def _send_range(self, name: str) -> None:
        gcs = self.stand_in
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert match is not None
        first, end = int(match[1]), int(match[2]) + 1
        data = bytearray(gcs.objects[name][first:end])
        if gcs.take("spoiled"):
            data[0] ^= 1
        is_cut = gcs.take("cut")
        whole = len(gcs.objects[name])
        headers = {"Content-Range": f"bytes {first}-{end - 1}/{whole}"}
        if is_cut:
            self.close_connection = True
        else:
            with gcs.lock:
                gcs.ranges.append((name, first, end))
        self._send(206, bytes(data), headers, len(data) // 2 if is_cut else None)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, num_sent: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body[:num_sent])

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""
