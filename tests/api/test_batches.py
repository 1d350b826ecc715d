"""Batches over HTTP, from the upload to the results."""

from __future__ import annotations

import itertools
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import openai
import pytest

from server.errors import StorageFullError
from server.frontend.client import SequenceLostError
from tests.api.batch_support import (
    CHAT,
    COMPLETIONS,
    content,
    create,
    jsonl,
    line,
    retrieve,
    run,
    upload,
    wait_status,
)
from tests.api.support import MODEL, LiveServer, Script, assert_error, live_server, wait_until

TEXT = "ab user 日 model"


@pytest.fixture(scope="module")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(data_dir=tmp_path_factory.mktemp("data"), max_body_bytes=20_000) as live:
        yield live


@pytest.fixture
def server(_shared: LiveServer) -> Iterator[LiveServer]:
    _shared.engine.script = Script()
    _shared.engine.submitted.clear()
    yield _shared
    _shared.assert_idle()


def restarted(data: Path, **options: Any) -> AbstractContextManager[LiveServer]:
    return live_server(data_dir=data, **options)


# --- results -----------------------------------------------------------------------------------------------


def test_a_batch_answers_each_line_as_its_route_would(server: LiveServer) -> None:
    lines = [line(str(number), CHAT, max_tokens=20, seed=number) for number in range(5)]
    batch = run(server, jsonl(*lines), CHAT, metadata={"job": "x"})
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 5, "completed": 5, "failed": 0}
    assert batch["metadata"] == {"job": "x"}
    assert batch["model"] == MODEL
    assert batch["error_file_id"] is None
    results = content(server, batch["output_file_id"])
    assert [result["custom_id"] for result in results] == ["0", "1", "2", "3", "4"]
    assert all(result["error"] is None and result["response"]["status_code"] == 200 for result in results)
    expected = server.chat(max_tokens=20, seed=0).json()
    got = results[0]["response"]["body"]
    assert got["choices"] == expected["choices"]
    assert set(got) == set(expected)
    assert batch["usage"]["input_tokens"] == 5 * got["usage"]["prompt_tokens"]
    assert batch["usage"]["output_tokens"] == 5 * got["usage"]["completion_tokens"]
    for name in ("created_at", "in_progress_at", "finalizing_at", "completed_at"):
        assert abs(batch[name] - time.time()) < 60
    assert batch["expires_at"] == batch["created_at"] + 24 * 3600


def test_lines_that_fail_are_told_in_the_error_file(server: LiveServer) -> None:
    lines = [line("good"), line("hot", temperature=3), line("long", prompt="a " * 500)]
    batch = run(server, jsonl(*lines))
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 3, "completed": 1, "failed": 2}
    assert [result["custom_id"] for result in content(server, batch["output_file_id"])] == ["good"]
    hot, long = content(server, batch["error_file_id"])
    assert hot["response"]["status_code"] == 400
    assert hot["response"]["body"]["error"]["param"] == "temperature"
    assert hot["response"]["request_id"]
    assert long["response"]["body"]["error"]["code"] == "context_length_exceeded"


def test_what_a_line_had_ignored_is_named_beside_its_answer(server: LiveServer) -> None:
    batch = run(server, jsonl(line("a", nonsense=1)))
    (result,) = content(server, batch["output_file_id"])
    assert result["response"]["ignored_fields"] == "nonsense"


def test_an_engine_that_gives_up_on_a_line_fails_that_line(server: LiveServer) -> None:
    server.script.error_after = 1
    batch = run(server, jsonl(line("a")))
    (result,) = content(server, batch["error_file_id"])
    assert result["response"]["body"]["error"]["code"] == "generation_failed"
    server.script.error_after, server.script.crash_after = None, 1
    batch = run(server, jsonl(line("a")))
    (result,) = content(server, batch["error_file_id"])
    assert result["response"]["status_code"] == 500
    assert "secret" not in json.dumps(result)


def test_lines_come_behind_clients_and_take_no_place_in_their_queue(tmp_path: Path) -> None:
    with live_server(data_dir=tmp_path, max_queued_requests=4) as server:
        server.script.delay = 0.02
        batch = create(server, jsonl(*[line(str(n), n=4) for n in range(3)]))
        wait_until(lambda: len(server.engine.running) == 4)
        answer = server.complete(n=4, max_tokens=2)
        assert answer.status_code == 200
        priorities = {request.priority for request in server.engine.submitted}
        assert len(priorities) == 2
        assert min(priorities) == 0
        server.script.delay = 0
        done = wait_status(server, batch["id"], "completed")  # what found no room was tried again
        assert done["request_counts"] == {"total": 3, "completed": 3, "failed": 0}


