"""llguidance, through the C interface (llguidance.h) that its Python package's extension exports.

The package's own Python classes take in a vocabulary of 262,144 tokens in one call of a second that holds the
GIL, in which no stream would advance; ctypes lets go of it. Laws:

1. The library is loaded by the first `Vocabulary`, and not before.
2. Whatever a grammar says or does, it is a GrammarError, or the library's limits end it.
3. A `Vocabulary` serves any number of threads, a `Matcher` one at a time.

The engine matches with it; the front has a child see what compiles.
"""

from __future__ import annotations

import ctypes
import json
import weakref
from array import array
from collections.abc import Sequence
from ctypes import POINTER, byref, c_bool, c_char_p, c_int, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

CONTROL_MARK = b"\xff"
"""The first byte of a control token's piece: no text matches it, only a grammar that names the token."""

JSON_WHITESPACE = r" |\n[ \t]{0,20}"
"""Between the parts of JSON, at most once: pretty-printed text fits, and no model can go on for ever."""
MAX_GRAMMAR_CHARS = 262_144
_MAX_LEXER_STATES = 20_000
"""For each sequence, at 1 to 2 kB each."""
_MESSAGE_BYTES = 4000


def quoted(text: str) -> str:
    """`text` as a string of the Lark syntax, which is JSON's but for one character."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


class GrammarError(ValueError):
    """The grammar does not compile, or its matcher cannot go on; says why."""


class Vocabulary:
    """What the bytes of each token are."""

    def __init__(self, lengths: bytes, pieces: bytes, eos_token_id: int) -> None:
        """Takes a second for a large vocabulary, without the GIL. Raises GrammarError.

        Args:
            lengths: of each token's piece, as native unsigned 32-bit integers.
            pieces: one behind another; those of control tokens begin with CONTROL_MARK.
            eos_token_id: stands in masks for the end of the text.
        """
        self._library = _load()
        self.size = len(lengths) // 4
        self.eos_token_id = eos_token_id
        init = _TokenizerInit(
            struct_size=ctypes.sizeof(_TokenizerInit),
            vocab_size=self.size,
            tok_eos=eos_token_id,
            token_lens=ctypes.cast(c_char_p(lengths), c_void_p),
            token_bytes=ctypes.cast(c_char_p(pieces), c_void_p),
            use_approximate_greedy_tokenize_fn=True,
        )
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        handle = self._library.llg_new_tokenizer_v2(byref(init), message, _MESSAGE_BYTES)
        if not handle:
            raise GrammarError(f"the vocabulary cannot be used: {_text(message.value)}")
        self._handle = c_void_p(handle)
        weakref.finalize(self, self._library.llg_free_tokenizer, self._handle)

    def compile(self, grammar: str) -> Matcher:
        """A matcher at the beginning of the text. Raises GrammarError.

        grammar: in Lark syntax, or JSON if it begins with a brace.
        """
        if len(grammar) > MAX_GRAMMAR_CHARS:
            raise GrammarError(f"the grammar has {len(grammar)} characters, more than {MAX_GRAMMAR_CHARS}")
        if "\0" in grammar:
            raise GrammarError("the grammar holds a null character")
        init = _ConstraintInit()
        self._library.llg_constraint_init_set_defaults(byref(init), self._handle)
        init.log_stderr_level = 0
        init.limits.max_lexer_states = _MAX_LEXER_STATES
        init.limits.verbose_errors = False
        kind = b"llguidance" if grammar.lstrip().startswith("{") else b"lark"
        handle = self._library.llg_new_matcher(byref(init), kind, grammar.encode())
        matcher = Matcher(self, c_void_p(handle))
        matcher.check()
        return matcher


class Matcher:
    """How far a text has got in a grammar. After an error it is of no more use."""

    def __init__(self, vocabulary: Vocabulary, handle: c_void_p) -> None:
        """Takes `handle` over."""
        self._vocabulary = vocabulary  # has to outlive the handle
        self._library = vocabulary._library
        self._handle = handle
        weakref.finalize(self, self._library.llg_free_matcher, handle)

    def copy(self) -> Matcher:
        """One that goes its own way from here."""
        return Matcher(self._vocabulary, c_void_p(self._library.llg_clone_matcher(self._handle)))

    def consume(self, token_ids: Sequence[int]) -> None:
        """Raises GrammarError if they do not match."""
        ids = array("I", token_ids)
        address, count = ids.buffer_info()
        if self._library.llg_matcher_consume_tokens(self._handle, address, count):
            self.check()

    def num_matching(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens could be consumed. Raises GrammarError for a matcher beyond its limits."""
        ids = array("I", token_ids)
        address, count = ids.buffer_info()
        matching: int = self._library.llg_matcher_validate_tokens(self._handle, address, count)
        if matching < 0:
            self.check()
        return matching

    def rollback(self, num_tokens: int) -> None:
        """Forget the last tokens. Raises GrammarError where the grammar cannot (those that count tokens)."""
        if self._library.llg_matcher_rollback(self._handle, num_tokens):
            self.check()

    def fill_mask(self, address: int, num_bytes: int) -> None:
        """Write the tokens that may come next: bit i % 32 of 32-bit word i // 32 for token i.

        The token `eos_token_id` is among them where the text may end. Raises GrammarError.

        Args:
            address: of memory for one bit for each token of the vocabulary, rounded up to words.
            num_bytes: its size.
        """
        if self._library.llg_matcher_compute_mask_into(self._handle, address, num_bytes):
            self.check()
            raise GrammarError("the mask cannot be computed")

    @property
    def eos_token_id(self) -> int:
        """The vocabulary's."""
        return self._vocabulary.eos_token_id

    @property
    def is_accepting(self) -> bool:
        """Whether the text may end here."""
        accepting: bool = self._library.llg_matcher_is_accepting(self._handle)
        return accepting

    @property
    def is_complete(self) -> bool:
        """Whether the text must end here: nothing can follow."""
        stopped: bool = self._library.llg_matcher_is_stopped(self._handle)
        return stopped

    def check(self) -> None:
        """Raises the GrammarError that the matcher is in, if any."""
        error = self._library.llg_matcher_get_error(self._handle)
        if error is not None:
            raise GrammarError(_text(error))


