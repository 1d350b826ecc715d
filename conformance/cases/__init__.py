"""All cases, by group."""

from __future__ import annotations

from conformance.case import Case
from conformance.cases import (
    batches,
    chat,
    completions,
    errors,
    limits,
    logprobs,
    messages,
    models,
    responses,
    sampling,
    stopping,
    streaming,
    structured,
    tokens,
    tools,
)

_MODULES = (
    models,
    chat,
    streaming,
    completions,
    sampling,
    stopping,
    logprobs,
    structured,
    tools,
    tokens,
    errors,
    limits,
    responses,
    messages,
    batches,
)


def all_cases() -> list[Case]:
    return [case for module in _MODULES for case in module.GROUP.cases]
