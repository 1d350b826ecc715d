"""Weights that were made to do harm, or are merely broken: refused, and with the readers' own errors alone."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from server.engine.dtype import DType
from server.engine.models import gguf as gguf_module
from server.engine.models.config import ConfigError
from server.engine.models.config_reader import read_gguf
from server.engine.models.gguf import GGUFError, GGUFFile, read_metadata
from server.engine.models.loader import LoadError, open_checkpoint
from server.gguf_tokenizer import GGUFTokenizerError, tokenizer_json
from server.tokenizer import Tokenizer, TokenizerError
from tests.one_torch_thread import one_torch_thread
from tests.unit.hostile_models import MANY, STRANGE, arena, cache, gguf_content, model, refusal

__all__ = ["arena", "cache", "gguf_content", "model", "one_torch_thread"]

# --- safetensors -------------------------------------------------------------------------------------------

Header = dict[str, Any]


def rewrite_header(file: Path, change: Callable[[Header], object]) -> None:
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    change(header)
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + size :])


EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"


def shifted(header: Header) -> None:
    """Two tensors in one place, and a gap."""
    header[EMBEDDING]["data_offsets"] = [offset - 4 for offset in header[EMBEDDING]["data_offsets"]]


def past_the_end(header: Header) -> None:
    header[NORM]["data_offsets"] = [10**9, 10**9 + 256]


def backwards(header: Header) -> None:
    header[NORM]["data_offsets"] = header[NORM]["data_offsets"][::-1]


def of_another_dtype(header: Header) -> None:
    header[NORM] |= {"dtype": "I32"}


def of_no_dtype(header: Header) -> None:
    header[NORM] |= {"dtype": "Q4_K"}


def of_another_shape(header: Header) -> None:
    header[EMBEDDING]["shape"] = header[EMBEDDING]["shape"][::-1]


def of_an_overflowing_shape(header: Header) -> None:
    header[NORM]["shape"] = [2**32, 2**32]


def without_a_tensor(header: Header) -> None:
    header["model.unknown.weight"] = header.pop(NORM)


@pytest.mark.covers("S07")
@pytest.mark.parametrize(
    "damage",
    [
        shifted,
        past_the_end,
        backwards,
        of_another_dtype,
        of_no_dtype,
        of_another_shape,
        of_an_overflowing_shape,
        without_a_tensor,
    ],
)
def test_a_safetensors_header_that_lies_is_refused(model: Path, damage: Callable[[Header], object]) -> None:
    rewrite_header(model / "model.safetensors", damage)
    assert "safetensors" in (message := refusal(model)) or "do not fit" in message


@pytest.mark.covers("S07")
@pytest.mark.parametrize("size", [0, 1, 10**9, 2**40, 2**64 - 1])
def test_a_safetensors_header_of_an_absurd_size_is_refused(model: Path, size: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(struct.pack("<Q", size) + file.read_bytes()[8:])
    if size == 10**9:
        os.truncate(file, 2 * 10**9)  # sparse: it claims a gigabyte, and has it
    assert "cannot be read as safetensors" in refusal(model)


@pytest.fixture(scope="module")
def small_file(tiny_checkpoint: Path) -> bytes:
    return (tiny_checkpoint / "model.safetensors").read_bytes()


mutations = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4
)


def mutated(content: bytes, end: int, changes: list[tuple[float, bytes]]) -> bytes:
    """Overwritten in some places before `end`."""
    result = bytearray(content)
    for place, new in changes:
        start = int(place * end)
        result[start : start + len(new)] = new
    return bytes(result)


@pytest.mark.covers("S07")
@MANY
@given(changes=mutations)
def test_no_damage_to_a_safetensors_file_gets_past_load_error(
    arena: Path, small_file: bytes, changes: list[tuple[float, bytes]]
) -> None:
    (size,) = struct.unpack("<Q", small_file[:8])
    (arena / "model.safetensors").write_bytes(mutated(small_file, 8 + size, changes))
    read_whole(arena)


@pytest.mark.covers("S07")
@MANY
@given(
    field=st.sampled_from(["dtype", "shape", "data_offsets"]),
    value=st.one_of(
        STRANGE,
        st.lists(st.integers(0, 2**64), max_size=5),
        st.sampled_from(["F64", "BF16", "I8", "BOOL", "F8_E4M3", "F4", "C64"]),
    ),
)
def test_no_value_in_a_safetensors_header_gets_past_load_error(
    arena: Path, small_file: bytes, field: str, value: Any
) -> None:
    file = arena / "model.safetensors"
    file.write_bytes(small_file)
    rewrite_header(file, lambda header: header[NORM].__setitem__(field, value))
    read_whole(arena)


def read_whole(path: Path) -> None:
    try:
        for _, tensor in open_checkpoint(path).tensors(DType.FLOAT32, "cpu"):
            assert tensor.ndim in (1, 2)
    except (LoadError, ConfigError, GGUFError):
        pass


# --- GGUF --------------------------------------------------------------------------------------------------


@pytest.mark.covers("S07")
@MANY
@given(changes=mutations)
def test_no_damage_to_a_gguf_file_gets_past_its_errors(
    arena: Path, gguf_content: bytes, changes: list[tuple[float, bytes]]
) -> None:
    path = arena / "m.gguf"
    path.write_bytes(gguf_content)
    with GGUFFile.open(path) as file:
        end = min(tensor.offset for tensor in file.tensors.values())
    path.write_bytes(mutated(gguf_content, end, changes))
    read_whole(path)
    try:
        made = tokenizer_json(read_metadata(path))
    except (GGUFError, GGUFTokenizerError):
        return
    try:
        (arena / "made.json").write_bytes(made)
        Tokenizer.from_file(arena / "made.json")
    except TokenizerError:
        pass


@pytest.fixture(scope="module")
def gguf_metadata(gguf_content: bytes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("metadata") / "m.gguf"
    path.write_bytes(gguf_content)
    return dict(read_metadata(path))


@pytest.mark.covers("S07")
@settings(MANY, max_examples=50)
@given(data=st.data())
def test_no_metadata_of_a_gguf_file_gets_past_config_error(
    gguf_metadata: dict[str, Any], data: st.DataObject
) -> None:
    optional = ["gemma3.vocab_size", "gemma3.rope.scaling.type", "gemma3.rope.scaling.factor"]
    keys = data.draw(st.lists(st.sampled_from([*gguf_metadata, *optional]), min_size=1, max_size=3))
    with contextlib.suppress(ConfigError):
        read_gguf(gguf_metadata | {key: data.draw(STRANGE) for key in keys})


@pytest.mark.covers("S07")
def test_what_a_gguf_header_takes_is_bounded_however_large_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_module, "MAX_HEADER_BYTES", 1 << 16)
    key = struct.pack("<Q", 1) + b"k"
    count = 1 << 30
    numbers = struct.pack("<IIQ", 9, 0, count)
    path = tmp_path / "m.gguf"
    for value in (
        numbers,
        struct.pack("<IQ", 8, count),
        struct.pack("<IIQ", 9, 8, 1) + struct.pack("<Q", count),
    ):
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + value)
        os.truncate(path, 2 * count)
        with pytest.raises(GGUFError, match="of the limit of 65536 bytes for a header"):
            GGUFFile.open(path)


@pytest.mark.covers("S07")
def test_a_checkpoint_without_some_of_its_tensors_names_them(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    del weights[NORM]
    save_file(weights, model / "model.safetensors")
    assert "1 missing: norm.weight" in refusal(model)
