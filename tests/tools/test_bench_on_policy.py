"""The on-policy race without its timing: what is asked of whom, the order of prompts, tables from numbers."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import bench_on_policy  # noqa: E402
from on_policy_bench import environment, job, material, ours, peers, race, report  # noqa: E402

from ddkmix.config import RunConfig  # noqa: E402
from ddkmix.generation.decode import Decoder  # noqa: E402
from tests.generation.models import decoder_of, prompts_of, small_model  # noqa: E402

TEACHER = TOOLS.parent / "models" / "smollm2-135m-instruct"


def make_job(folder: Path, **changes: Any) -> job.Job:
    """Two steps of four prompts."""
    settings: dict[str, Any] = {
        "objective": "gkd",
        "teacher": str(TEACHER),
        "student": str(TEACHER),
        "teacher_dtype": "bfloat16",
        "prompts": str(folder / "prompts.json"),
        "steps": 2,
        "warmup_steps": 1,
        "batch_rows": 4,
        "max_new_tokens": 6,
        "teacher_share": 0.0,
        "lr": 1e-5,
        "folder": str(folder / "runs"),
        "card_folder": str(folder / "cards"),
        "cache": str(folder / "cache"),
        "seq_len": 128,
    }
    return job.Job(**{**settings, **changes})


def run_of(seconds: float, peak: float, **changes: Any) -> dict[str, Any]:
    """What a process answered: 512 tokens in so many seconds."""
    versions = {"trl": "9.9", "torch": "2.13.0"}
    return {
        "step_s": [9.0, seconds],
        "median_step_s": seconds,
        "tokens_per_step": 512.0,
        "tokens_per_s": 512 / seconds,
        "peak_mb": peak,
        "versions": versions,
        **changes,
    }


def results_of(runs: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A file of results around some runs."""
    settings = make_job(Path("x"), batch_rows=8, max_new_tokens=64, steps=8, warmup_steps=2)
    return {
        "command": "python x",
        "machine": "two cores",
        "date": "2026-01-01",
        "threads": 2,
        "rounds": 2,
        "job": dataclasses.asdict(settings),
        "runs": runs,
        "errors": {},
        **changes,
    }


@pytest.fixture
def counted() -> Iterator[list[int]]:
    """The counter of ddkmix's process; the decoder is itself again afterwards."""
    before = Decoder.responses
    yield ours.count_generated()
    Decoder.responses = before  # type: ignore[method-assign]


def test_a_job_survives_the_command_line(tmp_path: Path) -> None:
    """Written and read, it is the same."""
    mine = make_job(tmp_path)
    assert mine == job.read_job(mine.to_json())


def test_a_result_leaves_the_warm_up_out(tmp_path: Path) -> None:
    """Median of the steps behind it; tokens are those of a step on average, the warm-up's included."""
    mine = make_job(tmp_path, steps=5, warmup_steps=2)
    found = job.result(mine, [50.0, 40.0, 2.0, 4.0, 3.0], 5 * 24, {"torch": "1"})
    assert (3.0, 24.0, 8.0) == (found["median_step_s"], found["tokens_per_step"], found["tokens_per_s"])
    assert 10 < found["peak_mb"] < 100_000


def test_a_result_with_steps_missing_is_refused(tmp_path: Path) -> None:
    """A run that stopped early would look fast."""
    with pytest.raises(AssertionError, match="1 steps were timed, 2 were to be"):
        job.result(make_job(tmp_path), [1.0], 24, {})


def test_peak_memory_sees_what_was_given_back() -> None:
    """80 MB that are gone again still count."""
    before = job.peak_mb()
    held = np.ones(int(before * 1e6 / 8) + 10_000_000)
    del held
    assert job.peak_mb() > before + 50


def test_every_peer_is_pinned_and_has_a_program() -> None:
    """TRL's MiniLLM is of the last version that has one."""
    names = {name for group in race.PEERS.values() for name in group}
    assert names == set(environment.VERSION) == set(peers.TRAINERS)
    assert "1.14.2" == environment.VERSION["trl-minillm"]


def test_an_installed_version_is_not_installed_again(tmp_path: Path) -> None:
    """The folder that is there is taken, and nothing is said."""
    (tmp_path / "trl-1.16.0").mkdir()
    (tmp_path / "trl-1.16.0" / "installed").write_text("1.16.0\n")
    said: list[str] = []
    assert tmp_path / "trl-1.16.0" == environment.make(tmp_path, "1.16.0", said.append)
    assert [] == said


