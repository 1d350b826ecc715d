"""Reads a config.json or the metadata of a GGUF file into a GemmaConfig.

A key that a checkpoint leaves out has the default of transformers' configuration class of that family; an
explicit null is a value. Old and new spellings are both read: `sliding_window_pattern` or `layer_types`;
`rope_theta`, `rope_local_base_freq` and `rope_scaling`, or `rope_parameters`.

Sources: transformers' configuration_gemma.py, configuration_gemma2.py, configuration_gemma3.py; llama.cpp's
src/models/gemma*.cpp for what a GGUF file leaves unsaid.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from server.engine.models.config import AttentionSpec, ConfigError, GemmaConfig, LayerSpec

_TANH_GELU = "gelu_pytorch_tanh"
_LAYERS_OF_27B = {"gemma2": 46, "gemma3_text": 62}
"""The 27B models scale scores by (hidden / heads)**-0.5; GGUF does not say so, llama.cpp goes by the depth."""


@dataclass(frozen=True)
class _Family:
    """What distinguishes one generation: structure, and the defaults of its configuration keys."""

    model_type: str
    qk_norm: bool
    post_norms: bool
    full_every: int
    """Each full_every-th layer attends to everything, the others to a window."""
    rope_theta: float
    """Of the full layers; the sliding ones have 1e4 in every generation."""
    defaults: dict[str, Any]


_SLIDING_ROPE_THETA = 1e4
_COMMON_DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
    "sliding_window": None,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
_GEMMA_1 = _Family(
    model_type="gemma",
    qk_norm=False,
    post_norms=False,
    full_every=1,
    rope_theta=1e4,
    defaults=_COMMON_DEFAULTS
    | {
        "vocab_size": 256_000,
        "hidden_size": 3072,
        "intermediate_size": 24_576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 8192,
    },
)
_GEMMA_2 = _Family(
    model_type="gemma2",
    qk_norm=False,
    post_norms=True,
    full_every=2,
    rope_theta=1e4,
    defaults=_COMMON_DEFAULTS
    | {
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
)
_GEMMA_3 = _Family(
    model_type="gemma3_text",
    qk_norm=True,
    post_norms=True,
    full_every=6,
    rope_theta=1e6,
    defaults=_GEMMA_2.defaults
    | {
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
)
_MOST = {
    "vocab_size": 1 << 21,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 10,
    "num_key_value_heads": 1 << 10,
    "head_dim": 1 << 13,
    "max_position_embeddings": 1 << 24,
}
"""Several times what the largest Gemma has. More is a mistake or a trap, and is refused before memory is taken
in proportion."""
_HF_FAMILIES = {family.model_type: family for family in (_GEMMA_1, _GEMMA_2, _GEMMA_3)}
_GGUF_MODEL_TYPES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text"}


def read_hf(config: Mapping[str, Any]) -> GemmaConfig:
    """The GemmaConfig of a config.json; of a Gemma 3 with images, that of its text part.

    Raises ConfigError, which names the key, on anything not understood.
    """
    if config.get("model_type") == "gemma3":
        config = _text_part(config)
    model_type = config.get("model_type")
    family = _HF_FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise _refusal("model_type", model_type, f"supported are gemma3 and {', '.join(_HF_FAMILIES)}")
    _refuse_other_arithmetic(config)
    keys = _Keys(config, family.defaults)

    is_full = _full_layers(keys, family)
    head_dim = keys.integer("head_dim")
    attention = AttentionSpec(
        num_heads=keys.integer("num_attention_heads"),
        num_kv_heads=keys.integer("num_key_value_heads"),
        head_dim=head_dim,
        scale=(head_dim if family is _GEMMA_1 else keys.number("query_pre_attn_scalar")) ** -0.5,
        window=None,
        softcap=keys.optional_number("attn_logit_softcapping"),
    )
    if attention.num_heads % attention.num_kv_heads or head_dim % 2:
        raise ConfigError(
            f"model configuration: num_attention_heads = {attention.num_heads} must be a multiple of "
            f"num_key_value_heads = {attention.num_kv_heads}, and head_dim = {head_dim} must be even"
        )
    rope_full, rope_sliding = _ropes(config, family)
    full = LayerSpec(attention, *rope_full)
    sliding = full
    if not all(is_full):
        sliding = LayerSpec(replace(attention, window=keys.integer("sliding_window")), *rope_sliding)
    return GemmaConfig(
        model_type=family.model_type,
        vocab_size=keys.integer("vocab_size"),
        hidden_size=keys.integer("hidden_size"),
        intermediate_size=keys.integer("intermediate_size"),
        max_position=keys.integer("max_position_embeddings"),
        rms_norm_eps=keys.number("rms_norm_eps"),
        qk_norm=family.qk_norm,
        post_norms=family.post_norms,
        final_softcap=keys.optional_number("final_logit_softcapping"),
        layers=tuple(full if layer_is_full else sliding for layer_is_full in is_full),
        eos_token_ids=keys.token_ids("eos_token_id"),
    )


def read_gguf(metadata: Mapping[str, Any]) -> GemmaConfig:
    """The GemmaConfig of a GGUF file, by putting its metadata into the terms of a config.json.

    Raises ConfigError, which names the key.
    """
    architecture = metadata.get("general.architecture")
    model_type = _GGUF_MODEL_TYPES.get(architecture) if isinstance(architecture, str) else None
    if model_type is None:
        raise _refusal("general.architecture", architecture, f"supported are {', '.join(_GGUF_MODEL_TYPES)}")

    def need(key: str) -> Any:
        if metadata.get(key) is None:
            raise ConfigError(f"GGUF metadata: {key} is missing")
        return metadata[key]

    def need_integer(key: str) -> int:
        return _positive_integer(key, need(key))

    head_dim = need_integer(f"{architecture}.attention.key_length")
    value_length = metadata.get(f"{architecture}.attention.value_length", head_dim)
    if value_length != head_dim:
        raise _refusal(
            f"{architecture}.attention.value_length", value_length, f"must equal key_length = {head_dim}"
        )
    num_heads = need_integer(f"{architecture}.attention.head_count")
    hidden_size = need_integer(f"{architecture}.embedding_length")
    num_layers = need_integer(f"{architecture}.block_count")
    is_27b = _LAYERS_OF_27B.get(model_type) == num_layers
    eos_keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    pieces = metadata.get("tokenizer.ggml.tokens")
    vocab_size = metadata.get(f"{architecture}.vocab_size") or (
        len(pieces) if isinstance(pieces, list) else None
    )
    scaling_type = metadata.get(f"{architecture}.rope.scaling.type", "none")
    config = {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": need(f"{architecture}.feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": need(f"{architecture}.attention.head_count_kv"),
        "head_dim": head_dim,
        "max_position_embeddings": need(f"{architecture}.context_length"),
        "rms_norm_eps": need(f"{architecture}.attention.layer_norm_rms_epsilon"),
        "eos_token_id": [metadata[key] for key in eos_keys if metadata.get(key) is not None],
        "query_pre_attn_scalar": hidden_size // num_heads if is_27b else head_dim,
        "rope_scaling": {
            "rope_type": "default" if scaling_type == "none" else scaling_type,
            "factor": metadata.get(f"{architecture}.rope.scaling.factor", 1.0),
        },
    }
    optional = {
        "sliding_window": "attention.sliding_window",
        "sliding_window_pattern": "attention.sliding_window_pattern",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
        "rope_theta": "rope.freq_base",
        "rope_local_base_freq": "rope.freq_base_swa",
    }
    for key, gguf_key in optional.items():
        if (value := metadata.get(f"{architecture}.{gguf_key}")) is not None:
            config[key] = value
    return read_hf(config)


# --- pieces ------------------------------------------------------------------------------------------------


class _Keys:
    """Typed reading of a configuration; every refusal names the key and the value."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._values = values
        self._defaults = defaults

    def get(self, key: str) -> Any:
        return self._values[key] if key in self._values else self._defaults.get(key)

    def integer(self, key: str) -> int:
        value = _positive_integer(key, self.get(key))
        if value > _MOST.get(key, value):
            raise _refusal(key, value, f"must be at most {_MOST[key]}")
        return value

    def number(self, key: str) -> float:
        return _positive_number(key, self.get(key))

    def optional_number(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(token_id, bool) or not isinstance(token_id, int) for token_id in ids):
            raise _refusal(key, value, "must be an integer or a list of integers")
        return tuple(dict.fromkeys(ids))


