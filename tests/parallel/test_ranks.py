"""One model on several ranks, which are processes on the CPU, gives what one process gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from server.engine.build import StartError, build_engine
from server.engine.models.config import expected_weights
from server.engine.models.config_reader import read_hf
from server.engine.types import EngineConfig
from tests.parity.harness import CONFIGS, WIDE, checkpoint, hf_logits

ROOT = Path(__file__).parents[2]
NAMES = ["gemma1-multi-query", "gemma2-tight-softcaps", "gemma1", "gemma3"]
"""With 1 KV head, 2, 2 and 2, so that 4 ranks share them in each case; with windows and soft-caps, too."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in NAMES:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(CONFIGS[name]))
        weights = {f"model.{key}": tensor for key, tensor in checkpoint(name)}
        save_file(weights, folder / name / "model.safetensors")
    return folder


def drive(model: Path, num_ranks: int, quantization: str = "none") -> dict[str, Any]:
    """What tests.parallel.drive_engine prints, in a process of its own, since it becomes rank 0."""
    command = [sys.executable, "-m", "tests.parallel.drive_engine", str(model), str(num_ranks), quantization]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert run.returncode == 0, run.stderr[-3000:]
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize(
    "name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])]
)
def test_two_and_four_ranks_give_what_one_gives(models: Path, name: str) -> None:
    one = drive(models / name, 1)
    assert len(one["tokens"]["r0"]) == 12
    for num_ranks in (2, 4):
        some = drive(models / name, num_ranks)
        assert some["tokens"] == one["tokens"]
        torch.testing.assert_close(
            torch.tensor(some["logprobs"]), torch.tensor(one["logprobs"]), atol=2e-5, rtol=0
        )


@pytest.mark.slow
def test_two_ranks_give_what_one_gives_in_4_bits(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(WIDE))
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"model.{name}": torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        for name, shape in expected_weights(read_hf(WIDE)).items()
    }
    save_file(weights, tmp_path / "model.safetensors")
    one, two, exact = (drive(tmp_path, *more) for more in ((1, "int4"), (2, "int4"), (1,)))
    assert two["tokens"] == one["tokens"]
    logprobs = (torch.tensor(each["logprobs"]) for each in (two, one))
    torch.testing.assert_close(*logprobs, atol=2e-5, rtol=0)
    assert exact["logprobs"] != one["logprobs"]


def test_their_logits_are_those_of_transformers(models: Path) -> None:
    result = drive(models / "gemma1-multi-query", 2)
    logits = hf_logits("gemma1-multi-query", result["prompt"])
    expected = torch.log_softmax(logits[:-1], dim=-1).gather(1, torch.tensor(result["prompt"][1:])[:, None])
    torch.testing.assert_close(torch.tensor(result["logprobs"]), expected[:, 0], atol=2e-5, rtol=0)


def test_a_rank_that_ends_ends_the_others(models: Path) -> None:
    command = [sys.executable, "-m", "tests.parallel.drive_engine", str(models / "gemma1"), "2", "none", "wait"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as engine:
        assert engine.stdout is not None
        other = int(engine.stdout.readline())
        os.kill(other, signal.SIGKILL)
        _, error = engine.communicate(timeout=60)
    assert engine.returncode != 0
    assert "RuntimeError" in error


def test_what_cannot_be_dealt_out_is_refused_before_anything_is_started(models: Path) -> None:
    config = EngineConfig(model_path=str(models / "gemma1"), device="cpu", tensor_parallel_size=3)
    with pytest.raises(StartError, match="--tensor-parallel-size 3 does not divide the model's 4 heads"):
        build_engine(config, lambda *_: None)


def test_the_native_kernels_compute_alone(models: Path) -> None:
    config = EngineConfig(
        model_path=str(models / "gemma1"), device="cpu", backend="native", tensor_parallel_size=2
    )
    with pytest.raises(StartError, match="leave --tensor-parallel-size out"):
        build_engine(config, lambda *_: None)
