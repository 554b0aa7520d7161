"""DPKD's reward hacking in runs of the trainer: seen by a metric, stopped by language modelling."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddkmix.config import RunConfig
from ddkmix.setup import train
from tests.conftest import reset_accelerate

STEPS = 40
NLL = [{"name": "cross_entropy"}]

History = list[dict[str, float]]


@pytest.fixture
def run(make_run: Callable[..., RunConfig]) -> Callable[..., tuple[Path, History]]:
    """A function that trains and gives the student's folder and the metrics of every ten steps."""

    def of(name: str, lr: float, **sections: Any) -> tuple[Path, History]:
        config = make_run(
            name,
            optimizer={"lr": lr, "weight_decay": 0.0},
            schedule={"name": "constant"},
            mixture={"interval_steps": STEPS},
            rollouts={"buffer_rows": 8},
            trainer={"steps": STEPS, "batch_rows": 8, "checkpoint_steps": STEPS, "log_steps": 10},
            **sections,
        )
        train(config)
        reset_accelerate()
        lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
        return config.run_dir / "student", [json.loads(line) for line in lines]

    return of


def test_the_anchor_stops_reward_hacking(run: Callable[..., tuple[Path, History]]) -> None:
    """A student that has learnt to speak like the data is taught by DPKD to prefer a teacher that speaks
    otherwise. Without a term in `loss` its own responses fall below -10 nats per token and go on falling,
    while loss and margin look their best; cross-entropy on the data with lambda 1 holds them above -2.
    `pairs/rejected_log_prob` tells the two apart."""
    student, _ = run("first", 1e-2, loss=NLL)
    sections: dict[str, Any] = {
        # the responses of its first step are looked at again and again, as those of an epoch are
        "objective": {"name": "dpkd", "beta": 0.1, "fresh": 0.01},
        "student": {"init": "load", "model": str(student), "overrides": {}},
    }
    _, alone = run("alone", 3e-3, loss=[], **sections)
    _, anchored = run("anchored", 3e-3, loss=NLL, **sections)
    assert alone[-1]["pairs/dpkd"] < anchored[-1]["pairs/dpkd"]
    assert alone[-1]["pairs/reward_margin"] > anchored[-1]["pairs/reward_margin"]
    falling = [record["pairs/rejected_log_prob"] for record in alone]
    assert falling[-1] < -10
    assert falling[-1] < falling[-2] - 1
    assert falling == sorted(falling, reverse=True)
    assert min(record["pairs/rejected_log_prob"] for record in anchored) > -2
