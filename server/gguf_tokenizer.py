"""A tokenizer.json made from the vocabulary inside a GGUF file.

GGUF keeps a SentencePiece model's pieces, scores and types. A tokenizer.json needs the merges too; they follow
from the scores: any two pieces that join to a third may merge, the better the third's score the earlier. For
Gemma 3 the result has the vocabulary and the merges of the official file, in its order.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from enum import IntEnum
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from server.cache_directory import written_whole
from server.engine.models.gguf import read_metadata

_T = TypeVar("_T")

_FORMAT = 2
"""Part of the cache's file name: raise it when the same GGUF file must give another tokenizer.json."""

_MAX_PIECE_CHARACTERS = 1024
_MAX_EFFORT = 1 << 28
"""The work for a piece grows with the square of its length, and this bounds their sum. Gemma's longest have 31
characters, and all of them together take 1 << 24."""

_OFFICIAL_CONTROL = {
    *("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
}
_OFFICIAL_PLAIN = re.compile(r"<unused\d+>|<mask>|<2mass>|\[@BOS@\]|\[multimodal\]|\[toxicity=0\]")


class PieceType(IntEnum):
    """llama_token_type in llama.h"""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_ADDED = frozenset((PieceType.CONTROL, PieceType.USER_DEFINED))
"""Matched as a whole before any merge."""


class GGUFTokenizerError(ValueError):
    """The GGUF file holds no vocabulary that this server can use."""


def tokenizer_for_gguf(path: Path, cache_dir: Path) -> Path:
    """The tokenizer.json of the GGUF file `path`; made on the first call and kept in `cache_dir`.

    Raises GGUFTokenizerError, GGUFError (a malformed file), OSError.
    """
    stat = path.stat()
    identity = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    target = cache_dir / f"{path.stem}-{digest}-v{_FORMAT}.tokenizer.json"
    if not target.exists():
        content = tokenizer_json(read_metadata(path))
        with written_whole(target) as file:
            file.write(content)
    return target


def tokenizer_json(metadata: Mapping[str, object]) -> bytes:
    """The tokenizer.json of a GGUF file's metadata. Raises GGUFTokenizerError."""
    model = metadata.get("tokenizer.ggml.model")
    if model != "llama":
        raise GGUFTokenizerError(
            f'tokenizer.ggml.model is {model!r}; only "llama" (SentencePiece), as in Gemma files, is supported'
        )
    pieces = _list(metadata, "tokens", str)
    types = _list(metadata, "token_type", int)
    scores = _list(metadata, "scores", float)
    if not len(pieces) == len(types) == len(scores):
        raise GGUFTokenizerError(
            "tokenizer.ggml.tokens, token_type and scores must be of one length, not "
            f"{len(pieces)}, {len(types)} and {len(scores)}"
        )
    return build_tokenizer_json(pieces, types, scores)


def build_tokenizer_json(pieces: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> bytes:
    """The tokenizer.json of a SentencePiece BPE vocabulary; a piece's id is its index.

    Raises GGUFTokenizerError if two pieces are the same, one is too long, or `<bos>` or `<unk>` is missing.
    """
    # llama.cpp's converter writes added pieces (runs of spaces among them) with real spaces.
    pieces = [
        piece.replace(" ", "▁") if kind in _ADDED else piece for piece, kind in zip(pieces, types, strict=True)
    ]
    longest = max(map(len, pieces), default=0)
    if longest > _MAX_PIECE_CHARACTERS:
        raise GGUFTokenizerError(
            f"a piece has {longest} characters; at most {_MAX_PIECE_CHARACTERS} are allowed"
        )
    if sum(len(piece) ** 2 for piece in pieces) > _MAX_EFFORT:
        raise GGUFTokenizerError(f"the {len(pieces)} pieces are longer than any vocabulary's of Gemma")
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise GGUFTokenizerError(
            f"{len(pieces) - len(vocab)} of the {len(pieces)} pieces appear more than once"
        )
    for required in ("<bos>", "<unk>"):
        if required not in vocab:
            raise GGUFTokenizerError(f"the vocabulary has no {required} piece")
    added = [
        _added_token(token_id, piece, kind)
        for token_id, (piece, kind) in enumerate(zip(pieces, types, strict=True))
        if kind in _ADDED
    ]
    # The converter gives these the score -1000; in SentencePiece they merge before all others.
    scores = [0.0 if kind in _ADDED else score for score, kind in zip(scores, types, strict=True)]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": _post_processor(vocab["<bos>"]),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(pieces, vocab, scores),
        },
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _merges(pieces: Sequence[str], vocab: Mapping[str, int], scores: Sequence[float]) -> list[str]:
    """Every split of a piece into two others: best score first, then the longest left and right.

    Written as "left right", which `tokenizers` parses in a quarter less time than a pair. A piece with a space
    in it needs no merge: the normalizer leaves no space in a text.
    """
    merges: list[str] = []
    best_first = sorted(range(len(pieces)), key=lambda token_id: -scores[token_id])
    for _, equals in groupby(best_first, key=scores.__getitem__):
        splits = [
            (piece[:cut], piece[cut:])
            for piece in map(pieces.__getitem__, equals)
            if " " not in piece
            for cut in range(1, len(piece))
            if piece[:cut] in vocab and piece[cut:] in vocab
        ]
        splits.sort(key=lambda split: (-len(split[0]), -len(split[1])))
        merges += map(" ".join, splits)
    return merges


def _added_token(token_id: int, piece: str, kind: int) -> dict[str, object]:
    """Files differ in which pieces they call control; the official tokenizer.json decides."""
    special = piece in _OFFICIAL_CONTROL or (
        kind == PieceType.CONTROL and _OFFICIAL_PLAIN.fullmatch(piece) is None
    )
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": token_id, "content": piece, **flags}


def _post_processor(bos_id: int) -> dict[str, object]:
    def sequence(name: str, type_id: int) -> list[dict[str, object]]:
        return [
            {"SpecialToken": {"id": "<bos>", "type_id": type_id}},
            {"Sequence": {"id": name, "type_id": type_id}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": [*sequence("A", 0), *sequence("B", 1)],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [bos_id], "tokens": ["<bos>"]}},
    }


def _list(metadata: Mapping[str, object], name: str, kind: type[_T]) -> list[_T]:
    values = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not values or not isinstance(values[0], kind):
        raise GGUFTokenizerError(f"the GGUF file has no list tokenizer.ggml.{name} of {kind.__name__} values")
    return values
