"""A run's history, made from its directory alone."""

import json

import pytest
import yaml

from ddkmix.errors import RunError
from ddkmix.report.history import read_intervals, render_history
from ddkmix.tracking import JsonLines
from tests.conftest import domain_losses


def record(step, gaps, weights, served, epochs):
    """One evaluation, as the trainer writes it."""
    domains = ["code", "math"]

    def by_domain(values):
        return dict(zip(domains, values, strict=True))

    return {
        "step": step,
        "weights": by_domain(weights),
        "served": by_domain(served),
        "epochs": by_domain(epochs),
        "losses": domain_losses(gaps, domains=domains).to_json(),
        "policy": {"mixture_weights": weights},
    }


RECORDS = [
    record(0, [2.0, 0.5], [0.5, 0.5], [0, 0], [0.0, 0.0]),
    record(40, [1.25, 0.4], [0.7, 0.3], [120, 121], [1.5, 0.333333]),
]
TABLES = {
    "loss gap (nats per token)": [["0", "2.000", "0.500"], ["40", "1.250", "0.400"]],
    "mixture weight of the steps that follow": [["0", "0.500", "0.500"], ["40", "0.700", "0.300"]],
    "rows served so far": [["0", "0", "0"], ["40", "120", "121"]],
    "epochs so far": [["0", "0.00", "0.00"], ["40", "1.50", "0.33"]],
}


@pytest.fixture
def run_dir(tmp_path):
    """A run directory with two evaluations."""
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"run_dir": str(tmp_path), "trainer": {"steps": 80}})
    )
    lines = JsonLines(tmp_path / "intervals.jsonl")
    for line in RECORDS:
        lines.append(line)
    return tmp_path


def test_every_evaluation_is_read_in_order(run_dir):
    """One record per evaluation, as it was written."""
    assert RECORDS == read_intervals(run_dir)


def test_markdown_shows_gaps_weights_rows_and_epochs(run_dir):
    """Four titled tables with a line per evaluation and a column per domain."""
    blocks = render_history(run_dir, "markdown").split("\n\n")
    tables = {}
    for title, table in zip(blocks[::2], blocks[1::2], strict=True):
        header, rule, *rows = [
            [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()
        ]
        assert ["step", "code", "math"] == header
        assert ["---:"] * 3 == rule
        tables[title.strip("*")] = rows
    assert tables == TABLES


def test_the_table_shows_the_same_numbers(run_dir):
    """The same cells in columns."""
    text = render_history(run_dir, "table")
    words = [line.split() for line in text.splitlines()]
    for title, rows in TABLES.items():
        assert title in text
        assert all(row in words for row in rows)


def test_json_is_the_records_themselves(run_dir):
    """Programs get everything."""
    assert RECORDS == json.loads(render_history(run_dir, "json"))


def test_a_torn_last_line_is_left_out(run_dir):
    """A run that is being written, or was killed, shows what is whole."""
    with (run_dir / "intervals.jsonl").open("a") as file:
        file.write('{"step": 80, "wei')
    assert [0, 40] == [line["step"] for line in read_intervals(run_dir)]


def test_a_number_that_is_missing_does_not_hide_the_rest(run_dir):
    """A gap that was not finite is null in the file and a dash on the screen."""
    broken = record(80, [float("nan"), 0.3], [0.7, 0.3], [200, 201], [2.0, 1.0])
    JsonLines(run_dir / "intervals.jsonl").append(broken)
    words = [line.split() for line in render_history(run_dir, "table").splitlines()]
    assert ["80", "-", "0.300"] in words


def test_a_folder_that_is_no_run_is_one_line(tmp_path):
    """The folder, and what it lacks."""
    with pytest.raises(RunError) as error:
        render_history(tmp_path, "table")
    assert f"{tmp_path} is not a run directory (no config.yaml)." == str(error.value)


@pytest.mark.parametrize("torn", [None, "", '{"step": 0'])
def test_a_run_without_an_evaluation_is_one_line(run_dir, torn):
    """No file yet, an empty one, or a first line that is not whole."""
    path = run_dir / "intervals.jsonl"
    path.unlink()
    if torn is not None:
        path.write_text(torn)
    with pytest.raises(RunError, match=f"^{run_dir} has no evaluation yet; it writes the first one before"):
        render_history(run_dir, "table")


def test_the_average_that_a_policy_keeps_is_shown(run_dir):
    """DoReMi's result, from the first update on; runs of other policies have no such table."""
    title = "average that the policy keeps of its weights (its result; before guards)"
    assert title not in render_history(run_dir, "table")
    (run_dir / "intervals.jsonl").unlink()
    for line in RECORDS:
        line = {**line, "policy": {"policy": {"average_weights": [0.123, 0.877]}}}
        JsonLines(run_dir / "intervals.jsonl").append(line)
    text = render_history(run_dir, "table")
    assert ["40", "0.123", "0.877"] in [line.split() for line in text.split(title)[1].splitlines()]