def test_one_line_runs_while_clients_do_and_several_when_they_are_gone(tmp_path: Path) -> None:
    with live_server(data_dir=tmp_path, batch_concurrency=3) as server:
        server.script.delay = 0.05
        server.script.ends_with_stop = False
        with server.http.stream(
            "POST", "/v1/completions", json={"prompt": "ab", "max_tokens": 30, "stream": True}
        ) as stream:
            wait_until(lambda: len(server.engine.running) == 1)
            batch = create(server, jsonl(*[line(str(n), max_tokens=30) for n in range(4)]))
            wait_until(lambda: len(server.engine.running) == 2)
            time.sleep(0.3)
            assert len(server.engine.running) == 2
            assert stream.read()
        wait_until(lambda: len(server.engine.running) == 3)
        server.http.post(f"/v1/batches/{batch['id']}/cancel")
        wait_status(server, batch["id"], "cancelled")


def test_results_are_counted_while_they_come(server: LiveServer) -> None:
    before = server.metric('gemma_batch_requests_total{outcome="completed"}')
    ended = server.metric('gemma_batches_ended_total{status="completed"}')
    run(server, jsonl(line("a"), line("b")))
    assert server.metric('gemma_batch_requests_total{outcome="completed"}') == before + 2
    assert server.metric('gemma_batches_ended_total{status="completed"}') == ended + 1
    assert server.metric("gemma_stored_files") >= 2
    assert server.metric("gemma_stored_bytes") > 0
    assert server.metric("gemma_batches_unfinished") == 0


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"[]", "invalid_json_line", None),
        (b'{"custom_id": "\xff"}', "invalid_json_line", None),
        (b'{"custom_id": "\\ud800"}', "invalid_json_line", None),
        (b"[" * 10_000, "invalid_json_line", None),
        (b"\x00", "invalid_json_line", None),
        (
            b'{"custom_id": "x", "method": "POST", "url": "/v1/completions"}',
            "missing_required_parameter",
            "body",
        ),
        (jsonl(line("")), "invalid_custom_id", "custom_id"),
        (jsonl(line("x" * 513)), "invalid_custom_id", "custom_id"),
        (jsonl(line("first")), "duplicate_custom_id", "custom_id"),
        (jsonl({**line("x"), "method": "GET"}), "invalid_method", "method"),
        (jsonl(line("x", CHAT)), "invalid_url", "url"),
        (jsonl({**line("x"), "url": "http://elsewhere/v1/completions"}), "invalid_url", "url"),
        (jsonl({**line("x"), "url": ["/v1/completions"]}), "invalid_url", "url"),
        (jsonl({**line("x"), "body": "text"}), "invalid_json_line", None),
        (jsonl(line("x", stream=True)), "invalid_request", "body.stream"),
        (jsonl(line("x", model="gpt-4")), "model_not_found", "body.model"),
        (jsonl(line("x", prompt="a" * 40_000)), "line_too_long", None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_line_that_is_wrong_fails_the_batch_with_its_number(
    server: LiveServer, bad: bytes, code: str, param: str | None
) -> None:
    batch = run(server, jsonl(line("first")) + b"\n" + bad.rstrip(b"\n") + b"\n" + jsonl(line("last")))
    assert batch["status"] == "failed"
    (error,) = batch["errors"]["data"]
    assert (error["code"], error["line"], error["param"]) == (code, 3, param)
    assert len(error["message"]) < 500
    assert batch["output_file_id"] is batch["error_file_id"] is None
    assert batch["failed_at"] is not None
    assert server.engine.submitted == []


def test_an_empty_file_and_one_of_too_many_lines_fail(tmp_path: Path, server: LiveServer) -> None:
    assert run(server, b"\n \n")["errors"]["data"][0]["code"] == "empty_file"
    many = jsonl(line("a")) * 250
    errors = run(server, many)["errors"]["data"]
    assert len(errors) == 100
    with live_server(data_dir=tmp_path, max_batch_requests=3) as small:
        batch = run(small, jsonl(*[line(str(n)) for n in range(4)]))
        assert batch["errors"]["data"] == [
            {
                "code": "too_many_requests",
                "message": "A batch may hold at most 3 requests.",
                "param": None,
                "line": 4,
            }
        ]


def test_a_million_lines_are_read_only_as_far_as_they_count(server: LiveServer) -> None:
    started = time.monotonic()
    one = jsonl(line("a"))
    many = b"".join(one.replace(b'"a"', b'"%d"' % number) for number in range(60_000)) + b"{}\n" * 940_000
    batch = create(server, many)
    slowest = 0.0
    while retrieve(server, batch["id"])["status"] == "validating":
        asked = time.monotonic()
        assert server.http.get("/livez").status_code == 200
        slowest = max(slowest, time.monotonic() - asked)
    (error,) = retrieve(server, batch["id"])["errors"]["data"]
    assert error["line"] == 50_001
    assert slowest < 1
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"endpoint": "/v1/files"}, "endpoint"),
        ({"endpoint": "/v1/batches"}, "endpoint"),
        ({"endpoint": "/metrics"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": "file-nope"}, "file_id"),
        ({"input_file_id": "../../etc/passwd"}, "file_id"),
        ({"input_file_id": 5}, "input_file_id"),
        ({"metadata": {"k": 5}}, "metadata.k"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"k": "x" * 513}}, "metadata.k"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after.seconds"),
    ],
    ids=str,
)
def test_a_batch_that_makes_no_sense_is_refused(server: LiveServer, change: dict[str, Any], param: str) -> None:
    file = upload(server, jsonl(line("a")))
    body = {"input_file_id": file["id"], "endpoint": COMPLETIONS, "completion_window": "24h", **change}
    response = server.http.post("/v1/batches", json=body)
    assert_error(response, 404 if param == "file_id" else 400, param=param)


