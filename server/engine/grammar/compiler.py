"""Compiles grammars in a thread, while the sequences that need them wait and all others go on.

Laws:
1. `compiled` never blocks, and gives one answer for a text: a matcher, why there is none, or "not yet".
2. Once an answer is there, `on_done` was or is about to be called, in the thread.
3. What is kept is bounded: the answers that were asked for last, of so many characters of grammar.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from server.engine.types import Vocabulary
from server.grammar_library import MAX_GRAMMAR_CHARS, GrammarError, Matcher
from server.grammar_library import Vocabulary as CompiledVocabulary

logger = logging.getLogger(__name__)

_CACHED = 64
_CACHED_CHARS = 4 * MAX_GRAMMAR_CHARS
"""A grammar takes some 100 bytes for each of its characters."""
_STACK_BYTES = 64 << 20
"""Of the thread: the library recurses through what a grammar refers to."""
_SLOW_SECONDS = 1.0


class GrammarCompiler:
    """One thread calls everything; another, which the first grammar starts, does the work."""

    def __init__(self, on_done: Callable[[], None] = lambda: None) -> None:
        self._on_done = on_done
        self._vocabulary: Vocabulary | None = None
        self._jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[str, Matcher | GrammarError]] = queue.SimpleQueue()
        self._pending: set[str] = set()
        self._cache: OrderedDict[str, Matcher | GrammarError] = OrderedDict()
        self._thread: threading.Thread | None = None

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Once, before the first grammar."""
        self._vocabulary = vocabulary

    def compiled(self, grammar: str) -> Matcher | GrammarError | None:
        """A matcher to copy; why the grammar does not compile; None: not yet, ask again after `on_done`."""
        self._take_answers()
        answer = self._cache.get(grammar)
        if answer is not None:
            self._cache.move_to_end(grammar)
        elif grammar not in self._pending:
            if self._vocabulary is None:
                return GrammarError("no vocabulary came before the grammar")
            self._pending.add(grammar)
            self._jobs.put(grammar)
            self._start(self._vocabulary)
        return answer

    @property
    def has_news(self) -> bool:
        """Whether a grammar was done since `compiled` was called last."""
        return not self._answers.empty()

    def _take_answers(self) -> None:
        while not self._answers.empty():
            grammar, answer = self._answers.get()
            self._pending.remove(grammar)
            self._cache[grammar] = answer
        while len(self._cache) > _CACHED or sum(map(len, self._cache)) > _CACHED_CHARS:
            self._cache.popitem(last=False)

    def _start(self, vocabulary: Vocabulary) -> None:
        if self._thread is None:
            before = threading.stack_size(_STACK_BYTES)
            self._thread = threading.Thread(target=self._run, args=(vocabulary,), name="grammars", daemon=True)
            self._thread.start()
            threading.stack_size(before)

    def _run(self, vocabulary: Vocabulary) -> None:
        pieces: CompiledVocabulary | None = None
        while True:
            grammar = self._jobs.get()
            started = time.monotonic()
            answer: Matcher | GrammarError
            try:
                if pieces is None:
                    pieces = CompiledVocabulary(vocabulary.lengths, vocabulary.pieces, vocabulary.eos_token_id)
                answer = pieces.compile(grammar)
            except GrammarError as error:
                answer = error
            except Exception as error:  # whatever it is: without the thread every grammar would wait for ever
                logger.exception("a grammar of %d characters cannot be compiled", len(grammar))
                answer = GrammarError(f"the compiler failed: {error}")
            seconds = time.monotonic() - started
            if seconds > _SLOW_SECONDS:
                logger.info("a grammar of %d characters took %.1f s to compile", len(grammar), seconds)
            self._answers.put((grammar, answer))
            self._on_done()
