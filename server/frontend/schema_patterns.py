"""The patterns of JSON schemas as regular expressions of llguidance, which match a whole text or not at all."""

from __future__ import annotations

import re

_ANYTHING = "(?s:.*)"
_LOOKS_AROUND = re.compile(r"(?<!\\)(?:\\\\)*(?:\(\?(?:[=!]|<[=!])|\\[1-9kbB])")
_DOLLAR_ENDS = re.compile(r"(?<!\\)(?:\\\\)*\$\Z")
_BACKSLASH_ENDS = re.compile(r"(?<!\\)(?:\\\\)*\\\Z")
_SLASHES = re.compile(r"\\.|/", re.DOTALL)
_STRUCTURE = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|[()|^$]", re.DOTALL)


def whole_regex(pattern: str) -> str | None:
    """`pattern`, which is to be found in a string, as what stands between the slashes of a regular expression
    that the whole string matches.

    None if there is none: for alternatives that are bound to the string's ends one by one, and whatever looks
    around or back.
    """
    body = pattern.removeprefix("^")
    is_bound_before = body != pattern
    is_bound_behind = _DOLLAR_ENDS.search(body) is not None
    body = body[:-1] if is_bound_behind else body
    if _LOOKS_AROUND.search(body) or _BACKSLASH_ENDS.search(body):
        return None
    if _has_bounds(body, alternatives_too=is_bound_before or is_bound_behind):
        return None
    body = _SLASHES.sub(lambda found: r"\/" if found[0] == "/" else found[0], body).replace("\n", r"\n")
    return f"{'' if is_bound_before else _ANYTHING}(?:{body}){'' if is_bound_behind else _ANYTHING}"


def _has_bounds(regex: str, *, alternatives_too: bool) -> bool:
    """Whether there is a `^` or a `$`, or a `|` outside all groups."""
    depth = 0
    for found in _STRUCTURE.finditer(regex):
        depth += (found[0] == "(") - (found[0] == ")")
        if found[0] in ("^", "$") or (found[0] == "|" and depth == 0 and alternatives_too):
            return True
    return False
