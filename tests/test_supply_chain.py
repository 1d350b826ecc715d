"""What is installed is what was chosen, and nothing that the server reads is run."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
SOURCES = sorted((ROOT / "server").rglob("*.py"))

FLOORS = {
    "starlette": "1.0.1",  # CVE-2026-48710: a forged Host decided which path a guard saw
    "h11": "0.16",  # CVE-2025-43859: chunks that a proxy reads otherwise
    "python-multipart": "0.0.27",  # CVE-2026-42561: headers of parts without end
    "torch": "2.10",  # CVE-2026-24747: what `weights_only` let through
}
"""Below these versions, flaws are known that a client or a model could use."""

RUNS_WHAT_IT_READS = re.compile(
    r"(?:builtins\.)?(?:eval|exec|compile|__import__)|os\.(?:system|popen|exec\w*|spawn\w*)"
    r"|(?:c?pickle|dill|marshal|shelve|jsonpickle|cloudpickle)\..*|torch\.load|torch\.hub\..*|numpy\.load|np\.load"
    r"|yaml\.(?:load|load_all|unsafe_load\w*|full_load\w*)|runpy\..*"
)
SERIALIZERS = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "marshal",
    "shelve",
    "cloudpickle",
    "joblib",
    "runpy",
    "code",
}


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0]))


def pins(path: Path) -> dict[str, str]:
    """name -> version"""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {name.lower(): pinned for name, pinned in found}


@pytest.mark.covers("S18")
@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_every_locked_package_has_one_version_and_hashes(lock: Path) -> None:
    blocks = re.split(r"\n(?=[A-Za-z0-9])", lock.read_text(encoding="utf-8"))
    packages = [block for block in blocks if not block.startswith("#")]
    assert packages
    for block in packages:
        name = block.splitlines()[0]
        assert re.match(r"[A-Za-z0-9._-]+==\S+", name), name
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), f"{name} has no hash"


@pytest.mark.covers("S18")
def test_locks_are_installed_with_their_hashes_alone() -> None:
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    installs = [line for line in lines if re.search(r"\$\((PIP_)?INSTALL\)", line) and ".lock" in line]
    assert len(installs) >= 4
    assert all("--require-hashes" in line for line in installs)


@pytest.mark.covers("S18")
@pytest.mark.parametrize("name", FLOORS)
def test_no_version_with_a_known_flaw_is_declared_or_locked(name: str) -> None:
    floor = version(FLOORS[name])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (declared,) = [line for line in project["dependencies"] if re.match(rf"{name}>=", line)]
    assert version(declared.partition(">=")[2].partition(",")[0]) >= floor
    files = [*LOCKS, ROOT / "requirements" / "torch-cpu.txt"]
    locked = [pinned[name] for path in files if name in (pinned := pins(path))]
    assert locked
    assert all(version(each) >= floor for each in locked)


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


@pytest.mark.covers("S19")
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_is_run(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not SERIALIZERS & {name.partition(".")[0] for name in imported(node)}, node
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert not RUNS_WHAT_IT_READS.fullmatch(name), f"line {node.lineno} calls {name}"
            assert "shell" not in {keyword.arg for keyword in node.keywords}, f"line {node.lineno}: a shell"
