"""Vertex AI's contract for containers: a health route and a predict route, at paths that the platform chooses.

The predict route takes three kinds of bodies:

- {"instances": [...], "parameters": {...}}, answered with {"predictions": [...]}, one for each instance. An
  instance is a conversation (`messages`), a prompt (`prompt`, `inputs` or a string); parameters are for those
  that do not have their own. All run in the engine at once.
- the body of a chat completion or of a completion, answered as those routes do, streams included: what Vertex
  calls rawPredict and streamRawPredict.
- either with "@requestFormat": "chatCompletions", as Model Garden's clients send it: alone among the
  instances, such a conversation gets its chat completion as the value of `predictions`, not as an item of it.

Everything is answered by the routes of the OpenAI API: this only takes bodies apart and puts answers together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import Raw, Struct
from pydantic import Field
from starlette.types import Receive, Scope, Send

from server.api.body import read_as
from server.api.field_types import WireModel
from server.api.health import add_probe, readyz
from server.api.ignored_fields import HEADER
from server.api.inner import InnerAnswer, InnerRoutes
from server.api.openapi import body_of
from server.api.protocol import ChatCompletionRequest, CompletionRequest
from server.api.responses import ChatCompletion, ChatCompletionChunk, Completion, encode, json_response
from server.api.serving import runtime_of, unless_disconnected
from server.api.terms import ENTERING, terms_of
from server.errors import InvalidRequestError, shown
from server.options import ServerConfig

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
FORMAT = "@requestFormat"
CHAT_FORMAT = "chatCompletions"

_NAMES = {
    "maxOutputTokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "topP": "top_p",
    "topK": "top_k",
    "stopSequences": "stop",
    "stop_sequences": "stop",
    "candidateCount": "n",
    "presencePenalty": "presence_penalty",
    "frequencyPenalty": "frequency_penalty",
}
"""What Vertex AI's own models and other containers call a parameter."""


def routers(config: ServerConfig) -> list[APIRouter]:
    """The routes that the configuration names."""
    router = APIRouter()
    if config.health_route is not None:
        add_probe(router, config.health_route, readyz)
    if config.predict_route is not None:
        router.post(
            config.predict_route,
            dependencies=[ENTERING],
            summary="Predict, as on Vertex AI",
            openapi_extra=_BODY,
        )(predict)
    return [router]


class PredictRequest(WireModel):
    """For the OpenAPI document: what is wrong with an instance is to be said of that instance."""

    instances: list[str | dict[str, Any]] = Field(
        min_length=1,
        description="A prompt, or an object with `prompt`, `inputs` or `messages` and with the fields of a"
        " completion or a chat completion. Required.",
    )
    parameters: dict[str, Any] | None = Field(
        None, description="Fields of all instances that do not have their own. Default: none."
    )
    request_format: Literal["chatCompletions"] | None = Field(
        None,
        alias="@requestFormat",
        description="Take all instances for conversations. Default: those with `messages`.",
    )


class Predictions(Struct):
    predictions: Any
    """Of each instance: the text of a prompt or a list of them, the chat completion of a conversation."""


_BODY = body_of(
    PredictRequest,
    ChatCompletionRequest,
    CompletionRequest,
    answer=(Predictions, ChatCompletion, Completion),
    stream=(ChatCompletionChunk, Completion),
)


async def predict(request: Request) -> Response:
    body = await read_as(request, runtime_of(request).config.max_body_bytes, lambda value: value)
    routes: InnerRoutes = request.app.state.routes
    if "instances" not in body:
        call = _bare_call(body)
        return _Forwarded(routes, call.url, encode(call.body), request)
    calls = _instance_calls(body)
    terms_of(request).admission.check_count(sum(map(_num_sequences, calls)))
    answers = await unless_disconnected(request, _answer_all(calls, routes, request))
    if isinstance(answers, InnerAnswer):
        return Response(bytes(answers.body), answers.status, _headers(answers), media_type="application/json")
    predictions: Any = [call.prediction(answer) for call, answer in zip(calls, answers, strict=True)]
    if len(calls) == 1 and calls[0].is_format_named:
        predictions = predictions[0]
    ignored = {name for answer in answers for name in answer.headers.get(_IGNORED, b"").split(b", ") if name}
    headers = {HEADER: b", ".join(sorted(ignored)).decode("latin-1")} if ignored else None
    return json_response(Predictions(predictions), headers=headers)


@dataclass(frozen=True, slots=True)
class _Call:
    """What to ask one of the API's routes."""

    url: str
    body: dict[str, Any]
    is_format_named: bool = False
    begins_with: str | None = None
    """What precedes the text, where a client asked for Model Garden's form of it."""

    def prediction(self, answer: InnerAnswer) -> Any:
        """Of a conversation the chat completion, of a prompt the text, or a list if `n` asked for several."""
        if self.url == CHAT:
            return Raw(bytes(answer.body))
        choices = _completions.decode(answer.body).choices
        texts = [(self.begins_with or "") + choice.text for choice in choices]
        return texts[0] if len(texts) == 1 else texts


def _num_sequences(call: _Call) -> int:
    """What an instance asks for; what is no number its route will refuse."""
    counts = [call.body.get(name) for name in ("n", "best_of")]
    return max([1, *(count for count in counts if isinstance(count, int))])


class _Choice(Struct):
    text: str


class _Completion(Struct):
    choices: list[_Choice]


_completions = msgspec.json.Decoder(_Completion)
_errors = msgspec.json.Decoder()
_IGNORED = HEADER.encode()