def test_outputs_are_no_inputs(server: LiveServer) -> None:
    output = run(server, jsonl(line("a")))["output_file_id"]
    body = {"input_file_id": output, "endpoint": COMPLETIONS, "completion_window": "24h"}
    assert_error(server.http.post("/v1/batches", json=body), 400, param="input_file_id")


def test_without_a_directory_files_and_batches_are_off(tmp_path: Path) -> None:
    with live_server() as off:
        for method, path in (("GET", "/v1/files"), ("POST", "/v1/files"), ("GET", "/v1/batches/x")):
            response = off.http.request(method, path)
            assert "--data-dir" in assert_error(response, 501, code="feature_off")
            assert response.headers["x-should-retry"] == "false"


# --- cancelling, expiry, restarts --------------------------------------------------------------------------


def test_cancelling_ends_running_lines_at_once(server: LiveServer) -> None:
    server.script.delay = 10
    batch = create(server, jsonl(line("x"), line("y")))
    wait_until(lambda: len(server.engine.running) >= 1)
    response = server.http.post(f"/v1/batches/{batch['id']}/cancel")
    assert response.json()["status"] == "cancelling"
    assert response.json()["cancelling_at"] is not None
    done = wait_status(server, batch["id"], "cancelled")
    assert done["cancelled_at"] is not None
    assert done["output_file_id"] is None
    assert not server.engine.running
    assert_error(server.http.post(f"/v1/batches/{batch['id']}/cancel"), 409, code="conflict")
    assert_error(server.http.post("/v1/batches/batch_nope/cancel"), 404, code="not_found")


def test_a_cancelled_batch_has_the_results_it_had(server: LiveServer) -> None:
    lines = [line("a", max_tokens=1), *[line(str(number), max_tokens=30) for number in range(20)]]
    server.script.ends_with_stop = False
    server.script.delay = 0.02
    batch = create(server, jsonl(*lines))
    wait_until(lambda: retrieve(server, batch["id"])["request_counts"]["completed"] >= 1)
    server.http.post(f"/v1/batches/{batch['id']}/cancel")
    done = wait_status(server, batch["id"], "cancelled")
    results = content(server, done["output_file_id"])
    assert 1 <= len(results) == done["request_counts"]["completed"] < 21
    assert done["request_counts"]["total"] == 21


def stop_after(data: Path, num_results: int, num_lines: int, owner: str | None = None) -> str:
    """A batch on disk with so many of its results, as a server leaves it that is told to end."""
    with restarted(data, batch_concurrency=1) as server:
        server.script.delay = 0.05
        batch = create(server, jsonl(*[line(str(n), max_tokens=3) for n in range(num_lines)]))
        wait_until(lambda: retrieve(server, batch["id"])["request_counts"]["completed"] >= num_results)
    batch_id: str = batch["id"]
    return batch_id


def test_a_batch_goes_on_after_a_restart_and_computes_nothing_twice(tmp_path: Path) -> None:
    batch_id = stop_after(tmp_path, 3, 10)
    with restarted(tmp_path, loaded=False) as server:
        kept = retrieve(server, batch_id)
        assert kept["status"] == "in_progress"
        completed = kept["request_counts"]["completed"]
        assert 3 <= completed < 10
        time.sleep(0.3)  # the model is still being loaded: nothing fails for that
        assert retrieve(server, batch_id)["request_counts"]["completed"] == completed
        server.runtime.load()
        done = wait_status(server, batch_id, "completed")
        assert len(server.engine.submitted) == 10 - completed
        assert [result["custom_id"] for result in content(server, done["output_file_id"])] == list("0123456789")


