"""Reading a request's body: bounded in size, time and structure, and parsed here so that every error is ours.

The parser and the validation hold the interpreter's lock, so that a thread helps only between them: what bounds
the time in which nothing else runs is the bound on what there is to parse.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json
from starlette.requests import Request

from server.errors import (
    BodyTooLargeError,
    InvalidRequestError,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
    shown,
)
from server.limits import BODY_SECONDS, MAX_ESCAPES, MAX_KEYS, MAX_OBJECTS, MAX_STRINGS, MAX_VALUES

INLINE_BYTES = 1 << 16
"""Larger bodies are parsed in a thread; smaller ones cannot hold so much that it would take long."""

Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result")


async def read_as(request: Request, max_bytes: int, make: Callable[[dict[str, object]], Result]) -> Result:
    """What `make`, which may run in a thread, makes of the JSON object in the body.

    Raises an ApiError that says what is wrong, or ClientDisconnect.
    """
    _check_headers(request, max_bytes)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            data = await _read(request, max_bytes)
    except TimeoutError:
        raise RequestTimeoutError(f"The body was not complete after {BODY_SECONDS:g} seconds.") from None
    request.state.is_large = len(data) > INLINE_BYTES
    return await off_loop(request, lambda: make(_parse(data)))


async def off_loop(request: Request, work: Callable[[], Result]) -> Result:
    """The result of work that grows with the request's body, in a thread if that is large."""
    return await asyncio.to_thread(work) if request.state.is_large else work()


def validate(model: type[Body], value: dict[str, object]) -> Body:
    """`value` as a `model`. Raises InvalidRequestError that names the first field with a mistake."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _explain(error.errors(include_url=False)) from None


def _parse(data: bytes) -> dict[str, object]:
    if len(data) > INLINE_BYTES:
        _check_structure(data)
    try:
        # Refuses NaN, lone surrogates, invalid UTF-8, and more than MAX_NESTING levels without recursing.
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequestError("The body must be a JSON object.", code="invalid_json")
    return value


def _check_structure(data: bytes) -> None:
    """Refuse what would take long to parse. Bytes are counted, of which strings may hold any: only where there
    are many, strings are left out."""
    if (num_escapes := data.count(b"\\")) > MAX_ESCAPES:
        raise _too_complex(num_escapes, "backslashes", MAX_ESCAPES)
    has_few_strings = data.count(b'"') <= 2 * MAX_STRINGS
    if has_few_strings and not list(_excesses(data)):
        return
    data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    if (num_strings := data.count(b'"') // 2) > MAX_STRINGS:
        raise _too_complex(num_strings, "strings", MAX_STRINGS)
    for found, what, most in _excesses(b"".join(data.split(b'"')[::2])):
        raise _too_complex(found, what, most)


def _excesses(data: bytes) -> Iterator[tuple[int, str, int]]:
    num_objects = data.count(b"{")
    for found, what, most in (
        (num_objects, "objects", MAX_OBJECTS),
        (data.count(b":"), "keys", MAX_KEYS),
        (data.count(b",") + data.count(b"[") + num_objects, "values", MAX_VALUES),
    ):
        if found > most:
            yield found, what, most


def _too_complex(found: int, what: str, most: int) -> InvalidRequestError:
    return InvalidRequestError(f"The body holds {found} {what}, more than {most}.", code="body_too_complex")


def _check_headers(request: Request, max_bytes: int) -> None:
    headers = request.headers
    media_type = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaTypeError(f"The Content-Type must be application/json, got {shown(media_type)}.")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaTypeError("The body must not have a Content-Encoding.")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise _too_large(max_bytes)


async def _read(request: Request, max_bytes: int) -> bytes:
    # The header may lie, and a chunked body has none: what counts is what arrives.
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(data)


def _too_large(max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"The body has more than {max_bytes} bytes.")


_EXPECTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "literal_error": "{expected}",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_long": "of at most {max_length} items",
    "too_short": "of at least {min_length} items",
    "string_too_long": "of at most {max_length} characters",
    "string_too_short": "of at least {min_length} characters",
}
"""Pydantic's names of mistakes, for those that our models can produce."""


def _explain(problems: list[ErrorDetails]) -> InvalidRequestError:
    """The first wrong field; where its type is a union, the branches that got deepest into the value."""
    field = problems[0]["loc"][:1]
    located = [(_param(problem["loc"]), problem) for problem in problems if problem["loc"][:1] == field]
    param = max((param for param, _ in located), key=len)
    found = [problem for where, problem in located if where == param]
    if found[0]["type"] == "missing":
        return InvalidRequestError(f"'{param}' is required.", param=param, code="missing_required_parameter")
    if found[0]["type"] == "value_error":
        what = str(found[0]["ctx"]["error"])
    else:
        what = "must be " + " or ".join(_expected(problem) for problem in found)
    return InvalidRequestError(f"'{param}' {what}, got {shown(found[0]['input'])}.", param=param)


def _expected(problem: ErrorDetails) -> str:
    known = _EXPECTED.get(problem["type"])
    return known.format(**problem.get("ctx", {})) if known else f"valid ({problem['msg']})"


def _param(location: tuple[int | str, ...]) -> str:
    """`messages[0].content`: pydantic's location without the names that it gives to the branches of a union."""
    parts = [part for part in location if isinstance(part, int) or not ("[" in part or part in ("str", "int"))]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)[1:]
