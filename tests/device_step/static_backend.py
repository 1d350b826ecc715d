"""A back end and a sampler for tests, whose operations fit a recorded step: no shape depends on a value.

They compute in fp64 and round once to fp32: so a row is the same to the last bit in any company, although the
order of torch's sums and its functions of vectors' ends depend on how many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from server.engine.backend.base import AttentionLayer, Rope
from server.engine.backend.reference import Matrix, ReferenceBackend, _rms_norm, _rotate
from server.engine.backend.reference_attention import KVCache
from server.engine.device_step.inputs import DeviceInputs
from server.engine.device_step.queue import DeviceQueue
from server.engine.dtype import DType

Sample = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


class StaticBackend(ReferenceBackend):
    """Implements `DeviceBackend`, too."""

    def __init__(self, queue: DeviceQueue, sample: Sample, device: str = "cpu") -> None:
        super().__init__(torch.device(device), DType.FLOAT32)
        self._queue = queue
        self._sample = sample

    def queue(self) -> DeviceQueue:
        return self._queue

    def device_sampler(self, vocab_size: int, suppress_token_ids: tuple[int, ...]) -> Sample:
        def sample(logits: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
            for token_id in suppress_token_ids:
                logits[:, token_id].fill_(float("-inf"))
            return self._sample(logits, arrays)

        return sample

    def linear(self, x: Tensor, weight: Matrix) -> Tensor:
        assert isinstance(weight, Tensor)
        return (x.double()[:, None, :] * weight.double()).sum(dim=-1).float()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return _rms_norm(x.double(), weight, eps).float()

    def geglu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.double().chunk(2, dim=-1)
        return (F.gelu(gate, approximate="tanh") * up).float()

    @torch.inference_mode()
    def logits(self, hidden: Tensor, table: Matrix, softcap: float | None) -> Tensor:
        logits = self.linear(hidden, table)
        return logits if softcap is None else ((logits.double() / softcap).tanh() * softcap).float()

    def attention(  # type: ignore[override]
        self, qkv: Tensor, layer: AttentionLayer[Tensor], cache: KVCache, step: DeviceInputs
    ) -> Tensor:
        spec = layer.spec
        heads = qkv.double().view(qkv.shape[0], -1, spec.head_dim)
        q, k, v = heads.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = _rms_norm(q, layer.q_norm, layer.eps), _rms_norm(k, layer.k_norm, layer.eps)
        cos, sin = _angles(layer.rope, step.positions)
        q, k = _rotate(q, cos, sin) * spec.scale, _rotate(k, cos, sin)
        group = step.groups[layer.group]
        cache.keys.view(-1, *k.shape[1:]).index_copy_(0, group.slot_mapping.long(), k.float())
        cache.values.view(-1, *v.shape[1:]).index_copy_(0, group.slot_mapping.long(), v.float())

        rows = torch.arange(len(step.token_ids), device=qkv.device)
        owner = torch.bucketize(rows, step.query_start[1:], right=True)  # [T]: whose each row is
        num_blocks = group.block_table.shape[1]
        key = torch.arange(num_blocks * step.block_size, device=qkv.device)
        position = step.positions[:, None]
        visible = key <= position  # [T, keys]
        if spec.window is not None:
            visible &= key > position - spec.window
        used = (step.seq_lens + step.block_size - 1) // step.block_size
        is_used = torch.arange(num_blocks, device=qkv.device) < used[:, None]
        blocks = torch.where(is_used, group.block_table, 0)[owner]  # [T, blocks]
        # [T, keys, kv_heads, head_dim], what is masked zeroed, for it may be NaN
        keys, values = (
            storage[blocks].double().flatten(1, 2).masked_fill(~visible[:, :, None, None], 0.0)
            for storage in (cache.keys, cache.values)
        )
        q = q.view(q.shape[0], spec.num_kv_heads, -1, 1, spec.head_dim)
        scores = (q * keys.permute(0, 2, 1, 3)[:, :, None]).sum(dim=-1)  # [T, kv_heads, group, keys]
        if spec.softcap is not None:
            scores = (scores / spec.softcap).tanh() * spec.softcap
        scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
        shares = torch.softmax(scores, dim=-1)
        return (shares[..., None] * values.permute(0, 2, 1, 3)[:, :, None]).sum(dim=-2).flatten(1).float()


def _angles(rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, rope.head_dim, 2, device=positions.device).double() / rope.head_dim
    angles = positions.double()[:, None, None] / rope.theta**exponents / rope.scale
    return angles.cos(), angles.sin()


def sample(logits: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
    """As `sampling.sampler` does: in order of the vocabulary, or from the likeliest down where some are cut."""
    vocab_size = logits.shape[1]
    logits = logits.double()
    greedy = (arrays["temperature"] < 1e-5) | (arrays["top_k"] == 1)
    temperature = arrays["temperature"].double().clamp(min=1e-5)[:, None]
    top_k = torch.where(arrays["top_k"] == 0, vocab_size, arrays["top_k"]).clamp(max=vocab_size)
    top_p, min_p, uniform = (arrays[name].double() for name in ("top_p", "min_p", "uniform"))

    likeliest, ids = logits.sort(dim=1, descending=True, stable=True)
    weights = ((likeliest - likeliest[:, :1]) / temperature).exp()
    cumulative = weights.cumsum(dim=1)
    kept = torch.minimum((weights >= min_p[:, None]).sum(dim=1), top_k).clamp(min=1)
    mass = cumulative.gather(1, kept[:, None] - 1)
    nucleus = torch.minimum((cumulative < top_p[:, None] * mass).sum(dim=1) + 1, kept)
    threshold = uniform[:, None] * cumulative.gather(1, nucleus[:, None] - 1)
    truncated = ids.gather(1, (cumulative <= threshold).sum(dim=1, keepdim=True).clamp(max=vocab_size - 1))

    in_order = ((logits - likeliest[:, :1]) / temperature).exp().cumsum(dim=1)
    column = (in_order <= uniform[:, None] * in_order[:, -1:]).sum(dim=1, keepdim=True)
    is_cut = (top_k < vocab_size) | (top_p < 1.0) | (min_p > 0.0)
    drawn = torch.where(is_cut[:, None], truncated, column.clamp(max=vocab_size - 1))[:, 0]
    chosen = torch.where(greedy, ids[:, 0], drawn)
    return torch.where(likeliest[:, 0].isfinite(), chosen, -1)
