"""What becomes of body fields that the server does not act on: each is refused or named, never just dropped.

- A field that would change the answer's meaning is refused, unless its value asks for nothing.
- OpenAI's and vLLM's fields that change nothing here are accepted, and named; so are unknown fields.
- In strict mode whatever would be named is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from urllib.parse import quote

from pydantic import BaseModel

from server.errors import InvalidRequestError, shown

logger = logging.getLogger(__name__)

HEADER = "x-ignored-fields"
MOST_NAMED = 32
LONGEST_NAME = 64

_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    # field: values beside null that ask for nothing
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "tool_calls": ([],),
    "structural_tag": (),
    "guided_whitespace_pattern": (),
    "whitespace_pattern": (),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "grammar": (),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "prompt_embeds": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "use_beam_search": (False,),
    "logit_processors": ([],),
    "stop_regex": (),
    "lora": ([],),
    "lora_path": (),
    "lora_request": (),
    "mcp_servers": ([],),
    "container": (),
    "output_config": ({},),
    "output_format": (),
}
"""A field that a request class declares is never looked up here: `suffix` of a completion is its own."""

_HINTS = {
    "functions": "; use 'tools'",
    "function_call": "; use 'tool_choice' and, in a message, 'tool_calls'",
}

_INERT = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "prediction",
        "reasoning_effort",
        "verbosity",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "moderation",
        "name",
        "refusal",
        "annotations",
        "include_obfuscation",
        "request_id",
        "stream_interval",
        "spaces_between_special_tokens",
        "detokenize",
        "length_penalty",
        "early_stopping",
        "include_reasoning",
        "cache_control",
        "citations",
        "thinking",
        "reasoning",
        "status",
        "max_tool_calls",
        "context_management",
    }
)


def ignored_fields(body: BaseModel, *, strict: bool) -> list[str]:
    """The fields of `body` that have no effect, sorted, once each; `messages[].name` stands for any message's.

    Raises InvalidRequestError for a field that would change the answer and, if `strict`, for any of no effect.
    """
    found = set()
    for path, name, value in _extra_fields(body, ""):
        if name in _UNSUPPORTED:
            if value is not None and value not in _UNSUPPORTED[name]:
                raise InvalidRequestError(
                    f"'{path}' is not supported by this server (got {shown(value)}){_HINTS.get(name, '')}.",
                    param=path,
                    code="unsupported_parameter",
                )
        elif name not in _INERT:
            if strict:
                raise InvalidRequestError(
                    f"'{path}' is not a known field.", param=path, code="unknown_parameter"
                )
            found.add(path)
        elif value is not None:
            if strict:
                raise InvalidRequestError(
                    f"'{path}' has no effect on this server.", param=path, code="unsupported_parameter"
                )
            found.add(path)
    if found:
        logger.info("ignored fields: %s", header_value(found))
    return sorted(found)


def header_value(names: Iterable[str]) -> str:
    """`names` in a form that is safe in a header and in a log, whatever the client called its fields."""
    names = sorted(names)
    safe = [quote(name[:LONGEST_NAME], safe="[]._-", errors="replace") for name in names[:MOST_NAMED]]
    return ", ".join(safe) + (f", and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")


def add_to_header(headers: dict[str, str], names: Iterable[str]) -> None:
    """Name more fields that have not all the effect they ask for."""
    named = [headers[HEADER]] if HEADER in headers else []
    if more := header_value(names):
        headers[HEADER] = ", ".join([*named, more])


def _extra_fields(body: BaseModel, prefix: str) -> Iterator[tuple[str, str, object]]:
    """(path, name, value) of each undeclared field of `body` and of the objects in it."""
    for name, value in (body.model_extra or {}).items():
        yield prefix + name[: 2 * LONGEST_NAME], name, value
    for name in type(body).model_fields:
        value = getattr(body, name)
        if isinstance(value, BaseModel):
            yield from _extra_fields(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            for item in value:
                if not isinstance(item, BaseModel):
                    break
                yield from _extra_fields(item, f"{prefix}{name}[].")
