"""Models at gs:// addresses."""

from __future__ import annotations

import builtins
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.auth.exceptions import TransportError

from server import gcs_download
from server.model_source import DownloadProgress, ModelFiles, ModelSourceError, resolve
from tests.unit.gcs_stand_in import BUCKET, GcsStandIn, running

CHUNK = 1000
WEIGHTS = random.Random(0).randbytes(10 * CHUNK + 1)
FILES = {"config.json": b"{}", "tokenizer.json": b"[]", "model.safetensors": WEIGHTS}
MODEL = f"gs://{BUCKET}/some/gemma"


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsStandIn]:
    monkeypatch.setattr(gcs_download, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(gcs_download, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(gcs_download, "LIST_SECONDS", 0.2)
    with running(GcsStandIn({f"some/gemma/{name}": data for name, data in FILES.items()})) as stand_in:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", stand_in.url)
        yield stand_in


def fetch(directory: Path, model: str = MODEL, **options: Any) -> ModelFiles:
    return resolve(model, download_dir=directory, **options)


def assert_is_model(files: ModelFiles) -> None:
    assert {name: (files.path / name).read_bytes() for name in FILES} == FILES
    assert not list(files.path.glob("*.partial")) + list(files.path.glob("*.chunks"))


def test_a_checkpoint_is_downloaded_without_what_is_not_needed(gcs: GcsStandIn, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "evil.py", "../escape.safetensors", "other/model.safetensors", ""):
        gcs.objects[f"some/gemma/{name}"] = b"x"
    files = fetch(tmp_path, MODEL + "/")
    assert_is_model(files)
    assert files.name == "gemma"
    assert {name for name, _, _ in gcs.ranges} == {f"some/gemma/{name}" for name in FILES}
    assert not list(tmp_path.rglob("*.bin"))


def test_chunks_of_one_file_are_fetched_side_by_side(gcs: GcsStandIn, tmp_path: Path) -> None:
    gcs.delay = 0.05
    fetch(tmp_path)
    assert 4 <= gcs.most_at_once <= gcs_download.NUM_THREADS


def test_progress_counts_every_byte_once_and_ends_at_the_total(gcs: GcsStandIn, tmp_path: Path) -> None:
    seen: list[DownloadProgress] = []
    fetch(tmp_path, progress=seen.append)
    done = [progress.done_bytes for progress in seen]
    assert done == sorted(done)
    assert seen[-1] == DownloadProgress(total := sum(map(len, FILES.values())), total)


def test_a_second_start_downloads_nothing(gcs: GcsStandIn, tmp_path: Path) -> None:
    fetch(tmp_path)
    gcs.ranges.clear()
    assert_is_model(fetch(tmp_path))
    assert not gcs.ranges


@pytest.mark.parametrize("fault", ["cut", "unavailable"])
def test_a_read_that_fails_is_tried_again(gcs: GcsStandIn, tmp_path: Path, fault: str) -> None:
    setattr(gcs, fault, 5)
    assert_is_model(fetch(tmp_path))


def test_a_start_after_a_failed_one_fetches_only_what_is_missing(gcs: GcsStandIn, tmp_path: Path) -> None:
    fails_at = 6 * CHUNK
    read = gcs_download._File._read

    def failing(self: Any, start: int, stop: int) -> bytes:
        if start == fails_at:
            raise OSError("pulled the plug")
        return read(self, start, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gcs_download._File, "_read", failing)
        with pytest.raises(ModelSourceError, match="pulled the plug"):
            fetch(tmp_path)
    fetched = {first for name, first, _ in gcs.ranges if name.endswith(".safetensors")}
    assert fails_at not in fetched
    assert len(fetched) >= 6
    gcs.ranges.clear()
    seen: list[DownloadProgress] = []
    assert_is_model(fetch(tmp_path, progress=seen.append))
    again = {first for name, first, _ in gcs.ranges}
    assert again
    assert not again & fetched
    assert seen[-1].total_bytes == sum(end - first for _, first, end in gcs.ranges)


def test_another_generation_starts_afresh(gcs: GcsStandIn, tmp_path: Path) -> None:
    (files := fetch(tmp_path))
    gcs.generation += 1
    changed = bytes(reversed(WEIGHTS))
    gcs.objects["some/gemma/model.safetensors"] = changed
    fetch(tmp_path)
    assert (files.path / "model.safetensors").read_bytes() == changed


def test_what_another_generation_left_half_done_is_not_used(gcs: GcsStandIn, tmp_path: Path) -> None:
    directory = tmp_path / BUCKET / "some" / "gemma"
    directory.mkdir(parents=True)
    (directory / "model.safetensors.partial").write_bytes(b"?" * len(WEIGHTS))
    (directory / "model.safetensors.chunks").write_text(
        f'{{"generation": 6, "chunk_bytes": {CHUNK}, "done": [0, 1, 2]}}'
    )
    assert_is_model(fetch(tmp_path))


def test_files_that_the_bucket_has_no_more_are_removed(gcs: GcsStandIn, tmp_path: Path) -> None:
    gcs.objects["some/gemma/extra.safetensors"] = b"x"
    files = fetch(tmp_path)
    assert (files.path / "extra.safetensors").exists()
    del gcs.objects["some/gemma/extra.safetensors"]
    fetch(tmp_path)
    assert not (files.path / "extra.safetensors").exists()


def test_a_spoiled_file_is_fetched_again(gcs: GcsStandIn, tmp_path: Path) -> None:
    gcs.spoiled = 1
    assert_is_model(fetch(tmp_path))
    assert len(gcs.ranges) > 13


def test_a_file_that_stays_spoiled_is_refused(gcs: GcsStandIn, tmp_path: Path) -> None:
    gcs.spoiled = 1_000_000
    with pytest.raises(ModelSourceError, match="checksum"):
        fetch(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_object_that_is_replaced_under_way_is_noticed(gcs: GcsStandIn, tmp_path: Path) -> None:
    gcs.replaced = True
    with pytest.raises(ModelSourceError, match="was replaced during the download"):
        fetch(tmp_path)


def test_without_the_bucket_a_complete_copy_is_used(gcs: GcsStandIn, tmp_path: Path) -> None:
    fetch(tmp_path)
    gcs.status = 503
    assert_is_model(fetch(tmp_path))


def test_without_the_bucket_half_a_copy_is_not(gcs: GcsStandIn, tmp_path: Path) -> None:
    gcs.spoiled = 1_000_000
    with pytest.raises(ModelSourceError):
        fetch(tmp_path)
    gcs.status = 503
    with pytest.raises(ModelSourceError, match="start again"):
        fetch(tmp_path)


@pytest.mark.parametrize(("status", "said"), [(403, "roles/storage.objectViewer"), (404, "does not exist")])
def test_a_refusal_says_what_to_do(gcs: GcsStandIn, tmp_path: Path, status: int, said: str) -> None:
    gcs.status = status
    with pytest.raises(ModelSourceError, match=said):
        fetch(tmp_path)


def test_a_model_larger_than_the_disk_is_refused_before(
    gcs: GcsStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(ModelSourceError, match="make room"):
        fetch(tmp_path)
    assert not gcs.ranges


def test_one_gguf_object_can_be_named(gcs: GcsStandIn, tmp_path: Path) -> None:
    gcs.objects |= {"quantised/a.gguf": b"a" * 3000, "quantised/b.gguf": b"b"}
    files = fetch(tmp_path, f"gs://{BUCKET}/quantised/a.gguf")
    assert files.path.read_bytes() == b"a" * 3000
    assert files.name == "a"
    with pytest.raises(ModelSourceError, match="several GGUF files"):
        fetch(tmp_path, f"gs://{BUCKET}/quantised")
    with pytest.raises(ModelSourceError, match="does not exist"):
        fetch(tmp_path, f"gs://{BUCKET}/quantised/c.gguf")


def test_an_empty_prefix_is_refused(gcs: GcsStandIn, tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="has no objects"):
        fetch(tmp_path, f"gs://{BUCKET}/nothing")


@pytest.mark.parametrize(
    "model", ["gs://", "gs:///x", "gs://b/../x", "gs://b//x", "gs://b/./x", "gs://B_/x", "gs://b/a\0b"]
)
def test_what_is_no_address_is_refused(model: str) -> None:
    with pytest.raises(ModelSourceError, match="not an address of the form gs://"):
        resolve(model)


def test_a_revision_is_refused() -> None:
    with pytest.raises(ModelSourceError, match="--revision"):
        resolve(MODEL, revision="main")


def test_without_the_client_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import_ = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "server" and "gcs_download" in (arguments[2] or ()):
            raise ImportError(name)
        return import_(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModelSourceError, match=r"gemma-server\[gcs\]"):
        resolve(MODEL)


def test_a_token_that_cannot_be_renewed_counts_as_an_unreachable_bucket(
    gcs: GcsStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(tmp_path)

    def unreachable() -> None:
        raise TransportError("no route")  # type: ignore[no-untyped-call]  # the library has no types

    monkeypatch.setattr(gcs_download, "_client", unreachable)
    assert_is_model(fetch(tmp_path))
    with pytest.raises(ModelSourceError, match=r"the download of .* failed \(no route\)"):
        fetch(tmp_path / "elsewhere")


def test_a_copy_that_lost_a_file_to_an_update_cut_off_is_not_used(gcs: GcsStandIn, tmp_path: Path) -> None:
    gcs.objects["some/gemma/more.safetensors"] = b"more"
    fetch(tmp_path)
    del gcs.objects["some/gemma/more.safetensors"]
    gcs.objects["some/gemma/model.safetensors"] = WEIGHTS[::-1]
    gcs.generation += 1
    gcs.replaced = True
    for status in (None, 503):
        gcs.status = status
        with pytest.raises(ModelSourceError):
            fetch(tmp_path)


def test_without_the_bucket_another_file_of_its_directory_is_not_taken(gcs: GcsStandIn, tmp_path: Path) -> None:
    fetch(tmp_path)
    gcs.status = 503
    with pytest.raises(ModelSourceError, match="failed"):
        fetch(tmp_path, f"{MODEL}/absent.gguf")


ENDING = """
import os, sys, threading
from pathlib import Path
from server import gcs_download
from server.model_source import resolve
gcs_download.CHUNK_BYTES = 1000
begun = threading.Event()
arguments = {"download_dir": Path(sys.argv[2]), "progress": lambda p: p.done_bytes > 5000 and begun.set()}
threading.Thread(target=resolve, args=(sys.argv[1],), kwargs=arguments, daemon=True).start()
assert begun.wait(30)
"""


def test_a_process_can_end_amid_a_download(gcs: GcsStandIn, tmp_path: Path) -> None:
    gcs.delay = 0.2
    gcs.objects["some/gemma/model.safetensors"] = bytes(400 * CHUNK)  # 10 s
    subprocess.run([sys.executable, "-c", ENDING, MODEL, str(tmp_path)], check=True, timeout=60)
    assert len(gcs.ranges) < 100
