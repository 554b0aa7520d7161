"""Small drawings that stand in rows: a gap with its interval, and one domain's curves beside others.

They share their axes, so that they can be compared, and stretch as the large charts do.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from ddkmix.report.charts import SPAN, Curve, down, line_of
from ddkmix.report.markup import Html, element
from ddkmix.report.scales import Axis, short


def gap_bar(gap: float, error: float, axis: Axis) -> Html:
    """One gap as a bar from 0, with its interval as whiskers.

    Args:
        gap: nats per token; nan draws nothing.
        error: half the interval, nats per token; nan draws no whiskers.
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
    if math.isfinite(error):
        low, high = (f"{_per_cent(axis, gap + sign * error):.2f}%" for sign in (-1, 1))
        parts.append(element("line", x1=low, x2=high, y1=10, y2=10, class_="whisker"))
        parts += [element("line", x1=end, x2=end, y1=6.5, y2=13.5, class_="whisker") for end in (low, high)]
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
    grid = [
        element("line", x1="0%", x2="100%", y1=down(y, v, height), y2=down(y, v, height), class_="grid")
        for v in ticks
    ]
    numbers = [
        element("text", short(v), x="100%", y=max(down(y, v, height) - 2, 9.0), class_="tick end")
        for v in ticks
    ]
    stretched = element(
        "svg",
        *parts,
        class_="curves",
        width="100%",
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
    for at, low, high in zip(curve.xs, curve.ys - errors, curve.ys + errors, strict=True):
        if math.isfinite(low + high):
            runs[-1].append((SPAN * x.at(at), down(y, low, height), down(y, high, height)))
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
    for at, value in zip(curve.xs, curve.ys, strict=True):
        across = f"{SPAN * x.at(at):.0f}"
        if last is not None:
            path += f"H{across}V{height:g}Z"
        last = across if math.isfinite(value) else None
        if last is not None:
            path += f"M{across} {height:g}V{down(y, value, height):.1f}"
    return element("path", class_="area", d=path + ("Z" if last is not None else ""))
