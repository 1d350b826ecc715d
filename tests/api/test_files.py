"""Uploads, honest and hostile."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.batch_support import create, jsonl, line, upload, wait_status
from tests.api.support import LiveServer, assert_error, live_server, wait_until


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def server(data: Path) -> Iterator[LiveServer]:
    with live_server(data_dir=data, max_file_bytes=3_000_000, max_stored_files=1000) as live:
        yield live


def form(*parts: tuple[str, bytes], boundary: bytes = b"B") -> bytes:
    """A multipart body: (what follows `form-data; ` in the header, content)."""
    body = b""
    for disposition, content in parts:
        body += b"--" + boundary + b"\r\nContent-Disposition: form-data; " + disposition.encode() + b"\r\n\r\n"
        body += content + b"\r\n"
    return body + b"--" + boundary + b"--\r\n"


FORM = {"content-type": "multipart/form-data; boundary=B"}
PURPOSE = ('name="purpose"', b"batch")


def files_on_disk(data: Path) -> set[str]:
    return {path.name for path in (data / "files").iterdir()}


@pytest.mark.parametrize("content", [b"", b"{}\n", b"\x00\xff\xfe\r\n--B", bytes(range(256)) * 9000])
def test_a_file_comes_back_as_it_was(server: LiveServer, content: bytes) -> None:
    file = upload(server, content)
    assert file == {
        "id": file["id"],
        "object": "file",
        "bytes": len(content),
        "created_at": file["created_at"],
        "filename": "in.jsonl",
        "purpose": "batch",
        "expires_at": file["created_at"] + 30 * 24 * 3600,
        "status": "processed",
        "status_details": None,
    }
    response = server.http.get(f"/v1/files/{file['id']}/content")
    assert response.content == content
    assert response.headers["content-type"] == "application/octet-stream"
    assert server.http.get(f"/v1/files/{file['id']}").json() == file


@pytest.mark.covers("S05")
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../../etc/passwd", "passwd"),
        ("..", ".."),
        ("/etc/passwd", "passwd"),
        ("C:\\\\windows\\\\x.jsonl", "x.jsonl"),
        ("a\x00b", "ab"),
        ("store.sqlite3", "store.sqlite3"),
        ("x" * 5000, "x" * 255),
        ("%2e%2e%2fx", "%2e%2e%2fx"),
        ("\u202etxt", "txt"),
        ("", "file"),
    ],
)
def test_no_name_leaves_the_directory(server: LiveServer, data: Path, name: str, shown: str) -> None:
    before = files_on_disk(data)
    around = {path.name for path in data.parent.iterdir()}
    body = form((f'name="file"; filename="{name}"', b"{}"), PURPOSE)
    response = server.http.post("/v1/files", content=body, headers=FORM)
    if name == "x" * 5000:  # longer than a header may be
        assert response.status_code in (200, 400)
        return
    assert response.status_code == 200, response.text
    assert response.json()["filename"] == shown
    assert files_on_disk(data) - before == {response.json()["id"]}
    assert {path.name for path in data.parent.iterdir()} == around


@pytest.mark.covers("S05")
@pytest.mark.parametrize(
    "file_id",
    [
        "../store.sqlite3",
        "..%2Fstore.sqlite3",
        "%2e%2e/lock",
        "/etc/passwd",
        "file-" + "0" * 32,
        "x" * 5000,
        "%00",
    ],
)
@pytest.mark.parametrize("suffix", ["", "/content"])
def test_no_id_leads_out_of_the_directory(server: LiveServer, file_id: str, suffix: str) -> None:
    with server.connect() as connection:
        connection.sendall(
            f"GET /v1/files/{file_id}{suffix} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert b" 404 " in answer.partition(b"\r\n")[0]
    assert b"SQLite" not in answer


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (form(PURPOSE), "file"),
        (form(('name="file"', b"{}"), PURPOSE), "file"),
        (form(('name="file"; filename="a"', b"{}")), "purpose"),
        (form(('name="file"; filename="a"', b"{}"), ('name="purpose"', b"fine-tune")), "purpose"),
        (form(('name="file"; filename="a"', b"{}"), ('name="purpose"; filename="b"', b"batch")), None),
        (
            form(('name="file"; filename="a"', b"{}"), PURPOSE, ('name="expires_after[seconds]"', b"5")),
            "expires_after[anchor]",
        ),
        (
            form(
                ('name="file"; filename="a"', b"{}"),
                PURPOSE,
                ('name="expires_after[anchor]"', b"created_at"),
                ('name="expires_after[seconds]"', b"5"),
            ),
            "expires_after[seconds]",
        ),
        (form(*[(f'name="{number}"', b"") for number in range(50)]), None),
        (form(('name="x"', b"y" * 100_000)), None),
        (form(("nothing", b"")), None),
        (b"", None),
        (b"garbage", None),
        (form(PURPOSE)[:-4], None),
    ],
    ids=range(13),
)
def test_a_form_that_is_wrong_is_refused(
    server: LiveServer, data: Path, body: bytes, param: str | None
) -> None:
    before = files_on_disk(data)
    response = server.http.post("/v1/files", content=body, headers=FORM)
    assert_error(response, 400, param=param)
    assert files_on_disk(data) == before


def test_a_form_without_a_boundary_or_that_is_none_is_refused(server: LiveServer) -> None:
    assert_error(
        server.http.post("/v1/files", content=b"x", headers={"content-type": "multipart/form-data"}), 400
    )
    assert_error(server.http.post("/v1/files", json={"purpose": "batch"}), 415)


def test_fields_that_do_nothing_are_named(server: LiveServer) -> None:
    body = form(('name="file"; filename="a"', b"{}"), PURPOSE, ('name="user"', b"me"))
    response = server.http.post("/v1/files", content=body, headers=FORM)
    assert response.headers["x-ignored-fields"] == "user"


def test_a_file_over_the_limit_is_refused_and_leaves_nothing(server: LiveServer, data: Path) -> None:
    before = files_on_disk(data)
    for size in (3_000_001, 3_500_000):
        response = server.http.post("/v1/files", files={"file": b"x" * size}, data={"purpose": "batch"})
        assert "3000000" in assert_error(response, 413, code="body_too_large")
    assert files_on_disk(data) == before
    assert upload(server, b"x" * 3_000_000)["bytes"] == 3_000_000


def test_a_client_that_leaves_in_an_upload_leaves_nothing(server: LiveServer, data: Path) -> None:
    before = files_on_disk(data)
    disconnects = server.metric("gemma_client_disconnects_total")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: {FORM['content-type']}\r\n"
        connection.sendall(f"{head}Content-Length: 2000000\r\n\r\n".encode())
        connection.sendall(b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n')
        connection.sendall(b"x" * 1_500_000)
    wait_until(lambda: server.metric("gemma_client_disconnects_total") == disconnects + 1)
    assert files_on_disk(data) == before


def test_an_upload_that_does_not_come_is_given_up(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.files.UPLOAD_TIMEOUT_SECONDS", 0.05)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: {FORM['content-type']}\r\n"
        connection.sendall(f"{head}Content-Length: 2000000\r\n\r\n--B".encode())
        assert b" 408 " in connection.recv(4096).partition(b"\r\n")[0]


def test_a_key_may_keep_so_many_files(tmp_path: Path) -> None:
    with live_server(data_dir=tmp_path, max_stored_files=2) as small:
        first = upload(small, b"a")
        upload(small, b"b")
        response = small.http.post("/v1/files", files={"file": b"c"}, data={"purpose": "batch"})
        assert_error(response, 507, code="storage_full")
        small.http.delete(f"/v1/files/{first['id']}")
        upload(small, b"c")


def test_the_input_of_a_running_batch_stays(server: LiveServer) -> None:
    server.script.delay = 10
    batch = create(server, jsonl(line("a")))
    wait_until(lambda: bool(server.engine.running))
    response = server.http.delete(f"/v1/files/{batch['input_file_id']}")
    assert batch["id"] in assert_error(response, 409, code="conflict")
    server.http.post(f"/v1/batches/{batch['id']}/cancel")
    wait_status(server, batch["id"], "cancelled")
    server.script.delay = 0
    answer = server.http.delete(f"/v1/files/{batch['input_file_id']}").json()
    assert answer == {"id": batch["input_file_id"], "object": "file", "deleted": True}


def test_files_whose_time_is_over_go_and_so_do_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.batches.runner.SWEEP_SECONDS", 0.05)
    monkeypatch.setattr("server.api.files.DEFAULT_LIFETIME_SECONDS", 1)
    with live_server(data_dir=tmp_path) as server:
        (tmp_path / "files" / "later").write_bytes(b"")  # not noticed before the next start
        file = upload(server, b"x")
        wait_until(lambda: server.http.get(f"/v1/files/{file['id']}").status_code == 404)
        assert files_on_disk(tmp_path) == {"later"}
        assert server.metric("gemma_stored_bytes") == 0
    with live_server(data_dir=tmp_path):
        assert files_on_disk(tmp_path) == set()


def test_only_its_user_can_read_the_directory(tmp_path: Path) -> None:
    with live_server(data_dir=tmp_path / "new" / "data"):
        assert (tmp_path / "new" / "data").stat().st_mode & 0o077 == 0
