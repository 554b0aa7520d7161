"""Skill-It against Algorithm 1 of arXiv 2307.14430, written out literally."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.errors import ConfigError
from ddkmix.policies import SkillIt
from tests.conftest import domain_losses
from tests.policies.family import states, weights

SETTINGS = settings(deadline=None, derandomize=True, max_examples=50)
NAMES = "abcde"
PROBLEMS = st.integers(2, 5).flatmap(
    lambda count: st.tuples(
        st.lists(st.lists(st.floats(-1, 8), min_size=count, max_size=count), min_size=1, max_size=6),
        st.lists(st.lists(st.floats(0, 1), min_size=count, max_size=count), min_size=count, max_size=count),
    )
)


def algorithm_1(history, graph, eta, window):
    """p_1 = exp(eta sum_j A_ij), p_{t+1} = exp(eta sum_j A_ij sum over the window of L_j), normalised."""
    skills = range(len(graph))
    exponents = [[eta * math.fsum(graph[i][j] for j in skills) for i in skills]]
    for t in range(1, len(history)):
        recent = history[max(0, t + 1 - window) : t + 1]
        total = [math.fsum(losses[j] for losses in recent) for j in skills]
        exponents.append([eta * math.fsum(graph[i][j] * total[j] for j in skills) for i in skills])
    raw = [[math.exp(x - max(row)) for x in row] for row in exponents]
    return [[x / math.fsum(row) for x in row] for row in raw]


def by_name(graph):
    """A matrix as the config has it."""
    return {NAMES[i]: {NAMES[j]: value for j, value in enumerate(row)} for i, row in enumerate(graph)}


def check(policy, history, graph, eta, window):
    """The policy, whose teacher has 2 nats everywhere, gives what the algorithm gives."""
    losses = [[2.0 + gap for gap in gaps] for gaps in history]
    expected = algorithm_1(losses, graph, eta, window)
    for literal, actual in zip(expected, weights(policy, history), strict=True):
        assert literal == pytest.approx(actual, rel=1e-8)


@SETTINGS
@given(PROBLEMS, st.sampled_from([0.2, 0.8]), st.sampled_from([1, 3]))
def test_weights_are_algorithm_1(drawn, eta, window):
    """With any graph of skills, over up to five updates, from a window that is not yet full on."""
    history, graph = drawn
    policy = SkillIt(step_size=eta, window=window, skills=by_name(graph))
    check(policy, history, graph, eta, window)


def test_the_identity_is_the_default():
    """No graph: a domain draws by its own losses, and all alike before the first."""
    history, identity = [[1.0, 2.0], [0.5, 2.0], [0.4, 1.0], [0.1, 0.9]], [[1.0, 0.0], [0.0, 1.0]]
    check(SkillIt(), history, identity, 0.2, 3)
    assert [0.5, 0.5] == weights(SkillIt(), history)[0]


def test_a_graph_transposed_or_a_mean_for_the_sum_would_be_noticed():
    """The comparison fails for A transposed, for another window and for a third of the step."""
    graph, history = [[1.0, 0.5], [0.0, 1.0]], [[1.0, 3.0], [0.5, 2.0], [0.4, 1.0], [0.1, 0.9]]
    check(SkillIt(skills=by_name(graph)), history, graph, 0.2, 3)
    turned = [list(column) for column in zip(*graph, strict=True)]
    for wrong in (
        SkillIt(skills=by_name(turned)),
        SkillIt(skills=by_name(graph), window=2),
        SkillIt(skills=by_name(graph), step_size=0.2 / 3),
    ):
        with pytest.raises(AssertionError):
            check(wrong, history, graph, 0.2, 3)


def test_entries_that_are_not_given_are_those_of_the_identity():
    """One entry off the diagonal is enough to say that code helps math."""
    said = SkillIt(skills={"a": {"b": 0.5}})
    check(said, [[1.0, 3.0], [0.5, 2.0]], [[1.0, 0.5], [0.0, 1.0]], 0.2, 3)
    no_longer = SkillIt(skills={"a": {"a": 0.0}})
    check(no_longer, [[1.0, 3.0], [0.5, 2.0]], [[0.0, 0.0], [0.0, 1.0]], 0.2, 3)


def test_the_gap_is_another_signal():
    """With the excess over the teacher only what is left to learn counts, not what nobody can predict."""
    history = [[1.0, 0.0], [1.0, 0.0]]
    expected = algorithm_1(history, [[1.0, 0.0], [0.0, 1.0]], 0.2, 3)[-1]
    assert expected == pytest.approx(weights(SkillIt(signal="loss_gap"), history)[-1])


def test_the_state_holds_a_window_and_no_more():
    """Ten evaluations, three of them kept."""
    assert 3 == len(states(SkillIt(), [[1.0, 2.0]] * 10)[-1]["history"])


@pytest.mark.parametrize(
    ("skills", "message"),
    [
        ({"web": {"a": 1.0}}, r"policy.skills: unknown domains \['web'\].*\['a', 'b'\]"),
        ({"a": {"web": 1.0}}, r"policy.skills: unknown domains \['web'\]"),
        ({"a": {"b": math.nan}}, r"policy.skills.a.b = nan; it must be a finite number"),
    ],
)
def test_a_graph_of_other_domains_is_one_line(skills, message):
    """Rows and columns are told by the names of the domains; the first state says so already."""
    with pytest.raises(ConfigError, match=message) as error:
        SkillIt(skills=skills).init(domain_losses([1.0, 2.0]), np.array([0.5, 0.5]))
    assert "\n" not in str(error.value)
