"""The table of promises: every test that it names exists."""

import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def table() -> str:
    """The section of BENCHMARKS.md."""
    text = (REPO / "BENCHMARKS.md").read_text(encoding="utf-8")
    return text.partition("## Promises")[2].partition("\n## ")[0]


def missing_tests(text: str) -> list[str]:
    """References `tests/FILE::TEST` in a text to tests that do not exist."""
    found = []
    for path, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text):
        file = REPO / path
        if not file.is_file() or f"\ndef {name}(" not in file.read_text(encoding="utf-8"):
            found.append(f"{path}::{name}")
    return found


def test_every_promise_of_ours_names_a_test_that_exists() -> None:
    """A promise without its test would be an advertisement."""
    text = table()
    assert [] == missing_tests(text)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert [] == [row[0] for row in rows if row[1].startswith("Y") and "::test_" not in row[1]]


def test_the_check_notices_a_test_that_is_gone() -> None:
    """A renamed test and a file that is not there are both named."""
    text = "`tests/tools/test_promises.py::test_of_yesterday` `tests/nowhere.py::test_a`"
    expected = ["tests/tools/test_promises.py::test_of_yesterday", "tests/nowhere.py::test_a"]
    assert expected == missing_tests(text)


def test_every_row_has_every_column() -> None:
    """A missing cell would shift one peer's promise to another."""
    lines = [line for line in table().splitlines() if line.startswith("|")]
    assert {lines[0].count("|")} == {line.count("|") for line in lines}
