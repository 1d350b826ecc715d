"""The Gemma decoder, generations 1 to 3, as a list of layers over a back end's operations.

Generations differ only in what a layer is built from: specs of the configuration, norms that are there or are
the identity. Nothing here asks for the model's name.

    x ─┬─ input norm ── qkv ── attention ── o ── post norm* ── + ─┐
       └────────────────── residual ───────────────────────────┘  │
    ┌─────────────────────────────────────────────────────────────┘
    └──┬─ pre-MLP norm ── gate, up ── GeGLU ── down ── post norm* ── + ──
       └────────────────── residual ─────────────────────────────────┘

    * Gemma 2 and 3: their `post_attention_layernorm` is this norm; in Gemma 1 the name means the pre-MLP norm.

Each addition is one operation with the norm that follows it: the next layer's input norm, at the end the final
one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from server.engine.backend.base import AnyBackend, AttentionLayer, PreparedWeights
from server.engine.inputs import ModelInputs
from server.engine.models.config import ConfigError, GemmaConfig, expected_weights

if TYPE_CHECKING:
    from torch import Tensor


def _identity(x: Any) -> Any:
    return x


class GemmaModel:
    """A loaded model. Stateless but for its weights: keys and values are the caller's."""

    def __init__(
        self,
        config: GemmaConfig,
        backend: AnyBackend,
        weights: PreparedWeights,
        add_up: Callable[[Any], Any] = _identity,
    ) -> None:
        """weights: what `prepare_weights` returns. add_up: makes the whole of what the last matrices of
        attention and MLP give, where other processes have parts of it."""
        self.config = config
        self.backend = backend
        self._eps = config.rms_norm_eps
        self._table = weights["embed_tokens.weight"]
        # As the weights' dtype holds it: the 7B was trained with 55.5, which is sqrt(3072) in bf16.
        self._embedding_scale = backend.dtype.round(config.hidden_size**0.5)
        group_of_layer = {
            index: g for g, group in enumerate(config.kv_groups()) for index in group.layer_indices
        }
        self._input_norm = weights["layers.0.input_layernorm.weight"]
        self._layers = [
            _Layer(config, index, group_of_layer[index], backend, weights, add_up)
            for index in range(len(config.layers))
        ]

    def capture(self, caches: Sequence[Any], max_tokens: int) -> Callable[[ModelInputs], Any]:
        """A function that computes a step of at most max_tokens tokens and stores its keys and values.

        caches: one for each layer. The function returns the normalised hidden states of `inputs.output_rows`,
        [R, hidden], which can be sliced by rows.
        """
        return self.backend.capture(self.decoder(caches), max_tokens)

    def decoder(self, caches: Sequence[Any]) -> Callable[[Any], Any]:
        """What a step computes: from the back end's form of it to the normalised hidden states, [T, hidden].

        caches: one for each layer.
        """
        return lambda step: self._forward(step, caches)

    def compute_logits(self, hidden: Any) -> Any:
        """[S, hidden] from a captured step -> [S, vocabulary] of any floating dtype. In fp32, one row of a 256k
        vocabulary takes 1 MB.

        The next call may use the same memory.
        """
        return self.backend.logits(hidden, self._table, self.config.final_softcap)

    def _forward(self, step: Any, caches: Sequence[Any]) -> Any:
        backend = self.backend
        residual = backend.embed(self._table, self._embedding_scale, step)
        normed = backend.rms_norm(residual, self._input_norm, self._eps)
        for layer, cache in zip(self._layers, caches, strict=True):
            residual, normed = layer.forward(residual, normed, cache, step)
        return normed


