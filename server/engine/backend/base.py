"""The operations that the decoder is made of, which each back end supplies.

Laws:

- Weights go in once through `prepare_*` and come back as the back end's own form; nobody else looks inside.
- The decoder's forward pass is handed over once, to `capture`, as a function that calls these operations and
  does nothing else. A back end may call it at every step, or once to learn what a step consists of.
- What passes between operations are arrays [rows, width] in the back end's own form.
- An operation may overwrite its array arguments only where its docstring says so.

`reference.ReferenceBackend` defines the arithmetic: every other back end is tested against it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from server.engine.dtype import DType
from server.engine.inputs import ModelInputs
from server.engine.models.config import AttentionSpec, KVGroupSpec, LayerSpec
from server.engine.sampling.types import SampledToken, TokenMask
from server.engine.sequence import Sequence as EngineSequence
from server.engine.types import PromptTokenLogprob

if TYPE_CHECKING:
    from torch import Tensor

LinearT = TypeVar("LinearT")
"""A prepared weight matrix."""
TableT = TypeVar("TableT")
"""A prepared embedding, which is read by rows and, as the output matrix, whole."""
NormT = TypeVar("NormT")
"""A prepared norm weight."""
CacheT = TypeVar("CacheT")
"""The keys and values of one layer, all blocks."""
ArrayT = TypeVar("ArrayT")
"""[rows, width], during a step."""
HiddenT = TypeVar("HiddenT")
"""[rows, hidden], a step's result: can be sliced by rows."""
LogitsT = TypeVar("LogitsT")
"""[rows, vocabulary] in fp32."""
AnyLogitsT = TypeVar("AnyLogitsT", contravariant=True)
StepT = TypeVar("StepT")
"""A step's arrays and what was derived from them."""


class Rope(NamedTuple):
    """One kind of rotary embedding; layers that share it share its angles."""

    head_dim: int
    theta: float
    scale: float
    """Positions are divided by it."""


@dataclass(frozen=True, slots=True)
class AttentionLayer(Generic[NormT]):
    spec: AttentionSpec
    rope: Rope
    group: int
    """Which of the model's KV groups the layer belongs to."""
    q_norm: NormT | None
    """None: no norm; so with k_norm."""
    k_norm: NormT | None
    eps: float

    @classmethod
    def of(
        cls, layer: LayerSpec, group: int, q_norm: NormT | None, k_norm: NormT | None, eps: float
    ) -> AttentionLayer[NormT]:
        rope = Rope(layer.attention.head_dim, layer.rope_theta, layer.rope_scale)
        return cls(layer.attention, rope, group, q_norm, k_norm, eps)


class TokenSampler(Protocol[AnyLogitsT]):
    """What `sampling.sampler` describes, for the logits of one back end."""

    def sample(
        self, logits: AnyLogitsT, seqs: Sequence[EngineSequence], masks: Mapping[int, TokenMask] | None = None
    ) -> list[SampledToken]:
        """One token for each row of logits, which may be overwritten; row i belongs to seqs[i].

        What a row's mask, if it has one, does not allow is not sampled.
        """

    def gather_logprobs(
        self, logits: AnyLogitsT, chosen: Sequence[int], num_top: Sequence[int]
    ) -> list[PromptTokenLogprob]:
        """The log-softmax at chosen[i] and at the num_top[i] likeliest of row i, and chosen[i]'s rank."""


class Backend(Protocol[LinearT, TableT, NormT, CacheT, ArrayT, HiddenT, LogitsT, StepT]):
    name: str
    dtype: DType

    # --- once, at load -------------------------------------------------------------------------------------

    def prepare_linear(self, weight: Tensor) -> LinearT:
        """weight: [out, in]. The back end may keep this very tensor."""

    def prepare_embedding(self, weight: Tensor) -> TableT:
        """weight: [vocabulary, hidden]. The back end may keep this very tensor."""

    def prepare_norm(self, weight: Tensor) -> NormT:
        """weight: [width] as checkpoints hold it, so that the norm multiplies by 1 + weight."""

    def kv_bytes_per_block(self, group: KVGroupSpec, block_size: int) -> int:
        """Bytes that one block takes in all layers of the group together."""

    def allocate_kv(self, group: KVGroupSpec, num_blocks: int, block_size: int) -> list[CacheT]:
        """Storage for blocks 0 .. num_blocks, for each layer of the group. Block 0 is never read unmasked."""

    def capture(self, forward: Callable[[StepT], ArrayT], max_tokens: int) -> Callable[[ModelInputs], HiddenT]:
        """A function that computes a step of at most max_tokens tokens as `forward` does.

        It returns the rows `inputs.output_rows` of forward's result, in memory of their own.
        """

    def sampler(self, vocab_size: int, suppress_token_ids: tuple[int, ...]) -> TokenSampler[LogitsT]:
        """Chooses tokens from what `logits` returns."""

    # --- in a step -----------------------------------------------------------------------------------------

    def embed(self, table: TableT, scale: float, step: StepT) -> ArrayT:
        """The rows of the step's tokens times the scale, which is exact in the back end's dtype."""

    def linear(self, x: ArrayT, weight: LinearT) -> ArrayT:
        """x @ weight.T, accumulated in fp32 and rounded once. [T, in] -> [T, out]"""

    def rms_norm(self, x: ArrayT, weight: NormT, eps: float) -> ArrayT:
        """x / rms(x) * (1 + weight), all in fp32 and rounded once."""

    def add_rms_norm(
        self, residual: ArrayT, update: ArrayT, weight: NormT, eps: float
    ) -> tuple[ArrayT, ArrayT]:
        """(residual + update, rms_norm(residual + update)); may overwrite both arguments."""

    def attention(self, qkv: ArrayT, layer: AttentionLayer[NormT], cache: CacheT, step: StepT) -> ArrayT:
        """All between the fused projection and the output projection.

        Normalises q and k where the layer does, rotates them, stores k and v in their slots, attends.
        [T, (heads + 2 * kv_heads) * head_dim] -> [T, heads * head_dim]
        """

    def geglu(self, gate_up: ArrayT) -> ArrayT:
        """tanh-gelu(gate) * up. [T, 2 * ffn], gate first -> [T, ffn]"""

    # --- after a step --------------------------------------------------------------------------------------

    def logits(self, hidden: HiddenT, table: TableT, softcap: float | None) -> LogitsT:
        """hidden @ table.T, soft-capped in fp32. [S, hidden] -> [S, vocabulary]

        In fp32, or in the dtype in which the product was rounded where nothing is soft-capped.

        The caller may overwrite the result, and must be done with it before it asks for the next.
        """


AnyBackend = Backend[Any, Any, Any, Any, Any, Any, Any, Any]
"""A back end as its user sees it, to whom its forms are opaque."""

PreparedWeights = Mapping[str, Any]
"""A model's matrices and norms in one back end's form, by name."""
