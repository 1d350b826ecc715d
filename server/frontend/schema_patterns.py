"""The patterns of JSON schemas as regular expressions of llguidance, which match a whole text or not at all."""

from __future__ import annotations

import re

from server.grammar_library import GrammarError

_ANYTHING = "(?s:.*)"


def whole_regex(pattern: str) -> str:
    """`pattern`, which is to be found in a string, as one that the whole string matches, between slashes.

    Raises GrammarError for one of which that cannot be said.
    """
    body = pattern.removeprefix("^")
    is_bound_before = body != pattern
    is_bound_behind = re.search(r"(?<!\\)(\\\\)*\$\Z", body) is not None
    body = body[:-1] if is_bound_behind else body
    if (is_bound_before or is_bound_behind) and _has_alternatives(body):
        raise GrammarError("a 'pattern' binds its alternatives to the string's ends one by one; put them in ()")
    if re.search(r"(?<!\\)(\\\\)*\\\Z", body):
        raise GrammarError("a 'pattern' ends with a backslash")
    body = re.sub(r"\\.|/", lambda found: r"\/" if found[0] == "/" else found[0], body, flags=re.DOTALL)
    body = body.replace("\n", r"\n")
    return f"{'' if is_bound_before else _ANYTHING}(?:{body}){'' if is_bound_behind else _ANYTHING}"


def _has_alternatives(regex: str) -> bool:
    """Whether there is a `|` outside all brackets."""
    depth = 0
    for found in re.finditer(r"\\.|\[(?:\\.|[^\]\\])*\]|[()|]", regex, flags=re.DOTALL):
        depth += (found[0] == "(") - (found[0] == ")")
        if found[0] == "|" and depth == 0:
            return True
    return False
