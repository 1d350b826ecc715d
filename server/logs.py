"""What the log looks like: lines for people, or JSON in the form that Google's Cloud Logging reads.

Laws:
1. A record is one line, but for the traceback under it in the text form. What a client controls cannot start
   another one: control characters are escaped.
2. No prompt, no output, no key, at any level. Messages are made of ids, names and counts. A traceback of the
   front has no exception's own words, since those may repeat what a client wrote; nor does the front let other
   packages say what they say below a warning.
3. A log that cannot be written harms nobody: the line is lost.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal

from server.request_scope import request_scope

Form = Literal["text", "json"]
Process = Literal["front", "engine", "rank"]

logger = logging.getLogger(__name__)

_DEEPEST_CHAIN = 20
_UNPRINTABLE = [
    *range(0x20),
    *range(0x7F, 0xA0),
    0x2028,
    0x2029,
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
]
"""C0 and C1, and what Unicode has to break lines and to turn the direction of writing."""
_ESCAPES = {code: ascii(chr(code))[1:-1] for code in _UNPRINTABLE}


def configure(level: str, form: Form, process: Process) -> None:
    """Have this process log to the standard error, uncaught exceptions included.

    level: debug | info | warning | error; what other packages say has to be a warning at least.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(process) if form == "json" else TextFormatter(process))
    ours, uvicorn, others = logging.getLogger("server"), logging.getLogger("uvicorn"), logging.getLogger()
    others.handlers = [handler]
    ours.setLevel(level.upper())
    uvicorn.setLevel(max(ours.level, logging.INFO))
    others.setLevel(max(ours.level, logging.WARNING))
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # it would print the record that cannot be written, and why
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


def ignore_stack_signal() -> None:
    """Until `dump_stacks_on_signal`, here and in the processes that are started before it."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def dump_stacks_on_signal(pass_on: Callable[[], None] = lambda: None) -> None:
    """On SIGUSR1 print the stack of each thread, names and lines alone, and then have `pass_on` called.

    The first works even where the process hangs in native code; the second waits until it does not.
    """
    signal.signal(signal.SIGUSR1, lambda number, frame: pass_on())
    faulthandler.register(signal.SIGUSR1, chain=True)


class TextFormatter(logging.Formatter):
    def __init__(self, process: Process) -> None:
        super().__init__()
        self._origin = "engine: " if process == "engine" else ""
        self._shows_words = process == "engine"

    def format(self, record: logging.LogRecord) -> str:
        line = f"{self.formatTime(record)} {record.levelname} {self._origin}{_message(record)}"
        stack = _stack_trace(record, self._shows_words)
        return f"{line}\n{stack}" if stack else line


class JsonFormatter(logging.Formatter):
    """Fields have the names of Cloud Logging's LogEntry where it has one; a record's `fields` are added."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process
        project = os.environ.get("GOOGLE_CLOUD_PROJECT")
        self._trace_prefix = f"projects/{project}/traces/" if project else ""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry: dict[str, object] = {
            "time": time.replace("+00:00", "Z"),
            "severity": record.levelname,
            "message": _message(record),
            "logger": record.name,
            "process": self._process,
        }
        scope = request_scope.get()
        if scope is not None:
            entry["request_id"] = scope.request_id
            if (parent := scope.trace_parent) is not None:
                entry["logging.googleapis.com/trace"] = self._trace_prefix + parent.trace_id
                entry["logging.googleapis.com/trace_sampled"] = parent.is_sampled
                if parent.span_id:
                    entry["logging.googleapis.com/spanId"] = parent.span_id
        entry |= getattr(record, "fields", {})
        if stack := _stack_trace(record, shows_words=self._process == "engine"):
            entry["stack_trace"] = stack
        return json.dumps(entry)


def _message(record: logging.LogRecord) -> str:
    return record.getMessage().strip().translate(_ESCAPES)


def _stack_trace(record: logging.LogRecord, shows_words: bool) -> str:
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return ""
    if shows_words:
        return "".join(traceback.format_exception(error)).rstrip()
    return "".join(_without_words(error, _DEEPEST_CHAIN)).rstrip()


def _without_words(error: BaseException, deepest: int) -> Iterator[str]:
    """As `traceback.format_exception`, but for the exceptions' messages."""
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None and deepest > 0:
        yield from _without_words(before, deepest - 1)
        yield "\nwhich led to:\n\n"
    yield "Traceback (most recent call last):\n"
    yield from traceback.format_tb(error.__traceback__)
    yield f"{type(error).__module__}.{type(error).__qualname__}\n"
    if isinstance(error, BaseExceptionGroup) and deepest > 0:
        for part in error.exceptions:
            yield "\nof which a part is:\n\n"
            yield from _without_words(part, deepest - 1)


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    # No request is answered by the main thread outside its event loop, which lets none of their errors out.
    logger.critical("ended by %s: %s", kind.__name__, error, exc_info=(kind, error, trace))


def _log_uncaught_in_thread(caught: threading.ExceptHookArgs) -> None:
    if caught.exc_value is not None:
        name = caught.thread.name if caught.thread is not None else "unknown"
        trace = (caught.exc_type, caught.exc_value, caught.exc_traceback)
        logger.error("the thread %s ended by %s", name, caught.exc_type.__name__, exc_info=trace)
