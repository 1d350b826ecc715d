"""Writes docs/reliability.md from the list of cases and the marks of the tests (`make docs`).

Laws:
1. What shows a case is what carries its mark: a test that is skipped or expected to fail cannot carry one.
2. Tests are read, not imported: which marks there are does not depend on what is installed.
3. A case without a test says why; `problems` finds everything else.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
RELIABILITY_PAGE = ROOT / "docs" / "reliability.md"
CASES_FILE = TESTS / "reliability" / "cases.yaml"
RESULTS_FILE = TESTS / "reliability" / "results.yaml"

Tier = Literal["test", "slow", "chaos", "soak", "gpu", "release"]

_INTRODUCTION = """\
# Reliability

Written by `make docs` from `tests/reliability/cases.yaml` and from the marks of the tests; do not edit it by
hand. What can go wrong, what the server does then, and the test that shows it. A case has a test, or the reason
why it has none; `tests/test_house.py` fails otherwise.

## How to run it

| | |
|---|---|
| `make test` | what every commit passes: the cases marked *test* below |
| `make test-slow` | those marked *slow*, too; `make fuzz` is the requests made from the OpenAPI document |
| `make chaos` | real servers that are killed, stopped, starved and left |
| `make soak` | thousands of mixed requests to one server, and what is left of memory and blocks after them |

A test says what it shows with `@pytest.mark.covers("R01")`. A new case gets the next id of its section.

## Rules that make most of them pass

- A request is checked whole before anything is queued: its size before its JSON, its JSON before its fields,
  its texts' lengths before they are encoded, its ids and its room after (`server/api/`,
  `server/frontend/fitting.py`, `server/frontend/admission.py`). What is refused never reaches the engine.
- What a client wrote is text. Control tokens come from the server (`server/chat_template.py`), and no name of a
  client's is ever part of a path.
- Work that a client can make long runs off the event loop: texts are encoded in threads, and grammars are tried
  in a child process that can be killed (`server/frontend/grammar_check.py`).
- The engine is a process of its own behind one unnamed socket pair, and reads typed messages, not objects. For
  each accepted request it sends exactly one end, and every end frees through one place.
- Ids are the server's. A client's request id is a label; a client's cache salt only ever narrows what is shared
  under its key.
- What waits is bounded: requests in the queue, outputs in a mailbox, grammars in the checker and its cache. One
  more is refused with `Retry-After`.
- Metrics have labels from closed sets, logs no content, errors no paths.
- Weights are safetensors or GGUF, read by loaders that check each size against the file. Nothing in a model's
  directory is run.
"""

_TABLE_HEAD = "| | what happens | what the server does | when | shown by |\n|---|---|---|---|---|\n"


@dataclass(frozen=True, slots=True)
class Case:
    id: str
    section: str
    what: str
    """What happens."""
    does: str
    """What the server does then."""
    tier: Tier
    untested: str = ""
    """Why no test shows it."""
    note: str = ""
    """What the tests leave open."""


@dataclass(frozen=True, slots=True)
class MarkedTest:
    path: Path
    name: str
    cases: tuple[str, ...]
    marks: frozenset[str]
    """Its other marks."""


class MarkError(ValueError):
    """A mark that cannot be believed; the message says where it is."""


def load_cases() -> list[Case]:
    """In the page's order. Raises TypeError for an unknown or missing key."""
    sections = yaml.safe_load(CASES_FILE.read_text(encoding="utf-8"))
    return [
        Case(section=section["section"], **cast(Any, {key: str(value) for key, value in case.items()}))
        for section in sections
        for case in section["cases"]
    ]


def load_tests() -> list[MarkedTest]:
    """Those that carry a mark. Raises MarkError."""
    return [test for path in sorted(TESTS.rglob("*.py")) for test in marked_tests(path)]


def marked_tests(path: Path) -> Iterator[MarkedTest]:
    source = path.read_text(encoding="utf-8")
    if "covers(" not in source:
        return
    tree = ast.parse(source)
    module_marks = [
        mark
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
        for mark in _marks(ast.walk(node.value))
    ]
    believed: set[int] = set()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        marks = list(_marks(function.decorator_list))
        covers = [call for name, call in marks if name == "covers" and isinstance(call, ast.Call)]
        if not covers:
            continue
        believed.update(id(call) for call in covers)
        where = f"{path.name}::{function.name}"
        if len(covers) > 1:
            raise MarkError(f"{where} has several marks: one names all its cases")
        others = {name for name, _ in [*marks, *module_marks]} - {"covers", "parametrize"}
        if others & {"skip", "xfail"}:
            raise MarkError(f"{where} covers cases, and is skipped or expected to fail")
        if not function.name.startswith("Test" if isinstance(function, ast.ClassDef) else "test_"):
            raise MarkError(f"{where} covers cases, and is no test")
        yield MarkedTest(
            path,
            function.name,
            tuple(_case_id(argument, where) for call in covers for argument in call.args),
            frozenset(others),
        )
    for name, node in _marks(ast.walk(tree)):
        if name == "covers" and isinstance(node, ast.Call) and id(node) not in believed:
            raise MarkError(f"{path.name}:{node.lineno}: only a test itself can cover cases")


