"""A story as one picture, drawn by matplotlib: for papers, slides and chats that take no page.

It shows what the page shows, in the same order: the gaps now, curves over time, and each domain by itself.
Figures are made without pyplot, which would keep them and choose a window.
"""

import io
import math
from typing import Any

import numpy as np

from ddkmix.report.charts import STYLES, Curve
from ddkmix.report.overview import gap_axis
from ddkmix.report.scales import Axis, axis_over, binned, short, thinned
from ddkmix.report.story import Story
from ddkmix.report.updates import update_rows

_COLOURS = ("#0072b2", "#c04e00", "#00805c", "#882255", "#8a6a00", "#aa4499", "#3a86b8", "#4a4f55")
_DASHES = ("-", "--", ":", "-.")
_WIDTH, _ROW, _CARD = 10.0, 2.6, 1.25
"""Inches: of the picture, and the height of a row of charts and of small charts."""
_CARDS, _MOST_CARDS = 6, 60
"""In a row, and in all: matplotlib takes a tenth of a second for each."""
_POINTS, _BINS = 200, 500
_PLAIN = {"parse_math": False}
"""A name with $ in it is a name, not a formula."""


def render_picture(story: Story) -> bytes:
    """A PNG at 150 dots per inch; the mark of our reports is in its metadata."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = len(story.moments) > 1
    count = len(story.domains)
    heights = [1.2 + 0.2 * count]
    if timed:
        heights += [3 * _ROW, 0.9 + _CARD * math.ceil(min(count, _MOST_CARDS) / _CARDS)]
    with rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(_WIDTH, sum(heights)))
        FigureCanvasAgg(figure)
        parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        parts[0].suptitle(f"{story.title}\n{story.status}", y=1 - 0.1 / heights[0], **_PLAIN)
        _gaps(parts[0], story)
        _margins(parts[0], heights[0], left=0.3 + 0.065 * max(len(_short(name)) for name in story.domains))
        if timed:
            _over_time(parts[1], story)
            _margins(parts[1], heights[1], top=0.3)
            _cards(parts[2], story)
            _margins(parts[2], heights[2])
        target = io.BytesIO()
        figure.savefig(target, format="png", dpi=150, metadata={"Software": "ddkmix report"})
    return target.getvalue()


def _margins(part: Any, height: float, *, left: float = 0.5, top: float = 0.6) -> None:
    """Room around charts, in inches; matplotlib's own layouts take seconds for sixty of them."""
    part.subplots_adjust(
        left=left / _WIDTH, right=1 - 0.2 / _WIDTH, bottom=0.45 / height, top=1 - top / height, hspace=0.35
    )


def _gaps(part: Any, story: Story) -> None:
    """Dots with 95 % intervals, the largest at the top."""
    axes = part.subplots()
    places = np.arange(len(story.domains))
    gaps, half, axis = story.now("loss_gap"), story.now("half_width"), gap_axis(story)
    known = np.isfinite(gaps)
    axes.barh(places[known], gaps[known], height=0.45, color="#b9d3e6")
    sure = known & ~np.isnan(half)
    low, high = gaps - half, gaps + half
    axes.hlines(
        places[sure],
        np.maximum(low, axis.low)[sure],
        np.minimum(high, axis.high)[sure],
        color="#1b1f24",
        lw=1,
    )
    for end, beyond, edge, head in (
        (low, low < axis.low, axis.low, "<"),
        (high, high > axis.high, axis.high, ">"),
    ):
        axes.plot(end[sure & ~beyond], places[sure & ~beyond], "|", color="#1b1f24", ms=5, mew=1)
        axes.plot(
            np.full(int(beyond.sum()), edge), places[beyond], head, color="#1b1f24", ms=3, clip_on=False
        )
    axes.set_xlim(axis.low, axis.high)
    axes.plot(gaps[known], places[known], "o", color=_COLOURS[0], ms=4)
    axes.set_yticks(places, [_short(name) for name in story.domains], **_PLAIN)
    axes.set_ylim(len(story.domains) - 0.4, -0.6)
    axes.axvline(0.0, color="#59636e", lw=0.8)
    for place, name in zip(places, story.domains, strict=True):
        if why := story.no_gap(name):
            axes.text(0.0, place, f" {why}", va="center", fontsize=7, color="#59636e")
    axes.set_xlabel("loss gap with its 95 % interval, nats per token; arrows: it goes on beyond")


