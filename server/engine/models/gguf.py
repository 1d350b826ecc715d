"""Reads the header of a GGUF file: metadata and the table of tensors. Imports neither torch nor numpy.

Laws:
1. Nothing that the file says is believed before it was compared with the size of the file: every count, length,
   dimension and offset is checked before memory is allocated for it, or anything is read at it. What a header
   takes in memory is bounded, however large the file.
2. After `GGUFFile.open` each tensor lies wholly inside the file, aligned, and overlaps no other.
3. The file is data: nothing in it is executed, and every fault in it is a `GGUFError` with names and numbers.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import enum
import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

MetadataValue = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]
Metadata = dict[str, MetadataValue]

MAX_DIMENSIONS = 4
"""GGML_MAX_DIMS in ggml.h."""
MAX_NAME_BYTES = 65535
"""The longest key that the specification allows; applied to tensor names as well."""
MAX_HEADER_BYTES = 32 << 20
"""Metadata and table of tensors; Gemma 3's, with its vocabulary, take 7 MB."""
DEFAULT_ALIGNMENT = 32

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MIN_KEY_VALUE_BYTES = 8 + 4 + 1  # key length, value type, the smallest value
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # name length, dimension count, one dimension, type, offset


class GGUFError(ValueError):
    """The file is not a GGUF file that this server can read. The message says what and where."""


