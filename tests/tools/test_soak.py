"""The soak test, short, and that its oracle notices what it is there to notice."""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import soak as tool  # noqa: E402
import soak_growth  # noqa: E402

Batches = list[dict[str, np.ndarray]]


def test_a_short_soak_finds_nothing(tmp_path: Path) -> None:
    """A few hundred steps with changes of weights, ranks and states keep every promise."""
    violations, report = tool.soak(tmp_path, 200, seed=0, with_workers=0)
    assert [] == violations
    assert 200 == report["steps"]
    assert report["largest deviation, rows"] <= report["bound H_N, rows"]
    assert {"weight changes", "resumed"} <= set(report["events"])


def test_killed_workers_lose_nothing(tmp_path: Path) -> None:
    """Reader processes are killed; the stream goes on where it was."""
    violations, report = tool.soak(tmp_path, 60, seed=5, with_workers=1, kills=0.1)
    assert [] == violations
    assert report["events"]["workers killed"] >= 1
    assert any(event.startswith("worker deaths reported") for event in report["events"])


def lose_a_row(batches: Batches) -> Batches:
    """The last row of rank 0 is another one of the batch: one row is lost, one comes twice."""
    for name in ("input_ids", "labels", "domain_ids"):
        batches[0][name][-1] = batches[0][name][0]
    return batches


def shorten(batches: Batches) -> Batches:
    """Rank 0 receives a row less."""
    return [{name: array[:-1] for name, array in batches[0].items()}, *batches[1:]]


def mislabel(batches: Batches) -> Batches:
    """A row is said to be of another domain."""
    batches[0]["domain_ids"][0] = (batches[0]["domain_ids"][0] + 1) % len(tool.SIZES)
    return batches


def change_a_token(batches: Batches) -> Batches:
    """One token is not what the file holds."""
    batches[0]["input_ids"][0, 5] ^= 1
    batches[0]["labels"][0, 5] ^= 1
    return batches


def mask_a_label(batches: Batches) -> Batches:
    """A label is missing though no row has padding."""
    batches[0]["labels"][0, 5] = -100
    return batches


@pytest.mark.parametrize("spoil", [lose_a_row, shorten, mislabel, change_a_token, mask_a_label])
def test_the_oracle_notices_a_spoiled_batch(spoil: Callable[[Batches], Batches], tmp_path: Path) -> None:
    """Whatever is wrong with one batch of many is named with its step."""

    def at_step_20(step: int, batches: Batches) -> Batches:
        return spoil(copy.deepcopy(batches)) if step == 20 else batches

    violations, report = tool.soak(tmp_path, 40, seed=1, with_workers=0, spoil=at_step_20)
    assert 1 == len(violations)
    assert violations[0].startswith("step 20: ")
    assert 20 == report["steps"]


def test_the_oracle_notices_a_step_that_came_twice(tmp_path: Path) -> None:
    """Rows of the step before are a repetition."""
    kept: list[Batches] = []

    def repeat(step: int, batches: Batches) -> Batches:
        kept.append(copy.deepcopy(batches))
        return kept[9] if step == 10 and len(kept[9]) == len(batches) else batches

    violations, _ = tool.soak(tmp_path, 40, seed=2, with_workers=0, spoil=repeat)
    assert 1 == len(violations)
    assert "arrived" in violations[0]


def oracle_of(folder: Path) -> Any:
    """An oracle over small domains that nobody serves yet."""
    rows = tool.write_rows(folder, 0)
    return tool.Oracle(rows, seed=0, batch_rows=tool.BATCH_ROWS, block_rows=64)


def serve(oracle: Any, counts: dict[str, int]) -> None:
    """One honest step with so many rows of each domain."""
    pairs = [
        (i, oracle._row(name, oracle.served[name] + k))
        for i, name in enumerate(oracle.domains)
        for k in range(counts.get(name, 0))
    ]
    tokens = np.array([row for _, row in pairs], dtype=np.int64)
    batch = {"input_ids": tokens, "labels": tokens, "domain_ids": np.array([i for i, _ in pairs])}
    after = {name: oracle.served[name] + counts.get(name, 0) for name in oracle.domains}
    oracle.check([batch], [{"step": oracle.step + 1, "served": list(after.values())}])


def test_the_oracle_notices_a_wrong_mixture(tmp_path: Path) -> None:
    """Twelve rows of one domain when another has all the weight are more than H_5 off."""
    oracle = oracle_of(tmp_path)
    oracle.set_weights({name: float(name == "long") for name in oracle.domains})
    serve(oracle, {"long": 12})
    with pytest.raises(tool.Violation, match="off its share"):
        serve(oracle, {"middle": 12})


def test_the_oracle_notices_ranks_that_disagree(tmp_path: Path) -> None:
    """Every rank must say the same step and the same rows served."""
    oracle = oracle_of(tmp_path)
    oracle.step, state = 3, {"step": 3, "served": list(oracle.served.values())}
    oracle._check_states([state, dict(state)])
    with pytest.raises(tool.Violation, match="rank 1 has another state"):
        oracle._check_states([state, {**state, "step": 4}])
    with pytest.raises(tool.Violation, match="says step 2"):
        oracle._check_states([{**state, "step": 2}])


@pytest.mark.parametrize(
    ("expected", "memory", "files"), [(0, 10**6, 4), (1, 10**8, 4), (1, 10**6, 40), (2, 10**8, 40)]
)
def test_growth_after_the_warm_up_is_a_violation(expected: int, memory: int, files: int) -> None:
    """Memory and descriptors may grow a little, and at first."""
    samples = [(0, 0, 0)] + [(s, 10**9, 50) for s in range(250, 700, 50)]
    samples += [(s, 10**9 + memory, 50 + files) for s in range(700, 1000, 50)]
    assert expected == len(soak_growth.violations(samples, 1000))


def test_the_command_reports_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A JSON report and 0; or the violations and 1."""
    assert 0 == tool.main(["--steps", "30", "--with-workers", "0"])
    assert 30 == json.loads(capsys.readouterr().out)["steps"]
    monkeypatch.setattr(soak_growth, "violations", lambda samples, steps: ["memory grew"])
    assert 1 == tool.main(["--steps", "30", "--with-workers", "0"])
    assert "VIOLATION memory grew\n" == capsys.readouterr().err