class _Layer:
    def __init__(
        self,
        config: GemmaConfig,
        index: int,
        group: int,
        backend: AnyBackend,
        weights: PreparedWeights,
        add_up: Callable[[Any], Any],
    ) -> None:
        def weight(name: str) -> Any:
            return weights[f"layers.{index}.{name}.weight"]

        def post_norm(name: str) -> Callable[[Any], Any]:
            if not config.post_norms:
                return _identity
            norm = weight(name)
            return lambda x: backend.rms_norm(x, norm, config.rms_norm_eps)

        self._backend = backend
        self._add_up = add_up
        self._eps = config.rms_norm_eps
        self._attention = AttentionLayer.of(
            config.layers[index],
            group,
            weight("self_attn.q_norm") if config.qk_norm else None,
            weight("self_attn.k_norm") if config.qk_norm else None,
            config.rms_norm_eps,
        )
        self._qkv = weight("self_attn.qkv_proj")
        self._output = weight("self_attn.o_proj")
        self._post_attention = post_norm("post_attention_layernorm")
        self._pre_mlp_norm = weight(
            "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
        )
        self._gate_up = weight("mlp.gate_up_proj")
        self._down = weight("mlp.down_proj")
        self._post_mlp = post_norm("post_feedforward_layernorm")
        is_last = index + 1 == len(config.layers)
        self._next_norm = weights["norm.weight" if is_last else f"layers.{index + 1}.input_layernorm.weight"]

    def forward(self, residual: Any, normed: Any, cache: Any, step: Any) -> tuple[Any, Any]:
        """normed: the residual after this layer's input norm. Returns the same pair for the next layer."""
        backend = self._backend
        qkv = backend.linear(normed, self._qkv)
        attended = backend.linear(backend.attention(qkv, self._attention, cache, step), self._output)
        update = self._post_attention(self._add_up(attended))
        residual, normed = backend.add_rms_norm(residual, update, self._pre_mlp_norm, self._eps)
        activated = backend.geglu(backend.linear(normed, self._gate_up))
        update = self._post_mlp(self._add_up(backend.linear(activated, self._down)))
        return backend.add_rms_norm(residual, update, self._next_norm, self._eps)


# --- weights -----------------------------------------------------------------------------------------------

_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def prepare_weights(
    config: GemmaConfig, backend: AnyBackend, weights: Iterable[tuple[str, Tensor]]
) -> PreparedWeights:
    """Takes the tensors of `expected_weights` in any order, one at a time, norms as (weight - 1).

    Raises ConfigError on an unexpected, repeated, misshapen or missing tensor.
    """
    preparation = _Preparation(config, backend)
    for name, tensor in weights:
        preparation.add(name, tensor)
    return preparation.finish()


@dataclass(slots=True)
class _FusedMatrix:
    """Several of a checkpoint's matrices, one above the other."""

    num_rows: int = 0
    num_missing: int = 0
    matrix: Tensor | None = None
    """Allocated when the first part comes."""


class _Preparation:
    """Takes a checkpoint's tensors as they come. Beside what the back end has taken, it holds only fused
    matrices of which a part is still to come, so the model is never in memory twice."""

    def __init__(self, config: GemmaConfig, backend: AnyBackend) -> None:
        self._backend = backend
        self._missing = expected_weights(config)
        self._prepared: dict[str, Any] = {}
        self._fused: dict[str, _FusedMatrix] = {}
        self._parts: dict[str, tuple[str, int]] = {}
        """Name of a part -> name of its fused matrix, first row there."""
        for index in range(len(config.layers)):
            for fused_name, parts in _FUSED.items():
                name = f"layers.{index}.{fused_name}.weight"
                fused = self._fused[name] = _FusedMatrix()
                for part in (f"layers.{index}.{part}.weight" for part in parts):
                    self._parts[part] = (name, fused.num_rows)
                    fused.num_rows += self._missing[part][0]
                    fused.num_missing += 1

    def add(self, name: str, tensor: Tensor) -> None:
        shape = self._missing.pop(name, None)
        if shape is None:
            raise ConfigError(f"the checkpoint's tensor {name} is not part of this model, or comes twice")
        if tuple(tensor.shape) != shape:
            raise ConfigError(f"the checkpoint's tensor {name} has shape {tuple(tensor.shape)}, not {shape}")
        backend = self._backend
        if name in self._parts:
            self._add_part(name, tensor)
        elif name.endswith("norm.weight"):
            self._prepared[name] = backend.prepare_norm(tensor)
        elif name == "embed_tokens.weight":
            self._prepared[name] = backend.prepare_embedding(tensor)
        else:
            self._prepared[name] = backend.prepare_linear(tensor)

    def finish(self) -> dict[str, Any]:
        if self._missing:
            names = ", ".join(sorted(self._missing)[:3])
            raise ConfigError(f"the checkpoint lacks {len(self._missing)} tensors, among them {names}")
        return self._prepared

    def _add_part(self, name: str, tensor: Tensor) -> None:
        fused_name, first_row = self._parts[name]
        fused = self._fused[fused_name]
        if fused.matrix is None:
            fused.matrix = tensor.new_empty((fused.num_rows, tensor.shape[1]))
        fused.matrix[first_row : first_row + tensor.shape[0]].copy_(tensor)
        fused.num_missing -= 1
        if fused.num_missing == 0:
            self._prepared[fused_name] = self._backend.prepare_linear(fused.matrix)
            del self._fused[fused_name]
