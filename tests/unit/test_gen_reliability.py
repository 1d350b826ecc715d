"""The page about reliability cannot say more than the tests show."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.gen_reliability import Case, MarkedTest, MarkError, load_cases, marked_tests, problems

SHOWN = Case("R01", "Requests", "an empty body", "400", "test")


def marked(tmp_path: Path, source: str) -> list[MarkedTest]:
    path = tmp_path / "test_x.py"
    path.write_text(f"import pytest\n{source}", encoding="utf-8")
    return list(marked_tests(path))


def test_marks_of_functions_and_methods_are_found_with_what_else_they_are(tmp_path: Path) -> None:
    found = marked(
        tmp_path,
        """
@pytest.mark.covers("R01", "R02")
@pytest.mark.parametrize("x", [1])
def test_one(x): ...

class TestAll:
    @pytest.mark.slow
    @pytest.mark.covers("H01")
    async def test_two(self): ...

def test_three(): ...
""",
    )
    assert [(test.name, test.cases, test.marks) for test in found] == [
        ("test_one", ("R01", "R02"), frozenset()),
        ("test_two", ("H01",), frozenset({"slow"})),
    ]


def test_the_marks_of_a_module_are_those_of_its_tests(tmp_path: Path) -> None:
    (test,) = marked(
        tmp_path, 'pytestmark = [pytest.mark.gpu]\n@pytest.mark.covers("R01")\ndef test_one(): ...'
    )
    assert test.marks == {"gpu"}


@pytest.mark.parametrize(
    "source",
    [
        '@pytest.mark.covers("R01")\n@pytest.mark.skip\ndef test_one(): ...',
        '@pytest.mark.covers("R01")\n@pytest.mark.xfail(reason="x")\ndef test_one(): ...',
        '@pytest.mark.covers("R01")\ndef helper(): ...',
        'CASE = "R01"\n@pytest.mark.covers(CASE)\ndef test_one(): ...',
        '@pytest.mark.covers("R01")\n@pytest.mark.covers("R02")\ndef test_one(): ...',
        'pytestmark = pytest.mark.covers("R01")',
        'X = pytest.param(1, marks=pytest.mark.covers("R01"))',
    ],
)
def test_a_mark_that_cannot_be_believed_is_an_error(tmp_path: Path, source: str) -> None:
    with pytest.raises(MarkError):
        marked(tmp_path, source)


def shown_by(*cases: str, marks: frozenset[str] = frozenset()) -> MarkedTest:
    return MarkedTest(Path("test_x.py"), "test_one", cases, marks)


@pytest.mark.parametrize(
    ("case", "tests", "said"),
    [
        (SHOWN, [], "neither"),
        (SHOWN, [shown_by("R01", "R99")], "R99, which is no case"),
        (SHOWN, [shown_by("R01", marks=frozenset({"slow"}))], "no quick test"),
        (Case("R01", "", "", "", "test", untested="x"), [shown_by("R01")], "has a test now"),
        (Case("R01", "", "", "", "sometimes"), [shown_by("R01")], "unknown tier"),  # type: ignore[arg-type]
    ],
)
def test_what_is_untrue_is_found(case: Case, tests: list[MarkedTest], said: str) -> None:
    (problem,) = problems([case], tests)
    assert said in problem


def test_a_case_with_a_quick_test_or_a_reason_is_in_order() -> None:
    reasoned = Case("R02", "", "", "", "release", untested="there is no image")
    assert problems([SHOWN, reasoned], [shown_by("R01"), shown_by("R01", marks=frozenset({"slow"}))]) == []


def test_the_ids_are_in_order_and_none_is_left_out() -> None:
    ids = [case.id for case in load_cases()]
    counts = {"R": 35, "H": 15, "E": 14, "K": 18, "L": 10, "S": 25}
    assert ids == [f"{letter}{number:02}" for letter, count in counts.items() for number in range(1, count + 1)]
