"""A model's weights in the native back end's form, kept in a file that later starts map into memory.

Laws:

- A copy is used only if its key is the one asked for: the identity of the source's files, the number format and
  the version of the kernels that read it. Anything else is as if there were no copy.
- A copy appears under its name whole or not at all, and replaces the one that the same model, format and place
  had before.
- Without a place to write, or with too little room, there is no copy, and the server runs as well without.

    "GEMMAWT1" | length of the header, 8 bytes | header, JSON | arrays, each at a multiple of 4096
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from server.cache_directory import written_whole
from server.engine.backend.base import PreparedWeights
from server.engine.backend.native import Floats, PackedMatrix
from server.engine.models.config import GemmaConfig

logger = logging.getLogger(__name__)

_MAGIC = b"GEMMAWT1"
_ALIGNMENT = 4096
_MAX_HEADER_BYTES = 16 << 20
_SOURCE_SUFFIXES = (".gguf", ".safetensors", ".json")


@dataclass(frozen=True, slots=True)
class CachedModel:
    config: GemmaConfig
    weights: PreparedWeights


class _Array(msgspec.Struct, frozen=True):
    offset: int
    """From the end of the header."""
    num_bytes: int
    matrix: dict[str, int] | None
    """A PackedMatrix's fields beside its data; None: a norm, in fp32."""


class _Header(msgspec.Struct, frozen=True):
    key: str
    config: GemmaConfig
    arrays: dict[str, _Array]


class WeightCache:
    """The copy of one model in one format."""

    def __init__(self, directory: Path, model_path: Path, form: str) -> None:
        """form: all that the prepared form depends on beside the model. Raises OSError without the model."""
        place = hashlib.sha256(f"{model_path.resolve()}\0{form}".encode("utf-8", "surrogateescape")).hexdigest()
        self.path = directory / f"{model_path.stem}-{place[:16]}.weights"
        self._key = hashlib.sha256(f"{form}\0{_identity(model_path)}".encode()).hexdigest()

    def read(self) -> CachedModel | None:
        """The copy, mapped into memory, or None if there is none that can be used."""
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                start = file.read(len(_MAGIC) + 8)
                header_bytes = int.from_bytes(start[len(_MAGIC) :], "little")
                if not start.startswith(_MAGIC) or header_bytes > _MAX_HEADER_BYTES:
                    return None
                header = msgspec.json.decode(file.read(header_bytes), type=_Header)
                if header.key != self._key:
                    return None
                first = _aligned(len(start) + header_bytes)
                memory = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
                weights = {name: _view(memory, first, array) for name, array in header.arrays.items()}
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            if not isinstance(error, FileNotFoundError):
                logger.warning("the prepared weights in %s cannot be used: %s", self.path, error)
            return None
        return CachedModel(header.config, weights)

    def write(self, config: GemmaConfig, weights: PreparedWeights) -> None:
        """Keep a copy for the next start. What goes wrong is logged."""
        data: dict[str, memoryview] = {}
        arrays: dict[str, _Array] = {}
        offset = 0
        for name, weight in weights.items():
            content: npt.NDArray[Any] = weight.data if isinstance(weight, PackedMatrix) else weight
            data[name] = content.data.cast("B")
            arrays[name] = _Array(offset, len(data[name]), _fields(weight))
            offset = _aligned(offset + len(data[name]))
        header = msgspec.json.encode(_Header(self._key, config, arrays))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.path.parent).free
            if free < 2 * offset:
                logger.info("no copy of the prepared weights: %s has %d MiB left", self.path.parent, free >> 20)
                return
            self._write(header, ((arrays[name].offset, content) for name, content in data.items()))
        except OSError as error:
            logger.warning("no copy of the prepared weights in %s: %s", self.path, error)

    def _write(self, header: bytes, content: Iterable[tuple[int, memoryview]]) -> None:
        first = _aligned(len(_MAGIC) + 8 + len(header))
        with written_whole(self.path) as file:
            file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
            for offset, array in content:
                file.seek(first + offset)
                file.write(array)
            file.flush()
            os.fsync(file.fileno())


def _view(memory: mmap.mmap, first: int, array: _Array) -> PackedMatrix | Floats:
    """Raises ValueError if the array is not inside the file."""
    data = np.frombuffer(memory, dtype=np.uint8, count=array.num_bytes, offset=first + array.offset)
    return data.view(np.float32) if array.matrix is None else PackedMatrix(data, **array.matrix)


def _fields(weight: PackedMatrix | Floats) -> dict[str, int] | None:
    if not isinstance(weight, PackedMatrix):
        return None
    return {field.name: getattr(weight, field.name) for field in fields(weight) if field.name != "data"}


def _identity(model_path: Path) -> str:
    """Changes when a file of the model does: as in git's index, size, times and inode stand for the content."""
    names = sorted(model_path.iterdir()) if model_path.is_dir() else [model_path]
    stats = [(name.name, name.stat()) for name in names if name.suffix in _SOURCE_SUFFIXES]
    return repr([(name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats])


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
