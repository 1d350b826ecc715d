"""Asks a container, or an endpoint of Vertex AI, for each kind of body that the predict route takes.

    python deploy/vertex/smoke.py --url http://127.0.0.1:8080 --predict-route /predict --health-route /readyz
    python deploy/vertex/smoke.py --endpoint projects/P/locations/us-central1/endpoints/E

Prints a line for each check; the exit code is 1 if one fails. An endpoint needs google-cloud-aiplatform, a
container nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from collections.abc import Callable, Iterable
from typing import Any

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
    given = parser.parse_args(arguments)
    if given.url is None:
        return run(endpoint_post(given.endpoint))
    with urllib.request.urlopen(given.url + given.health_route, timeout=10) as answer:
        print(f"{'ok' if answer.status == 200 else 'FAILED':8}{given.health_route}")
    return run(container_post(given.url + given.predict_route))


def run(post: Post) -> int:
    failed = 0
    for name, body, passes in checks():
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


def _predictions(raw: bytes) -> Any:
    return json.loads(raw)["predictions"]


def _is_two_texts(raw: bytes) -> bool:
    return [type(text) for text in _predictions(raw)] == [str, str]


def _is_stream(raw: bytes) -> bool:
    data = [line[6:] for line in raw.decode().splitlines() if line.startswith("data: ")]
    return len(data) > 1 and data[-1] == "[DONE]" and all(json.loads(chunk) for chunk in data[:-1])


def container_post(url: str) -> Post:
    def post(body: dict[str, Any]) -> bytes:
        data = json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            return bytes(answer.read())

    return post


def endpoint_post(name: str) -> Post:
    from google.cloud import aiplatform

    _, project, _, location, _, _ = name.split("/")
    aiplatform.init(project=project, location=location)
    endpoint = aiplatform.Endpoint(name)
    headers = {"Content-Type": "application/json"}
    is_dedicated = bool(endpoint.gca_resource.dedicated_endpoint_enabled)

    def post(body: dict[str, Any]) -> bytes:
        data = json.dumps(body).encode()
        if body.get("stream"):
            lines = endpoint.stream_raw_predict(data, headers, use_dedicated_endpoint=is_dedicated)
            return b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
        return bytes(endpoint.raw_predict(data, headers, use_dedicated_endpoint=is_dedicated).content)

    return post


if __name__ == "__main__":
    sys.exit(main())
