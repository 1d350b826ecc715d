"""The bodies of answers, and the one place where they become JSON.

msgspec structs, since a stream makes one for each token and this is the cheapest way there is to encode it.
"""

from __future__ import annotations

import time
import uuid
from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType
from starlette.responses import Response

from server import __version__
from server.frontend.records import UsageCounts

SYSTEM_FINGERPRINT = f"gemma-server-{__version__}"

_encoder = msgspec.json.Encoder()


def encode(body: object) -> bytes:
    return _encoder.encode(body)


def json_response(body: object, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode(body), status, headers, media_type="application/json")


class Head(Struct, frozen=True):
    """What all parts of one answer have in common."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, prefix: str, model: str) -> Head:
        return cls(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model)


# --- common ------------------------------------------------------------------------------------------------


class PromptTokensDetails(Struct):
    cached_tokens: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, counts: UsageCounts) -> Usage:
        return cls(
            prompt_tokens=counts.prompt_tokens,
            completion_tokens=counts.completion_tokens,
            total_tokens=counts.prompt_tokens + counts.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(counts.cached_tokens),
        )


class PromptLogprob(Struct):
    logprob: float
    rank: int | None
    """1 is the likeliest."""
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""By token id, for each token of the prompt; None for the first."""


# --- chat completions --------------------------------------------------------------------------------------


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[ChatTokenLogprob]
    refusal: None = None


class FunctionCallPart(Struct):
    arguments: str | UnsetType = UNSET
    name: str | UnsetType = UNSET


class ChatToolCall(Struct):
    """A call or, in a stream and with its index, what it gained."""

    function: FunctionCallPart
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    index: int | UnsetType = UNSET


class AssistantMessage(Struct):
    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[ChatToolCall] | UnsetType = UNSET


class ChatChoice(Struct):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: str | int | None
    """The stop string or token of the request that ended the choice."""
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    object: Literal["chat.completion"] = "chat.completion"
    system_fingerprint: str = SYSTEM_FINGERPRINT


class ChatDelta(Struct):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ChatToolCall] | UnsetType = UNSET


class ChatChunkChoice(Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    """In the first chunk."""
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    system_fingerprint: str = SYSTEM_FINGERPRINT


# --- completions -------------------------------------------------------------------------------------------


class CompletionLogprobs(Struct):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    """In a stream, in the choice's first chunk."""
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(Struct):
    """The whole answer, or a chunk of it."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["text_completion"] = "text_completion"
    system_fingerprint: str = SYSTEM_FINGERPRINT


# --- models and tokens -------------------------------------------------------------------------------------


class Model(Struct):
    id: str
    created: int
    root: str
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "gemma-server"
    parent: None = None
    permission: list[None] = []


class ModelList(Struct):
    data: list[Model]
    object: Literal["list"] = "list"


class Tokens(Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(Struct):
    prompt: str


class Version(Struct):
    version: str


class Progress(Struct):
    """What a probe answers."""

    status: str
    stage: str | UnsetType = UNSET
    fraction: float | UnsetType = UNSET
    downloaded_bytes: int | UnsetType = UNSET
    download_bytes: int | UnsetType = UNSET
    """Of which those are a part."""
