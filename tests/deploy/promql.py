"""The metrics that a PromQL expression reads."""

from __future__ import annotations

import re

_STRINGS = re.compile(r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|`[^`]*`')
_LABEL_LISTS = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_NOT_NAMES = re.compile(r"\{[^}]*\}|\[[^\]]*\]|\$\w+|\$\{\w+[^}]*\}")
_WORDS = {
    *("and", "or", "unless", "by", "without", "on", "ignoring", "group_left", "group_right"),
    *("bool", "offset", "inf", "nan", "start", "end", "atan2"),
}
_NAME = re.compile(r"(?<![\w:.])[a-zA-Z_:][\w:]*(?!\w*\s*\()")


def metric_names(expression: str) -> set[str]:
    """Those of its vector selectors. Functions, labels and the parts of dashboards' variables are none."""
    text = _STRINGS.sub('""', expression)
    text = _NOT_NAMES.sub(" ", _LABEL_LISTS.sub(" ", text))
    text = re.sub(r"\boffset\s+-?\w+|(?<![\w:])\d[\w.]*", " ", text)
    return {name for name in _NAME.findall(text) if name.lower() not in _WORDS}
