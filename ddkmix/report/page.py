"""A story as one HTML page that needs nothing else: no network, no script, one style sheet within.

The page's security policy says so to the browser too: nothing may be loaded and nothing may run, and only
the style sheet with this very hash counts. What charts show stands in tables as well, for those who cannot
see them, who copy numbers, or who print.
"""

import base64
import hashlib
from collections.abc import Sequence
from functools import partial

import numpy as np

from ddkmix.report.markup import Html, element, raw_style
from ddkmix.report.overview import cards, charts, gap_table
from ddkmix.report.scales import digits, plus_minus, thinned
from ddkmix.report.story import Story
from ddkmix.report.style import CSS
from ddkmix.report.tables import table
from ddkmix.report.updates import HEADER, UpdateRow, update_rows

GENERATOR = "ddkmix report"
"""What says in the page that it is one of ours."""
_COLUMNS = 12
"""Evaluations in a table of everything: what fits on paper. Others are left out, and the table says so."""
_TABLES = (
    ("Loss gap, nats per token", "loss_gap", ".3f"),
    ("Half of the gap's 95 % interval", "half_width", ".3g"),
    ("Standard error of the gap", "gap_error", ".3f"),
    ("Student's loss, nats per token", "student_loss", ".3f"),
    ("Teacher's loss, nats per token", "teacher_loss", ".3f"),
    ("Student's bits per byte of text", "student_bits_per_byte", ".3f"),
    ("Teacher's bits per byte of text", "teacher_bits_per_byte", ".3f"),
    ("Excess loss, mean of max(0, student - teacher), nats per token", "excess_loss", ".3f"),
    ("KL(teacher || student), nats per token", "forward_kl", ".3f"),
    ("Mixture weight of the steps that follow", "weights", ".3f"),
    ("Rows served so far", "served", ",.0f"),
    ("Epochs so far", "epochs", ".2f"),
)


def render_page(story: Story) -> str:
    """The whole document; the same story gives the same bytes."""
    lines = update_rows(story)
    sections = [
        _head(story, lines),
        *(element("p", note, class_="note") for note in story.notes),
        element("h2", "Gap by domain"),
        gap_table(story),
    ]
    if len(story.moments) > 1:
        sections += [
            element("h2", "Over time"),
            *charts(story, lines),
            element("h2", "Domain by domain"),
            *cards(story),
            element("h2", "History of updates"),
            _history(lines),
            element("h2", "Every number"),
            *_everything(story),
        ]
    elif story.share_done is not None:
        sections.append(element("p", "One evaluation so far: curves begin with the second.", class_="soft"))
    sections += [
        element("h2", "Config"),
        element("details", element("summary", "The whole config, as YAML"), element("pre", story.config)),
    ]
    body = element("body", element("main", *sections))
    return f"<!doctype html>\n{element('html', _meta(story), body, lang='en')}\n"


def _meta(story: Story) -> Html:
    digest = base64.b64encode(hashlib.sha256(CSS.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("meta", name="generator", content=GENERATOR),
        element("link", rel="icon", href="data:,"),
        element("title", f"{story.title} · ddkmix"),
        raw_style(CSS),
    )


def _head(story: Story, lines: Sequence[UpdateRow]) -> Html:
    parts = [element("h1", story.title), element("p", story.status)]
    if story.share_done is not None:
        done = element(
            "progress", value=f"{story.share_done:.4f}", max="1", aria_label="share of the run's steps"
        )
        parts.append(done)
    facts = [*story.facts, *_gap_facts(lines)]
    parts.append(
        element("dl", *(element("div", element("dt", name), element("dd", value)) for name, value in facts))
    )
    return element("header", *parts)


def _gap_facts(lines: Sequence[UpdateRow]) -> list[tuple[str, str]]:
    first, last = lines[0], lines[-1].cells()
    before = f" (was {digits(first.mean)})" if len(lines) > 1 else ""
    return [
        ("mean gap, nats per token", last[1] + before),
        ("worst gap, nats per token", f"{last[2]}, {last[3]}"),
    ]


def _history(lines: Sequence[UpdateRow]) -> Html:
    rows = [line.cells() for line in lines]
    caption = (
        "One line for each evaluation, and the update of the weights that followed it. Moved: the share of "
        "the mixture that changed its domain, half the sum of all changes. No mean where a gap is not finite."
    )
    return table(caption, HEADER, rows, classes=dict.fromkeys((3, 5, 6), "text"))


def _everything(story: Story) -> list[Html]:
    """A table for each kind of number: domains down, evaluations across."""
    shown = thinned(len(story.moments), _COLUMNS)
    left_out = len(story.moments) - len(shown)
    note = (
        f"{len(shown)} of {len(story.moments)} evaluations; ddkmix show RUN --format json has all."
        if left_out
        else "Domains down, optimizer steps across."
    )
    header = ["domain", *(f"{story.moments[i].step:,}" for i in shown)]
    tables = []
    for title, column, style in _TABLES:
        values = story.table(column)
        if np.isnan(values).all():
            continue
        write = plus_minus if column == "half_width" else partial(digits, style=style)
        rows = [
            [name, *(write(value) for value in values[shown, i].tolist())]
            for i, name in enumerate(story.domains)
        ]
        tables.append(element("details", element("summary", title), table(f"{title}. {note}", header, rows)))
    return tables
