from __future__ import annotations

from typing import Any

import pytest

from conformance.cases.structured import COLOUR, an_object
from conformance.schema import violation

OBJECT = an_object(colour=COLOUR, count={"type": "integer", "minimum": 1, "maximum": 3})
TEXT = {"type": "string", "minLength": 1, "maxLength": 3, "pattern": "^[a-c]+$"}
LIST = {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2}
EITHER = {"anyOf": [{"type": "null"}, {"const": 5}]}


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        ({"colour": "red", "count": 3}, OBJECT),
        ("abc", TEXT),
        ([True, False], LIST),
        (None, EITHER),
        (5, EITHER),
        (1.5, {"type": "number"}),
        ({"anything": [1, {}]}, {}),
    ],
)
def test_what_obeys_is_accepted(value: Any, schema: dict[str, Any]) -> None:
    assert violation(value, schema) is None


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        ({"colour": "red"}, OBJECT),
        ({"colour": "red", "count": 3, "more": 1}, OBJECT),
        ({"colour": "pink", "count": 3}, OBJECT),
        ({"colour": "red", "count": 4}, OBJECT),
        ({"colour": "red", "count": True}, OBJECT),
        ({"colour": "red", "count": 1.5}, OBJECT),
        ([], OBJECT),
        ("", TEXT),
        ("abca", TEXT),
        ("abd", TEXT),
        ([], LIST),
        ([True] * 3, LIST),
        ([True, 1], LIST),
        (6, EITHER),
    ],
)
def test_what_disobeys_is_named(value: Any, schema: dict[str, Any]) -> None:
    assert violation(value, schema)
