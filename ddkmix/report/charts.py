"""Charts as SVG that stretches with the page while its text and lines keep their size.

Places across are percentages, places down are pixels; only curves lie in a nested drawing that is stretched,
with strokes that are not. So one drawing serves a phone, a wide screen and paper, without a script. Curves
differ by colour, by dashes and by a label at their end, and colours are named in the style sheet alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from ddkmix.report.markup import Html, element
from ddkmix.report.scales import Axis, axis_over, short, spread

STYLES = 8
"""Curves that can be told apart; others are thin and grey, and are named in tables."""
_LEFT, _RIGHT, _LABELS = 12.0, 68.0, 72.0
"""Per cent of a chart's width: where curves begin and end, and where their labels begin."""
_TOP, _HEIGHT, _BOTTOM = 8.0, 190.0, 22.0
SPAN = 1000
"""Width of the drawing that is stretched."""
_LABEL_CHARS = 14
DOTS_UP_TO = 16
"""Evaluations that are marked one by one, each with its bar; of more, only the last has bars."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One line of a chart."""

    name: str
    xs: Float[np.ndarray, " points"]
    ys: Float[np.ndarray, " points"]
    """nan where unknown: the line has a hole there."""
    style: int | None = None
    """0 to 7, or None for one of many."""
    stepped: bool = False
    """A value holds until the next."""
    errors: Float[np.ndarray, " points"] | None = None
    """Half the length of the bar through each point."""

    def barred(self) -> "Curve":
        """The curve with the bars that are drawn: of forty, eight times, nothing but a comb can be seen."""
        if self.errors is None or len(self.xs) <= DOTS_UP_TO:
            return self
        last = np.arange(len(self.xs)) == np.max(np.flatnonzero(np.isfinite(self.ys)), initial=0)
        return replace(self, errors=np.where(last, self.errors, np.nan))

    def ends(self) -> Float[np.ndarray, " ends"]:
        """Of all bars; nan where one is not known."""
        if self.errors is None:
            return np.zeros(0)
        return np.concatenate([self.ys - self.errors, self.ys + self.errors])


def time_chart(key: str, title: str, summary: str, curves: Sequence[Curve], *, zero: bool) -> Html:
    """Curves over steps, with labels at their ends.

    Args:
        key: unique on the page.
        title: what is drawn, with its unit.
        summary: the chart in a sentence, for those who cannot see it.
        curves: at least one.
        zero: whether the range begins at 0.
    """
    named = [curve.barred() for curve in curves if curve.style is not None]
    x = axis_over(np.concatenate([curve.xs for curve in curves]), tight=True, count=4)
    y = axis_over(
        np.concatenate([curve.ys for curve in curves]),
        ends=np.concatenate([curve.ends() for curve in named]) if named else (),
        zero=zero,
    )
    grey = [line_of(curve, x, y, _HEIGHT) for curve in curves if curve.style is None]
    parts = [
        *([element("path", class_="line many", d="".join(grey))] if grey else []),
        *(part for curve in named for part in _drawn(curve, x, y)),
    ]
    stretched = element(
        "svg",
        *parts,
        class_="curves",
        x=f"{_LEFT}%",
        y=_TOP,
        width=f"{_RIGHT - _LEFT}%",
        height=_HEIGHT,
        viewBox=f"0 0 {SPAN} {_HEIGHT:g}",
        preserveAspectRatio="none",
        aria_hidden="true",
    )
    height = _TOP + _HEIGHT + _BOTTOM
    heading = f"{title} (log scale)" if y.log else title
    arrows = [arrow for curve in named for arrow in _arrows(curve, x, y)]
    return _figure(key, heading, summary, height, *_grid(x, y), stretched, *arrows, *_labels(named, y))


def _figure(key: str, title: str, summary: str, height: float, *parts: Html) -> Html:
    drawing = element(
        "svg",
        element("title", title, id=f"{key}-t"),
        element("desc", summary, id=f"{key}-d"),
        *parts,
        class_="chart",
        role="img",
        aria_labelledby=f"{key}-t {key}-d",
        width="100%",
        height=height,
    )
    return element("figure", element("figcaption", title), drawing, class_="chart")


def _grid(x: Axis, y: Axis) -> list[Html]:
    """Lines at the ticks and their numbers."""
    parts = []
    for tick in y.ticks:
        place = _TOP + _HEIGHT * (1 - y.at(tick))
        parts.append(element("line", x1=f"{_LEFT}%", x2=f"{_RIGHT}%", y1=place, y2=place, class_="grid"))
        parts.append(element("text", short(tick), x=f"{_LEFT - 1.5}%", y=place + 3.5, class_="tick end"))
    bottom = _TOP + _HEIGHT
    parts.append(element("line", x1=f"{_LEFT}%", x2=f"{_RIGHT}%", y1=bottom, y2=bottom, class_="axis"))
    for tick in x.ticks:
        # the last one ends where its line would be: behind it stands the name of the axis
        side = "end" if x.at(tick) > 0.95 else "middle"
        parts.append(element("text", short(tick), x=_across(x, tick), y=bottom + 15, class_=f"tick {side}"))
    parts.append(element("text", "step", x=f"{_LABELS}%", y=bottom + 15, class_="tick"))
    return parts


