"""The order in which tokens are drawn, and their weights, as integers.

A logit's key is an int32 that is larger where the logit is. A token's place packs its logit's key and its id
into an int64 that is larger where the token comes earlier in the descending order: larger logits first, equal
ones by id.

A weight is exp((logit - largest) / temperature) in units of 2**-44. Sums of integers are exact: neither the
order in which they are added nor a neighbour can change one, cumulative weights never fall, and what is drawn
weighs something. 2**18 tokens sum to 2**62 at most. Rounding down takes less than a unit of each: together less
than 2**-26 of the probability.
"""

from __future__ import annotations

import triton
import triton.language as tl

MINUS_INFINITY = tl.constexpr(-2139095041)
"""The key of minus infinity."""
INFINITY = tl.constexpr(0x7F800000)
"""The key of infinity. A NaN's is larger."""
UNIT = tl.constexpr(2.0**44)
"""The weight of the likeliest token."""


@triton.jit
def key_of(logit):
    """fp32 -> int32. Of equal logits, zeros of either sign included, the keys are equal."""
    bits = tl.where(logit == 0.0, 0.0, logit).to(tl.int32, bitcast=True)
    return tl.where(logit != logit, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def logit_of(key):
    """The logit with this key; int32 -> fp32."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def place_of(key, token):
    """int32, int32 -> int64"""
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def token_at(place):
    """int64 -> int32"""
    return 0x7FFFFFFF - (place & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def sorted_candidates(candidates, count, SIZE: tl.constexpr):
    """The places [SIZE] behind a pointer, of which `count` count, in descending order; the others come last."""
    index = tl.arange(0, SIZE)
    places = tl.load(candidates + index, mask=index < count, other=-(1 << 63))
    return tl.sort(places, descending=True)


@triton.jit
def exact_weights(places, count, largest, temperature, SIZE: tl.constexpr):
    """The weights, int64 [SIZE], of the first `count` of these places, from fp64; 0 of the others."""
    logit = logit_of((places >> 32).to(tl.int32)).to(tl.float64)
    weight = tl.exp((logit - logit_of(largest).to(tl.float64)) / temperature)
    return tl.where(tl.arange(0, SIZE) < count, weight * UNIT, 0.0).to(tl.int64)


@triton.jit
def smallest_key_kept(largest, temperature, min_p):
    """The smallest key whose token min_p keeps, those with at least min_p times the likeliest's probability."""
    result = tl.full([], MINUS_INFINITY, tl.int32)
    if min_p > 0.0:
        highest = logit_of(largest).to(tl.float64)
        near = key_of((highest + temperature * tl.log(min_p)).to(tl.float32))
        key = near + tl.arange(0, 8) - 4  # what the logarithm rounded, the definition decides
        keeps = tl.exp((logit_of(key).to(tl.float64) - highest) / temperature) >= min_p
        result = tl.min(tl.where(keeps & (key <= largest), key, largest), axis=0)
    return result


@triton.jit
def share(fraction, mass):
    """floor(fraction * mass), below mass; fp64 in [0, 1), int64 -> int64"""
    return tl.minimum((fraction * mass.to(tl.float64)).to(tl.int64), mass - 1)


@triton.jit
def nucleus_target(top_p, mass):
    """The cumulative weight that the nucleus's last token is the first to exceed: its sum is the first to reach
    top_p * mass. fp64, int64 -> int64"""
    needed = tl.ceil(top_p * mass.to(tl.float64)).to(tl.int64)
    return tl.maximum(tl.minimum(needed, mass), 1) - 1
