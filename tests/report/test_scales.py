"""Ranges, ticks and places."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddkmix.report.scales import axis_over, binned, digits, plus_minus, short, spread, thinned

FINITE = st.floats(-1e9, 1e9, allow_nan=False)


def test_an_axis_holds_its_values_and_round_ticks() -> None:
    """0.5 to 2.1, not five times as much: half steps; the ends are 4 % outside."""
    axis = axis_over([2.1, 0.5, math.nan, math.inf])
    assert (0.5, 1.0, 1.5, 2.0) == axis.ticks
    assert [0.5 - 0.064, 2.1 + 0.064] == pytest.approx([axis.low, axis.high])
    assert not axis.log
    assert 0.5 == pytest.approx(axis.at(1.3))


def test_a_wide_range_of_positive_values_is_logarithmic() -> None:
    """A start at 16 nats and an end at 0.8: 3.6 is the middle, and the ticks are 1, 2, 5, 10."""
    axis = axis_over([16.0, 0.8])
    assert axis.log
    assert 0.5 == pytest.approx(axis.at(math.sqrt(16 * 0.8)))
    assert (1.0, 2.0, 5.0, 10.0) == axis.ticks
    assert (0.0, 0.0) == (axis.at(0.0), axis.at(-1.0))


@pytest.mark.parametrize(
    "values", [[16.0, 4.0], [16.0, 0.0], [16.0, -0.5], [16.0, 1e-9]], ids=["near", "zero", "negative", "tiny"]
)
def test_other_ranges_are_linear(values: list[float]) -> None:
    """Where the logarithm is not needed, not defined, or spent on nothing."""
    assert not axis_over(values).log


def test_shares_counts_and_steps_are_linear_from_their_own_ends() -> None:
    """Weights from 0; gaps of students that are ahead up to 0; steps from the first to the last."""
    assert 0.0 == axis_over([0.9, 0.001], zero=True).low
    behind = axis_over([-0.3, -0.1], zero=True)
    assert [-0.312, 0.0] == pytest.approx([behind.low, behind.high])
    steps = axis_over([1.0, 400.0], tight=True)
    assert (1.0, 400.0, False) == (steps.low, steps.high, steps.log)


@pytest.mark.parametrize("values", [[], [math.nan], [2.0], [2.0, 2.0], [0.0]])
@pytest.mark.parametrize("options", [{}, {"zero": True}, {"tight": True}], ids=str)
def test_hardly_any_values_still_make_an_axis(values: list[float], options: dict[str, bool]) -> None:
    """Nothing at all, nothing known, or one value."""
    axis = axis_over(values, **options)
    assert axis.low < axis.high
    assert axis.ticks
    assert 0.0 <= axis.at(2.0) <= 1.0


@given(st.lists(FINITE, min_size=1, max_size=20), st.booleans(), st.booleans())
def test_every_value_has_its_place(values: list[float], zero: bool, tight: bool) -> None:
    """Within the axis, in order, with few ticks, all of them within."""
    axis = axis_over(values, zero=zero, tight=tight)
    assert axis.low <= min(values)
    assert max(values) <= axis.high
    places = [axis.at(value) for value in sorted(values)]
    assert sorted(places) == places
    assert len(axis.ticks) <= 15
    slack = 1e-9 * max(abs(axis.low), abs(axis.high))
    assert all(axis.low - slack <= tick <= axis.high + slack for tick in axis.ticks)


@pytest.mark.parametrize("log", [False, True])
def test_many_places_are_those_of_each(log: bool) -> None:
    """Below and above the axis its ends; nan stays nan."""
    axis = axis_over([1.0, 16.0 if log else 4.0])
    assert log == axis.log
    values = [-1.0, 0.0, 1.0, 2.0, 3.5, 99.0]
    assert [axis.at(value) for value in values] == axis.places(np.array(values)).tolist()
    share = (math.log(2 / axis.low) / math.log(axis.high / axis.low)) if log else (2 - axis.low) / 3.24
    assert [0.0, share, 1.0] == pytest.approx([axis.at(0.0), axis.at(2.0), axis.at(99.0)])


def test_an_axis_holds_intervals_too() -> None:
    """15.2 +- 3.0 ends at 18.2; on a logarithmic axis ends of 0 and less do not count."""
    assert 18.2 <= axis_over([15.2, 10.0], ends=[12.2, 18.2, 7.0, 13.0]).high
    assert 7.0 >= axis_over([15.2, 10.0], ends=[12.2, 18.2, 7.0, 13.0]).low
    log = axis_over([16.0, 1.0], ends=[18.0, -3.0, 0.9])
    assert log.log
    assert [0.9 / 1.15, 18.0 * 1.15] == pytest.approx([log.low, log.high])


def test_an_interval_without_bounds_does_not_hide_the_values() -> None:
    """Ends beyond twice the largest value, or as far as is said, and below half the smallest on a logarithmic
    axis: it is as if they were not there."""
    wild = [-7e4, 7e4, -math.inf, math.inf, math.nan, -1.1, 1.1]
    assert axis_over([0.5, 0.4]) == axis_over([0.5, 0.4], ends=wild)
    assert axis_over([0.5, 0.4, -0.2, 0.8]) == axis_over([0.5, 0.4], ends=[*wild, -0.2, 0.8], reach=0.8)
    assert 1.1 <= axis_over([0.5, 0.4], ends=wild, reach=1.1).high
    assert axis_over([16.0, 1.0]) == axis_over([16.0, 1.0], ends=[1e-9, 0.4, 7e4])


def test_what_is_no_number_has_no_place() -> None:
    """nan in, nan out."""
    assert math.isnan(axis_over([1.0, 2.0]).at(math.nan))


def test_labels_that_collide_are_moved_apart() -> None:
    """At least 10 apart, in their order, as near as may be: 50 stays, 52 goes down, 190 goes up to fit."""
    assert [50.0, 60.0, 190.0] == spread([50.0, 52.0, 195.0], apart=10.0, low=0.0, high=190.0)
    assert [190.0, 180.0] == spread([400.0, 300.0], apart=10.0, low=0.0, high=190.0)
    assert [] == spread([], apart=10.0, low=0.0, high=1.0)


@given(st.lists(st.floats(-100, 300), max_size=30))
def test_labels_never_overlap_and_stay_within(places: list[float]) -> None:
    """However many: where there is no room for 14 pixels each, the room is shared evenly."""
    found = sorted(spread(places, apart=14.0, low=0.0, high=190.0))
    gap = min(14.0, 190.0 / max(len(places) - 1, 1))
    assert all(second - first >= gap - 1e-6 for first, second in itertools.pairwise(found))
    assert all(-1e-6 <= place <= 190.0 + 1e-6 for place in found)


def test_long_histories_are_thinned_evenly_with_both_ends() -> None:
    """7 of 4: 0, 2, 4, 6; few stay as they are."""
    assert [0, 2, 4, 6] == thinned(7, 4)
    assert [0, 1, 2] == thinned(3, 4)
    found = thinned(1000, 100)
    assert (100, 0, 999) == (len(found), found[0], found[-1])


def test_noise_is_binned_and_what_is_unknown_left_out() -> None:
    """Means of neighbours: (1, 3) at step 1.5, and 7 at step 4."""
    xs, ys = binned([(1.0, 1.0), (2.0, 3.0), (3.0, math.nan), (4.0, 7.0)], 2)
    assert ([1.5, 4.0], [2.0, 7.0]) == (xs.tolist(), ys.tolist())
    for nothing in ([], [(1.0, math.nan)]):
        assert [0, 0] == [len(part) for part in binned(nothing, 5)]
    assert 4.0 == np.mean(binned([(float(i), 4.0) for i in range(1000)], 250)[1])


def test_numbers_are_short_on_axes_and_exact_in_tables() -> None:
    """Thousands from 10,000 on, so that 1,500 stays readable; a dash for what is not known."""
    assert ["0.25", "-3", "1500", "15k", "1.5M", "2G"] == [
        short(v) for v in (0.25, -3.0, 1500.0, 15_000.0, 1.5e6, 2e9)
    ]
    assert ["1.235", "12,345", "–", "–"] == [
        digits(1.23456),
        digits(12345.0, ",.0f"),
        digits(math.nan),
        digits(math.inf),
    ]


def test_half_an_interval_is_readable_however_wide() -> None:
    """Three digits; 76885.1 is no number of 5 digits and a point."""
    assert ["0.0123", "7.69e+04", "∞", "–"] == [plus_minus(v) for v in (0.01234, 76885.1, math.inf, math.nan)]
