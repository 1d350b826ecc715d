"""Prompts whose length in tokens is known.

A prompt is `<bos>` and words that the model's tokenizer keeps whole behind a space. Where the server can
tokenize, each word is checked against it; elsewhere the words are common enough to be single tokens in any
large vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import httpx

_TEXT = """
able about above account across action after again age air all almost along also always among animal
answer area arm around art ask away back bad ball bank base bed before behind best better between
big bird bit black blood blue board boat body book both bottom box boy bring brother brown build
business call came car care carry case cause center certain chance change child church city class
clear close cold color come common company control cool corner cost could country course cover cross
cry cut dark data day deal death deep did different dinner door down draw dream drive dry early
earth east easy eat end energy engine enough even evening ever every eye face fact fall family far
farm fast father feel few field fight figure fill final find fine fire first fish five floor fly
follow food foot force form forward found four free friend from front full game garden gas girl give
glass gold good great green ground group grow hair half hall hand happy hard head hear heart heavy
help high hill history home horse hot hour house human idea island job just keep key kind king land
large last late law lead learn leave left less letter level life light line list little live local
long look lot love low
"""

COMMON_WORDS = tuple(_TEXT.split())


async def single_token_words(client: httpx.AsyncClient, model: str) -> tuple[str, ...]:
    """The common words that the server tokenizes to one token each, or all of them if it cannot tokenize.

    Uses `/tokenize` as vLLM has it, whose address lies beside `/v1`, not below it.
    """
    text = "".join(f" {word}" for word in COMMON_WORDS)
    if await _count(client, model, text) == len(COMMON_WORDS):
        return COMMON_WORDS
    counts = [(word, await _count(client, model, f" {word}")) for word in COMMON_WORDS]
    if all(count is None for _, count in counts):
        return COMMON_WORDS
    return tuple(word for word, count in counts if count == 1)


async def _count(client: httpx.AsyncClient, model: str, text: str) -> int | None:
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    try:
        response = await client.post("/tokenize", json=body)
        return int(response.json()["count"]) if response.status_code == 200 else None
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None


def make_prompts(
    words: Sequence[str], count: int, num_tokens: int, seed: int, shared_prefix: int = 0
) -> list[str]:
    """`count` prompts of `num_tokens` tokens each, `<bos>` included; the same for the same seed.

    The first `shared_prefix` words are common to all prompts; behind them, chance decides.
    """
    if not 0 <= shared_prefix < num_tokens:
        raise ValueError(
            f"shared_prefix must be between 0 and num_tokens - 1 = {num_tokens - 1}, not {shared_prefix}"
        )
    rng = random.Random(seed)
    prefix = rng.choices(words, k=shared_prefix)
    own = num_tokens - 1 - shared_prefix
    return ["".join(f" {word}" for word in prefix + rng.choices(words, k=own)) for _ in range(count)]
