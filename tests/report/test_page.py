"""The page as text: whole, small, the same for the same run, and honest about what is not known."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddkmix.config import parse_config
from ddkmix.report.page import render_page
from ddkmix.report.story import story_of_gaps, story_of_run
from ddkmix.tracking import read_lines
from tests.conftest import domain_losses
from tests.report.conftest import HOSTILE, many
from tests.report.test_markup import Reader

Retold = Callable[..., Path]
MOST_BYTES_OF_SEVEN, MOST_BYTES_OF_SIXTY = 150_000, 700_000


def page(run: Path) -> str:
    """The page of a run."""
    return render_page(story_of_run(run))


def cells(markup: str) -> list[list[str]]:
    """The body rows of the tables, as text."""
    rows = re.findall(r"<tr>(.*?)</tr>", markup, flags=re.DOTALL)
    return [[Reader(cell).words for cell in re.findall(r"<t[hd][^>]*>.*?</t[hd]>", row)] for row in rows]


def test_the_page_tells_every_number_of_the_run(recorded_run: Path) -> None:
    """Gaps, weights, rows and epochs of every evaluation stand in its tables, as in `show`."""
    records = list(read_lines(recorded_run / "intervals.jsonl"))
    rows = cells(page(recorded_run))
    for name in records[0]["losses"]:
        for column in ("loss_gap", "gap_error", "student_loss", "teacher_loss"):
            assert [name, *(f"{r['losses'][name][column]:.3f}" for r in records)] in rows
        assert [name, *(f"{r['weights'][name]:.3f}" for r in records)] in rows
        assert [name, *(f"{r['served'][name]:,}" for r in records)] in rows
        assert [name, *(f"{r['epochs'][name]:.2f}" for r in records)] in rows
    assert ["domain", "0", "4", "8", "12"] in rows


def test_the_first_table_has_the_last_numbers_and_the_limit(recorded_run: Path) -> None:
    """The domain that is furthest behind comes first."""
    story = story_of_run(recorded_run)
    name, last = story.domains[0], story.last
    first = cells(page(recorded_run))[1]
    assert [name, "", f"{last.value('loss_gap', name):.3f}"] == first[:3]
    assert f"{last.value('epochs', name):.2f} of 5" == first[-1]


def test_the_same_run_gives_the_same_bytes(recorded_run: Path) -> None:
    """No clock, no random names: pages can be compared."""
    assert page(recorded_run) == page(recorded_run)


def test_nothing_is_loaded_and_nothing_runs(recorded_run: Path) -> None:
    """No script, no address, no handler, no inline style; the policy names the style sheet's hash."""
    tags = Reader(page(recorded_run)).tags
    assert not {"script", "iframe", "object", "embed", "img", "base", "form"} & {tag for tag, _ in tags}
    attributes = {(name, value) for _, found in tags for name, value in found.items()}
    assert {("href", "data:,")} == {(n, v) for n, v in attributes if n in ("href", "src", "xlink:href")}
    assert not [name for name, _ in attributes if name == "style" or name.startswith("on")]
    assert any(
        n == "content" and str(v).startswith("default-src 'none'; style-src 'sha256-") for n, v in attributes
    )


@pytest.mark.parametrize("count", [3, 12])
def test_hostile_names_and_texts_stay_text(retold: Retold, count: int) -> None:
    """In the tables, the charts, the title of the window and the config."""
    names = [f"{HOSTILE[i % 3]}{i}" for i in range(count)]
    run = retold(names)
    config = run / "config.yaml"
    config.write_text(config.read_text() + "# </pre><script>alert(4)</script>\n")
    folder = run.rename(run.with_name("<img src=x onerror=alert(5)>&'\""))
    whole = page(folder)
    plain = page(retold(many(count)))
    assert [tag for tag, _ in Reader(plain).tags] == [tag for tag, _ in Reader(whole).tags]
    ids = [found["id"] for _, found in Reader(whole).tags if "id" in found]
    assert len(set(ids)) == len(ids)


def test_pages_are_small(retold: Retold) -> None:
    """Seven domains, and sixty."""
    assert MOST_BYTES_OF_SEVEN > len(page(retold(many(7))).encode())
    assert MOST_BYTES_OF_SIXTY > len(page(retold(many(60))).encode())


def test_a_long_run_makes_no_long_page(recorded_copy: Path) -> None:
    """Five hundred evaluations are thinned, and the page says so."""
    (record, *_) = read_lines(recorded_copy / "intervals.jsonl")
    lines = [json.dumps({**record, "step": step}) for step in range(0, 5000, 10)]
    (recorded_copy / "intervals.jsonl").write_text("\n".join(lines) + "\n")
    whole = page(recorded_copy)
    assert MOST_BYTES_OF_SEVEN * 2 > len(whole.encode())
    assert "Curves show 100 of 500 evaluations." in whole
    assert "12 of 500 evaluations; ddkmix show RUN --format json has all." in whole


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_is_not_known_is_a_dash(recorded_copy: Path, value: float | None) -> None:
    """In all columns of one domain and at one step of another; no nan reaches a chart."""
    records = list(read_lines(recorded_copy / "intervals.jsonl"))
    for record in records:
        record["losses"]["code"] = dict.fromkeys(record["losses"]["code"], value)
    records[1]["losses"]["math"] |= {"loss_gap": value, "gap_error": value, "student_loss": value}
    (recorded_copy / "intervals.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    whole = page(recorded_copy)
    assert ["code", "–", "–", "–", "–"] in cells(whole)
    assert not re.search(r"\b(nan|inf|NaN|Infinity|None)\b", whole)


def test_one_evaluation_has_a_table_and_no_curves(recorded_copy: Path) -> None:
    """A run that has only begun."""
    lines = (recorded_copy / "intervals.jsonl").read_text().splitlines(keepends=True)
    (recorded_copy / "intervals.jsonl").write_text(lines[0])
    whole = page(recorded_copy)
    assert "One evaluation so far: curves begin with the second." in whole
    assert 'class="curves"' not in whole


def test_a_measurement_without_a_run_is_a_page(tiny_config: Callable[..., dict[str, Any]]) -> None:
    """`ddkmix gaps`: no progress, no rows, DDK's weight, and the losses that only some measure."""
    config = parse_config(tiny_config(), where="test")
    story = story_of_gaps(domain_losses([0.5, 2.0]), {"a": 0.25, "b": 0.75}, config)
    whole = render_page(story)
    assert "<progress" not in whole
    header, *rows = cells(whole)
    assert ["DDK weight"] == header[-1:]
    assert [["b", "0.750"], ["a", "0.250"]] == [[row[0], row[-1]] for row in rows]
    assert "excess" not in header
    extra = {n: {**row, "excess_loss": 0.125} for n, row in story.last.losses.items()}
    object.__setattr__(story.last, "losses", extra)
    header, first, _ = cells(render_page(story))
    assert "0.125" == first[header.index("excess")]


def test_every_table_scrolls_by_itself_and_every_chart_is_described(recorded_run: Path) -> None:
    """Boxes with names that the keyboard reaches; drawings that are pictures with titles, or hidden."""
    tags = Reader(page(recorded_run)).tags
    tables = [tag for tag, _ in tags if tag == "table"]
    boxes = [found for tag, found in tags if tag == "div" and found.get("class") == "scroll"]
    assert len(tables) == len(boxes)
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)
    drawings = [found for tag, found in tags if tag == "svg"]
    assert all(found.get("role") == "img" or found.get("aria-hidden") == "true" for found in drawings)
