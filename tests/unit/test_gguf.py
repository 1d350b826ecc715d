from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest
import torch

from server.engine.models import gguf_dequant
from server.engine.models.gguf import GGMLType, GGUFError, GGUFFile, read_metadata
from server.engine.models.gguf_dequant import read_tensor

CPU = torch.device("cpu")


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return u64(len(data)) + data


def tensor_entry(
    name: str = "t", dimensions: tuple[int, ...] = (4, 2), kind: int = 0, offset: int = 0
) -> bytes:
    return text(name) + u32(len(dimensions)) + b"".join(map(u64, dimensions)) + u32(kind) + u64(offset)


def header(
    num_tensors: int, num_pairs: int, body: bytes = b"", version: int = 3, magic: bytes = b"GGUF"
) -> bytes:
    return magic + u32(version) + u64(num_tensors) + u64(num_pairs) + body


def aligned(content: bytes, data: bytes) -> bytes:
    return content + bytes(-len(content) % 32) + data


PAIR = text("k") + u32(4) + u32(1)


@pytest.fixture
def open_bytes(tmp_path: Path) -> Callable[[bytes], GGUFFile]:
    def open_bytes(content: bytes) -> GGUFFile:
        path = tmp_path / "m.gguf"
        path.write_bytes(content)
        return GGUFFile.open(path)

    return open_bytes