def _over_time(part: Any, story: Story) -> None:
    cells = part.subplots(3, 2).ravel()
    shown = thinned(len(story.moments), _POINTS)
    columns = (
        ("loss gap, nats per token", "loss_gap"),
        ("mixture weight of the steps that follow", "weights"),
        ("rows served", "served"),
        ("epochs", "epochs"),
    )
    for axes, (title, column) in zip(cells, columns, strict=False):
        curves = _curves(story, column, shown)
        for i, curve in reversed(list(enumerate(curves))):  # the largest gaps on top
            style: dict[str, Any] = {"color": "#59636e", "lw": 0.5, "alpha": 0.4}
            if i < STYLES:
                style = {"color": _COLOURS[i], "ls": _DASHES[i % 4], "lw": 1.4, "label": _short(curve.name)}
            drawstyle = "steps-post" if column == "weights" else "default"
            axes.plot(curve.xs, curve.ys, drawstyle=drawstyle, **style)
        log = False
        if column == "loss_gap":
            axis = axis_over(
                story.table(column)[shown].ravel(), ends=np.concatenate([curve.ends() for curve in curves])
            )
            log = axis.log
            for i, curve in enumerate(curves[:STYLES]):
                _bars(axes, curve, axis, _COLOURS[i])
            axes.set_ylim(axis.low, axis.high)
        _finish(axes, title, log=log)
        if column == "served":
            axes.yaxis.set_major_formatter(lambda value, _: short(value))  # 1000000 has no room
    _legend(cells[0])
    rows = update_rows(story)
    log = axis_over([v for row in rows for v in (row.worst, row.mean)]).log
    cells[4].plot(story.steps, [row.worst for row in rows], "--", color=_COLOURS[1], label="worst")
    cells[4].plot(story.steps, [row.mean for row in rows], "-", color=_COLOURS[0], label="mean")
    cells[4].set_xlim(cells[0].get_xlim())  # also where the curves break off
    _finish(cells[4], "mean and worst gap, nats per token", log=log)
    _legend(cells[4])
    xs, ys = binned(story.objective, _BINS)
    cells[5].plot(xs, ys, color=_COLOURS[0], lw=1)
    _finish(cells[5], "training objective, nats per token", log=axis_over(ys).log)


def _curves(story: Story, column: str, shown: list[int]) -> list[Curve]:
    """Every domain over time; of gaps those that have a colour with their bars."""
    steps, values, half = story.steps[shown], story.table(column)[shown], story.table("half_width")[shown]
    return [
        Curve(
            name=name,
            xs=steps,
            ys=values[:, i],
            errors=half[:, i] if column == "loss_gap" and i < STYLES else None,
        ).barred()
        for i, name in enumerate(story.domains)
    ]


def _bars(axes: Any, curve: Curve, axis: Axis, colour: str) -> None:
    """Intervals as far as the chart goes, with arrows where they go on."""
    assert curve.errors is not None
    sure = ~np.isnan(curve.ys + curve.errors)
    xs, low, high = curve.xs[sure], (curve.ys - curve.errors)[sure], (curve.ys + curve.errors)[sure]
    axes.vlines(xs, np.maximum(low, axis.low), np.minimum(high, axis.high), color=colour, lw=0.7)
    for beyond, edge, head in ((low < axis.low, axis.low, "v"), (high > axis.high, axis.high, "^")):
        axes.plot(xs[beyond], np.full(int(beyond.sum()), edge), head, color=colour, ms=3, clip_on=False)


def _cards(part: Any, story: Story) -> None:
    """Losses of student (with the gap's interval) and teacher, on the same axes for all domains."""
    count = min(len(story.domains), _MOST_CARDS)
    rows = math.ceil(count / _CARDS)
    cells = part.subplots(rows, _CARDS, sharex=True, sharey=True, squeeze=False).ravel()
    shown = thinned(len(story.moments), _POINTS)
    steps = story.steps[shown]
    students, teachers = (story.table(f"{who}_loss")[shown] for who in ("student", "teacher"))
    half = story.table("half_width")[shown]
    low, high = students - half, students + half
    axis = axis_over(np.concatenate([students, teachers]).ravel(), ends=np.concatenate([low, high]).ravel())
    if axis.log:
        _log_scale(cells[0])  # of all: they share it, and each time it is set it is set for all
    cells[0].set_ylim(axis.low, axis.high)
    for i, (axes, name) in enumerate(zip(cells, story.domains[:_MOST_CARDS], strict=False)):
        band = np.clip(low[:, i], axis.low, None), np.clip(high[:, i], None, axis.high)
        axes.fill_between(steps, *band, color=_COLOURS[0], alpha=0.2, lw=0)
        axes.plot(steps, students[:, i], color=_COLOURS[0], lw=1.2, marker=".", ms=2)
        axes.plot(steps, teachers[:, i], color=_COLOURS[1], ls="--", lw=1)
        _finish(axes, _short(name), log=False)
    for axes in cells[count:]:
        axes.set_visible(False)
    which = "losses by domain" if count == len(story.domains) else f"losses of the first {count} domains"
    scale = " (log scale)" if axis.log else ""
    part.suptitle(f"{which}, nats per token{scale}: student (solid, 95 % band) and teacher (dashed)", y=0.99)


def _finish(axes: Any, title: str, *, log: bool) -> None:
    axes.set_title(f"{title} (log scale)" if log and "nats" in title else title, fontsize=8, **_PLAIN)
    if log:
        _log_scale(axes)
    axes.grid(color="#d5dae0", lw=0.5)
    axes.set_axisbelow(True)


def _log_scale(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    legend = axes.legend(handles[::-1], labels[::-1], fontsize=7, frameon=False, ncols=2)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _short(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "…"
