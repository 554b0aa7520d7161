"""What another policy would have set on recorded losses: exact for the run's own, stated for all others."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ddkmix.cli import main
from ddkmix.config import load_config
from ddkmix.errors import ConfigError, RunError
from ddkmix.report.history import read_intervals
from ddkmix.report.policy_replay import CAVEAT, PolicyReplay, render_policy_replay, replay_policy
from ddkmix.report.story import story_of_run
from ddkmix.setup import train
from ddkmix.tracking import JsonLines
from tests.conftest import domain_losses

DOMAINS = ("code", "math")
Record = dict[str, Any]


def record(step: int, gaps: list[float], weights: list[float], **more: Any) -> Record:
    """One evaluation of an old run: no natural weights, no planner."""

    def by_domain(values: list[Any]) -> dict[str, Any]:
        return dict(zip(DOMAINS, values, strict=True))

    return {
        "step": step,
        "weights": by_domain(weights),
        "served": by_domain([step, 2 * step]),
        "epochs": by_domain([0.0, 0.0]),
        "losses": domain_losses(gaps, domains=DOMAINS).to_json(),
        "policy": {"mixture_weights": weights},
        **more,
    }


OLD = [
    record(0, [2.0, 0.5], [0.25, 0.75]),
    record(40, [math.log(9), 0.0], [0.7, 0.3]),
    record(80, [1.0, 0.4], [0.7, 0.3]),
]


def write_run(folder: Path, records: list[Record], **config: Any) -> Path:
    """A run directory with so many evaluations of 80 steps."""
    folder.mkdir(exist_ok=True)
    tree = {"run_dir": str(folder), "policy": {"name": "ddk"}, "trainer": {"steps": 80}, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    for line in records:
        JsonLines(folder / "intervals.jsonl").append(line)
    return folder


def would(replay: PolicyReplay) -> list[list[float]]:
    """The replayed weights."""
    return [update.would.tolist() for update in replay.updates]


# --- by hand ----------------------------------------------------------------------------------------


def test_an_old_record_by_hand(tmp_path: Path) -> None:
    """DDK on the gap: r_0 = softmax(2, 0.5), psi = r_0 (9, 1), half of it uniform. The measurement at the end
    of the run moves nothing. What the record lacks is said.
    """
    run = write_run(tmp_path, OLD)
    replay = replay_policy(run, "ddk", ["signal=loss_gap"])
    psi = np.exp([2.0, 0.5]) / np.exp([2.0, 0.5]).sum() * np.array([9.0, 1.0])
    expected = 0.5 * psi / psi.sum() + 0.25
    assert [0, 40] == [update.step for update in replay.updates]
    assert [0.25, 0.75] == replay.updates[0].would.tolist()
    assert expected == pytest.approx(replay.updates[1].would)
    assert [0.7, 0.3] == replay.updates[1].was.tolist()
    assert abs(expected[0] - 0.7) == pytest.approx(replay.updates[1].moved)
    assert replay.guards is None
    assert ["an older ddkmix wrote the run"] == [note.split(",")[0] for note in replay.notes]


def test_guards_are_the_runs_unless_others_are_given(tmp_path: Path) -> None:
    """None in an old run; a cap in a run that had one; `guards=off` and `guards.cap` change them."""
    old = write_run(tmp_path / "old", OLD)
    new = write_run(
        tmp_path / "new", OLD, guards={"floor": 0.0, "cap": 0.6, "max_move": 1.0, "evidence": 0.0}
    )
    ask = ("ddk", ["signal=loss_gap"])
    free = would(replay_policy(old, *ask))
    assert [0.4, 0.6] == pytest.approx(would(replay_policy(new, *ask))[0])  # the first mixture too
    assert [0.6, 0.4] == pytest.approx(would(replay_policy(new, *ask))[1])
    assert free == would(replay_policy(new, "ddk", ["signal=loss_gap", "guards=off"]))
    capped = would(replay_policy(new, "ddk", ["signal=loss_gap", "guards.cap=0.55"]))
    assert [[0.45, 0.55], [0.55, 0.45]] == [pytest.approx(weights) for weights in capped]
    assert 0.0 < replay_policy(old, "ddk", ["guards=on"]).updates[1].moved < 0.1


def test_a_measurement_that_set_weights_is_told_by_the_planner(tmp_path: Path) -> None:
    """The version of its weights goes up. A run that ended early, its domains used up, has two records of one
    step, of which the second moved nothing."""
    records = [{**line, "planner": {"version": v}} for line, v in zip(OLD, (1, 2, 2), strict=True)]
    records[2] = {**records[2], "step": 40}
    assert [0, 40] == [u.step for u in replay_policy(write_run(tmp_path, records), "static").updates]


def test_rows_served_reach_the_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the run: those of the recorded mixture, at the same step."""
    (tmp_path / "counting.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True)\n"
        "class Counting:\n"
        "    def init(self, losses, natural_weights):\n"
        "        return self.update({}, losses)\n"
        "    def update(self, state, losses):\n"
        "        rows = losses.rows_served + 1\n"
        "        return {'mixture_weights': (rows / rows.sum()).tolist()}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    replay = replay_policy(write_run(tmp_path / "run", OLD), "counting:Counting")
    assert [[0.5, 0.5], [41 / 122, 81 / 122]] == [pytest.approx(weights) for weights in would(replay)]


def test_other_domains_begin_anew(tmp_path: Path) -> None:
    """A domain that was added: the policy starts again, as it did in the run."""
    three = ("code", "math", "web")
    later = record(40, [1.0, 2.0], [0.5, 0.5])
    natural = dict.fromkeys(three, 1 / 3)
    later |= {
        "losses": domain_losses([1.0, 2.0, 3.0], domains=three).to_json(),
        **{name: dict.fromkeys(three, 1) for name in ("weights", "served", "epochs")},
        "policy": {"mixture_weights": [0.2, 0.2, 0.6]},
        "natural": natural,
    }
    first = {**OLD[0], "natural": {"code": 0.5, "math": 0.5}}
    replay = replay_policy(write_run(tmp_path, [first, later]), "ddk")
    assert [[0.5, 0.5], [1 / 3] * 3] == would(replay)
    assert () == replay.notes
    assert "0.333" in render_policy_replay(replay, "table")


# --- a real run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_domains: Path) -> Path:
    """Ten steps with four weight updates, under guards."""
    folder = tmp_path_factory.mktemp("replayed")
    tree = {
        "run_dir": str(folder / "run"),
        "cache_dir": str(tiny_domains / "cache"),
        "domains": [str(tiny_domains)],
        "teacher": {"model": str(tiny_teacher), "dtype": "float32"},
        "student": {"init": "prune", "layers": [0]},
        "pack": {"seq_len": 32, "processes": 1},
        "mixture": {"interval_steps": 3},
        "guards": {"max_move": 0.1, "evidence": 0.5},
        "trainer": {"steps": 10, "batch_rows": 6, "log_steps": 5, "checkpoint_steps": 5},
        "evaluation": {"rows": 4},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    train(load_config(folder / "config.yaml"))
    return folder / "run"


def test_the_runs_own_policy_gives_the_recorded_weights_exactly(real_run: Path) -> None:
    """To the last bit, with its guards and its memory, from the directory alone."""
    replay = replay_policy(real_run)
    assert [0, 3, 6, 9] == [update.step for update in replay.updates]
    assert [update.was.tolist() for update in replay.updates] == would(replay)
    assert [0.0] * 4 == [update.moved for update in replay.updates]
    assert len({tuple(weights) for weights in would(replay)}) > 2  # they did move
    assert () == replay.notes


def test_other_parameters_and_guards_give_other_weights(real_run: Path) -> None:
    """The comparison above can fail: another signal, other guards, a memory that is lost."""
    own = would(replay_policy(real_run))
    assert own != would(replay_policy(real_run, None, ["policy.signal=loss_gap"]))
    assert own != would(replay_policy(real_run, None, ["guards.max_move=0.2"]))
    assert own != would(replay_policy(real_run, None, ["guards=off"]))
    assert [[1 / 3] * 3] * 4 == would(replay_policy(real_run, "static"))
    records = read_intervals(real_run)
    assert {"natural", "planner"} <= set(records[0])
    assert records[1]["policy"]["weight_errors"] is not None


def test_a_run_that_changed_its_policy_says_so(real_run: Path, tmp_path: Path) -> None:
    """The last policy is replayed, and begins anew where the run's did."""
    tree = yaml.safe_load((real_run / "config.yaml").read_text())
    run = write_run(tmp_path / "run", read_intervals(real_run), **{k: tree[k] for k in ("policy", "guards")})
    before = {**tree, "policy": {"name": "static"}}
    (run / "config-until-step-000003.yaml").write_text(yaml.safe_dump(before))
    (run / "config-until-step-000006.yaml").write_text(yaml.safe_dump({**tree, "seed": 5}))
    replay = replay_policy(run)
    assert ["the policy or its guards were changed at step 3; here they are the last ones."] == list(
        replay.notes
    )
    natural = list(read_intervals(run)[1]["natural"].values())
    assert natural == replay.updates[1].would.tolist()  # DDK's first interval again


def test_a_real_run_that_changed_its_guards(real_run: Path, tmp_path: Path) -> None:
    """Resumed at step 5 without guards: measured at once, DDK without a memory, and from there on the weights
    of the record are again those of the replay, to the last bit.
    """
    run = tmp_path / "run"
    shutil.copytree(real_run, run)
    shutil.rmtree(run / "checkpoints" / "step-000010")
    config = load_config(real_run.parent / "config.yaml", [f"run_dir={run}", "guards=off"])
    with pytest.raises(RunError, match=r"guards.floor was None and is now 0.0\..* add --allow-changes"):
        train(config, resume=True)
    train(config, resume=True, allow_changes=True)
    replay = replay_policy(run)
    assert [0, 3, 5, 6, 9] == [update.step for update in replay.updates]
    assert [0.0] * 3 == [update.moved for update in replay.updates[2:]]
    assert [update.was.tolist() for update in replay.updates][2:] == would(replay)[2:]
    assert ["the policy or its guards were changed at step 5; here they are the last ones."] == list(
        replay.notes
    )


# --- what is shown ----------------------------------------------------------------------------------


def test_json_holds_both_and_says_whose_losses_they_are(tmp_path: Path) -> None:
    """For programs, with the caveat."""
    tree = json.loads(render_policy_replay(replay_policy(write_run(tmp_path, OLD), "static"), "json"))
    assert {"name": "static"} == tree["policy"]
    assert (None, CAVEAT) == (tree["guards"], tree["caveat"])
    assert {"step": 40, "was": {"code": 0.7, "math": 0.3}, "would": {"code": 0.5, "math": 0.5}} == {
        key: tree["updates"][1][key] for key in ("step", "was", "would")
    }
    assert 0.2 == pytest.approx(tree["updates"][1]["moved"])


@pytest.mark.parametrize("style", ["table", "markdown"])
def test_tables_hold_both_and_say_whose_losses_they_are(tmp_path: Path, style: Any) -> None:
    """Two tables with a line per update, and the caveat below."""
    text = render_policy_replay(
        replay_policy(write_run(tmp_path, OLD), "ddk", ["signal=loss_gap", "guards.cap=0.7"]), style
    )
    assert (
        "mixture weight that ddk signal=loss_gap (guards floor=0 cap=0.7 evidence=0) would have set" in text
    )
    cells = [[c for c in line.replace("|", " ").split() if c] for line in text.splitlines()]
    assert ["step", "code", "math", "moved"] in cells
    assert ["40", "0.700", "0.300"] in cells
    assert ["0", "0.300", "0.700", "0.050"] in cells
    assert CAVEAT in text and "note: an older ddkmix" in text


def run_main(*arguments: object) -> int:
    """The command's exit code."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """RUN --policy NAME key=value, in any order."""
    run = write_run(tmp_path, OLD)
    assert 0 == run_main(
        "replay", run, "--policy", "static", "weights={code: 3, math: 1}", "--format", "json"
    )
    tree = json.loads(capsys.readouterr().out)
    assert {"code": 0.75, "math": 0.25} == tree["updates"][1]["would"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "dkd"], "policy.name = 'dkd' is unknown; did you mean 'ddk'?"),
        (["--policy", "ddk", "alpha=0.5"], "policy (ddk) has no parameter 'alpha'"),
        (["--policy", "ddk", "guards.cap=0.4"], "guards.cap = 0.4 for each of 2 domains is 0.8"),
        (["--policy", "ddk", "guards.cp=0.4"], "unknown key cp in guards; did you mean 'cap'?"),
        (["--policy", "ddk", "guards"], "override 'guards' must be key=value"),
        (["--format", "yaml"], "--format yaml: must be table, json or markdown."),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """What is wrong, and exit code 2."""
    assert 2 == run_main("replay", write_run(tmp_path, OLD), *arguments)
    said = capsys.readouterr().err.strip()
    assert message in said
    assert 1 == len(said.splitlines())


def test_no_run_and_a_run_without_losses_are_one_line(tmp_path: Path) -> None:
    """As for `show`."""
    with pytest.raises(RunError, match="is not a run directory"):
        replay_policy(tmp_path, "ddk")
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"policy": {"name": "ddk"}, "trainer": {"steps": 1}})
    )
    with pytest.raises(RunError, match="has no evaluation yet"):
        replay_policy(tmp_path, "ddk")


def test_losses_without_errors_cannot_be_replayed_with_evidence(tmp_path: Path) -> None:
    """One line that names the domain and the way out."""
    single = replace(domain_losses([1.0, 2.0], domains=DOMAINS), gap_error=np.array([np.nan, 0.1]))
    run = write_run(tmp_path, [{**OLD[0], "losses": single.to_json()}])
    with pytest.raises(ConfigError, match="and code has none"):
        replay_policy(run, "ddk", ["guards.evidence=1"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"served": None}, "served"),
        ({"served": {"code": 1}}, "served lacks the domains"),
        ({"planner": {"step": 1}}, "planner has no version"),
        ({"natural": {"code": 1.0}}, "natural is not a number for each of"),
        ({"policy": {"mixture_weights": [1.0]}}, "policy.mixture_weights is not a number for each of"),
    ],
)
def test_a_damaged_record_is_one_line(tmp_path: Path, changes: Record, reason: str) -> None:
    """Whatever is missing of it."""
    with pytest.raises(RunError, match=reason) as error:
        replay_policy(write_run(tmp_path, [{**OLD[0], **changes}]), "static")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{a: [", "", "- 1", "run_dir: x", "trainer: {steps: many}", "trainer: 3"])
def test_a_damaged_config_of_a_run_is_one_line(tmp_path: Path, text: str) -> None:
    """For replay, for the table and for the page."""
    run = write_run(tmp_path, OLD)
    (run / "config.yaml").write_text(text)
    for read in (replay_policy, story_of_run, read_intervals):
        with pytest.raises(RunError, match=r"config\.yaml is damaged") as error:
            read(run)
        assert "\n" not in str(error.value)


def test_another_runs_average_can_be_replayed(tmp_path: Path) -> None:
    """`weights=average run=OTHER`, as in a config: 40 steps of 0.25 and 40 of 0.7."""
    run, other = write_run(tmp_path / "run", OLD), write_run(tmp_path / "other", OLD)
    replay = replay_policy(run, "static", ["weights=average", f"run={other}"])
    assert [0.475, 0.525] == pytest.approx(would(replay)[1])


def test_odm_counts_the_steps_of_the_run(tmp_path: Path) -> None:
    """`mixture.interval_steps` of the run, unless the policy has its own."""
    measured = {**OLD[1], "losses": domain_losses([9.0, 0.0], domains=DOMAINS).to_json()}
    run = write_run(tmp_path, [OLD[0], measured], mixture={"interval_steps": 7})
    own = would(replay_policy(run, "odm"))
    assert own == would(replay_policy(run, "odm", ["interval_steps=7"]))
    assert own != would(replay_policy(run, "odm", ["interval_steps=1000"]))


def test_what_a_run_did_not_measure_names_the_way_to_measure_it(tmp_path: Path) -> None:
    """A key of the config, for the next run."""
    losses = replace(domain_losses([1.0, 2.0], domains=DOMAINS), excess_loss=None).to_json()
    with pytest.raises(ConfigError, match=r"evaluation.measures: \[excess_loss\]"):
        replay_policy(write_run(tmp_path, [{**OLD[0], "losses": losses}]), "doremi")
