"""What a user may write against the public names, checked by mypy --strict (`make check`), never run.

`assert_type` fails when a type changes; an ignored error that is no longer one fails too.
"""

from pathlib import Path
from typing import Any, assert_type

import numpy as np

import ddkmix
from ddkmix import DdkmixError, DomainLosses, DomainMixture, RunConfig, load_config, measure_gaps, train
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


def loop() -> None:
    """The mixture in a loop."""
    mixture = DomainMixture.from_cards("domains", tokenizer="models/teacher", seq_len=128, batch_rows=4)
    assert_type(mixture, DomainMixture)
    mixture.set_weights({**mixture.weights, "code": 1.0})
    assert_type(mixture.state.step, int)
    state = mixture.state_dict()
    assert_type(state, dict[str, Any])
    assert_type(mixture.load_state_dict(state), list[str])
    mixture.set_weights("code")  # type: ignore[arg-type]


typo = ddkmix.trian  # type: ignore[attr-defined]
