"""The copy of the weights that later starts map into memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from server.engine import weight_cache
from server.engine.backend.native import PackedMatrix
from server.engine.models.config import expected_weights
from server.engine.models.config_reader import read_hf
from server.engine.models.weights import WeightSource, open_weights
from server.engine.weight_cache import CachedModel, WeightCache
from tests.unit.native_backends import native_backend
from tests.unit.test_build import CONFIG

FORM = "some form"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint, and an empty cache directory beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    write_weights(directory, seed=0)
    return directory


def write_weights(directory: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_weights(read_hf(CONFIG))
    weights = {f"model.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(weights, directory / "model.safetensors")


def load(
    model: Path, dtype: torch.dtype = torch.bfloat16, quantization: str = "none"
) -> tuple[WeightSource, dict[str, Any]]:
    backend = native_backend(dtype, quantization=quantization)
    source = open_weights(model, backend, "cpu", use_cache=True)
    return source, dict(source.load(lambda _: None))


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for name, weight in first.items():
        other = second[name]
        if isinstance(weight, PackedMatrix):
            assert (weight.type, weight.outputs, weight.inputs) == (other.type, other.outputs, other.inputs)
            weight, other = weight.data, other.data
        assert (weight == other).all(), name


def copies(model: Path) -> list[Path]:
    directory = model.parent / "cache" / "gemma-server"
    return sorted(path for path in directory.iterdir() if "weights" in path.name)


def cached(model: Path, dtype: torch.dtype = torch.bfloat16) -> CachedModel | None:
    directory = model.parent / "cache" / "gemma-server"
    return WeightCache(directory, model, native_backend(dtype).weight_form).read()


def test_a_second_load_gives_the_same_weights_from_the_copy(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, weights = load(model)
    monkeypatch.setattr("server.engine.models.loader.open_checkpoint", lambda _: pytest.fail("read again"))
    second, again = load(model)
    assert second.config == first.config
    assert_same(weights, again)


def test_another_number_format_has_a_copy_of_its_own(model: Path) -> None:
    load(model, torch.bfloat16)
    assert cached(model, torch.float32) is None
    load(model, torch.float32)
    assert cached(model, torch.bfloat16) is not None
    assert len(copies(model)) == 2
    _, weights = load(model, torch.bfloat16, "int8")
    assert len(copies(model)) == 3
    assert_same(weights, load(model, torch.bfloat16, "int8")[1])


def test_a_changed_checkpoint_is_converted_again_and_replaces_the_copy(model: Path) -> None:
    _, before = load(model)
    write_weights(model, seed=1)
    assert cached(model) is None
    _, after = load(model)
    assert not (before["norm.weight"] == after["norm.weight"]).all()
    assert_same(after, load(model)[1])
    assert len(copies(model)) == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "header"])
def test_a_damaged_copy_is_made_anew(model: Path, damage: str) -> None:
    _, weights = load(model)
    [copy] = copies(model)
    content = copy.read_bytes()
    copy.write_bytes(
        {
            "cut": content[:-5000],
            "empty": b"",
            "other": b"GEMMAWT9" + content[8:],
            "header": content[:16] + b"{" + content[17:].replace(b'"', b"?", 9),
        }[damage]
    )
    assert cached(model) is None
    assert_same(weights, load(model)[1])
    assert cached(model) is not None


def test_without_room_there_is_no_copy(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = shutil.disk_usage(model)._replace(free=1000)
    monkeypatch.setattr(weight_cache.shutil, "disk_usage", lambda _: usage)
    with caplog.at_level("INFO"):
        load(model)
    assert "no copy of the prepared weights" in caplog.text
    assert copies(model) == []


def test_a_directory_that_cannot_be_made_is_no_failure(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    (model.parent / "cache").write_text("a file")
    _, weights = load(model)
    assert "norm.weight" in weights
    assert "no copy of the prepared weights" in caplog.text


def test_a_failed_write_leaves_nothing_behind(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_cache.os, "fsync", full)
    load(model)
    assert copies(model) == []


def test_the_cache_can_be_turned_off(model: Path) -> None:
    open_weights(model, native_backend(torch.bfloat16), "cpu", use_cache=False).load(lambda _: None)
    assert not (model.parent / "cache").exists()
