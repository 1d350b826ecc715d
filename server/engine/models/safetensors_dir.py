"""Reads a model directory in transformers' layout: config.json, *.safetensors, perhaps an index of those.

Laws:
1. Only JSON and safetensors are read. Pickles (*.bin, *.pt) and code (*.py, `auto_map` in config.json) never.
2. Which files are read is decided by plain names within the directory. The files themselves may be symbolic
   links, as they are in the Hugging Face cache, but to regular files: devices and pipes have no end.
3. The `safetensors` library checks each header against its file before a tensor is read.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from server.engine.models.config import GemmaConfig
from server.engine.models.config_reader import read_hf

if TYPE_CHECKING:
    import torch

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})

_MAX_JSON_BYTES = 32 << 20
"""The index of the largest Gemma has under 200 kB; tokenizer.json is not read here."""

_TEXT_PREFIXES = ("language_model.model.", "model.language_model.", "model.")
"""In this order, since one is the beginning of another."""
_IGNORED_PREFIXES = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)
"""The image half of Gemma 3 from 4B on."""
_OUTPUT_HEADS = ("lm_head.weight", "language_model.lm_head.weight")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_COMPARED_ROWS = 4096
_DTYPES = ("F32", "F16", "BF16")


class LoadError(ValueError):
    """The checkpoint cannot be loaded. The message says why, and what to do where that is known."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor of the text model is stored."""

    name: str
    """Without the prefix that the checkpoint puts before it."""
    stored_name: str
    file: Path
    shape: tuple[int, ...]


def read_config(directory: Path) -> GemmaConfig:
    """The model's configuration, its `eos_token_ids` joined with those of generation_config.json.

    Raises LoadError and ConfigError. Does not import torch.
    """
    config = read_hf(_read_json(directory / "config.json"))
    generation = directory / "generation_config.json"
    extra = _token_ids(_read_json(generation).get("eos_token_id")) if generation.exists() else ()
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *extra))))


def list_tensors(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of the text model from the headers of the files, by name. Nothing is loaded.

    An output head is left out if it repeats the embedding, which is Gemma's, and refused otherwise.
    Raises LoadError.
    """
    found: dict[str, StoredTensor] = {}
    head: StoredTensor | None = None
    for tensor in _stored_tensors(_weight_files(directory)):
        if tensor.stored_name in _OUTPUT_HEADS:
            head = tensor
        elif tensor.name in found:
            first = found[tensor.name]
            raise LoadError(
                f"tensor {tensor.name} is stored twice: {first.stored_name} in {first.file.name} and "
                f"{tensor.stored_name} in {tensor.file.name}"
            )
        else:
            found[tensor.name] = tensor
    if head is not None and "embed_tokens.weight" in found:
        _check_head_is_embedding(head, found["embed_tokens.weight"])
    return found


def read_tensors(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) one by one, in the order in which they lie in the files, in the stored dtype.

    The tensors are views of the memory-mapped files: copy what shall outlive the iteration.
    """
    for file in sorted({tensor.file for tensor in tensors.values()}):
        names = {tensor.stored_name: tensor.name for tensor in tensors.values() if tensor.file == file}
        with _open(file) as opened:
            for stored_name in opened.offset_keys():
                if stored_name in names:
                    yield names[stored_name], opened.get_tensor(stored_name)


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX_FILE
    if index.exists():
        return _indexed_files(directory, index)
    if (directory / SINGLE_FILE).exists():
        return [directory / SINGLE_FILE]
    files = sorted(directory.glob("*.safetensors"))
    if files:
        return files
    if any(file.suffix in PICKLE_SUFFIXES for file in directory.iterdir()):
        raise LoadError(
            f"{directory.name} has its weights in pickle files (*.bin, *.pt) only. Loading a pickle can run "
            "any code, so it is not supported; convert the weights to safetensors "
            "(https://huggingface.co/docs/safetensors/convert-weights)"
        )
    raise LoadError(f"{directory.name} has no *.safetensors file")


def _indexed_files(directory: Path, index: Path) -> list[Path]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoadError(f"{index.name}: weight_map is missing or empty")
    files = []
    for name in sorted({str(value) for value in weight_map.values()}):
        if not _SHARD_NAME.fullmatch(name):
            raise LoadError(f"{index.name} names {name!r}; only *.safetensors files beside it may be named")
        if not (directory / name).exists():
            raise LoadError(f"{index.name} names {name}, which is not there; is the download complete?")
        files.append(directory / name)
    return files


def _stored_tensors(files: list[Path]) -> Iterator[StoredTensor]:
    for file in files:
        with _open(file) as opened:
            for stored_name in opened.keys():  # noqa: SIM118  # safe_open is not a mapping
                if stored_name.startswith(_IGNORED_PREFIXES):
                    continue
                part = opened.get_slice(stored_name)
                if part.get_dtype() not in _DTYPES:
                    raise LoadError(
                        f"tensor {stored_name} in {file.name} is of type {part.get_dtype()}; supported are "
                        f"{', '.join(_DTYPES)}"
                    )
                yield StoredTensor(_without_prefix(stored_name), stored_name, file, tuple(part.get_shape()))


def _without_prefix(stored_name: str) -> str:
    for prefix in _TEXT_PREFIXES:
        if stored_name.startswith(prefix):
            return stored_name.removeprefix(prefix)
    return stored_name


def _check_head_is_embedding(head: StoredTensor, embedding: StoredTensor) -> None:
    """Compare in slices of rows: either may be gigabytes."""
    equal = head.shape == embedding.shape and len(head.shape) == 2
    if equal:
        with _open(head.file) as head_file, _open(embedding.file) as embedding_file:
            ours, theirs = (
                head_file.get_slice(head.stored_name),
                embedding_file.get_slice(embedding.stored_name),
            )
            equal = all(
                bool((ours[row : row + _COMPARED_ROWS] == theirs[row : row + _COMPARED_ROWS]).all())
                for row in range(0, head.shape[0], _COMPARED_ROWS)
            )
    if not equal:
        raise LoadError(
            f"{head.stored_name} differs from the embedding; Gemma's output layer is its embedding, so this "
            "checkpoint is not supported"
        )


def _open(file: Path) -> Any:
    if not file.is_file():
        raise LoadError(f"{file.name} is not a regular file")
    # A malformed file gives SafetensorError.
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise LoadError(
            f"{file.name} cannot be read as safetensors: {error}; is the download complete?"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise LoadError(f"{file.name} is not a regular file")
        if found.st_size > _MAX_JSON_BYTES:
            raise LoadError(f"{file.name} has {found.st_size} bytes; {_MAX_JSON_BYTES} is the limit")
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise LoadError(f"{file.parent.name} has no {file.name}") from None
    except OSError as error:
        raise LoadError(f"{file.name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(f"{file.name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise LoadError(f"{file.name} must hold a JSON object, not {type(content).__name__}")
    return content


def _token_ids(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if isinstance(item, int) and not isinstance(item, bool))
