"""A container without an engine: the read-only root of an image, and a process in it without any rights."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil

# What an engine mounts, for the first process of a PID namespace of its own. The network is the host's.
_ENTER = """
root=$1 uid=$2; shift 2
mount --bind "$root" "$root" && mount -o remount,ro,bind "$root" &&
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp" && mount --bind "$CACHE" "$root/cache" &&
mount -t proc proc "$root/proc" && mount --rbind /dev "$root/dev" || exit 125
exec chroot "$root" /usr/bin/setpriv --reuid "$uid" --regid "$uid" --clear-groups --no-new-privs \
    --bounding-set=-all --inh-caps=-all /usr/bin/env -i "$@"
"""


def image_configuration(image: str) -> dict[str, Any]:
    """OCI's: Env, Entrypoint, Cmd, User, Labels and the others."""
    inspected = subprocess.run(
        ["buildah", "inspect", "--type", "image", image], check=True, capture_output=True, text=True
    )
    configuration: dict[str, Any] = json.loads(inspected.stdout)["OCIv1"]["config"]
    return configuration


class Container:
    """`cache` is mounted at /cache, and outlives it."""

    def __init__(
        self,
        root: Path,
        configuration: Mapping[str, Any],
        cache: Path,
        environment: Mapping[str, str],
        *,
        command: list[str] | None = None,
        uid: int | None = None,
    ) -> None:
        """command and uid: instead of the image's own."""
        cache.chmod(0o1777)
        if command is None:
            command = [*configuration["Entrypoint"], *configuration["Cmd"]]
        user = configuration["User"].partition(":")[0] if uid is None else str(uid)
        variables = [*configuration["Env"], *(f"{name}={value}" for name, value in environment.items())]
        self._log = tempfile.NamedTemporaryFile(mode="w+", suffix=".log")  # noqa: SIM115  # closed by `close`
        self.started = time.monotonic()
        self._unshare = subprocess.Popen(
            [
                *("unshare", "--mount", "--pid", "--fork", "--kill-child"),
                *("sh", "-c", _ENTER, "sh", str(root), user, *variables, *command),
            ],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "CACHE": str(cache)},
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self.url = f"http://127.0.0.1:{environment.get('GEMMA_SERVER_PORT', 8000)}"

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text()

    @property
    def first_process(self) -> psutil.Process:
        (child,) = psutil.Process(self._unshare.pid).children()
        return child

    def wait_ready(self, seconds: float = 90) -> float:
        """Waits for /readyz. Returns the seconds since the start."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._unshare.poll() is None:
            try:
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return time.monotonic() - self.started
            except httpx.TransportError:
                pass
            time.sleep(0.02)
        raise AssertionError(f"not ready:\n{self.log}")

    def wait_exit(self, seconds: float = 60) -> int:
        return self._unshare.wait(seconds)

    def close(self) -> None:
        self._unshare.kill()  # and with it, what runs inside
        self._unshare.wait()
        self._log.close()
