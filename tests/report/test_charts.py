"""Where curves lie, by hand."""

import math
import re

import numpy as np
import pytest

from ddkmix.report.charts import Curve, line_of, time_chart
from ddkmix.report.scales import Axis
from ddkmix.report.small_charts import area_path, band_path, gap_bar, gap_ticks, small_chart
from tests.report.conftest import HOSTILE
from tests.report.test_markup import Reader

X = Axis(low=0.0, high=10.0, log=False, ticks=(0.0, 5.0, 10.0))
Y = Axis(low=0.0, high=2.0, log=False, ticks=(0.0, 1.0, 2.0))


def curve(ys: list[float], **options: object) -> Curve:
    """Values at steps 0, 5 and 10."""
    xs = np.array([0.0, 5.0, 10.0][: len(ys)])
    return Curve(name="code", xs=xs, ys=np.array(ys), **options)  # type: ignore[arg-type]


def test_a_line_goes_through_its_points() -> None:
    """1000 wide, 100 high, upside down: 2 is at the top."""
    assert "M0 100.0h0L500 50.0L1000 0.0" == line_of(curve([0.0, 1.0, 2.0]), X, Y, 100.0)


def test_a_value_that_holds_until_the_next_makes_steps() -> None:
    """Across first, then up."""
    assert "M0 100.0h0H500V50.0H1000V0.0" == line_of(curve([0.0, 1.0, 2.0], stepped=True), X, Y, 100.0)


@pytest.mark.parametrize(
    ("ys", "expected"),
    [
        ([0.0, math.nan, 2.0], "M0 100.0h0M1000 0.0h0"),
        ([math.nan, 1.0, 2.0], "M500 50.0h0L1000 0.0"),
        ([math.nan, math.nan], ""),
        ([1.0], "M0 50.0h0"),
    ],
)
def test_what_is_not_known_is_a_hole(ys: list[float], expected: str) -> None:
    """The line breaks off and begins again; a point alone is a dot."""
    assert expected == line_of(curve(ys), X, Y, 100.0)


def test_a_band_closes_around_each_known_part() -> None:
    """1 +- 0.5 and so on: along the upper edge and back along the lower."""
    whole = curve([1.0, 1.0, 1.0], errors=np.array([0.5, 0.5, 1.0]))
    assert 'd="M0 25.0L500 25.0L1000 0.0L1000 100.0L500 75.0L0 75.0Z"' in band_path(whole, X, Y, height=100.0)
    broken = curve([1.0, 1.0, 1.0], errors=np.array([0.5, math.nan, 0.5]))
    assert 2 == band_path(broken, X, Y, height=100.0).count("Z")


def test_an_area_stands_on_the_ground() -> None:
    """A weight of 1, then 2; it breaks off where it is not known."""
    assert 'd="M0 100V50.0H500V100ZM500 100V0.0H1000V100ZM1000 100V0.0Z"' in area_path(
        curve([1.0, 2.0, 2.0]), X, Y, height=100.0
    )
    assert 'd="M0 100V50.0H500V100Z"' in area_path(curve([1.0, math.nan]), X, Y, height=100.0)


def test_a_gap_is_a_bar_from_zero_with_whiskers() -> None:
    """Axis 0 to 2, drawn from 4 to 96 %: 1 is at 50 %, its interval from 27 to 73 %."""
    drawn = gap_bar(1.0, 0.5, Y)
    assert 'x="4.00%" width="46.00%"' in drawn
    assert 'cx="50.00%"' in drawn
    assert 'x1="27.00%" x2="73.00%"' in drawn


def test_a_negative_gap_lies_left_of_zero() -> None:
    """A student ahead of its teacher: from -1 to 0."""
    axis = Axis(low=-1.0, high=1.0, log=False, ticks=(0.0,))
    assert 'x="4.00%" width="46.00%"' in gap_bar(-1.0, 0.1, axis)
    assert 'x="50.00%"' in gap_ticks(axis)


def test_a_gap_without_an_error_has_no_whiskers_and_no_gap_draws_nothing() -> None:
    """Neither breaks the table."""
    assert "whisker" not in gap_bar(1.0, math.nan, Y)
    assert "circle" in gap_bar(1.0, math.nan, Y)
    assert 'aria-hidden="true"></svg>' in gap_bar(math.nan, math.nan, Y)


def test_a_chart_says_what_it_is_and_names_its_curves() -> None:
    """Title and description for those who cannot see it; labels at the ends that never lie on each other."""
    curves = [curve([0.5, 1.0, 1.0], style=i) for i in range(8)]
    chart = time_chart("gap", "Loss gap", "It fell.", curves, zero=True)
    assert 'role="img" aria-labelledby="gap-t gap-d"' in chart
    assert '<title id="gap-t">Loss gap</title><desc id="gap-d">It fell.</desc>' in chart
    places = [float(y) for y in re.findall(r'y="([\d.]+)" class="label"', chart)]
    assert 8 == len(places)
    assert np.diff(places) == pytest.approx(14.0)


