"""The benchmark of the HTTP side: what its figures are made of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.front import run
from benchmarks.front.words import NUM_WORDS, delays_of


def test_a_token_is_of_the_last_step_with_its_number() -> None:
    emitted = np.arange(3 * NUM_WORDS) * 0.01
    steps = np.array([0, 5, NUM_WORDS - 1, NUM_WORDS, 2 * NUM_WORDS + 7, 3 * NUM_WORDS - 1])
    delays = np.array([0.0, 0.5, 0.001, 1.9, 0.03, 0.25])
    found = delays_of(steps % NUM_WORDS, emitted[steps] + delays, emitted)
    assert found == pytest.approx(delays, abs=1e-9)


def test_scenarios_are_streams_times_rates() -> None:
    assert run.Scenario.of("256x12.5") == run.Scenario(256, 12.5)


@pytest.mark.slow
def test_a_short_run_delivers_what_was_emitted(tmp_path: Path) -> None:
    out = tmp_path / "front.json"
    assert run.main(["--scenarios", "8x20", "--seconds", "3", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["tokens_per_second"] == pytest.approx(160, rel=0.1)
    assert 0 < row["delay_ms"]["p50"] < row["delay_ms"]["p99"] < 1000
    assert 0 < row["front_cpu"] < 1
