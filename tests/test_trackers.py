"""Trackers: which names are taken, and that what is measured reaches them."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ddkmix.config import dump_config, parse_config
from ddkmix.errors import ConfigError
from ddkmix.preflight import check
from ddkmix.records import read_lines
from ddkmix.setup import train
from ddkmix.trackers import check_taken, check_trackers, evaluation_metrics, run_options, settings_of
from ddkmix.types import LN_2
from tests.conftest import ConfigTree, domain_losses

Make = Callable[..., ConfigTree]
SERVED = {"a": 30, "b": 10}


def test_an_evaluation_is_told_by_domain() -> None:
    """Losses, gaps and errors under the names of `DomainLosses`, the weights that follow, and two sums."""
    losses = domain_losses([0.5, 2.0])
    expected = {
        "student_loss/a": 2.5,
        "student_loss/b": 4.0,
        "teacher_loss/a": 2.0,
        "teacher_loss/b": 2.0,
        "loss_gap/a": 0.5,
        "loss_gap/b": 2.0,
        "gap_error/a": 0.01,
        "gap_error/b": 0.01,
        "student_bits_per_byte/a": 0.625 / LN_2,  # 2.5 nats a token, 4 bytes a token
        "student_bits_per_byte/b": 1.0 / LN_2,
        "teacher_bits_per_byte/a": 0.5 / LN_2,
        "teacher_bits_per_byte/b": 0.5 / LN_2,
        "rows_served/a": 30.0,
        "rows_served/b": 10.0,
        "mixture/next_weight/a": 0.25,
        "mixture/next_weight/b": 0.75,
        "evaluation/mean_loss_gap": 1.25,
        "evaluation/worst_loss_gap": 2.0,
        "evaluation/domains_not_finite": 0.0,
    }
    told = evaluation_metrics(losses, {"a": 0.25, "b": 0.75}, SERVED)
    assert expected == pytest.approx(told)
    assert {float} == {type(value) for value in told.values()}
    columns = ("excess_loss", "forward_kl", "effective_rows")
    more = replace(losses, **{column: np.array([0.6, 2.1]) for column in columns})
    found = set(evaluation_metrics(more, {"a": 0.25, "b": 0.75}, SERVED)) - set(expected)
    assert {f"{column}/{domain}" for column in columns for domain in "ab"} == found


def test_what_is_not_known_is_not_told() -> None:
    """Some trackers store NaN as an error, others as 0."""
    losses = replace(domain_losses([0.5, 2.0]), gap_error=np.array([math.nan, 0.1]))
    told = evaluation_metrics(losses, {}, {})
    assert "gap_error/a" not in told
    assert 0.1 == told["gap_error/b"]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_mean_gap_is_that_of_all_domains_or_of_none(loss: float) -> None:
    """One that blew up must not leave a curve of the others under the same name; how many is a curve too."""
    losses = replace(domain_losses([0.5, 2.0, 1.0]), student_loss=np.array([2.5, loss, 3.0]))
    told = evaluation_metrics(losses, {}, {})
    assert 1.0 == told["evaluation/domains_not_finite"]
    assert not {"evaluation/mean_loss_gap", "evaluation/worst_loss_gap", "loss_gap/b"} & set(told)
    assert 0.5 == told["loss_gap/a"]


def test_settings_are_plain_values_by_the_names_of_overrides(tiny_config: Make) -> None:
    """Every key of the config once; lists as strings, sections in lists by position."""
    config = parse_config(tiny_config(loss=[{"name": "cross_entropy", "weight": 0.5}]), where="test")
    found = settings_of(dump_config(config))
    assert ("cross_entropy", 0.5) == (found["loss.0.name"], found["loss.0.weight"])
    keys = ("trainer.batch_rows", "teacher.revision", "tracking.trackers")
    assert (config.trainer.batch_rows, None, "[]") == tuple(found[key] for key in keys)
    assert {bool, int, float, str, type(None)} >= {type(value) for value in found.values()}
    assert {"a.b": "[0, [1]]", "c.0.d": 1} == settings_of({"a": {"b": [0, [1]]}, "c": [{"d": 1}], "e": {}})


def test_a_run_keeps_its_name_and_id(tmp_path: Path) -> None:
    """Weights & Biases goes on with the run after a resume; a run of the same name elsewhere is another."""
    tracking = pytest.importorskip("accelerate.tracking")
    first, other = tmp_path / "a" / "ddk", tmp_path / "b" / "ddk"
    for folder in (first, other):
        folder.mkdir(parents=True)
    options = run_options(first)
    assert options == run_options(first)
    assert {"name": "ddk", "id": options["wandb"]["id"], "resume": "allow"} == options["wandb"]
    assert options["wandb"]["id"] in options["trackio"]["name"]
    for name in ("wandb", "trackio"):
        assert options[name] != run_options(other)[name]
    tracking.MLflowTracker("project", **options["mlflow"])


def test_no_trackers_no_id(tiny_config: Make) -> None:
    """A run that nobody follows has no file for them."""
    config = parse_config(tiny_config(trainer={"steps": 1}), where="test")
    train(config)
    assert not (config.run_dir / "tracker_id").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "tracking.trackers: 'tensorbord' is unknown; did you mean 'tensorboard'?"),
        ("json", "tracking.trackers: 'json' is unknown; known: aim, clearml, "),
        ("all", "tracking.trackers: 'all' is unknown; "),
        ("a.b", "tracking.trackers: 'a.b' is unknown; "),
        ("comet_ml", "tracking.trackers: 'comet_ml' is not installed; pip install comet_ml."),
    ],
)
def test_a_name_that_nobody_answers_to_is_one_line_before_anything_is_loaded(
    tiny_config: Make, name: str, message: str
) -> None:
    """A module of that name is no tracker (`json`), and `all` would be whatever happens to be there."""
    config = parse_config(tiny_config(tracking={"trackers": [name]}), where="test")
    with pytest.raises(ConfigError) as error:
        check(config)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError):
        train(config)
    assert not config.run_dir.exists()


def test_a_missing_package_counts_whatever_its_fellow(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard has two writers, of which one is enough."""
    for package in ("tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match="'tensorboard' is not installed; pip install tensorboard"):
        check_trackers(["tensorboard"])


def test_a_tracker_that_accelerate_leaves_out_is_an_error() -> None:
    """It says nothing when a version does not suit it."""
    check_taken(["mine"], ["mine", "other"])
    with pytest.raises(ConfigError, match="Accelerate cannot use 'aim' as it is installed"):
        check_taken(["mine", "aim"], ["mine"])


@pytest.fixture
def own_tracker() -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """What a tracker called `mine` is told, in order; its class is registered with Accelerate."""
    tracking = pytest.importorskip("accelerate.tracking")
    if not hasattr(tracking, "register_tracker_class"):
        pytest.skip("this version of Accelerate takes no classes of others")
    told: list[tuple[int, dict[str, Any]]] = []

    class Mine(tracking.GeneralTracker):  # type: ignore[misc, name-defined]
        """Writes down everything."""

        name, requires_logging_directory, tracker = "mine", False, None

        def __init__(self, project: str) -> None:
            super().__init__()
            assert "my project" == project

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            """Keep it."""
            assert step is not None
            told.append((step, dict(values)))

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            """The config comes before anything else."""
            told.append((-1, values))

    tracking.register_tracker_class(Mine)
    yield told
    del tracking.LOGGER_TYPE_TO_CLASS["mine"]


def events_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of TensorBoard's event files, as (step, value)."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_evaluations_and_steps_reach_tensorboard_and_a_tracker_of_ones_own(
    tiny_config: Make, own_tracker: list[tuple[int, dict[str, Any]]]
) -> None:
    """Every evaluation, the last one too, with the numbers of intervals.jsonl at its step, and every line of
    metrics.jsonl; steps never go back, which Weights & Biases would not forgive."""
    pytest.importorskip("tensorboard")
    tracking = {"trackers": ["tensorboard", "mine"], "project": "my project"}
    config = parse_config(tiny_config(trainer={"steps": 6}, tracking=tracking), where="test")
    train(config)
    assert (-1, settings_of(dump_config(config))) == own_tracker.pop(0)
    (kept,) = (config.run_dir / "my project").glob("*/hparams.yml")
    assert settings_of(dump_config(config)) == yaml.safe_load(kept.read_text())
    assert (config.run_dir / "tracker_id").exists()
    scalars = events_of(config.run_dir / "my project")
    intervals = list(read_lines(config.run_dir / "intervals.jsonl"))
    assert [0, 4, 6] == [record["step"] for record in intervals]
    for domain in ("code", "math", "prose"):
        for column in ("student_loss", "teacher_loss", "loss_gap", "gap_error"):
            expected = [(r["step"], pytest.approx(r["losses"][domain][column], rel=1e-6)) for r in intervals]
            assert expected == scalars[f"{column}/{domain}"]
        weights = [(r["step"], pytest.approx(r["weights"][domain], rel=1e-6)) for r in intervals]
        assert weights == scalars[f"mixture/next_weight/{domain}"]
        assert [(r["step"], r["served"][domain]) for r in intervals] == scalars[f"rows_served/{domain}"]
    metrics = list(read_lines(config.run_dir / "metrics.jsonl"))
    objective = [(r["step"], pytest.approx(r["train/objective"], rel=1e-6)) for r in metrics]
    assert objective == scalars["train/objective"]
    steps = [step for step, _ in own_tracker]
    assert sorted(steps) == steps
    told = dict.fromkeys(["0", "4", "6"], 0)
    for step, values in own_tracker:
        told[str(step)] = told.get(str(step), 0) + ("loss_gap/code" in values)
    assert {"0": 1, "4": 1, "6": 1} == {step: count for step, count in told.items() if count}
    assert json.dumps([values for _, values in own_tracker], allow_nan=False)
