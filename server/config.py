"""The options' values, from command line, environment and file.

The command line wins over the environment, the environment over the file, the file over the default. What
Vertex AI says in its own variables (`server/vertex_environment.py`) comes between the environment and the
file, and what is assumed there between the file and the default.
"""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from server.options import ServerConfig
from server.vertex_environment import assumed_options, vertex_options

ENV_PREFIX = "GEMMA_SERVER_"


class OptionError(ValueError):
    """An option has a value that cannot be used; the message names the option and its source."""


def load_config(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> ServerConfig:
    """The configuration from command line, environment and file, in that order of precedence.

    Raises OptionError for a value that cannot be used. Exits as argparse does on `--help` and unknown options.
    """
    environment = os.environ if environment is None else environment
    given = vars(_parser().parse_args(arguments))
    config_file = given.pop("config", None) or environment.get(variable_name("config"))
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}

    def take(found: Mapping[str, Any], source: Callable[[str], str]) -> None:
        for name, value in found.items():
            values[name] = value
            sources[name] = source(name)

    take(assumed_options(environment), lambda name: f"{option_name(name)} on Vertex AI")
    if config_file:
        take(_from_file(config_file), lambda name: f"{config_file}: {name}")
    of_vertex, variables = vertex_options(environment)
    take(of_vertex, lambda name: f"environment variable {variables[name]}")
    take(_from_environment(environment), lambda name: f"environment variable {variable_name(name)}")
    take(given, option_name)
    try:
        return ServerConfig(**values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            name = str(problem["loc"][0])
            field = ServerConfig.model_fields.get(name)
            got = f" (got {problem['input']!r})" if field is not None and field.repr else ""
            lines.append(f"{sources.get(name, name)}: {problem['msg']}{got}")
        raise OptionError("\n".join(lines)) from None


def unknown_variables(environment: Mapping[str, str]) -> Iterator[str]:
    """For each variable that looks like an option's and is none, what to say about it."""
    known = [name.upper() for name in ("config", *ServerConfig.model_fields)]
    for name in sorted(environment):
        if name.startswith(ENV_PREFIX) and (own := name.removeprefix(ENV_PREFIX)) not in known:
            nearest = difflib.get_close_matches(own, known, n=1)
            meant = f"; did you mean {ENV_PREFIX}{nearest[0]}?" if nearest else ""
            yield f"the environment variable {name} is no option's, and is ignored{meant}"


def is_loopback(host: str) -> bool:
    """Whether a server that listens on `host` is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_yaml(text: str, where: str) -> Any:
    """Raises OptionError that begins with `where`, and says nothing of the text: it may hold keys."""
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    except Exception:  # a scalar is made by int() or datetime, whose errors are their own
        at = ""
    raise OptionError(f"{where}: not valid YAML{at}")


def option_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def variable_name(field_name: str) -> str:
    return ENV_PREFIX + field_name.upper()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gemma-server serve", argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "--config", metavar="FILE", help=f"YAML file with options as keys. [env {variable_name('config')}]"
    )
    for name, field in ServerConfig.model_fields.items():
        default = "" if field.default in (None, []) else f" Default: {field.default}."
        text = f"{field.description}{default} [env {variable_name(name)}]".replace("%", "%%")
        if field.annotation in (bool, bool | None):
            parser.add_argument(option_name(name), action=argparse.BooleanOptionalAction, help=text)
        elif _is_list(field):
            parser.add_argument(option_name(name), nargs="+", action="extend", metavar="VALUE", help=text)
        else:
            parser.add_argument(option_name(name), metavar=_metavar(field), help=text)
    return parser


def _is_list(field: FieldInfo) -> bool:
    return typing.get_origin(field.annotation) is list


def _metavar(field: FieldInfo) -> str:
    annotation = field.annotation
    if isinstance(annotation, types.UnionType):
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is Literal:
        return "{" + ",".join(typing.get_args(annotation)) + "}"
    return {int: "N", float: "X"}.get(typing.cast(type, annotation), "VALUE")


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in ServerConfig.model_fields.items():
        value = environment.get(variable_name(name))
        if value is not None:
            found[name] = value.split(",") if _is_list(field) else value
    return found


def _from_file(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--config {path}: {error}") from None
    content = parse_yaml(text, f"--config {path}")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise OptionError(f"--config {path}: expected options as keys, found a {type(content).__name__}")
    return {str(key).replace("-", "_"): value for key, value in content.items()}
