"""The draw: a row for each program, from what the pass over the logits found (`sampling_scan`)."""

from __future__ import annotations

import triton
import triton.language as tl

from server.engine.backend.triton.sampling_order import (
    INFINITY,
    MINUS_INFINITY,
    UNIT,
    exact_weights,
    key_of,
    logit_of,
    nucleus_target,
    place_of,
    share,
    smallest_key_kept,
    sorted_candidates,
    token_at,
)
from server.engine.backend.triton.sampling_scan import BLOCK, BLOCKS
from server.engine.sampling.arrays import NOT_FINITE_ID, NOTHING_LEFT_ID

NOT_FINITE = tl.constexpr(NOT_FINITE_ID)
NOTHING_LEFT = tl.constexpr(NOTHING_LEFT_ID)
TO_SEARCH = tl.constexpr(-3)
"""Stands for the token of a row that has to be searched (`sampling_search`)."""
FEW = tl.constexpr(256)
"""Tokens that are looked at for a nucleus, or some more."""
LARGEST_UNIFORM = tl.constexpr(1.0 - 2.0**-53)


@triton.jit
def draw_rows(
    logits,
    row_stride,
    vocab_size,
    temperatures,
    top_ps,
    min_ps,
    uniforms,
    top_ks,
    chunk_keys,
    chunk_tokens,
    chunk_masses,
    block_keys,
    num_chunks,
    blocks,
    candidates,
    drawn,
    CHUNKS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Grid: (S,). The token of each row in drawn, int32 [S]: NOT_FINITE, NOTHING_LEFT or TO_SEARCH where
    there is none.

    The first arguments are those of `scan_chunks`. blocks int32, candidates int64: [S, SIZE], scratch.
    CHUNKS: a power of two, >= num_chunks.
    """
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * row_stride
    chunk = tl.arange(0, CHUNKS)
    in_row = chunk < num_chunks
    place = row * num_chunks + chunk
    keys = tl.load(chunk_keys + place, mask=in_row, other=MINUS_INFINITY)
    largest = tl.max(keys, axis=0)
    temperature = tl.load(temperatures + row)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    min_p = tl.load(min_ps + row)
    uniform = tl.load(uniforms + row)
    has_top_k = (top_k > 0) & (top_k < vocab_size)
    is_cut = has_top_k | (min_p > 0.0)

    if largest >= INFINITY:
        tl.store(drawn + row, NOT_FINITE)
    elif largest == MINUS_INFINITY:
        tl.store(drawn + row, NOTHING_LEFT)
    elif (temperature <= 0.0) | (top_k == 1):
        tokens = tl.load(chunk_tokens + place, mask=in_row, other=0x7FFFFFFF)
        tl.store(drawn + row, tl.min(tl.where(keys == largest, tokens, 0x7FFFFFFF), axis=0))
    else:
        masses = tl.zeros((CHUNKS,), tl.float64)
        if is_cut == 0:
            masses = tl.load(chunk_masses + place, mask=in_row, other=0.0)
            below = logit_of(keys).to(tl.float64) - logit_of(largest).to(tl.float64)
            masses *= tl.exp(below / temperature)
        if is_cut | (top_p < 1.0):
            token = _draw_from_top(
                start,
                vocab_size,
                temperature,
                tl.where(has_top_k, top_k, vocab_size),
                top_p,
                min_p,
                uniform,
                largest,
                (tl.sum(masses, axis=0) * UNIT).to(tl.int64),
                block_keys + row * num_chunks * BLOCKS,
                num_chunks * BLOCKS,
                blocks + row * SIZE,
                candidates + row * SIZE,
                CHUNKS * BLOCKS,
                SIZE,
            )
        else:
            token = _draw_from_all(start, vocab_size, temperature, uniform, keys, masses, CHUNKS)
        tl.store(drawn + row, token)


@triton.jit
def _draw_from_all(start, vocab_size, temperature, uniform, keys, masses, CHUNKS: tl.constexpr):
    """Inverts the distribution in the vocabulary's order: over chunks, one's blocks, and inside a block."""
    chunk, rest = _invert(masses, uniform, CHUNKS)
    key = tl.max(tl.where(tl.arange(0, CHUNKS) == chunk, keys, MINUS_INFINITY), axis=0)
    token = chunk * BLOCKS * BLOCK + tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    logit = tl.load(start + token, mask=token < vocab_size, other=-float("inf")).to(tl.float32)
    weights = tl.exp((logit - logit_of(key)) / temperature.to(tl.float32))
    block, rest = _invert(tl.sum(weights, axis=1).to(tl.float64), rest, BLOCKS)

    token = (chunk * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
    logit = tl.load(start + token, mask=token < vocab_size, other=-float("inf")).to(tl.float32)
    highest = tl.max(logit, axis=0).to(tl.float64)
    column, rest = _invert(tl.exp((logit.to(tl.float64) - highest) / temperature), rest, BLOCK)
    return (chunk * BLOCKS + block) * BLOCK + column


@triton.jit
def _invert(masses, uniform, SIZE: tl.constexpr):
    """The first of the masses, fp64 [SIZE], at which their sum exceeds uniform times all of it, and what is
    left of the uniform number to draw inside it.

    A scan may round so that a sum grows where nothing was added: what weighs nothing is left out.
    """
    index = tl.arange(0, SIZE)
    cumulative = tl.cumsum(masses, axis=0)
    weighs = masses > 0.0
    last = tl.max(tl.where(weighs, index, 0), axis=0)
    threshold = uniform * tl.max(cumulative, axis=0)
    found = tl.min(tl.where(weighs & (cumulative > threshold), index, last), axis=0)
    mass = tl.sum(tl.where(index == found, masses, 0.0), axis=0)
    before = tl.sum(tl.where(index == found, cumulative - masses, 0.0), axis=0)
    rest = (threshold - before) / mass
    return found, tl.minimum(tl.maximum(rest, 0.0), LARGEST_UNIFORM)


@triton.jit
def _draw_from_top(
    start,
    vocab_size,
    temperature,
    top_k,
    top_p,
    min_p,
    uniform,
    largest,
    full_mass,
    block_keys,
    num_blocks,
    blocks,
    candidates,
    BLOCKS_OF_ROW: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Inverts the truncated distribution in descending order if it is among the SIZE likeliest tokens, or gives
    TO_SEARCH.

    Looks at all tokens from a certain logit on: under min_p that of its threshold; under top_k one that at
    least top_k blocks reach, and so do at least top_k tokens; otherwise one that FEW blocks reach.
    """
    smallest = smallest_key_kept(largest, temperature, min_p)
    has_top_k = top_k < vocab_size
    index = tl.arange(0, BLOCKS_OF_ROW)
    keys = tl.load(block_keys + index, mask=index < num_blocks, other=MINUS_INFINITY)
    bound = smallest
    if has_top_k | (min_p <= 0.0):
        if has_top_k == 0:
            bound = _nth_largest(keys, tl.minimum(FEW, num_blocks), largest)
        elif top_k <= SIZE:
            bound = tl.maximum(smallest, _nth_largest(keys, tl.minimum(top_k, num_blocks), largest))
    lowest = tl.maximum(bound, MINUS_INFINITY + 1)

    is_needed = keys >= lowest
    slot = tl.cumsum(is_needed.to(tl.int32), axis=0) - 1
    tl.store(blocks + slot, index, mask=is_needed & (slot < SIZE))
    num_needed = tl.sum(is_needed.to(tl.int32), axis=0)
    token = tl.full([], TO_SEARCH, tl.int32)
    if num_needed <= SIZE:
        tl.debug_barrier()
        count = _gather(start, vocab_size, lowest, blocks, num_needed, candidates, SIZE)
        if count <= SIZE:
            tl.debug_barrier()
            # Whether all tokens from `smallest` on are there that weigh something, or as many as top_k keeps.
            has_all = (bound == smallest) | (bound == MINUS_INFINITY)
            places = sorted_candidates(candidates, count, SIZE)
            weights = exact_weights(places, tl.minimum(count, top_k), largest, temperature, SIZE)
            cumulative = tl.cumsum(weights, axis=0)
            kept_mass = tl.sum(weights, axis=0)
            is_uncut = (has_top_k == 0) & (min_p <= 0.0)
            mass = tl.where(is_uncut & (has_all == 0), full_mass, kept_mass)
            target = nucleus_target(top_p, mass)
            if has_all | (top_k <= count) | (is_uncut & (target < kept_mass)):
                target = tl.where(top_p < 1.0, target, mass)
                in_nucleus = cumulative - weights <= target
                nucleus_mass = tl.sum(tl.where(in_nucleus, weights, 0), axis=0)
                target = share(uniform, nucleus_mass)
                is_drawn = (cumulative - weights <= target) & (target < cumulative)
                token = tl.sum(tl.where(is_drawn, token_at(places), 0), axis=0)
    return token


@triton.jit
def _nth_largest(keys, n, largest):
    """The n-th largest key of those that are not padding; there are n."""
    low = tl.full([], MINUS_INFINITY, tl.int64)
    high = largest.to(tl.int64) + 1
    for _ in range(32):
        middle = (low + high) >> 1
        reach = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), axis=0) >= n
        low = tl.where(reach, middle, low)
        high = tl.where(reach, high, middle)
    return low.to(tl.int32)


@triton.jit
def _gather(start, vocab_size, lowest, blocks, num_needed, candidates, SIZE: tl.constexpr):
    """Stores the places of all tokens of these blocks whose key is at least `lowest`; at most SIZE. Returns how
    many there are."""
    count = 0
    for first in range(0, num_needed, BLOCKS):
        index = first + tl.arange(0, BLOCKS)
        block = tl.load(blocks + index, mask=index < num_needed, other=0)
        token = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (index < num_needed)[:, None] & (token < vocab_size)
        key = key_of(tl.load(start + token, mask=inside, other=-float("inf")).to(tl.float32))
        inside = key >= lowest
        number = inside.to(tl.int32)
        of_block = tl.sum(number, axis=1)
        before = tl.cumsum(of_block, axis=0) - of_block
        slot = count + before[:, None] + tl.cumsum(number, axis=1) - 1
        tl.store(candidates + slot, place_of(key, token), mask=inside & (slot < SIZE))
        count += tl.sum(of_block, axis=0)
    return count
