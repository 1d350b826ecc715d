"""How cases speak to the server under test: plain HTTP, so that nothing between hides what it sends."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import httpx

from conformance.outcome import Failed, NotOffered, expect, expect_equal, expect_keys, fail, shown

Json = Any
"""What JSON decodes to. A wrong shape raises where it is read, which `run_case` reports."""

READ_SECONDS = 60.0
COUNTING = "Count: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,"
"""Most models go on with it for as long as they are let."""
_CORE = frozenset({"model", "messages", "prompt", "input", "max_tokens", "temperature", "stream"})
"""A server that refuses one of these is no OpenAI server; any other field may be a feature that it lacks."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def json(self) -> Json:
        return parse(self.content)

    @property
    def error(self) -> Json:
        """The `error` object of a failed request in OpenAI's shape."""
        body = self.json
        expect_keys(body, "error", f"the body of a {self.status}")
        expect(isinstance(body["error"], dict), f"`error` is {shown(body['error'])}, no object")
        return body["error"]

    @property
    def excerpt(self) -> str:
        return self.content[:160].decode("utf-8", errors="replace")


@dataclass(frozen=True, slots=True)
class Stream:
    headers: Mapping[str, str]
    lines: list[str]
    """All lines of the body, empty ones too."""

    @property
    def data(self) -> list[str]:
        return [line[5:].strip() for line in self.lines if line.startswith("data:")]

    @property
    def chunks(self) -> list[Json]:
        """The JSON of every event but [DONE]."""
        expect(self.data, "the stream has no event")
        return [parse(data.encode()) for data in self.data if data != "[DONE]"]

    def choices(self, index: int = 0) -> list[Json]:
        """The parts of one choice, in order."""
        found = [choice for chunk in self.chunks for choice in chunk["choices"]]
        return [choice for choice in found if choice["index"] == index]

    def text(self, index: int = 0) -> str:
        """The text of one choice, of a chat or a completion."""
        return "".join(
            (choice["delta"].get("content") if "delta" in choice else choice["text"]) or ""
            for choice in self.choices(index)
        )

    def finish_reasons(self, index: int = 0) -> list[str]:
        reasons = [choice.get("finish_reason") for choice in self.choices(index)]
        return [reason for reason in reasons if reason is not None]


