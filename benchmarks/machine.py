"""The machine and the versions that a benchmark ran on, to stand beside its figures."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx


def describe_machine() -> dict[str, Any]:
    """CPU, cores, memory, GPUs and Python of the machine that this runs on, which may not be the server's."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": _gpus(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("gemma-server", "httpx", "torch")},
    }


async def describe_server(url: str) -> dict[str, Any]:
    """The server's address and, where it has `/version`, what it says there."""
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=10) as client:
        try:
            response = await client.get("/version")
            version = response.json() if response.status_code == 200 else None
        except (httpx.HTTPError, ValueError):
            version = None
    return {"url": url, "version": version}


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return result.stdout.strip().splitlines()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
