"""Writes docs/limits.md from `server/limits.py` (`make docs`)."""

from __future__ import annotations

import ast
import inspect
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from server import limits

LIMITS_PAGE = Path(__file__).parent.parent / "docs" / "limits.md"

_INTRODUCTION = """\
# Limits

Written by `make docs` from `server/limits.py`; do not edit it by hand.

What a client may send at most. A request that exceeds one is answered with an error that names the limit,
before it costs anything; a connection that does is closed. Other limits are options
([options.md](options.md): `--max-body-bytes`, `--max-queued-requests`, `--max-logprobs`, `--max-model-len`), or
follow from the model: its context and its vocabulary.
"""


def limits_page() -> str:
    """The text of docs/limits.md."""
    page = _INTRODUCTION
    for heading, rows in _sections():
        page += f"\n## {heading}\n\n| limit | value | what and why |\n|---|---|---|\n"
        page += "".join(f"| `{name}` | {_shown(name)} | {text} |\n" for name, text in rows)
    return page


def _sections() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The headings in the module's comments, each with the names and docstrings under it."""
    source = inspect.getsource(limits)
    lines = source.splitlines()
    starts = [(number, line.strip("# -")) for number, line in enumerate(lines, 1) if line.startswith("# ---")]
    statements = ast.parse(source).body
    for (start, heading), (end, _) in zip(starts, [*starts[1:], (len(lines) + 1, "")], strict=True):
        rows = []
        for statement, following in itertools.pairwise(statements):
            if isinstance(statement, ast.Assign) and start < statement.lineno < end:
                assert isinstance(following, ast.Expr)
                assert isinstance(following.value, ast.Constant)
                rows.append((ast.unparse(statement.targets[0]), " ".join(str(following.value.value).split())))
        yield heading.capitalize(), rows


def _shown(name: str) -> str:
    value = getattr(limits, name)
    return f"{value:g} s" if name.endswith("_SECONDS") else f"{value:,}"


def main() -> None:
    LIMITS_PAGE.write_text(limits_page(), encoding="utf-8")
    print(f"wrote {LIMITS_PAGE}", file=sys.stderr)


if __name__ == "__main__":
    main()
