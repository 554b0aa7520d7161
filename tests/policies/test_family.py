"""What every policy promises, whatever its rule; and for each promise a policy that breaks it."""

import copy
import json
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.errors import ConfigError, NumericsError
from ddkmix.policies import POLICIES, next_state, policy_of, reweight
from tests.conftest import domain_losses
from tests.policies.family import full_losses, states, weights

SETTINGS = settings(deadline=None, derandomize=True, max_examples=8)

SPECS: dict[str, dict[str, Any]] = {name: {"name": name} for name in POLICIES} | {
    "ado of own rows": {"name": "ado", "rows": "own"},
    "chi2_dro without floors": {"name": "chi2_dro", "min_ratio": 0.0, "floor_at_least_prior": False},
    "ddk of kl": {"name": "ddk", "signal": "forward_kl"},
    "odm exp3": {"name": "odm", "form": "exp3", "reward": "excess_loss"},
    "odm smoothed mean": {"name": "odm", "form": "smoothed_mean", "reward": "student_loss"},
    "sheared of the paper": {"name": "sheared", "clip_at_zero": True, "uniform_mix": 0.0},
    "skill_it of the gap": {"name": "skill_it", "signal": "loss_gap", "step_size": 0.8},
    "softmax of the ratio": {"name": "softmax", "signal": "perplexity_ratio", "temperature": 1e-3},
    "softmax of bytes": {"name": "softmax", "signal": "bits_per_byte_gap", "uniform_mix": 0.0},
    "softmax of what is left": {"name": "softmax", "signal": "gap_left", "first_interval": "signal"},
}
EVERY = {name: policy_of(spec) for name, spec in SPECS.items()}


def histories(largest: float) -> Any:
    """Gaps of 1 to 5 domains at 1 to 7 evaluations (fits begin at the fifth), and natural weights."""
    gap = st.floats(-largest, largest)
    return st.integers(1, 5).flatmap(
        lambda count: st.tuples(
            st.lists(st.lists(gap, min_size=count, max_size=count), min_size=1, max_size=7),
            st.lists(st.floats(0.01, 1.0), min_size=count, max_size=count),
        )
    )


def shares(raw: list[float]) -> list[float]:
    """Numbers as a distribution."""
    return [x / sum(raw) for x in raw]


# --- policies that break a promise -------------------------------------------------------------------


@dataclass(frozen=True)
class Broken:
    """exp of the gap, normalised, with one thing wrong."""

    wrong: str

    def init(self, losses: Any, natural_weights: Any) -> dict[str, Any]:
        """The natural weights."""
        extra = {3: "an integer key becomes a text in JSON"} if self.wrong == "keys" else {}
        return {"mixture_weights": natural_weights.tolist(), "log": [], "extra": extra}

    def update(self, state: dict[str, Any], losses: Any) -> dict[str, Any]:
        """One of the four mistakes, or none."""
        gap = losses.loss_gap
        with np.errstate(all="ignore"):
            raw = np.exp(gap) if self.wrong == "overflow" else np.exp(gap - gap.max())
            if self.wrong == "order":
                raw[0] *= 2
            if self.wrong == "keys" and 3 not in state["extra"]:
                raw = np.ones_like(raw)
            if self.wrong == "state":
                state["log"].append(1)
            if self.wrong == "losses":
                losses.student_loss[:] = 0.0
            return {**state, "mixture_weights": (raw / raw.sum()).tolist()}


def check_simplex(policy: Any, history: list[list[float]], natural: list[float]) -> None:
    """Finite weights >= 0 that sum to 1, after every evaluation."""
    for found in weights(policy, history, natural):
        assert np.isfinite(found).all()
        assert min(found) >= 0
        assert 1.0 == pytest.approx(math.fsum(found), abs=1e-9)


def check_order(policy: Any, history: list[list[float]], natural: list[float], order: list[int]) -> None:
    """Domains in another order get the same weights in that order."""
    straight = weights(policy, history, natural)
    turned = weights(policy, [[gaps[i] for i in order] for gaps in history], [natural[i] for i in order])
    for before, after in zip(straight, turned, strict=True):
        assert [before[i] for i in order] == pytest.approx(after, rel=1e-6, abs=1e-9)


def check_json(policy: Any, history: list[list[float]], natural: list[float]) -> None:
    """From a state that went through strict JSON the next state is the same to the last bit."""
    for step, state in enumerate(states(policy, history, natural)):
        restored = json.loads(json.dumps(state, allow_nan=False))
        losses = full_losses(history[step], step=step + 1)
        assert policy.update(copy.deepcopy(state), losses) == policy.update(restored, losses)


