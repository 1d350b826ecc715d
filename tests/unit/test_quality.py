"""The arithmetic of the quality figures."""

from __future__ import annotations

import math

import pytest

from benchmarks.quality import BASELINE, CONTINUED_TOKENS, Format, Quality, format_quality

TOKENS = list(range(CONTINUED_TOKENS))
BF16 = Quality(100 << 20, [math.log(0.5), math.log(0.125)], [7, 8], [TOKENS, TOKENS])


def test_perplexity_is_the_inverse_of_the_geometric_mean_probability() -> None:
    assert BF16.perplexity == pytest.approx(4.0)


def test_the_table_compares_each_format_with_the_first() -> None:
    other = Quality(50 << 20, [math.log(0.25)] * 2, [7, 9], [TOKENS, [*TOKENS[:5], 99, *TOKENS[6:]]])
    lines = format_quality([(BASELINE, BF16), (Format("int8", "bfloat16", "int8"), other)]).splitlines()
    assert lines[2] == "| bf16 | 100 | 4.000 | 100.00% | 32.0 | 2 of 2 |"
    assert lines[3] == "| int8 | 50 | 4.000 | 50.00% | 18.5 | 1 of 2 |"