def write_reference_file(path: Path) -> dict[str, Any]:
    """A file with every metadata type, written by the reference implementation."""
    writer = reference.GGUFWriter(path, "gemma3")
    writer.add_uint8("k.u8", 255)
    writer.add_int8("k.i8", -1)
    writer.add_uint16("k.u16", 65535)
    writer.add_int16("k.i16", -2)
    writer.add_uint32("k.u32", 4_000_000_000)
    writer.add_int32("k.i32", -3)
    writer.add_uint64("k.u64", 2**63)
    writer.add_int64("k.i64", -(2**40))
    writer.add_float32("k.f32", 0.5)
    writer.add_float64("k.f64", 1e-300)
    writer.add_bool("k.bool", True)
    writer.add_string("k.string", "né 𓀀")
    writer.add_array("k.strings", ["", "▁", "a\nb"])
    writer.add_array("k.ints", [1, -2, 3])
    writer.add_array("k.floats", [0.5, -1000.0])
    writer.add_array("k.bools", [True, False])
    writer.add_tensor("matrix", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("vector", np.array([7, 8, 9, 10], dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {
        "general.architecture": "gemma3",
        "k.u8": 255,
        "k.i8": -1,
        "k.u16": 65535,
        "k.i16": -2,
        "k.u32": 4_000_000_000,
        "k.i32": -3,
        "k.u64": 2**63,
        "k.i64": -(2**40),
        "k.f32": 0.5,
        "k.f64": 1e-300,
        "k.bool": True,
        "k.string": "né 𓀀",
        "k.strings": ["", "▁", "a\nb"],
        "k.ints": [1, -2, 3],
        "k.floats": [0.5, -1000.0],
        "k.bools": [True, False],
    }


def test_metadata_of_every_type_is_read_as_plain_python_values(tmp_path: Path) -> None:
    expected = write_reference_file(tmp_path / "m.gguf")
    metadata = read_metadata(tmp_path / "m.gguf")
    assert metadata == expected
    assert [type(value) for value in metadata.values()] == [type(value) for value in expected.values()]


def test_tensors_have_torch_order_shapes_and_their_values(tmp_path: Path) -> None:
    write_reference_file(tmp_path / "m.gguf")
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        assert {name: tensor.shape for name, tensor in file.tensors.items()} == {
            "matrix": (2, 3),
            "vector": (4,),
        }
        assert read_tensor(file, file.tensors["matrix"], torch.float32, CPU).tolist() == [[0, 1, 2], [3, 4, 5]]
        assert read_tensor(file, file.tensors["vector"], torch.bfloat16, CPU).tolist() == [7, 8, 9, 10]


def test_version_2_is_read(open_bytes: Callable[[bytes], GGUFFile]) -> None:
    with open_bytes(header(0, 1, PAIR, version=2)) as file:
        assert file.metadata == {"k": 1}


def test_a_vocabulary_sized_string_array_is_read_quickly(tmp_path: Path) -> None:
    words = b"".join(text(f"▁word{index}") for index in range(262_144))
    path = tmp_path / "m.gguf"
    path.write_bytes(header(0, 1, text("tokens") + u32(9) + u32(8) + u64(262_144) + words))
    start = time.perf_counter()
    tokens = read_metadata(path)["tokens"]
    # About 0.15 s; the reference implementation takes more than 10.
    assert time.perf_counter() - start < 2
    assert isinstance(tokens, list)
    assert len(tokens) == 262_144
    assert tokens[-1] == "▁word262143"


def test_metadata_can_be_read_without_the_vocabularys_pieces(tmp_path: Path) -> None:
    words = text("tokenizer.ggml.tokens") + u32(9) + u32(8) + u64(2) + text("a") + text(b"\xff is no UTF-8")
    path = tmp_path / "m.gguf"
    model = text("tokenizer.ggml.model") + u32(8) + text("llama")
    path.write_bytes(header(0, 3, words + model + PAIR))
    expected = {"tokenizer.ggml.tokens": ["", ""], "tokenizer.ggml.model": "llama", "k": 1}
    assert read_metadata(path, with_pieces=False) == expected
    with pytest.raises(GGUFError, match="not valid UTF-8"):
        read_metadata(path)


MALFORMED = {
    "not GGUF": (header(0, 0, magic=b"GGML"), "not a GGUF file"),
    "a zip archive": (b"PK\3\4" + bytes(64), "not a GGUF file"),
    "empty": (b"", "0 bytes is too short"),
    "version 1": (header(0, 0, version=1), "version 1 is not supported"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "absurd tensor count": (header(2**60, 0), f"tensor count is {2**60}, but only"),
    "absurd metadata count": (header(0, 2**60), f"metadata count is {2**60}, but only"),
    "metadata cut off": (header(0, 1, PAIR[:-1]), "ends inside metadata key k"),
    "absurd key length": (
        header(0, 1, u64(2**50) + bytes(16)),
        "is 1125899906842624 bytes long; 65535 is the limit",
    ),
    "absurd string length": (
        header(0, 1, text("k") + u32(8) + u64(2**62)),
        f"string 0 of metadata key k is {2**62} bytes long, but only 0",
    ),
    "absurd array length": (
        header(0, 1, text("k") + u32(9) + u32(6) + u64(2**62)),
        f"length of array k is {2**62}, but only 0",
    ),
    "array longer than the file": (
        header(0, 1, text("k") + u32(9) + u32(10) + u64(9) + bytes(16)),
        "ends inside metadata key k: 72 bytes needed",
    ),
    "array of arrays": (header(0, 1, text("k") + u32(9) + u32(9) + u64(1)), "array of arrays"),
    "unknown value type": (header(0, 1, text("k") + u32(13) + u64(0)), "unknown value type 13"),
    "key twice": (header(0, 2, PAIR + PAIR), "metadata key k occurs twice"),
    "key not UTF-8": (header(0, 1, text(b"\xff") + u32(4) + u32(1)), "not valid UTF-8"),
    "alignment not a multiple of 8": (
        header(0, 1, text("general.alignment") + u32(4) + u32(12)),
        "general.alignment is 12",
    ),
    "alignment 0": (header(0, 1, text("general.alignment") + u32(4) + u32(0)), "general.alignment is 0"),
    "alignment a string": (
        header(0, 1, text("general.alignment") + u32(8) + text("32")),
        "general.alignment is '32'",
    ),
    "no dimension": (header(1, 0, tensor_entry(dimensions=()) + bytes(99)), "tensor t has 0 dimensions"),
    "five dimensions": (header(1, 0, tensor_entry(dimensions=(1,) * 5)), "tensor t has 5 dimensions"),
    "a dimension of 0": (
        aligned(header(1, 0, tensor_entry(dimensions=(4, 0))), bytes(64)),
        r"dimensions \(4, 0\)",
    ),
    "dimensions whose product overflows 64 bits": (
        aligned(header(1, 0, tensor_entry(dimensions=(2**32, 2**32))), bytes(64)),
        f"tensor t of {2**66} bytes",
    ),
    "a row that is no whole number of blocks": (
        aligned(header(1, 0, tensor_entry(dimensions=(48, 1), kind=8)), bytes(64)),
        "multiple of 32 for type Q8_0",
    ),
    "unsupported type": (
        aligned(header(1, 0, tensor_entry(kind=19)), bytes(64)),
        "tensor t has type number 19, which is not supported",
    ),
    "offset not aligned": (
        aligned(header(1, 0, tensor_entry(offset=16)), bytes(64)),
        "offset 16, not a multiple",
    ),
    "tensor past the end": (
        aligned(header(1, 0, tensor_entry()), bytes(31)),
        "tensor t of 32 bytes at byte 96 reaches past the end of the file of 127 bytes",
    ),
    "absurd offset": (aligned(header(1, 0, tensor_entry(offset=2**63)), bytes(64)), "reaches past the end"),
    "tensor twice": (
        aligned(header(2, 0, tensor_entry() + tensor_entry(offset=32)), bytes(64)),
        "t occurs twice",
    ),
    "overlap": (
        aligned(header(2, 0, tensor_entry("a", (16,)) + tensor_entry("b", (4,), offset=32)), bytes(64)),
        "tensor b at byte 128 overlaps a, which ends at 160",
    ),
}


@pytest.mark.covers("S07")
@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_file_is_refused_with_the_reason(
    open_bytes: Callable[[bytes], GGUFFile], fault: str
) -> None:
    content, message = MALFORMED[fault]
    with pytest.raises(GGUFError, match=message):
        open_bytes(content)


@pytest.mark.covers("S07")
def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_reference_file(path)
    with GGUFFile.open(path) as file:
        end_of_data = max(tensor.offset + tensor.num_bytes for tensor in file.tensors.values())
    for size in reversed(range(end_of_data)):
        os.truncate(path, size)
        with pytest.raises(GGUFError):
            GGUFFile.open(path)


@pytest.mark.covers("S07")
def test_a_damaged_header_raises_nothing_but_gguf_error(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_reference_file(path)
    content = path.read_bytes()
    refused = 0
    with path.open("r+b", buffering=0) as damaged:
        for position, original in enumerate(content[:-64]):
            for value in (0x00, 0xFF, original):
                damaged.seek(position)
                damaged.write(bytes([value]))
                try:
                    GGUFFile.open(path).close()
                except GGUFError:
                    refused += 1
    assert refused > len(content) // 2


@pytest.mark.covers("S07")
def test_a_file_cut_while_it_is_open_raises_instead_of_giving_garbage(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_reference_file(path)
    with GGUFFile.open(path) as file:
        os.truncate(path, file.tensors["matrix"].offset + 8)
        with pytest.raises(GGUFError, match="ended inside tensor matrix"):
            read_tensor(file, file.tensors["matrix"], torch.float32, CPU)


def test_reading_a_header_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, server.engine.models.gguf; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)


# Where the half-precision scales of a block are: random bytes there could mean infinity or NaN.
SCALES = {
    GGMLType.F16: (0,),
    GGMLType.Q4_0: (0,),
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q5_0: (0,),
    GGMLType.Q5_1: (0, 2),
    GGMLType.Q8_0: (0,),
    GGMLType.Q2_K: (80, 82),
    GGMLType.Q3_K: (108,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q5_K: (0, 2),
    GGMLType.Q6_K: (208,),
}


def random_rows(kind: GGMLType, num_rows: int, row_elements: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 [num_rows, bytes of a row]: every bit pattern of the packed integers, finite scales."""
    rng = np.random.default_rng(int(kind))
    num_blocks = num_rows * row_elements // kind.block_size
    blocks = rng.integers(0, 256, (num_blocks, kind.block_bytes), dtype=np.uint8)
    for offset in SCALES.get(kind, ()):
        scales = rng.normal(size=(num_blocks, 1)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8)
    if kind in (GGMLType.F32, GGMLType.BF16):
        numbers = rng.normal(size=(num_blocks, 1)).astype(np.float32).view(np.uint8)
        blocks = np.ascontiguousarray(numbers[:, 4 - kind.block_bytes :])
    return blocks.reshape(num_rows, -1)


@pytest.fixture(params=list(GGMLType), ids=lambda kind: kind.name)
def encoded(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A file with the tensor `t` of 37 rows of 512, and what the reference implementation decodes it to."""
    kind: GGMLType = request.param
    rows = random_rows(kind, 37, 512)
    writer = reference.GGUFWriter(tmp_path / "m.gguf", "gemma3")
    kind_of_reference = reference.GGMLQuantizationType(int(kind))
    writer.add_tensor("t", rows, raw_dtype=kind_of_reference)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "m.gguf", torch.from_numpy(reference.quants.dequantize(rows, kind_of_reference))


@pytest.mark.parametrize("slice_elements", [1 << 20, 1024, 1])
def test_decoding_equals_the_reference_bit_for_bit(
    encoded: tuple[Path, torch.Tensor], slice_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_dequant, "_SLICE_ELEMENTS", slice_elements)
    path, expected = encoded
    with GGUFFile.open(path) as file:
        decoded = read_tensor(file, file.tensors["t"], torch.float32, CPU)
    assert decoded.shape == (37, 512)
    assert torch.equal(decoded.view(torch.int32), expected.view(torch.int32))


def test_decoding_to_bfloat16_rounds_the_float32_values_once(encoded: tuple[Path, torch.Tensor]) -> None:
    path, expected = encoded
    with GGUFFile.open(path) as file:
        decoded = read_tensor(file, file.tensors["t"], torch.bfloat16, CPU)
    assert decoded.dtype == torch.bfloat16
    assert torch.equal(decoded, expected.to(torch.bfloat16))


def test_decoding_leaves_the_number_of_threads_as_it_was(encoded: tuple[Path, torch.Tensor]) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with GGUFFile.open(encoded[0]) as file:
            read_tensor(file, file.tensors["t"], torch.float32, CPU)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", [GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0])
def test_a_tensor_that_the_reference_quantised_comes_back_close(kind: GGMLType) -> None:
    original = np.random.default_rng(0).normal(size=(8, 256)).astype(np.float32)
    rows = reference.quants.quantize(original, reference.GGMLQuantizationType(int(kind)))
    decoded = gguf_dequant.decode_blocks(torch.from_numpy(rows).view(-1), kind).view(8, 256)
    assert torch.allclose(decoded, torch.from_numpy(original), atol=0.5)
    assert not torch.equal(decoded, torch.from_numpy(original))
