"""Small drawings that stand in rows: a gap with its interval, and one domain's curves beside others.

They share their axes, so that they can be compared, and stretch as the large charts do.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from ddkmix.report.charts import SPAN, Curve, arrow, down, line_of
from ddkmix.report.markup import Html, element
from ddkmix.report.scales import Axis, short

_RIGHT = 86
"""Per cent of a small chart's width where its curves end and the numbers of its axis begin."""


def gap_bar(gap: float, error: float, axis: Axis) -> Html:
    """One gap as a bar from 0, with its interval as whiskers.

    Args:
        gap: nats per token; nan draws nothing.
        error: half the interval, nats per token; nan draws no whiskers. They end in an arrow where the axis
            ends before them.
        axis: of all gaps.
    """
    if not math.isfinite(gap):
        return element("svg", width="100%", height=20, class_="gap", aria_hidden="true")
    zero, here = _per_cent(axis, 0.0), _per_cent(axis, gap)
    left, right = sorted((zero, here))
    parts = [
        element("line", x1=f"{zero:.2f}%", x2=f"{zero:.2f}%", y1=0, y2=20, class_="axis"),
        element("rect", x=f"{left:.2f}%", width=f"{right - left:.2f}%", y=6, height=8, class_="bar"),
    ]
    if not math.isnan(error):
        ends = {"left": gap - error, "right": gap + error}
        places = {side: f"{_per_cent(axis, end):.2f}%" for side, end in ends.items()}
        parts.append(element("line", x1=places["left"], x2=places["right"], y1=10, y2=10, class_="whisker"))
        parts += [
            element("line", x1=place, x2=place, y1=6.5, y2=13.5, class_="whisker")
            if axis.low <= ends[side] <= axis.high
            else arrow(place, 10.0, side, "whisker")
            for side, place in places.items()
        ]
    parts.append(element("circle", cx=f"{here:.2f}%", cy=10, r=3, class_="point"))
    return element("svg", *parts, width="100%", height=20, class_="gap", aria_hidden="true")


def gap_ticks(axis: Axis) -> Html:
    """The numbers above the bars."""
    parts = [
        element("text", short(tick), x=f"{_per_cent(axis, tick):.2f}%", y=11, class_="tick middle")
        for tick in axis.ticks
    ]
    return element("svg", *parts, width="100%", height=14, class_="gap", aria_hidden="true")


def _per_cent(axis: Axis, value: float) -> float:
    return 4 + 92 * axis.at(value)


def small_chart(
    title: str,
    parts: Iterable[Html],
    y: Axis,
    *,
    height: float,
    ticks: Sequence[float],
) -> Html:
    """One of many small charts that share their axes: stretched parts, and a few numbers within.

    Args:
        title: read aloud, and shown when the pointer rests on it.
        parts: paths in a drawing 1000 wide and `height` pixels high.
        y: of all of them.
        height: pixels.
        ticks: values of `y` that get a line and a number.
    """
    places = [height * (1 - y.at(tick)) for tick in ticks]
    grid = [element("line", x1="0%", x2=f"{_RIGHT}%", y1=at, y2=at, class_="grid") for at in places]
    numbers = [  # beside the curves, and whole at the ends too
        element("text", short(tick), x="100%", y=min(max(at + 3, 8.0), height - 1), class_="tick end")
        for tick, at in zip(ticks, places, strict=True)
    ]
    stretched = element(
        "svg",
        *parts,
        class_="curves",
        width=f"{_RIGHT}%",
        height=height,
        viewBox=f"0 0 {SPAN} {height:g}",
        preserveAspectRatio="none",
        aria_hidden="true",
    )
    return element(
        "svg",
        element("title", title),
        *grid,
        stretched,
        *numbers,
        class_="small",
        role="img",
        width="100%",
        height=height,
    )


def line_path(curve: Curve, x: Axis, y: Axis, *, height: float, kind: str) -> Html:
    """A curve of a small chart, of the class `kind`."""
    return element("path", class_=f"line {kind}", d=line_of(curve, x, y, height))


def band_path(curve: Curve, x: Axis, y: Axis, *, height: float) -> Html:
    """The intervals around a curve as a shaded band; holes where one is not known."""
    errors = np.zeros_like(curve.ys) if curve.errors is None else curve.errors
    runs: list[list[tuple[float, float, float]]] = [[]]
    across = SPAN * x.places(curve.xs)
    lows, highs = (down(y, curve.ys + sign * errors, height) for sign in (-1, 1))
    for at, low, high in zip(across.tolist(), lows.tolist(), highs.tolist(), strict=True):
        if not math.isnan(low + high):
            runs[-1].append((at, low, high))
        elif runs[-1]:
            runs.append([])
    path = ""
    for run in filter(None, runs):
        edge = [f"{at:.0f} {high:.1f}" for at, _, high in run]
        edge += [f"{at:.0f} {low:.1f}" for at, low, _ in reversed(run)]
        path += f"M{'L'.join(edge)}Z"
    return element("path", class_="band", d=path)


def area_path(curve: Curve, x: Axis, y: Axis, *, height: float) -> Html:
    """The area below a stepped curve."""
    path, last = "", None
    places = zip((SPAN * x.places(curve.xs)).tolist(), down(y, curve.ys, height).tolist(), strict=True)
    for at, place in places:
        across = f"{at:.0f}"
        if last is not None:
            path += f"H{across}V{height:g}Z"
        last = None if math.isnan(place) else across
        if last is not None:
            path += f"M{across} {height:g}V{place:.1f}"
    return element("path", class_="area", d=path + ("Z" if last is not None else ""))
