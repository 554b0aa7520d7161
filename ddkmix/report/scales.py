"""From numbers to places on a chart: ranges, linear or logarithmic, with ticks at round numbers."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

_LOG_FROM, _LOG_TO = 5.0, 1e5
"""A chart is logarithmic where the largest value is this many times the smallest: a student that starts 16
nats behind would flatten everything that follows, and a gap of nearly nothing would take all the room."""
_MOST_LOG_TICKS = 6
_MARGIN = 0.04
"""Share of the range that stays free above and below."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """A range of values and where each lies on it."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]
    """Round numbers within the range."""

    def places(self, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The share of the axis below each value, kept within 0 and 1; nan for what is no number."""
        low, high = self.low, self.high
        if self.log:
            low, high = math.log(low), math.log(high)
            with np.errstate(divide="ignore"):
                values = np.log(np.maximum(values, 0.0))  # of nan is nan, of 0 is -inf
        shares: Float[np.ndarray, " n"] = np.clip((values - low) / (high - low), 0.0, 1.0)
        return shares

    def at(self, value: float) -> float:
        """The same of one value."""
        return float(self.places(np.array([value], dtype=float))[0])


def axis_over(
    values: Iterable[float],
    *,
    ends: Iterable[float] = (),
    reach: float | None = None,
    zero: bool = False,
    tight: bool = False,
    count: int = 4,
) -> Axis:
    """An axis for all finite values, and for the ends of their intervals as far as that helps to read them.

    A domain of two held-out rows has an interval of hundreds of nats; an axis for all of it would show
    nothing else. What lies beyond is cut by whoever draws, and said to be.

    Args:
        values: what is to be drawn.
        ends: of their intervals. Those further from 0 than `reach` do not count, nor on a logarithmic axis
            those below half the smallest value.
        reach: twice the largest absolute value when None.
        zero: the range holds 0 and is linear, as for shares, counts and bars.
        tight: no free room at the ends and never logarithmic, as for steps.
        count: about how many ticks.
    """
    known = _known(values)
    known = known[np.isfinite(known)] if np.isfinite(known).any() else np.zeros(1)
    low, high = float(known.min()), float(known.max())
    log = not (zero or tight) and low > 0 and _LOG_FROM < high / low < _LOG_TO
    reach = 2 * max(-low, high) if reach is None else reach
    around = _known(ends)
    around = around[(low / 2 if log else -reach) <= around]
    around = around[around <= reach]
    low, high = (float(end) for end in (np.min([low, *around]), np.max([high, *around])))
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if log:
        low, high = low / 1.15, high * 1.15
        return Axis(low=low, high=high, log=True, ticks=_log_ticks(low, high))
    room = 0.0 if tight else _MARGIN * (high - low)
    low, high = (end if zero and end == 0 else end + side * room for end, side in ((low, -1), (high, 1)))
    if not high > low:  # a single value
        low, high = (low, low + 1.0) if tight or zero else (low - 0.5, high + 0.5)
    return Axis(low=low, high=high, log=False, ticks=_ticks(low, high, count))


def _known(values: Iterable[float]) -> Float[np.ndarray, " n"]:
    given = values if isinstance(values, np.ndarray) else list(values)
    array = np.asarray(given, dtype=float).ravel()
    known: Float[np.ndarray, " n"] = array[~np.isnan(array)]
    return known


def _ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next((size * k for k in (1, 2, 2.5, 5) if size * k >= rough), size * 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(float(f"{k * step:.12g}") for k in range(first, last + 1))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for parts in ((1, 2, 5), (1, 3), (1,)):
        ticks = tuple(k * 10.0**power for power in powers for k in parts if low <= k * 10.0**power <= high)
        if len(ticks) <= _MOST_LOG_TICKS:
            break
    return ticks


def spread(places: Sequence[float], *, apart: float, low: float, high: float) -> list[float]:
    """Places of labels as near as may be to those wanted, at least `apart` from each other, within a range.

    All of them in pixels, in the order given; where the range is too short for all, they are evenly spaced.
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    if len(places) > 1:
        apart = min(apart, (high - low) / (len(places) - 1))
    found = [0.0] * len(places)
    floor = low
    for i in order:  # down: no label above its neighbour's end
        found[i] = max(places[i], floor)
        floor = found[i] + apart
    ceiling = high
    for i in reversed(order):  # and up again, where the last ones ran over the end
        found[i] = min(found[i], ceiling)
        ceiling = found[i] - apart
    return found


def thinned(count: int, most: int) -> list[int]:
    """At most `most` positions out of `count`, evenly, always with the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def binned(
    points: Sequence[tuple[float, float]], most: int
) -> tuple[Float[np.ndarray, " bins"], Float[np.ndarray, " bins"]]:
    """A long noisy series as at most `most` means of neighbours; values that are no number are left out."""
    known = [(x, y) for x, y in points if math.isfinite(y)]
    parts = np.array_split(np.array(known).reshape(-1, 2), max(min(most, len(known)), 1))
    means = np.array([part.mean(axis=0) for part in parts if len(part)]).reshape(-1, 2)
    return means[:, 0], means[:, 1]


def short(value: float) -> str:
    """A tick's number in few characters: 0.25, 12, 40k, 1.5M; 10k and more are in thousands."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= (size if unit != "k" else 10 * size):
            return f"{value / size:.4g}{unit}"
    return f"{value:.10g}"


def plus_minus(half: float) -> str:
    """Half an interval in three digits, however wide it is: 0.0123, 7.69e+04, ∞."""
    return "∞" if half == math.inf else digits(half, ".3g")


def digits(value: float, style: str = ".3f") -> str:
    """A number for a table; a dash for what is not known."""
    return format(value, style) if math.isfinite(value) else "–"
