"""Whatever else runs, whatever order it came in, however little memory there is: the same tokens and logprobs.

On the native back end, whose arithmetic does not depend on the batch: everything is compared bit for bit.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch

from server.engine.models.config_reader import read_hf
from server.engine.models.gemma import GemmaModel
from server.engine.types import GenerateRequest
from tests.parity.harness import CONFIGS, VOCAB, WINDOW, Engine, checkpoint, load_model, prompt, request
from tests.unit.native_backends import native_backend

BLOCK = 4
NUM_REQUESTS = 16
LENGTHS = [1 + 5 * number % (4 * WINDOW) for number in range(NUM_REQUESTS)]
NUM_GENERATED = 18
FOR_THREE = 3 * -(-(max(LENGTHS) + NUM_GENERATED) // BLOCK)
"""Blocks for three of the longest."""

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "top_p": 0.9, "top_k": 30},
    "logprobs": {"temperature": 0.7, "logprobs": 3, "logprob_token_ids": (5, 6)},
    "prompt-logprobs": {"temperature": 0.0, "prompt_logprobs": 2},
    "penalties": {
        "temperature": 0.6,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.4,
    },
    "min-tokens": {"temperature": 0.8, "min_tokens": 9, "stop_token_ids": tuple(range(0, VOCAB, 4))},
    "bad-words": {"temperature": 0.9, "bad_words": ((3,), (7, 8), (9, 10, 11)), "logit_bias": {12: 4.0}},
}


@cache
def model(name: str = "gemma2") -> GemmaModel:
    return load_model(read_hf(CONFIGS[name]), native_backend(torch.bfloat16, num_threads=1), checkpoint(name))


def requests(**params: Any) -> list[GenerateRequest]:
    return [
        request(
            prompt(length, seed=number), f"r{number}", seed=number, **({"max_tokens": NUM_GENERATED} | params)
        )
        for number, length in enumerate(LENGTHS)
    ]


def everything_said(engine: Engine, crowd: list[GenerateRequest], arrive_every: int = 0) -> dict[str, Any]:
    """Of each request: its tokens, all logprobs, and why it ended."""
    generated = engine.generate(crowd, arrive_every)
    assert set(engine.scheduler.kv_usage().values()) == {0.0}
    return {
        one.request_id: (
            tokens,
            engine.logprobs[one.request_id],
            engine.prompt_logprobs.get(one.request_id),
            engine.finish_reasons[one.request_id],
        )
        for one, tokens in zip(crowd, generated, strict=True)
    }


def alone(crowd: list[GenerateRequest], name: str = "gemma2") -> dict[str, Any]:
    return {k: v for one in crowd for k, v in everything_said(Engine(model(name)), [one]).items()}


@pytest.mark.covers("K01", "K02")
@pytest.mark.parametrize("params", SAMPLING.values(), ids=SAMPLING)
def test_memory_for_3_of_16_changes_nothing_that_is_said(params: dict[str, Any]) -> None:
    crowd = requests(**params)
    expected = everything_said(Engine(model()), crowd)
    for caching in (False, True):
        tight = Engine(model(), num_blocks=FOR_THREE, chunk=16, prefix_caching=caching, max_draft_tokens=3)
        assert everything_said(tight, crowd) == expected
        assert tight.num_preemptions > 3


@pytest.mark.covers("K07")
def test_the_order_of_arrival_changes_nothing_that_is_said() -> None:
    crowd = requests(**SAMPLING["logprobs"])
    expected = alone(crowd)
    chance = random.Random(0)
    for chunk, arrive_every in ((3, 0), (7, 1), (64, 2), (16, 3)):
        shuffled = chance.sample(crowd, len(crowd))
        assert everything_said(Engine(model(), chunk=chunk), shuffled, arrive_every) == expected


@pytest.mark.covers("K08", "K10")
@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3", "gemma3-all-sliding"])
def test_a_hit_of_any_length_says_what_a_miss_says(name: str) -> None:
    """Nothing cached, a part, whole blocks to the last token, the whole prompt; also longer than the window."""
    whole = prompt(3 * WINDOW + 1, seed=1)
    crowd = [
        request(whole[:length] + tail, f"{length}{tail}", max_tokens=6, temperature=1.0, seed=length)
        for length in (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, WINDOW + BLOCK, 3 * WINDOW, 3 * WINDOW + 1)
        for tail in ([], [7])
    ]
    engine = Engine(model(name), prefix_caching=True)
    everything_said(engine, [request(whole, "before", max_tokens=1)])
    cached = {k: v for one in crowd for k, v in everything_said(engine, [one]).items()}
    assert cached == alone(crowd, name)
    expected = {
        one.request_id: (min(len(one.prompt_token_ids) - 1, shared_with(whole, one))) // BLOCK * BLOCK
        for one in crowd
    }
    assert {k: v for k, v in engine.num_cached_tokens.items() if k != "before"} == expected


def shared_with(whole: list[int], one: GenerateRequest) -> int:
    """Length of the common beginning."""
    pairs = zip(whole, one.prompt_token_ids, strict=False)
    return next(
        (index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), len(one.prompt_token_ids)
    )


@pytest.mark.covers("K09")
def test_128_equal_prompts_at_once_say_the_same_thing() -> None:
    token_ids = prompt(2 * WINDOW + 3, seed=2)
    engine = Engine(model(), prefix_caching=True, num_blocks=300)
    crowd = [request(token_ids, f"r{number}", max_tokens=8) for number in range(128)]
    said = everything_said(engine, crowd)
    [expected] = alone([crowd[0]]).values()
    assert set(map(repr, said.values())) == {repr(expected)}
    cached = list(engine.num_cached_tokens.values())
    assert cached.count(0) == 4, "those of the first step, which has 64 tokens"
    assert set(cached) == {0, 2 * WINDOW}


@pytest.mark.covers("K11")
def test_a_cache_of_a_tenth_of_what_is_asked_for_changes_nothing_that_is_said() -> None:
    prefixes = [prompt(5 * BLOCK, seed=number) for number in range(16)]
    chance = random.Random(5)
    crowd = [
        request(
            [*chance.choice(prefixes)[: chance.randrange(4, 21)], number % VOCAB], f"r{number}", max_tokens=5
        )
        for number in range(100)
    ]
    engine = Engine(model(), prefix_caching=True, num_blocks=10)
    assert everything_said(engine, crowd) == everything_said(Engine(model()), crowd)
    assert sum(engine.num_cached_tokens.values()) > 60
    assert engine.num_preemptions > 0
