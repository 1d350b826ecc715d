from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from server.embedded_model import locate
from server.gguf_tokenizer import GGUFTokenizerError, PieceType, tokenizer_for_gguf, tokenizer_json
from server.model_source import ModelSourceError
from server.tokenizer import Tokenizer
from tests.fixtures_tokenizers import token_vectors

PARTS = [
    "Hello",
    "日本",
    "مرحبا",
    "हिन्दी",
    "👩‍👩‍👧",
    "<b>",
    "<mask>",
    "<unused7>",
    "<bos>",
    "▁",
    "1234",
    "é",
    "e\u0301",
]
PARTS += ["<start_of_turn>", "[multimodal]", "def f(x):\n", "\x00", "\U00013000", "</table>", "<", "  \t"]


def random_texts(count: int) -> list[str]:
    rng = random.Random(5)
    texts = []
    for _ in range(count):
        match rng.randrange(4):
            case 0:
                codes = [
                    rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))) for _ in range(20)
                ]
                texts.append("".join(map(chr, codes)))
            case 1:
                texts.append("a" + rng.choice(" \n\t") * rng.randint(1, 100) + rng.choice(["b", " ", "\n", ""]))
            case 2:
                texts.append(rng.choice([" ", ""]).join(rng.choices(PARTS, k=rng.randint(1, 12))))
            case _:
                texts.append("".join(rng.choices("ab \n\t▁<>/é", k=rng.randint(1, 40))))
    return texts


def as_converted(official: dict[str, Any]) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes for the vocabulary of an official tokenizer.json."""
    added = {token["id"]: token for token in official["added_tokens"]}
    pieces: list[str] = sorted(official["model"]["vocab"], key=official["model"]["vocab"].__getitem__)
    types = []
    for token_id, piece in enumerate(pieces):
        if piece == "\t" and "<0x09>" not in official["model"]["vocab"]:
            piece = pieces[token_id] = "<0x09>"  # as the official Gemma 2 tokenizer.model has it
        looks_special = piece in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or piece.startswith("<unused")
        if token_id in added and (looks_special or added[token_id]["special"]):
            types.append(PieceType.CONTROL)
        elif token_id in added:
            types.append(PieceType.USER_DEFINED)
            pieces[token_id] = piece.replace("▁", " ")
        else:
            types.append(PieceType.BYTE if piece.startswith("<0x") else PieceType.NORMAL)
    first = types.index(PieceType.NORMAL)
    scores = [
        {PieceType.NORMAL: float(first - token_id), PieceType.BYTE: 0.0}.get(kind, -1000.0)
        for token_id, kind in enumerate(types)
    ]
    prefix = "tokenizer.ggml."
    return {
        f"{prefix}model": "llama",
        f"{prefix}tokens": pieces,
        f"{prefix}token_type": types,
        f"{prefix}scores": scores,
    }


@pytest.fixture(scope="module")
def gemma3_official(gemma3_tokenizer_file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(gemma3_tokenizer_file.read_bytes())
    return content


def assert_official(made: dict[str, Any], official: dict[str, Any]) -> None:
    """Equal but for `<image_soft_token>`, which no GGUF file of a text model has, and how merges are spelt."""
    assert made["model"]["vocab"] == official["model"]["vocab"]
    assert made["model"]["merges"] == [" ".join(pair) for pair in official["model"]["merges"]]
    assert made["added_tokens"] == [
        token for token in official["added_tokens"] if token["content"] != "<image_soft_token>"
    ]
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert made[part] == official[part]
    for key in official["model"].keys() - {"vocab", "merges"}:
        assert made["model"][key] == official["model"][key]


def test_gemma_2_from_gguf_encodes_as_the_official_tokenizer(
    gemma2_tokenizer: Tokenizer, gemma2_tokenizer_file: Path
) -> None:
    made = tokenizer_json(as_converted(json.loads(gemma2_tokenizer_file.read_bytes())))
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_buffer(made))
    assert tokenizer.control_token_ids == gemma2_tokenizer.control_token_ids
    for vector in token_vectors():
        assert tokenizer.encode_controls(str(vector["text"])) == vector["gemma1_2"]
    for text in random_texts(1000):
        assert tokenizer.encode_text(text) == gemma2_tokenizer.encode_text(text), repr(text)
        ids = gemma2_tokenizer.encode_controls(text)
        assert tokenizer.encode_controls(text) == ids, repr(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text.replace("▁", " ")


def test_the_real_embedded_file_gives_the_official_tokenizer(
    gemma3_tokenizer: Tokenizer, gemma3_official: dict[str, Any], tmp_path: Path
) -> None:
    try:
        model = locate()
    except ModelSourceError as error:
        pytest.skip(str(error))
    path = tokenizer_for_gguf(model, tmp_path)
    assert_official(json.loads(path.read_bytes()), gemma3_official)
    tokenizer = Tokenizer.from_file(path)
    assert gemma3_tokenizer.control_token_ids - tokenizer.control_token_ids == {262144}
    for text in random_texts(1000):
        assert tokenizer.encode_text(text) == gemma3_tokenizer.encode_text(text), repr(text)
        assert tokenizer.encode_controls(text) == gemma3_tokenizer.encode_controls(text), repr(text)


def tiny_metadata(**changes: Any) -> dict[str, Any]:
    metadata = {
        "model": "llama",
        "tokens": ["<pad>", "<eos>", "<bos>", "<unk>", "  ", "a", "b", "ab"],
        "token_type": [3, 3, 3, 3, 4, 1, 1, 1],
        "scores": [-1000.0] * 5 + [0.0, -1.0, -2.0],
    }
    return {f"tokenizer.ggml.{name}": value for name, value in {**metadata, **changes}.items()}


def write_gguf(path: Path, metadata: dict[str, Any]) -> None:
    """Version 3, no tensors."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode()

    def value(content: Any) -> bytes:
        if isinstance(content, str):
            return struct.pack("<I", 8) + string(content)
        kind, encode = {
            str: (8, string),
            int: (5, lambda number: struct.pack("<i", number)),
            float: (6, lambda number: struct.pack("<f", number)),
        }[type(content[0])]
        return struct.pack("<IIQ", 9, kind, len(content)) + b"".join(map(encode, content))

    header = b"GGUF" + struct.pack("<IQQ", 3, 0, len(metadata))
    path.write_bytes(header + b"".join(string(key) + value(content) for key, content in metadata.items()))


