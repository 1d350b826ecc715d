"""What can be read off deploy/Dockerfile without a build."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")


def test_its_label_has_the_projects_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert re.findall(r'image\.version="([^"]+)"', DOCKERFILE) == [project["version"]]


@pytest.mark.covers("S18")
def test_locks_are_installed_with_their_hashes_alone() -> None:
    commands = re.split(r"&&|;;|\nRUN|\n\n", DOCKERFILE.replace("\\\n", " "))
    installs = [command for command in commands if "install" in command and "-r requirements/" in command]
    locked = [command for command in installs if ".lock" in command]
    assert len(locked) == 2
    assert all("--require-hashes" in command for command in locked)


def test_the_build_sees_what_it_copies_and_little_else() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    let_in = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        source.rstrip("/")
        for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
        for source in line.split()
    }
    assert "*" in lines
    assert copied
    for source in copied:
        assert (ROOT / source).exists()
        assert source in let_in or source.partition("/")[0] in let_in
    assert {path.partition("/")[0] for path in let_in} == {path.partition("/")[0] for path in copied}
