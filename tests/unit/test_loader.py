from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from server.engine.backend.reference import ReferenceBackend
from server.engine.dtype import DType
from server.engine.models.config import expected_weights
from server.engine.models.config_reader import read_hf
from server.engine.models.loader import LoadError, open_checkpoint
from server.engine.models.safetensors_dir import read_config
from server.engine.models.weights import open_weights

CONFIG: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "eos_token_id": 1,
}
MODEL_TYPES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text"}
"""GGUF's name of the architecture -> transformers' model_type."""


def random_weights(model_type: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = expected_weights(read_hf({"model_type": model_type, **CONFIG}))
    # bf16 values, as in Google's checkpoints.
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A Gemma 3 checkpoint in one file, with the names of a text model."""
    path = tmp_path / "model"
    path.mkdir()
    write_json(path / "config.json", {"model_type": "gemma3_text", **CONFIG})
    save(path / "model.safetensors", random_weights("gemma3_text"))
    return path


def save(path: Path, weights: dict[str, Tensor], prefix: str = "model.") -> None:
    save_file({prefix + name: tensor for name, tensor in weights.items()}, path)


def load(path: Path, dtype: DType = DType.FLOAT32) -> dict[str, Tensor]:
    return dict(open_checkpoint(path).tensors(dtype, "cpu"))


def assert_equal(loaded: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name].float(), tensor.float()), name


# --- GGUF ---------------------------------------------------------------------------------------------------

GGUF_LAYER_NAMES = {
    "gemma": {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
}
GGUF_LAYER_NAMES["gemma2"] = GGUF_LAYER_NAMES["gemma"] | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GGUF_LAYER_NAMES["gemma3"] = GGUF_LAYER_NAMES["gemma2"] | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}


def gguf_tensors(architecture: str, weights: dict[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    names = {"token_embd": "embed_tokens", "output_norm": "norm"}
    for layer in range(CONFIG["num_hidden_layers"]):
        for gguf_name, name in GGUF_LAYER_NAMES[architecture].items():
            names[f"blk.{layer}.{gguf_name}"] = f"layers.{layer}.{name}"
    tensors = {
        f"{gguf_name}.weight": weights[f"{name}.weight"].float().numpy() for gguf_name, name in names.items()
    }
    return {name: tensor + 1 if name.endswith("norm.weight") else tensor for name, tensor in tensors.items()}


def write_gguf(
    path: Path,
    architecture: str,
    tensors: dict[str, np.ndarray[Any, Any]],
    kind: str = "F32",
    extra: Callable[[reference.GGUFWriter], None] = lambda _: None,
) -> None:
    writer = reference.GGUFWriter(path, architecture)
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_key_length(CONFIG["head_dim"])
    writer.add_value_length(CONFIG["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(CONFIG["sliding_window"])
    writer.add_token_list([f"t{index}" for index in range(CONFIG["vocab_size"])])
    writer.add_eos_token_id(1)
    extra(writer)
    for name, tensor in tensors.items():
        raw_type = reference.GGMLQuantizationType["F32" if tensor.ndim == 1 else kind]
        writer.add_tensor(name, reference.quants.quantize(tensor, raw_type), raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("architecture", MODEL_TYPES)
def test_a_gguf_file_gives_the_weights_of_the_checkpoint_it_was_made_from(
    tmp_path: Path, architecture: str
) -> None:
    weights = random_weights(MODEL_TYPES[architecture])
    write_gguf(tmp_path / "m.gguf", architecture, gguf_tensors(architecture, weights))
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.config.model_type == MODEL_TYPES[architecture]
    assert checkpoint.num_parameters == sum(tensor.numel() for tensor in weights.values())
    assert_equal(dict(checkpoint.tensors(DType.FLOAT32, "cpu")), weights)


@pytest.mark.parametrize("kind", ["Q8_0", "F16", "BF16"])
def test_a_quantised_gguf_file_is_decoded(tmp_path: Path, kind: str) -> None:
    weights = random_weights("gemma3_text")
    write_gguf(tmp_path / "m.gguf", "gemma3", gguf_tensors("gemma3", weights), kind)
    loaded = load(tmp_path / "m.gguf", DType.BFLOAT16)
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.allclose(loaded[name].float(), tensor.float(), atol=0.03), name


def test_a_gguf_file_in_4_bits_stays_in_4_bits(tmp_path: Path) -> None:
    weights = random_weights("gemma3_text")
    write_gguf(tmp_path / "m.gguf", "gemma3", gguf_tensors("gemma3", weights), "Q4_0")
    backend: Any = ReferenceBackend(torch.device("cpu"), DType.BFLOAT16, "int4")
    prepared = open_weights(tmp_path / "m.gguf", backend, "cpu", use_cache=False).load(lambda _: None)
    name = "layers.1.self_attn.o_proj.weight"  # whose width is that of blocks
    expected = load(tmp_path / "m.gguf", DType.BFLOAT16)[name].float()
    torch.testing.assert_close(prepared[name].dequantize(), expected, rtol=2**-7, atol=0)


def test_a_gguf_file_with_an_output_layer_of_its_own_is_refused(tmp_path: Path) -> None:
    tensors = gguf_tensors("gemma3", random_weights("gemma3_text"))
    write_gguf(tmp_path / "m.gguf", "gemma3", tensors | {"output.weight": tensors["token_embd.weight"]})
    with pytest.raises(LoadError, match=r"output layer of its own \(output.weight\)"):
        open_checkpoint(tmp_path / "m.gguf")


def test_one_part_of_a_split_gguf_file_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "gemma3", {}, extra=lambda writer: writer.add_uint16("split.count", 3))
    with pytest.raises(LoadError, match=r"one of 3 parts.*llama-gguf-split --merge"):
        open_checkpoint(tmp_path / "m.gguf")


def test_unknown_and_missing_gguf_tensors_are_named(tmp_path: Path) -> None:
    tensors = gguf_tensors("gemma3", random_weights("gemma3_text"))
    del tensors["blk.1.attn_q_norm.weight"]
    tensors["blk.0.attn_q.bias"] = np.zeros(4, np.float32)
    tensors["blk.2.attn_q.weight"] = np.zeros((2, 4), np.float32)
    write_gguf(tmp_path / "m.gguf", "gemma3", tensors)
    with pytest.raises(LoadError) as caught:
        open_checkpoint(tmp_path / "m.gguf")
    assert "1 missing: layers.1.self_attn.q_norm.weight" in str(caught.value)
    assert "2 unexpected: blk.0.attn_q.bias, layers.2.self_attn.q_proj.weight" in str(caught.value)


# --- safetensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model.", ""])
def test_each_known_prefix_is_stripped(directory: Path, prefix: str) -> None:
    save(directory / "model.safetensors", random_weights("gemma3_text"), prefix)
    assert_equal(load(directory), random_weights("gemma3_text"))


def test_norms_come_in_float32_and_the_rest_in_the_dtype_asked_for(directory: Path) -> None:
    for name, tensor in load(directory, DType.BFLOAT16).items():
        assert tensor.dtype == (torch.float32 if tensor.ndim == 1 else torch.bfloat16), name


def test_tensors_outlive_the_file(directory: Path) -> None:
    loaded = load(directory, DType.BFLOAT16)
    with (directory / "model.safetensors").open("r+b") as file:
        file.write(bytes(os.path.getsize(directory / "model.safetensors")))
    assert_equal(loaded, random_weights("gemma3_text"))


def test_shards_are_read_by_their_index(directory: Path) -> None:
    weights = random_weights("gemma3_text")
    write_shards(directory, weights, ["a.safetensors", "b.safetensors"])
    (directory / "model.safetensors").unlink()
    shutil.copy(directory / "a.safetensors", directory / "unrelated.safetensors")
    assert_equal(load(directory), weights)


def write_shards(directory: Path, weights: dict[str, Tensor], files: list[str]) -> None:
    weight_map = {f"model.{name}": files[index % len(files)] for index, name in enumerate(weights)}
    for file in files:
        save(directory / file, {n: t for n, t in weights.items() if weight_map[f"model.{n}"] == file})
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


@pytest.mark.covers("S07")
def test_weights_may_be_symbolic_links_as_in_the_hugging_face_cache(directory: Path) -> None:
    blobs = directory.parent / "blobs"
    blobs.mkdir()
    (directory / "model.safetensors").rename(blobs / "1234")
    (directory / "model.safetensors").symlink_to("../blobs/1234")
    assert_equal(load(directory), random_weights("gemma3_text"))


@pytest.mark.covers("S07")
@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "a/b.safetensors",
        "..",
        "a\\b.safetensors",
        "a\0.safetensors",
        "w.bin",
    ],
)
def test_an_index_cannot_lead_out_of_the_directory(directory: Path, name: str) -> None:
    write_json(directory / "model.safetensors.index.json", {"weight_map": {"model.norm.weight": name}})
    with pytest.raises(LoadError, match=r"only \*\.safetensors files beside it may be named"):
        open_checkpoint(directory)


@pytest.mark.covers("S07")
def test_an_absent_shard_is_named(directory: Path) -> None:
    write_shards(directory, random_weights("gemma3_text"), ["a.safetensors", "b.safetensors"])
    (directory / "b.safetensors").unlink()
    with pytest.raises(
        LoadError, match=r"names b\.safetensors, which is not there; is the download complete\?"
    ):
        open_checkpoint(directory)


def test_the_image_half_of_a_multimodal_checkpoint_is_ignored(directory: Path) -> None:
    write_json(
        directory / "config.json",
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **CONFIG}, "vision_config": {}},
    )
    image_half = {
        "vision_tower.vision_model.embeddings.patch_embedding.weight": torch.zeros(2, 2),
        "multi_modal_projector.mm_input_projection_weight": torch.zeros(3),
    }
    text_half = {
        f"language_model.model.{name}": tensor for name, tensor in random_weights("gemma3_text").items()
    }
    save_file(image_half | text_half, directory / "model.safetensors")
    assert_equal(load(directory), random_weights("gemma3_text"))


def test_names_that_only_look_like_the_image_half_are_unexpected(directory: Path) -> None:
    save(directory / "model.safetensors", {**random_weights("gemma3_text"), "vision_towers": torch.zeros(1)})
    with pytest.raises(LoadError, match="1 unexpected: vision_towers"):
        open_checkpoint(directory)


@pytest.mark.covers("S07")
def test_missing_unexpected_and_misshapen_tensors_are_listed_before_anything_is_read(directory: Path) -> None:
    weights = random_weights("gemma3_text")
    removed = [name for name in weights if "layers.1.mlp" in name or "layers.1.self_attn" in name]
    for name in removed:
        del weights[name]
    weights["layers.0.mlp.up_proj.bias"] = torch.zeros(96)
    weights["norm.weight"] = torch.zeros(65)
    weights["layers.0.self_attn.q_proj.weight"] = torch.zeros(64, 128)
    save(directory / "model.safetensors", weights)
    with pytest.raises(LoadError) as caught:
        open_checkpoint(directory)
    assert len(removed) == 9
    message = str(caught.value)
    assert f"9 missing: {', '.join(removed[:5])} and 4 more." in message
    assert "1 unexpected: layers.0.mlp.up_proj.bias." in message
    assert "2 of another shape: layers.0.self_attn.q_proj.weight (64, 128) instead of (128, 64), " in message
    assert "norm.weight (65,) instead of (64,)" in message


def test_an_output_head_that_repeats_the_embedding_is_dropped(directory: Path) -> None:
    weights = random_weights("gemma3_text")
    head = {"lm_head.weight": weights["embed_tokens.weight"].clone()}
    save_file({f"model.{n}": t for n, t in weights.items()} | head, directory / "model.safetensors")
    assert_equal(load(directory), weights)


@pytest.mark.parametrize("fault", ["value", "shape"])
def test_an_output_head_of_its_own_is_refused(directory: Path, fault: str) -> None:
    weights = random_weights("gemma3_text")
    head = weights["embed_tokens.weight"].clone()
    if fault == "value":
        head[-1, -1] += 1
    else:
        head = head[:-1]
    save_file(
        {f"model.{n}": t for n, t in weights.items()} | {"lm_head.weight": head},
        directory / "model.safetensors",
    )
    with pytest.raises(LoadError, match=r"lm_head\.weight differs from the embedding"):
        open_checkpoint(directory)


def test_a_tensor_stored_twice_is_refused(directory: Path) -> None:
    weights = random_weights("gemma3_text")
    stored = {f"model.{name}": tensor for name, tensor in weights.items()}
    save_file(stored | {"norm.weight": weights["norm.weight"].clone()}, directory / "model.safetensors")
    with pytest.raises(LoadError, match=r"tensor norm\.weight is stored twice"):
        open_checkpoint(directory)


@pytest.mark.covers("S07")
def test_integer_weights_are_refused(directory: Path) -> None:
    weights = random_weights("gemma3_text")
    weights["norm.weight"] = torch.zeros(64, dtype=torch.int8)
    save(directory / "model.safetensors", weights)
    with pytest.raises(LoadError, match=r"tensor model\.norm\.weight in model\.safetensors is of type I8"):
        open_checkpoint(directory)


def cut(content: bytes) -> bytes:
    return content[:-100]


def header_of_16_gb(content: bytes) -> bytes:
    return struct.pack("<Q", 1 << 34) + content[8:]


def offsets_past_the_end(content: bytes) -> bytes:
    header = b'{"model.norm.weight":{"dtype":"F32","shape":[64],"data_offsets":[0,1000000]}}'
    return struct.pack("<Q", len(header)) + header + bytes(256)


def not_safetensors(_: bytes) -> bytes:
    return pickle.dumps({"model.norm.weight": 1})


@pytest.mark.covers("S07")
@pytest.mark.parametrize("damage", [cut, header_of_16_gb, offsets_past_the_end, not_safetensors, lambda _: b""])
def test_a_malformed_safetensors_file_is_refused(directory: Path, damage: Callable[[bytes], bytes]) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(LoadError, match=r"model\.safetensors cannot be read as safetensors"):
        open_checkpoint(directory)


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.covers("S07")
def test_pickles_are_never_opened(directory: Path) -> None:
    trace = directory.parent / "exploded"
    for name in ("pytorch_model.bin", "model.pt"):
        (directory / name).write_bytes(pickle.dumps(Bomb(trace)))
    assert_equal(load(directory), random_weights("gemma3_text"))
    (directory / "model.safetensors").unlink()
    with pytest.raises(LoadError, match="convert the weights to safetensors"):
        open_checkpoint(directory)
    assert not trace.exists()


@pytest.mark.covers("S08")
def test_code_in_the_model_directory_is_never_run(directory: Path) -> None:
    trace = directory.parent / "exploded"
    (directory / "modeling_evil.py").write_text(f"open({str(trace)!r}, 'w')")
    auto_map = {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}}
    write_json(directory / "config.json", {"model_type": "gemma3_text", **CONFIG, **auto_map})
    assert_equal(load(directory), random_weights("gemma3_text"))
    assert not trace.exists()


def test_a_directory_without_weights_says_so(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"has no \*\.safetensors file"):
        open_checkpoint(directory)


@pytest.mark.covers("S08")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json is not valid JSON"),
        ("[" * 100_000, "config.json is not valid JSON"),
        ("[]", "must hold a JSON object, not list"),
        (" " * (33 << 20), "33554432 is the limit"),
    ],
    ids=["cut", "deep", "list", "large"],
)
def test_a_malformed_config_is_refused(directory: Path, content: str, message: str) -> None:
    (directory / "config.json").write_text(content)
    with pytest.raises(LoadError, match=message):
        open_checkpoint(directory)


def test_a_missing_config_is_named(directory: Path) -> None:
    (directory / "config.json").unlink()
    with pytest.raises(LoadError, match=r"model has no config\.json"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [(None, (1,)), ({}, (1,)), ({"eos_token_id": 106}, (1, 106)), ({"eos_token_id": [106, 1]}, (1, 106))],
)
def test_end_of_sequence_ids_join_both_files(
    directory: Path, generation: dict[str, Any] | None, expected: tuple[int, ...]
) -> None:
    if generation is not None:
        write_json(directory / "generation_config.json", generation)
    assert read_config(directory).eos_token_ids == expected
    assert open_checkpoint(directory).config.eos_token_ids == expected
