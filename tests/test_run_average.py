"""The mixture that a run had on average, and the one line of config that another run takes it with."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddkmix import average_weights, load_config
from ddkmix.checkpoint import find_run
from ddkmix.config import dump_config, parse_config
from ddkmix.errors import ConfigError, RunError
from ddkmix.policies import Static, build_policy

RUN = [
    (0, {"code": 0.5, "prose": 0.5}),
    (100, {"code": 0.7, "prose": 0.3}),
    (400, {"code": 0.9, "prose": 0.1}),
]
AVERAGE = {"code": 0.65, "prose": 0.35}
"""100 steps of 0.5 and 300 of 0.7; what was set at the last evaluation has served nothing yet."""


def write_run(folder: Path, records: list[tuple[int, dict[str, float]]], tail: str = "") -> Path:
    """A run directory as far as an average looks at it."""
    folder.mkdir()
    (folder / "config.yaml").write_text("run_dir: here\n")
    lines = [json.dumps({"step": step, "weights": weights, "served": {}}) for step, weights in records]
    (folder / "intervals.jsonl").write_text("".join(line + "\n" for line in lines) + tail)
    return folder


def write_config(folder: Path, policy: str) -> Path:
    """A config with this policy."""
    path = folder / "config.yaml"
    path.write_text(
        "run_dir: runs/static\ndomains: [domains]\nteacher: {model: t}\n"
        f"student: {{init: load, model: s}}\ntrainer: {{steps: 10}}\npolicy: {policy}\n"
    )
    return path


def test_every_interval_counts_by_its_steps(tmp_path: Path) -> None:
    """By hand: (100 x 0.5 + 300 x 0.7) / 400 = 0.65. The mean of the records would be 0.7, and wrong."""
    run = write_run(tmp_path / "run", RUN)
    assert pytest.approx(AVERAGE) == average_weights(run)
    assert pytest.approx(AVERAGE) == average_weights(str(run))


def test_a_line_that_a_killed_run_left_unfinished_is_none(tmp_path: Path) -> None:
    """The run may be going on, or be dead: it counts until its last whole evaluation."""
    assert pytest.approx(AVERAGE) == average_weights(write_run(tmp_path / "run", RUN, '{"step": 500, "we'))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "has 0 evaluations; an average over time needs two"),
        (RUN[:1], "has 1 evaluations"),
        ([RUN[0], RUN[0]], "has 2 evaluations; .* at different steps"),
        ([RUN[0], (50, {"code": 1.0}), RUN[2]], r"began with the domains .* and has \['code'\] at step 50"),
    ],
)
def test_a_run_without_an_average_is_one_line(
    tmp_path: Path, records: list[tuple[int, dict[str, float]]], message: str
) -> None:
    """No evaluation, one, two at one step, or domains that changed on the way."""
    with pytest.raises(RunError, match=message) as error:
        average_weights(write_run(tmp_path / "run", records))
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    """Missing, empty, or without evaluations; and a line that is none is named by its number."""
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(RunError, match=r"is not a run directory \(no config.yaml\)"):
            average_weights(folder)
    run = write_run(tmp_path / "run", RUN)
    (run / "intervals.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(
        RunError,
        match=r"intervals.jsonl is damaged or of another version of ddkmix \(line 1: weights missing",
    ):
        average_weights(run)
    (run / "intervals.jsonl").unlink()
    with pytest.raises(RunError, match="has 0 evaluations"):
        average_weights(run)


def test_one_line_of_config_takes_the_average_of_a_run(tmp_path: Path) -> None:
    """Reading the config replaces path by numbers, so a resumed run does not look at the other again."""
    run = write_run(tmp_path / "run", RUN)
    config = load_config(write_config(tmp_path, f"{{name: static, weights: average, run: {run}}}"))
    assert config.policy.model_dump() == {
        "name": "static",
        "weights": pytest.approx(AVERAGE),
        "averaged_from": f"{run} (weights as served, by steps, until step 400)",
    }
    policy = build_policy(config.policy)
    assert isinstance(policy, Static)
    assert pytest.approx(AVERAGE) == policy.weights
    again = parse_config(dump_config(config), where="the resolved config")
    assert again == config


def test_overrides_take_it_too(tmp_path: Path) -> None:
    """Three values of a section that the file need not have."""
    run = write_run(tmp_path / "run", RUN)
    overrides = ["policy.name=static", "policy.weights=average", f"policy.run={run}"]
    config = load_config(write_config(tmp_path, "{name: static}"), overrides)
    assert pytest.approx(AVERAGE) == config.policy.model_dump()["weights"]


def test_a_config_that_averages_nothing_is_one_line(tmp_path: Path) -> None:
    """A run that is not named, and one that is none."""
    with pytest.raises(ConfigError, match=r"policy.run = None; weights: average needs the folder") as error:
        load_config(write_config(tmp_path, "{name: static, weights: average}"))
    assert "\n" not in str(error.value)
    with pytest.raises(RunError, match="nowhere is not a run directory"):
        load_config(write_config(tmp_path, "{name: static, weights: average, run: nowhere}"))


def test_other_policies_and_other_weights_are_left_alone(tmp_path: Path) -> None:
    """A policy of somebody else may have parameters of these names."""
    theirs = "{name: 'mine:Policy', weights: average, run: anything}"
    config = load_config(write_config(tmp_path, theirs))
    assert config.policy.model_dump() == {"name": "mine:Policy", "weights": "average", "run": "anything"}
    config = load_config(write_config(tmp_path, "{name: static, weights: uniform}"))
    assert config.policy.model_dump() == {"name": "static", "weights": "uniform"}


DOREMI = {"mixture_weights": [0.9, 0.1], "average_weights": [0.8, 0.2], "updates": 2}


@pytest.mark.parametrize("state", [DOREMI, {"mixture_weights": [0.6, 0.4], "policy": DOREMI}])
def test_the_average_that_a_policy_keeps_is_the_result(tmp_path: Path, state: dict[str, Any]) -> None:
    """DoReMi's own, of its updates alone, as of the last evaluation; with guards around it or without."""
    run = write_run(tmp_path / "run", RUN)
    lines = [{"step": s, "weights": w, "policy": state if s == 400 else None} for s, w in RUN]
    (run / "intervals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert {"code": 0.8, "prose": 0.2} == average_weights(run)
    policy = f"{{name: static, weights: average, run: {run}}}"
    taken = load_config(write_config(tmp_path, policy)).policy.model_dump()
    assert f"{run} (average_weights of its policy until step 400)" == taken["averaged_from"]


def test_a_run_that_is_resumed_keeps_the_average_that_it_began_with(tmp_path: Path) -> None:
    """The other run goes on, or is deleted; another path is another average."""
    run, path = write_run(tmp_path / "run", RUN), tmp_path / "config.yaml"
    write_config(tmp_path, f"{{name: static, weights: average, run: {run}}}")
    own = [f"run_dir={tmp_path / 'static'}"]
    first = load_config(path, own)
    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "config.yaml").write_text(yaml.safe_dump(dump_config(first)))
    with (run / "intervals.jsonl").open("a") as file:
        file.write(json.dumps({"step": 800, "weights": {"code": 0.0, "prose": 1.0}}) + "\n")
    assert first == load_config(path, own, resume=True) != load_config(path, own)
    shutil.rmtree(run)
    assert first == load_config(path, own, resume=True)
    assert find_run(load_config(path, own, resume=True), resume=True) is None  # the same run: no refusal
    with pytest.raises(RunError, match="is not a run directory"):
        load_config(path, own)
    with pytest.raises(RunError, match="other is not a run directory"):
        load_config(path, [*own, "policy.run=other"], resume=True)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"step": 1e999, "weights": {}}', "step is inf"),
        (b'{"step": 500, "weights": {"code": 1e999}}', "weights is not a number for each domain"),
        (b'{"step": 5, "weights": {"code": "\xff"}}', "utf-8"),
        (b'{"step": 5, "weights', "control character"),
        (b"[]", "it holds list"),
        (b'{"step": 50, "weights": {"code": 1, "prose": 0}}', "step 50 comes after step 400"),
        (b'{"step": 500, "weights": {"code": 1, "prose": 0}, "planner": {}}', "planner has no version"),
    ],
)
def test_a_damaged_record_is_one_line(tmp_path: Path, line: bytes, reason: str) -> None:
    """It names file, line and reason; never a traceback, never a negative share."""
    run = write_run(tmp_path / "run", RUN)
    with (run / "intervals.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(RunError, match="intervals.jsonl is damaged or .*line 4: .*" + reason) as error:
        average_weights(run)
    assert "\n" not in str(error.value)
