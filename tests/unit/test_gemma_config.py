"""Reading config.json and GGUF metadata; transformers' configuration classes are the reference for defaults."""

from __future__ import annotations

import re
from typing import Any

import pytest
import transformers

from server.engine.models.config import ConfigError, expected_weights
from server.engine.models.config_reader import read_gguf, read_hf

FAMILIES = ["gemma", "gemma2", "gemma3_text"]
GGUF_270M: dict[str, Any] = {
    "general.architecture": "gemma3",
    "gemma3.context_length": 32768,
    "gemma3.embedding_length": 640,
    "gemma3.block_count": 18,
    "gemma3.feed_forward_length": 2048,
    "gemma3.attention.head_count": 4,
    "gemma3.attention.head_count_kv": 1,
    "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
    "gemma3.attention.key_length": 256,
    "gemma3.attention.value_length": 256,
    "gemma3.attention.sliding_window": 512,
    "gemma3.rope.freq_base": 1e6,
    "tokenizer.ggml.tokens": ["<pad>"] * 10,
    "tokenizer.ggml.eos_token_id": 1,
}


def gguf(architecture: str, **changes: Any) -> dict[str, Any]:
    values = {key.replace("gemma3.", f"{architecture}."): value for key, value in GGUF_270M.items()}
    return values | {"general.architecture": architecture} | changes


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_keys_have_transformers_defaults(model_type: str) -> None:
    theirs = transformers.AutoConfig.for_model(model_type)
    ours = read_hf({"model_type": model_type})
    assert ours == read_hf(theirs.to_dict())
    assert ours.vocab_size == theirs.vocab_size
    assert ours.hidden_size == theirs.hidden_size
    assert ours.intermediate_size == theirs.intermediate_size
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert len(ours.layers) == theirs.num_hidden_layers
    assert ours.final_softcap == getattr(theirs, "final_logit_softcapping", None)
    attention = ours.layers[0].attention
    assert attention.num_heads == theirs.num_attention_heads
    assert attention.num_kv_heads == theirs.num_key_value_heads
    assert attention.head_dim == theirs.head_dim
    assert attention.softcap == getattr(theirs, "attn_logit_softcapping", None)


def test_gemma_2_alternates_from_a_sliding_layer_and_gemma_3_has_every_sixth_layer_full() -> None:
    gemma_2 = read_hf({"model_type": "gemma2", "num_hidden_layers": 5})
    assert [layer.attention.window for layer in gemma_2.layers] == [4096, None, 4096, None, 4096]
    gemma_3 = read_hf({"model_type": "gemma3_text", "num_hidden_layers": 26, "sliding_window": 512})
    assert [i for i, layer in enumerate(gemma_3.layers) if layer.attention.window is None] == [5, 11, 17, 23]
    assert {group.name: group.window for group in gemma_3.kv_groups()} == {"full": None, "sliding": 512}
    assert gemma_3.kv_groups()[0].layer_indices == (5, 11, 17, 23)


def test_a_model_without_sliding_layers_has_one_kv_group() -> None:
    (group,) = read_hf({"model_type": "gemma"}).kv_groups()
    assert (group.name, group.window, group.num_kv_heads, group.head_dim) == ("full", None, 16, 256)
    assert group.layer_indices == tuple(range(28))


def test_rotary_bases_and_factor_by_layer_kind_in_old_and_new_spelling() -> None:
    """Local layers turn with base 1e4 and unscaled; global ones with 1e6, divided by 8 in the 4B and larger."""
    old = {
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "sliding_window_pattern": 3,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }
    new = {
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    expected = [(1e4, 1.0), (1e4, 1.0), (1e6, 8.0)] * 2
    for config in map(read_hf, (old, new)):
        assert [(layer.rope_theta, layer.rope_scale) for layer in config.layers] == expected
    assert read_hf(old) == read_hf(new)


def test_gemma_3_without_rope_scaling_has_factor_1_everywhere() -> None:
    config = read_hf({"model_type": "gemma3_text", "rope_scaling": None})
    assert {(layer.attention.window, layer.rope_theta, layer.rope_scale) for layer in config.layers} == {
        (4096, 1e4, 1.0),
        (None, 1e6, 1.0),
    }


@pytest.mark.parametrize("spelling", [{"rope_theta": 5e3}, {"rope_parameters": {"rope_theta": 5e3}}])
def test_gemma_1_rope_theta_in_both_spellings(spelling: dict[str, Any]) -> None:
    assert read_hf({"model_type": "gemma", **spelling}).layers[0].rope_theta == 5e3


def test_the_scale_follows_head_dim_in_gemma_1_and_query_pre_attn_scalar_later() -> None:
    gemma_1 = read_hf({"model_type": "gemma", "head_dim": 64})
    assert gemma_1.layers[0].attention.scale == 64**-0.5
    values = {"head_dim": 128, "query_pre_attn_scalar": 144}
    for model_type in ("gemma2", "gemma3_text"):
        assert read_hf({"model_type": model_type, **values}).layers[0].attention.scale == 144**-0.5


def test_a_gemma_3_with_images_gives_its_text_model_and_the_outer_stop_tokens() -> None:
    outer = {
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34},
    }
    config = read_hf(outer)
    assert (config.model_type, config.hidden_size, len(config.layers)) == ("gemma3_text", 2560, 34)
    assert (config.vocab_size, config.layers[0].attention.num_kv_heads) == (262_208, 4)
    assert config.eos_token_ids == (1, 106)


@pytest.mark.parametrize(("value", "expected"), [(1, (1,)), ([1, 107], (1, 107)), (None, ())])
def test_eos_token_id_may_be_one_or_a_list(value: object, expected: tuple[int, ...]) -> None:
    assert read_hf({"model_type": "gemma2", "eos_token_id": value}).eos_token_ids == expected


