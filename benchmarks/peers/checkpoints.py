"""What all engines serve: one set of bf16 weights as a Hugging Face directory and as a GGUF file.

Two models: the embedded Gemma 3 270M, whose GGUF file is decoded once, and a Gemma 1 of 2B's shape with random
weights, since only the arithmetic counts there. The GGUF file is made from the directory, so that every engine
has the same numbers. Vocabularies come from the embedded file; the smaller one is the beginning of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
)
from safetensors.torch import save_file
from torch import Tensor

from server import embedded_model
from server.engine.dtype import DType
from server.engine.models.config import FULL, SLIDING, GemmaConfig, expected_weights
from server.engine.models.config_reader import read_hf
from server.engine.models.gguf import Metadata, read_metadata
from server.engine.models.loader import open_checkpoint
from server.gguf_tokenizer import tokenizer_json

_ARCHITECTURES = {"gemma": "GemmaForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}
_GGUF_ARCHITECTURES = {"gemma": MODEL_ARCH.GEMMA, "gemma3_text": MODEL_ARCH.GEMMA3}
_CONTROL_IDS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}

SHAPE_2B = read_hf(
    {
        "model_type": "gemma",
        "vocab_size": 256_000,
        "hidden_size": 2048,
        "intermediate_size": 16_384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "max_position_embeddings": 8192,
    }
)
"""Gemma 1 2B (arXiv 2403.08295, table 1)."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The same weights in the two layouts."""

    name: str
    directory: Path
    """config.json, model.safetensors and tokenizer.json."""
    gguf: Path


def gemma_3_270m(folder: Path) -> Weights:
    """The embedded model in bf16, written below `folder` unless it is there already."""
    source = embedded_model.locate()

    def write(directory: Path) -> None:
        checkpoint = open_checkpoint(source)
        tensors = checkpoint.tensors(DType.BFLOAT16, "cpu")
        write_directory(directory, checkpoint.config, tensors, read_metadata(source))

    return in_both_layouts(folder, "gemma-3-270m", read_metadata(source), write)


def gemma_1_2b_shape(folder: Path) -> Weights:
    """Random weights of Gemma 1 2B's true size in bf16, 5 GB in each layout, below `folder`."""
    vocabulary = read_metadata(embedded_model.locate())

    def write(directory: Path) -> None:
        write_directory(directory, SHAPE_2B, random_weights(SHAPE_2B, seed=0), vocabulary)

    return in_both_layouts(folder, "gemma-1-2b-shape", vocabulary, write)


def random_weights(config: GemmaConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for every weight: normal, scaled so that activations keep their size; norms are zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, shape in expected_weights(config).items():
        if name.endswith("norm.weight"):
            yield name, torch.zeros(shape)
        else:
            values = torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator)
            yield name, values.mul_(shape[-1] ** -0.5)


def write_directory(
    directory: Path, config: GemmaConfig, tensors: Iterable[tuple[str, Tensor]], vocabulary: Metadata
) -> None:
    """Write a model directory in transformers' layout, all weights in bf16.

    `tensors` are named as `expected_weights` names them, norms as w of (1 + w). `vocabulary` is the metadata of
    a GGUF file; as many of its pieces are taken as the embedding has rows.
    """
    directory.mkdir(parents=True, exist_ok=True)
    stored = {f"model.{name}": tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(hf_config(config), indent=2) + "\n", encoding="utf-8")
    (directory / "tokenizer.json").write_bytes(tokenizer_json(_vocabulary(vocabulary, config.vocab_size)))
    (directory / "tokenizer_config.json").write_text(json.dumps(_TOKENIZER_CONFIG, indent=2), encoding="utf-8")


_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "add_bos_token": True,
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False,
}


def hf_config(config: GemmaConfig) -> dict[str, Any]:
    """The config.json of a Gemma 1 or 3, in the spelling that transformers has read since each came out."""
    attention = config.layers[0].attention
    result: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **_CONTROL_IDS,
    }
    groups = {group.name: group for group in config.kv_groups()}
    full = config.layers[groups[FULL].layer_indices[0]]
    result["rope_theta"] = full.rope_theta
    if SLIDING in groups:
        sliding = config.layers[groups[SLIDING].layer_indices[0]]
        result |= {
            "sliding_window": groups[SLIDING].window,
            "layer_types": [
                "full_attention" if layer.attention.window is None else "sliding_attention"
                for layer in config.layers
            ],
            "rope_local_base_freq": sliding.rope_theta,
            "query_pre_attn_scalar": round(attention.scale**-2),
        }
    return result


def write_gguf(path: Path, directory: Path, vocabulary: Metadata) -> None:
    """Write a model directory as a GGUF file: matrices in bf16, norms as 1 + w in float32, as llama.cpp's own
    converter does it.
    """
    checkpoint = open_checkpoint(directory)
    config = checkpoint.config
    architecture = _GGUF_ARCHITECTURES[config.model_type]
    names = get_tensor_name_map(architecture, len(config.layers))
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[architecture])
    _add_hyper_parameters(writer, config)
    _add_vocabulary(writer, _vocabulary(vocabulary, config.vocab_size))
    for name, tensor in checkpoint.tensors(DType.BFLOAT16, "cpu"):
        gguf_name = names.get_name(f"model.{name}", try_suffixes=(".weight",))
        if gguf_name is None:
            raise ValueError(f"GGUF has no name for the tensor {name}")
        if tensor.dtype == torch.bfloat16:
            writer.add_tensor(gguf_name, tensor.view(torch.uint8).numpy(), raw_dtype=GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(gguf_name, (tensor + 1).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_hyper_parameters(writer: GGUFWriter, config: GemmaConfig) -> None:
    attention = config.layers[0].attention
    groups = {group.name: group for group in config.kv_groups()}
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(config.layers))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(attention.num_heads)
    writer.add_head_count_kv(attention.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    writer.add_rope_freq_base(config.layers[groups[FULL].layer_indices[0]].rope_theta)
    if SLIDING in groups and (window := groups[SLIDING].window) is not None:
        writer.add_sliding_window(window)
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)


def _add_vocabulary(writer: GGUFWriter, vocabulary: Metadata) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    lists: dict[str, Any] = dict(vocabulary)
    writer.add_token_list(lists["tokenizer.ggml.tokens"])
    writer.add_token_scores(lists["tokenizer.ggml.scores"])
    writer.add_token_types(lists["tokenizer.ggml.token_type"])
    writer.add_bos_token_id(_CONTROL_IDS["bos_token_id"])
    writer.add_eos_token_id(_CONTROL_IDS["eos_token_id"])
    writer.add_pad_token_id(_CONTROL_IDS["pad_token_id"])
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def _vocabulary(metadata: Metadata, size: int) -> Metadata:
    """The tokenizer's part of a GGUF file's metadata, cut to the first `size` pieces."""
    return {
        key: value[:size] if isinstance(value, list) else value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }


def in_both_layouts(folder: Path, name: str, vocabulary: Metadata, write: Callable[[Path], None]) -> Weights:
    """Whatever is missing is written under another name first, so that what is there is complete."""
    weights = Weights(name, folder / name, folder / f"{name}-bf16.gguf")
    folder.mkdir(parents=True, exist_ok=True)
    if not weights.directory.exists():
        partial = folder / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        write(partial)
        partial.rename(weights.directory)
    if not weights.gguf.exists():
        partial = folder / f"{name}.gguf.partial"
        write_gguf(partial, weights.directory, vocabulary)
        partial.rename(weights.gguf)
    return weights
