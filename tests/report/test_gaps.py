"""The gap report in its three formats."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from ddkmix.policies.ddk import Ddk
from ddkmix.report.gaps import ddk_weights, render_gaps, render_markdown, render_table
from ddkmix.types import DomainLosses
from tests.conftest import domain_losses

LOSSES = DomainLosses(
    domains=("code", "math"),
    student_loss=np.array([3.0, 2.0]),
    teacher_loss=np.array([1.0, 2.5]),
    student_error=np.array([0.1, 0.2]),
    gap_error=np.array([0.0512, 0.0678]),
    num_tokens=np.array([100, 200]),
    num_bytes=np.array([400, 500]),
)
WEIGHTS = {"code": 0.7512, "math": 0.2488}
HEADER = ["domain", "teacher", "student", "gap", "+-", "ratio", "teacher b/B", "student b/B", "DDK weight"]
ROWS = [
    # b/B: nats x tokens / (bytes x log 2): 1 x 100 / 400 / log 2 = 0.361, and so on
    ["code", "1.000", "3.000", "2.000", "0.051", "7.389", "0.361", "1.082", "0.751"],
    ["math", "2.500", "2.000", "-0.500", "0.068", "0.6065", "1.443", "1.154", "0.249"],
]
MEAN = ["mean", "1.750", "2.500", "0.750", "", "", "0.902", "1.118", ""]


def cells(line):
    """The cells of a line of Markdown."""
    return [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]


def test_markdown_holds_every_number_and_the_means():
    """Header, alignment, one line per domain, and the mean over domains where a mean makes sense."""
    lines = render_gaps(LOSSES, WEIGHTS, "markdown").splitlines()
    assert [HEADER, ROWS[0], ROWS[1], MEAN] == [cells(line) for line in (lines[0], *lines[2:])]
    assert ["---", *["---:"] * 8] == cells(lines[1])
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines)


def test_what_was_measured_beside_the_losses_has_columns_of_its_own():
    """Before the weights, with means; in JSON by its full name; else nothing."""
    losses = replace(LOSSES, excess_loss=np.array([2.1, 0.25]), forward_kl=np.array([1.5, 0.5]))
    lines = render_gaps(losses, WEIGHTS, "markdown").splitlines()
    assert [*HEADER[:-1], "excess", "KL", HEADER[-1]] == cells(lines[0])
    assert [*ROWS[0][:-1], "2.100", "1.500", ROWS[0][-1]] == cells(lines[2])
    assert [*MEAN[:-1], "1.175", "1.000", ""] == cells(lines[4])
    alone = render_gaps(replace(LOSSES, forward_kl=np.array([1.5, 0.5])), WEIGHTS, "markdown")
    assert [*HEADER[:-1], "KL", HEADER[-1]] == cells(alone.splitlines()[0])
    table = json.loads(render_gaps(losses, WEIGHTS, "json"))
    assert (0.25, 0.5) == (table["math"]["excess_loss"], table["math"]["forward_kl"])


def test_the_table_holds_the_same_numbers_for_people():
    """The same cells in columns, under the title."""
    lines = render_gaps(LOSSES, WEIGHTS, "table", title="step 40").splitlines()
    assert "step 40" == lines[0]
    words = [line.split() for line in lines]
    for row in [*ROWS, [cell for cell in MEAN if cell]]:
        assert row in words


def test_the_title_of_the_weights_can_be_another():
    """In a run they are the weights in force, not what DDK would choose."""
    first = render_gaps(LOSSES, WEIGHTS, "markdown", weights_title="weight").splitlines()[0]
    assert "weight" == cells(first)[-1]


def test_json_holds_every_number_in_full():
    """Programs get unrounded numbers under the names of `DomainLosses`, and the weight."""
    tree = json.loads(render_gaps(LOSSES, WEIGHTS, "json"))
    assert {name: {**row, "weight": WEIGHTS[name]} for name, row in LOSSES.to_json().items()} == tree
    assert math.exp(2) == pytest.approx(tree["code"]["perplexity_ratio"])
    assert all(type(value) in (int, float) for row in tree.values() for value in row.values())


def refuse(constant):
    """What a strict JSON reader does with NaN and Infinity."""
    raise ValueError(constant)


def test_json_stays_json_without_standard_errors_and_with_overflowing_ratios():
    """One row per domain has no standard error, and e^1000 is no number: both are null."""
    losses = replace(
        domain_losses([1000.0, 0.5]), gap_error=np.full(2, np.nan), student_error=np.full(2, np.nan)
    )
    tree = json.loads(render_gaps(losses, {"a": 1.0, "b": 0.0}, "json"), parse_constant=refuse)
    assert (None, None, None) == tuple(
        tree["a"][key] for key in ("gap_error", "student_error", "perplexity_ratio")
    )
    assert 1000.0 == tree["a"]["loss_gap"]
    assert math.exp(0.5) == pytest.approx(tree["b"]["perplexity_ratio"])


@pytest.mark.parametrize("style", ["table", "markdown"])
def test_texts_show_what_is_missing(style):
    """Without a standard error the cell says nan; nothing breaks."""
    losses = replace(domain_losses([1.0]), gap_error=np.array([np.nan]))
    assert "nan" in render_gaps(losses, {"a": 1.0}, style)


def test_ddk_weights_are_one_update_from_the_uniform_mixture():
    """Signals 6 and 3 from uniform: psi is 2 : 1, and 0.5 x 2/3 + 0.25 = 0.583."""
    losses = domain_losses([math.log(math.log(6)), math.log(math.log(3))])
    assert {"a": 0.5 * 2 / 3 + 0.25, "b": 0.5 / 3 + 0.25} == pytest.approx(ddk_weights(losses))


def test_ddk_weights_follow_the_policy_of_the_config():
    """Another uniform share and signal: gaps log 3 and 0 are 3 : 1, and 0.8 x 3/4 + 0.1 = 0.7."""
    policy = Ddk(uniform_mix=0.2, signal="loss_gap")
    weights = ddk_weights(domain_losses([math.log(3), 0.0]), policy)
    assert {"a": 0.7, "b": 0.3} == pytest.approx(weights)


def test_a_long_table_is_never_folded_or_cut():
    """Thirty domains with long names: every name and number is there in full."""
    names = [f"a-domain-with-a-rather-long-name-{i:02d}" for i in range(30)]
    rows = [[name, "1.000", f"{i}.500"] for i, name in enumerate(names)]
    words = [line.split() for line in render_table(["domain", "x", "y"], rows).splitlines()]
    assert all(row in words for row in rows)


def test_a_wide_table_is_never_folded_or_cut():
    """Thirty columns, as in the history of a run with thirty domains."""
    names = [f"a-domain-with-a-rather-long-name-{i:02d}" for i in range(30)]
    header, rule, row = render_table(["step", *names], [["40", *["0.123"] * 30]]).strip().splitlines()
    assert ["step", *names] == header.split()
    assert ["40", *["0.123"] * 30] == row.split()
    assert rule


def test_a_title_longer_than_its_table_stays_on_one_line():
    """The title is the first line, whole."""
    title = "under the weights of the first interval"
    assert title == render_table(["a"], [["1"]], title).splitlines()[0]


def test_texts_that_look_like_markup_are_shown_as_they_are():
    """A name in square brackets is a name, not a style."""
    assert "[bold]x[/bold]" in render_table(["domain"], [["[bold]x[/bold]"]])


def test_no_line_ends_in_blanks():
    """A table pasted into a file or an issue is clean."""
    lines = render_gaps(LOSSES, WEIGHTS, "table").splitlines()
    assert lines == [line.rstrip() for line in lines]


@pytest.mark.parametrize("place", ["header", "cell", "title"])
def test_what_steers_a_terminal_is_shown_by_its_number(place):
    """Names come from other people's files: an escape, a turn of the reading order, the end of a line."""
    name = "a\u202eb\x1b[31mc\nd"
    shown = "a\\u202eb\\u001b[31mc\\nd"
    header, row = (name if place == "header" else "x"), (name if place == "cell" else "y")
    text = render_table([header], [[row]], name if place == "title" else "t")
    assert shown in text
    assert not {"\u202e", "\x1b"} & set(text)
    assert 4 == len([line for line in text.splitlines() if line])


def test_a_bar_in_a_name_ends_no_cell_of_markdown():
    """As GitHub's Markdown reads it."""
    lines = render_markdown(["domain", "a|b"], [["x|y\nz\u202e", "1"]]).splitlines()
    assert ["| domain | a\\|b |", "| --- | ---: |", "| x\\|y\\nz\\u202e | 1 |"] == lines
