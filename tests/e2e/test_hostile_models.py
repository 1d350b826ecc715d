"""A model that is refused ends the server with one line and the exit code that says: do not try again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.server_process import ServerProcess


def in_pickles(model: Path) -> None:
    """Which only the engine notices."""
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def with_a_billion_layers(model: Path) -> None:
    """Which the front notices first."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))


@pytest.mark.covers("S07", "S08")
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (in_pickles, "convert the weights to safetensors"),
        (with_a_billion_layers, "num_hidden_layers = 1000000000: must be at most"),
    ],
)
def test_a_hostile_model_is_refused_in_one_line(
    tiny_checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    damage(model)
    server = ServerProcess(model, "--dtype", "float32")
    try:
        server.assert_refuses(said)
    finally:
        server.close()
