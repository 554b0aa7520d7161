"""The report of generated responses: one row per domain and the sum, the same numbers in every format."""

import json
from pathlib import Path

from ddkmix.report.generated import render_generated
from ddkmix.response_store.reader import ResponseTotals

TOTALS = {
    "chat": ResponseTotals(rows=1000, tokens=12_500, ended=900, empty=1),
    "quiz": ResponseTotals(rows=4, tokens=4, ended=4, empty=0),
}
STORES = {"chat": Path("responses/a|b"), "quiz": Path("responses/c")}


def test_a_table() -> None:
    """With the sum, and where each store lies."""
    _, header, _, *lines = render_generated(TOTALS, STORES, "table").splitlines()
    assert "domain rows tokens tokens/row ended empty store" == " ".join(header.split())
    assert "chat 1,000 12,500 12.5 900 1 responses/a|b" == " ".join(lines[0].split())
    assert "total 1,004 12,504 12.5 904 1" == " ".join(lines[2].split())


def test_markdown() -> None:
    """The same; nothing in a path ends a cell."""
    lines = render_generated(TOTALS, STORES, "markdown").splitlines()
    assert r"| chat | 1,000 | 12,500 | 12.5 | 900 | 1 | responses/a\|b |" == lines[2]
    assert "| total | 1,004 | 12,504 | 12.5 | 904 | 1 |  |" == lines[-1]


def test_json() -> None:
    """Plain numbers; the sum lies nowhere."""
    tree = json.loads(render_generated(TOTALS, STORES, "json"))
    assert {"rows": 4, "tokens": 4, "ended": 4, "empty": 0, "store": "responses/c"} == tree["quiz"]
    assert {"rows": 1004, "tokens": 12_504, "ended": 904, "empty": 1, "store": None} == tree["total"]


def test_nothing_generated_is_a_table_too() -> None:
    """A part without a shard."""
    assert "| total | 0 | 0 | - | 0 | 0 |  |" == render_generated({}, {}, "markdown").splitlines()[-1]
