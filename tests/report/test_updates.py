"""The history of updates, by hand."""

import math
from typing import Any

import pytest

from ddkmix.report.story import Moment, Story, moment_of
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
    return moment_of(step=step, losses=losses, weights=weights, served=others.get("served", {}), epochs={})


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


def test_a_domain_that_diverges_does_not_improve_the_mean() -> None:
    """Gaps 5 and 2, then not finite and 2: no mean of 2 and no worst gap of 2 but a hole, and how many."""
    weights = {"a": 0.5, "b": 0.5}
    before, after, none = update_rows(
        story_with(
            moment(0, {"a": 5.0, "b": 2.0}, weights),
            moment(1, {"a": None, "b": 2.0}, weights),
            moment(2, {"a": None, "b": None}, weights),
        )
    )
    assert (3.5, 5.0, "a") == pytest.approx((before.mean, before.worst, before.where))
    assert math.isnan(after.mean)
    assert math.isnan(after.worst)
    assert ["– (1 of 2 domains)", "not finite", "a"] == after.cells()[1:4]
    assert ["– (0 of 2 domains)", "not finite", "a"] == none.cells()[1:4]


def test_the_mean_is_over_the_domains_of_that_step() -> None:
    """c came later: it is missing at first, not without a gap."""
    first, second = update_rows(
        story_with(
            moment(0, {"a": 1.0, "b": 2.0}, {"a": 1.0}), moment(1, {"a": 1.0, "b": 2.0, "c": 6.0}, {"a": 1.0})
        )
    )
    assert (1.5, 3.0) == (first.mean, second.mean)
    assert ["3.000", "6.000", "c"] == second.cells()[1:4]
