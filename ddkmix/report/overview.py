"""What a page shows before its tables: the gaps now, everything over time, and each domain by itself."""

from collections.abc import Sequence

import numpy as np

from ddkmix.report.charts import STYLES, Curve, time_chart
from ddkmix.report.markup import Html, element
from ddkmix.report.scales import Axis, axis_over, binned, digits, thinned
from ddkmix.report.small_charts import area_path, band_path, gap_bar, gap_ticks, line_path, small_chart
from ddkmix.report.story import Z_95, Story
from ddkmix.report.tables import table
from ddkmix.report.updates import update_rows

_POINTS = 100
"""Most evaluations in a curve; evenly chosen from more, so that a page of a long run stays small."""
_BINS = 250
_OVER_TIME = (
    ("gap", "loss_gap", "Loss gap, nats per token; bars are 95 % intervals"),
    ("weight", "weights", "Mixture weight of the steps that follow"),
    ("rows", "served", "Rows served so far"),
    ("epochs", "epochs", "Epochs so far, passes over a domain's rows"),
)
_LOSSES_PX, _WEIGHT_PX = 88.0, 34.0


def gap_table(story: Story) -> Html:
    """Every domain with its last numbers, the one furthest behind first, and its gap as a bar."""
    last = story.last
    errors = {name: Z_95 * last.value("gap_error", name) for name in story.domains}
    gaps = {name: last.value("loss_gap", name) for name in story.domains}
    ends = [gaps[n] + sign * np.nan_to_num(errors[n]) for n in story.domains for sign in (-1, 1)]
    axis = axis_over(ends, zero=True, count=3)
    columns = _columns(story)
    rows = [
        [
            name,
            gap_bar(gaps[name], errors[name], axis),
            *(digits(last.value(column, name), style) for _, column, style in columns),
            *([_epochs(story, name)] if last.epochs else []),
        ]
        for name in story.domains
    ]
    header = [
        "domain",
        gap_ticks(axis),
        *(title for title, _, _ in columns),
        *(["epochs"] if last.epochs else []),
    ]
    where = f"At step {last.step:,}: h" if story.share_done is not None else "H"
    caption = (
        f"{where}eld-out losses in nats per token. Bars: the gap, student minus teacher; whiskers: its 95 % "
        "interval, 1.96 standard errors (s.e.). b/B: bits per byte of text."
    )
    return table(caption, header, rows, classes={1: "bar"})


def _columns(story: Story) -> list[tuple[str, str, str]]:
    """(title, column, format) of the numbers that somebody measured."""
    every = (
        ("gap", "loss_gap", ".3f"),
        ("s.e.", "gap_error", ".3f"),
        ("student", "student_loss", ".3f"),
        ("teacher", "teacher_loss", ".3f"),
        ("ratio", "perplexity_ratio", ".4g"),
        ("student b/B", "student_bits_per_byte", ".3f"),
        ("teacher b/B", "teacher_bits_per_byte", ".3f"),
        ("excess", "excess_loss", ".3f"),
        ("KL", "forward_kl", ".3f"),
        (story.weights_title, "weights", ".3f"),
        ("rows", "served", ",.0f"),
    )
    optional = ("excess_loss", "forward_kl", "served")
    return [
        (title, column, style)
        for title, column, style in every
        if column not in optional
        or any(np.isfinite(story.last.value(column, name)) for name in story.domains)
    ]


def _epochs(story: Story, name: str) -> str:
    """`1.50 of 4`; the limit where there is one."""
    limit = story.limits.get(name)
    return digits(story.last.value("epochs", name), ".2f") + (f" of {limit:g}" if limit is not None else "")


def charts(story: Story) -> list[Html]:
    """All domains in one chart each for gaps, weights, rows and epochs; the mean gap; the training loss."""
    many = len(story.domains) - STYLES
    shown = thinned(len(story.moments), _POINTS)
    notes = []
    if many > 0:
        notes.append(
            f"Named: the {STYLES} domains with the largest gaps; the other {many} are grey lines, and have a "
            "chart each below."
        )
    if len(shown) < len(story.moments):
        notes.append(f"Curves show {len(shown)} of {len(story.moments)} evaluations.")
    drawn = [
        time_chart(key, title, _summary(story, column), _curves(story, column, shown), zero=key != "gap")
        for key, column, title in _OVER_TIME
    ]
    drawn += [_mean_and_worst(story, shown), *_training(story)]
    return [
        *(element("p", note, class_="caption") for note in notes),
        element("div", *drawn, class_="charts"),
    ]


def _curves(story: Story, column: str, shown: Sequence[int]) -> list[Curve]:
    return [
        Curve(
            name=name,
            xs=story.steps[shown],
            ys=story.over_time(column, name)[shown],
            style=i if i < STYLES else None,
            stepped=column == "weights",
            errors=Z_95 * story.over_time("gap_error", name)[shown] if column == "loss_gap" else None,
        )
        for i, name in enumerate(story.domains)
    ]