def _bare_call(body: dict[str, Any]) -> _Call:
    """Raises InvalidRequestError."""
    body = dict(body)
    is_chat = _take_format(body, FORMAT) or "messages" in body
    if not is_chat and "prompt" not in body:
        raise InvalidRequestError(
            "The body must have 'instances', 'messages' or 'prompt'.",
            param="instances",
            code="missing_required_parameter",
        )
    return _Call(CHAT if is_chat else COMPLETIONS, body)


def _instance_calls(body: dict[str, Any]) -> list[_Call]:
    """Raises InvalidRequestError."""
    instances, parameters = body["instances"], _parameters(body, "parameters")
    if not isinstance(instances, list) or not instances:
        raise InvalidRequestError("'instances' must be a list that is not empty.", param="instances")
    for name in body.keys() - {"instances", "parameters", FORMAT}:
        raise InvalidRequestError(
            f"{shown(name)} is not known beside 'instances': put it into 'parameters'.", param=name
        )
    is_chat = _take_format(dict(body), FORMAT)
    return [
        _instance_call(instance, _renamed(parameters, "parameters"), is_chat, f"instances[{index}]")
        for index, instance in enumerate(instances)
    ]


def _instance_call(instance: Any, defaults: dict[str, Any], is_chat: bool, param: str) -> _Call:
    if isinstance(instance, str):
        instance = {"prompt": instance}
    if not isinstance(instance, dict):
        raise InvalidRequestError(f"'{param}' must be an object or a string.", param=param)
    own = dict(instance)
    # Hugging Face's containers have parameters in each instance.
    parameters = _parameters(own, f"{param}.parameters")
    own.pop("parameters", None)
    fields = {**defaults, **_renamed(parameters, f"{param}.parameters"), **_renamed(own, param)}
    is_format_named = _take_format(fields, f"{param}.{FORMAT}")
    if fields.pop("stream", None):
        raise InvalidRequestError(
            "'stream' is not possible with 'instances': send the body of a chat completion.", param="stream"
        )
    is_raw = fields.pop("raw_response", True)
    if not isinstance(is_raw, bool):
        raise InvalidRequestError("'raw_response' must be true or false.", param=f"{param}.raw_response")
    if is_format_named or is_chat or "messages" in fields:
        return _Call(CHAT, fields, is_format_named)
    if "inputs" in fields:
        if "prompt" in fields:
            raise InvalidRequestError(f"'{param}' has both 'prompt' and 'inputs'.", param=f"{param}.inputs")
        fields["prompt"] = fields.pop("inputs")
    prompt = fields.get("prompt")
    if not isinstance(prompt, str):
        raise InvalidRequestError(
            f"'{param}' must have 'messages', or 'prompt' with a string.", param=f"{param}.prompt"
        )
    return _Call(COMPLETIONS, fields, begins_with=None if is_raw else f"Prompt:\n{prompt}\nOutput:\n")


def _parameters(fields: dict[str, Any], param: str) -> dict[str, Any]:
    """Raises InvalidRequestError."""
    parameters = fields.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise InvalidRequestError(f"'{param}' must be an object.", param=param)
    return parameters


def _take_format(fields: dict[str, Any], param: str) -> bool:
    """Whether the format is named, and out it goes. Raises InvalidRequestError for any but the one there is."""
    value = fields.pop(FORMAT, None)
    if value is not None and value != CHAT_FORMAT:
        raise InvalidRequestError(f"'{FORMAT}' must be '{CHAT_FORMAT}', got {shown(value)}.", param=param)
    return value is not None


def _renamed(fields: dict[str, Any], param: str) -> dict[str, Any]:
    """With the API's own names. Raises InvalidRequestError if one is there under two."""
    renamed: dict[str, Any] = {}
    for name, value in fields.items():
        own = _NAMES.get(name, name)
        if own in renamed:
            raise InvalidRequestError(
                f"'{param}' has '{own}' under two names, one of which is '{name}'.", param=f"{param}.{name}"
            )
        renamed[own] = value
    return renamed


async def _answer_all(
    calls: Sequence[_Call], routes: InnerRoutes, request: Request
) -> list[InnerAnswer] | InnerAnswer:
    """The answers, in order; or the first that is an error, which ends the others."""

    async def answer(index: int, call: _Call) -> InnerAnswer:
        answer = await routes.answer(call.url, encode(call.body), dict(request.scope["state"]))
        if answer.status != 200:
            raise _FailedInstanceError(_at_instance(answer, index))
        return answer

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(answer(index, call)) for index, call in enumerate(calls)]
    except* _FailedInstanceError as failures:
        first = failures.exceptions[0]
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        assert isinstance(first, _FailedInstanceError)
        failed = first.answer
    else:
        return [task.result() for task in tasks]
    return failed


class _FailedInstanceError(Exception):
    def __init__(self, answer: InnerAnswer) -> None:
        super().__init__()
        self.answer = answer


def _at_instance(answer: InnerAnswer, index: int) -> InnerAnswer:
    """The error, of which the client learns whose it is if it is a mistake of the request."""
    if answer.status not in (400, 404):
        return answer
    body = _errors.decode(answer.body)
    param = body["error"]["param"]
    body["error"]["param"] = f"instances[{index}]" + (f".{param}" if param else "")
    answer.body = bytearray(encode(body))
    return answer


def _headers(answer: InnerAnswer) -> dict[str, str]:
    own = (b"content-length", b"content-type")
    return {name.decode(): value.decode("latin-1") for name, value in answer.headers.items() if name not in own}


class _Forwarded(Response):
    """What a route answers, piece by piece; the client's leaving reaches it, too."""

    def __init__(self, routes: InnerRoutes, url: str, body: bytes, request: Request) -> None:
        super().__init__()
        self._routes = routes
        self._url = url
        self._json = body
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The request's: its body was read, so that the client's leaving is what comes next.
        await self._routes.forward(self._url, self._json, scope["state"], self._request.receive, send)
