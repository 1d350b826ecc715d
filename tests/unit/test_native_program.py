"""Recording a step: which arrays share memory, and what becomes of the operations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from server.engine.backend.base import Rope
from server.engine.backend.native_calls import GegluCall, NormCall
from server.engine.backend.native_program import Program, Recording, Register, rope_frequencies

ROWS = 3


def norm(recording: Recording, x: Register) -> Register:
    out = recording.register(x.width)
    recording.append(NormCall(width=x.width), x=x, out=out)
    return out


def add(recording: Recording, x: Register, residual: Register) -> Register:
    recording.append(NormCall(width=x.width), x=x, residual=residual, out=x)
    return x


def addresses(program: Program, *registers: Register) -> list[int]:
    return [program.rows(register).ctypes.data for register in registers]


@pytest.fixture
def recording() -> Recording:
    return Recording(np.dtype(np.float32))


def test_a_register_is_free_again_after_its_last_use(recording: Recording) -> None:
    chain = [recording.register(8)]
    for _ in range(5):
        chain.append(norm(recording, chain[-1]))
    program = recording.finish((chain[-1],), ROWS, None)
    assert len(set(addresses(program, *chain))) == 2
    for before, after in itertools.pairwise(addresses(program, *chain)):
        assert before != after


def test_a_register_that_is_needed_later_keeps_its_memory(recording: Recording) -> None:
    residual = recording.register(8)
    first = norm(recording, residual)
    second = norm(recording, first)
    third = norm(recording, second)
    result = add(recording, third, residual)
    program = recording.finish((result,), ROWS, None)
    kept = addresses(program, residual)[0]
    assert kept not in addresses(program, first, second, third)


def test_results_are_not_overwritten_by_what_comes_after_them(recording: Recording) -> None:
    x = recording.register(8)
    result = norm(recording, x)
    later = [norm(recording, x) for _ in range(3)]
    program = recording.finish((result,), ROWS, None)
    assert addresses(program, result)[0] not in addresses(program, *later)


def test_widths_do_not_share_memory(recording: Recording) -> None:
    x = recording.register(8)
    half = recording.register(4)
    recording.append(GegluCall(width=4), gate_up=x, out=half)
    last = norm(recording, half)
    program = recording.finish((last,), ROWS, None)
    assert program.rows(last).shape == (ROWS, 4)
    assert addresses(program, x)[0] not in addresses(program, half, last)


def test_layers_that_share_a_rotary_embedding_share_its_index(recording: Recording) -> None:
    local, full = Rope(8, 1e4, 1.0), Rope(8, 1e6, 8.0)
    assert [recording.rope(rope) for rope in (local, full, local)] == [0, 1, 0]
    np.testing.assert_allclose(rope_frequencies(full), 1e6 ** -(np.arange(4) / 4) / 8, rtol=1e-7)
