"""What a page shows before its tables: the gaps now, everything over time, and each domain by itself."""

from collections.abc import Callable, Sequence

import numpy as np

from ddkmix.report.charts import DOTS_UP_TO, STYLES, Curve, time_chart
from ddkmix.report.markup import Html, element
from ddkmix.report.scales import Axis, axis_over, binned, digits, plus_minus, thinned
from ddkmix.report.small_charts import area_path, band_path, gap_bar, gap_ticks, line_path, small_chart
from ddkmix.report.story import Story
from ddkmix.report.tables import table
from ddkmix.report.updates import UpdateRow

_POINTS, _OF_ALL = 100, 12_000
"""Most evaluations in a curve, and in the curves of all domains together; evenly chosen from more, so that a
page of a long run or of many domains stays small."""
_BINS = 250
_OVER_TIME = (
    ("gap", "loss_gap", "Loss gap, nats per token"),
    ("weight", "weights", "Mixture weight of the steps that follow"),
    ("rows", "served", "Rows served so far"),
    ("epochs", "epochs", "Epochs so far, passes over a domain's rows"),
)
_CARDS_SHOWN = 60
"""Of more domains the cards are folded away: three hundred are a long way to scroll past."""
_LOSSES_PX, _WEIGHT_PX = 88.0, 34.0


def gap_table(story: Story) -> Html:
    """Every domain with its last numbers, the one furthest behind first, and its gap as a bar."""
    last = story.last
    axis = gap_axis(story)
    columns = _columns(story)
    rows = [
        [
            name,
            gap_bar(gap, half, axis),
            *(style(story.now(column)[i]) for _, column, style in columns),
            *([_epochs(story, i)] if last.epochs else []),
        ]
        for i, (name, gap, half) in enumerate(
            zip(story.domains, story.now("loss_gap"), story.now("half_width"), strict=True)
        )
    ]
    for row in rows:
        row[2] = story.no_gap(row[0]) or row[2]
    header = [
        "domain",
        gap_ticks(axis),
        *(title for title, _, _ in columns),
        *(["epochs"] if last.epochs else []),
    ]
    where = f"At step {last.step:,}: h" if story.share_done is not None else "H"
    caption = (
        f"{where}eld-out losses in nats per token. Bars: the gap, student minus teacher; whiskers and ±: its "
        "95 % interval, by Student's t for the held-out rows that there were; an arrow: it goes on beyond. "
        f"b/B: bits per byte of text{_separators(story)}."
    )
    return table(caption, header, rows, classes={1: "bar"})


def gap_axis(story: Story) -> Axis:
    """From 0 over all last gaps and their intervals, as far as those are ordinary ones.

    Twice the largest gap, or four standard errors where the gaps are next to nothing.
    """
    gaps, half = story.now("loss_gap"), story.now("half_width")
    known, errors = gaps[np.isfinite(gaps)], story.now("gap_error")
    typical = float(np.median(errors[np.isfinite(errors)])) if np.isfinite(errors).any() else 0.0
    reach = max(2 * float(np.max(np.abs(known), initial=0.0)), 4 * typical)
    return axis_over(gaps, ends=np.concatenate([gaps - half, gaps + half]), reach=reach, zero=True, count=3)


def _separators(story: Story) -> str:
    """What a reader who compares pages must know of bits per byte."""
    if not np.isfinite(story.now("student_bits_per_byte")).any():
        return ""
    if story.same_text:
        return ", without the nats of separators between documents"
    return ", the nats of separators between documents counted in"