def check_pure(policy: Any, history: list[list[float]], natural: list[float]) -> None:
    """Neither state nor losses nor natural weights are changed."""
    start = np.array(natural)
    state = policy.init(full_losses(history[0]), start)
    for step, gaps in enumerate(history, start=1):
        losses, before = full_losses(gaps, step=step), copy.deepcopy(state)
        new = policy.update(state, losses)
        assert before == state
        untouched = full_losses(gaps, step=step)
        for column in ("student_loss", "teacher_loss", "excess_loss", "forward_kl", "rows_served"):
            assert getattr(untouched, column).tolist() == getattr(losses, column).tolist()
        state = new
    assert natural == start.tolist()


# --- the promises ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_weights_are_a_distribution_for_gaps_up_to_700_nats(name: str) -> None:
    """Of either sign, from any natural weights; student and teacher may even be below 0 nats."""

    @SETTINGS
    @given(histories(700.0))
    def check(drawn: Any) -> None:
        check_simplex(EVERY[name], drawn[0], shares(drawn[1]))

    check()


@pytest.mark.parametrize("name", EVERY)
def test_the_order_of_the_domains_does_not_matter(name: str) -> None:
    """Permuting the domains permutes the weights."""

    @SETTINGS
    @given(histories(4.0), st.randoms(use_true_random=False))
    def check(drawn: Any, random: Any) -> None:
        order = random.sample(range(len(drawn[1])), len(drawn[1]))
        check_order(EVERY[name], drawn[0], shares(drawn[1]), order)

    check()


@pytest.mark.parametrize("name", EVERY)
def test_a_state_goes_through_json_without_a_trace(name: str) -> None:
    """Resuming from a checkpoint gives the very next state, also after gaps of 700 nats."""

    @SETTINGS
    @given(histories(700.0))
    def check(drawn: Any) -> None:
        check_json(EVERY[name], drawn[0], shares(drawn[1]))

    check()


@pytest.mark.parametrize("name", EVERY)
def test_nothing_that_a_policy_is_given_changes(name: str) -> None:
    """The history of states is the history of weights, so none may change afterwards."""

    @SETTINGS
    @given(histories(4.0))
    def check(drawn: Any) -> None:
        check_pure(EVERY[name], drawn[0], shares(drawn[1]))

    check()


HISTORY, NATURAL = [[1.0, 2.0, 0.5], [0.5, 1.5, 0.4], [0.4, 1.0, 0.3]], [0.5, 0.3, 0.2]


def test_each_promise_is_seen_to_be_broken() -> None:
    """Overflow, an order, a state that JSON changes, a changed state, changed losses: none passes."""
    sound, far = Broken("nothing"), [[0.0, 0.0, 0.0], [0.0, 800.0, 900.0]]
    check_simplex(sound, far, NATURAL)
    check_order(sound, HISTORY, NATURAL, [2, 0, 1])
    check_json(sound, HISTORY, NATURAL)
    check_pure(sound, HISTORY, NATURAL)
    with pytest.raises(AssertionError):
        check_simplex(Broken("overflow"), far, NATURAL)
    with pytest.raises(AssertionError):
        check_order(Broken("order"), HISTORY, NATURAL, [2, 0, 1])
    with pytest.raises(AssertionError):
        check_json(Broken("keys"), HISTORY, NATURAL)
    for wrong in ("state", "losses"):
        with pytest.raises(AssertionError):
            check_pure(Broken(wrong), HISTORY, NATURAL)


@pytest.mark.parametrize("name", EVERY)
def test_one_domain_has_everything(name: str) -> None:
    """There is nothing to choose."""
    for found in weights(EVERY[name], [[3.0], [2.0], [2.0], [1.0], [0.5], [0.4]]):
        assert [1.0] == pytest.approx(found)


@pytest.mark.parametrize("name", EVERY)
def test_domains_that_are_alike_are_sampled_alike(name: str) -> None:
    """Equal gaps from equal weights stay equal."""
    for found in weights(EVERY[name], [[gap] * 4 for gap in (4.0, 3.0, 2.5, 2.2, 2.1, 2.0)]):
        assert [0.25] * 4 == pytest.approx(found)


@pytest.mark.parametrize("name", EVERY)
def test_a_domain_that_has_no_rows_is_no_obstacle(name: str) -> None:
    """A natural weight of exactly 0 gives a finite state and a distribution."""
    check_json(EVERY[name], [[1.0, 2.0], [1.0, 2.0], [0.5, 1.0], [0.4, 0.9], [0.3, 0.8]], [1.0, 0.0])
    check_simplex(EVERY[name], [[1.0, 2.0], [1.0, 2.0], [0.5, 1.0], [0.4, 0.9], [0.3, 0.8]], [1.0, 0.0])


