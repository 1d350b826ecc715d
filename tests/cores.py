"""Runs an engine's core, without a process around it."""

from __future__ import annotations

from typing import Any

from server.engine.core import EngineCore
from server.engine.types import GenerateRequest, SamplingParams


def generated(core: EngineCore, prompt_token_ids: list[int], **params: Any) -> list[int]:
    """What one sequence gets. params: as `SamplingParams` takes them."""
    request = GenerateRequest(
        request_id="r", prompt_token_ids=prompt_token_ids, params=SamplingParams(**params)
    )
    core.add(request)
    tokens: list[int] = []
    while core.has_work():
        tokens += [token for output in core.step().outputs for token in output.token_ids]
    return tokens
