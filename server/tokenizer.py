"""Text to token ids and back, for a tokenizer.json of the Gemma family (SentencePiece BPE with byte fallback).

Laws:
1. Control tokens are the pieces that the file flags as special, and in any case the sequence's, the turns',
   those of CodeGemma's infilling and, where all are there, FunctionGemma's for tools.
   `encode_text` never yields one; only `encode_controls` and `encode_prompt` read them out of a string.
2. The text of a token sequence is the concatenation of its `token_bytes`, decoded as UTF-8 with one U+FFFD for
   each byte that is not part of a character. So a prefix of the ids decodes to a prefix of the text, but for
   the bytes of a character that is still incomplete.
3. Nothing that can be seen changes after construction: one instance serves every thread, and encoding releases
   the GIL, so long texts belong in a worker thread.
"""

from __future__ import annotations

import codecs
import json
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import tokenizers

BOS = "<bos>"
EOS = "<eos>"
START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"

FIM_PREFIX = "<|fim_prefix|>"
FIM_SUFFIX = "<|fim_suffix|>"
FIM_MIDDLE = "<|fim_middle|>"
FILE_SEPARATOR = "<|file_separator|>"
_FIM = (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE, FILE_SEPARATOR)

START_DECLARATION = "<start_function_declaration>"
END_DECLARATION = "<end_function_declaration>"
START_CALL = "<start_function_call>"
END_CALL = "<end_function_call>"
START_RESPONSE = "<start_function_response>"
END_RESPONSE = "<end_function_response>"
ESCAPE = "<escape>"
"""Before and behind every string in FunctionGemma's declarations, calls and responses."""
FUNCTION_TOKENS = (
    START_DECLARATION,
    END_DECLARATION,
    START_CALL,
    END_CALL,
    START_RESPONSE,
    END_RESPONSE,
    ESCAPE,
)

_ALWAYS_CONTROL = ("<pad>", EOS, BOS, "<unk>", START_OF_TURN, END_OF_TURN, *_FIM)
_IMAGE = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
_MAX_FILE_BYTES = 128 << 20
"""Gemma 3's has 33 MB."""
_MAX_ROWS_WITHOUT_PIECE = 1024
"""Of an embedding: checkpoints pad theirs, by some hundreds at most."""
_MAX_REPLACEMENT_CHARACTERS = 16
"""Of what the tokenizer puts in the place of a piece of text; Gemma's puts one for a space."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SURROGATE = re.compile("[\ud800-\udfff]")
_GEMMA_DECODERS = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]

BYTE_REPLACEMENT = "gemma_server_replace_each_byte"
"""Error handler for `bytes.decode`: one U+FFFD for each undecodable byte.

