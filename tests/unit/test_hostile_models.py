"""Configurations, tokenizers and code that were made to do harm, or are merely broken: refused for a reason,
before memory is taken in proportion to what they claim, and never executed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.chat_template import ChatMessage, render_chat
from server.engine.models.config import ConfigError
from server.engine.models.config_reader import read_hf
from server.gguf_tokenizer import GGUFTokenizerError, tokenizer_json
from server.model_source import resolve
from server.runtime import _read_model
from server.tokenizer import Tokenizer, TokenizerError
from tests.fixtures_tokenizers import make_tiny_tokenizer_json, tiny_vocabulary
from tests.one_torch_thread import one_torch_thread
from tests.unit.hostile_models import HUGE, MANY, STRANGE, arena, cache, gguf_content, model, refusal, start

__all__ = ["arena", "cache", "gguf_content", "model", "one_torch_thread"]

SOURCES = sorted((Path(__file__).parents[2] / "server").rglob("*.py"))


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_is_mistreated_here_is_served_when_it_is_whole(
    model: Path, gguf_content: bytes, tmp_path: Path
) -> None:
    start(model)
    (tmp_path / "m.gguf").write_bytes(gguf_content)
    start(tmp_path / "m.gguf")


# --- code --------------------------------------------------------------------------------------------------


@pytest.mark.covers("S07")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "w.pkl", "w.ckpt"])
def test_weights_in_pickles_are_refused_with_the_way_out(model: Path, name: str) -> None:
    (model / "model.safetensors").rename(model / name)
    assert "convert the weights to safetensors" in refusal(model)


@pytest.mark.covers("S06", "S07", "S08")
def test_nothing_in_the_server_can_run_code_from_a_file() -> None:
    """Neither pickles nor templates nor modules: what could do it is imported nowhere and called nowhere."""
    imports = r"^ *(?:import|from) +(?:jinja2|_?pickle|marshal|shelve|dill|joblib|runpy|imp)\b"
    calls = r"(?<![\w.])(?<!def )(?:eval|exec|compile|__import__)\(|\b(?:torch|np|numpy)\.load\("
    for source in SOURCES:
        assert re.findall(f"{imports}|{calls}", source.read_text(), re.MULTILINE) == [], source


TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch %s') }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ 'a' * 10**9 }}",
]


@pytest.mark.covers("S06")
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_in_the_model_s_directory_changes_no_token(model: Path, template: str) -> None:
    trace = model.parent / "exploded"

    def rendered() -> list[int]:
        tokenizer = _read_model(resolve(str(model)))[0]
        return render_chat([ChatMessage("user", "hello")], tokenizer).token_ids(tokenizer)

    expected = rendered()
    hostile = template.replace("%s", str(trace))
    (model / "chat_template.jinja").write_text(hostile)
    (model / "chat_template.json").write_text(json.dumps({"chat_template": hostile}))
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": hostile}))
    assert rendered() == expected
    assert not trace.exists()


@pytest.mark.covers("S08")
def test_modules_that_the_configuration_names_are_not_imported(model: Path) -> None:
    trace = model.parent / "exploded"
    (model / "evil.py").write_text(f"open({str(trace)!r}, 'w')")
    auto_map = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "evil.Evil")
    for name in ("config.json", "generation_config.json"):
        edit_json(model / name, auto_map=auto_map, trust_remote_code=True)
    (model / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    start(model)
    assert not trace.exists()


# --- config.json -------------------------------------------------------------------------------------------

CONFIGURATIONS: list[tuple[str, Any]] = [
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", 7),
    ("vocab_size", 10**9),
    ("vocab_size", 300),
    ("hidden_size", 10**12),
    ("intermediate_size", 2**63),
    ("head_dim", -16),
    ("head_dim", 10**6),
    ("head_dim", 16.0),
    ("num_attention_heads", 10**9),
    ("num_key_value_heads", 0),
    ("num_key_value_heads", 3),
    ("max_position_embeddings", 10**18),
    ("sliding_window", -1),
    ("rms_norm_eps", HUGE),
    ("rms_norm_eps", float("inf")),
    ("query_pre_attn_scalar", float("nan")),
    ("final_logit_softcapping", -30.0),
    ("layer_types", [["full_attention"]] * 6),
    ("layer_types", [1, "x", None, {}, [], 2.0]),
    ("layer_types", "full_attention"),
    ("rope_parameters", "linear"),
    ("rope_parameters", {"full_attention": [1], "sliding_attention": None}),
    ("rope_parameters", {"full_attention": {"rope_theta": float("inf")}}),
    ("eos_token_id", [[1]]),
    ("eos_token_id", {"a": 1}),
    ("model_type", ["gemma3_text"]),
    ("quantization_config", {"quant_method": "x" * 10**6}),
]


@pytest.mark.covers("S08")
@pytest.mark.parametrize(("key", "value"), CONFIGURATIONS, ids=lambda value: repr(value)[:40])
def test_a_configuration_that_is_absurd_or_a_lie_is_refused(model: Path, key: str, value: Any) -> None:
    edit_json(model / "config.json", **{key: value})
    message = refusal(model)
    named = "rope_" if key.startswith("rope_") else key
    assert named in message or "do not fit" in message or "do not belong together" in message


KEYS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "eos_token_id",
    "sliding_window",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "layer_types",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rope_local_base_freq",
    "hidden_activation",
    "tie_word_embeddings",
    "quantization_config",
]


@pytest.mark.covers("S08")
@settings(MANY, max_examples=80)
@given(
    model_type=st.sampled_from(["gemma", "gemma2", "gemma3_text"]),
    values=st.dictionaries(st.sampled_from(KEYS), STRANGE, min_size=1, max_size=3),
)
def test_no_configuration_gets_past_config_error(model_type: str, values: dict[str, Any]) -> None:
    try:
        config = read_hf({"model_type": model_type, **values})
        config.kv_groups()
    except ConfigError:
        return
    assert len(config.layers) <= 1024


# --- files that are others ---------------------------------------------------------------------------------


@pytest.mark.covers("S07")
def test_the_links_of_a_hub_cache_are_followed(model: Path) -> None:
    blobs = model.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(blobs / f"{number:064x}")
        file.symlink_to(f"../blobs/{number:064x}")
    start(model)


@pytest.mark.covers("S07")
def test_a_shard_that_is_a_link_to_something_else_is_refused_without_telling_what_is_in_it(model: Path) -> None:
    secret = model.parent / "secret"
    secret.write_text("hunter2 " * 100)
    (model / "a.safetensors").symlink_to(secret)
    index = {"weight_map": {"model.norm.weight": "a.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "hunter2" not in refusal(model)


@pytest.mark.covers("S07", "S08", "S09")
@pytest.mark.parametrize("target", ["/dev/zero", "pipe"])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"]
)
def test_a_file_without_an_end_is_refused(model: Path, name: str, target: str) -> None:
    (model / name).unlink()
    if target == "pipe":
        os.mkfifo(model / name)
    else:
        (model / name).symlink_to(target)
    assert "regular file" in refusal(model)


@pytest.mark.covers("S07")
@pytest.mark.parametrize(
    "weight_map",
    [
        None,
        [],
        {},
        {"model.norm.weight": 1},
        {"model.norm.weight": ["a"]},
        {"model.norm.weight": "/etc/passwd"},
        {"model.norm.weight": "../model.safetensors"},
    ],
)
def test_an_index_that_names_no_shards_beside_it_is_refused(model: Path, weight_map: object) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "model.safetensors.index.json" in refusal(model)


# --- vocabularies ------------------------------------------------------------------------------------------


@pytest.mark.covers("S09")
def test_pieces_whose_merges_would_take_minutes_are_refused() -> None:
    pieces, types, scores = tiny_vocabulary()
    long = ["a" * length for length in range(900, 1000)] + [f"{number:0999}" for number in range(400)]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces + long,
        "tokenizer.ggml.token_type": types + [1] * len(long),
        "tokenizer.ggml.scores": scores + [0.0] * len(long),
    }
    with pytest.raises(GGUFTokenizerError, match="longer than any vocabulary's"):
        tokenizer_json(metadata)


def tokenizer_with(change: Callable[[dict[str, Any]], object]) -> bytes:
    content = json.loads(make_tiny_tokenizer_json())
    change(content)
    return json.dumps(content).encode()


def with_a_regular_expression(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["pattern"] = {"Regex": "(a+)+$"}


def with_one_in_a_sequence(content: dict[str, Any]) -> None:
    hidden = {"type": "Replace", "pattern": {"Regex": "(a|a)*$"}, "content": ""}
    content["normalizer"] = {"type": "Sequence", "normalizers": [content["normalizer"], hidden]}


def with_a_long_replacement(content: dict[str, Any]) -> None:
    content["normalizer"]["content"] = "▁" * 10**6


def of_another_model(content: dict[str, Any]) -> None:
    """Of more tokens than the embedding has rows."""
    content["added_tokens"] += [
        content["added_tokens"][0]
        | {"id": len(content["model"]["vocab"]) + number, "content": f"<new{number}>"}
        for number in range(3)
    ]


def with_control_tokens_beyond_the_rows(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["<bos>"] = 10**9
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<bos>"]


def without_a_start_of_sequence(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["<b_o_s>"] = content["model"]["vocab"].pop("<bos>")
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<bos>"]


def nested(content: dict[str, Any]) -> None:
    for _ in range(150):
        content["normalizer"] = {"type": "Sequence", "normalizers": [content["normalizer"]]}


@pytest.mark.covers("S09")
@pytest.mark.parametrize(
    "change",
    [
        with_a_regular_expression,
        with_one_in_a_sequence,
        with_a_long_replacement,
        of_another_model,
        with_control_tokens_beyond_the_rows,
        without_a_start_of_sequence,
        nested,
    ],
)
def test_a_tokenizer_that_is_a_trap_or_another_model_s_is_refused(
    model: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    (model / "tokenizer.json").write_bytes(tokenizer_with(change))
    assert "tokenizer" in refusal(model)


@pytest.mark.covers("S09")
def test_a_tokenizer_far_smaller_than_the_embedding_is_another_model_s(tiny_tokenizer: Tokenizer) -> None:
    tiny_tokenizer.check_fits(tiny_tokenizer.vocab_size + 1024)
    with pytest.raises(TokenizerError, match="do not belong together"):
        tiny_tokenizer.check_fits(tiny_tokenizer.vocab_size + 1025)


@pytest.mark.covers("S09")
def test_the_official_tokenizer_fits_the_models_without_images(gemma3_tokenizer: Tokenizer) -> None:
    for num_embeddings in (262_144, 262_145, 262_208):
        gemma3_tokenizer.check_fits(num_embeddings)
    with pytest.raises(TokenizerError, match="do not belong together"):
        gemma3_tokenizer.check_fits(256_000)


@pytest.mark.covers("S09")
def test_a_tokenizer_of_hundreds_of_megabytes_is_refused_unread(model: Path) -> None:
    os.truncate(model / "tokenizer.json", 1 << 30)
    assert "regular file of at most" in refusal(model)


PARTS = ["normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "added_tokens", "truncation"]


@pytest.mark.covers("S09")
@MANY
@given(
    part=st.sampled_from(PARTS),
    inner=st.sampled_from(
        ["type", "vocab", "merges", "unk_token", "content", "decoders", "id", "pattern", None]
    ),
    value=st.one_of(
        STRANGE,
        st.sampled_from(["<pad>", "BPE", "Unigram", "WordPiece", "WordLevel", "Sequence", "ByteLevel"]),
        st.dictionaries(st.text(max_size=4), st.integers(-1, 2**32), max_size=4),
        st.lists(st.one_of(st.text(max_size=5), st.lists(st.text(max_size=3), max_size=3)), max_size=3),
    ),
)
def test_no_damage_to_a_tokenizer_gets_past_its_error(
    arena: Path, part: str, inner: str | None, value: Any
) -> None:
    def change(content: dict[str, Any]) -> None:
        target = content[part][0] if part == "added_tokens" else content[part]
        if inner is None or not isinstance(target, dict):
            content[part] = value
        else:
            target[inner] = value

    file = arena / "tokenizer.json"
    file.write_bytes(tokenizer_with(change))
    try:
        tokenizer = Tokenizer.from_file(file)
        tokenizer.check_fits(tokenizer.vocab_size)
        tokenizer.decode(tokenizer.encode_prompt("a user <bos> é"))
    except TokenizerError:
        pass
