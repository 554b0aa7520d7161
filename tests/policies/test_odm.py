"""The three rules that go by the name of Online Data Mixing, each written out literally."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.policies import Odm
from tests.policies.family import full_losses, states, weights

SETTINGS = settings(deadline=None, derandomize=True, max_examples=40)
HISTORIES = st.integers(2, 6).flatmap(
    lambda count: st.lists(st.lists(st.floats(-1, 6), min_size=count, max_size=count), min_size=2, max_size=6)
)
FORMS = ("paper", "exp3", "smoothed_mean")


def published(form, history, steps, teacher=0.0):
    """The weights after each update; rewards are the gaps over a teacher that is `teacher` nats in them."""
    n = len(history[0])
    reward_estimate, pi, eps = [0.0] * n, [1 / n] * n, 1 / n
    found = []
    for update, gaps in enumerate(history[1:], start=1):
        rewards = [teacher + gap for gap in gaps]
        for i, reward in enumerate(rewards):
            if form == "paper":
                reward_estimate[i] = 0.9 * reward_estimate[i] + 0.1 * reward / pi[i]
            elif form == "exp3":
                reward_estimate[i] += reward / 10 / pi[i]
            else:
                reward_estimate[i] = 0.9 * reward_estimate[i] + 0.1 * math.exp(reward)
        previous, eps = eps, min(1 / n, math.sqrt(math.log(n) / (n * update * steps)))
        if form == "smoothed_mean":
            raw = [r * previous for r in reward_estimate]
        else:
            raw = [math.exp(previous * r) for r in reward_estimate]
        scale = (1 - n * eps) / math.fsum(raw)
        pi = [r * scale + eps for r in raw]
        pi = [p / math.fsum(pi) for p in pi]
        found.append(pi)
    return found


def check(policy, form, history, steps, teacher=0.0):
    """The policy gives what the rule gives, after every update."""
    expected = published(form, history, steps, teacher)
    for literal, actual in zip(expected, weights(policy, history)[1:], strict=True):
        assert literal == pytest.approx(actual, rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_the_rule(form):
    """Over one to five updates, with t in updates and in steps, for rewards of either sign."""

    @SETTINGS
    @given(HISTORIES, st.sampled_from([1, 10, 1000]))
    def compare(history, steps):
        check(Odm(form=form, interval_steps=steps), form, history, steps)

    compare()


@pytest.mark.parametrize("form", FORMS)
def test_one_rule_taken_for_another_would_be_noticed(form):
    """The comparison fails for the two other forms."""
    history = [[1.0, 2.0, 0.1]] * 4
    for other in set(FORMS) - {form}:
        with pytest.raises(AssertionError):
            check(Odm(form=other), form, history, 1000)


def test_the_loss_itself_is_the_published_reward():
    """`reward: student_loss`; with a teacher at 2 nats in both domains it is 2 more than the gap."""
    history = [[1.0, 0.0], [1.0, 0.0], [0.5, 0.1]]
    check(Odm(reward="student_loss"), "paper", history, 1000, teacher=2.0)
    check(Odm(reward="excess_loss"), "paper", history, 1000)


def test_the_largest_loss_is_no_reward_where_the_teacher_has_it_too():
    """Excess over the teacher: a domain that nobody can predict pays nothing."""
    excess = weights(Odm(), [[0.0, 1.0]] * 3)[-1]
    assert excess[1] > excess[0]


def test_in_updates_the_mixture_stays_uniform_for_long():
    """Seven domains: sqrt(ln 7 / (7 t)) is below 1/7 from t = 14 on. In steps it is so from the first."""
    history = [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]] * 16
    by_updates = weights(Odm(interval_steps=1), history)
    assert [1 / 7] * 7 == pytest.approx(by_updates[13])
    assert by_updates[14][6] > 1 / 7 + 1e-4
    assert weights(Odm(), history)[1][6] > 1 / 7 + 1e-2


def test_exploration_keeps_every_domain():
    """No weight is below e_t, whatever the rewards."""
    for form in FORMS:
        for state in states(Odm(form=form), [[0.0, 700.0, -700.0]] * 6):
            assert min(state["mixture_weights"]) >= state["exploration"] - 1e-15


def test_a_mean_of_exponentials_does_not_overflow():
    """exp(5000) is inf in float64; two such domains share what the third leaves."""
    found = weights(Odm(form="smoothed_mean", reward="student_loss"), [[5000.0, 5000.0, 0.0]] * 3)[-1]
    assert found[0] == found[1]
    assert found[2] < 0.03


def test_without_smoothing_the_newest_reward_is_all():
    """`smoothing: 0` forgets: two histories with one end give one mixture."""
    for form in ("paper", "smoothed_mean"):
        policy = Odm(form=form, smoothing=0.0)
        first = policy.update(states(policy, [[1.0, 2.0]])[0], full_losses([1.0, 0.5]))
        again = policy.update({**first, "mixture_weights": [0.5, 0.5]}, full_losses([1.0, 0.5]))
        assert first["estimate"] == pytest.approx(again["estimate"])
