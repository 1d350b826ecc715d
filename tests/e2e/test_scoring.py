"""Numbers that clients compute with, against transformers; and that a request's tokens are its own affair."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import Gemma3ForCausalLM

from tests.e2e.server_process import ServerProcess
from tests.fixtures_tokenizers import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()
CONTEXT = "the quick brown fox"
CONTINUATIONS = (" jumps", " over the lazy dog", "é日\n", " a b a b")


def post(client: httpx.Client, route: str, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post(f"/v1/{route}", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@cache
def reference(checkpoint: Path) -> Any:
    return Gemma3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def log_softmax(checkpoint: Path, token_ids: list[int]) -> torch.Tensor:
    """[tokens, vocabulary]: row i is about token i + 1."""
    with torch.inference_mode():
        logits = reference(checkpoint)(torch.tensor([token_ids])).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)


@pytest.mark.parametrize("in_ids", [False, True], ids=["texts", "ids"])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_loglikelihood_is_that_of_transformers(
    server: ServerProcess, tiny_checkpoint: Path, max_tokens: int, in_ids: bool
) -> None:
    """As evaluation harnesses ask: the continuation's log probability, and whether it is the greedy one."""
    texts = [CONTEXT + continuation for continuation in CONTINUATIONS]
    requests = [TOKENIZER.encode_prompt(text) for text in texts]
    num_context = len(TOKENIZER.encode_prompt(CONTEXT))
    # One continuation that is greedy, so that both answers come up.
    greedy = requests[0][:num_context]
    for _ in range(5):
        greedy.append(int(log_softmax(tiny_checkpoint, greedy)[-1].argmax()))
    asked: list[Any] = [*requests, greedy] if in_ids else texts
    fields = {"max_tokens": max_tokens, "echo": True, "logprobs": 1, "temperature": 0}
    with server.client() as client:
        answer = post(client, "completions", {"prompt": asked, **fields})
    found = []
    for choice, token_ids in zip(answer["choices"], [*requests, greedy][: len(asked)], strict=True):
        logprobs = choice["logprobs"]
        end = len(token_ids)
        assert len(logprobs["tokens"]) == end + max_tokens
        expected = log_softmax(tiny_checkpoint, token_ids)
        positions = range(num_context, end)
        ours = sum(logprobs["token_logprobs"][num_context:end])
        theirs = float(sum(expected[position - 1, token_ids[position]] for position in positions))
        assert ours == pytest.approx(theirs, abs=1e-3)
        is_greedy = all(
            max(top, key=top.get) == token
            for token, top in zip(
                logprobs["tokens"][num_context:end], logprobs["top_logprobs"][num_context:end], strict=True
            )
        )
        assert is_greedy == all(
            int(expected[position - 1].argmax()) == token_ids[position] for position in positions
        )
        found.append(is_greedy)
    assert not all(found)
    assert any(found) == in_ids


def test_ranks_and_logprobs_of_a_chat_s_prompt_are_those_of_transformers(
    server: ServerProcess, tiny_checkpoint: Path
) -> None:
    body = {"messages": [{"role": "user", "content": CONTEXT}], "max_tokens": 3, "temperature": 0}
    asked = {"prompt_logprobs": 3, "return_token_ids": True, "logprobs": True, "logprob_token_ids": [9, 270]}
    with server.client() as client:
        answer = post(client, "chat/completions", body | asked)
    prompt, (choice,) = answer["prompt_token_ids"], answer["choices"]
    expected = log_softmax(tiny_checkpoint, prompt + choice["token_ids"])
    first, *others = answer["prompt_logprobs"]
    assert first is None
    for row, token_id, entries in zip(expected, prompt[1:], others, strict=False):
        order = row.argsort(descending=True)[:3].tolist()
        assert set(map(int, entries)) == {token_id, *order}
        for key, entry in entries.items():
            assert entry["logprob"] == pytest.approx(float(row[int(key)]), abs=1e-3)
            assert entry["rank"] == 1 + int((row > row[int(key)]).sum())
            assert entry["decoded_token"] == TOKENIZER.token_text(int(key))
    for row, token in zip(expected[len(prompt) - 1 :], choice["logprobs"]["content"], strict=False):
        named = [entry["logprob"] for entry in token["top_logprobs"]]
        assert named == pytest.approx(row[[9, 270]].tolist(), abs=1e-3)


def test_the_best_of_several_is_the_likeliest_by_transformers(
    server: ServerProcess, tiny_checkpoint: Path
) -> None:
    body = {"prompt": CONTEXT, "max_tokens": 12, "seed": 3, "return_token_ids": True}
    with server.client() as client:
        every = post(client, "completions", body | {"n": 8})["choices"]
        best = post(client, "completions", body | {"n": 3, "best_of": 8})["choices"]

    def mean(choice: dict[str, Any]) -> float:
        prompt, output = choice["prompt_token_ids"], choice["token_ids"]
        rows = log_softmax(tiny_checkpoint, prompt + output)[len(prompt) - 1 : -1]
        return float(rows[range(len(output)), output].mean())

    ranked = sorted(every, key=mean, reverse=True)
    assert [choice["token_ids"] for choice in best] == [choice["token_ids"] for choice in ranked[:3]]


SUBJECTS: list[dict[str, Any]] = [
    {"seed": 1},
    {"seed": 2, "temperature": 1.7, "top_k": 20, "repetition_penalty": 1.3},
    {"seed": 3, "top_p": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {"270": 2}},
    {"seed": 4, "min_p": 0.02, "logprobs": 2, "n": 2},
    {"temperature": 0, "repetition_penalty": 1.2},
]
COMPANY: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 2.0},
    {"seed": 1},
    {"seed": 1, "n": 3, "top_p": 0.5},
    {"presence_penalty": 2, "frequency_penalty": -2},
    {"logit_bias": {str(token_id): -100 for token_id in range(264, 300)}},
    {"logprobs": 20},
    {"prompt_logprobs": 5},
    {"echo": True, "logprobs": 0},
    {"stop": ["a", "b"]},
    {"min_tokens": 30, "temperature": 2},
    {"top_k": 1},
    {"min_p": 0.3, "priority": -1},
    {"best_of": 4, "n": 2},
    {"max_tokens": 1},
    {"logprobs": 0, "logprob_token_ids": [5, 6, 7], "priority": 1},
]


def test_a_seeded_request_s_tokens_do_not_depend_on_what_shares_its_batch(server: ServerProcess) -> None:
    def tokens(client: httpx.Client, fields: dict[str, Any]) -> list[list[int]]:
        body = {"prompt": CONTEXT, "max_tokens": 40, "ignore_eos": True, "return_token_ids": True}
        return [choice["token_ids"] for choice in post(client, "completions", body | fields)["choices"]]

    with server.client() as client, ThreadPoolExecutor(len(COMPANY) + len(SUBJECTS)) as pool:
        alone = [tokens(client, fields) for fields in SUBJECTS]
        for round_number in range(3):
            company = [
                pool.submit(tokens, client, {"prompt": "abc " * (1 + 7 * index), **fields})
                for index, fields in enumerate(COMPANY, start=round_number)
            ]
            together = list(pool.map(lambda fields: tokens(client, fields), SUBJECTS))
            assert together == alone
            for request in company:
                request.result()
