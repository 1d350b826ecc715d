"""The lines of the log, in both of its forms."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from server import logs
from server.request_scope import RequestScope, TraceParent, request_scope, trace_parent

WORDS = "CANARY"
HOSTILE = "a\nERROR forged\r\x1b[31mred\x00\x85\u2028\u202eb"


class Written:
    """A logger of its own, and what it wrote."""

    def __init__(self, formatter: logging.Formatter) -> None:
        self._stream = io.StringIO()
        handler = logging.StreamHandler(self._stream)
        handler.setFormatter(formatter)
        self.logger = logging.Logger("server.test", logging.DEBUG)
        self.logger.addHandler(handler)

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    def entry(self) -> dict[str, Any]:
        (line,) = self.text.splitlines()
        entry: dict[str, Any] = json.loads(line)
        return entry


@pytest.fixture
def _scope() -> Iterator[None]:
    token = request_scope.set(RequestScope("req-1", TraceParent("a" * 32, "b" * 16, True)))
    yield
    request_scope.reset(token)


def fail_with(words: str) -> None:
    try:
        try:
            raise KeyError(words)
        except KeyError as cause:
            raise ExceptionGroup(words, [ValueError(words)]) from cause
    except ExceptionGroup as error:
        raise RuntimeError(words) from error


# --- JSON --------------------------------------------------------------------------------------------------


def test_a_json_line_has_the_fields_of_cloud_logging() -> None:
    written = Written(logs.JsonFormatter("engine"))
    before = datetime.now().astimezone()
    written.logger.warning("%d blocks", 3)
    entry = written.entry()
    time = entry.pop("time")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time)
    assert abs((datetime.fromisoformat(time) - before).total_seconds()) < 5
    assert entry == {
        "severity": "WARNING",
        "message": "3 blocks",
        "logger": "server.test",
        "process": "engine",
    }


@pytest.mark.usefixtures("_scope")
@pytest.mark.parametrize("project", [None, "my-project"])
def test_a_json_line_names_its_request_and_the_client_s_trace(
    monkeypatch: pytest.MonkeyPatch, project: str | None
) -> None:
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT", raising=False)
    if project:
        monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", project)
    written = Written(logs.JsonFormatter("front"))
    written.logger.info("x", extra={"fields": {"httpRequest": {"status": 200}}})
    entry = written.entry()
    assert entry["request_id"] == "req-1"
    prefix = f"projects/{project}/traces/" if project else ""
    assert entry["logging.googleapis.com/trace"] == prefix + "a" * 32
    assert entry["logging.googleapis.com/spanId"] == "b" * 16
    assert entry["logging.googleapis.com/trace_sampled"] is True
    assert entry["httpRequest"] == {"status": 200}


def test_an_exception_is_one_field_of_a_json_line() -> None:
    written = Written(logs.JsonFormatter("front"))
    try:
        fail_with(WORDS)
    except RuntimeError:
        written.logger.exception("failed")
    stack = written.entry()["stack_trace"]
    assert stack.startswith("Traceback (most recent call last):\n")
    assert stack.splitlines()[-1] == "builtins.RuntimeError"


# --- what is kept out --------------------------------------------------------------------------------------


@pytest.mark.covers("S14")
@pytest.mark.parametrize("formatter", [logs.TextFormatter, logs.JsonFormatter])
def test_the_front_s_tracebacks_have_places_and_types_and_no_words(
    formatter: Callable[[str], logging.Formatter],
) -> None:
    written = Written(formatter("front"))
    try:
        fail_with(WORDS)
    except RuntimeError:
        written.logger.exception("failed")
    assert WORDS not in written.text
    for kind in ("KeyError", "ExceptionGroup", "ValueError", "RuntimeError"):
        assert f"builtins.{kind}" in written.text
    assert "in fail_with" in written.text


@pytest.mark.parametrize("formatter", [logs.TextFormatter, logs.JsonFormatter])
def test_the_engine_s_tracebacks_have_words_which_are_no_client_s(
    formatter: Callable[[str], logging.Formatter],
) -> None:
    written = Written(formatter("engine"))
    try:
        fail_with("out of memory")
    except RuntimeError:
        written.logger.exception("failed")
    assert "RuntimeError: out of memory" in written.text


@pytest.mark.covers("S14")
@pytest.mark.parametrize("formatter", [logs.TextFormatter, logs.JsonFormatter])
def test_nothing_that_a_client_controls_starts_a_line_or_colours_one(
    formatter: Callable[[str], logging.Formatter],
) -> None:
    written = Written(formatter("front"))
    written.logger.error("path %s", HOSTILE)
    assert written.text.count("\n") == 1
    line = written.text.rstrip("\n")
    assert line.isprintable()
    message = json.loads(line)["message"] if line.startswith("{") else line
    assert message.isprintable()
    assert r"a\nERROR forged\r\x1b[31mred\x00\x85\u2028\u202eb" in message


# --- the whole set-up, in a process of its own --------------------------------------------------------------


def run(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    prelude = "import logging, threading, warnings\nfrom server import logs\n"
    command = [sys.executable, "-c", prelude + code]
    return subprocess.run(command, text=True, check=False, cwd=Path(__file__).parents[2], **options)


def test_all_that_a_process_says_is_json_even_its_end() -> None:
    done = run(
        """
