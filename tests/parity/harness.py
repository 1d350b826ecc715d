"""Tiny random models of each family, in transformers and in ours, and a driver for ours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor

from server.batching import Scheduler, SchedulerConfig
from server.engine.backend.base import AnyBackend
from server.engine.backend.reference import ReferenceBackend
from server.engine.batch import ScheduledSequence
from server.engine.dtype import DType
from server.engine.inputs import PromptRows, build_inputs
from server.engine.kv_cache.manager import KVCacheManager
from server.engine.kv_cache.tensors import KVTensors
from server.engine.model_runner import ModelRunner
from server.engine.models.config import GemmaConfig
from server.engine.models.config_reader import read_hf
from server.engine.models.gemma import GemmaModel, prepare_weights
from server.engine.sequence import Sequence as EngineSequence
from server.engine.speculation import NgramSpeculator
from server.engine.types import (
    FinishReason,
    GenerateRequest,
    PromptTokenLogprob,
    SamplingParams,
    TokenLogprob,
)

VOCAB = 67
WINDOW = 8
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
}
_GEMMA_2 = _SHAPE | {"model_type": "gemma2", "num_hidden_layers": 4, "sliding_window": WINDOW}
_GEMMA_3 = _SHAPE | {"model_type": "gemma3_text", "num_hidden_layers": 12, "sliding_window": WINDOW}

CONFIGS: dict[str, dict[str, Any]] = {
    "gemma1": _SHAPE | {"model_type": "gemma", "num_hidden_layers": 3, "hidden_act": "gelu"},
    "gemma1-multi-query": _SHAPE | {"model_type": "gemma", "num_hidden_layers": 2, "num_key_value_heads": 1},
    "gemma1-wide-as-7b": _SHAPE
    | {"model_type": "gemma", "num_hidden_layers": 1, "hidden_size": 3072, "num_key_value_heads": 4},
    "gemma2": _GEMMA_2 | {"query_pre_attn_scalar": 16},
    "gemma2-tight-softcaps": _GEMMA_2
    | {"query_pre_attn_scalar": 1, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
    "gemma2-scaled-as-27b": _GEMMA_2 | {"query_pre_attn_scalar": 8},
    "gemma3": _GEMMA_3 | {"query_pre_attn_scalar": 16},
    "gemma3-rope-factor-8": _GEMMA_3
    | {
        "query_pre_attn_scalar": 16,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "gemma3-all-sliding": _GEMMA_3
    | {"num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 3, "query_pre_attn_scalar": 16},
}

WIDE = CONFIGS["gemma1"] | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
"""A model whose matrices can be rounded to 4 bits, and their halves, too."""


@cache
def hf_model(name: str) -> Any:
    """transformers' model with eager attention and random weights of a size at which every part matters."""
    values = dict(CONFIGS[name])
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("norm.weight"):
                parameter.normal_(0.0, 0.3, generator=generator)
            else:
                parameter.normal_(0.0, 1.5 / math.sqrt(parameter.shape[1]), generator=generator)
    return model.eval()


def hf_logits(name: str, token_ids: Sequence[int]) -> Tensor:
    """[tokens, vocabulary] in fp32, the whole sequence in one pass and without a cache."""
    return logits_of(hf_model(name), token_ids)


def logits_of(model: Any, token_ids: Sequence[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([list(token_ids)])).logits[0].float()
    return logits


@cache
def our_model(name: str, dtype: DType = DType.FLOAT32) -> GemmaModel:
    config = read_hf(CONFIGS[name])
    return load_model(config, ReferenceBackend(torch.device("cpu"), dtype), checkpoint(name))


def load_model(config: GemmaConfig, backend: AnyBackend, weights: Iterable[tuple[str, Tensor]]) -> GemmaModel:
    return GemmaModel(config, backend, prepare_weights(config, backend, weights))


def checkpoint(name: str) -> list[tuple[str, Tensor]]:
    """The model's tensors under their names in a checkpoint."""
    return [
        (parameter_name.removeprefix("model."), parameter.detach().clone())
        for parameter_name, parameter in hf_model(name).named_parameters()
    ]


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (length,), generator=generator).tolist()


