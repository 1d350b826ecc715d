"""What downloads of models have in common, wherever they come from."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from server.model_source import ModelSourceError

CONFIG_FILES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LISTED = 10


def model_files(place: str, names: Iterable[str], choice: str) -> list[str]:
    """The files to load of those that `place` has: the safetensors checkpoint, or else its only GGUF file.

    choice: what to give --model for one of several GGUF files. Raises ModelSourceError.
    """
    plain_names = sorted(filter(_PLAIN_NAME.fullmatch, names))
    weights = [name for name in plain_names if name.endswith(".safetensors")]
    if weights:
        return [*(name for name in plain_names if name in CONFIG_FILES), *weights]
    gguf_files = [name for name in plain_names if name.endswith(".gguf")]
    if len(gguf_files) > 1:
        raise ModelSourceError(
            f"{place} has several GGUF files; choose one with --model {choice}, of {listing(gguf_files)}"
        )
    if not gguf_files:
        raise ModelSourceError(
            f"{place} has neither safetensors nor a GGUF file. Pickled weights (*.bin) are not loaded, since "
            "they can run code: choose a repository with safetensors, or convert it"
        )
    return gguf_files


def listing(names: Iterable[str]) -> str:
    """Some of the names, for an error."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _LISTED} more" if len(ordered) > _LISTED else ""
    return ", ".join(ordered[:_LISTED]) + more


def check_space(place: str, num_bytes: int, directory: Path) -> None:
    """Raises ModelSourceError if the disk of `directory`, which may not exist yet, has not so much room."""
    directory = directory.absolute()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise ModelSourceError(
            f"{place} needs {num_bytes / 1e9:.1f} GB, but {directory} has {free / 1e9:.1f} GB free: make "
            "room, or choose another --download-dir"
        )


def disk_filled_up(place: str) -> ModelSourceError:
    return ModelSourceError(
        f"the disk filled up during the download of {place}: make room, or choose another --download-dir"
    )
