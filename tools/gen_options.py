"""Writes docs/options.md from the declaration of the options (`make docs`)."""

from __future__ import annotations

import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic.fields import FieldInfo

from server.config import ENV_PREFIX, option_name, variable_name
from server.options import ServerConfig

OPTIONS_PAGE = Path(__file__).parent.parent / "docs" / "options.md"

_INTRODUCTION = f"""\
# Options

Written by `make docs` from `server/options.py`; do not edit it by hand.

Every option can be given in three ways. The command line wins over the environment, the environment over the
file:

| | `max-model-len` as an example |
|---|---|
| command line | `gemma-server serve --max-model-len 4096`, or `make serve ARGS="--max-model-len 4096"` |
| environment | `{ENV_PREFIX}MAX_MODEL_LEN=4096` |
| file | `max-model-len: 4096` in a YAML file named by `--config FILE` or `{ENV_PREFIX}CONFIG` |

An option that takes several values takes them behind one another on the command line (`--api-key A B`), with
commas in the environment (`{ENV_PREFIX}API_KEY=A,B`), and as a list in a file. A switch has a `--no-` form.
Options that vLLM also has carry vLLM's names.

| option | environment | value | default | what it does |
|---|---|---|---|---|
| `--config` | `{ENV_PREFIX}CONFIG` | file | none | YAML file with options as keys. |
"""


def options_page() -> str:
    """The text of docs/options.md."""
    return _INTRODUCTION + "".join(_row(name, field) for name, field in ServerConfig.model_fields.items())


def _row(name: str, field: FieldInfo) -> str:
    cells = (
        f"`{option_name(name)}`",
        f"`{variable_name(name)}`",
        _value(field.annotation),
        _default(field.default),
        (field.description or "").replace("|", "\\|"),
    )
    return f"| {' | '.join(cells)} |\n"


def _value(annotation: Any) -> str:
    """What kind of value an option takes, in words."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return _value(next(each for each in typing.get_args(annotation) if each is not types.NoneType))
    if typing.get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        return f"{_value(typing.get_args(annotation)[0])}, several"
    return {bool: "switch", int: "integer", float: "number", str: "text", Path: "path"}[annotation]


def _default(default: Any) -> str:
    if default is None or default == []:
        return "none"
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"`{default}`"


def main() -> None:
    OPTIONS_PAGE.write_text(options_page(), encoding="utf-8")
    print(f"wrote {OPTIONS_PAGE}", file=sys.stderr)


if __name__ == "__main__":
    main()
