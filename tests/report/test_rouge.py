"""The report of Rouge-L: one row per domain and one of all, the same numbers in every format."""

import json

import numpy as np

from ddkmix.report.rouge import render_rouge
from ddkmix.responders import By
from ddkmix.rouge import ResponseRouge, RougeRows


def found(by: By = "student", shift: float = 0.0) -> ResponseRouge:
    """Two rows of one domain and a single one of another."""
    rows = {
        "chat": RougeRows(
            scores=np.array([0.25, 0.5]) + shift,
            num_tokens=np.array([1000, 2001]),
            ended=np.array([True, False]),
            reference_tokens=np.array([3, 4]),
        ),
        "quiz | faq": RougeRows(
            scores=np.array([0.0]) + shift,
            num_tokens=np.array([3]),
            ended=np.array([True]),
            reference_tokens=np.array([8]),
        ),
    }
    return ResponseRouge(by=by, domains=rows, left_out=())


def test_a_table_of_one_model() -> None:
    """Rouge-L with its error, lengths beside it; a single row has no error."""
    title, _, header, _, *lines = render_rouge([found()], "table").splitlines()
    assert "Rouge-L" == title
    assert "domain rows reference tokens student +- student tokens ended" == " ".join(header.split())
    assert "chat 2 3.5 0.3750 0.1250 1500.5 0.500" == " ".join(lines[0].split())
    assert "quiz | faq 1 8.0 0.0000 - 3.0 1.000" == " ".join(lines[1].split())
    assert "all rows 3 5.0 0.2500 0.1443 1001.3 0.667" == " ".join(lines[2].split())


def test_two_models_stand_side_by_side() -> None:
    """On the same rows, which are named once."""
    header, _, *lines = render_rouge([found(), found("teacher", 0.5)], "markdown").splitlines()
    names = [cell.strip() for cell in header.strip("|").split("|")]
    assert ["student", "+-", "student tokens", "ended", "teacher", "+-", "teacher tokens", "ended"] == names[
        3:
    ]
    assert r"| quiz \| faq | 1 | 8.0 | 0.0000 | - | 3.0 | 1.000 | 0.5000 | - | 3.0 | 1.000 |" == lines[1]


def test_json_has_the_numbers_unrounded() -> None:
    """By who answered, then by domain."""
    tree = json.loads(render_rouge([found(), found("teacher", 0.25)], "json"))
    assert ["student", "teacher"] == list(tree)
    assert {
        "rows": 2,
        "rouge_l": 0.375,
        "error": 0.125,
        "tokens": 1500.5,
        "ended": 0.5,
        "reference_tokens": 3.5,
    } == tree["student"]["domains"]["chat"]
    assert tree["student"]["domains"]["quiz | faq"]["error"] is None
    assert 0.5 == tree["teacher"]["all_rows"]["rouge_l"]