def test_both_systems_are_asked_for_the_same_step(tmp_path: Path) -> None:
    """Rows, rate, decays, clipping and precision of TRL's arguments are those of ddkmix's config."""
    mine = make_job(tmp_path)
    theirs, own = peers._common(mine), ours.training_tree(mine)
    assert own["trainer"]["batch_rows"] == theirs["per_device_train_batch_size"]
    assert own["trainer"]["steps"] == theirs["max_steps"]
    assert ("bf16", True) == (own["trainer"]["mixed_precision"], theirs["bf16"])
    optimizer = own["optimizer"]
    assert optimizer["lr"] == theirs["learning_rate"]
    assert optimizer["beta2"] == theirs["adam_beta2"]
    assert optimizer["weight_decay"] == theirs["weight_decay"]
    assert optimizer["max_grad_norm"] == theirs["max_grad_norm"]
    assert ("constant", "constant") == (own["schedule"]["name"], theirs["lr_scheduler_type"])


def test_the_objectives_of_ddkmix(tmp_path: Path) -> None:
    """JSD(0.5) on student samples alone; MiniLLM with the share that was asked for."""
    gkd = ours.training_tree(make_job(tmp_path))
    assert ({"name": "gkd", "share": 1.0}) == gkd["objective"]
    assert [{"name": "jsd", "weight": 1.0, "beta": 0.5}] == gkd["loss"]
    minillm = ours.training_tree(make_job(tmp_path, objective="minillm", teacher_share=0.2))
    assert {"name": "minillm", "teacher_share": 0.2} == minillm["objective"]
    assert [] == minillm["loss"], "nothing beside the responses"


def test_the_order_of_rows_comes_from_a_valid_config(tmp_path: Path) -> None:
    """And its mixture never moves."""
    config = RunConfig.model_validate(ours.data_tree(make_job(tmp_path)))
    assert ("static", 2, 4) == (config.policy.name, config.trainer.steps, config.trainer.batch_rows)
    assert config.trainer.log_steps == 1


def test_responses_are_counted(counted: list[int]) -> None:
    """Every token that a decoder makes."""
    found = decoder_of(small_model()).responses(prompts_of(3))
    assert [len(response) for response in found] == counted


def write_card(folder: Path, count: int) -> None:
    """A domain of `count` questions of different length."""
    (folder / "talk").mkdir(parents=True)
    for split, first, number in (("train", 0, count), ("held_out", 100, 2)):
        lines = [
            {
                "messages": [
                    {"role": "user", "content": "again " * (i % 7) + f"What is {i}?"},
                    {"role": "assistant", "content": f"The number {i}."},
                ]
            }
            for i in range(first, first + number)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "talk" / f"{split}-000000.jsonl").write_text(text)
    (folder / "talk.yaml").write_text(
        "name: talk\nprompt_response: {messages: messages}\nlicense: CC0-1.0\n"
        "train: talk/train-000000.jsonl\nheld_out: talk/held_out-000000.jsonl\n"
    )


def test_prompts_are_those_that_ddkmix_serves(tmp_path: Path) -> None:
    """In its order, each as the conversation that has these tokens, without an answer."""
    write_card(tmp_path / "cards", 12)
    mine = make_job(tmp_path)
    material.write_prompts(mine, tmp_path / "prompts.json")
    found = json.loads((tmp_path / "prompts.json").read_text())
    assert 8 == len(found)
    assert all(["user"] == [message["role"] for message in messages] for messages in found)
    assert 8 == len({messages[0]["content"] for messages in found})
    served, known = material.served_prompts(mine), material.known_prompts(mine)
    assert found == [known[prompt] for prompt in served]
    assert found != sorted(found, key=lambda messages: messages[0]["content"]), (
        "the planner's order, not the file's"
    )


def test_a_system_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    """Its last line stands in the results, and it is not asked again."""
    said: list[str] = []
    broken = make_job(tmp_path, teacher=str(tmp_path / "nowhere"))
    found = race.run(broken, ["trl-gkd"], 2, threads=1, folders={}, timeout_s=120, say=said.append)
    assert {} == found["runs"]
    assert ["trl-gkd"] == list(found["errors"])
    assert 1 == len(said)


def test_a_system_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    """The limit stands in the results."""
    found = race.run(
        make_job(tmp_path), ["trl-gkd"], 1, threads=1, folders={}, timeout_s=0.01, say=lambda line: None
    )
    assert "no result after 0 s" == found["errors"]["trl-gkd"]


