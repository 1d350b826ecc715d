"""A small Hugging Face hub on a local port, for tests of downloads."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubStandIn:
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    """Their files are refused to those who do not send `token`."""
    token: str = "hf_right"
    cut_once: set[str] = field(default_factory=set)
    """Files whose next transfer breaks off half way."""
    failing: int | None = None
    """If set, each request is answered with this status."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, Range header) of each request."""
    url: str = ""

    def file_requests(self, method: str) -> list[tuple[str, str | None]]:
        """(file name, Range header) of each request for a file's content or its metadata."""
        return [
            (path.rsplit("/", 1)[1], byte_range)
            for seen, path, byte_range in self.requests
            if seen == method and "/resolve/" in path
        ]


@contextmanager
def running(hub: HubStandIn) -> Iterator[HubStandIn]:
    class Handler(_Handler):
        stand_in = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    stand_in: HubStandIn
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.stand_in, urlsplit(self.path).path
        hub.requests.append((self.command, path, self.headers.get("Range")))
        if hub.failing is not None:
            return self._send(hub.failing)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", path):
            return self._send_info(*match.groups())
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._send_file(*match.groups())
        return self._send(404)

    def _send_info(self, repo: str, revision: str) -> None:
        if not self._exists(repo, revision):
            return
        files = [{"rfilename": name, "size": len(data)} for name, data in self.stand_in.repos[repo].items()]
        self._send(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": files}).encode())

    def _send_file(self, repo: str, revision: str, name: str) -> None:
        hub = self.stand_in
        if not self._exists(repo, revision):
            return
        if repo in hub.gated and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._send(401, headers={"X-Error-Code": "GatedRepo"})
        if name not in hub.repos[repo]:
            return self._send(404, headers={"X-Error-Code": "EntryNotFound"})
        data = hub.repos[repo][name]
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        status, start = 200, 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, start = 206, int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        stop = len(data)
        if self.command == "GET" and name in hub.cut_once:
            hub.cut_once.remove(name)
            stop = len(data) // 2
            self.close_connection = True
        self._send(status, data[start:], headers, stop - start)

    def _exists(self, repo: str, revision: str) -> bool:
        if repo not in self.stand_in.repos:
            # As the real hub does for those who sent no token; with one it is 404.
            self._send(401, headers={"X-Error-Code": "RepoNotFound"})
            return False
        if revision not in ("main", COMMIT):
            self._send(404, headers={"X-Error-Code": "RevisionNotFound"})
            return False
        return True

    def _send(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, num_sent: int | None = None
    ) -> None:
        """Announce the whole body, send the first `num_sent` bytes of it."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:num_sent])

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""
