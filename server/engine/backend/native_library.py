"""Finds, or else builds, the shared library of the native CPU kernels.

Laws:

- A library's name holds a hash of all that it is built from, so a stale one is never loaded.
- Building is atomic: processes that build at the same time end with the same file, and none sees half of one.

The library is looked for beside its sources, where an installation puts it (in a checkout, `python -m` with
this module does), then in the user's cache, where `load_library` builds it in some seconds if it is in neither
place. CXX names the compiler, else g++ or clang++.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent.parent / "csrc"

# Products are rounded as they are written, on every level; the maths functions are our own.
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-pthread",
)
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
_FLAGS_OF = {
    "level_avx2": ("-mavx2", "-mfma"),
    "level_avx512": _AVX512,
    "level_avx512_bf16": (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
    "level_amx": (*_AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-bf16"),
}
# Compilers and assemblers from before 2021 do not know these; what they build has the other levels.
_DISPENSABLE = ("level_avx512_bf16", "level_amx")
_MACHINES = ("x86_64", "AMD64")


class NativeUnavailableError(RuntimeError):
    """There are no native kernels here, for the reason given."""


def load_library() -> ctypes.CDLL:
    """The library, built if need be. Raises NativeUnavailableError."""
    if platform.machine() not in _MACHINES or os.name != "posix":
        raise NativeUnavailableError(f"there are none for {platform.system()} on {platform.machine()}")
    # Imported here, for the build of a wheel runs this file where the package is not installed.
    from server.cache_directory import cache_directory

    candidates = (SOURCES / library_name(), cache_directory() / library_name())
    try:
        path = next((candidate for candidate in candidates if candidate.exists()), None)
        return ctypes.CDLL(str(path or build_library(candidates[-1])))
    except OSError as error:
        raise NativeUnavailableError(f"the library cannot be built or loaded: {error}") from error


def translation_units() -> dict[Path, tuple[str, ...]]:
    """What the library is compiled from, each with the flags that are its own."""
    return {source: _FLAGS_OF.get(source.stem, ()) for source in sorted(SOURCES.glob("*.cpp"))}


def build_library(target: Path, units: Mapping[Path, tuple[str, ...]] | None = None) -> Path:
    """Compiles the kernels, or other translation units, into `target`, whose directory is made.

    Leaves out a level that the compiler does not know. Raises NativeUnavailableError, OSError.
    """
    compiler = _compiler()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as directory:
        running = {}
        for source, flags in (translation_units() if units is None else units).items():
            built_object = str(Path(directory, f"{source.stem}.o"))
            command = [*compiler, *_FLAGS, *flags, "-c", str(source), "-o", built_object]
            running[built_object] = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        outputs = [process.communicate()[1] for process in running.values()]
        objects = []
        for (built_object, process), output in zip(running.items(), outputs, strict=True):
            name = Path(built_object).stem
            if process.returncode != 0 and name in _DISPENSABLE:
                logger.warning("native CPU kernels without %s: %s", name, _first_error(compiler, output))
                continue
            _check(process.returncode, compiler, output)
            objects.append(built_object)
        built = Path(directory, target.name)
        link = subprocess.run(
            [*compiler, "-shared", "-pthread", *objects, "-o", str(built)], capture_output=True, text=True
        )
        _check(link.returncode, compiler, link.stderr)
        built.replace(target)
    return target


def library_name() -> str:
    """The file name under which `load_library` looks for a library of these sources."""
    return f"gemma_native-{_fingerprint()}.so"


def _fingerprint() -> str:
    digest = hashlib.sha256(repr((_FLAGS, _FLAGS_OF, platform.machine())).encode())
    for source in sorted(SOURCES.glob("*")):
        if source.suffix in (".cpp", ".h"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _compiler() -> list[str]:
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    for name in ("g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise NativeUnavailableError("there is no C++ compiler (g++, clang++ or $CXX) to build them with")


def _check(status: int, compiler: list[str], output: str) -> None:
    if status != 0:
        raise NativeUnavailableError(_first_error(compiler, output))


def _first_error(compiler: list[str], output: str) -> str:
    first = next((line for line in output.splitlines() if "error" in line), output.strip())
    return f"{compiler[0]} cannot build them: {first}"


if __name__ == "__main__":
    try:
        build_library(SOURCES / library_name())
    except (NativeUnavailableError, OSError) as error:
        print(f"No native CPU kernels, the server will do without: {error}")
