"""What is left for the KV cache on a GPU, whose memory is made up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine import memory
from server.engine.device_step.assemble import MemoryUse, StepMaker
from server.engine.device_step.queue import MemoryReport
from server.engine.memory import (
    OutOfMemoryError,
    PoolLimits,
    activation_bytes,
    allowed_bytes,
    size_kv_pools,
    weight_bytes,
)
from server.engine.models.config_reader import read_hf
from tests.device_step.driver import static_model
from tests.device_step.static_backend import StaticBackend
from tests.device_step.thread_queue import ThreadQueue

GIB = 1 << 30
LIMITS = PoolLimits(block_size=4, max_model_len=32, max_num_seqs=5, max_num_batched_tokens=24)


class Metered(ThreadQueue):
    """Reports what it is told to."""

    def __init__(self, reports: list[MemoryReport]) -> None:
        super().__init__(max_delay=0.0)
        self._reports = list(reports)

    def memory(self) -> MemoryReport:
        self.mark().wait()
        return self._reports.pop(0)


def maker(queue: ThreadQueue) -> tuple[StepMaker, Any]:
    model = static_model("gemma3", queue)
    assert isinstance(model.backend, StaticBackend)
    return StepMaker(model.backend, (), LIMITS), model


def test_weights_the_largest_step_recordings_and_the_rest_are_told_apart() -> None:
    queue = Metered(
        [
            MemoryReport(total=10_000, free=9_500, allocated=100, peak=0),  # before the weights
            MemoryReport(total=10_000, free=6_400, allocated=3_100, peak=3_200),  # with them
            MemoryReport(total=10_000, free=6_300, allocated=3_150, peak=3_900),  # after the largest step
            MemoryReport(total=10_000, free=6_100, allocated=3_150, peak=3_600),  # the largest recording
            MemoryReport(total=10_000, free=6_090, allocated=3_150, peak=3_600),  # the second largest
            MemoryReport(total=10_000, free=6_350, allocated=3_100, peak=3_600),  # without them
        ]
    )
    step_maker, model = maker(queue)
    # Decodes of 1, 2, 4 and 5 sequences, each with and without sampling, and prompts of 16 and 24 tokens.
    use = step_maker.measure(model)
    assert use == MemoryUse(weights=3_000, step=800, recordings=200 + 9 * 10, other=150)
    assert use.total == 4_240
    assert queue.num_recordings == 2
    queue.close()


def test_a_step_that_does_not_fit_beside_the_weights_says_what_to_lower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def too_large(logits: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    class Eager(Metered):
        def run(self, work: Any) -> None:
            self.mark().wait()  # for the copy of what it reads
            work()

    queue = Eager([MemoryReport(100, 100, 0, 0)] * 2)
    model = static_model("gemma1", queue, too_large)
    assert isinstance(model.backend, StaticBackend)
    message = (
        "a step of 24 tokens and 5 sequences does not fit: lower --max-num-batched-tokens or --max-num-seqs"
    )
    with pytest.raises(OutOfMemoryError, match=message):
        StepMaker(model.backend, (), LIMITS).measure(model)
    queue.close()


def on_gpu(monkeypatch: pytest.MonkeyPatch, total: int) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, total))


def test_the_share_is_of_all_that_a_gpu_has_and_must_be_free(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, 24 * GIB)
    assert allowed_bytes("cuda", 0.5, free_bytes=20 * GIB) == 12 * GIB
    assert memory.allowed_bytes("cpu", 0.5, free_bytes=20 * GIB) == 10 * GIB
    message = r"0.75 of the GPU's 24576 MiB is 18432 MiB, but only 17408 MiB are free: lower it"
    with pytest.raises(OutOfMemoryError, match=message):
        allowed_bytes("cuda", 0.75, free_bytes=17 * GIB)


GEMMA_2B = {"hidden_size": 2048, "intermediate_size": 16_384, "num_hidden_layers": 18} | {
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
}
GEMMA_7B = {"hidden_size": 3072, "intermediate_size": 24_576, "num_hidden_layers": 28} | {
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
CUDA_CONTEXT = 0.5 * GIB
"""Assumed, and not measured."""


@pytest.mark.parametrize(("shape", "gibibytes"), [(GEMMA_2B, 8.3), (GEMMA_7B, 20.7)], ids=["2b", "7b"])
def test_a_sequence_of_8192_tokens_fits_where_the_readme_says(
    monkeypatch: pytest.MonkeyPatch, shape: dict[str, int], gibibytes: float
) -> None:
    total = int(gibibytes * GIB)
    gemma = read_hf(
        shape
        | {"model_type": "gemma", "vocab_size": 256_000, "head_dim": 256, "max_position_embeddings": 8192}
        | {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "hidden_act": "gelu_pytorch_tanh", "eos_token_id": 1}
    )
    limits = PoolLimits(block_size=16, max_model_len=8192, max_num_seqs=1, max_num_batched_tokens=512)
    step = activation_bytes(gemma, 2, limits)
    use = MemoryUse(weights=weight_bytes(gemma, 2, "none"), step=step, recordings=0, other=0)
    groups = gemma.kv_groups()
    per_block = [
        2 * 16 * group.num_kv_heads * group.head_dim * 2 * len(group.layer_indices) for group in groups
    ]
    on_gpu(monkeypatch, total)
    allowed = allowed_bytes("cuda", 1.0 - CUDA_CONTEXT / total, free_bytes=int(total - CUDA_CONTEXT))
    assert size_kv_pools(groups, per_block, allowed - use.total, limits) == (8192 // 16,)
    with pytest.raises(OutOfMemoryError, match="lower --max-model-len, or --max-num-batched-tokens"):
        size_kv_pools(groups, per_block, per_block[0] * 8192 // 16, limits)  # one short, with the null block
