"""Device, dtype and thread choices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.engine.device import (
    DeviceError,
    _cgroup_cores,
    check_dtype,
    default_num_threads,
    resolve_device,
    resolve_dtype,
)
from server.engine.dtype import DType
from server.engine.models.config import GemmaConfig
from server.engine.models.config_reader import read_hf

GEMMA_1 = read_hf({"model_type": "gemma"})
LATER = [read_hf({"model_type": model_type}) for model_type in ("gemma2", "gemma3_text")]


def test_dtype_auto_is_bfloat16_and_names_are_taken_literally() -> None:
    assert resolve_dtype("auto") is DType.BFLOAT16
    assert resolve_dtype("float32") is DType.FLOAT32
    assert resolve_dtype("float16") is DType.FLOAT16
    check_dtype(DType.FLOAT16, GEMMA_1)
    check_dtype(DType.FLOAT32, LATER[0])


@pytest.mark.parametrize("config", LATER)
def test_float16_is_refused_for_the_generations_that_overflow_it(config: GemmaConfig) -> None:
    with pytest.raises(DeviceError, match=r"--dtype float16.*65504"):
        check_dtype(DType.FLOAT16, config)


def test_unknown_dtype_and_device_are_refused_by_name() -> None:
    with pytest.raises(DeviceError, match="--dtype int3"):
        resolve_dtype("int3")
    with pytest.raises(DeviceError, match="--device tpu"):
        resolve_device("tpu")


def test_auto_takes_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.device.has_gpu_driver", lambda: True)
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert resolve_device("auto") == expected
    with pytest.raises(DeviceError, match="--device cuda"):
        resolve_device("cuda")


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", None), ("150000 100000", 2), ("50000 100000", 1)])
def test_the_containers_cpu_limit_is_read(tmp_path: Path, quota: str, cores: int | None) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    assert _cgroup_cores(tmp_path) == cores


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 2), (3, 2), (8, 7)])
def test_of_more_than_two_cores_one_is_left_to_the_front(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr("server.engine.device._cgroup_cores", lambda _: None)
    assert default_num_threads() == threads
