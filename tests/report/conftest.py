"""A tiny run, recorded once, and the same with other names and more domains: the format is the trainer's."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import reset_accelerate

HOSTILE = (
    "<script>alert(1)</script>&\"'",
    "\"><img src=x onerror=alert(2)><b a='",
    "</title></style></pre><svg onload=alert(3)>$\\frac{\u202e",
)
"""What no card may be called, in case something else may."""
STEPS = 12


@pytest.fixture(scope="session")
def recorded_run(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_domains: Path) -> Path:
    """A finished run of 12 steps over three domains: measured at 0, 4, 8 and 12."""
    from ddkmix.config import parse_config
    from ddkmix.setup import train

    folder = tmp_path_factory.mktemp("recorded") / "tiny-run"
    tree = {
        "run_dir": str(folder),
        "cache_dir": str(tiny_domains / "cache"),
        "domains": [str(tiny_domains)],
        "teacher": {"model": str(tiny_teacher), "dtype": "float32"},
        "student": {"init": "prune", "layers": [0]},
        "pack": {"seq_len": 32, "processes": 1},
        "mixture": {"interval_steps": 4, "max_epochs": 5},
        "trainer": {"steps": STEPS, "batch_rows": 6, "checkpoint_steps": 12, "log_steps": 1},
        "optimizer": {"lr": 1e-3},
        "evaluation": {"rows": 8},
    }
    train(parse_config(tree, where="the recorded run"))
    reset_accelerate()
    return folder


def many(count: int) -> list[str]:
    """Names as cards allow them, some of them long."""
    return [f"domain-{i:02d}{'-with-a-rather-long-name' * (i % 7 == 3)}" for i in range(count)]


def _spread(tree: Any, old: Sequence[str], new: Sequence[str], key: str = "") -> Any:
    """A JSON tree with domain i of `new` in the place of domain i mod 3 of `old`, shares shared out."""
    if isinstance(tree, dict):
        if tree and set(tree) <= set(old):
            return {name: _bent(tree.get(old[i % len(old)]), i, key) for i, name in enumerate(new)}
        return {name: _spread(value, old, new, name) for name, value in tree.items()}
    if isinstance(tree, list) and len(tree) == len(old):
        return list(new) if tree == list(old) else [tree[i % len(old)] for i in range(len(new))]
    return [_spread(item, old, new, key) for item in tree] if isinstance(tree, list) else tree


def _bent(value: Any, i: int, key: str) -> Any:
    """Domains that are not all alike: every later copy is a little further behind its teacher."""
    if key == "losses" and isinstance(value, dict):
        gap = value["loss_gap"] * (1 + i // 3 / 10)
        return {**value, "loss_gap": gap, "student_loss": value["teacher_loss"] + gap}
    return value


@pytest.fixture
def retold(recorded_run: Path, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A function that copies the recorded run with other domain names, finished or broken off at step 10."""

    def make(names: Sequence[str], *, finished: bool = True) -> Path:
        folder = tmp_path / f"retold-{len(names)}-{finished}"
        folder.mkdir()
        old = ["code", "math", "prose"]
        for file in ("intervals.jsonl", "metrics.jsonl"):
            lines = (recorded_run / file).read_text().splitlines()
            if not finished:
                lines = [line for line in lines if json.loads(line)["step"] <= 10]
            records = [_spread(json.loads(line), old, names) for line in lines]
            for record in records:
                for weights in filter(None, [record.get("weights")]):
                    total = sum(weights.values())
                    record["weights"] = {name: weight / total for name, weight in weights.items()}
            torn = "" if finished else lines[-1][: len(lines[-1]) // 2]
            (folder / file).write_text("".join(json.dumps(r) + "\n" for r in records) + torn)
        blocks = _spread(json.loads((recorded_run / "data.json").read_text()), old, names)
        (folder / "data.json").write_text(json.dumps(blocks))
        shutil.copy(recorded_run / "config.yaml", folder)
        return folder

    yield make


@pytest.fixture
def recorded_copy(recorded_run: Path, tmp_path: Path) -> Path:
    """The logs and the config of the recorded run, to be changed."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for name in ("intervals.jsonl", "metrics.jsonl", "data.json", "config.yaml"):
        shutil.copy(recorded_run / name, folder)
    return folder
