"""The lines of a batch: one JSON object each, in the input as in the output.

{"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {...}}
{"id": "batch_req_...", "custom_id": "1", "response": {"status_code": 200, ...}, "error": null}
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from server.batches.objects import BatchError
from server.errors import shown

MAX_CUSTOM_ID_CHARS = 512
MOST_ERRORS = 100
"""That one input file gets told; the rest would be more of the same."""
LINE_OVERHEAD_BYTES = 4096
"""What a line may have beside the body of its request."""


class Line(Struct, frozen=True):
    """One request of an input file."""

    number: int
    """From 1; empty lines count."""
    custom_id: str
    url: str
    body: bytes
    """A JSON object."""
    model: str | None


class LineError(ValueError):
    def __init__(self, number: int | None, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.error = BatchError(code, message, param, number)


class Answer(Struct, frozen=True):
    """What the server answers to one request."""

    status: int
    body: bytes
    """JSON."""
    request_id: str
    ignored_fields: str = ""


class TokenCounts(Struct, frozen=True):
    prompt: int = 0
    cached: int = 0
    generated: int = 0


class Result(Struct, frozen=True):
    """One line of output."""

    number: int
    """Of the input line."""
    is_success: bool
    tokens: TokenCounts
    line: bytes
    """With its line feed."""


def read_lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Number and content of each line that is not empty. Raises LineError for one of more than `max_bytes`."""
    number = 0
    while raw := file.readline(max_bytes + 1):
        number += 1
        if len(raw) > max_bytes:
            raise LineError(number, "line_too_long", f"Line {number} has more than {max_bytes} bytes.")
        if raw.strip():
            yield number, raw


def parse_line(number: int, raw: bytes) -> Line:
    """Raises LineError."""
    try:
        raw.decode()  # the decoder below does not look at what it passes over
        fields = _envelopes.decode(raw)
        raw_body = b"" if fields.body is UNSET else bytes(fields.body)
        body = _bodies.decode(raw_body) if raw_body else _Body()
    except UnicodeDecodeError:
        raise LineError(number, "invalid_json_line", f"Line {number} is not valid UTF-8.") from None
    except (msgspec.DecodeError, RecursionError) as error:
        problem = str(error) or type(error).__name__
        raise LineError(number, "invalid_json_line", f"Line {number} is not valid: {problem}.") from None
    for name in ("custom_id", "method", "url", "body"):
        if getattr(fields, name) is UNSET:
            raise LineError(number, "missing_required_parameter", f"Line {number} has no '{name}'.", name)
    custom_id, url = fields.custom_id, fields.url
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        message = f"'custom_id' must be a string of 1 to {MAX_CUSTOM_ID_CHARS} characters."
        raise LineError(number, "invalid_custom_id", message, "custom_id")
    if fields.method != "POST":
        raise LineError(
            number, "invalid_method", f"'method' must be POST, got {shown(fields.method)}.", "method"
        )
    if not isinstance(url, str):
        raise LineError(number, "invalid_url", f"'url' must be a string, got {shown(url)}.", "url")
    if body.stream is True:
        message = "'stream' must not be true: a batch has no stream."
        raise LineError(number, "invalid_request", message, "body.stream")
    if not isinstance(body.model, str | None):
        raise LineError(number, "invalid_request", "'model' must be a string.", "body.model")
    return Line(number, custom_id, url, raw_body, body.model)


def check_lines(
    file: BinaryIO, *, max_bytes: int, max_lines: int, urls: Collection[str], models: Collection[str] | None
) -> tuple[int, list[BatchError]]:
    """The number of requests in `file`, and what is wrong with them.

    `urls` are allowed; of `models`, each line may name one (None: any). Stops at the first line too many.
    """
    errors: list[BatchError] = []
    seen: set[str] = set()
    total = 0
    try:
        for number, raw in read_lines(file, max_bytes):
            total += 1
            if total > max_lines:
                raise LineError(number, "too_many_requests", f"A batch may hold at most {max_lines} requests.")
            try:
                line = parse_line(number, raw)
                _check_meaning(line, seen, urls, models)
                seen.add(line.custom_id)
            except LineError as error:
                errors.append(error.error)
                if len(errors) == MOST_ERRORS:
                    return total, errors
    except LineError as error:
        errors.append(error.error)
    if not total:
        errors.append(BatchError("empty_file", "The input file holds no request."))
    return total, errors


def success_or_failure(line: Line, answer: Answer) -> Result:
    response = _Response(answer.status, answer.request_id, Raw(answer.body), answer.ignored_fields or UNSET)
    written = _encode(_OutputLine(_new_id(), line.custom_id, response, None))
    return Result(line.number, 200 <= answer.status < 300, _tokens(answer.body), written)


def not_executed(line: Line, code: str, message: str) -> Result:
    written = _encode(_OutputLine(_new_id(), line.custom_id, None, _Error(code, message)))
    return Result(line.number, False, TokenCounts(), written)


def _check_meaning(line: Line, seen: set[str], urls: Collection[str], models: Collection[str] | None) -> None:
    if line.custom_id in seen:
        message = f"The custom_id {shown(line.custom_id)} is not the first of its name."
        raise LineError(line.number, "duplicate_custom_id", message, "custom_id")
    if line.url not in urls:
        message = f"'url' must be {' or '.join(sorted(urls))}, got {shown(line.url)}."
        raise LineError(line.number, "invalid_url", message, "url")
    if models is not None and line.model is not None and line.model not in models:
        message = f"The model {shown(line.model)} does not exist; this server has {', '.join(models)}."
        raise LineError(line.number, "model_not_found", message, "body.model")


class _Envelope(Struct):
    custom_id: Any = UNSET
    method: Any = UNSET
    url: Any = UNSET
    body: Raw | UnsetType = UNSET


class _Body(Struct):
    model: Any = None
    stream: Any = None


class _Response(Struct, omit_defaults=True):
    status_code: int
    request_id: str
    body: Raw
    ignored_fields: str | UnsetType = UNSET
    """What the header x-ignored-fields says elsewhere."""


class _Error(Struct):
    code: str
    message: str


class _OutputLine(Struct):
    id: str
    custom_id: str
    response: _Response | None
    error: _Error | None


class _Details(Struct):
    cached_tokens: int = 0


class _Usage(Struct):
    """Under the names of all endpoints."""

    prompt_tokens: int = 0
    input_tokens: int = 0
    completion_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None


class _Answered(Struct):
    usage: _Usage | None = None


_envelopes = msgspec.json.Decoder(_Envelope)
_bodies = msgspec.json.Decoder(_Body)
_answers = msgspec.json.Decoder(_Answered)


def _encode(line: _OutputLine) -> bytes:
    return msgspec.json.encode(line) + b"\n"


def _new_id() -> str:
    return f"batch_req_{uuid.uuid4().hex}"


def _tokens(body: bytes) -> TokenCounts:
    try:
        usage = _answers.decode(body).usage
    except msgspec.DecodeError:
        return TokenCounts()  # an endpoint whose usage has another shape
    if usage is None:
        return TokenCounts()
    details = usage.prompt_tokens_details or usage.input_tokens_details or _Details()
    return TokenCounts(
        prompt=usage.prompt_tokens or usage.input_tokens,
        cached=details.cached_tokens,
        generated=usage.completion_tokens or usage.output_tokens,
    )
