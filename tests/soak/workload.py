"""What the soak test asks for: requests of all lengths and kinds, some of them wrong, too long or abandoned."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.tiny_checkpoint import CONTEXT

SHARE_ABANDONED = 0.05
SHARE_INVALID = 0.02
SHARE_TOO_LONG = 0.01
SHARE_CANARY = 0.02
"""The same greedy request again and again, which must say the same thing every time."""

_LETTERS = "abcdefghijklmnopqrstuvwxyz     é日"
_CANARY = {"prompt": "the canary", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
_REGEXES = ["[a-z]{3,20}", "(yes|no|maybe)", "[a-f]+ [g-z]{2}"]

_INVALID: list[dict[str, Any]] = [
    {"prompt": "a", "temperature": -1},
    {"prompt": "a", "top_p": 1.5},
    {"prompt": "a", "n": 10**6},
    {"prompt": "a", "max_tokens": "many"},
    {"prompt": [10**6]},
    {"prompt": "a", "logit_bias": {"999999": 1}},
    {"prompt": "a", "stop": ["a"] * 100},
    {"prompt": "a", "guided_regex": "(" * 50},
    {"prompt": "a", "guided_json": {"type": "nonsense"}},
    {"prompt": "\ud800"},
    {},
]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, and what becomes of it."""

    path: str
    body: dict[str, Any]
    status: int = 200
    code: str | None = None
    """Of the error that must be answered, where one is expected."""
    leaves_after_seconds: float | None = None
    leaves_after_chunks: int | None = None
    is_canary: bool = False

    @property
    def content(self) -> bytes:
        return json.dumps(self.body).encode()


def workload(seed: int) -> Iterator[Ask]:
    """An endless one; the same for the same seed."""
    chance = random.Random(seed)
    prefixes = [_text(chance, 120) for _ in range(100)]
    while True:
        drawn = chance.random()
        if (drawn := drawn - SHARE_INVALID) < 0:
            yield Ask("/v1/completions", chance.choice(_INVALID), status=400)
        elif (drawn := drawn - SHARE_TOO_LONG) < 0:
            too_long = {"prompt": _text(chance, chance.choice([2 * CONTEXT + 1, 4000, 40_000]))}
            yield Ask("/v1/completions", too_long, status=400, code="context_length_exceeded")
        elif (drawn := drawn - SHARE_CANARY) < 0:
            yield Ask("/v1/completions", _CANARY, is_canary=True)
        else:
            path, body = _valid(chance, prefixes)
            seconds = chunks = None
            if drawn < SHARE_ABANDONED:
                if chance.random() < 0.5:
                    seconds = chance.random() ** 2 * 0.3
                else:
                    body["stream"] = True
                    chunks = chance.randrange(8)
            yield Ask(path, body, leaves_after_seconds=seconds, leaves_after_chunks=chunks)


def _valid(chance: random.Random, prefixes: list[str]) -> tuple[str, dict[str, Any]]:
    text = _text(chance, _length(chance, 1, 200))
    if chance.random() < 0.4:
        text = chance.choice(prefixes) + text
    body: dict[str, Any] = {
        "max_tokens": _length(chance, 1, 80),
        "stream": chance.random() < 0.5,
        "temperature": chance.choice([0, 0, 0.7, 1.0]),
        "seed": chance.randrange(1000),
        "ignore_eos": chance.random() < 0.5,
    }
    for share, options in (
        (0.1, {"n": 2}),
        (0.1, {"stop": ["e", "xyz"]}),
        (0.1, {"top_p": 0.9, "top_k": 20}),
        (0.1, {"frequency_penalty": 0.5, "repetition_penalty": 1.1}),
        (0.05, {"min_tokens": body["max_tokens"]}),
        (0.03, {"guided_regex": chance.choice(_REGEXES), "ignore_eos": False}),
        (0.03, {"priority": 1}),
    ):
        if chance.random() < share:
            body |= options
    if chance.random() < 0.5:
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}
    if chance.random() < 0.1:
        body["logprobs"] = 3
    return "/v1/completions", body | {"prompt": text}


def _text(chance: random.Random, length: int) -> str:
    return "".join(chance.choices(_LETTERS, k=length))


def _length(chance: random.Random, shortest: int, longest: int) -> int:
    """Short ones are common, long ones are not rare."""
    return round(shortest * (longest / shortest) ** chance.random())