def _text(message: bytes) -> str:
    return message.decode("utf-8", "replace").strip()


class _TokenizerInit(ctypes.Structure):
    """LlgTokenizerInitV2, which says how long it is: a newer library takes an older, shorter one."""

    _fields_: ClassVar = [
        ("struct_size", c_size_t),
        ("vocab_size", c_uint32),
        ("tok_eos", c_uint32),
        ("token_lens", c_void_p),
        ("token_bytes", c_void_p),
        ("tokenizer_json", c_char_p),
        ("tokenize_assumes_string", c_bool),
        ("tokenize_fn", c_void_p),
        ("use_approximate_greedy_tokenize_fn", c_bool),
        ("tokenize_user_data", c_void_p),
        ("slices", c_void_p),
        ("tok_eos_extra", c_void_p),
        ("tok_eos_extra_count", c_uint32),
    ]


class _Limits(ctypes.Structure):
    """ParserLimits"""

    _fields_: ClassVar = [
        ("max_items_in_row", c_size_t),
        ("initial_lexer_fuel", c_uint64),
        ("step_lexer_fuel", c_uint64),
        ("step_max_items", c_size_t),
        ("max_lexer_states", c_size_t),
        ("max_grammar_size", c_size_t),
        ("precompute_large_lexemes", c_bool),
        ("verbose_errors", c_bool),
    ]


class _ConstraintInit(ctypes.Structure):
    """LlgConstraintInit"""

    _fields_: ClassVar = [
        ("tokenizer", c_void_p),
        ("log_buffer_level", c_uint32),
        ("log_stderr_level", c_uint32),
        ("ff_tokens_ok", c_bool),
        ("backtrack_ok", c_bool),
        ("limits", _Limits),
        ("room_for_newer_fields", c_uint8 * 256),
    ]


_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    # name: (result, arguments)
    "llg_new_tokenizer_v2": (c_void_p, [POINTER(_TokenizerInit), c_char_p, c_size_t]),
    "llg_free_tokenizer": (None, [c_void_p]),
    "llg_constraint_init_set_defaults": (None, [POINTER(_ConstraintInit), c_void_p]),
    "llg_new_matcher": (c_void_p, [POINTER(_ConstraintInit), c_char_p, c_char_p]),
    "llg_clone_matcher": (c_void_p, [c_void_p]),
    "llg_free_matcher": (None, [c_void_p]),
    "llg_matcher_consume_tokens": (c_int, [c_void_p, c_void_p, c_size_t]),
    "llg_matcher_validate_tokens": (c_int, [c_void_p, c_void_p, c_size_t]),
    "llg_matcher_rollback": (c_int, [c_void_p, c_size_t]),
    "llg_matcher_compute_mask_into": (c_int, [c_void_p, c_void_p, c_size_t]),
    "llg_matcher_is_accepting": (c_bool, [c_void_p]),
    "llg_matcher_is_stopped": (c_bool, [c_void_p]),
    "llg_matcher_get_error": (c_char_p, [c_void_p]),
}


@cache
def _load() -> ctypes.CDLL:
    """Raises GrammarError if the package is not there or is not as its header says."""
    spec = find_spec("llguidance")
    folders = (spec.submodule_search_locations if spec else None) or []
    files = [file for folder in folders for file in Path(folder).glob("_lib.*") if file.suffix != ".pyi"]
    if not files:
        raise GrammarError("llguidance is not installed")
    try:
        library = ctypes.CDLL(str(files[0]))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise GrammarError(f"llguidance cannot be used: {error}") from error
    init = _ConstraintInit()
    library.llg_constraint_init_set_defaults(byref(init), None)
    known = (init.limits.max_items_in_row, init.limits.max_grammar_size, init.limits.verbose_errors)
    if known != (2000, 500_000, True):
        raise GrammarError("llguidance's structures are not those of the versions that this server knows")
    return library
