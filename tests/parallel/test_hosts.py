"""Servers on several hosts, as a LeaderWorkerSet starts them, that compute one model."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.batches.store import Store
from tests.e2e.server_process import ServerProcess, running_server

OPTIONS = ("--device", "cpu", "--dtype", "float32", "--num-threads", "1")
BODY = {"prompt": "hello there", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


def answer(server: ServerProcess) -> str:
    with server.client() as client:
        response = client.post("/v1/completions", json=BODY)
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["text"]
        return text


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_hosts_answer_as_one_does_and_end_together(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_server(tiny_checkpoint, *OPTIONS, "--backend", "reference") as one:
        expected = answer(one)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("LWS_GROUP_SIZE", "2")
    monkeypatch.setenv("LWS_LEADER_ADDRESS", "127.0.0.1")
    monkeypatch.setenv("LWS_WORKER_INDEX", "1")
    second = ServerProcess(tiny_checkpoint, *OPTIONS, "--tensor-parallel-size", "4")
    try:
        monkeypatch.setenv("LWS_WORKER_INDEX", "0")
        with running_server(tiny_checkpoint, *OPTIONS, "--tensor-parallel-size", "4") as first:
            assert answer(first) == expected
        assert second.process.wait(timeout=60) != 0
        assert "the ranks of this host have ended" in second.log
        assert "running on http" not in second.log
    finally:
        second.close()


async def test_a_host_that_only_lends_its_devices_opens_no_data_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, no_model = tmp_path / "data", tmp_path / "none"
    monkeypatch.setenv("LWS_GROUP_SIZE", "2")
    monkeypatch.setenv("LWS_LEADER_ADDRESS", "127.0.0.1")
    monkeypatch.setenv("LWS_WORKER_INDEX", "1")
    store = Store(data, max_bytes=1 << 20, max_files=10)  # as the first host has it open
    second = ServerProcess(no_model, *OPTIONS, "--tensor-parallel-size", "2", "--data-dir", str(data))
    try:
        second.assert_refuses(str(no_model))
    finally:
        second.close()
        await store.close()
