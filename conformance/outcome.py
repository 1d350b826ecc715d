"""What a case can end with, and the checks that end it."""

from __future__ import annotations

from typing import Any, NoReturn

PASS, FAIL, NOT_OFFERED = "pass", "fail", "not offered"
OUTCOMES = (PASS, FAIL, NOT_OFFERED)


class Failed(Exception):
    """The server breaks the contract; the message says how, in one line."""


class NotOffered(Exception):
    """The server says clearly that it lacks the feature, or has no way to show it."""


def fail(reason: str) -> NoReturn:
    raise Failed(reason)


def expect(condition: object, reason: str) -> None:
    if not condition:
        raise Failed(reason)


def expect_equal(found: object, wanted: object, what: str) -> None:
    if found != wanted:
        raise Failed(f"{what} is {shown(found)}, not {shown(wanted)}")


def expect_keys(value: Any, keys: str, what: str) -> None:
    """`keys`, separated by spaces, are all in the object `value`."""
    expect(isinstance(value, dict), f"{what} is no object")
    missing = [key for key in keys.split() if key not in value]
    expect(not missing, f"{what} lacks {', '.join(missing)}")


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
