"""The names of Gemma's tensors in GGUF files, translated to those of transformers without "model.".

Source: llama.cpp's gguf-py/gguf/constants.py (TENSOR_NAMES) and tensor_mapping.py. Gemma's query and key rows
are not permuted in GGUF: its rotary embedding pairs dimension i with i + head_dim/2 in both formats.
"""

from __future__ import annotations

import re

_OF_MODEL = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
_OF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYER_TENSOR = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.weight")


def checkpoint_name(gguf_name: str, post_norms: bool) -> str | None:
    """The name in a transformers checkpoint, or None if Gemma has no such tensor.

    `ffn_norm` is the norm before the MLP in every generation. Gemma 1 calls it post_attention_layernorm; where
    there are norms after attention and MLP too (`post_norms`), that name belongs to the norm after attention.
    """
    if gguf_name in _OF_MODEL:
        return _OF_MODEL[gguf_name]
    match = _LAYER_TENSOR.fullmatch(gguf_name)
    if match is None:
        return None
    layer, kind = match.groups()
    if kind == "ffn_norm":
        name: str | None = "pre_feedforward_layernorm" if post_norms else "post_attention_layernorm"
    else:
        name = _OF_LAYER.get(kind)
    return None if name is None else f"layers.{layer}.{name}.weight"
