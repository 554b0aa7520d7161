"""The table of policies, and the checks that stand around every one of them."""

import math
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest

from ddkmix.config import Named
from ddkmix.errors import ConfigError, NumericsError
from ddkmix.policies import POLICIES, build_policy, next_state, policy_of, reweight, weights_of
from ddkmix.policies.ddk import Ddk
from ddkmix.policies.static import Static
from tests.conftest import domain_losses
from tests.policies.family import full_losses

UNIFORM = np.array([0.5, 0.5])


@dataclass(frozen=True, kw_only=True)
class Proportional:
    """A policy from outside the package: in proportion to a power of the gap."""

    power: float = 1.0

    def init(self, losses: Any, natural_weights: Any) -> dict[str, Any]:
        """The same as an update."""
        return self.update({}, losses)

    def update(self, state: dict[str, Any], losses: Any) -> dict[str, Any]:
        """gap^power, normalised."""
        raw = losses.loss_gap**self.power
        return {"mixture_weights": (raw / raw.sum()).tolist()}


@dataclass(frozen=True, kw_only=True)
class Says:
    """A policy that answers whatever it is told to."""

    answer: tuple[float, ...]

    def init(self, losses: Any, natural_weights: Any) -> dict[str, Any]:
        """The answer."""
        return {"mixture_weights": list(self.answer)}

    def update(self, state: dict[str, Any], losses: Any) -> dict[str, Any]:
        """The answer and where it came from."""
        return {"mixture_weights": list(self.answer), "before": state}


def test_the_table_names_every_policy():
    """A policy of the package is one line of a literal dict, in order."""
    names = "ado chi2_dro ddk doremi marginal_gain odm sheared skill_it softmax static velocitune"
    assert names.split() == list(POLICIES)
    assert (Ddk, Static) == (POLICIES["ddk"], POLICIES["static"])


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_a_frozen_dataclass_with_defaults(name):
    """A name alone builds a policy, which nothing can change afterwards."""
    policy = build_policy(Named(name=name))
    assert type(policy) is POLICIES[name]
    assert is_dataclass(policy)
    with pytest.raises(AttributeError):
        setattr(policy, fields(policy)[0].name, None)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_gives_a_distribution_over_one_domain_and_over_twenty(name):
    """The checks around a policy pass from the first state on, for few domains and for many."""
    for count in (1, 2, 20):
        policy, state = build_policy(Named(name=name)), None
        for seed in range(3):
            gaps = np.random.default_rng(seed).uniform(-1, 12, count).tolist()
            losses = full_losses(gaps, step=seed)
            state = next_state(policy, state, losses, np.full(count, 1 / count))
            assert count == len(state["mixture_weights"])


def test_parameters_reach_the_policy():
    """What the config says beside the name are the fields of the dataclass."""
    spec = Named.model_validate({"name": "ddk", "uniform_mix": 0.25, "signal": "loss_gap"})
    assert Ddk(uniform_mix=0.25, signal="loss_gap") == build_policy(spec)


def test_an_unknown_name_is_answered_with_the_nearest_one():
    """`dkd` is one line that offers 'ddk'."""
    with pytest.raises(ConfigError, match=r"^policy.name = 'dkd' is unknown; did you mean 'ddk'\?$"):
        build_policy(Named(name="dkd"))


def test_a_policy_from_outside_the_package_is_named_by_module_and_class():
    """`package.module:Class` is imported, gets its parameters, and is held to the same checks."""
    spec = Named.model_validate({"name": "tests.policies.test_policies:Proportional", "power": 2})
    policy = build_policy(spec)
    assert type(policy).__name__ == "Proportional"
    state = next_state(policy, None, domain_losses([1.0, 3.0]), UNIFORM)
    assert [0.1, 0.9] == pytest.approx(state["mixture_weights"])


def test_the_first_state_comes_from_init_and_later_ones_from_update():
    """Without a state the policy is initialised; with one it is updated from exactly that one."""
    policy, losses = Says(answer=(0.25, 0.75)), domain_losses([1.0, 1.0])
    first = next_state(policy, None, losses, UNIFORM)
    second = next_state(policy, first, losses, UNIFORM)
    assert {"mixture_weights": [0.25, 0.75]} == first
    assert first == second["before"]


def test_natural_weights_reach_the_policy():
    """The mixture's own weights are what `natural` and DDK's first interval start from."""
    natural = np.array([0.9, 0.1])
    assert [0.9, 0.1] == next_state(Ddk(), None, domain_losses([1.0, 2.0]), natural)["mixture_weights"]


@pytest.mark.parametrize("state", [{"mixture_weights": {"a": 1.0}}, {"weights": [1.0]}, [0.5, 0.5], None])
def test_a_state_of_another_shape_is_refused(state):
    """The message shows it and says what it must be."""

    class Answers:
        def init(self, losses, natural_weights):
            return state

        def update(self, state, losses):
            return state

    with pytest.raises(ConfigError, match=r"policy Answers gave the state .*'mixture_weights' is a list"):
        next_state(Answers(), None, domain_losses([1.0, 2.0]), np.array([0.5, 0.5]))