_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = _shown.maxlong = 80


def _refusal(key: str, value: object, reason: str) -> ConfigError:
    return ConfigError(f"model configuration: {key} = {_shown.repr(value)}: {reason}")


def _positive_integer(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _refusal(key, value, "must be an integer of at least 1")
    return value


def _positive_number(key: str, value: object) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:
        number = math.inf
    if not 0 < number < math.inf:
        raise _refusal(key, value, "must be a finite number above 0")
    return number


def _object(key: str, value: object) -> Mapping[str, Any]:
    """A part of the configuration; one that is absent or null is empty."""
    if value is not None and not isinstance(value, Mapping):
        raise _refusal(key, value, "must be an object")
    return value or {}


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text_config = config.get("text_config")
    if not isinstance(text_config, Mapping):
        raise _refusal("text_config", text_config, 'a model of type "gemma3" keeps its text model there')
    _refuse_other_arithmetic(config)
    # The instruction-tuned checkpoints list <end_of_turn> beside <eos> at the top level only.
    inherited = {key: config[key] for key in ("eos_token_id",) if config.get(key) is not None}
    return {"model_type": "gemma3_text", **text_config, **inherited}


def _refuse_other_arithmetic(config: Mapping[str, Any]) -> None:
    if config.get("attention_bias"):
        raise _refusal("attention_bias", config["attention_bias"], "biases are not supported")
    if config.get("use_bidirectional_attention"):
        value = config["use_bidirectional_attention"]
        raise _refusal("use_bidirectional_attention", value, "only causal attention is supported")
    if config.get("tie_word_embeddings", True) is not True:
        raise _refusal("tie_word_embeddings", config["tie_word_embeddings"], "Gemma shares them; must be true")
    if config.get("quantization_config") is not None:
        raise _refusal(
            "quantization_config", config["quantization_config"], "quantised checkpoints are not supported"
        )
    # Where both spellings are present, `hidden_activation` wins. "gelu" in Gemma 1's hidden_act is a known slip
    # of its release: the model was trained with the tanh approximation (huggingface/transformers pull request
    # 29402).
    activation = config.get("hidden_activation")
    if activation is None:
        activation = config.get("hidden_act")
        activation = _TANH_GELU if activation == "gelu" else activation
    if activation not in (None, _TANH_GELU):
        key = "hidden_act" if config.get("hidden_activation") is None else "hidden_activation"
        raise _refusal(key, activation, f"supported is {_TANH_GELU}")


def _full_layers(keys: _Keys, family: _Family) -> list[bool]:
    """For each layer, whether it attends to everything."""
    num_layers = keys.integer("num_hidden_layers")
    layer_types = keys.get("layer_types")
    if layer_types is None or family is _GEMMA_1:
        spelling = "sliding_window_pattern" if keys.get("sliding_window_pattern") else "_sliding_window_pattern"
        full_every = family.full_every if keys.get(spelling) is None else keys.integer(spelling)
        return [(index + 1) % full_every == 0 for index in range(num_layers)]
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise _refusal("layer_types", layer_types, f"must list num_hidden_layers = {num_layers} types")
    if unknown := [kind for kind in layer_types if kind not in ("full_attention", "sliding_attention")]:
        raise _refusal("layer_types", unknown, "supported are full_attention and sliding_attention")
    return [layer_type == "full_attention" for layer_type in layer_types]


_Rope = tuple[float, float]
"""Base (theta) and linear factor."""


def _ropes(config: Mapping[str, Any], family: _Family) -> tuple[_Rope, _Rope]:
    """The rotary embedding of the full and of the sliding layers."""
    parameters = _object("rope_parameters", config.get("rope_parameters"))
    scaling = _object("rope_scaling", config.get("rope_scaling"))
    theta = config.get("rope_theta", family.rope_theta)
    if family is not _GEMMA_3:
        rope = _rope({"rope_theta": theta, **scaling, **parameters})
        return rope, rope
    if unknown := set(parameters) - {"full_attention", "sliding_attention"}:
        raise _refusal(
            "rope_parameters", sorted(unknown), "Gemma 3 has full_attention and sliding_attention there"
        )
    theta_sliding = config.get("rope_local_base_freq", _SLIDING_ROPE_THETA)
    return (
        _rope({"rope_theta": theta, **scaling, **_of_kind(parameters, "full_attention")}),
        _rope({"rope_theta": theta_sliding, **_of_kind(parameters, "sliding_attention")}),
    )


def _of_kind(parameters: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    return _object(f"rope_parameters.{kind}", parameters.get(kind))


def _rope(parameters: Mapping[str, Any]) -> _Rope:
    theta = _positive_number("rope_theta", parameters["rope_theta"])
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refusal("partial_rotary_factor", parameters["partial_rotary_factor"], "must be 1")
    if rope_type == "default":
        return theta, 1.0
    if rope_type == "linear":
        return theta, _positive_number("rope factor", parameters.get("factor"))
    raise _refusal("rope_type", rope_type, "supported are default and linear")