As SentencePiece does (ProcessBytePieces in sentencepiece_processor.cc); Python's own "replace" gives one for
several bytes, and the `tokenizers` library gives up the whole run of byte pieces, valid characters included,
when its last character was cut off.
"""


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(BYTE_REPLACEMENT, _replace_each_byte)


class TokenizerError(ValueError):
    """The tokenizer file cannot be read, or is not one of the Gemma family."""


class InvalidTextError(ValueError):
    """The text holds a lone surrogate, which is no character and has no UTF-8 form."""


class Tokenizer:
    """A tokenizer.json of the Gemma family."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Takes `backend` over: it must not be used, let alone changed, elsewhere. Raises TokenizerError."""
        _check_decoder(backend)
        _check_effort(backend)
        backend.no_truncation()
        backend.no_padding()
        if not isinstance(backend.model, tokenizers.models.BPE):
            raise TokenizerError(f"the tokenizer's model is {type(backend.model).__name__}; Gemma's is BPE")
        # The library's cache is for words, but Gemma's are not cut into words: it would keep the first 10,000
        # short texts of clients, some 50 MB, for the few that come again.
        backend.model._resize_cache(0)
        # Some files leave them unflagged, or do not list them among the added tokens at all.
        present = [piece for piece in _ALWAYS_CONTROL if backend.token_to_id(piece) is not None]
        has_functions = all(backend.token_to_id(piece) is not None for piece in FUNCTION_TOKENS)
        present += FUNCTION_TOKENS if has_functions else ()
        backend.add_special_tokens(
            [tokenizers.AddedToken(piece, special=True, normalized=False) for piece in present]
        )
        backend.encode_special_tokens = True  # special tokens in a text are text: law 1
        self._backend = backend
        self._whole_texts: dict[int, str | None] = {}

        added = backend.get_added_tokens_decoder()
        self._controls = {token.content: token_id for token_id, token in added.items() if token.special}
        self.control_token_ids = frozenset(self._controls.values())
        self._control_pattern = re.compile(
            "(" + "|".join(re.escape(piece) for piece in sorted(self._controls, key=len, reverse=True)) + ")"
        )
        self.vocab_size = max(backend.get_vocab_size(with_added_tokens=False), max(added, default=-1) + 1)
        """The highest id that has a piece, plus 1. It may exceed the rows of a model's embedding (Gemma 3 1B
        has none for `<image_soft_token>`) or be less (some checkpoints pad the embedding)."""
        self.bos_id = self._required_id(BOS)
        self.eos_id = self._required_id(EOS)
        self.start_of_turn_id: int | None = backend.token_to_id(START_OF_TURN)
        self.end_of_turn_id: int | None = backend.token_to_id(END_OF_TURN)
        self.fim_ids = {piece: self._controls[piece] for piece in _FIM if piece in self._controls}
        """Of the tokens for filling in a middle, by piece; empty but for CodeGemma."""
        self.function_ids = {piece: self._controls[piece] for piece in FUNCTION_TOKENS if has_functions}
        """Of the tokens for tools, by piece: all of them; empty but for FunctionGemma."""

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a tokenizer.json. Raises TokenizerError, OSError."""
        found = Path(path).stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_FILE_BYTES:
            raise TokenizerError(f"{path} must be a regular file of at most {_MAX_FILE_BYTES} bytes")
        data = Path(path).read_bytes()
        try:
            backend = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises no narrower type
            raise TokenizerError(f"{path} is not a readable tokenizer.json: {error}") from error
        return cls(backend)

    def encode_text(self, text: str) -> list[int]:
        """Ids of `text`, where control tokens typed in it are text; no `<bos>`. Raises InvalidTextError."""
        try:
            # `encode` holds the GIL throughout, the batch form releases it; `fast` leaves out the offsets.
            encodings = self._backend.encode_batch_fast([text], add_special_tokens=False)
        except TypeError as error:
            surrogate = _SURROGATE.search(text)
            if surrogate is None:
                raise
            raise InvalidTextError(
                f"the text holds the lone surrogate U+{ord(surrogate[0]):04X}, which is not a character"
            ) from error
        return list(encodings[0].ids)

    def encode_controls(self, text: str) -> list[int]:
        """Ids of `text`, where control tokens written in it are the real ones; no `<bos>` is added.

        The ids may include such as the model has no embedding for (see `vocab_size`): compare with its rows.
        Raises InvalidTextError.
        """
        ids: list[int] = []
        for index, part in enumerate(self._control_pattern.split(text)):
            if index % 2:  # split() alternates text and separator
                ids.append(self._controls[part])
            elif part:
                ids += self.encode_text(part)
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """As `encode_controls`, with exactly one `<bos>` first, however many the text begins with."""
        ids = self.encode_controls(text)
        num_bos = 0
        while num_bos < len(ids) and ids[num_bos] == self.bos_id:
            num_bos += 1
        return [self.bos_id, *ids[num_bos:]]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`, without the control tokens unless asked for. Ids without a piece have no text."""
        skipped = self.control_token_ids if skip_special_tokens else frozenset[int]()
        # A client may ask for the text of millions: each token is looked up once.
        known = {token_id: self.token_bytes(token_id) for token_id in set(ids) - skipped}
        data = b"".join([known[token_id] for token_id in ids if token_id in known])
        return data.decode("utf-8", BYTE_REPLACEMENT)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text: those of its piece, or the one byte of a byte token.

        Empty for an id without a piece, which a model whose embedding is padded can sample.
        """
        if not 0 <= token_id < self.vocab_size:
            return b""
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        byte = _BYTE_PIECE.fullmatch(piece)
        if byte is not None:
            return bytes([int(byte[1], 16)])
        return piece.replace("▁", " ").encode()

    def whole_text(self, token_id: int) -> str | None:
        """`token_bytes` as text, if they are whole characters. Remembered: streams ask for each token."""
        try:
            return self._whole_texts[token_id]
        except KeyError:
            pass
        try:
            text = self.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            text = None
        self._whole_texts[token_id] = text
        return text

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text for people; U+FFFD for a byte that is no character by itself."""
        return self.token_bytes(token_id).decode("utf-8", BYTE_REPLACEMENT)

    def control_id(self, piece: str) -> int:
        """Of a control token that there is."""
        return self._controls[piece]

    def unsampleable_ids(self, num_embeddings: int) -> Iterable[int]:
        """Ids below `num_embeddings`, the rows of the model's embedding, that a text model must never produce:
        rows without a piece, and image tokens."""
        image_ids = (self._backend.token_to_id(piece) for piece in _IMAGE)
        yield from (token_id for token_id in image_ids if token_id is not None and token_id < num_embeddings)
        yield from range(self.vocab_size, num_embeddings)

    def check_fits(self, num_embeddings: int) -> None:
        """Raises TokenizerError if it cannot be the tokenizer of a model whose embedding has so many rows.

        Pieces beyond the rows are those of images, if any, as in Gemma 3 1B, and few rows have no piece.
        """
        beyond = range(num_embeddings, self.vocab_size)
        if (
            len(beyond) > len(_IMAGE)
            or any(self._backend.id_to_token(token_id) not in _IMAGE for token_id in beyond)
            or num_embeddings - self.vocab_size > _MAX_ROWS_WITHOUT_PIECE
        ):
            raise TokenizerError(
                f"the tokenizer has {self.vocab_size} tokens and the model's embedding {num_embeddings} rows: "
                "they do not belong together"
            )

    def _required_id(self, piece: str) -> int:
        token_id = self._backend.token_to_id(piece)
        if token_id is None:
            raise TokenizerError(f"the tokenizer has no {piece} token, so it is not a Gemma tokenizer")
        return token_id


def _check_decoder(backend: tokenizers.Tokenizer) -> None:
    """`token_bytes` holds for this decoder only."""
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else None
    if decoder != {"type": "Sequence", "decoders": _GEMMA_DECODERS}:
        raise TokenizerError(
            f"the tokenizer does not decode as Gemma's do: its decoder is {json.dumps(decoder)}"
        )


def _check_effort(backend: tokenizers.Tokenizer) -> None:
    """What is done to a text before it is split into pieces has to take time and room in proportion to it."""
    parts = [part for part in (backend.normalizer, backend.pre_tokenizer) if part is not None]
    pending: list[object] = [json.loads(part.__getstate__()) for part in parts]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            if "Regex" in item:
                raise TokenizerError("the tokenizer has a regular expression; Gemma's have none")
            if len(str(item.get("content", ""))) > _MAX_REPLACEMENT_CHARACTERS:
                raise TokenizerError("the tokenizer replaces a piece of text by a long one; Gemma's do not")
            pending += item.values()
        elif isinstance(item, list):
            pending += item
