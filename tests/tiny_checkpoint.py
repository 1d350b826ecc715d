"""A checkpoint of a few thousand random weights, in the layout that transformers writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from tests.fixtures_tokenizers import make_tiny_tokenizer, make_tiny_tokenizer_json

CONTEXT = 512


def write_tiny_checkpoint(directory: Path, context: int = CONTEXT, more_control: Sequence[str] = ()) -> Path:
    """A Gemma 3 with a window of 8 tokens and the tiny tokenizer; its greedy output is long and varied."""
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=make_tiny_tokenizer(more_control).vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=context,
        sliding_window=8,
        eos_token_id=1,
        bos_token_id=2,
        pad_token_id=0,
        initializer_range=0.5,
    )
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        # Embeddings as large as the layers' outputs would make the tied head repeat the last token for ever.
        model.model.embed_tokens.weight.mul_(0.05)
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_bytes(make_tiny_tokenizer_json(more_control))
    return directory