def our_logits(model: GemmaModel, token_ids: Sequence[int], chunk: int, block_size: int) -> Tensor:
    """[tokens, vocabulary], computed `chunk` tokens at a time."""
    groups = model.config.kv_groups()
    num_blocks = [-(-len(token_ids) // block_size) + 1] * len(groups)
    kv = KVTensors(model.backend, groups, num_blocks, block_size)
    manager = KVCacheManager(groups, num_blocks, block_size, False, chunk)
    seq = EngineSequence.from_request(request(token_ids))
    logits = []
    forward = model.capture(kv.by_layer, chunk)
    while seq.num_computed < seq.num_tokens:
        num_new = min(chunk, seq.num_tokens - seq.num_computed)
        assert manager.allocate(seq, 0, num_new)
        scheduled = ScheduledSequence(seq, seq.num_computed, num_new, samples=False)
        rows = PromptRows(scheduled, seq.num_computed, num_new)
        inputs = build_inputs([scheduled], [rows], len(groups), block_size)
        # A copy: a back end may use the same memory for the next.
        logits.append(torch.as_tensor(model.compute_logits(forward(inputs))).clone())
        seq.num_computed += num_new
        manager.commit(seq)
    return torch.cat(logits)


def request(token_ids: Sequence[int], request_id: str = "r", **params: Any) -> GenerateRequest:
    values: dict[str, Any] = {"max_tokens": 64, "seed": 0, "temperature": 0.0} | params
    return GenerateRequest(
        request_id=request_id, prompt_token_ids=list(token_ids), params=SamplingParams(**values)
    )


@dataclass
class Engine:
    """Scheduler, KV manager, runner and sampler as the server has them, without the process around them."""

    model: GemmaModel
    block_size: int = 4
    num_blocks: int = 1000
    max_num_batched_tokens: int = 64
    chunk: int = 64
    """Tokens of one sequence in one step at most."""
    prefix_caching: bool = False
    max_draft_tokens: int = 0
    num_preemptions: int = 0
    num_accepted_tokens: int = 0
    num_cached_tokens: dict[str, int] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[PromptTokenLogprob | None]] = field(default_factory=dict)
    logprobs: dict[str, list[TokenLogprob]] = field(default_factory=dict)
    finish_reasons: dict[str, FinishReason] = field(default_factory=dict)

    def __post_init__(self) -> None:
        groups = self.model.config.kv_groups()
        num_blocks = [self.num_blocks] * len(groups)
        self.manager = KVCacheManager(
            groups, num_blocks, self.block_size, self.prefix_caching, self.max_num_batched_tokens
        )
        limits = SchedulerConfig(16, self.max_num_batched_tokens, 8192, self.chunk)
        speculator = NgramSpeculator(self.max_draft_tokens)
        self.scheduler = Scheduler(limits, self.manager, speculator, lambda: 0.0)
        sampler = self.model.backend.sampler(self.model.config.vocab_size, ())
        kv = KVTensors(self.model.backend, groups, num_blocks, self.block_size)
        self.runner = ModelRunner(self.model, kv, sampler, self.max_num_batched_tokens)

    def generate(self, requests: Iterable[GenerateRequest], arrive_every: int = 0) -> list[list[int]]:
        """Generated ids of each request. One arrives every `arrive_every` steps; 0: all at once."""
        pending = list(requests)
        order = [one.request_id for one in pending]
        generated: dict[str, list[int]] = {request_id: [] for request_id in order}
        for request_id in order:
            self.finish_reasons.pop(request_id, None)
        step = 0
        while pending or self.scheduler.has_work():
            while pending and (arrive_every == 0 or step % arrive_every == 0):
                self.scheduler.add(EngineSequence.from_request(pending.pop(0)))
                if arrive_every:
                    break
            batch = self.scheduler.schedule()
            sampled = self.runner.execute(batch) if batch.sequences else []
            for output in self.scheduler.update(batch, sampled):
                assert output.error is None
                if not generated[output.request_id]:
                    self.num_cached_tokens[output.request_id] = output.num_cached_tokens
                generated[output.request_id] += output.token_ids
                if output.prompt_logprobs is not None:
                    self.prompt_logprobs[output.request_id] = output.prompt_logprobs
                self.logprobs.setdefault(output.request_id, []).extend(output.logprobs or [])
                if output.finish_reason is not None:
                    assert output.request_id not in self.finish_reasons, "it had ended"
                    self.finish_reasons[output.request_id] = output.finish_reason
            counts = self.scheduler.take_counts()
            self.num_preemptions += counts.num_preemptions
            self.num_accepted_tokens += counts.num_accepted_tokens
            self.manager.check(self.scheduler.sequences)
            step += 1
        return [generated[request_id] for request_id in order]


def assert_greedy(name: str, prompt_ids: Sequence[int], generated: Sequence[int]) -> None:
    """Each generated token is what transformers would choose after those before it."""
    logits = hf_logits(name, [*prompt_ids, *generated])
    expected = logits[len(prompt_ids) - 1 : -1].argmax(dim=-1).tolist()
    assert list(generated) == expected