def _columns(story: Story) -> list[tuple[str, str, Callable[[float], str]]]:
    """(title, column, how a number is written) of the numbers that somebody measured."""

    def fixed(places: str) -> Callable[[float], str]:
        return lambda value: digits(value, places)

    every = (
        ("gap", "loss_gap", fixed(".3f")),
        ("±", "half_width", plus_minus),
        ("student", "student_loss", fixed(".3f")),
        ("teacher", "teacher_loss", fixed(".3f")),
        ("ratio", "perplexity_ratio", fixed(".4g")),
        ("student b/B", "student_bits_per_byte", fixed(".3f")),
        ("teacher b/B", "teacher_bits_per_byte", fixed(".3f")),
        ("excess", "excess_loss", fixed(".3f")),
        ("KL", "forward_kl", fixed(".3f")),
        (story.weights_title, "weights", fixed(".3f")),
        ("rows", "served", fixed(",.0f")),
    )
    optional = ("excess_loss", "forward_kl", "served")
    return [one for one in every if one[1] not in optional or np.isfinite(story.now(one[1])).any()]


def _epochs(story: Story, i: int) -> str:
    """`1.50 of 4`; the limit where there is one."""
    limit = story.limits.get(story.domains[i])
    return digits(story.now("epochs")[i], ".2f") + (f" of {limit:g}" if limit is not None else "")


def charts(story: Story, lines: Sequence[UpdateRow]) -> list[Html]:
    """All domains in one chart each for gaps, weights, rows and epochs; the mean gap; the training loss."""
    many = len(story.domains) - STYLES
    shown = _shown(story)
    notes = []
    if many > 0:
        notes.append(
            f"Named: the first {STYLES} domains of the table above; the other {many} are grey lines, with a "
            "chart each below."
        )
    if len(shown) < len(story.moments):
        notes.append(f"Curves show {len(shown)} of {len(story.moments)} evaluations.")
    drawn = [
        time_chart(key, title + _bars(column, shown), _summary(story, column), curves, zero=key != "gap")
        for key, column, title in [*_OVER_TIME, *_measured(story)]
        for curves in [_curves(story, column, shown)]
    ]
    drawn += [_mean_and_worst(story, lines, shown), *_training(story)]
    return [
        *(element("p", note, class_="caption") for note in notes),
        element("div", *drawn, class_="charts"),
    ]