def test_systems_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, theirs, ours, theirs; each with its objective, its own folder and its own TRL."""
    asked: list[tuple[str, str, str, Path | None]] = []

    def answer(
        name: str, own: job.Job, threads: int, folder: Path | None, timeout_s: float
    ) -> dict[str, Any]:
        asked.append((name, own.objective, Path(own.folder).name, folder))
        return run_of(2.0, 1000.0)

    monkeypatch.setattr(race, "_child", answer)
    names, folders = ["ddkmix-minillm", "trl-minillm"], {"trl-minillm": Path("trl")}
    found = race.run(
        make_job(tmp_path), names, 2, threads=1, folders=folders, timeout_s=1, say=lambda line: None
    )
    assert [
        ("ddkmix-minillm", "minillm", "ddkmix-minillm-0", None),
        ("trl-minillm", "minillm", "trl-minillm-0", Path("trl")),
        ("ddkmix-minillm", "minillm", "ddkmix-minillm-1", None),
        ("trl-minillm", "minillm", "trl-minillm-1", Path("trl")),
    ] == asked
    assert {"ddkmix-minillm": 2, "trl-minillm": 2} == {name: len(own) for name, own in found["runs"].items()}


def test_ratios_are_medians_over_pairs() -> None:
    """A slow minute hits both of a pair: 2.0, 1.5 and 1.0 times as fast."""
    mine = [run_of(1.0, 800), run_of(2.0, 1000), run_of(4.0, 900)]
    theirs = [run_of(2.0, 1600), run_of(3.0, 1250), run_of(4.0, 1000)]
    assert (1.5, 0.8) == pytest.approx(report.ratios(mine, theirs))
    assert (1.75, 0.65) == pytest.approx(report.ratios(mine, theirs[:2]))


def test_the_tables_by_hand() -> None:
    """Medians and ranges, ratios, versions, what differs and what failed."""
    runs = {
        "ddkmix-gkd": [run_of(2.0, 2000.0, versions={"torch": "2.13.0"}), run_of(4.0, 2100.0)],
        "trl-gkd": [run_of(4.0, 4000.0), run_of(8.0, 4200.0)],
    }
    text = report.markdown(results_of(runs, errors={"trl-minillm": "it broke"}))
    assert "8 prompts a step, responses of 64 tokens, 2 threads, 2 turns of 6 steps after 2;" in text
    assert "| ddkmix-gkd | 3.00 (2.00-4.00) | 192.0 (128.0-256.0) | 512 | 2050 (2000-2100) |" in text
    assert "Ratio of ddkmix-gkd to trl-gkd: tokens per second 2.00x, peak memory 0.50x." in text
    assert "TRL 9.9 (trl-gkd)" in text
    assert "- trl-minillm: it broke" in text
    assert "teacher-mixed" not in text
    assert "full length" not in text


def test_the_report_says_what_is_not_equal() -> None:
    """Responses that ended early, and that TRL has no teacher-mixed sampling."""
    runs = {"ddkmix-minillm": [run_of(2.0, 2000.0, tokens_per_step=500.0)]}
    text = report.markdown(results_of(runs))
    assert "TRL's has no teacher-mixed sampling" in text
    assert "Not all responses had their full length: ddkmix-minillm." in text


def test_a_whole_benchmark_from_recorded_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Arguments reach the processes; tables and JSON come out, without a path of this machine."""
    write_card(tmp_path / "cards", 12)
    asked: list[job.Job] = []

    def answer(name: str, own: job.Job, *rest: Any) -> dict[str, Any]:
        asked.append(own)
        return run_of(2.0 if name in race.OURS.values() else 3.0, 1000.0)

    monkeypatch.setattr(race, "_child", answer)
    monkeypatch.setattr(environment, "make", lambda cache, version, say: cache / version)
    where = [
        "--cache",
        str(tmp_path / "cache"),
        "--domains",
        str(tmp_path / "cards"),
        "--student",
        str(TEACHER),
    ]
    size = ["--steps", "1", "--warmup-steps", "1", "--rounds", "2", "--batch-rows", "4", "--seq-len", "128"]
    bench_on_policy.main(
        [*where, *size, "--systems", "ddkmix-gkd,trl-gkd", "--json", str(tmp_path / "out.json")]
    )
    assert 4 == len(asked)
    assert {(2, 4, 64)} == {(own.steps, own.batch_rows, own.max_new_tokens) for own in asked}
    assert 8 == len(json.loads(Path(asked[0].prompts).read_text()))
    assert "Ratio of ddkmix-gkd to trl-gkd: tokens per second 1.50x" in capsys.readouterr().out
    results = json.loads((tmp_path / "out.json").read_text())
    assert [2, 2] == [len(own) for own in results["runs"].values()]
    assert str(tmp_path) not in json.dumps(results["job"])


def test_wrong_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A system that does not exist is named with those that do."""
    with pytest.raises(SystemExit):
        bench_on_policy.main(["--systems", "ddkmix-gkd,verl"])
    assert "verl: choose from ddkmix-gkd, trl-gkd" in capsys.readouterr().err
