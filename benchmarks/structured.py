"""`make bench-structured`: what it costs to hold output to a JSON schema.

Serves a model on a free port and loads it with and without a schema, in turns, at concurrency 1 and 16; then
times the compiling of a schema of 200 lines. Guesses from repeated text are off, since JSON repeats itself and
they would flatter it. Options that this module does not know go to the server.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx

from benchmarks.load import LoadSettings, first_model, run_load
from benchmarks.machine import describe_machine
from benchmarks.output import run_to_file
from benchmarks.serve import serving

_ROUNDS = 3
_COLUMNS = "{:>12} {:>16} {:>14} {:>7}"


def endless_schema() -> dict[str, Any]:
    """A list of people that no output of a benchmark completes."""
    person = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 30},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "role": {"enum": ["engineer", "teacher", "doctor", "artist"]},
            "tags": {
                "type": "array",
                "items": {"type": "string", "maxLength": 20},
                "minItems": 1,
                "maxItems": 4,
            },
        },
        "required": ["name", "age", "role", "tags"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": person, "minItems": 500}


def schema_of_lines(lines: int) -> dict[str, Any]:
    """A schema that has at least so many lines where it is written with an indent."""
    properties: dict[str, Any] = {}
    schema = {"type": "object", "properties": properties, "required": [], "additionalProperties": False}
    kinds: list[dict[str, Any]] = [
        {"type": "string", "minLength": 1, "maxLength": 40},
        {"type": "integer", "minimum": 0, "maximum": 100_000},
        {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
        {"enum": ["red", "green", "blue"]},
        {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 8},
        {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]},
        {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}, "required": ["x"]},
    ]
    while len(json.dumps(schema, indent=2).splitlines()) < lines:
        properties[f"field_{len(properties)}"] = kinds[len(properties) % len(kinds)]
    schema["required"] = list(properties)[::2]
    return schema


async def _throughput(url: str, model: str, concurrency: int, number: int, with_schema: bool) -> float:
    fields: dict[str, Any] = {}
    if with_schema:
        schema = {"name": "people", "schema": endless_schema()}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    report = await run_load(
        LoadSettings(
            url=url,
            model=model,
            concurrency=concurrency,
            requests=max(4, 2 * concurrency),
            prompt_tokens=64,
            output_tokens=128,
            temperature=1.0,
            seed=number,
            fields=(fields,),
        )
    )
    if report.errors:
        raise RuntimeError(f"{report.errors} requests failed: {report.first_errors[0]}")
    return report.output_tokens_per_second


async def _compile_seconds(url: str, model: str) -> list[float]:
    """From a request to its one token, with a schema that the server sees for the first time; then again."""
    seconds = []
    schema = schema_of_lines(200) | {"title": f"made at {time.time()}"}
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        for body in ({}, {"guided_json": schema}, {"guided_json": schema}):
            started = time.perf_counter()
            answer = await client.post(
                "/v1/completions", json={"model": model, "prompt": "JSON:", "max_tokens": 1, **body}
            )
            answer.raise_for_status()
            seconds.append(time.perf_counter() - started)
    return seconds


async def _measure(url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    model = await first_model(url)
    result: dict[str, Any] = {"machine": describe_machine(), "tokens_per_second": {}}
    print(_COLUMNS.format("concurrency", "unconstrained", "JSON schema", "share"))
    for concurrency in arguments.concurrency:
        # The first round warms both up, the grammar's vocabulary included, and does not count.
        rounds = [
            [await _throughput(url, model, concurrency, number, with_schema) for with_schema in (False, True)]
            for number in range(1 + _ROUNDS)
        ][1:]
        free, held = (sum(column) / _ROUNDS for column in zip(*rounds, strict=True))
        result["tokens_per_second"][concurrency] = {"unconstrained": free, "schema": held, "rounds": rounds}
        print(_COLUMNS.format(concurrency, f"{free:.1f} tok/s", f"{held:.1f} tok/s", f"{held / free:.3f}"))
    plain, first, second = await _compile_seconds(url, model)
    result["schema_of_200_lines_ms"] = {"none": 1e3 * plain, "first": 1e3 * first, "again": 1e3 * second}
    print(
        f"one token without a schema {1e3 * plain:.0f} ms; with a new schema of 200 lines {1e3 * first:.0f} ms,"
        f" again {1e3 * second:.0f} ms"
    )
    return result


async def _serve_and_measure(server_options: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    async with serving(["--speculative-ngram-tokens", "0", *server_options]) as url:
        return await _measure(url, arguments)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-structured", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16])
    arguments, server_options = parser.parse_known_args()
    return run_to_file("structured", _serve_and_measure(server_options, arguments))


if __name__ == "__main__":
    sys.exit(main())
