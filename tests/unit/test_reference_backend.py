"""The reference back end's operations against formulas written out in another way, mostly in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from server.engine.backend.base import Rope
from server.engine.backend.reference import ReferenceBackend, ReferenceStep, rope_angles
from server.engine.backend.reference_attention import KVCache, paged_attention, plan_attention
from server.engine.backend.scratch import Scratch
from server.engine.backend.upcast import UpcastMatmul
from server.engine.dtype import DType
from server.engine.inputs import AttentionMetadata, ModelInputs
from server.engine.models.config import AttentionSpec, KVGroupSpec

CPU = torch.device("cpu")
BF16 = ReferenceBackend(CPU, DType.BFLOAT16)
FP32 = ReferenceBackend(CPU, DType.FLOAT32)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- norms, activation, embedding, rotation ----------------------------------------------------------------


def test_rms_norm_multiplies_by_one_plus_weight_in_fp32_and_rounds_once() -> None:
    """Weights of 0.001 k vanish in 1 + w, if that sum is rounded to bf16; so do they after an early cast."""
    x = (normal(4, 512) * 3).bfloat16()
    weight = (0.001 * torch.arange(512)).bfloat16()
    exact = x.double() / (x.double().square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * (1 + weight.double())
    ours = BF16.rms_norm(x, BF16.prepare_norm(weight), 1e-6)
    assert torch.equal(ours, exact.bfloat16())


def test_rms_norm_adds_epsilon_to_the_mean_square() -> None:
    x = torch.full((1, 8), 1e-3)
    ours = FP32.rms_norm(x, FP32.prepare_norm(torch.zeros(8)), 1e-6)
    torch.testing.assert_close(ours, torch.full((1, 8), 1 / math.sqrt(2)))


def test_add_rms_norm_is_the_addition_and_the_norm_of_the_sum() -> None:
    residual, update = normal(3, 16).bfloat16(), normal(3, 16, seed=1).bfloat16()
    weight = BF16.prepare_norm(normal(16, seed=2))
    expected = residual + update
    total, normed = BF16.add_rms_norm(residual.clone(), update, weight, 1e-6)
    assert torch.equal(total, expected)
    assert torch.equal(normed, BF16.rms_norm(expected, weight, 1e-6))


def test_geglu_is_the_tanh_approximation_of_the_gate_times_up() -> None:
    gate, up = normal(2, 64) * 3, normal(2, 64, seed=1)
    inner = math.sqrt(2 / math.pi) * (gate.double() + 0.044715 * gate.double() ** 3)
    expected = (0.5 * gate.double() * (1 + inner.tanh()) * up.double()).float()
    ours = FP32.geglu(torch.cat((gate, up), dim=1))
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)
    exact_gelu = torch.nn.functional.gelu(gate) * up
    assert (exact_gelu - expected).abs().max() > 1e-4, "or the test could not tell the two apart"


@pytest.mark.parametrize(
    ("hidden_size", "expected"),
    [
        (640, 25.25),
        (1152, 34.0),
        (2048, 45.25),
        (2304, 48.0),
        (2560, 50.5),
        (3072, 55.5),
        (3584, 59.75),
        (5376, 73.5),
    ],
)
def test_the_embedding_scale_is_rounded_to_bf16(hidden_size: int, expected: float) -> None:
    assert DType.BFLOAT16.round(hidden_size**0.5) == expected
    assert DType.FLOAT32.round(hidden_size**0.5) == pytest.approx(hidden_size**0.5, rel=1e-7)


def test_embeddings_equal_the_rows_times_the_rounded_scale() -> None:
    table = normal(5, 3072).bfloat16()
    step = ReferenceStep(ModelInputs(*(np.array([4, 0]),) * 4, attention=()), CPU)
    ours = BF16.embed(BF16.prepare_embedding(table), DType.BFLOAT16.round(3072**0.5), step)
    assert torch.equal(ours, table[[4, 0]] * torch.tensor(55.5, dtype=torch.bfloat16))


@pytest.mark.parametrize(("theta", "scale"), [(1e4, 1.0), (1e6, 1.0), (1e6, 8.0)])
def test_rotary_angles_are_fp32_from_integer_positions(theta: float, scale: float) -> None:
    positions = torch.tensor([0, 1, 257, 4001, 32_767])
    cos, sin = rope_angles(Rope(256, theta, scale), positions)
    frequencies = theta ** -(torch.arange(0, 256, 2).double() / 256)
    angles = positions.double()[:, None] * frequencies / scale
    # An angle of 32,767 has a spacing of 0.002 in fp32, which is what the models were trained with.
    tolerance = torch.maximum(angles * 3e-7, torch.tensor(1e-6))
    assert ((cos[:, 0].double() - angles.cos()).abs() <= tolerance).all()
    assert ((sin[:, 0].double() - angles.sin()).abs() <= tolerance).all()


# --- matrices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 2, 5, 6, 7, 8, 33])
@pytest.mark.parametrize("shape", [(40, 16), (3000, 1100)])
def test_upcast_products_are_rounded_once_from_fp32(num_rows: int, shape: tuple[int, int]) -> None:
    weight, x = normal(*shape).bfloat16(), normal(num_rows, shape[1], seed=1).bfloat16()
    exact = x.double() @ weight.double().T
    ours = UpcastMatmul()(x, weight)
    assert ours.dtype is torch.bfloat16
    # bf16 keeps 8 bits; sums near a rounding boundary may fall to either side.
    torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=2e-3)


@pytest.mark.skipif(not UpcastMatmul.is_needed(CPU, torch.bfloat16), reason="this CPU multiplies bf16 itself")
def test_upcast_products_of_a_row_do_not_depend_on_the_other_rows() -> None:
    matmul = UpcastMatmul()
    weight, x = normal(700, 640).bfloat16(), normal(64, 640, seed=1).bfloat16()
    alone = matmul(x[:6], weight)
    for num_rows in range(6, 65):
        assert torch.equal(matmul(x[:num_rows], weight)[:6], alone)
    assert torch.equal(matmul(x.flip(0), weight).flip(0)[:6], alone)
    single = matmul(x[:1], weight)
    for num_rows in range(1, 6):
        assert torch.equal(matmul(x[:num_rows], weight)[:1], single)


def test_logits_are_the_products_with_the_unscaled_embedding_soft_capped_in_fp32() -> None:
    table, hidden = normal(20, 16) * 5, normal(3, 16, seed=1)
    raw = FP32.logits(hidden, table, None)
    torch.testing.assert_close(raw, hidden @ table.T)
    torch.testing.assert_close(FP32.logits(hidden, table, 3.0), 3.0 * torch.tanh(hidden @ table.T / 3.0))
    in_bf16 = BF16.logits(hidden.bfloat16(), table.bfloat16(), 30.0)
    assert in_bf16.dtype is torch.float32
    assert not torch.equal(in_bf16, in_bf16.bfloat16().float()), "the cap's result is not rounded"


# --- attention ---------------------------------------------------------------------------------------------


def attend(
    new_counts: list[int],
    seq_lens: list[int],
    spec: AttentionSpec,
    block_size: int,
    poison: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(ours, expected) for sequences of these lengths of which the last `new_counts` tokens are computed now.

    Blocks are handed out in a random order; slots that hold no token are filled with `poison`.
    """
    window = spec.window
    num_blocks = [-(-length // block_size) for length in seq_lens]
    order = np.random.default_rng(0).permutation(sum(num_blocks)) + 1
    shape = (sum(num_blocks) + 1, block_size, spec.num_kv_heads, spec.head_dim)
    cache = KVCache(torch.full(shape, poison), torch.full(shape, poison))
    table = np.zeros((len(seq_lens), max(num_blocks)), dtype=np.int32)
    slots, queries, new_keys, new_values, expected = [], [], [], [], []
    for index, (length, num_new) in enumerate(zip(seq_lens, new_counts, strict=True)):
        blocks, order = order[: num_blocks[index]], order[num_blocks[index] :]
        positions = np.arange(length)
        slots_of_all = torch.from_numpy(blocks[positions // block_size] * block_size + positions % block_size)
        q = normal(num_new, spec.num_heads, spec.head_dim, seed=3 * index)
        k = normal(length, spec.num_kv_heads, spec.head_dim, seed=3 * index + 1)
        v = normal(length, spec.num_kv_heads, spec.head_dim, seed=3 * index + 2)
        computed = length - num_new
        cache.keys.view(-1, *k.shape[1:])[slots_of_all[:computed]] = k[:computed]
        cache.values.view(-1, *v.shape[1:])[slots_of_all[:computed]] = v[:computed]
        # Blocks that no query of this step sees any more are the null block, as the KV manager has it.
        first_visible = 0 if window is None else max(0, computed - window + 1)
        table[index, first_visible // block_size : len(blocks)] = blocks[first_visible // block_size :]
        slots.append(slots_of_all[computed:])
        queries.append(q)
        new_keys.append(k[computed:])
        new_values.append(v[computed:])
        expected.append(dense_attention(q, k, v, spec))
    metadata = AttentionMetadata(
        query_start=np.concatenate(([0], np.cumsum(new_counts))).astype(np.int32),
        seq_lens=np.array(seq_lens, dtype=np.int32),
        block_table=table,
        slot_mapping=torch.cat(slots).numpy(),
        block_size=block_size,
    )
    plan = plan_attention(metadata, window, CPU)
    ours = paged_attention(
        torch.cat(queries), torch.cat(new_keys), torch.cat(new_values), cache, spec, plan, Scratch(CPU)
    )
    return ours, torch.cat(expected)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """One query, one head at a time, over exactly the keys it may see."""
    group = spec.num_heads // spec.num_kv_heads
    out = torch.empty(q.shape[0], spec.num_heads, spec.head_dim)
    for row in range(q.shape[0]):
        position = k.shape[0] - q.shape[0] + row
        first = 0 if spec.window is None else max(0, position - spec.window + 1)
        for head in range(spec.num_heads):
            keys, values = (x[first : position + 1, head // group].double() for x in (k, v))
            scores = keys @ q[row, head].double() * spec.scale
            if spec.softcap is not None:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            out[row, head] = (scores.softmax(dim=0) @ values).float()
    return out.flatten(1)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("window", [None, 1, 7, 8, 9, 40])
def test_mixed_batches_equal_dense_attention(window: int | None, block_size: int) -> None:
    spec = AttentionSpec(6, 2, 8, 0.3, window, softcap=None)
    ours, expected = attend([1, 5, 1, 30, 1, 2], [1, 5, 33, 32, 9, 24], spec, block_size)
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)


def test_soft_caps_come_after_the_scale_and_before_the_mask() -> None:
    spec = AttentionSpec(6, 2, 8, 2.0, window=5, softcap=1.5)
    ours, expected = attend([1, 9, 1], [12, 20, 3], spec, block_size=4)
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)


def test_chunks_longer_than_a_tile_and_decodes_more_than_a_batch_equal_dense_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.engine.backend.reference_attention._TILE_QUERIES", 7)
    monkeypatch.setattr("server.engine.backend.reference_attention._GATHER_TOKENS", 40)
    for window in (None, 10):
        spec = AttentionSpec(6, 2, 8, 0.3, window, softcap=None)
        ours, expected = attend([30, 1, 1, 1, 1, 22], [41, 50, 20, 1, 33, 22], spec, block_size=4)
        torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("window", [None, 6])
def test_what_other_sequences_left_in_a_block_does_not_leak(window: int | None, poison: float) -> None:
    spec = AttentionSpec(6, 2, 8, 0.3, window, softcap=None)
    ours, expected = attend([1, 3, 1], [5, 6, 18], spec, block_size=4, poison=poison)
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)


def test_query_i_sees_key_j_if_i_minus_window_is_less_than_j_and_j_at_most_i() -> None:
    """The whole 4 by 4 table for a window of 2, read off the attention weights: values are unit vectors."""
    spec = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=4, scale=1.0, window=2, softcap=None)
    table = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    metadata = AttentionMetadata(
        query_start=np.array([0, 4], dtype=np.int32),
        seq_lens=np.array([4], dtype=np.int32),
        block_table=np.array([[1, 2]], dtype=np.int32),
        slot_mapping=np.array([2, 3, 4, 5]),
        block_size=2,
    )
    cache = FP32.allocate_kv(KVGroupSpec("sliding", 2, (0,), 1, 4), 2, 2)[0]
    q, k, v = torch.zeros(4, 1, 4), torch.zeros(4, 1, 4), torch.eye(4).view(4, 1, 4)
    seen = paged_attention(q, k, v, cache, spec, plan_attention(metadata, 2, CPU), Scratch(CPU)) > 0
    assert seen.int().tolist() == table


def test_kv_storage_takes_what_it_says() -> None:
    group = KVGroupSpec("full", None, (0, 2, 5), 2, 8)
    caches = BF16.allocate_kv(group, num_blocks=7, block_size=4)
    total = sum(x.numel() * x.element_size() for cache in caches for x in (cache.keys, cache.values))
    assert total == 8 * BF16.kv_bytes_per_block(group, 4)
