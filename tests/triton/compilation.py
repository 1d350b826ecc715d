"""Compiles kernels for GPUs that are not there, and says what they would take of them: a program for
`test_compilation.py`, since a process in which Triton interprets cannot compile.

Prints one line of JSON for each kernel: its name, the compute capability, bytes of shared memory of one block
of threads, registers of one thread, and bytes of its stack, to which it spills what finds no
register.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from server.engine.backend.triton import attention, fp8_linear, int4_linear, parts, pointwise, rotary
from server.engine.models.config import AttentionSpec

GEMMA_2B = AttentionSpec(8, 1, 256, 1 / 16, None, None)
GEMMA_7B = AttentionSpec(16, 16, 256, 1 / 16, None, None)
GEMMA_2_27B = AttentionSpec(32, 16, 128, 1 / 12, 4096, 50.0)

INT32 = {"query_start", "seq_lens", "block_table", "positions", "slot_mapping", "token_ids"}
FP32 = {
    *("key_scales", "value_scales", "partial_out", "partial_max", "partial_sum"),
    *("weight", "q_norm", "k_norm", "frequencies", "x_scales", "weight_scales", "scales", "parts"),
}
REAL = {"scale", "softcap", "eps"}
SIZES = {"num_rows", "out_width", "part_blocks", "num_parts", "num_blocks"}
WHOLE = {"table_row_stride", "table_column_stride", "num_seqs", "num_segments", "width", *SIZES}
CACHE = {"keys", "values"}


class Case(NamedTuple):
    name: str
    kernel: Any
    constants: Mapping[str, Any]
    """The kernel's tl.constexpr arguments; None for a pointer that is not given."""
    options: Mapping[str, int]
    types: Mapping[str, str] = {}
    """Of arguments that are otherwise than by default."""

    def signature(self) -> dict[str, str]:
        return {name: self._type(name) for name in self.kernel.arg_names}

    def _type(self, name: str) -> str:
        if name in self.constants:
            return "constexpr"
        if name in self.types:
            return self.types[name]
        if name in REAL:
            return "fp32"
        if name in WHOLE:
            return "i32"
        return "*i32" if name in INT32 else "*fp32" if name in FP32 else "*bf16"


