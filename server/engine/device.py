"""Which device, dtype and number of threads the engine computes with."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from server.engine.models.config import GemmaConfig

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


class DeviceError(ValueError):
    """The configuration asks for something that this machine or this model cannot do."""


def resolve_device(name: str) -> torch.device:
    """auto: CUDA where there is one. Raises DeviceError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise DeviceError(f"--device {name}: supported are auto, cpu and cuda")
    if name == "cuda" and not torch.cuda.is_available():
        build = "has no CUDA" if torch.version.cuda is None else "finds no usable GPU"
        raise DeviceError(f"--device cuda: this PyTorch ({torch.__version__}) {build}")
    return torch.device(name)


def resolve_dtype(name: str, config: GemmaConfig) -> torch.dtype:
    """auto: bfloat16, in which the models were trained. Raises DeviceError."""
    dtype = torch.bfloat16 if name == "auto" else _DTYPES.get(name)
    if dtype is None:
        raise DeviceError(f"--dtype {name}: supported are auto, {', '.join(_DTYPES)}")
    if dtype is torch.float16 and config.model_type != "gemma":
        raise DeviceError(
            f"--dtype float16: the activations of {config.model_type} exceed its range (65504) and end in NaN; "
            "use bfloat16 or float32"
        )
    return dtype


def default_num_threads() -> int:
    """Cores that this process may use; of more than two, one is left to the front."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_cores(Path("/sys/fs/cgroup"))
    if quota is not None:
        cores = max(1, min(cores, quota))
    return cores - 1 if cores > 2 else cores


def _cgroup_cores(root: Path) -> int | None:
    """The container's CPU limit in cores, rounded up (cgroup v2 cpu.max, v1 cpu.cfs_quota_us)."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if quota in ("max", "-1"):
        return None
    return math.ceil(int(quota) / int(period))
