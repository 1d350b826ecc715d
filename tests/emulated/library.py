"""The native kernels with the instructions that this processor may lack replaced by plain C++ (immintrin.h)."""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache
from pathlib import Path

from server.engine.backend.native import LEVELS
from server.engine.backend.native_library import SOURCES, build_library, library_name, translation_units

EMULATED = Path(__file__).parent
_BUILD = EMULATED.parent.parent / "build"
_FLAGS = ("-mavx2", "-mfma", "-O1", f"-I{EMULATED}", f"-I{SOURCES}")


@cache
def emulated_library() -> ctypes.CDLL:
    """Built once for the same sources. Raises NativeUnavailableError, OSError.

    Every level above AVX2 is emulated, so that one of a level that the processor has can be compared with it.
    """
    digest = hashlib.sha256(library_name().encode())
    for file in sorted(EMULATED.iterdir()):
        if file.is_file():
            digest.update(file.read_bytes())
    target = _BUILD / f"gemma_emulated-{digest.hexdigest()[:16]}.so"
    library = ctypes.CDLL(str(target if target.exists() else build_library(target, _emulated_units())))
    assert library.gemma_built_level() == len(LEVELS), "a level was left out, see the warning"
    return library


def _emulated_units() -> dict[Path, tuple[str, ...]]:
    units = {}
    for source, flags in translation_units().items():
        stand_in = EMULATED / source.name
        emulated = stand_in.exists() or (source.stem.startswith("level_") and source.stem != "level_avx2")
        # The kernels know by a macro whether there is AVX512_VNNI.
        vnni = ("-DGEMMA_EMULATED_VNNI",) if "-mavx512vnni" in flags else ()
        units[stand_in if stand_in.exists() else source] = (*_FLAGS, *vnni) if emulated else flags
    return units
