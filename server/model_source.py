"""Turns a `--model` value into files on this machine, downloading them if they are not here yet.

Laws:
1. A value that is not an existing path is taken for a Hugging Face id only if it has the shape of one, so that
   no name leads out of the cache.
2. Whatever goes wrong is one `ModelSourceError`, whose text says what to do.
3. What only some values need (huggingface_hub, the embedded model) is imported when such a value is met: this
   runs first in the server's start. torch is never imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

EMBEDDED = "embedded"

_GCS = "gs://"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}")
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB_ID = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?::(?P<file>{_NAME}\.gguf))?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,254}")


class ModelSourceError(Exception):
    """The model cannot be had. The text is one line for the person who started the server."""


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    done_bytes: int
    total_bytes: int
    """Of the files that were not in the cache when the download began."""

    @property
    def fraction(self) -> float:
        return min(1.0, self.done_bytes / self.total_bytes) if self.total_bytes else 1.0


@dataclass(frozen=True, slots=True)
class ModelFiles:
    path: Path
    """The .gguf file, or the directory that holds config.json and *.safetensors."""
    tokenizer_file: Path | None
    """tokenizer.json of a directory; None: the vocabulary is in the GGUF file."""
    name: str
    """What clients call the model unless told otherwise."""


def resolve(
    model: str,
    revision: str | None = None,
    download_dir: Path | None = None,
    progress: Callable[[DownloadProgress], None] = lambda _: None,
) -> ModelFiles:
    """Find the files of `model`: a directory, a .gguf file, a gs:// address of one of these two, `embedded`, or
    a Hugging Face id.

    An id is `org/name`, or `org/name:file.gguf` for one file of a repository; `revision` is its branch, tag or
    commit. `download_dir` replaces the Hugging Face cache. `progress` is called while files are downloaded;
    blocks for as long as that takes. Raises ModelSourceError.
    """
    if model == EMBEDDED:
        from server import embedded_model  # which imports this module

        return ModelFiles(embedded_model.locate(), None, embedded_model.MODEL_NAME)
    if model.startswith(_GCS):
        return _in_bucket(model, revision, download_dir, progress)
    path = Path(os.path.expanduser(model))
    if model and path.is_dir():
        return _in_directory(path, path.resolve().name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelSourceError(f"--model {model}: a model file must be a .gguf file; or give its directory")
        return ModelFiles(path, None, path.stem)
    match = _HUB_ID.fullmatch(model)
    if match is None or ".." in model:
        raise ModelSourceError(
            f"--model {model!r}: no such file or directory, and not a Hugging Face id (org/name or "
            f"org/name:file.gguf), a gs:// address or {EMBEDDED!r}"
        )
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ModelSourceError(f"--revision {revision!r} is not the name of a branch, tag or commit")
    from server import hub_download  # which imports this module

    repo, file = match["repo"], match["file"]
    directory = hub_download.fetch(repo, file, revision or "main", download_dir, progress)
    if file is not None:
        return ModelFiles(directory / file, None, repo)
    return _in_directory(directory, repo)


def _in_bucket(
    model: str, revision: str | None, download_dir: Path | None, progress: Callable[[DownloadProgress], None]
) -> ModelFiles:
    if revision is not None:
        raise ModelSourceError("--revision is for Hugging Face ids; a gs:// address has none")
    bucket, _, path = model.removeprefix(_GCS).partition("/")
    parts = path.rstrip("/").split("/") if path.rstrip("/") else []
    if not _BUCKET.fullmatch(bucket) or any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise ModelSourceError(f"--model {model!r}: not an address of the form gs://BUCKET/DIRECTORY")
    try:
        from server import gcs_download  # which imports this module
    except ImportError as error:
        reason = f"--model {model} needs the client of Cloud Storage: pip install 'gemma-server[gcs]'"
        raise ModelSourceError(reason) from error
    found = gcs_download.fetch(bucket, "/".join(parts), download_dir, progress)
    name = parts[-1] if parts else bucket
    if found.is_dir():
        return _in_directory(found, name)
    return ModelFiles(found, None, name.removesuffix(".gguf"))


def _in_directory(directory: Path, name: str) -> ModelFiles:
    """What a directory holds: a checkpoint with its configuration, or else a single GGUF file."""
    gguf_files = sorted(file.name for file in directory.glob("*.gguf"))
    has_config = (directory / "config.json").exists()
    if not has_config and not any(directory.glob("*.safetensors")):
        if len(gguf_files) == 1:
            return ModelFiles(directory / gguf_files[0], None, name)
        found = (
            "several .gguf files, name one of them" if gguf_files else "neither config.json nor a .gguf file"
        )
        raise ModelSourceError(f"{name}: the model directory has {found}")
    if not has_config:
        raise ModelSourceError(f"{name}: config.json is missing from the model directory")
    if not (directory / "tokenizer.json").exists():
        raise ModelSourceError(
            f"{name}: tokenizer.json is missing from the model directory; transformers can write it: "
            "AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)"
        )
    return ModelFiles(directory, directory / "tokenizer.json", name)
