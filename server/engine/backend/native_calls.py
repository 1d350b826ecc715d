"""The structs of csrc/calls.h, program.h and sampling_calls.h and the functions of csrc/api.cpp, for ctypes.

Fields must match line by line.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_float, c_int32, c_int64, c_void_p
from typing import ClassVar

_Fields = list[tuple[str, type]]

F32 = 0
BF16 = 1
INT8 = 2


class PackCall(ctypes.Structure):
    _fields_: ClassVar[_Fields] = [
        ("type", c_int32),
        ("source", c_void_p),
        ("scales", c_void_p),
        ("packed", c_void_p),
        ("outputs", c_int64),
        ("inputs", c_int64),
    ]


class EmbedCall(ctypes.Structure):
    _fields_: ClassVar[_Fields] = [
        ("type", c_int32),
        ("weight_type", c_int32),
        ("packed", c_void_p),
        ("inputs", c_int64),
        ("ids", c_void_p),
        ("rows", c_int64),
        ("scale", c_float),
        ("out", c_void_p),
    ]


class LinearCall(ctypes.Structure):
    _fields_: ClassVar[_Fields] = [
        ("type", c_int32),
        ("weight_type", c_int32),
        ("x", c_void_p),
        ("rows", c_int64),
        ("packed", c_void_p),
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("out", c_void_p),
        ("logits", c_int32),
        ("softcap", c_float),
        ("x32", c_void_p),
    ]


class NormCall(ctypes.Structure):
    _fields_: ClassVar[_Fields] = [
        ("type", c_int32),
        ("x", c_void_p),
        ("residual", c_void_p),
        ("weight", c_void_p),
        ("eps", c_float),
        ("rows", c_int64),
        ("width", c_int64),
        ("out", c_void_p),
    ]


class GegluCall(ctypes.Structure):
    _fields_: ClassVar[_Fields] = [
        ("type", c_int32),
        ("gate_up", c_void_p),
        ("rows", c_int64),
        ("width", c_int64),
        ("out", c_void_p),
    ]


class AttentionCall(ctypes.Structure):
    _fields_: ClassVar[_Fields] = [
        ("type", c_int32),
        ("qkv", c_void_p),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("window", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("eps", c_float),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("group", c_int32),
        ("rope", c_int32),
        ("out", c_void_p),
        ("tokens", c_int64),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("sequences", c_int64),
        ("query_start", c_void_p),
        ("seq_lens", c_void_p),
        ("block_table", c_void_p),
        ("table_width", c_int64),
        ("slots", c_void_p),
        ("block_size", c_int32),
        ("q", c_void_p),
        ("partials", c_void_p),
        ("partial_stride", c_int64),
        ("items", c_void_p),
        ("num_items", c_int64),
        ("split", c_void_p),
        ("num_split", c_int64),
    ]


class SampleRow(ctypes.Structure):
    _fields_: ClassVar[_Fields] = [
        ("temperature", c_double),
        ("top_p", c_double),
        ("min_p", c_double),
        ("top_k", c_int64),
        ("uniform", c_double),
        ("num_top", c_int64),
        ("bias_ids", c_void_p),
        ("bias", c_void_p),
        ("num_bias", c_int64),
        ("banned_ids", c_void_p),
        ("num_banned", c_int64),
        ("seen_ids", c_void_p),
        ("seen_counts", c_void_p),
        ("num_seen", c_int64),
        ("repetition_penalty", c_double),
        ("presence_penalty", c_double),
        ("frequency_penalty", c_double),
        ("allowed", c_void_p),
        ("listed_ids", c_void_p),
        ("num_listed", c_int64),
    ]


class SampleResult(ctypes.Structure):
    _fields_: ClassVar[_Fields] = [
        ("token", c_int64),
        ("fault", c_int64),
        ("logprob", c_double),
        ("num_top", c_int64),
        ("rank", c_int64),
    ]


class SampleCall(ctypes.Structure):
    _fields_: ClassVar[_Fields] = [
        ("logits", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("vocab_size", c_int64),
        ("suppressed", c_void_p),
        ("num_suppressed", c_int64),
        ("params", POINTER(SampleRow)),
        ("few", c_int64),
        ("results", POINTER(SampleResult)),
        ("top_width", c_int64),
        ("top_ids", c_void_p),
        ("top_logprobs", c_void_p),
        ("kernels", c_void_p),
    ]


class LogprobsCall(ctypes.Structure):
    _fields_: ClassVar[_Fields] = [
        ("logits", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("chosen", c_void_p),
        ("num_top", c_void_p),
        ("results", POINTER(SampleResult)),
        ("top_width", c_int64),
        ("top_ids", c_void_p),
        ("top_logprobs", c_void_p),
        ("kernels", c_void_p),
    ]


class Operation(ctypes.Structure):
    _fields_: ClassVar[_Fields] = [("kind", c_int32), ("call", c_void_p)]


class RopeFrequencies(ctypes.Structure):
    _fields_: ClassVar[_Fields] = [("frequencies", c_void_p), ("half", c_int64)]


class ProgramCall(ctypes.Structure):
    _fields_: ClassVar[_Fields] = [
        ("operations", c_void_p),
        ("num_operations", c_int64),
        ("ropes", c_void_p),
        ("num_ropes", c_int64),
        ("num_groups", c_int64),
    ]


class AttentionGroup(ctypes.Structure):
    _fields_: ClassVar[_Fields] = [
        ("sequences", c_int64),
        ("query_start", c_void_p),
        ("seq_lens", c_void_p),
        ("block_table", c_void_p),
        ("table_width", c_int64),
        ("slots", c_void_p),
        ("block_size", c_int32),
    ]


class StepCall(ctypes.Structure):
    _fields_: ClassVar[_Fields] = [
        ("tokens", c_int64),
        ("ids", c_void_p),
        ("positions", c_void_p),
        ("groups", c_void_p),
    ]


KINDS: dict[type[ctypes.Structure], int] = {
    EmbedCall: 0,
    LinearCall: 1,
    NormCall: 2,
    GegluCall: 3,
    AttentionCall: 4,
}
"""Of csrc/program.h: which operations a program may consist of."""


def declare(library: ctypes.CDLL) -> None:
    """Tells ctypes the functions' types. ctypes lets go of the GIL while they run."""
    for name in ("gemma_processor_level", "gemma_built_level"):
        getattr(library, name).argtypes = []
        getattr(library, name).restype = c_int32
    library.gemma_create.argtypes = [c_int32, c_int32]
    library.gemma_create.restype = c_void_p
    library.gemma_destroy.argtypes = [c_void_p]
    library.gemma_destroy.restype = None
    library.gemma_packed_size.argtypes = [c_int32, c_int64, c_int64]
    library.gemma_packed_size.restype = c_int64
    library.gemma_pack.argtypes = [c_void_p, POINTER(PackCall)]
    library.gemma_pack.restype = None
    library.gemma_linear.argtypes = [c_void_p, POINTER(LinearCall)]
    library.gemma_linear.restype = None
    library.gemma_run.argtypes = [c_void_p, POINTER(ProgramCall), POINTER(StepCall)]
    library.gemma_run.restype = None
    library.gemma_sample.argtypes = [c_void_p, POINTER(SampleCall)]
    library.gemma_sample.restype = None
    library.gemma_logprobs.argtypes = [c_void_p, POINTER(LogprobsCall)]
    library.gemma_logprobs.restype = None
