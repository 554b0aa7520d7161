"""A run as a story: what its directory says, and nothing that it does not say."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddkmix.config import parse_config
from ddkmix.errors import RunError
from ddkmix.records import read_lines
from ddkmix.report.story import Moment, Story, moment_of, story_of_gaps, story_of_run
from ddkmix.resolved_config import read_run_config
from ddkmix.types import DomainLosses
from tests.conftest import domain_losses
from tests.report.conftest import HOSTILE, many

Retold = Callable[..., Path]


def over_time(story: Story, column: str, domain: str) -> np.ndarray:
    """A number of one domain at every evaluation."""
    return story.table(column)[:, story.domains.index(domain)]


def value_of(moment: Moment, column: str, domain: str) -> float:
    """A number of one domain."""
    return float(moment.column(column, [domain])[0])


def test_a_finished_run_is_told_as_it_was_recorded(recorded_run: Path) -> None:
    """Every evaluation with its very numbers; domains by their last gap; limits of the data."""
    story = story_of_run(recorded_run)
    records = list(read_lines(recorded_run / "intervals.jsonl"))
    assert ("tiny-run", "Finished: 12 steps.", 1.0) == (story.title, story.status, story.share_done)
    assert [0, 4, 8, 12] == story.steps.tolist()
    last = records[-1]["losses"]
    assert sorted(last, key=lambda name: -last[name]["loss_gap"]) == list(story.domains)
    for name in story.domains:
        assert [r["losses"][name]["loss_gap"] for r in records] == over_time(story, "loss_gap", name).tolist()
        for column in ("weights", "served", "epochs"):
            assert [r[column][name] for r in records] == over_time(story, column, name).tolist()
    lines = read_lines(recorded_run / "metrics.jsonl")
    assert [(line["step"], line["train/objective"]) for line in lines] == list(story.objective)
    assert {"code": 5.0, "math": 5.0, "prose": 5.0} == story.limits
    facts = dict(story.facts)
    assert ("72", "4") == (facts["rows served"], facts["evaluations"])  # 12 steps of 6 rows
    assert facts["policy"].startswith("ddk")
    assert (recorded_run / "config.yaml").read_text() == story.config


def test_a_run_in_progress_is_told_as_far_as_it_is_whole(retold: Retold) -> None:
    """Torn last lines are left out; where it is comes from the newer of the two logs."""
    story = story_of_run(retold(HOSTILE, finished=False))
    assert "Not finished: step 10 of 12, last measured at step 8." == story.status
    assert 10 / 12 == story.share_done
    assert [0, 4, 8] == story.steps.tolist()
    assert set(HOSTILE) == set(story.domains)


def test_a_run_that_ran_out_of_rows_says_so(recorded_copy: Path) -> None:
    """It has saved its student and measured after its last step; a killed run has not."""
    keep(recorded_copy, lambda step: step <= 8)
    assert story_of_run(recorded_copy).status.startswith("Not finished: step 8 of 12")
    (recorded_copy / "student").mkdir()
    expected = "Finished early: 8 of 12 steps; no domain had rows left to serve."
    assert expected == story_of_run(recorded_copy).status


def keep(run: Path, wanted: Callable[[int], bool]) -> None:
    """Drop the other lines of the logs."""
    for name in ("intervals.jsonl", "metrics.jsonl"):
        lines = (run / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join(line for line in lines if wanted(json.loads(line)["step"])))


def edit(run: Path, change: Callable[[dict[str, Any]], None], line: int = -1) -> None:
    """Change one record of intervals.jsonl."""
    records = list(read_lines(run / "intervals.jsonl"))
    change(records[line])
    (run / "intervals.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_numbers_that_are_not_known_are_nan(recorded_copy: Path) -> None:
    """null, NaN and Infinity alike; a domain whose last gap is not finite stands first."""

    def spoil(record: dict[str, Any]) -> None:
        record["losses"]["code"] |= {"loss_gap": None, "gap_error": math.nan, "perplexity_ratio": math.inf}

    edit(recorded_copy, spoil)
    story = story_of_run(recorded_copy)
    assert "code" == story.domains[0]
    assert ["not finite", "", ""] == [story.no_gap(name) for name in story.domains]
    for column in ("loss_gap", "gap_error", "perplexity_ratio", "no_such_column"):
        assert math.isnan(value_of(story.last, column, "code"))
    assert np.isfinite(over_time(story, "loss_gap", "code")[:-1]).all()


def test_domains_may_come_and_go(recorded_copy: Path) -> None:
    """A resumed run may have others; where one was not there its numbers are not known."""

    def rename(record: dict[str, Any]) -> None:
        for part in ("losses", "weights", "served", "epochs"):
            record[part]["songs"] = record[part].pop("code")

    edit(recorded_copy, rename)
    story = story_of_run(recorded_copy)
    assert {"code", "math", "prose", "songs"} == set(story.domains)
    assert ("code", "not measured") == (story.domains[-1], story.no_gap("code"))
    assert [True, True, True, False] == np.isnan(over_time(story, "weights", "songs")).tolist()
    assert [False, False, False, True] == np.isnan(over_time(story, "served", "code")).tolist()


def test_runs_of_older_versions_are_told_without_limits(recorded_copy: Path) -> None:
    """No data.json, no metrics.jsonl: what is there is told."""
    (recorded_copy / "data.json").unlink()
    (recorded_copy / "metrics.jsonl").unlink()
    story = story_of_run(recorded_copy)
    assert ({}, ()) == (story.limits, story.objective)
    assert "Finished: 12 steps." == story.status


def test_the_time_is_that_of_the_newest_log(recorded_copy: Path) -> None:
    """In UTC, so that the page does not depend on where it is made."""
    for name, seconds in (("intervals.jsonl", 0), ("metrics.jsonl", 86_460)):
        os.utime(recorded_copy / name, (seconds, seconds))
    assert "1970-01-02 00:01 UTC" == dict(story_of_run(recorded_copy).facts)["last written"]


@pytest.mark.parametrize("name", ["intervals.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize("line", ["{not json}", "[]", '{"step": 3}', '{"step": "x", "losses": 1}'])
def test_a_damaged_log_is_one_line(recorded_copy: Path, name: str, line: str) -> None:
    """The file and the reason; no traceback, and no page of half a run."""
    with (recorded_copy / name).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RunError, match=rf"{name} is damaged or of another version of ddkmix \(") as error:
        story_of_run(recorded_copy)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_run_and_one_without_evaluations_are_refused(
    recorded_copy: Path, tmp_path: Path
) -> None:
    """With the messages of `show`."""
    with pytest.raises(RunError, match=r"is not a run directory"):
        story_of_run(tmp_path)
    (recorded_copy / "intervals.jsonl").write_text("")
    with pytest.raises(RunError, match=r"has no evaluation yet"):
        story_of_run(recorded_copy)


def test_sixty_domains_keep_their_own_numbers(retold: Retold) -> None:
    """The largest gap first; equal ones by name."""
    story = story_of_run(retold(many(60)))
    gaps = story.now("loss_gap")
    assert 60 == len(story.domains)
    assert sorted(gaps.tolist(), reverse=True) == gaps.tolist()


def test_one_measurement_is_a_story_without_time(recorded_run: Path) -> None:
    """What `gaps` measures: no steps, no rows, no limits."""
    config = parse_config(read_run_config(recorded_run), where="test")
    story = story_of_gaps(domain_losses([0.5, 2.0]), {"a": 0.25, "b": 0.75}, config)
    assert (("b", "a"), None, 1) == (story.domains, story.share_done, len(story.moments))
    assert story.title == f"prune of {config.teacher.model} against {config.teacher.model}"
    assert 0.75 == value_of(story.last, "weights", "b")
    assert math.isnan(value_of(story.last, "served", "b"))
    assert "interval_steps: 4" in story.config


def test_a_column_of_losses_never_answers_for_weights() -> None:
    """Empty weights are unknown, whatever else has that name."""
    moment = moment_of(step=0, losses={"a": {"weights": 5.0}}, weights={}, served={}, epochs={})
    assert math.isnan(value_of(moment, "weights", "a"))


@pytest.mark.parametrize("effective_rows", [[4.0, 64.0], None])
def test_intervals_are_those_of_the_losses(recorded_run: Path, effective_rows: list[float] | None) -> None:
    """`gap_interval` itself: with 4 rows 3.18 standard errors on each side, and not 1.96."""
    losses = domain_losses([0.5, 2.0])
    rows = None if effective_rows is None else np.array(effective_rows)
    losses = replace(losses, gap_error=np.array([0.1, 0.2]), effective_rows=rows)
    config = parse_config(read_run_config(recorded_run), where="test")
    story = story_of_gaps(losses, {"a": 0.25, "b": 0.75}, config)
    low, high = losses.gap_interval()
    expected = dict(zip(losses.domains, (high - low) / 2, strict=True))
    assert [expected[name] for name in story.domains] == pytest.approx(story.now("half_width").tolist())
    quantile = 3.1824 if effective_rows else 1.96
    assert quantile * 0.1 == pytest.approx(value_of(story.last, "half_width", "a"), rel=1e-3)


def test_the_intervals_of_a_run_are_those_of_every_evaluation(recorded_run: Path) -> None:
    """Each by the rows that it rested on."""
    story = story_of_run(recorded_run)
    for record, found in zip(
        read_lines(recorded_run / "intervals.jsonl"), story.table("half_width"), strict=True
    ):
        losses = DomainLosses.from_json(record["losses"])
        low, high = losses.gap_interval()
        order = [losses.domains.index(name) for name in story.domains]
        assert ((high - low) / 2)[order].tolist() == pytest.approx(found.tolist())
        assert losses.effective_rows is not None


def test_a_gap_to_the_cards_names_their_models(recorded_run: Path) -> None:
    """Without --teacher the config's teacher is the student itself, which nobody compared it with."""
    config = parse_config(read_run_config(recorded_run), where="test")
    weights = {"a": 0.25, "b": 0.75}
    story = story_of_gaps(
        domain_losses([0.5, 2.0]), weights, config, references=("big", "bigger"), notes=("It is so.",)
    )
    assert story.title.endswith(" against the reference losses of big, bigger")
    assert ("It is so.",) == story.notes
