"""Opens a checkpoint, a GGUF file or a directory, and yields its tensors under one set of names.

Laws:
1. `open_checkpoint` compares names and shapes, from the headers alone, with what the configuration asks for:
   nothing missing, nothing left over, nothing of another shape. No tensor is allocated before that.
2. Tensors come one at a time; beyond the one yielded, memory use is a few MB.
3. Norm weights are yielded in float32 and as w of the factor (1 + w), whatever the file holds; all else in the
   dtype asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from server.engine.dtype import DType
from server.engine.models import safetensors_dir
from server.engine.models.config import GemmaConfig, expected_weights
from server.engine.models.config_reader import read_gguf
from server.engine.models.gguf import GGUFFile, GGUFTensor
from server.engine.models.gguf_dequant import read_tensor
from server.engine.models.gguf_names import checkpoint_name
from server.engine.models.safetensors_dir import LoadError, StoredTensor
from server.engine.models.staged_copy import to_gpu

__all__ = ["Checkpoint", "LoadError", "open_checkpoint"]

_LISTED = 5
"""How many tensors of each kind of fault an error names."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose header was read and found complete."""

    config: GemmaConfig
    num_parameters: int
    """Elements of all tensors: progress is counted in them."""
    tensors: Callable[[DType, str], Iterator[tuple[str, Tensor]]]
    """tensors(dtype, device): (name, tensor) for each of `expected_weights(config)`, in the file's order.

    Can be called once. Each tensor is new, so that the caller may keep it. Raises GGUFError or LoadError if the
    files change meanwhile.
    """


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a .gguf file or a directory with config.json and *.safetensors.

    Raises LoadError, GGUFError and ConfigError, which are ValueErrors, and OSError.
    """
    return _open_directory(path) if path.is_dir() else _open_gguf(path)


def _open_directory(directory: Path) -> Checkpoint:
    config = safetensors_dir.read_config(directory)
    stored = safetensors_dir.list_tensors(directory)
    num_parameters = _check_complete(config, {name: tensor.shape for name, tensor in stored.items()})

    def tensors(dtype: DType, device: str) -> Iterator[tuple[str, Tensor]]:
        return _directory_tensors(stored, getattr(torch, dtype), torch.device(device))

    return Checkpoint(config, num_parameters, tensors)


def _directory_tensors(
    stored: Mapping[str, StoredTensor], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    mapped = safetensors_dir.read_tensors(stored)
    if device.type == "cuda":
        for name, tensor in to_gpu(mapped, device):
            yield name, tensor.to(torch.float32 if _is_norm(name) else dtype)
        return
    for name, tensor in mapped:
        # A copy even if nothing changes: the tensor is a view of the mapped file.
        yield name, tensor.to(device=device, dtype=torch.float32 if _is_norm(name) else dtype, copy=True)


def _open_gguf(path: Path) -> Checkpoint:
    file = GGUFFile.open(path)
    try:
        config = read_gguf(file.metadata)
        by_name = _rename(file, config)
        num_parameters = _check_complete(config, {name: tensor.shape for name, tensor in by_name.items()})
    except BaseException:
        file.close()
        raise

    def tensors(dtype: DType, device: str) -> Iterator[tuple[str, Tensor]]:
        return _gguf_tensors(file, by_name, getattr(torch, dtype), torch.device(device))

    return Checkpoint(config, num_parameters, tensors)


def _rename(file: GGUFFile, config: GemmaConfig) -> dict[str, GGUFTensor]:
    num_parts = file.metadata.get("split.count", 1)
    if num_parts not in (0, 1):
        raise LoadError(
            f"{file.path.name} is one of {num_parts} parts; join them first with `llama-gguf-split --merge`"
        )
    if "output.weight" in file.tensors:
        raise LoadError(
            f"{file.path.name} has an output layer of its own (output.weight); Gemma's is its embedding, "
            "so this file is not supported"
        )
    by_name: dict[str, GGUFTensor] = {}
    for tensor in file.tensors.values():
        # An unknown tensor keeps its name, and is then reported as unexpected.
        by_name[checkpoint_name(tensor.name, config.post_norms) or tensor.name] = tensor
    return by_name


def _gguf_tensors(
    file: GGUFFile, by_name: Mapping[str, GGUFTensor], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    with file:
        for name, tensor in sorted(by_name.items(), key=lambda item: item[1].offset):
            if _is_norm(name):
                # llama.cpp's converter stores 1 + w (conversion of Gemma, `norm.weight` + 1).
                yield name, read_tensor(file, tensor, torch.float32, device) - 1
            else:
                yield name, read_tensor(file, tensor, dtype, device)


def _is_norm(name: str) -> bool:
    return name.endswith("norm.weight")


def _check_complete(config: GemmaConfig, found: Mapping[str, tuple[int, ...]]) -> int:
    """Compare with what the configuration asks for. Returns the number of parameters; raises LoadError."""
    expected = expected_weights(config)
    faults = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {found[name]} instead of {shape}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    if any(faults.values()):
        parts = [f"{len(names)} {fault}: {_listing(names)}" for fault, names in faults.items() if names]
        raise LoadError(
            f"the checkpoint's tensors do not fit its {config.model_type} configuration. {'. '.join(parts)}"
        )
    return sum(prod(shape) for shape in expected.values())


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
