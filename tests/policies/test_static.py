"""The mixture that never moves."""

import json

import numpy as np
import pytest

from ddkmix.config import Named
from ddkmix.errors import ConfigError
from ddkmix.policies import build_policy
from ddkmix.policies.static import Static
from tests.conftest import domain_losses

NATURAL = np.array([0.7, 0.2, 0.1])


def test_uniform_weights_are_the_default():
    """Three domains get a third each, whatever their size and losses."""
    state = Static().init(domain_losses([0.0, 1.0, 9.0]), NATURAL)
    assert {"mixture_weights": [1 / 3, 1 / 3, 1 / 3]} == state


def test_natural_weights_are_those_of_the_data():
    """`natural` gives the weights that the mixture came with."""
    state = Static(weights="natural").init(domain_losses([0.0, 1.0, 9.0]), NATURAL)
    assert {"mixture_weights": [0.7, 0.2, 0.1]} == state


def test_given_weights_are_normalised_and_ordered_by_domain():
    """2 : 1 : 1, given in any order, is a half and two quarters in the order of the domains."""
    policy = Static(weights={"c": 1.0, "a": 2.0, "b": 1.0})
    assert {"mixture_weights": [0.5, 0.25, 0.25]} == policy.init(domain_losses([0.0] * 3), NATURAL)


def test_losses_never_move_it():
    """An update returns the state that it was given."""
    policy = Static(weights="natural")
    state = policy.init(domain_losses([0.0, 1.0, 9.0]), NATURAL)
    assert state == policy.update(state, domain_losses([9.0, 1.0, 0.0]))


def test_the_state_is_json():
    """The state survives a checkpoint unchanged."""
    state = Static(weights="natural").init(domain_losses([0.0] * 3), NATURAL)
    assert state == json.loads(json.dumps(state))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"a": 1.0, "b": 1.0}, "missing domains ['c']"),
        ({"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}, "unknown domains ['d']"),
        ({"a": -1.0, "b": 1.0, "c": 1.0}, "every weight must be finite and >= 0"),
        ({"a": 0.0, "b": 0.0, "c": 0.0}, "one of them > 0"),
        ({"a": float("nan"), "b": 1.0, "c": 1.0}, "every weight must be finite"),
    ],
)
def test_wrong_weights_are_one_line_that_names_them(weights, expected):
    """A missing, unknown, negative or meaningless weight is a ConfigError about policy.weights."""
    with pytest.raises(ConfigError) as error:
        Static(weights=weights).init(domain_losses([0.0] * 3), NATURAL)
    assert expected in str(error.value)
    assert str(error.value).startswith("policy.weights")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("weights", ["equal", {"a": "much"}, [1, 2, 3]])
def test_weights_of_another_kind_are_refused_when_the_policy_is_built(weights):
    """A word, a text or a list in the place of weights is one line that shows it."""
    with pytest.raises(ConfigError) as error:
        build_policy(Named.model_validate({"name": "static", "weights": weights}))
    assert str(error.value).startswith(f"policy.weights = {weights!r}: ")
    assert "'uniform' or 'natural'" in str(error.value)
    assert "\n" not in str(error.value)
