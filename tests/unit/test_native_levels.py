"""Which levels of native kernels there are: the processor's, the compiler's, and what is said of the others."""

from __future__ import annotations

import ctypes
import logging
from io import StringIO
from pathlib import Path

import pytest
import torch

from server.engine.backend import native, native_library
from server.engine.backend.native import LEVELS, NativeBackend
from server.engine.backend.native_calls import declare
from server.engine.backend.native_library import (
    SOURCES,
    NativeUnavailableError,
    build_library,
    translation_units,
)
from server.engine.dtype import DType
from tests.unit.native_backends import native_backend, processor_level

_FLAGS_OF = {
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512_bf16": {"avx512_bf16", "avx512_vnni"},
    "amx": {"amx_tile", "amx_bf16"},
}


def test_the_highest_level_is_the_one_whose_instructions_the_system_lists() -> None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found = processor_level()
    except (OSError, NativeUnavailableError) as error:
        pytest.skip(str(error))
    flags = set(next(line for line in lines if line.startswith("flags")).split())
    missing = [level for level in LEVELS if not _FLAGS_OF[level] <= flags]
    assert found == (LEVELS.index(missing[0]) if missing else len(LEVELS))


def test_the_compiler_builds_every_level() -> None:
    library = native_backend(torch.float32)._library
    assert library.gemma_built_level() == len(LEVELS)


_STUBS = """
#include <cstdlib>
#include "levels.h"

namespace gemma {
Level processor_level() { return Level(std::atoi(std::getenv("PROCESSOR_LEVEL"))); }
namespace avx2 {
extern const Kernels kernels;
const Kernels kernels{};
}
namespace avx512 {
extern const Kernels kernels;
const Kernels kernels{};
}
namespace avx512_bf16 {
void replace_products(Kernels&) {}
}
}
"""


@pytest.fixture(scope="module")
def of_an_old_compiler(tmp_path_factory: pytest.TempPathFactory) -> tuple[ctypes.CDLL, str]:
    """A library built by a compiler that does not know AMX, and what was logged. It has no kernels."""
    directory = tmp_path_factory.mktemp("library")
    stubs = directory / "stubs.cpp"
    stubs.write_text(_STUBS, encoding="utf-8")
    shared = [unit for unit in translation_units() if not unit.stem.startswith(("level_", "processor"))]
    units = {unit: ("-O0", f"-I{SOURCES}") for unit in (stubs, *shared)}
    log = StringIO()
    handler = logging.StreamHandler(log)
    native_library.logger.addHandler(handler)
    try:
        units[SOURCES / "level_amx.cpp"] = ("-mno-such-instructions",)
        library = ctypes.CDLL(str(build_library(directory / "library.so", units)))
    except NativeUnavailableError as error:
        pytest.skip(str(error))
    finally:
        native_library.logger.removeHandler(handler)
    declare(library)
    return library, log.getvalue()


def test_a_level_that_the_compiler_does_not_know_is_left_out(
    of_an_old_compiler: tuple[ctypes.CDLL, str],
) -> None:
    library, logged = of_an_old_compiler
    assert LEVELS[library.gemma_built_level() - 1] == "avx512_bf16"
    assert logged.startswith("native CPU kernels without level_amx: ")
    assert "no-such-instructions" in logged


@pytest.mark.parametrize(
    ("processor", "level", "expected"),
    [
        ("amx", "auto", "avx512_bf16"),
        ("avx512", "auto", "avx512"),
        ("avx512", "avx2", "avx2"),
        ("amx", "amx", "their compiler knew no amx; its highest level is avx512_bf16"),
        ("avx512", "avx512_bf16", "the processor has no avx512_bf16; its highest level is avx512"),
        (None, "auto", "the processor has no AVX2"),
    ],
)
def test_auto_is_the_highest_level_of_processor_and_compiler_and_none_above_it_can_be_had(
    monkeypatch: pytest.MonkeyPatch,
    of_an_old_compiler: tuple[ctypes.CDLL, str],
    processor: str | None,
    level: str,
    expected: str,
) -> None:
    number = 0 if processor is None else LEVELS.index(processor) + 1
    monkeypatch.setenv("PROCESSOR_LEVEL", str(number))
    monkeypatch.setattr(native, "load_library", lambda: of_an_old_compiler[0])
    if expected in LEVELS:
        assert NativeBackend(DType.FLOAT32, 1, level).level == expected
    else:
        with pytest.raises(NativeUnavailableError, match=expected):
            NativeBackend(DType.FLOAT32, 1, level)