def test_the_file_is_made_once_and_again_when_the_gguf_file_changes(tmp_path: Path) -> None:
    model, cache = tmp_path / "m.gguf", tmp_path / "cache" / "tokenizers"
    write_gguf(model, tiny_metadata())
    first = tokenizer_for_gguf(model, cache)
    assert Tokenizer.from_file(first).encode_text("ab") == [7]

    made = first.stat()
    assert tokenizer_for_gguf(model, cache) == first
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == (made.st_mtime_ns, made.st_ino)

    write_gguf(model, tiny_metadata(tokens=["<pad>", "<eos>", "<bos>", "<unk>", "  ", "a", "b", "ba"]))
    os.utime(model, ns=(1, 1))
    second = tokenizer_for_gguf(model, cache)
    assert second != first
    assert Tokenizer.from_file(second).encode_text("ba") == [7]
    assert sorted(cache.iterdir()) == sorted([first, second])  # nothing half-written is left


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = tmp_path / "m.gguf", tmp_path / "cache"
    write_gguf(model, tiny_metadata())

    def fail(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        tokenizer_for_gguf(model, cache)
    assert list(cache.iterdir()) == []


def test_space_runs_become_pieces_of_the_visible_space(tmp_path: Path) -> None:
    content = json.loads(tokenizer_json(tiny_metadata()))
    assert content["model"]["vocab"]["▁▁"] == 4
    assert {token["content"]: token["special"] for token in content["added_tokens"]}["▁▁"] is False


def test_unknown_control_pieces_stay_control() -> None:
    metadata = tiny_metadata(
        tokens=["<pad>", "<eos>", "<bos>", "<unk>", "<|fim_prefix|>", "<unused5>", "<start_of_turn>", "b"],
        token_type=[3, 3, 3, 3, 3, 3, 4, 1],
    )
    special = {
        token["content"]: token["special"] for token in json.loads(tokenizer_json(metadata))["added_tokens"]
    }
    assert special["<|fim_prefix|>"]
    assert special["<start_of_turn>"]
    assert not special["<unused5>"]


@pytest.mark.covers("S09")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "gpt2"}, r"tokenizer\.ggml\.model is 'gpt2'"),
        ({"tokens": None}, r"no list tokenizer\.ggml\.tokens"),
        ({"scores": []}, r"no list tokenizer\.ggml\.scores"),
        ({"scores": [0.0]}, "not 8, 8 and 1"),
        ({"tokens": ["<pad>", "<eos>", "<bos>", "<unk>", "  ", "a", "b", "a"]}, "1 of the 8 pieces"),
        (
            {"tokens": ["<pad>", "<eos>", "<bos>", "<unk>", "  ", "a", "b", "c" * 1025]},
            "1025 characters; at most 1024",
        ),
        ({"tokens": ["<pad>", "<eos>", "<s>", "<unk>", "  ", "a", "b", "ab"]}, "no <bos> piece"),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GGUFTokenizerError, match=message):
        tokenizer_json(tiny_metadata(**changes))
