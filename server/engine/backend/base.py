"""The operations that the decoder is made of, which each back end supplies.

Laws:

- Weights go in once through `prepare_*` and come back as the back end's own form; nobody else looks inside.
- A step begins with `begin_step`, which moves the step's arrays to the device and plans the attention once for
  all layers. The operations of the step get what it returned.
- Between operations, activations are plain tensors [rows, width] in the back end's dtype on its device.
- An operation may overwrite its activation arguments only where its docstring says so.

`reference.ReferenceBackend` defines the arithmetic: every other back end is tested against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from server.engine.inputs import ModelInputs
from server.engine.models.config import KVGroupSpec, LayerSpec

LinearT = TypeVar("LinearT")
"""A prepared weight matrix."""
TableT = TypeVar("TableT")
"""A prepared embedding, which is read by rows and, as the output matrix, whole."""
NormT = TypeVar("NormT")
"""A prepared norm weight."""
AttentionT = TypeVar("AttentionT")
"""A prepared attention layer."""
CacheT = TypeVar("CacheT")
"""The keys and values of one layer, all blocks."""
StepT = TypeVar("StepT", bound="Step")


@dataclass(frozen=True, slots=True)
class Step:
    """What every back end's plan of a step holds; back ends add their own fields."""

    token_ids: Tensor
    """[T]"""
    output_rows: Tensor
    """[R]: the rows whose hidden state is wanted."""


class Backend(Protocol[LinearT, TableT, NormT, AttentionT, CacheT, StepT]):
    name: str
    device: torch.device
    dtype: torch.dtype

    # --- once, at load -------------------------------------------------------------------------------------

    def prepare_linear(self, weight: Tensor) -> LinearT:
        """weight: [out, in] in the back end's dtype. The back end may keep this very tensor."""

    def prepare_embedding(self, weight: Tensor) -> TableT:
        """weight: [vocabulary, hidden] in the back end's dtype. The back end may keep this very tensor."""

    def prepare_norm(self, weight: Tensor) -> NormT:
        """weight: [width] as checkpoints hold it, so that the norm multiplies by 1 + weight."""

    def prepare_attention(
        self, spec: LayerSpec, group: int, q_norm: NormT | None, k_norm: NormT | None, eps: float
    ) -> AttentionT:
        """group: which of the model's KV groups the layer belongs to. q_norm and k_norm: None for no norm."""

    def kv_bytes_per_block(self, group: KVGroupSpec, block_size: int) -> int:
        """Bytes that one block takes in all layers of the group together."""

    def allocate_kv(self, group: KVGroupSpec, num_blocks: int, block_size: int) -> list[CacheT]:
        """Storage for blocks 0 .. num_blocks, for each layer of the group. Block 0 is never read unmasked."""

    # --- once a step ---------------------------------------------------------------------------------------

    def begin_step(self, inputs: ModelInputs, attention_layers: Sequence[AttentionT]) -> StepT:
        """Moves the step's arrays to the device and plans the attention of all these layers."""

    # --- in a step -----------------------------------------------------------------------------------------

    def embed(self, table: TableT, token_ids: Tensor, scale: float) -> Tensor:
        """Rows of the table times the scale, which is exact in the back end's dtype. [T] -> [T, hidden]"""

    def linear(self, x: Tensor, weight: LinearT) -> Tensor:
        """x @ weight.T, accumulated in fp32 and rounded once. [T, in] -> [T, out]"""

    def rms_norm(self, x: Tensor, weight: NormT, eps: float) -> Tensor:
        """x / rms(x) * (1 + weight), all in fp32 and rounded once."""

    def add_rms_norm(
        self, residual: Tensor, update: Tensor, weight: NormT, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(residual + update, rms_norm(residual + update)); may overwrite both arguments."""

    def attention(self, qkv: Tensor, layer: AttentionT, cache: CacheT, step: StepT) -> Tensor:
        """All between the fused projection and the output projection.

        Normalises q and k where the layer does, rotates them, stores k and v in their slots, attends.
        [T, (heads + 2 * kv_heads) * head_dim] -> [T, heads * head_dim]
        """

    def geglu(self, gate_up: Tensor) -> Tensor:
        """tanh-gelu(gate) * up. [T, 2 * ffn], gate first -> [T, ffn]"""

    def logits(self, hidden: Tensor, table: TableT, softcap: float | None) -> Tensor:
        """hidden @ table.T, soft-capped in fp32. [S, hidden] -> [S, vocabulary] fp32

        The caller may overwrite the result, and must be done with it before it asks for the next.
        """


AnyBackend = Backend[Any, Any, Any, Any, Any, Any]
"""A back end as its user sees it, to whom the prepared forms are opaque."""