class Server:
    """The server under test. What was found out about it once is kept for the cases that follow."""

    def __init__(self, base_url: str, model: str, api_key: str | None, http: httpx.AsyncClient) -> None:
        self.root = root_of(base_url)
        self.model = model
        self.api_key = api_key
        self.http = http
        self.known: dict[str, Any] = {}

    # --- requests of any kind --------------------------------------------------------------------------

    async def get(self, path: str) -> Answer:
        return _answer(await self.http.get(self.root + path))

    async def post(self, path: str, body: Json) -> Answer:
        return _answer(await self.http.post(self.root + path, json=body))

    async def send(self, path: str, content: bytes, media_type: str | None = "application/json") -> Answer:
        headers = {"content-type": media_type} if media_type else {}
        return _answer(await self.http.post(self.root + path, content=content, headers=headers))

    async def answered_get(self, path: str) -> Json:
        answer = await self.get(path)
        if answer.status != 200:
            _not_200(answer, path, {})
        return answer.json

    async def answered(self, path: str, body: dict[str, Json]) -> Json:
        """The JSON of a 200. Raises NotOffered if the server lacks the path or a field, Failed otherwise."""
        answer = await self.post(path, body)
        if answer.status != 200:
            _not_200(answer, path, body)
        return answer.json

    async def streamed(self, path: str, body: dict[str, Json]) -> Stream:
        """As `answered`, for a stream that is read to its end."""
        async with self.http.stream("POST", self.root + path, json=body) as response:
            if response.status_code != 200:
                content = await response.aread()
                _not_200(Answer(response.status_code, response.headers, content), path, body)
            text = (await response.aread()).decode("utf-8")
            return Stream(response.headers, text.replace("\r\n", "\n").split("\n"))

    # --- the two main endpoints ------------------------------------------------------------------------

    def chat_body(self, content: Json = COUNTING, **fields: Json) -> dict[str, Json]:
        messages = [{"role": "user", "content": content}]
        return {"model": self.model, "messages": messages, "max_tokens": 16, "temperature": 0} | fields

    def completion_body(self, prompt: Json = COUNTING, **fields: Json) -> dict[str, Json]:
        return {"model": self.model, "prompt": prompt, "max_tokens": 16, "temperature": 0} | fields

    async def chat(self, content: Json = COUNTING, **fields: Json) -> Json:
        return with_choices(await self.answered("/v1/chat/completions", self.chat_body(content, **fields)))

    async def complete(self, prompt: Json = COUNTING, **fields: Json) -> Json:
        return with_choices(await self.answered("/v1/completions", self.completion_body(prompt, **fields)))

    async def stream_chat(self, content: Json = COUNTING, **fields: Json) -> Stream:
        body = self.chat_body(content, stream=True, **fields)
        return await self.streamed("/v1/chat/completions", body)

    async def stream_completion(self, prompt: Json = COUNTING, **fields: Json) -> Stream:
        return await self.streamed("/v1/completions", self.completion_body(prompt, stream=True, **fields))

    # --- what must not be accepted ---------------------------------------------------------------------

    async def refuses(self, path: str, body: Json) -> Json:
        """The error of a 400, after which the server still answers others."""
        answer = await self.post(path, body)
        await self.check_alive()
        return refusal(answer)

    async def refuses_chat(self, content: Json = COUNTING, **fields: Json) -> Json:
        return await self.refuses("/v1/chat/completions", self.chat_body(content, **fields))

    async def refuses_completion(self, prompt: Json = COUNTING, **fields: Json) -> Json:
        return await self.refuses("/v1/completions", self.completion_body(prompt, **fields))

    async def check_alive(self) -> None:
        answer = await self.post("/v1/chat/completions", self.chat_body("Hi", max_tokens=1))
        expect_equal(answer.status, 200, "the status of the next request")
        with_choices(answer.json)

    async def answers_or_refuses(self, answer: Answer) -> None:
        """`answer` is a good one or a 400, after which the server still answers others."""
        await self.check_alive()
        if answer.status == 200:
            with_choices(answer.json)
        else:
            refusal(answer)


def root_of(base_url: str) -> str:
    """The server without the `/v1` that SDKs want at the end."""
    return base_url.rstrip("/").removesuffix("/v1")


def parse(content: bytes) -> Json:
    try:
        return json.loads(content, parse_constant=_not_json)
    except ValueError as error:
        raise Failed(f"not JSON ({error}): {content[:80]!r}") from None


def with_choices(answer: Json) -> Json:
    """`answer`, if its first choice has a text or calls a tool."""
    choice = answer["choices"][0]
    if "message" not in choice:
        text = choice["text"]
    else:
        text = "" if choice["message"].get("tool_calls") else choice["message"]["content"]
    expect(isinstance(text, str), f"the text is {shown(text)}")
    return answer


def refusal(answer: Answer, status: int = 400) -> Json:
    expect_equal(answer.status, status, "the status")
    error = answer.error
    expect(isinstance(error.get("message"), str) and error["message"], "the error has no message")
    return error


def text_of(answer: Json, index: int = 0) -> str:
    """The text of one choice of a chat or a completion."""
    choice = answer["choices"][index]
    text: str | None = choice["message"]["content"] if "message" in choice else choice["text"]
    return text or ""


def _answer(response: httpx.Response) -> Answer:
    return Answer(response.status_code, response.headers, response.content)


def _not_200(answer: Answer, path: str, body: Mapping[str, Json]) -> NoReturn:
    """A route that is not there, or an error that names a field: the server says what it lacks."""
    if answer.status in (404, 405, 501):
        raise NotOffered(f"{path}: {answer.status}")
    if answer.status in (400, 422):
        error = answer.json.get("error") if isinstance(answer.json, dict) else None
        message = str(error.get("message")) if isinstance(error, dict) else answer.excerpt
        where = str(error.get("param") or "") if isinstance(error, dict) else ""
        for field in sorted(set(body) - _CORE):
            if where.split(".")[0].split("[")[0] == field or re.search(rf"\b{field}\b", message):
                raise NotOffered(f"{answer.status}: {message}")
    fail(f"{path}: {answer.status} {answer.excerpt}")


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
