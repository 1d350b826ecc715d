"""The draw in rows whose truncated distribution is spread over many tokens.

Every question here is for the token at which a sum over the descending order exceeds a target: that of tokens
for top_k, that of weights for top_p and for the draw. A range of keys is halved until few enough tokens are
left to sort them, or one key whose tokens are equal, so that they are counted off by id.
"""

from __future__ import annotations

import triton
import triton.language as tl

from server.engine.backend.triton.sampling_draw import TO_SEARCH
from server.engine.backend.triton.sampling_order import (
    MINUS_INFINITY,
    UNIT,
    key_of,
    logit_of,
    nucleus_target,
    place_of,
    share,
    smallest_key_kept,
    sorted_candidates,
    token_at,
)

_HALVINGS_OF_VALUES = tl.constexpr(16)
"""Logits are spread evenly over values rather than over keys, but only the halving of keys surely ends."""


@triton.jit
def search_rows(
    logits,
    row_stride,
    vocab_size,
    temperatures,
    top_ps,
    min_ps,
    uniforms,
    top_ks,
    chunk_keys,
    num_chunks,
    candidates,
    drawn,
    CHUNKS: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (S,). Replaces TO_SEARCH in drawn, int32 [S], by the token; arguments as of `draw_rows`."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(drawn + row) == TO_SEARCH:
        start = logits + row * row_stride
        chunk = tl.arange(0, CHUNKS)
        keys = tl.load(chunk_keys + row * num_chunks + chunk, mask=chunk < num_chunks, other=MINUS_INFINITY)
        largest = tl.max(keys, axis=0)
        temperature = tl.load(temperatures + row)
        top_p = tl.load(top_ps + row)
        top_k = tl.load(top_ks + row)
        lowest = smallest_key_kept(largest, temperature, tl.load(min_ps + row))
        total, mass = _reach(start, vocab_size, lowest, largest, temperature, TILE)
        top_k = tl.where((top_k > 0) & (top_k < total), top_k, total)
        token = tl.full([], 0, tl.int32)
        for stage in range(3):  # top_k, top_p, the draw: each over what the one before it left
            by_count = stage == 0
            target = share(tl.load(uniforms + row), mass)
            if stage == 0:
                target = top_k.to(tl.int64) - 1
            elif stage == 1:
                target = nucleus_target(top_p, mass)
            is_off = (stage == 0) & (top_k == total) | (stage == 1) & (top_p >= 1.0)
            if is_off == 0:
                token, mass = _find(
                    start,
                    vocab_size,
                    largest,
                    lowest,
                    total,
                    temperature,
                    target,
                    by_count,
                    candidates + row * SIZE,
                    SIZE,
                    TILE,
                )
        tl.store(drawn + row, token)


@triton.jit
def _find(
    start,
    vocab_size,
    largest,
    lowest,
    total,
    temperature,
    target,
    by_count,
    candidates,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """The first token in descending order at which the sum exceeds target, and the sum of weights up to it.

    total: tokens from the key `lowest` on, at which the sum exceeds target.
    """
    low, high = lowest, largest + 1  # the token's key is in low .. high - 1
    low_count = total
    high_count = tl.zeros_like(total)
    high_mass = tl.zeros_like(target)
    step = 0
    while (low_count - high_count > SIZE) & (high.to(tl.int64) - low > 1):
        middle = _between(low, high, step < _HALVINGS_OF_VALUES)
        count, mass = _reach(start, vocab_size, middle, largest, temperature, TILE)
        exceeds = tl.where(by_count, count.to(tl.int64), mass) > target
        low = tl.where(exceeds, middle, low)
        low_count = tl.where(exceeds, count, low_count)
        high = tl.where(exceeds, high, middle)
        high_count = tl.where(exceeds, high_count, count)
        high_mass = tl.where(exceeds, high_mass, mass)
        step += 1

    missing = target - tl.where(by_count, high_count.to(tl.int64), high_mass)
    if low_count - high_count <= SIZE:
        tl.debug_barrier()  # what was read there before has been read
        count = _gather(start, vocab_size, low, high, candidates, SIZE, TILE)
        tl.debug_barrier()
        places = sorted_candidates(candidates, count, SIZE)
        logit = logit_of((places >> 32).to(tl.int32))
        is_there = tl.arange(0, SIZE) < count
        weights = tl.where(is_there, _weights(logit, largest, temperature), 0)
        steps = tl.where(by_count, is_there.to(tl.int64), weights)
        cumulative = tl.cumsum(steps, axis=0)
        is_found = (cumulative - steps <= missing) & (missing < cumulative)
        token = tl.sum(tl.where(is_found, token_at(places), 0), axis=0)
        mass = high_mass + tl.sum(tl.where(cumulative - steps <= missing, weights, 0), axis=0)
    else:
        weight = tl.max(_weights(logit_of(low) + tl.zeros((1,), tl.float32), largest, temperature), axis=0)
        number = tl.where(by_count, missing, missing // tl.maximum(weight, 1))
        token = _nth_equal(start, vocab_size, low, number.to(tl.int32), TILE)
        mass = high_mass + (number + 1) * weight
    return token, mass


@triton.jit
def _between(low, high, by_value):
    """A key in low + 1 .. high - 1; there is one. Halves the logits, where by_value, or else the keys."""
    middle = ((low.to(tl.int64) + high.to(tl.int64)) >> 1).to(tl.int32)
    value = key_of(0.5 * logit_of(low) + 0.5 * logit_of(high))
    return tl.where(by_value & (low < value) & (value < high), value, middle)


@triton.jit
def _weights(logit, largest, temperature):
    """Computed in fp32."""
    weight = tl.exp((logit - logit_of(largest)) / temperature.to(tl.float32))
    return (weight * UNIT).to(tl.int64)


@triton.jit
def _reach(start, vocab_size, lowest, largest, temperature, TILE: tl.constexpr):
    """How many tokens have at least this key, and their summed weights; int32, int64."""
    counts = tl.zeros((TILE,), tl.int32)
    masses = tl.zeros((TILE,), tl.int64)
    for first in range(0, vocab_size, TILE):
        token = first + tl.arange(0, TILE)
        inside = token < vocab_size
        logit = tl.load(start + token, mask=inside, other=-float("inf")).to(tl.float32)
        reaches = inside & (key_of(logit) >= lowest)
        counts += reaches.to(tl.int32)
        masses += tl.where(reaches, _weights(logit, largest, temperature), 0)
    return tl.sum(counts, axis=0), tl.sum(masses, axis=0)


@triton.jit
def _gather(start, vocab_size, low, high, candidates, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Stores the places of all tokens with a key in low .. high - 1, SIZE at most. Returns their number."""
    total = 0
    for first in range(0, vocab_size, TILE):
        token = first + tl.arange(0, TILE)
        inside = token < vocab_size
        key = key_of(tl.load(start + token, mask=inside, other=-float("inf")).to(tl.float32))
        inside = inside & (key >= low) & (key < high)
        number = inside.to(tl.int32)
        slot = total + tl.cumsum(number, axis=0) - 1
        tl.store(candidates + slot, place_of(key, token), mask=inside)
        total += tl.sum(number, axis=0)
    return total


@triton.jit
def _nth_equal(start, vocab_size, equal, number, TILE: tl.constexpr):
    """The token with this key that has `number` such tokens before it."""
    total = 0
    result = 0
    for first in range(0, vocab_size, TILE):
        token = first + tl.arange(0, TILE)
        inside = token < vocab_size
        key = key_of(tl.load(start + token, mask=inside, other=-float("inf")).to(tl.float32))
        matches = (inside & (key == equal)).to(tl.int32)
        before = total + tl.cumsum(matches, axis=0) - matches
        result += tl.sum(tl.where((matches == 1) & (before == number), token, 0), axis=0)
        total += tl.sum(matches, axis=0)
    return result