def test_the_heading_says_where_a_scale_is_logarithmic() -> None:
    """16 to 1 is; 2 to 1 is not."""
    steep, flat = (
        time_chart("k", "Gap", "", [curve(ys, style=0)], zero=False) for ys in ([16.0, 1.0], [2.0, 1.0])
    )
    assert "<figcaption>Gap (log scale)</figcaption>" in steep
    assert "<figcaption>Gap</figcaption>" in flat


def test_curves_beyond_eight_are_one_grey_path() -> None:
    """Sixty lines cannot be told apart by colour; they cost little and carry no labels."""
    curves = [curve([1.0, 2.0], style=i if i < 8 else None) for i in range(60)]
    chart = time_chart("k", "Gap", "", curves, zero=True)
    assert (1, 8) == (chart.count('class="line many"'), chart.count('class="label"'))


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_escaped_in_labels_and_titles(name: str) -> None:
    """Cut to the room that there is, and still text."""
    one = Curve(name=name, xs=np.array([0.0, 1.0]), ys=np.array([1.0, 2.0]), style=0)
    drawn = time_chart("k", name, name, [one], zero=True) + small_chart(name, (), Y, height=20.0, ticks=())
    tags = {tag for tag, _ in Reader(drawn).tags}
    assert {"figure", "figcaption", "svg", "title", "desc", "text", "line", "path"} == tags
    assert not [key for _, found in Reader(drawn).tags for key in found if key.startswith("on")]


def test_points_are_marked_while_they_are_few() -> None:
    """A dot for every evaluation up to 16, a bare line beyond."""
    for count, marked in ((16, True), (17, False)):
        one = Curve(name="a", xs=np.arange(float(count)), ys=np.ones(count), style=0)
        assert marked == ('class="dots' in time_chart("k", "t", "", [one], zero=True))


def test_bars_are_drawn_whole_or_end_in_an_arrow() -> None:
    """15.2 +- 3.0 at the top is within the frame; on a log scale 1 +- 2 goes on downwards, and says so."""
    whole = Curve(
        name="a", xs=np.arange(2.0), ys=np.array([15.2, 10.0]), style=0, errors=np.array([3.0, 3.0])
    )
    drawn = time_chart("k", "t", "", [whole], zero=False)
    assert "arrow" not in drawn
    (bars,) = re.findall(r'class="bars s0" d="([^"]+)"', drawn)
    tops = [float(top) for top in re.findall(r"V([\d.]+)", bars)]
    bottoms = [float(low) for low in re.findall(r"M\d+ ([\d.]+)", bars)]
    assert 0 < min(tops)
    assert max(bottoms) < 190
    lengths = [low - top for low, top in zip(bottoms, tops, strict=True)]
    assert lengths[0] == pytest.approx(lengths[1], abs=0.2)
    cut = Curve(name="a", xs=np.arange(2.0), ys=np.array([16.0, 1.0]), style=0, errors=np.array([1.0, 2.0]))
    assert 1 == time_chart("k", "t", "", [cut], zero=False).count('class="arrow"')


def test_many_evaluations_have_bars_at_the_end_only() -> None:
    """Eight curves with forty bars each are a comb; the last known value keeps its bar."""
    ys = np.ones(40)
    ys[-1] = math.nan
    one = Curve(name="a", xs=np.arange(40.0), ys=ys, style=0, errors=np.full(40, 0.1))
    (bars,) = re.findall(r'class="bars s0" d="([^"]+)"', time_chart("k", "t", "", [one], zero=False))
    assert ["M974"] == re.findall(r"M\d+", bars)
    few = Curve(name="a", xs=np.arange(16.0), ys=np.ones(16), style=0, errors=np.full(16, 0.1))
    (bars,) = re.findall(r'class="bars s0" d="([^"]+)"', time_chart("k", "t", "", [few], zero=False))
    assert 16 == bars.count("M")


def test_the_last_number_of_steps_ends_where_the_curves_do() -> None:
    """Behind it stands the word "step"."""
    one = Curve(name="a", xs=np.array([0.0, 1000.0]), ys=np.ones(2), style=0)
    drawn = time_chart("k", "t", "", [one], zero=True)
    assert re.search(r'<text x="68.0%" y="[\d.]+" class="tick end">1000</text>', drawn)
    assert re.search(r'<text x="12.0%" y="[\d.]+" class="tick middle">0</text>', drawn)
