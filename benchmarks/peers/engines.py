"""What a variant needs to be served, brought together: engine, weights, command."""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmarks.peers.checkpoints import Weights, gemma_1_2b_shape, gemma_3_270m
from benchmarks.peers.environments import (
    LlamaCppInstallation,
    VLLMInstallation,
    install_llama_cpp,
    install_vllm,
)
from benchmarks.peers.servers import Launch, launch_llama_cpp, launch_ours, launch_vllm
from benchmarks.peers.variants import LLAMA_CPP, OURS, SMALL, VLLM, Choice


class Engines:
    """Installs and converts on first use, below one folder; nothing that is there is made again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._weights: dict[str, Weights] = {}
        self._vllm: VLLMInstallation | None = None
        self._llama_cpp: LlamaCppInstallation | None = None

    def launch(self, choice: Choice) -> Launch:
        """How the variant is started on its checkpoint. Raises InstallError, ModelSourceError."""
        weights, variant = self.weights(choice.weights), choice.variant
        if variant.peer == OURS:
            return launch_ours(weights.directory, variant.options)
        if variant.peer == VLLM:
            self._vllm = self._vllm or install_vllm(self._folder)
            return launch_vllm(self._vllm, weights.directory, variant.precision, self._folder / "vllm-cache")
        tools = self._llama_cpp_tools()
        return launch_llama_cpp(tools.server, _quantised(weights, variant.precision, tools.quantize))

    def versions(self) -> dict[str, str]:
        """What was installed for this run, by engine."""
        installed = {VLLM: self._vllm, LLAMA_CPP: self._llama_cpp}
        return {name: peer.description for name, peer in installed.items() if peer is not None}

    def weights(self, name: str) -> Weights:
        if name not in self._weights:
            make = gemma_3_270m if name == SMALL else gemma_1_2b_shape
            self._weights[name] = make(self._folder / "weights")
        return self._weights[name]

    def _llama_cpp_tools(self) -> LlamaCppInstallation:
        if self._llama_cpp is None:
            self._llama_cpp = install_llama_cpp(self._folder, self.weights(SMALL).gguf)
        return self._llama_cpp


def _quantised(weights: Weights, kind: str, quantize: Path) -> Path:
    """The GGUF file in another type, as llama.cpp's own tool makes it of the bf16 file."""
    if kind == "bf16":
        return weights.gguf
    target = weights.gguf.with_name(f"{weights.name}-{kind}.gguf")
    if not target.exists():
        partial = target.with_suffix(".partial")
        subprocess.run([quantize, weights.gguf, partial, kind], check=True, capture_output=True)
        partial.rename(target)
    return target