def _drawn(curve: Curve, x: Axis, y: Axis) -> list[Html]:
    """A curve with the bars of its errors and a dot for every evaluation."""
    parts = []
    style = f"s{curve.style}"
    across = (SPAN * x.places(curve.xs)).tolist()
    if curve.errors is not None:
        lows, highs = (down(y, curve.ys + sign * curve.errors).tolist() for sign in (-1, 1))
        ends = [ends for ends in zip(across, lows, highs, strict=True) if math.isfinite(sum(ends))]
        if ends:
            bars = "".join(f"M{at:.0f} {low:.1f}V{high:.1f}" for at, low, high in ends)
            parts.append(element("path", class_=f"bars {style}", d=bars))
    parts.append(element("path", class_=f"line {style}", d=line_of(curve, x, y, _HEIGHT)))
    if len(curve.xs) <= DOTS_UP_TO:
        places = zip(across, down(y, curve.ys).tolist(), strict=True)
        dots = "".join(f"M{at:.0f} {place:.1f}h0" for at, place in places if math.isfinite(place))
        parts.append(element("path", class_=f"dots {style}", d=dots))
    return parts


def _arrows(curve: Curve, x: Axis, y: Axis) -> list[Html]:
    """Heads at the bars that go on beyond the chart."""
    if curve.errors is None:
        return []
    parts = []
    for at, value, error in zip(curve.xs, curve.ys, curve.errors, strict=True):
        if not math.isnan(value + error):
            kind = f"bars s{curve.style}"
            if value + error > y.high:
                parts.append(arrow(_across(x, at), _TOP, "up", kind))
            if value - error < y.low:
                parts.append(arrow(_across(x, at), _TOP + _HEIGHT, "down", kind))
    return parts


_HEADS = {
    "up": "M-3 4L0 0L3 4", "down": "M-3 -4L0 0L3 -4", "left": "M4 -3L0 0L4 3", "right": "M-4 -3L0 0L-4 3"
}  # fmt: skip


def arrow(x: str, y: float, direction: str, kind: str) -> Html:
    """The head of an arrow at a place, of the class `kind`: here an interval is cut.

    Args:
        x: where its point is, in per cent.
        y: the same in pixels.
        direction: up, down, left or right.
        kind: class of its stroke.
    """
    return element("svg", element("path", d=_HEADS[direction], class_=kind), x=x, y=y, class_="arrow")


def _across(x: Axis, value: float) -> str:
    return f"{_LEFT + (_RIGHT - _LEFT) * x.at(value):.1f}%"


def down(y: Axis, values: Float[np.ndarray, " n"], height: float = _HEIGHT) -> Float[np.ndarray, " n"]:
    """Pixels below the top of the curves."""
    return height * (1 - y.places(values))


def line_of(curve: Curve, x: Axis, y: Axis, height: float) -> str:
    """The path of a curve; a point alone becomes a dot, because its line has length 0 and round ends."""
    path, pen_down = [], False
    places = down(y, curve.ys, height).tolist()
    for at, place in zip((SPAN * x.places(curve.xs)).tolist(), places, strict=True):
        if math.isnan(place):
            pen_down = False
        elif not pen_down:
            path.append(f"M{at:.0f} {place:.1f}h0")
            pen_down = True
        else:
            path.append(f"H{at:.0f}V{place:.1f}" if curve.stepped else f"L{at:.0f} {place:.1f}")
    return "".join(path)


def _labels(curves: Sequence[Curve], y: Axis) -> list[Html]:
    """The names at the ends of the curves, with a line that leads there and shows colour and dashes."""
    ended = []
    for curve in curves:
        known = curve.ys[np.isfinite(curve.ys)]
        if len(known):
            ended.append((curve, _TOP + _HEIGHT * (1 - y.at(float(known[-1])))))
    places = spread([end for _, end in ended], apart=14.0, low=_TOP + 4, high=_TOP + _HEIGHT - 4)
    parts = []
    for (curve, end), place in zip(ended, places, strict=True):
        style = f"line s{curve.style}"
        parts.append(element("line", x1=f"{_RIGHT}%", x2=f"{_LABELS - 0.5}%", y1=end, y2=place, class_=style))
        parts.append(element("text", _cut(curve.name), x=f"{_LABELS}%", y=place + 3.5, class_="label"))
    return parts


def _cut(name: str) -> str:
    return name if len(name) <= _LABEL_CHARS else name[: _LABEL_CHARS - 1] + "…"