def test_a_batch_that_runs_out_of_time_expires_and_tells_what_is_missing(tmp_path: Path) -> None:
    batch_id = stop_after(tmp_path, 2, 6)
    with sqlite3.connect(tmp_path / "store.sqlite3") as database:
        database.execute("UPDATE batches SET object = json_set(object, '$.expires_at', ?)", (int(time.time()),))
    database.close()
    with restarted(tmp_path) as server:
        done = wait_status(server, batch_id, "expired")
        assert done["expired_at"] is not None
        results = content(server, done["output_file_id"])
        missing = content(server, done["error_file_id"])
        assert len(results) + len(missing) == 6
        assert {(each["response"], each["error"]["code"]) for each in missing} == {(None, "batch_expired")}
        assert server.engine.submitted == []


@pytest.mark.covers("E01")
def test_a_line_that_is_lost_with_its_engine_is_answered_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.batches.runner.BUSY_SECONDS", 0.05)
    with restarted(tmp_path) as server:
        server.script.death_after, server.script.death = 1, SequenceLostError
        batch = create(server, jsonl(line("a")))
        wait_until(lambda: len(server.engine.submitted) == 1)
        server.script.death_after = None
        assert wait_status(server, batch["id"], "completed")["request_counts"]["completed"] == 1
        server.script.death_after = 1
        bad = create(server, jsonl(line("a"), line("b")))
        done = wait_status(server, bad["id"], "completed")
        assert done["request_counts"] == {"total": 2, "completed": 0, "failed": 2}
        errors = content(server, done["error_file_id"])
        assert {each["response"]["status_code"] for each in errors} == {503}


def test_an_engine_that_dies_leaves_a_batch_to_the_next_server(tmp_path: Path) -> None:
    with restarted(tmp_path) as server:
        server.script.death_after = 1
        batch = create(server, jsonl(line("a"), line("b")))
        wait_until(lambda: len(server.engine.submitted) >= 1)
        server.assert_idle()
        assert retrieve(server, batch["id"])["request_counts"] == {"total": 2, "completed": 0, "failed": 0}
    with restarted(tmp_path) as server:
        assert wait_status(server, batch["id"], "completed")["request_counts"]["completed"] == 2


def test_a_disk_that_is_full_makes_a_batch_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.batches.runner.STORAGE_RETRY_SECONDS", 0.05)
    with restarted(tmp_path, max_stored_bytes=2000) as server:
        ballast = upload(server, b"x" * 1500)
        batch = create(server, jsonl(line("a"), line("b")))
        time.sleep(0.3)
        assert retrieve(server, batch["id"])["status"] == "in_progress"
        num_computed = len(server.engine.submitted)
        assert_error(
            server.http.post("/v1/files", files={"file": b"x" * 500}, data={"purpose": "batch"}),
            507,
            code="storage_full",
        )
        time.sleep(0.2)
        assert len(server.engine.submitted) - num_computed < 10
        assert server.complete().status_code == 200
        server.http.delete(f"/v1/files/{ballast['id']}")
        wait_status(server, batch["id"], "completed")


def test_a_write_that_fails_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with restarted(tmp_path) as server:
        with monkeypatch.context() as patch:
            patch.setattr("shutil.copyfileobj", _disk_full)
            response = server.http.post("/v1/files", files={"file": b"x"}, data={"purpose": "batch"})
            assert_error(response, 507, code="storage_full")
        assert list((tmp_path / "files").iterdir()) == []
        assert server.http.get("/v1/files").json()["data"] == []
        assert upload(server, b"x")["bytes"] == 1


def _disk_full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_storage_errors_are_one_family() -> None:
    assert StorageFullError("x").status == 507


# --- lists and keys ----------------------------------------------------------------------------------------


