"""The query parameters of lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from server.errors import InvalidRequestError, shown


def limit_of(query: Mapping[str, str], default: int, *, most: int) -> int:
    """`limit`, how many objects a page may have. Raises InvalidRequestError."""
    value = query.get("limit")
    if value is None:
        return default
    if not (value.isascii() and value.isdecimal() and len(value) <= 9 and 1 <= int(value) <= most):
        raise InvalidRequestError(f"'limit' must be 1 to {most}, got {shown(value)}.", param="limit")
    return int(value)


def one_of(query: Mapping[str, str], name: str, choices: Sequence[str]) -> str:
    """The value of `name`, the first of `choices` if it is not given. Raises InvalidRequestError."""
    value = query.get(name, choices[0])
    if value not in choices:
        raise InvalidRequestError(f"'{name}' must be {' or '.join(choices)}, got {shown(value)}.", param=name)
    return value


def parameters(**schemas: dict[str, Any]) -> dict[str, Any]:
    """`openapi_extra` of a route with these query parameters, all of which may be left out."""
    return {"parameters": [{"name": name, "in": "query", "schema": schema} for name, schema in schemas.items()]}


def limits(default: int, most: int) -> dict[str, Any]:
    """The schema of `limit`."""
    return {"type": "integer", "minimum": 1, "maximum": most, "default": default}


AFTER = {"type": "string", "description": "The id behind which the page begins."}
