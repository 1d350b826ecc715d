"""OpenAI's Files and Batch APIs."""

from __future__ import annotations

import asyncio
import json
import time

from conformance.case import Group
from conformance.client import Answer, Json, Server, refusal, text_of
from conformance.outcome import NotOffered, expect, expect_equal, expect_keys, fail

GROUP = Group("batches")
case = GROUP.case
ENDED = ("completed", "failed", "expired", "cancelled")
WAIT_SECONDS = 60.0


async def upload(server: Server, lines: list[Json]) -> Json:
    """The file object of an uploaded batch input. Raises NotOffered."""
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    files = {"file": ("input.jsonl", content, "application/jsonl")}
    response = await server.http.post(server.root + "/v1/files", data={"purpose": "batch"}, files=files)
    if response.status_code in (404, 405, 501):
        raise NotOffered(f"/v1/files: {response.status_code}")
    if response.status_code not in (200, 201):
        fail(f"/v1/files: {response.status_code} {response.text[:120]}")
    return response.json()


def line(server: Server, name: str, **fields: Json) -> Json:
    body = server.chat_body(max_tokens=4, **fields)
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


async def start(server: Server, file_id: str) -> Json:
    body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    return await server.answered("/v1/batches", body)


async def ended(server: Server, batch: Json) -> Json:
    """The batch once it has ended."""
    deadline = time.monotonic() + WAIT_SECONDS
    while batch["status"] not in ENDED:
        expect(time.monotonic() < deadline, f"the batch is still {batch['status']}")
        await asyncio.sleep(0.1)
        batch = await server.answered_get(f"/v1/batches/{batch['id']}")
    return batch


async def lines_of(server: Server, file_id: str) -> dict[str, Json]:
    """The lines of an output file by their custom ids."""
    answer = await server.get(f"/v1/files/{file_id}/content")
    expect_equal(answer.status, 200, "the status of the content")
    found = [json.loads(text) for text in answer.content.decode().splitlines()]
    return {entry["custom_id"]: entry for entry in found}


async def delete(server: Server, file_id: str) -> Answer:
    response = await server.http.delete(f"{server.root}/v1/files/{file_id}")
    return Answer(response.status_code, response.headers, response.content)


@case("file-shape")
async def an_uploaded_file_is_described(server: Server) -> None:
    file = await upload(server, [line(server, "a")])
    expect_keys(file, "id object bytes created_at filename purpose", "the file")
    expect_equal(
        (file["object"], file["filename"], file["purpose"]), ("file", "input.jsonl", "batch"), "the file"
    )
    expect_equal((await server.answered_get(f"/v1/files/{file['id']}"))["id"], file["id"], "id")


@case("file-content")
async def an_uploaded_file_can_be_read_again(server: Server) -> None:
    file = await upload(server, [line(server, "a")])
    expect_equal(list(await lines_of(server, file["id"])), ["a"], "the lines")
    listed = await server.answered_get("/v1/files")
    expect(file["id"] in [entry["id"] for entry in listed["data"]], "it is not listed")


@case("file-delete")
async def a_deleted_file_is_gone(server: Server) -> None:
    file = await upload(server, [line(server, "a")])
    answer = await delete(server, file["id"])
    expect_equal((answer.status, answer.json.get("deleted")), (200, True), "the answer")
    refusal(await server.get(f"/v1/files/{file['id']}"), 404)


@case("run")
async def a_batch_answers_every_line_as_a_request_is_answered(server: Server) -> None:
    names = ["b", "a", "c"]
    file = await upload(server, [line(server, name) for name in names])
    batch = await start(server, file["id"])
    expect_keys(batch, "id object endpoint input_file_id status created_at", "the batch")
    expect_equal(batch["object"], "batch", "object")
    batch = await ended(server, batch)
    expect_equal(batch["status"], "completed", "status")
    expect_equal(batch["request_counts"], {"total": 3, "completed": 3, "failed": 0}, "request_counts")
    lines = await lines_of(server, batch["output_file_id"])
    expect_equal(sorted(lines), sorted(names), "the custom ids")
    alone = text_of(await server.chat(max_tokens=4))
    for entry in lines.values():
        expect_equal(entry["response"]["status_code"], 200, "a status_code")
        expect_equal(text_of(entry["response"]["body"]), alone, "a text")


@case("bad-line")
async def a_line_that_cannot_be_served_fails_alone(server: Server) -> None:
    file = await upload(server, [line(server, "good"), line(server, "bad", temperature="hot")])
    batch = await ended(server, await start(server, file["id"]))
    expect_equal(batch["status"], "completed", "status")
    expect_equal(batch["request_counts"], {"total": 2, "completed": 1, "failed": 1}, "request_counts")
    expect_equal(list(await lines_of(server, batch["output_file_id"])), ["good"], "the lines of the output")
    expect_equal(list(await lines_of(server, batch["error_file_id"])), ["bad"], "the lines of the errors")


@case("cancel")
async def a_batch_can_be_cancelled(server: Server) -> None:
    file = await upload(server, [line(server, str(i)) for i in range(50)])
    batch = await start(server, file["id"])
    cancelled = await server.answered(f"/v1/batches/{batch['id']}/cancel", {})
    expect(cancelled["status"] in ("cancelling", "cancelled", "completed"), f"status is {cancelled['status']}")
    expect((await ended(server, cancelled))["status"] in ("cancelled", "completed"), "it ends otherwise")


@case("list")
async def batches_are_listed(server: Server) -> None:
    file = await upload(server, [line(server, "a")])
    batch = await ended(server, await start(server, file["id"]))
    listed = await server.answered_get("/v1/batches")
    expect_equal(listed["object"], "list", "object")
    expect(batch["id"] in [entry["id"] for entry in listed["data"]], "it is not listed")


@case("unknown-file")
async def a_batch_of_an_unknown_file_is_refused(server: Server) -> None:
    await upload(server, [line(server, "a")])
    body = {"input_file_id": "file-none", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    answer = await server.post("/v1/batches", body)
    expect(answer.status in (400, 404), f"the status is {answer.status}")
    expect(answer.error.get("message"), "the error has no message")


@case("unknown-batch")
async def an_unknown_batch_is_a_404(server: Server) -> None:
    await upload(server, [line(server, "a")])
    refusal(await server.get("/v1/batches/batch_none"), 404)
