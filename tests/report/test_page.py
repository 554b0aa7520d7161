"""The page as text: whole, small, the same for the same run, and honest about what is not known."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddkmix.config import RunConfig, parse_config
from ddkmix.records import read_lines
from ddkmix.report.overview import gap_axis
from ddkmix.report.page import render_page
from ddkmix.report.story import Story, story_of_gaps, story_of_run
from ddkmix.types import DomainLosses
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
    assert [name, "", f"{last.column('loss_gap', [name])[0]:.3f}"] == first[:3]
    assert f"{last.column('epochs', [name])[0]:.2f} of 5" == first[-1]


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
    losses = replace(domain_losses([0.5, 2.0]), excess_loss=np.array([0.25, 0.125]))
    header, first, _ = cells(render_page(story_of_gaps(losses, {"a": 0.25, "b": 0.75}, config)))
    assert "0.125" == first[header.index("excess")]


def measured(config: RunConfig, gaps: list[float], errors: list[float], rows: list[float]) -> Story:
    """One measurement with these errors and numbers of rows."""
    losses = domain_losses(gaps)
    losses = replace(losses, gap_error=np.array(errors), effective_rows=np.array(rows))
    return story_of_gaps(losses, dict.fromkeys(losses.domains, 1 / len(gaps)), config)


def test_whiskers_are_the_intervals_of_the_losses(tiny_config: Callable[..., dict[str, Any]]) -> None:
    """Of four rows, each 3.18 standard errors long, where the axis says and as the column does."""
    story = measured(parse_config(tiny_config(), where="test"), [1.0, 2.0], [0.1, 0.2], [4.0, 4.0])
    axis = gap_axis(story)
    assert not axis.log
    whole = render_page(story)
    ends = re.findall(r'x1="([\d.]+)%" x2="([\d.]+)%" y1="10" y2="10" class="whisker"', whole)
    low, high = DomainLosses.from_json(story.last.losses).gap_interval()
    assert 2 == len(ends)
    for found, i in zip(ends, (1, 0), strict=True):
        expected = [4 + 92 * (end - axis.low) / (axis.high - axis.low) for end in (low[i], high[i])]
        assert expected == pytest.approx([float(end) for end in found], abs=0.01)
    header, b, a = cells(whole)
    assert ["0.636", "0.318"] == [row[header.index("±")] for row in (b, a)]
    assert "arrow" not in whole.replace(".arrow", "").replace("an arrow", "")


def test_an_interval_of_hardly_more_than_one_row_is_cut(tiny_config: Callable[..., dict[str, Any]]) -> None:
    """+- 76,885: the other bars keep their room, the whiskers end in arrows and the number is there."""
    story = measured(parse_config(tiny_config(), where="test"), [1.0, 2.0], [0.1, 0.1], [64.0, 1.2])
    assert gap_axis(story).high < 5
    whole = render_page(story)
    assert 2 == whole.count('class="arrow"')
    header, b, _ = cells(whole)
    assert "7.69e+04" == b[header.index("±")]


def test_gaps_of_next_to_nothing_keep_their_intervals(tiny_config: Callable[..., dict[str, Any]]) -> None:
    """0.01 +- 0.05 is not cut at 0.02."""
    story = measured(parse_config(tiny_config(), where="test"), [0.01, -0.01], [0.025, 0.025], [64.0, 64.0])
    assert 'class="arrow"' not in render_page(story)


@pytest.mark.parametrize("same_text", [False, True])
def test_a_measurement_says_what_its_numbers_are(
    tiny_config: Callable[..., dict[str, Any]], same_text: bool
) -> None:
    """Notes stand before the numbers, and whether bits per byte hold the separators' nats."""
    losses, config = domain_losses([0.5, 2.0]), parse_config(tiny_config(), where="test")
    losses = replace(losses, num_bytes=np.array([400, 400]))
    notes = ("Different tokenizers <b>.",)
    weights = {"a": 0.5, "b": 0.5}
    whole = render_page(story_of_gaps(losses, weights, config, notes=notes, same_text=same_text))
    assert '<p class="note">Different tokenizers &lt;b&gt;.</p>' in whole
    assert same_text == ("without the nats of separators" in whole)
    assert same_text != ("the nats of separators between documents counted in" in whole)


def test_what_was_measured_beside_the_losses_is_told_over_time(recorded_copy: Path) -> None:
    """Charts and tables of excess loss and KL where they were measured, and bits per byte; else nothing."""
    assert "KL(" not in page(recorded_copy)
    records = list(read_lines(recorded_copy / "intervals.jsonl"))
    for i, record in enumerate(records):
        for row in record["losses"].values():
            row |= {"excess_loss": 0.5 + i, "forward_kl": 0.25 + i}
    (recorded_copy / "intervals.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    whole = page(recorded_copy)
    assert ["code", "0.500", "1.500", "2.500", "3.500"] in cells(whole)
    assert ["code", "0.250", "1.250", "2.250", "3.250"] in cells(whole)
    assert 'id="excess-t"' in whole
    assert 'id="kl-t"' in whole
    bits = [f"{r['losses']['math']['student_bits_per_byte']:.3f}" for r in records]
    assert ["math", *bits] in cells(whole)


def test_a_domain_that_diverged_stands_first(recorded_copy: Path) -> None:
    """No mean over the others, in the head and in the history; no bar and no invented interval."""
    records = list(read_lines(recorded_copy / "intervals.jsonl"))
    records[-1]["losses"]["code"] |= {"loss_gap": None, "gap_error": None, "student_loss": None}
    (recorded_copy / "intervals.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    whole = page(recorded_copy)
    assert ["code", "", "not finite", "–"] == cells(whole)[1][:4]
    assert ["12", "– (2 of 3 domains)", "not finite", "code"] in [row[:4] for row in cells(whole)]
    assert "<span>not finite</span>" in whole
    assert "– ±" not in whole


def test_many_domains_are_folded_away_and_told_in_time(retold: Retold) -> None:
    """Cards of more than sixty; each column of numbers is put together once."""
    assert "Charts of 60 domains" not in page(retold(many(60)))
    assert "<summary>Charts of 61 domains</summary>" in page(retold(many(61)))


def test_every_table_scrolls_by_itself_and_every_chart_is_described(recorded_run: Path) -> None:
    """Boxes with names that the keyboard reaches; drawings that are pictures with titles, or hidden."""
    tags = Reader(page(recorded_run)).tags
    tables = [tag for tag, _ in tags if tag == "table"]
    boxes = [found for tag, found in tags if tag == "div" and found.get("class") == "scroll"]
    assert len(tables) == len(boxes)
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)
    drawings = [found for tag, found in tags if tag == "svg"]
    assert all(found.get("role") == "img" or found.get("aria-hidden") == "true" for found in drawings)
