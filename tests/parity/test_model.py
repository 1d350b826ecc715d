"""Loading weights, the embedding's scale, and prompt logprobs, against transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine.backend.reference import ReferenceBackend, ReferenceStep
from server.engine.dtype import DType
from server.engine.inputs import ModelInputs
from server.engine.kv_cache.tensors import KVTensors
from server.engine.model_runner import ModelRunner
from server.engine.models.config import ConfigError, expected_weights
from server.engine.models.config_reader import read_hf
from server.engine.models.gemma import GemmaModel
from tests.parity.harness import (
    CONFIGS,
    Engine,
    checkpoint,
    hf_logits,
    hf_model,
    load_model,
    our_logits,
    our_model,
    prompt,
    request,
)

CPU = torch.device("cpu")


def load(name: str, weights: list[tuple[str, Tensor]]) -> GemmaModel:
    return load_model(read_hf(CONFIGS[name]), ReferenceBackend(CPU, DType.FLOAT32), weights)


@pytest.mark.parametrize("name", CONFIGS)
def test_expected_weights_are_those_of_transformers(name: str) -> None:
    theirs = {weight_name: tuple(weight.shape) for weight_name, weight in checkpoint(name)}
    assert expected_weights(read_hf(CONFIGS[name])) == theirs
    assert not any("lm_head" in weight_name for weight_name in theirs)


@pytest.mark.parametrize("name", ["gemma1", "gemma3"])
def test_weights_may_come_in_any_order(name: str) -> None:
    token_ids = prompt(20)
    ours = our_logits(load(name, checkpoint(name)[::-1]), token_ids, chunk=20, block_size=4)
    torch.testing.assert_close(ours, hf_logits(name, token_ids), atol=1e-4, rtol=0)


def test_a_checkpoint_that_does_not_fit_is_refused_by_name() -> None:
    weights = checkpoint("gemma1")
    with pytest.raises(ConfigError, match=r"lacks 1 tensors.*norm\.weight"):
        load("gemma1", [(name, weight) for name, weight in weights if name != "norm.weight"])
    with pytest.raises(ConfigError, match=r"lm_head\.weight is not part"):
        load("gemma1", [*weights, ("lm_head.weight", weights[0][1])])
    with pytest.raises(ConfigError, match="comes twice"):
        load("gemma1", [*weights, weights[3]])
    misshapen = [(name, weight[:-1] if name.endswith("k_proj.weight") else weight) for name, weight in weights]
    with pytest.raises(ConfigError, match=r"k_proj\.weight has shape \(31, 32\), not \(32, 32\)"):
        load("gemma1", misshapen)


def test_embeddings_of_a_7b_in_bf16_are_bit_for_bit_those_of_transformers() -> None:
    """sqrt(3072) is 55.43, which bf16 holds as 55.5."""
    theirs: Any = copy.deepcopy(hf_model("gemma1-wide-as-7b")).to(torch.bfloat16).model.embed_tokens
    token_ids = torch.arange(20)
    step = ReferenceStep(ModelInputs(*(token_ids.numpy(),) * 4, attention=()), CPU)
    backend = ReferenceBackend(CPU, DType.BFLOAT16)
    ours = backend.embed(theirs.weight, DType.BFLOAT16.round(3072**0.5), step)
    assert torch.equal(ours, theirs(token_ids))
    assert not torch.equal(ours, backend.embed(theirs.weight, 3072**0.5, step))


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_prompt_logprobs_are_the_log_softmax_of_transformers_logits(chunk: int) -> None:
    prompts = {"long": prompt(45), "one": prompt(1), "short": prompt(6, seed=1)}
    engine = Engine(our_model("gemma2"), chunk=chunk)
    engine.generate(
        request(ids, request_id=name, max_tokens=2, prompt_logprobs=3) for name, ids in prompts.items()
    )
    for name, token_ids in prompts.items():
        entries = engine.prompt_logprobs[name]
        assert len(entries) == len(token_ids)
        assert entries[0] is None
        expected = hf_logits("gemma2", token_ids).log_softmax(dim=-1)
        for position, entry in enumerate(entries[1:], start=1):
            assert entry is not None
            row = expected[position - 1]
            assert entry.token_id == token_ids[position]
            assert entry.logprob == pytest.approx(float(row[token_ids[position]]), abs=1e-4)
            assert [token_id for token_id, _ in entry.top] == row.topk(3).indices.tolist()
            assert entry.rank == 1 + int((row > row[token_ids[position]]).sum())


def test_prompt_logprobs_survive_a_preemption_during_the_prompt() -> None:
    token_ids = prompt(40)
    engine = Engine(our_model("gemma2"), block_size=4, num_blocks=16, chunk=4, max_num_batched_tokens=16)
    requests = [request(prompt(20, seed=3), request_id="first", max_tokens=40)]
    requests += [request(token_ids, request_id="second", max_tokens=2, prompt_logprobs=0)]
    engine.generate(requests, arrive_every=1)
    assert engine.num_preemptions > 0
    expected = hf_logits("gemma2", token_ids).log_softmax(dim=-1)
    entries = engine.prompt_logprobs["second"]
    assert entries[0] is None
    ours = [entry.logprob for entry in entries[1:] if entry is not None]
    theirs = [float(expected[position - 1, token_ids[position]]) for position in range(1, 40)]
    assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("name", ["gemma1", "gemma3"])
def test_warming_up_leaves_no_trace(name: str) -> None:
    model = our_model(name)
    groups = model.config.kv_groups()
    kv = KVTensors(model.backend, groups, [3] * len(groups), 4)
    ModelRunner(model, kv, model.backend.sampler(model.config.vocab_size, ()), 64).warm_up()
    for cache in kv.by_layer:
        assert not cache.keys[1:].any()
        assert cache.keys[0].isfinite().all()


def test_a_warmed_up_engine_gives_the_same_tokens() -> None:
    cold, warm = Engine(our_model("gemma3")), Engine(our_model("gemma3"))
    warm.runner.warm_up()
    assert warm.generate([request(prompt(30))]) == cold.generate([request(prompt(30))])