def _shown(story: Story) -> list[int]:
    return thinned(len(story.moments), min(_POINTS, max(_OF_ALL // len(story.domains), 2)))


def _measured(story: Story) -> list[tuple[str, str, str]]:
    """Charts of what was measured beside the losses, where it was."""
    optional = (
        ("excess", "excess_loss", "Excess loss, mean of max(0, student - teacher), nats per token"),
        ("kl", "forward_kl", "KL(teacher || student), nats per token"),
    )
    return [chart for chart in optional if np.isfinite(story.table(chart[1])).any()]


def _bars(column: str, shown: Sequence[int]) -> str:
    """What the bars of a chart are; see `Curve.barred`."""
    if column != "loss_gap":
        return ""
    return "; bars are 95 % intervals" if len(shown) <= DOTS_UP_TO else "; bars at the end are 95 % intervals"


def _curves(story: Story, column: str, shown: Sequence[int]) -> list[Curve]:
    steps, values = story.steps[shown], story.table(column)[shown]
    half_widths = story.table("half_width")[shown]
    return [
        Curve(
            name=name,
            xs=steps,
            ys=values[:, i],
            style=i if i < STYLES else None,
            stepped=column == "weights",
            errors=half_widths[:, i] if column == "loss_gap" else None,
        )
        for i, name in enumerate(story.domains)
    ]


def _summary(story: Story, column: str) -> str:
    """The first and last of the domain that has most of it, for those who cannot see the chart."""
    values = story.now(column)
    top = int(np.argmax(np.nan_to_num(values, nan=-np.inf)))
    first = story.table(column)[0, top]
    return (
        f"Curves of {len(story.domains)} domains over steps {story.moments[0].step:,} to "
        f"{story.last.step:,}. Largest at the end: {story.domains[top]}, {digits(first, '.4g')} at first and "
        f"{digits(values[top], '.4g')} at last. All numbers are in the tables below."
    )


def _mean_and_worst(story: Story, rows: Sequence[UpdateRow], shown: Sequence[int]) -> Html:
    curves = [
        Curve(name=name, xs=story.steps[shown], ys=np.array([values[i] for i in shown]), style=style)
        for name, values, style in (
            ("worst", [row.worst for row in rows], 1),
            ("mean", [row.mean for row in rows], 0),
        )
    ]
    first, last = rows[0].cells(), rows[-1].cells()
    summary = (
        f"Mean gap over domains: {first[1]} at first, {last[1]} at last; largest gap: {first[2]} at first, "
        f"{last[2]} at last. Both have holes where a domain has no finite gap."
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
    shown = _shown(story)
    x = axis_over(story.steps[shown], tight=True)
    student, teacher = (story.table(f"{who}_loss")[shown] for who in ("student", "teacher"))
    half = story.table("half_width")[shown]
    ends = np.concatenate([student - half, student + half])
    losses = axis_over(np.concatenate([student, teacher]).ravel(), ends=ends.ravel())
    weights = axis_over(story.table("weights").ravel(), zero=True)
    key = element(
        "p",
        *_key("student", "student"),
        *_key("teacher", "teacher"),
        f"Held-out losses in nats per token{' on a log scale' if losses.log else ''}; the band is the gap's "
        f"95 % interval around the student. Below them the weight, 0 to {digits(weights.high, '.2g')}, over "
        f"steps {story.moments[0].step:,} to {story.last.step:,}. All charts have the same axes.",
        class_="caption",
    )
    axes = x, losses, weights
    drawn = element("div", *(_card(story, i, shown, axes) for i in range(len(story.domains))), class_="cards")
    if len(story.domains) > _CARDS_SHOWN:
        drawn = element("details", element("summary", f"Charts of {len(story.domains)} domains"), drawn)
    return [key, drawn]


def _card(story: Story, i: int, shown: Sequence[int], axes: tuple[Axis, Axis, Axis]) -> Html:
    x, losses, weights = axes
    name, steps = story.domains[i], story.steps[shown]

    def curve(column: str, *, errors: bool = False) -> Curve:
        half = story.table("half_width")[shown, i] if errors else None
        values = story.table(column)[shown, i]
        return Curve(name=name, xs=steps, ys=values, errors=half, stepped=column == "weights")

    def now(column: str, style: str = ".3f") -> str:
        return digits(story.now(column)[i], style)

    student = curve("student_loss", errors=True)
    upper = small_chart(
        f"{name}: student {now('student_loss')}, teacher {now('teacher_loss')} nats per token at step "
        f"{story.last.step:,}",
        (
            band_path(student, x, losses, height=_LOSSES_PX),
            line_path(curve("teacher_loss"), x, losses, height=_LOSSES_PX, kind="teacher"),
            line_path(student, x, losses, height=_LOSSES_PX, kind="student"),
        ),
        losses,
        height=_LOSSES_PX,
        ticks=losses.ticks,
    )
    lower = small_chart(
        f"{name}: weight {now('weights')}",
        (area_path(curve("weights"), x, weights, height=_WEIGHT_PX),),
        weights,
        height=_WEIGHT_PX,
        ticks=(),
    )
    gap = story.no_gap(name) or f"{now('loss_gap')} ± {plus_minus(story.now('half_width')[i])}"
    served = f"{now('served', ',.0f')} rows, {_epochs(story, i)} epochs"
    head = element("figcaption", element("b", name, title=name), element("span", gap))
    words = element("p", f"weight {now('weights')}; {served}")
    return element("figure", head, upper, lower, words, class_="card")


def _key(kind: str, words: str) -> list[Html]:
    """A piece of a line and what it stands for."""
    sample = element("line", x1=1, x2=27, y1=5, y2=5, class_=f"line {kind}")
    drawn = element("svg", sample, width=28, height=10, class_="key", aria_hidden="true")
    return [drawn, element("span", f" {words}.  ")]