@pytest.mark.parametrize(
    "activation",
    [
        {"hidden_act": "gelu"},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"hidden_act": "gelu", "hidden_activation": None},
        {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"},
    ],
)
def test_every_spelling_of_the_tanh_gelu_is_accepted(activation: dict[str, Any]) -> None:
    assert read_hf({"model_type": "gemma", **activation}).model_type == "gemma"


@pytest.mark.covers("S08")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_bias", True),
        ("use_bidirectional_attention", True),
        ("tie_word_embeddings", False),
        ("quantization_config", {"bits": 4}),
        ("hidden_act", "silu"),
        ("hidden_activation", "gelu"),
        ("layer_types", ["full_attention"]),
        ("head_dim", "256"),
        ("num_hidden_layers", 0),
        ("vocab_size", True),
        ("sliding_window", None),
        ("query_pre_attn_scalar", 0),
        ("rope_theta", -1.0),
        ("num_key_value_heads", 3),
        ("eos_token_id", "1"),
        ("model_type", "gemma4"),
        ("model_type", None),
    ],
)
def test_what_would_change_the_arithmetic_is_refused_by_key_and_value(key: str, value: object) -> None:
    config: dict[str, Any] = {"model_type": "gemma2", "num_hidden_layers": 2, key: value}
    with pytest.raises(ConfigError, match=re.escape(f"{key} = {value!r}")):
        read_hf(config)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, "rope_type = 'yarn'"),
        ({"type": "dynamic", "factor": 2.0}, "rope_type = 'dynamic'"),
        ({"rope_type": "linear", "factor": None}, "rope factor = None"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ],
)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_other_rotary_embeddings_are_refused(spelling: str, rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_hf({"model_type": "gemma", spelling: rope})


def test_an_unknown_kind_of_layer_is_refused() -> None:
    layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ConfigError, match=r"layer_types = \['chunked_attention'\]"):
        read_hf({"model_type": "gemma2", "num_hidden_layers": 2, "layer_types": layer_types})


def test_gemma_3_refuses_rope_parameters_without_layer_kinds() -> None:
    with pytest.raises(ConfigError, match="rope_theta"):
        read_hf({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1e4}})


def test_gguf_of_the_270m_equals_its_config_json() -> None:
    config_json = {
        "model_type": "gemma3_text",
        "vocab_size": 10,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "max_position_embeddings": 32768,
        "sliding_window": 512,
        "query_pre_attn_scalar": 256,
        "eos_token_id": 1,
    }
    assert read_gguf(GGUF_270M) == read_hf(config_json)


@pytest.mark.parametrize(("architecture", "num_layers"), [("gemma2", 46), ("gemma3", 62)])
def test_gguf_of_a_27b_scales_by_hidden_size_over_heads(architecture: str, num_layers: int) -> None:
    metadata = gguf(
        architecture,
        **{
            f"{architecture}.block_count": num_layers,
            f"{architecture}.attention.head_count": 32,
            f"{architecture}.attention.head_count_kv": 16,
            f"{architecture}.attention.key_length": 128,
            f"{architecture}.attention.value_length": 128,
            f"{architecture}.embedding_length": 4608,
        },
    )
    assert read_gguf(metadata).layers[0].attention.scale == 144**-0.5


def test_gguf_rope_scaling_is_for_full_layers_and_softcaps_and_stop_tokens_are_read() -> None:
    scaled = gguf("gemma3", **{"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0})
    layers = read_gguf(scaled).layers
    assert (layers[0].rope_scale, layers[5].rope_scale) == (1.0, 8.0)
    capped = gguf(
        "gemma2",
        **{
            "gemma2.attn_logit_softcapping": 40.0,
            "gemma2.final_logit_softcapping": 20.0,
            "gemma2.rope.freq_base": 1e4,
            "tokenizer.ggml.eot_token_id": 107,
        },
    )
    config = read_gguf(capped)
    assert (config.layers[0].attention.softcap, config.final_softcap) == (40.0, 20.0)
    assert config.eos_token_ids == (1, 107)


@pytest.mark.parametrize(
    "changes",
    [
        {"general.architecture": "llama"},
        {"gemma3.attention.key_length": None},
        {"gemma3.attention.value_length": 128},
        {"gemma3.rope.scaling.type": "yarn"},
    ],
)
def test_gguf_that_is_not_understood_is_refused_by_key(changes: dict[str, Any]) -> None:
    key = next(iter(changes)).split(".")[-1]
    with pytest.raises(ConfigError, match=f"{key}|rope_type"):
        read_gguf(GGUF_270M | changes)


@pytest.mark.parametrize(
    ("config", "num_parameters"),
    [
        (
            {
                "model_type": "gemma",
                "hidden_size": 2048,
                "intermediate_size": 16384,
                "num_hidden_layers": 18,
                "num_attention_heads": 8,
                "num_key_value_heads": 1,
            },
            2_506_172_416,
        ),
        ({"model_type": "gemma"}, 8_537_680_896),
        ({"model_type": "gemma2"}, 2_614_341_888),
        (
            {
                "model_type": "gemma3_text",
                "vocab_size": 262_144,
                "hidden_size": 1152,
                "intermediate_size": 6912,
                "num_attention_heads": 4,
                "num_key_value_heads": 1,
            },
            999_885_952,
        ),
    ],
)
def test_expected_weights_add_up_to_the_published_sizes(config: dict[str, Any], num_parameters: int) -> None:
    total = 0
    for shape in expected_weights(read_hf(config)).values():
        size = 1
        for dimension in shape:
            size *= dimension
        total += size
    assert total == num_parameters