def test_lists_come_in_pages(tmp_path: Path) -> None:
    with restarted(tmp_path) as server:
        ids = [run(server, jsonl(line("a")))["id"] for _ in range(5)]
        page = server.http.get("/v1/batches", params={"limit": 2}).json()
        assert page["object"] == "list"
        assert [batch["id"] for batch in page["data"]] == [ids[4], ids[3]]
        assert (page["has_more"], page["first_id"], page["last_id"]) == (True, ids[4], ids[3])
        rest = server.http.get("/v1/batches", params={"after": ids[3]}).json()
        assert [batch["id"] for batch in rest["data"]] == [ids[2], ids[1], ids[0]]
        assert rest["has_more"] is False
        for params in ({"limit": 0}, {"limit": 101}, {"limit": "x"}, {"limit": "²"}):
            assert_error(server.http.get("/v1/batches", params=params), 400, param="limit")
        assert_error(server.http.get("/v1/batches", params={"after": "nope"}), 404, param="after")
        files = server.http.get("/v1/files", params={"purpose": "batch", "order": "asc", "limit": 3}).json()
        assert [file["purpose"] for file in files["data"]] == ["batch"] * 3
        assert files["has_more"] is True
        assert_error(server.http.get("/v1/files", params={"order": "up"}), 400, param="order")


def test_a_key_sees_only_its_own_files_and_batches(tmp_path: Path) -> None:
    with restarted(tmp_path, api_key=["first", "second"]) as server:
        server.http.headers["authorization"] = "Bearer first"
        file = upload(server, jsonl(line("a")))
        batch = run(server, jsonl(line("a")))
        secrets = [file["id"], batch["input_file_id"], batch["output_file_id"]]
        server.http.headers["authorization"] = "Bearer second"
        assert server.http.get("/v1/files").json()["data"] == []
        assert server.http.get("/v1/batches").json()["data"] == []
        for secret in secrets:
            assert_error(server.http.get(f"/v1/files/{secret}"), 404, code="not_found")
            assert_error(server.http.get(f"/v1/files/{secret}/content"), 404)
            assert_error(server.http.delete(f"/v1/files/{secret}"), 404)
            body = {"input_file_id": secret, "endpoint": COMPLETIONS, "completion_window": "24h"}
            assert_error(server.http.post("/v1/batches", json=body), 404)
            assert_error(server.http.get("/v1/files", params={"after": secret}), 404)
        assert_error(server.http.get(f"/v1/batches/{batch['id']}"), 404)
        assert_error(server.http.post(f"/v1/batches/{batch['id']}/cancel"), 404)
        server.http.headers["authorization"] = "Bearer first"
        assert [each["id"] for each in server.http.get("/v1/files").json()["data"]]
        assert server.http.get(f"/v1/batches/{batch['id']}").status_code == 200


def test_keys_take_turns(tmp_path: Path) -> None:
    with restarted(tmp_path, api_key=["first", "second"], batch_concurrency=1) as server:
        server.script.delay = 0.005
        server.http.headers["authorization"] = "Bearer first"
        long = create(server, jsonl(*[line(str(n)) for n in range(30)]))
        server.http.headers["authorization"] = "Bearer second"
        short = create(server, jsonl(line("a"), line("b")))
        wait_status(server, short["id"], "completed")
        server.http.headers["authorization"] = "Bearer first"
        assert retrieve(server, long["id"])["request_counts"]["completed"] < 30
        salts = [request.cache_salt for request in server.engine.submitted]
        assert len(set(salts)) == 2
        assert max(len(list(group)) for _, group in itertools.groupby(salts)) < 28
        wait_status(server, long["id"], "completed")


def test_two_servers_do_not_share_a_directory(tmp_path: Path) -> None:
    with (
        restarted(tmp_path),
        pytest.raises(ValueError, match="another server uses it"),
        restarted(tmp_path),
    ):
        pass


# --- the official library ----------------------------------------------------------------------------------


def test_the_sdk_drives_files_and_batches(tmp_path: Path) -> None:
    with (
        restarted(tmp_path, api_key=["sk-test"]) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-test", max_retries=0) as client,
    ):
        source = tmp_path / "requests.jsonl"
        source.write_bytes(jsonl(line("a", CHAT), line("b", CHAT, temperature=9)))
        file = client.files.create(
            file=source, purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert (file.filename, file.bytes, file.purpose) == (source.name, source.stat().st_size, "batch")
        assert file.expires_at == file.created_at + 3600
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"}
        )
        while batch.status not in ("completed", "failed"):
            batch = client.batches.retrieve(batch.id)
        assert batch.request_counts is not None
        assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 1)
        assert batch.output_file_id
        result = json.loads(client.files.content(batch.output_file_id).text)
        assert result["response"]["body"]["choices"][0]["message"]["content"] == TEXT
        assert [each.id for each in client.batches.list(limit=1)] == [batch.id]
        assert {each.id for each in client.files.list(limit=2)} == {
            file.id,
            batch.output_file_id,
            batch.error_file_id,
        }
        assert client.files.retrieve(file.id) == file
        assert client.files.delete(file.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file.id)
        with pytest.raises(openai.ConflictError):
            client.batches.cancel(batch.id)
