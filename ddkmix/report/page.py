"""A story as one HTML page that needs nothing else: no network, no script, one style sheet within.

The page's security policy says so to the browser too: nothing may be loaded and nothing may run, and only
the style sheet with this very hash counts. What charts show stands in tables as well, for those who cannot
see them, who copy numbers, or who print.
"""

import base64
import hashlib

from ddkmix.report.markup import Html, element, raw_style
from ddkmix.report.overview import cards, charts, gap_table
from ddkmix.report.scales import digits, thinned
from ddkmix.report.story import Story
from ddkmix.report.style import CSS
from ddkmix.report.tables import table
from ddkmix.report.updates import HEADER, update_rows

GENERATOR = "ddkmix report"
"""What says in the page that it is one of ours."""
_COLUMNS = 12
"""Evaluations in a table of everything: what fits on paper. Others are left out, and the table says so."""
_TABLES = (
    ("Loss gap, nats per token", "loss_gap", ".3f"),
    ("Standard error of the gap", "gap_error", ".3f"),
    ("Student's loss, nats per token", "student_loss", ".3f"),
    ("Teacher's loss, nats per token", "teacher_loss", ".3f"),
    ("Mixture weight of the steps that follow", "weights", ".3f"),
    ("Rows served so far", "served", ",.0f"),
    ("Epochs so far", "epochs", ".2f"),
)


def render_page(story: Story) -> str:
    """The whole document; the same story gives the same bytes."""
    sections = [
        _head(story),
        element("h2", "Gap by domain"),
        gap_table(story),
    ]
    if len(story.moments) > 1:
        sections += [
            element("h2", "Over time"),
            *charts(story),
            element("h2", "Domain by domain"),
            *cards(story),
            element("h2", "History of updates"),
            _history(story),
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


def _head(story: Story) -> Html:
    parts = [element("h1", story.title), element("p", story.status)]
    if story.share_done is not None:
        done = element(
            "progress", value=f"{story.share_done:.4f}", max="1", aria_label="share of the run's steps"
        )
        parts.append(done)
    facts = [*story.facts, *_gap_facts(story)]
    parts.append(
        element("dl", *(element("div", element("dt", name), element("dd", value)) for name, value in facts))
    )
    return element("header", *parts)


def _gap_facts(story: Story) -> list[tuple[str, str]]:
    last, first = update_rows(story)[-1], update_rows(story)[0]
    before = f" (was {first.mean:.3f})" if len(story.moments) > 1 else ""
    return [
        ("mean gap, nats per token", digits(last.mean) + before),
        ("worst gap, nats per token", digits(last.worst) + (f", {last.where}" if last.where else "")),
    ]


def _history(story: Story) -> Html:
    rows = [line.cells() for line in update_rows(story)]
    caption = (
        "One line for each evaluation, and the update of the weights that followed it. Moved: the share of "
        "the mixture that changed its domain, half the sum of all changes."
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
        rows = [
            [name, *(digits(story.moments[i].value(column, name), style) for i in shown)]
            for name in story.domains
        ]
        tables.append(element("details", element("summary", title), table(f"{title}. {note}", header, rows)))
    return tables
