"""What tests of files and batches share: uploads, lines and waiting."""

from __future__ import annotations

import json
from typing import Any

from tests.api.support import LiveServer, wait_until

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def line(custom_id: str, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    if url == CHAT:
        body = {"messages": [{"role": "user", "content": "ab"}], **body}
    else:
        body = {"prompt": "ab", **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def jsonl(*lines: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


def upload(server: LiveServer, content: bytes, **options: Any) -> dict[str, Any]:
    response = server.http.post(
        "/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": "batch"}, **options
    )
    assert response.status_code == 200, response.text
    file: dict[str, Any] = response.json()
    return file


def create(server: LiveServer, content: bytes, endpoint: str = COMPLETIONS, **fields: Any) -> dict[str, Any]:
    body = {
        "input_file_id": upload(server, content)["id"],
        "endpoint": endpoint,
        "completion_window": "24h",
        **fields,
    }
    response = server.http.post("/v1/batches", json=body)
    assert response.status_code == 200, response.text
    batch: dict[str, Any] = response.json()
    return batch


def retrieve(server: LiveServer, batch_id: str) -> dict[str, Any]:
    response = server.http.get(f"/v1/batches/{batch_id}")
    assert response.status_code == 200, response.text
    batch: dict[str, Any] = response.json()
    return batch


def wait_status(server: LiveServer, batch_id: str, *statuses: str) -> dict[str, Any]:
    wait_until(lambda: retrieve(server, batch_id)["status"] in statuses)
    return retrieve(server, batch_id)


def run(server: LiveServer, content: bytes, endpoint: str = COMPLETIONS, **fields: Any) -> dict[str, Any]:
    """The batch at its end."""
    batch = create(server, content, endpoint, **fields)
    return wait_status(server, batch["id"], "completed", "failed", "expired", "cancelled")


def content(server: LiveServer, file_id: str) -> list[dict[str, Any]]:
    response = server.http.get(f"/v1/files/{file_id}/content")
    assert response.status_code == 200, response.text
    return [json.loads(each) for each in response.content.splitlines()]
