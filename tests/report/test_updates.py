"""The history of updates, by hand."""

import math
from typing import Any

import pytest

from ddkmix.report.story import Moment, Story
from ddkmix.report.updates import HEADER, update_rows


def story_with(*moments: Moment) -> Story:
    """A story of these evaluations."""
    names = sorted({name for moment in moments for name in moment.losses})
    return Story(
        title="t",
        status="s",
        share_done=0.5,
        facts=(),
        domains=tuple(names),
        moments=moments,
        objective=(),
        limits={},
        weights_title="weight",
        config="",
    )


def moment(step: int, gaps: dict[str, float | None], weights: dict[str, float], **others: Any) -> Moment:
    """An evaluation."""
    losses = {name: {"loss_gap": gap} for name, gap in gaps.items()}
    return Moment(step=step, losses=losses, weights=weights, served=others.get("served", {}), epochs={})


def test_an_update_is_told_in_a_line() -> None:
    """Gaps 1 and 2: mean 1.5, worst 2 of b. From (0.5, 0.5) to (0.2, 0.8) moves 0.3 of the mixture."""
    story = story_with(
        moment(0, {"a": 1.0, "b": 2.0}, {"a": 0.5, "b": 0.5}, served={"a": 0.0, "b": 0.0}),
        moment(1000, {"a": 0.25, "b": 0.75}, {"a": 0.2, "b": 0.8}, served={"a": 700.0, "b": 500.0}),
    )
    expected = [
        ["0", "1.500", "2.000", "b", "–", "–", "–", "0"],
        ["1,000", "0.500", "0.750", "b", "0.300", "b +0.300", "a −0.300", "1,200"],
    ]
    assert expected == [row.cells() for row in update_rows(story)]
    assert len(HEADER) == len(expected[0])


def test_weights_that_stay_move_nothing() -> None:
    """0.000 and dashes, at the end of a run for instance."""
    same = {"a-b": 0.5, "c": 0.5}
    story = story_with(moment(0, dict.fromkeys(same, 1.0), same), moment(5, dict.fromkeys(same, 1.0), same))
    assert ["0.000", "–", "–"] == update_rows(story)[1].cells()[4:7]


def test_domains_that_come_bring_their_weight_and_a_hyphen_is_no_minus() -> None:
    """a-b hands 0.4 to c, which was not there."""
    story = story_with(moment(0, {"a-b": 1.0}, {"a-b": 1.0}), moment(5, {"c": 1.0}, {"a-b": 0.6, "c": 0.4}))
    assert ["0.400", "c +0.400", "a-b −0.400"] == update_rows(story)[1].cells()[4:7]


def test_unknown_gaps_are_left_out_of_the_mean() -> None:
    """One known gap is the mean and the worst; none at all is a dash."""
    story = story_with(
        moment(0, {"a": None, "b": 2.0}, {"a": 1.0}), moment(1, {"a": None, "b": None}, {"a": 1.0})
    )
    one, none = update_rows(story)
    assert (2.0, 2.0, "b") == pytest.approx((one.mean, one.worst, one.where))
    assert math.isnan(none.mean)
    assert ["–", "–", "–"] == none.cells()[1:4]