class GGMLType(enum.IntEnum):
    """The tensor encodings that this server can decode, by their number in the file (ggml_type in ggml.h)."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30

    @property
    def block_size(self) -> int:
        """Number of consecutive elements of a row that are encoded together."""
        return _BLOCKS[self][0]

    @property
    def block_bytes(self) -> int:
        """Bytes of one encoded block."""
        return _BLOCKS[self][1]


# Sizes of the structs block_* in ggml-common.h: (elements, bytes).
_BLOCKS = {
    GGMLType.F32: (1, 4),
    GGMLType.F16: (1, 2),
    GGMLType.BF16: (1, 2),
    GGMLType.Q4_0: (32, 18),
    GGMLType.Q4_1: (32, 20),
    GGMLType.Q5_0: (32, 22),
    GGMLType.Q5_1: (32, 24),
    GGMLType.Q8_0: (32, 34),
    GGMLType.Q2_K: (256, 84),
    GGMLType.Q3_K: (256, 110),
    GGMLType.Q4_K: (256, 144),
    GGMLType.Q5_K: (256, 176),
    GGMLType.Q6_K: (256, 210),
}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies. `shape` is in torch's order, slowest dimension first: the file's reversed."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    """Bytes from the start of the file."""

    @property
    def num_rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.type.block_size * self.type.block_bytes

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes


class GGUFFile:
    """An open GGUF file. Close it, or use it as a context manager."""

    def __init__(self, path: Path, file: FileIO, metadata: Metadata, tensors: dict[str, GGUFTensor]) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors
        self._file = file

    @classmethod
    def open(cls, path: Path, with_pieces: bool = True) -> Self:
        """Read and check the header. with_pieces: see `read_metadata`.

        Raises GGUFError for a malformed or unsupported file, OSError if it cannot be read.
        """
        file = path.open("rb", buffering=0)
        try:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise GGUFError(f"{path.name}: {size} bytes is too short for a GGUF header of 24 bytes")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                metadata, tensors = _HeaderReader(data, path.name, with_pieces).read()
        except BaseException:
            file.close()
            raise
        return cls(path, file, metadata, tensors)

    def read_rows_into(self, tensor: GGUFTensor, first_row: int, buffer: memoryview) -> None:
        """Fill `buffer` (writable bytes, a whole number of rows) with encoded rows from `first_row` on.

        Plain reads rather than a memory map: pages of a map count as resident memory, and a file that shrinks
        under a map kills the process with SIGBUS. Several threads may call it. Raises GGUFError if the file has
        shrunk since it was opened.
        """
        offset = tensor.offset + first_row * tensor.row_bytes
        filled = 0
        while filled < len(buffer):
            count = os.preadv(self._file.fileno(), [buffer[filled:]], offset + filled)
            if not count:
                raise GGUFError(
                    f"{self.path.name}: the file ended inside tensor {tensor.name}; it was cut while being read"
                )
            filled += count

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metadata(path: Path, with_pieces: bool = True) -> Metadata:
    """The key-value pairs of a GGUF file (hyper-parameters, vocabulary).

    with_pieces: otherwise the vocabulary's strings are empty, which saves most of the time. Raises GGUFError,
    OSError.
    """
    with GGUFFile.open(path, with_pieces) as file:
        return file.metadata


_VOCABULARY = "tokenizer."
_ARRAY = 9
_STRING = 8
# Value types of the format, but for string (8) and array (9): number -> little-endian struct code.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class _HeaderReader:
    """A cursor over the mapped file which never moves past its end."""

    def __init__(self, data: mmap.mmap, file_name: str, with_pieces: bool) -> None:
        self._with_pieces = with_pieces
        self._data = data
        self._size = len(data)
        self._end = min(self._size, MAX_HEADER_BYTES)
        """Of what may be read as header."""
        self._whole = "the file" if self._end == self._size else f"the limit of {self._end} bytes for a header"
        self._position = 0
        self._file_name = file_name

    def read(self) -> tuple[Metadata, dict[str, GGUFTensor]]:
        magic = self._data[:4]
        if magic != _MAGIC:
            self._fail(f"not a GGUF file: it starts with {magic!r} instead of {_MAGIC!r}")
        self._position = 4
        version = self._u32()
        if version not in _VERSIONS:
            order = " (a big-endian file)" if int.from_bytes(_U32.pack(version), "big") in _VERSIONS else ""
            self._fail(f"GGUF version {version}{order} is not supported; versions 2 and 3, little-endian, are")
        num_tensors = self._count("tensor count", _MIN_TENSOR_BYTES)
        num_pairs = self._count("metadata count", _MIN_KEY_VALUE_BYTES)
        metadata: Metadata = {}
        for _ in range(num_pairs):
            key = self._name("metadata key")
            if key in metadata:
                self._fail(f"metadata key {key} occurs twice")
            metadata[key] = self._value(key)
        entries = [self._tensor_entry() for _ in range(num_tensors)]
        alignment = self._alignment(metadata)
        data_start = -(-self._position // alignment) * alignment
        return metadata, self._place(entries, data_start, alignment)

    def _value(self, key: str) -> MetadataValue:
        kind = self._u32()
        if kind == _STRING:
            return self._strings(1, key)[0]
        if kind == _ARRAY:
            return self._array(key)
        return self._scalars(kind, 1, key)[0]

    def _array(self, key: str) -> MetadataValue:
        kind = self._u32()
        if kind == _STRING:
            keep = self._with_pieces or not key.startswith(_VOCABULARY)
            return self._strings(self._count(f"length of array {key}", 8), key, keep)
        if kind == _ARRAY:
            self._fail(f"metadata key {key} is an array of arrays, which is not supported")
        return self._scalars(kind, self._count(f"length of array {key}", 1), key)

    def _scalars(self, kind: int, count: int, key: str) -> list[bool] | list[int] | list[float]:
        code = _SCALARS.get(kind)
        if code is None:
            self._fail(f"metadata key {key} has the unknown value type {kind}")
        num_bytes = count * struct.calcsize("<" + code)
        self._require(num_bytes, f"metadata key {key}")
        values = struct.unpack_from(f"<{count}{code}", self._data, self._position)
        self._position += num_bytes
        return list(values)

    def _strings(self, count: int, key: str, keep: bool = True) -> list[str]:
        """`count` strings, empty ones if they are not to be kept.

        The vocabulary has 262,144 of them, so this loop is written for speed.
        """
        data, end, position = self._data, self._end, self._position
        unpack: Callable[[mmap.mmap, int], tuple[int]] = _U64.unpack_from
        result: list[str] = []
        for index in range(count):
            start = position + 8
            if start > end:
                self._fail(f"{self._whole} ends inside string {index} of metadata key {key}")
            position = start + unpack(data, position)[0]
            if position > end:
                self._fail(
                    f"string {index} of metadata key {key} is {position - start} bytes long, but only "
                    f"{end - start} bytes of {self._whole} are left"
                )
            if not keep:
                result.append("")
                continue
            try:
                result.append(data[start:position].decode())
            except UnicodeDecodeError:
                self._fail(f"string {index} of metadata key {key} is not valid UTF-8")
        self._position = position
        return result

    def _alignment(self, metadata: Metadata) -> int:
        value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(value, int) or isinstance(value, bool) or value < 8 or value % 8:
            self._fail(f"general.alignment is {value!r}; it must be a positive multiple of 8")
        return value

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, dimensions as in the file: fastest first, type number, offset in the data section)"""
        name = self._name("tensor name")
        num_dimensions = self._u32()
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            self._fail(f"tensor {name} has {num_dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible")
        dimensions = tuple(self._u64() for _ in range(num_dimensions))
        return name, dimensions, self._u32(), self._u64()

    def _place(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], data_start: int, alignment: int
    ) -> dict[str, GGUFTensor]:
        tensors: dict[str, GGUFTensor] = {}
        for name, dimensions, type_number, offset in entries:
            if name in tensors:
                self._fail(f"tensor {name} occurs twice")
            if type_number not in _BLOCKS:
                known = ", ".join(kind.name for kind in GGMLType)
                self._fail(
                    f"tensor {name} has type number {type_number}, which is not supported; supported: {known}"
                )
            kind = GGMLType(type_number)
            if min(dimensions) < 1 or dimensions[0] % kind.block_size:
                self._fail(
                    f"tensor {name} has dimensions {dimensions}; they must be positive, and the first a "
                    f"multiple of {kind.block_size} for type {kind.name}"
                )
            if offset % alignment:
                self._fail(f"tensor {name} is at offset {offset}, not a multiple of the alignment {alignment}")
            tensor = GGUFTensor(name, dimensions[::-1], kind, data_start + offset)
            if tensor.offset + tensor.num_bytes > self._size:
                self._fail(
                    f"tensor {name} of {tensor.num_bytes} bytes at byte {tensor.offset} reaches past the end "
                    f"of the file of {self._size} bytes; is the download complete?"
                )
            tensors[name] = tensor
        self._check_no_overlap(tensors)
        return tensors

    def _check_no_overlap(self, tensors: dict[str, GGUFTensor]) -> None:
        end, previous = 0, ""
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                self._fail(
                    f"tensor {tensor.name} at byte {tensor.offset} overlaps {previous}, which ends at {end}"
                )
            end, previous = tensor.offset + tensor.num_bytes, tensor.name

    def _name(self, what: str) -> str:
        start = self._position
        length = self._u64()
        if length > MAX_NAME_BYTES:
            self._fail(f"the {what} at byte {start} is {length} bytes long; {MAX_NAME_BYTES} is the limit")
        self._position = start
        return self._strings(1, f"({what} at byte {start})")[0]

    def _count(self, what: str, min_item_bytes: int) -> int:
        """A number of items, each of at least `min_item_bytes`, which must still fit in the file."""
        count = self._u64()
        left = self._end - self._position
        if count * min_item_bytes > left:
            self._fail(f"{what} is {count}, but only {left} bytes of {self._whole} are left")
        return count

    def _u32(self) -> int:
        return int(self._unpack(_U32))

    def _u64(self) -> int:
        return int(self._unpack(_U64))

    def _unpack(self, code: struct.Struct) -> int:
        self._require(code.size, "the header")
        value: int = code.unpack_from(self._data, self._position)[0]
        self._position += code.size
        return value

    def _require(self, num_bytes: int, what: str) -> None:
        left = self._end - self._position
        if num_bytes > left:
            self._fail(
                f"{self._whole} ends inside {what}: {num_bytes} bytes needed at byte {self._position}, "
                f"{left} left"
            )

    def _fail(self, message: str) -> NoReturn:
        raise GGUFError(f"{self._file_name}: {message}")