@pytest.mark.parametrize(
    "answer",
    [
        (1.0,),
        (0.5, 0.25, 0.25),
        (0.5, 0.6),
        (0.5, 0.5 - 1e-6),
        (1.5, -0.5),
        (math.nan, 1.0),
        (math.inf, 0.0),
        (0.0, 0.0),
    ],
)
def test_weights_that_are_no_distribution_are_refused(answer):
    """Too few or many, a wrong sum, a negative or a meaningless number: the policy is named."""
    with pytest.raises(
        ConfigError, match=r"policy Says gave mixture weights .* 2 numbers >= 0 that sum to 1"
    ):
        next_state(Says(answer=answer), None, domain_losses([1.0, 1.0]), UNIFORM)


def test_rounding_in_the_last_place_is_no_mistake():
    """A sum within 1e-9 of 1 passes; float64 cannot promise more."""
    state = next_state(Says(answer=(0.5, 0.5 + 5e-10)), None, domain_losses([1.0, 1.0]), UNIFORM)
    assert [0.5, 0.5 + 5e-10] == state["mixture_weights"]


@pytest.mark.parametrize("column", ["student_loss", "teacher_loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_policy_is_asked_about_a_loss_that_is_not_finite(column, value):
    """A nan in one domain is an error that names loss and domain; the policy never sees it."""
    losses = domain_losses([1.0, 2.0], domains=["code", "math"])
    broken = replace(losses, **{column: np.array([1.0, value])})
    policy = Says(answer=(7.0,))  # would be refused for its weights, if it were asked
    with pytest.raises(NumericsError) as error:
        next_state(policy, None, broken, UNIFORM)
    assert f"held-out {column} is not finite: {{'math': {value}}}" in str(error.value)
    assert "\n" not in str(error.value)


def test_standard_errors_may_be_missing():
    """With one row there is no standard error (nan), and weights follow all the same."""
    losses = replace(domain_losses([1.0, 1.0]), gap_error=np.array([np.nan, np.nan]))
    state = next_state(Ddk(first_interval="eq1"), None, losses, UNIFORM)
    assert [0.5, 0.5] == pytest.approx(state["mixture_weights"])


def test_weights_of_a_state_by_domain():
    """Position i of a state belongs to domain i."""
    losses = domain_losses([1.0, 2.0], domains=["code", "math"])
    assert {"code": 0.25, "math": 0.75} == weights_of({"mixture_weights": [0.25, 0.75]}, losses)


# --- policies as plain functions --------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    ["ddk", {"name": "ddk"}, Named(name="ddk").model_dump(), Ddk()],
    ids=["name", "dict", "spec", "it"],
)
def test_a_policy_may_be_given_in_three_ways(policy):
    """By name, by name and parameters, or as it is."""
    assert Ddk() == policy_of(policy)


def test_an_object_that_is_a_policy_is_taken_as_it_is():
    """It needs to be no dataclass."""

    class Plain:
        def init(self, losses, natural_weights):
            return {"mixture_weights": natural_weights.tolist()}

        def update(self, state, losses):
            return state

    policy = Plain()
    assert policy is policy_of(policy)


@pytest.mark.parametrize(
    "policy", [{}, {"signal": "loss_gap"}, {"name": "ddk", "alpha": 1}, "dkd", {"name": 5}]
)
def test_a_policy_that_is_none_is_one_line(policy):
    """As in a config."""
    with pytest.raises(ConfigError, match="policy") as error:
        policy_of(policy)
    assert "\n" not in str(error.value)


def test_a_class_is_no_policy():
    """Its methods would be called without an object, at the first interval."""
    with pytest.raises(ConfigError, match="give a name, a mapping with a name and parameters, or an object"):
        policy_of(Ddk)


def test_reweight_is_the_policy_with_all_its_checks():
    """Weights by name and a state to hand in again; the first follows the corpus, or nothing."""
    losses = domain_losses([1.0, 3.0], domains=["code", "math"])
    spec = {"name": "tests.policies.test_policies:Proportional"}
    weights, state = reweight(spec, losses)
    assert {"code": 0.25, "math": 0.75} == pytest.approx(weights)
    assert [0.25, 0.75] == pytest.approx(state["mixture_weights"])
    assert {"code": 0.1, "math": 0.9} == reweight("ddk", losses, None, {"math": 9.0, "code": 1.0})[0]
    assert {"code": 0.5, "math": 0.5} == reweight("ddk", losses)[0]
    says = Says(answer=(0.25, 0.75))
    assert state == reweight(says, losses, state)[1]["before"]
    with pytest.raises(ConfigError, match=r"natural_weights: unknown domains \['web'\]"):
        reweight("ddk", losses, None, {"code": 1.0, "math": 1.0, "web": 1.0})
    with pytest.raises(NumericsError, match="not finite"):
        reweight("ddk", domain_losses([math.nan]))
