"""The one pass over all logits: what each chunk and each block of neighbouring ids amounts to.

A row is read by many programs, so that a single one can use the whole memory bandwidth.
"""

from __future__ import annotations

import triton
import triton.language as tl

from server.engine.backend.triton.sampling_order import INFINITY, MINUS_INFINITY, key_of, logit_of

BLOCK = tl.constexpr(64)
"""Neighbouring ids whose largest logit is kept."""
BLOCKS = tl.constexpr(64)
"""Blocks in a chunk."""


@triton.jit
def scan_chunks(
    logits,
    row_stride,
    vocab_size,
    temperatures,
    top_ps,
    min_ps,
    top_ks,
    chunk_keys,
    chunk_tokens,
    chunk_masses,
    block_keys,
):
    """Grid: (C chunks, S rows). Of each chunk of a row: the key of its largest logit, the lowest id that has
    it, and for rows that need it the fp64 sum of exp((logit - chunk's largest) / temperature), in chunk_* [S,
    C]; of each block in rows that truncate, its largest logit's key, in block_keys [S, C * BLOCKS].

    logits: [S, >= vocab_size]; the parameters are those of `SAMPLING_ARRAYS`, [S].
    """
    chunk, row = tl.program_id(0), tl.program_id(1)
    place = row * tl.num_programs(0) + chunk
    block = chunk * BLOCKS + tl.arange(0, BLOCKS)
    token = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    start = logits + row.to(tl.int64) * row_stride
    logit = tl.load(start + token, mask=token < vocab_size, other=-float("inf")).to(tl.float32)
    key = key_of(logit)
    of_blocks = tl.max(key, axis=1)
    largest = tl.max(of_blocks, axis=0)
    tl.store(chunk_keys + place, largest)
    first = tl.min(tl.where(key == largest, token, 0x7FFFFFFF), axis=1)
    tl.store(chunk_tokens + place, tl.min(first, axis=0))

    temperature = tl.load(temperatures + row).to(tl.float32)
    top_k = tl.load(top_ks + row)
    if (temperature > 0.0) & (top_k != 1):
        cut = (top_k > 0) & (top_k < vocab_size) | (tl.load(min_ps + row) > 0.0)
        if cut | (tl.load(top_ps + row) < 1.0):
            tl.store(block_keys + row.to(tl.int64) * tl.num_programs(0) * BLOCKS + block, of_blocks)
        if cut == 0:
            # A row with a NaN or infinity does not matter, and a chunk without a token weighs nothing.
            is_finite = (largest > MINUS_INFINITY) & (largest < INFINITY)
            reference = tl.where(is_finite, logit_of(largest), 0.0)
            weights = tl.exp((logit - reference) / temperature)
            mass = tl.sum(tl.sum(weights, axis=1).to(tl.float64), axis=0)
            tl.store(chunk_masses + place, mass)
