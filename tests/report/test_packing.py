"""The report of packing: one row per domain and split, the same numbers in every format."""

import json
from typing import Any

import pytest

from ddkmix.pack.facts import add_reports
from ddkmix.report.packing import render_packing

CODE = {
    "documents": 1000,
    "truncated": 7,
    "separators": 1000,
    "tokens": 15_000,
    "padding": 1_000,
    "bytes": 60_000,
    "rows": 1_000,
    "dropped": {"duplicate of held-out": 2, "empty": 1},
    "repeated": 5,
}


def report() -> dict[str, Any]:
    """Two domains, one of whose repeats nobody counted, and their sum."""
    splits = {"code": add_reports([CODE]), "math": add_reports([{**CODE, "dropped": {}, "repeated": None}])}
    total = add_reports(splits.values())
    return {name: {"train": facts} for name, facts in {**splits, "total": total}.items()}


def test_reports_add_up() -> None:
    """Counts and reasons are summed, shares are computed from the sums, unknown stays unknown."""
    total = report()["total"]["train"]
    assert (2000, 30_000, 120_000) == tuple(total[name] for name in ("documents", "tokens", "bytes"))
    assert {"duplicate of held-out": 2, "empty": 1} == total["dropped"]
    assert (2000 / 32_000, 4.0, None) == (total["padding_share"], total["bytes_per_token"], total["repeated"])


def test_nothing_adds_up_to_nothing() -> None:
    """A split without shards has shares too."""
    assert (0, 0, {}) == tuple(add_reports([])[name] for name in ("documents", "padding_share", "dropped"))


def test_the_table_has_a_line_per_split() -> None:
    """With thousands separators, and a question mark for what nobody counted."""
    lines = render_packing(report(), "table").splitlines()
    code = next(line for line in lines if line.lstrip().startswith("code"))
    assert "code train 1,000 7 15,000 60,000 4.00 1,000 6.25% 5 2 duplicate of held-out, 1 empty" == " ".join(
        code.split()
    )
    math = next(line for line in lines if line.lstrip().startswith("math"))
    assert "? -" == " ".join(math.split()[-2:])


def test_markdown_is_a_table() -> None:
    """Header, alignment, one line per domain and split."""
    lines = render_packing(report(), "markdown").splitlines()
    assert 2 + 3 == len(lines)
    assert {12} == {line.count("|") for line in lines}


@pytest.mark.parametrize("name", ["code", "math", "total"])
def test_json_is_the_report_itself(name: str) -> None:
    """Nothing is rounded or left out."""
    assert report()[name] == json.loads(render_packing(report(), "json"))[name]
