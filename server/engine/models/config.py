"""What a Gemma checkpoint says about its own arithmetic, as frozen data that the decoder is built from.

Laws:

- Families differ only here: the decoder reads per-layer specs and never asks for the model's name.
- A key that would change the arithmetic and is not understood is an error that names the key and its value.

Sources: Gemma reports arXiv 2403.08295, 2408.00118, 2503.19786. `config_reader` does the reading.
"""

from __future__ import annotations

from dataclasses import dataclass

FULL = "full"
SLIDING = "sliding"


class ConfigError(ValueError):
    """The checkpoint's configuration is missing something or asks for arithmetic that is not implemented."""


@dataclass(frozen=True)
class AttentionSpec:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    """Factor of q.k before the softcap."""
    window: int | None
    """Query i sees key j if i - window < j <= i; None: every key up to i."""
    softcap: float | None
    """Scores become softcap * tanh(scores / softcap)."""


@dataclass(frozen=True)
class LayerSpec:
    attention: AttentionSpec
    rope_theta: float
    rope_scale: float
    """Positions are divided by it ("linear" scaling); 1.0 means none."""


@dataclass(frozen=True)
class KVGroupSpec:
    """Layers that share one KV pool, because they keep the same span of positions."""

    name: str
    window: int | None
    layer_indices: tuple[int, ...]
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class GemmaConfig:
    model_type: str
    vocab_size: int
    """Rows of the embedding."""
    hidden_size: int
    intermediate_size: int
    """Width of the gate and of the up projection, each."""
    max_position: int
    rms_norm_eps: float
    qk_norm: bool
    post_norms: bool
    """Norms after attention and after the MLP, before the residual additions."""
    final_softcap: float | None
    layers: tuple[LayerSpec, ...]
    eos_token_ids: tuple[int, ...]

    def kv_groups(self) -> tuple[KVGroupSpec, ...]:
        """The full group, then the sliding one, each only if some layer belongs to it."""
        groups = []
        for name in (FULL, SLIDING):
            members = [
                (index, layer.attention)
                for index, layer in enumerate(self.layers)
                if (layer.attention.window is None) == (name == FULL)
            ]
            if not members:
                continue
            shapes = {(spec.window, spec.num_kv_heads, spec.head_dim) for _, spec in members}
            if len(shapes) > 1:
                raise ConfigError(
                    f"the {name} layers differ in (window, KV heads, head width): {sorted(shapes, key=str)}"
                )
            window, num_kv_heads, head_dim = shapes.pop()
            groups.append(
                KVGroupSpec(name, window, tuple(index for index, _ in members), num_kv_heads, head_dim)
            )
        return tuple(groups)


def expected_weights(config: GemmaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the checkpoint, in the names of transformers without "model."."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocab_size, hidden)}
    for index, layer in enumerate(config.layers):
        attention = layer.attention
        q_width = attention.num_heads * attention.head_dim
        kv_width = attention.num_kv_heads * attention.head_dim
        of_layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (q_width, hidden),
            "self_attn.k_proj": (kv_width, hidden),
            "self_attn.v_proj": (kv_width, hidden),
            "self_attn.o_proj": (hidden, q_width),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        if config.qk_norm:
            of_layer |= {
                "self_attn.q_norm": (attention.head_dim,),
                "self_attn.k_norm": (attention.head_dim,),
            }
        if config.post_norms:
            of_layer |= {"pre_feedforward_layernorm": (hidden,), "post_feedforward_layernorm": (hidden,)}
        shapes |= {f"layers.{index}.{name}.weight": shape for name, shape in of_layer.items()}
    shapes["norm.weight"] = (hidden,)
    return shapes