def problems(cases: Sequence[Case], tests: Sequence[MarkedTest]) -> list[str]:
    """What is untrue, as sentences."""
    found = []
    ids = [case.id for case in cases]
    found += [f"{case_id} is listed twice" for case_id in {each for each in ids if ids.count(each) > 1}]
    found += [
        f"{test.path.name}::{test.name} covers {case_id}, which is no case"
        for test in tests
        for case_id in test.cases
        if case_id not in ids
    ]
    for case in cases:
        shown_by = [test for test in tests if case.id in test.cases]
        if case.tier not in get_args(Tier):
            found.append(f"{case.id} has an unknown tier, {case.tier}")
        if not shown_by and not case.untested:
            found.append(f"{case.id} has neither a test nor a reason")
        if shown_by and case.untested:
            found.append(f"{case.id} has a test now: take its `untested` away")
        if case.tier == "test" and shown_by and all(test.marks & {"slow", "gpu"} for test in shown_by):
            found.append(f"{case.id} is of tier `test`, and no quick test shows it")
    return found


def reliability_page() -> str:
    """The text of docs/reliability.md. Raises MarkError."""
    tests = load_tests()
    cases = load_cases()
    parts = [_INTRODUCTION, _results_section(), _counts(cases, tests)]
    section = ""
    for case in cases:
        if case.section != section:
            section = case.section
            parts.append(f"\n## {section}\n\n{_TABLE_HEAD}")
        parts.append(_row(case, [test for test in tests if case.id in test.cases]))
    return "".join(parts)


def _marks(nodes: Any) -> Iterator[tuple[str, ast.expr]]:
    """The names of pytest's marks among `nodes`, and where they stand."""
    for node in nodes:
        target = node.func if isinstance(node, ast.Call) else node
        match target:
            case ast.Attribute(ast.Attribute(ast.Name("pytest"), "mark"), name):
                yield name, node


def _case_id(argument: ast.expr, where: str) -> str:
    if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
        raise MarkError(f"{where} covers {ast.unparse(argument)}, which is no literal")
    return argument.value


def _results_section() -> str:
    results = yaml.safe_load(RESULTS_FILE.read_text(encoding="utf-8"))
    if not results:
        return ""
    rows = "".join(
        f"| `{each['run']}` | {each['date']} | {each['machine']} | {each['found']} |\n" for each in results
    )
    return f"\n## What longer runs found\n\n| run | date | machine | found |\n|---|---|---|---|\n{rows}"


def _counts(cases: Sequence[Case], tests: Sequence[MarkedTest]) -> str:
    marked = {case_id for test in tests for case_id in test.cases}
    num_shown = len(marked & {case.id for case in cases})
    num_reasons = sum(bool(case.untested) for case in cases)
    pending = len(cases) - num_shown - num_reasons
    waiting = f"; {pending} wait for their test" if pending else ""
    return (
        f"\n## The cases\n\n{len(cases)} cases: {num_shown} shown by {len(tests)} tests, {num_reasons} with "
        f"the reason why no test shows them{waiting}.\n"
    )


def _row(case: Case, shown_by: Sequence[MarkedTest]) -> str:
    evidence = [_link(test) for test in shown_by]
    if case.untested:
        evidence.append(f"no test: {case.untested}")
    elif not shown_by:
        evidence.append("no test yet")
    if case.note:
        evidence.append(case.note)
    cells = (f'<a id="{case.id}"></a>{case.id}', case.what, case.does, case.tier, "<br>".join(evidence))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _link(test: MarkedTest) -> str:
    slow = " (slow)" if "slow" in test.marks else " (GPU)" if "gpu" in test.marks else ""
    path = test.path.relative_to(TESTS).as_posix()
    return f"[{path}::{test.name}](../tests/{path}){slow}"


def main() -> None:
    found = problems(load_cases(), load_tests())
    RELIABILITY_PAGE.write_text(reliability_page(), encoding="utf-8")
    print(*found, f"wrote {RELIABILITY_PAGE}", sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