logs.configure("debug", "json", "front")
logging.getLogger("server.x").debug("ours")
for name in ("httpx", "httpcore", "sse_starlette", "uvicorn.error", "asyncio", "multipart", "urllib3"):
    logging.getLogger(name).debug("CANARY")
logging.getLogger("httpx").info("CANARY")
logging.getLogger("uvicorn.error").info("running")
logging.getLogger("server.x").info("%d", "not a number")
warnings.warn("old")
thread = threading.Thread(target=lambda: int("CANARY"), name="worker")
thread.start()
thread.join()
raise ValueError("nothing to serve")
""",
        stderr=subprocess.PIPE,
    )
    assert done.returncode == 1
    entries = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(entry["severity"], entry["logger"]) for entry in entries] == [
        ("DEBUG", "server.x"),
        ("INFO", "uvicorn.error"),
        ("WARNING", "py.warnings"),
        ("ERROR", "server.logs"),
        ("CRITICAL", "server.logs"),
    ]
    assert "CANARY" not in done.stderr.replace('int(\\"CANARY\\")', "")
    assert entries[-1]["message"] == "ended by ValueError: nothing to serve"


@pytest.mark.covers("E12")
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_log_on_a_full_disk_or_a_closed_pipe_stops_nobody(form: str) -> None:
    code = f"""
logs.configure("debug", "{form}", "front")
for number in range(1000):
    logging.getLogger("server.x").error("line %d", number)
print("still here")
"""
    with Path("/dev/full").open("w") as full:
        done = run(code, stdout=subprocess.PIPE, stderr=full)
    assert done.stdout == "still here\n"
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import sys; sys.stdin.read()\nimport logging\nfrom server import logs\n{code}",
        ],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stderr is not None
    process.stderr.close()
    process.stderr = None
    output, _ = process.communicate("", timeout=60)
    assert output == "still here\n"


def test_a_level_applies_to_all_that_is_below_it() -> None:
    done = run(
        'logs.configure("error", "text", "engine")\n'
        'for name in ("server.x", "uvicorn.error", "others"):\n'
        '    logging.getLogger(name).warning("not this")\n'
        '    logging.getLogger(name).error("this")\n',
        stderr=subprocess.PIPE,
    )
    assert [line.partition(" ERROR ")[2] for line in done.stderr.splitlines()] == ["engine: this"] * 3


# --- the client's trace ------------------------------------------------------------------------------------

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("headers", "parent"),
    [
        ({"traceparent": f"00-{TRACE}-{SPAN}-01"}, TraceParent(TRACE, SPAN, True)),
        ({"traceparent": f"00-{TRACE}-{SPAN}-00"}, TraceParent(TRACE, SPAN, False)),
        ({"traceparent": f"01-{TRACE}-{SPAN}-03-more"}, TraceParent(TRACE, SPAN, True)),
        ({"traceparent": f"00-{TRACE}-{SPAN}-01-more"}, None),
        ({"traceparent": f"ff-{TRACE}-{SPAN}-01"}, None),
        ({"traceparent": f"00-{'0' * 32}-{SPAN}-01"}, None),
        ({"traceparent": f"00-{TRACE}-{'0' * 16}-01"}, None),
        ({"traceparent": f"00-{TRACE.upper()}-{SPAN}-01"}, None),
        ({"traceparent": "x" * 100_000}, None),
        ({"x-cloud-trace-context": f"{TRACE}/255;o=1"}, TraceParent(TRACE, f"{255:016x}", True)),
        ({"x-cloud-trace-context": TRACE}, TraceParent(TRACE, "", False)),
        ({"x-cloud-trace-context": f"{TRACE}/{1 << 64};o=1"}, None),
        (
            {"x-cloud-trace-context": f"{'c' * 32}/1", "traceparent": f"00-{TRACE}-{SPAN}-01"},
            TraceParent(TRACE, SPAN, True),
        ),
        ({}, None),
    ],
)
def test_a_client_s_trace_is_read_or_left_alone(headers: dict[str, str], parent: TraceParent | None) -> None:
    assert trace_parent([(name.encode(), value.encode()) for name, value in headers.items()]) == parent


def test_of_two_traceparents_neither_counts() -> None:
    header = (b"traceparent", f"00-{TRACE}-{SPAN}-01".encode())
    assert trace_parent([header, header]) is None