def _summary(story: Story, column: str) -> str:
    """The first and last of the domain that has most of it, for those who cannot see the chart."""
    values = {name: story.last.value(column, name) for name in story.domains}
    top = max(values, key=lambda name: np.nan_to_num(values[name], nan=-np.inf))
    first = story.moments[0].value(column, top)
    return (
        f"Curves of {len(story.domains)} domains over steps {story.moments[0].step:,} to "
        f"{story.last.step:,}. Largest at the end: {top}, {digits(first, '.4g')} at first and "
        f"{digits(values[top], '.4g')} at last. All numbers are in the tables below."
    )


def _mean_and_worst(story: Story, shown: Sequence[int]) -> Html:
    rows = update_rows(story)
    curves = [
        Curve(name=name, xs=story.steps[shown], ys=np.array([values[i] for i in shown]), style=style)
        for name, values, style in (
            ("worst", [row.worst for row in rows], 1),
            ("mean", [row.mean for row in rows], 0),
        )
    ]
    summary = (
        f"Mean gap over domains: {digits(rows[0].mean)} at first, {digits(rows[-1].mean)} at last; largest "
        f"gap: {digits(rows[0].worst)} at first, {digits(rows[-1].worst)} at last."
    )
    return time_chart("mean", "Mean and worst gap over domains, nats per token", summary, curves, zero=False)


def _training(story: Story) -> list[Html]:
    xs, ys = binned(story.objective, _BINS)
    if len(xs) < 2:
        return []
    title = "Training objective, nats per token"
    if len(xs) < len(story.objective):
        title += f"; means of about {len(story.objective) / len(xs):.0f} lines of the log"
    summary = f"{ys[0]:.3f} at step {xs[0]:,.0f}, {ys[-1]:.3f} at step {xs[-1]:,.0f}."
    return [
        time_chart("objective", title, summary, [Curve(name="objective", xs=xs, ys=ys, style=0)], zero=False)
    ]


def cards(story: Story) -> list[Html]:
    """A small chart of every domain: losses of student and teacher, and the weight below, on common axes."""
    shown = thinned(len(story.moments), _POINTS)
    x = axis_over(story.steps[shown], tight=True)
    both = ("student_loss", "teacher_loss")
    losses = axis_over(v for c in both for name in story.domains for v in story.over_time(c, name)[shown])
    weights = axis_over((v for n in story.domains for v in story.over_time("weights", n)), zero=True)
    key = element(
        "p",
        *_key("student", "student"),
        *_key("teacher", "teacher"),
        f"Held-out losses in nats per token{' on a log scale' if losses.log else ''}; the band is the gap's "
        f"95 % interval around the student. Below them the weight, 0 to {digits(weights.high, '.2g')}, over "
        f"steps {story.moments[0].step:,} to {story.last.step:,}. All charts have the same axes.",
        class_="caption",
    )
    return [
        key,
        element(
            "div",
            *(_card(story, name, shown, (x, losses, weights)) for name in story.domains),
            class_="cards",
        ),
    ]


def _card(story: Story, name: str, shown: Sequence[int], axes: tuple[Axis, Axis, Axis]) -> Html:
    x, losses, weights = axes
    steps, last = story.steps[shown], story.last

    def curve(column: str, *, errors: bool = False) -> Curve:
        spread = Z_95 * story.over_time("gap_error", name)[shown] if errors else None
        stepped = column == "weights"
        return Curve(
            name=name, xs=steps, ys=story.over_time(column, name)[shown], errors=spread, stepped=stepped
        )

    student = curve("student_loss", errors=True)
    upper = small_chart(
        f"{name}: student {digits(last.value('student_loss', name))}, teacher "
        f"{digits(last.value('teacher_loss', name))} nats per token at step {last.step:,}",
        (
            band_path(student, x, losses, height=_LOSSES_PX),
            line_path(curve("teacher_loss"), x, losses, height=_LOSSES_PX, kind="teacher"),
            line_path(student, x, losses, height=_LOSSES_PX, kind="student"),
        ),
        losses,
        height=_LOSSES_PX,
        ticks=losses.ticks,
    )
    weight = digits(last.value("weights", name))
    lower = small_chart(
        f"{name}: weight {weight}",
        (area_path(curve("weights"), x, weights, height=_WEIGHT_PX),),
        weights,
        height=_WEIGHT_PX,
        ticks=(),
    )
    error = Z_95 * last.value("gap_error", name)
    gap = f"{digits(last.value('loss_gap', name))} ± {digits(error)}"
    served = f"{digits(last.value('served', name), ',.0f')} rows, {_epochs(story, name)} epochs"
    head = element("figcaption", element("b", name, title=name), element("span", gap))
    return element("figure", head, upper, lower, element("p", f"weight {weight}; {served}"), class_="card")


def _key(kind: str, words: str) -> list[Html]:
    """A piece of a line and what it stands for."""
    sample = element("line", x1=1, x2=27, y1=5, y2=5, class_=f"line {kind}")
    drawn = element("svg", sample, width=28, height=10, class_="key", aria_hidden="true")
    return [drawn, element("span", f" {words}.  ")]
