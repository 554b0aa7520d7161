"""What a user may write against the public names, checked by mypy --strict (`make check`), never run.

`assert_type` fails when a type changes; an ignored error that is no longer one fails too.
"""

from pathlib import Path
from typing import Any, assert_type

import numpy as np
from torch import nn

import ddkmix
from ddkmix import (
    DdkmixError,
    DomainLosses,
    DomainMixture,
    GapEvaluator,
    MixtureBatchSampler,
    Reweighter,
    RunConfig,
    StepLoader,
    domain_indices,
    load_config,
    measure_gaps,
    reweight,
    train,
)
from ddkmix.errors import ConfigError
from ddkmix.losses import CrossEntropy, ForwardKL, TokenLoss
from ddkmix.policies import Ddk, PolicyState, Static, WeightPolicy


class Mine:
    """A policy of the user's own."""

    def init(self, losses: DomainLosses, natural_weights: "np.ndarray[Any, Any]") -> PolicyState:
        """Natural."""
        return {"mixture_weights": natural_weights.tolist()}

    def update(self, state: PolicyState, losses: DomainLosses) -> PolicyState:
        """The same."""
        return state


policies: list[WeightPolicy] = [Ddk(signal="loss_gap"), Static(weights={"code": 1.0}), Mine()]
losses: list[TokenLoss] = [CrossEntropy(), ForwardKL(temperature=2.0)]
Ddk(signal="gap")  # type: ignore[arg-type]


def program(path: Path) -> DomainLosses:
    """A run."""
    try:
        config = load_config(path, ["trainer.steps=20"])
    except ConfigError as error:
        assert_type(error, ConfigError)
        raise DdkmixError(str(error)) from None
    assert_type(config, RunConfig)
    assert_type(config.trainer.steps, int)
    assert_type(config.mixture.max_epochs, float | None)
    gaps, policy = measure_gaps(config)
    assert_type(policy, WeightPolicy)
    assert_type(gaps.to_json(), dict[str, dict[str, float | None]])
    return train(config, resume=True, on_losses=report)


def report(step: int, losses: DomainLosses, weights: dict[str, float]) -> None:
    """Called at every evaluation."""


def loop(model: nn.Module, mine: list[dict[str, Any]]) -> None:
    """The mixture in a loop of the user's own."""
    mixture = DomainMixture.from_cards(
        "domains", tokenizer="models/teacher", seq_len=128, batch_rows=4, num_workers=2
    )
    assert_type(mixture, DomainMixture)
    DomainMixture.from_datasets({"mine": mine}, batch_rows=4, on_cap="never")  # type: ignore[arg-type]
    mixture.set_weights({**mixture.weights, "code": 1.0})
    mixture.set_weights("code")  # type: ignore[arg-type]
    evaluator = GapEvaluator({"mine": mine}, reference={"mine": 1.9})
    reweighter = Reweighter(mixture, evaluator, {"name": "ddk", "signal": "loss_gap"}, interval_steps=100)
    loader = mixture.loader(steps=100, microbatches=2)
    assert_type(loader, StepLoader)
    for _ in loader:
        assert_type(mixture.state.step, int)
        assert_type(reweighter.step(model, mixture.state.step), DomainLosses | None)
    state = reweighter.state_dict()
    assert_type(state, dict[str, Any])
    assert_type(reweighter.load_state_dict(state), list[str])
    assert_type(reweighter.metrics(), dict[str, float])


def sampler() -> None:
    """The mixture beside a DataLoader of the user's own, and a policy as a plain function."""
    batches = MixtureBatchSampler({"code": range(6), "math": range(6, 9)}, batch_rows=4)
    assert_type(next(iter(batches)), list[int])
    MixtureBatchSampler(domain_indices(["code", "math"]), batch_rows=2)
    weights, memory = reweight("ddk", DomainLosses.from_means({"code": 3.0}))
    assert_type(weights, dict[str, float])
    assert_type(memory, PolicyState)


typo = ddkmix.trian  # type: ignore[attr-defined]
