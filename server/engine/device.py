"""Which device, dtype and number of threads the engine computes with.

torch is imported only where there may be a GPU: its import takes longer than all else in a start on a CPU.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from server.engine.dtype import DType
from server.engine.models.config import GemmaConfig


class DeviceError(ValueError):
    """The configuration asks for something that this machine or this model cannot do."""


def resolve_device(name: str) -> str:
    """auto: cuda where there is one, else cpu. Raises DeviceError."""
    if name not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"--device {name}: supported are auto, cpu and cuda")
    if name == "cpu" or (name == "auto" and not has_gpu_driver()):
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if name == "auto":
        return "cpu"
    build = "has no CUDA" if torch.version.cuda is None else "finds no usable GPU"
    raise DeviceError(f"--device cuda: this PyTorch ({torch.__version__}) {build}")


def has_gpu_driver() -> bool:
    """Whether it is worth asking PyTorch, whose import takes seconds."""
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"))


def resolve_dtype(name: str) -> DType:
    """auto: bfloat16, in which the models were trained. Raises DeviceError."""
    if name != "auto" and name not in list(DType):
        raise DeviceError(f"--dtype {name}: supported are auto, {', '.join(DType)}")
    return DType.BFLOAT16 if name == "auto" else DType(name)


def check_dtype(dtype: DType, config: GemmaConfig) -> None:
    """Raises DeviceError if the model cannot be computed in it."""
    if dtype is DType.FLOAT16 and config.model_type != "gemma":
        raise DeviceError(
            f"--dtype float16: the activations of {config.model_type} exceed its range (65504) and end in NaN; "
            "use bfloat16 or float32"
        )


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