def cases(shared_memory: int) -> Iterator[Case]:
    """Kernels as a GPU with so much shared memory would be given them."""
    gpu = attention.PagedAttention(num_multiprocessors=132, shared_memory=shared_memory)
    for name, spec in {"2b": GEMMA_2B, "7b": GEMMA_7B, "2-27b": GEMMA_2_27B}.items():
        for cache in ("bf16", "fp8e4nv"):
            quantized = cache != "bf16"
            no_scales = {} if quantized else {"key_scales": None, "value_scales": None}
            types = dict.fromkeys(CACHE, f"*{cache}")
            itemsize = 1 if quantized else 2
            launches = {
                "decodes": gpu.plan_decodes(spec, itemsize, num_seqs=256, max_seq_len=8192),
                "few decodes": gpu.plan_decodes(spec, itemsize, num_seqs=1, max_seq_len=8192),
                "chunks": gpu.plan_chunks(spec, itemsize, num_tokens=64),
                "large chunks": gpu.plan_chunks(spec, itemsize, num_tokens=8192),
            }
            for kind, launch in launches.items():
                split = launch.segments > 1
                partial = {} if split else dict.fromkeys(("partial_out", "partial_max", "partial_sum"))
                constants = {
                    **attention.constants_of(spec, 16, quantized=quantized),
                    "DECODES_ONLY": "decodes" in kind,
                    "SPLIT": split,
                    "BLOCK_M": launch.block_m,
                    "TILE": launch.tile,
                    **no_scales,
                    **partial,
                }
                options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
                yield Case(f"attend {name} {cache} {kind}", attention.attend, constants, options, types)
            yield Case(
                f"rotate_and_store {name} {cache}",
                rotary.rotate_and_store,
                {
                    "NUM_HEADS": spec.num_heads,
                    "KV_HEADS": spec.num_kv_heads,
                    "HEAD_DIM": spec.head_dim,
                    "HAS_NORM": True,
                    "QUANTIZED": quantized,
                    **no_scales,
                },
                {"num_warps": 2},
                types,
            )
    linear = fp8_linear.Fp8Linear(num_multiprocessors=132)
    codes = dict.fromkeys(("x", "weight"), "*fp8e4nv")
    for num_rows in (1, 32, 64, 256):
        cut = linear.plan(num_rows, out_width=2048, width=16_384)
        constants = {
            "IS_SPLIT": cut.parts > 1,
            "FEW_ROWS": cut.few_rows,
            "BLOCK_M": cut.block_m,
            "BLOCK_N": cut.block_n,
            "BLOCK_K": cut.block_k,
        }
        options = {"num_warps": cut.num_warps, "num_stages": cut.num_stages}
        out = {"out": "*fp32"} if cut.parts > 1 else {}
        name = f"multiply_codes of {num_rows} rows"
        yield Case(name, fp8_linear.multiply_codes, constants, options, codes | out)
    yield Case("add_parts", parts.add_parts, {"BLOCK": 512}, {"num_warps": 4})
    unscaled = {"BLOCK": 512, "x_scales": None, "weight_scales": None}
    yield Case("add_parts without scales", parts.add_parts, unscaled, {"num_warps": 4})
    packed = dict.fromkeys(("codes", "scaling"), "*i32")
    for num_rows in (1, 32, 64, 256):
        tiles = int4_linear.Int4Linear(num_multiprocessors=132).plan(num_rows, out_width=2048, num_blocks=128)
        constants = {"IS_SPLIT": tiles.parts > 1, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n}
        options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
        out = {"out": "*fp32"} if tiles.parts > 1 else {}
        name = f"multiply_int4 of {num_rows} rows"
        yield Case(name, int4_linear.multiply_int4, constants, options, packed | out)
    rounding = {"codes": "*fp8e4nv"}
    yield Case("quantize_rows", fp8_linear.quantize_rows, {"BLOCK": 32_768}, {"num_warps": 16}, rounding)
    sums = {"NUM_HEADS": 8, "HEAD_DIM": 256, "WINDOW": 0, "TILE": 32, "MAX_SEGMENTS": 64}
    yield Case("add_segments", attention.add_segments, sums, {"num_warps": 4})
    norm = {"HAS_UPDATE": True, "BLOCK": 4096}
    yield Case("rms_norm_rows", pointwise.rms_norm_rows, norm, {"num_warps": 8})
    yield Case("geglu_rows", pointwise.geglu_rows, {"BLOCK": 1024}, {"num_warps": 4})
    yield Case("embed_rows", pointwise.embed_rows, {"BLOCK": 4096}, {"num_warps": 8})
    softcap = {"BLOCK": 2048}
    yield Case("softcap_rows", pointwise.softcap_rows, softcap, {"num_warps": 4}, {"out": "*fp32"})


def compile_case(case: Case, capability: int) -> dict[str, Any]:
    names, signature = case.kernel.arg_names, case.signature()
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        # As at a launch: torch's allocations begin at multiples of 16 bytes, and so do matrices' rows.
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if signature[name].startswith("*") or (name in ("width", "out_width") and signature[name] == "i32")
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(case.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.check_output([tool, "--dump-resource-usage", cubin.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return {
        "kernel": case.name,
        "capability": capability,
        "shared_memory": compiled.metadata.shared,
        "registers": int(found[1]),
        "stack": int(found[2]),
    }


SHARED_MEMORY = {90: 227 << 10, 89: 99 << 10}
"""Bytes that one block of threads can have, by compute capability (CUDA C++ Programming Guide, "Compute
Capabilities"): H100 and L4."""


def main() -> None:
    for capability, shared_memory in SHARED_MEMORY.items():
        for case in cases(shared_memory):
            print(json.dumps(compile_case(case, capability)), flush=True)


if __name__ == "__main__":
    main()
