"""How often kernels would be compiled for steps of many shapes: a program for `test_compilation.py`, since a
process in which Triton interprets cannot tell.

Prints JSON: for each kernel, the number of its variants. Nothing is computed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from server.engine.backend.base import AttentionLayer
from server.engine.backend.triton.backend import TritonBackend
from server.engine.device_step.inputs import StepArrays
from server.engine.device_step.layout import StepLayout, StepShape
from server.engine.dtype import DType
from server.engine.models.config import AttentionSpec, KVGroupSpec, LayerSpec

BLOCK_SIZE = 16
MAX_BLOCKS = 4
SPEC = AttentionSpec(num_heads=8, num_kv_heads=1, head_dim=256, scale=1 / 16, window=None, softcap=None)
SHAPES = [(tokens, seqs) for tokens in (17, 18, 20, 32, 33) for seqs in (1, 2, 3, 4, 16, 17)]
"""New tokens and sequences, in which numbers from 1 to multiples of 16 occur."""


def main() -> None:
    variants: dict[str, set[str]] = defaultdict(set)
    compiler = make_backend(GPUTarget("cuda", 90, 32))

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, compiler)
        parameters, specialization, launch = bind(*arguments, **options)
        constants = [
            parameters[name]
            for name, kind in zip(parameters, specialization, strict=True)
            if kind[0] == "constexpr"
        ]
        variants[kernel.__name__].add(repr((specialization, constants, launch)))

    JITFunction.run = record
    backend = TritonBackend(torch.device("cpu"), DType.BFLOAT16)
    group = KVGroupSpec("full", None, (0,), SPEC.num_kv_heads, SPEC.head_dim)
    cache = backend.allocate_kv(group, MAX_BLOCKS, BLOCK_SIZE)[0]
    table = torch.zeros(10, SPEC.head_dim, dtype=torch.bfloat16)
    for num_tokens, num_seqs in SHAPES:
        layout = StepLayout(
            StepShape(num_tokens, num_seqs, num_seqs), 2, MAX_BLOCKS, {"top_k": np.dtype(np.int32)}
        )
        buffer = torch.zeros(layout.num_words, dtype=torch.int32)
        step = StepArrays.of(buffer, layout, BLOCK_SIZE, max_query_len=17, max_seq_len=33).inputs
        qkv = torch.zeros(num_tokens, (SPEC.num_heads + 2) * SPEC.head_dim, dtype=torch.bfloat16)
        backend.embed(table, 1.0, step)
        for number in range(2):
            layer: Any = AttentionLayer.of(LayerSpec(SPEC, 1e4, 1.0), number, None, None, 1e-6)
            backend.attention(qkv, layer, cache, step)
    print(json.dumps({name: len(found) for name, found in variants.items()}))


if __name__ == "__main__":
    main()