# --- what must be measured ---------------------------------------------------------------------------

NEEDS = {
    "ddk": set(),
    "ddk of kl": {"forward_kl"},
    "doremi": {"excess_loss"},
    "odm": set(),
    "odm exp3": {"excess_loss"},
    "softmax": set(),
    "sheared": set(),
    "ado": set(),
}


@pytest.mark.parametrize("name", NEEDS)
def test_a_policy_says_what_it_needs_to_have_measured(name: str) -> None:
    """`needs` of the policy, which an evaluator reads; what every Reweighter counts is not in it."""
    assert NEEDS[name] == set(getattr(EVERY[name], "needs", frozenset()))


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("doremi", "excess_loss"),
        ("ddk of kl", "forward_kl"),
        ("odm exp3", "excess_loss"),
        ("ado", "rows_served"),
    ],
)
def test_what_nobody_measured_is_one_line_before_the_first_step(name: str, column: str) -> None:
    """Not after the first interval: `init` asks already."""
    natural = np.array([0.5, 0.5])
    with pytest.raises(ConfigError, match=f"looks at {column}, and these losses have none") as error:
        next_state(EVERY[name], None, domain_losses([1.0, 2.0]), natural)
    assert "\n" not in str(error.value)
    state = EVERY[name].init(full_losses([1.0, 2.0]), natural)
    with pytest.raises(ConfigError, match=column):
        EVERY[name].update(state, domain_losses([1.0, 2.0]))


def test_what_is_needed_must_be_finite() -> None:
    """A nan in a column that the policy looks at names column and domain; in another it is none of its."""
    broken = replace(full_losses([1.0, 2.0]), excess_loss=np.array([0.5, np.nan]))
    with pytest.raises(NumericsError, match=r"held-out excess_loss is not finite: \{'b': nan\}"):
        reweight("doremi", broken)
    assert {"a": 0.5, "b": 0.5} == reweight("sheared", broken)[0]


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "doremi", "step_size": 0},
        {"name": "doremi", "uniform_mix": 1.5},
        {"name": "sheared", "start": "random"},
        {"name": "chi2_dro", "radius": 0},
        {"name": "chi2_dro", "min_ratio": 1},
        {"name": "marginal_gain", "lookahead": math.inf},
        {"name": "ddk", "signal_cap": math.inf},
        {"name": "skill_it", "step_size": 1e308},
        {"name": "doremi", "step_size": 1e308},
        {"name": "odm", "form": "ucb"},
        {"name": "odm", "interval_steps": 0},
        {"name": "ado", "most_points": 2},
        {"name": "skill_it", "window": 0},
        {"name": "softmax", "temperature": 0},
        {"name": "softmax", "signal": "gap"},
        {"name": "ddk", "signal": "gap_left"},
    ],
    ids=str,
)
def test_a_parameter_out_of_its_range_is_one_line(spec: dict[str, Any]) -> None:
    """It names the parameter and the value."""
    parameter = next(key for key in spec if key != "name")
    with pytest.raises(ConfigError, match=rf"^policy\.{parameter} = ") as error:
        policy_of(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["sheared", "chi2_dro"])
def test_a_rule_on_the_gap_can_look_at_another_signal(name: str) -> None:
    """The same rule on the excess where it equals the gap, and another mixture where it does not."""
    history = [[1.0, 2.0, 0.5], [0.5, 1.5, 0.4]]
    excess = policy_of({"name": name, "signal": "excess_loss"})
    assert {"excess_loss"} == set(getattr(excess, "needs", ()))
    assert weights(EVERY[name], history) == weights(excess, history)
    other = weights(policy_of({"name": name, "signal": "perplexity_ratio"}), history)
    assert other[1] != pytest.approx(weights(EVERY[name], history)[1], rel=1e-5)
    with pytest.raises(ConfigError, match="looks at excess_loss"):
        excess.init(domain_losses([1.0, 2.0]), np.array([0.5, 0.5]))


def test_huge_weights_are_normalised() -> None:
    """Their sum is inf in float64."""
    static = {"name": "static", "weights": {"a": 1e308, "b": 1e308, "c": 0.0}}
    assert {"a": 0.5, "b": 0.5, "c": 0.0} == reweight(static, domain_losses([1.0, 2.0, 3.0]))[0]
