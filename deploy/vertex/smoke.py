"""Asks a container, or an endpoint of Vertex AI, for each kind of body that the predict route takes.

    python deploy/vertex/smoke.py --url http://127.0.0.1:8080 --predict-route /predict --health-route /readyz
    python deploy/vertex/smoke.py --endpoint projects/P/locations/us-central1/endpoints/E

Prints a line for each check; the exit code is 1 if one fails, or if nobody answers. An endpoint needs
google-cloud-aiplatform, a container nothing but Python.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from typing import Any

KEY_VARIABLE = "GEMMA_SERVER_API_KEY"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Name a river."}]
FEW = {"max_tokens": 8, "temperature": 0}
Post = Callable[[dict[str, Any]], bytes]
Check = tuple[str, dict[str, Any], Callable[[bytes], bool]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="of a container")
    where.add_argument("--endpoint", help="resource name of an endpoint")
    parser.add_argument("--predict-route", default="/predict")
    parser.add_argument("--health-route", default="/readyz")
    parser.add_argument("--api-key", help=f"of a container that asks for one. [env {KEY_VARIABLE}]")
    parser.add_argument("--invoke", action="store_true", help="the endpoint was deployed with --invoke")
    given = parser.parse_args(arguments)
    if given.endpoint is None:
        if given.invoke:
            parser.error("--invoke is for an endpoint")
        return _try_container(given)
    if given.api_key is not None:
        parser.error("--api-key is for a container: at an endpoint IAM's token is in the same header")
    if not re.fullmatch("projects/[^/]+/locations/[^/]+/endpoints/[^/]+", given.endpoint):
        parser.error("--endpoint takes projects/P/locations/L/endpoints/E")
    try:
        post = endpoint_post(given.endpoint, is_invoked=given.invoke)
    except Exception as error:  # no SDK, no credentials, no such endpoint, no network
        return _no_answer(given.endpoint, error)
    return run(post, bare_only=given.invoke)


def _try_container(given: argparse.Namespace) -> int:
    try:
        status = health_status(given.url + given.health_route)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return _no_answer(given.url, error)
    is_healthy = status == 200
    print(f"{'ok' if is_healthy else 'FAILED':8}{given.health_route}{'' if is_healthy else f': {status}'}")
    key = given.api_key or os.environ.get(KEY_VARIABLE, "").partition(",")[0]
    return max(run(container_post(given.url + given.predict_route, key)), 0 if is_healthy else 1)


def _no_answer(where: str, error: Exception) -> int:
    reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
    print(f"no answer from {where}: {reason}", file=sys.stderr)
    return 1


def health_status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def run(post: Post, *, bare_only: bool = False) -> int:
    """bare_only: leave out what the predict route alone takes."""
    failed = 0
    for name, body, passes in checks():
        if bare_only and not _is_bare(body):
            continue
        try:
            problem = "" if passes(post(body)) else "the answer has another form"
        except Exception as error:  # whatever goes wrong is this check's result
            problem = f"{type(error).__name__}: {error}"
        failed += bool(problem)
        print(f"{'FAILED' if problem else 'ok':8}{name}{': ' if problem else ''}{problem}")
    return 1 if failed else 0


def checks() -> Iterable[Check]:
    prompt, chat = {"prompt": "A river is", **FEW}, {"messages": MESSAGES, **FEW}
    named = {"@requestFormat": "chatCompletions", **chat}
    yield "instances: prompts", {"instances": [prompt, "A river is"], "parameters": FEW}, _is_two_texts
    yield "instances: a conversation", {"instances": [chat]}, lambda raw: _predictions(raw)[0]["choices"][0]
    yield "instances: a named format", {"instances": [named]}, lambda raw: _predictions(raw)["choices"][0]
    yield "a completion", prompt, lambda raw: "text" in json.loads(raw)["choices"][0]
    yield "a chat completion", chat, lambda raw: json.loads(raw)["choices"][0]["message"]
    yield "a named format", named, lambda raw: json.loads(raw)["choices"][0]["message"]
    for name, body in (("a completion", prompt), ("a chat completion", chat), ("a named format", named)):
        yield f"{name}, streamed", {**body, "stream": True}, _is_stream


def _is_bare(body: dict[str, Any]) -> bool:
    return not body.keys() & {"instances", "@requestFormat"}


def _predictions(raw: bytes) -> Any:
    return json.loads(raw)["predictions"]


def _is_two_texts(raw: bytes) -> bool:
    return [type(text) for text in _predictions(raw)] == [str, str]


def _is_stream(raw: bytes) -> bool:
    data = [line[6:] for line in raw.decode().splitlines() if line.startswith("data: ")]
    return len(data) > 1 and data[-1] == "[DONE]" and all(json.loads(chunk) for chunk in data[:-1])


def container_post(url: str, key: str) -> Post:
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})

    def post(body: dict[str, Any]) -> bytes:
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=300) as answer:
            return bytes(answer.read())

    return post


def endpoint_post(name: str, *, is_invoked: bool) -> Post:
    from google.cloud import aiplatform

    _, project, _, location, _, _ = name.split("/")
    aiplatform.init(project=project, location=location)
    endpoint = aiplatform.Endpoint(name)
    headers = {"Content-Type": "application/json"}
    is_dedicated = bool(endpoint.gca_resource.dedicated_endpoint_enabled)

    def post(body: dict[str, Any]) -> bytes:
        data, streams = json.dumps(body).encode(), bool(body.get("stream"))
        if is_invoked:
            route = CHAT if "messages" in body else COMPLETIONS
            answer = endpoint.invoke(route, data, headers, stream=streams)
        elif streams:
            answer = endpoint.stream_raw_predict(data, headers, use_dedicated_endpoint=is_dedicated)
        else:
            answer = endpoint.raw_predict(data, headers, use_dedicated_endpoint=is_dedicated)
        if streams:
            return b"\n".join(line if isinstance(line, bytes) else line.encode() for line in answer)
        answer.raise_for_status()
        return bytes(answer.content)

    return post


if __name__ == "__main__":
    sys.exit(main())
