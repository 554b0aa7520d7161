"""DDK's weights against Eq. 1 and Eq. 2 of arXiv 2407.16154, written out literally."""

import json
import math
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.config import Named
from ddkmix.errors import ConfigError
from ddkmix.policies import build_policy, next_state, signal_of
from ddkmix.policies.ddk import Ddk
from tests.conftest import domain_losses
from tests.policies.family import full_losses

SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)


def intervals(largest_gap):
    """Loss gaps of 2 to 10 domains over 1 to 4 evaluations."""
    return st.integers(2, 10).flatmap(
        lambda count: st.lists(
            st.lists(st.floats(0, largest_gap), min_size=count, max_size=count), min_size=1, max_size=4
        )
    )


def equations(history, alpha, number=float, exp=math.exp, teacher_loss=2):
    """Eq. 1 on the first evaluation and Eq. 2 on each later one; the weights after each."""
    alpha, weights = number(alpha), []
    for gaps in history:
        l_teacher = exp(number(teacher_loss))
        l_student = [exp(number(teacher_loss) + number(gap)) for gap in gaps]
        signal = [exp(l / l_teacher) for l in l_student]  # noqa: E741 (the paper's letter)
        if not weights:
            r = [s / sum(signal) for s in signal]
        else:
            psi = [r * s for r, s in zip(weights[-1], signal, strict=True)]
            r = [alpha * p / sum(psi) + (1 - alpha) / len(gaps) for p in psi]
        weights.append(r)
    return weights


def ours(history, **parameters):
    """The mixture weights of the policy after each evaluation, following Eq. 1 from the start."""
    return run_policy(Ddk(first_interval="eq1", **parameters), history)


def run_policy(policy, history):
    """The mixture weights of a policy after each evaluation."""
    natural = np.full(len(history[0]), 1 / len(history[0]))
    state, weights = None, []
    for gaps in history:
        losses = domain_losses(gaps)
        state = policy.init(losses, natural) if state is None else policy.update(state, losses)
        weights.append(state["mixture_weights"])
    return weights


# What the policy computes, and two ways to get it wrong, as functions (history, uniform_mix) -> weights.


def correct(history, uniform_mix):
    """The policy."""
    return ours(history, uniform_mix=uniform_mix)


def not_in_log_space(history, uniform_mix):
    """The equations as printed, in float64."""
    with np.errstate(all="ignore"):
        return equations(history, 1 - uniform_mix, number=np.float64, exp=np.exp)


def alpha_exchanged(history, uniform_mix):
    """alpha taken for 1 - alpha; the published alpha = 0.5 hides it."""
    return ours(history, uniform_mix=1 - uniform_mix)


def check_equations(compute, history, uniform_mix):
    """`compute` gives the literal equations in float64, for gaps that float64 can hold."""
    for expected, actual in zip(
        equations(history, 1 - uniform_mix), compute(history, uniform_mix), strict=True
    ):
        assert expected == pytest.approx(actual, rel=1e-9, abs=1e-12)


def check_simplex(compute, history, uniform_mix):
    """`compute` gives finite weights >= 0 that sum to 1."""
    for weights in compute(history, uniform_mix):
        assert np.isfinite(weights).all()
        assert min(weights) >= 0
        assert 1.0 == pytest.approx(math.fsum(weights), abs=1e-12)


@SETTINGS
@given(intervals(4.0), st.floats(0, 1))
def test_weights_are_equations_1_and_2(history, uniform_mix):
    """Up to gaps of 4 nats the policy gives what Eq. 1 and Eq. 2 give as printed."""
    check_equations(correct, history, uniform_mix)


@SETTINGS
@given(intervals(20.0), st.sampled_from([0.0, 0.1, 0.5, 0.9]))
def test_weights_are_the_equations_at_high_precision_where_float64_overflows(history, uniform_mix):
    """Up to gaps of 20 nats (signals of e^(e^20)) the policy agrees with 60-digit decimals.

    The signal e^gap is only known to a relative 2^-53, and it is an exponent; that is the tolerance.
    """
    with localcontext(Context(prec=60, Emax=MAX_EMAX, Emin=MIN_EMIN)):
        exact = equations(history, Decimal(1) - Decimal(uniform_mix), number=Decimal, exp=Decimal.exp)
    signal = math.exp(max(max(gaps) for gaps in history))
    # gaps reach the policy as a difference of losses, which rounds them in the last place of 22
    tolerance = 1e-12 + 1e-14 * len(history) * signal
    for expected, actual in zip(exact, ours(history, uniform_mix=uniform_mix), strict=True):
        assert [float(weight) for weight in expected] == pytest.approx(actual, abs=tolerance)


def test_alpha_exchanged_with_its_complement_is_noticed():
    """The comparison with the equations fails for a policy that takes alpha for 1 - alpha."""
    history = [[0.1, 0.5], [0.1, 0.4]]
    check_equations(correct, history, 0.2)
    with pytest.raises(AssertionError):
        check_equations(alpha_exchanged, history, 0.2)


def test_two_domains_by_hand():
    """Signals 6 and 3: Eq. 1 gives 2/3 and 1/3; psi = 4 and 1; Eq. 2 gives 0.5 x 4/5 + 1/4 = 0.65."""
    gaps = [math.log(math.log(6)), math.log(math.log(3))]
    first, second, third = ours([gaps, gaps, gaps])
    assert [2 / 3, 1 / 3] == pytest.approx(first)
    assert [0.65, 0.35] == pytest.approx(second)
    # psi = 0.65 x 6 = 3.9 and 0.35 x 3 = 1.05
    assert [0.5 * 3.9 / 4.95 + 0.25, 0.5 * 1.05 / 4.95 + 0.25] == pytest.approx(third)


def test_three_domains_by_hand():
    """Signals 6, 3, 3: Eq. 1 gives 1/2, 1/4, 1/4; psi = 3, 3/4, 3/4; Eq. 2 stays at 1/2, 1/4, 1/4."""
    gaps = [math.log(math.log(6)), math.log(math.log(3)), math.log(math.log(3))]
    assert [[0.5, 0.25, 0.25]] * 3 == [pytest.approx(weights) for weights in ours([gaps] * 3)]


@pytest.mark.parametrize("signal", ["perplexity_ratio", "loss_gap"])
@pytest.mark.parametrize("cap", [None, 20.0])
@pytest.mark.parametrize("largest", [0.0, 3.0, 6.6, 10.0, 50.0, 700.0, 1e4, 1e300])
def test_no_gap_overflows(signal, cap, largest):
    """From 0 to 1e300 nats, with either signal and with or without a cap, weights are a distribution."""
    history = [[0.0, largest / 2, largest, largest], [largest, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, largest]]
    for uniform_mix in (0.0, 0.5, 1.0):
        check_simplex(
            lambda history, mix: ours(history, uniform_mix=mix, signal=signal, signal_cap=cap),
            history,
            uniform_mix,
        )


@SETTINGS
@given(intervals(50.0), st.floats(0, 1))
def test_weights_are_a_distribution_for_every_gap_up_to_50_nats(history, uniform_mix):
    """Random gaps never give anything but a point of the simplex."""
    check_simplex(correct, history, uniform_mix)


def test_the_printed_equations_overflow_where_the_policy_does_not():
    """A gap of 7 nats is e^1097: the check above fails for a policy outside log space."""
    history = [[7.0, 1.0], [7.0, 1.0]]
    check_simplex(correct, history, 0.5)
    with pytest.raises(AssertionError):
        check_simplex(not_in_log_space, history, 0.5)


@SETTINGS
@given(intervals(50.0), st.floats(0, 1))
def test_weights_stay_in_their_range(history, uniform_mix):
    """After Eq. 2 every weight is in [(1-alpha)/N, alpha + (1-alpha)/N]."""
    floor = uniform_mix / len(history[0])
    for weights in ours(history, uniform_mix=uniform_mix)[1:]:
        assert min(weights) >= floor - 1e-12
        assert max(weights) <= (1 - uniform_mix) + floor + 1e-12


@settings(SETTINGS, max_examples=15)
@given(st.lists(st.floats(0.05, 0.9), min_size=2, max_size=10), st.sampled_from([0.3, 0.5, 0.7]))
def test_constant_gaps_lead_to_the_fixed_point_of_the_recursion(gaps, uniform_mix):
    """At the end r_i (1 - alpha e^rho_i / Z) = (1 - alpha) / N with Z = sum_j r_j e^rho_j, and not Eq. 1."""
    alpha, rho = 1 - uniform_mix, np.exp(np.array(gaps))
    r = np.array(ours([gaps] * 300, uniform_mix=uniform_mix)[-1])
    z = (r * np.exp(rho)).sum()
    assert np.full(len(gaps), (1 - alpha) / len(gaps)) == pytest.approx(r * (1 - alpha * np.exp(rho) / z))


def test_the_fixed_point_of_two_domains_by_hand():
    """Signals 6 and 2: r = 0.5 x 3r / (3r + 1 - r) + 0.25, so 2 r^2 - r - 1/4 = 0; Eq. 1 would say 3/4."""
    gaps = [math.log(math.log(6)), math.log(math.log(2))]
    first, *_, last = ours([gaps] * 60)
    assert [3 / 4, 1 / 4] == pytest.approx(first)
    assert (1 + math.sqrt(3)) / 4 == pytest.approx(last[0])


def test_without_a_uniform_share_the_largest_gap_takes_all():
    """At uniform_mix 0 (alpha 1) the mixture collapses onto one domain, however close the gaps are."""
    assert [0.0, 1.0, 0.0] == pytest.approx(ours([[0.30, 0.31, 0.30]] * 2000, uniform_mix=0.0)[-1], abs=1e-9)


def test_seven_domains_with_gaps_of_two_to_three_and_a_half_nats_give_one_of_them_057():
    """The published signal gives the widest gap all that the uniform share leaves: 0.5 + 0.5/7."""
    gaps = [2.0, 2.2, 2.5, 2.7, 2.9, 3.1, 3.5]
    weights = ours([gaps] * 3)[-1]
    assert [0.5 / 7] * 6 + [0.5 + 0.5 / 7] == pytest.approx(weights, abs=1e-3)
    assert 0.571 == pytest.approx(max(weights), abs=1e-3)


def test_the_loss_gap_as_signal_is_softer():
    """With the logarithm of the ratio the same seven gaps leave the widest well below its bound."""
    gaps = [2.0, 2.2, 2.5, 2.7, 2.9, 3.1, 3.5]
    first, second, *_ = ours([gaps] * 2, signal="loss_gap")
    raw = [math.exp(gap) for gap in gaps]
    assert [x / sum(raw) for x in raw] == pytest.approx(first)
    assert max(second) < 0.35


@SETTINGS
@given(st.floats(0, 800), st.integers(1, 12), st.floats(0, 1))
def test_equal_gaps_give_the_uniform_mixture(gap, count, uniform_mix):
    """Domains that lag alike are sampled alike."""
    for weights in ours([[gap] * count] * 3, uniform_mix=uniform_mix):
        assert [1 / count] * count == pytest.approx(weights)


@SETTINGS
@given(intervals(8.0), st.randoms(use_true_random=False))
def test_the_order_of_the_domains_does_not_matter(history, random):
    """Permuting the domains permutes the weights."""
    order = random.sample(range(len(history[0])), len(history[0]))
    straight = ours(history)
    permuted = ours([[gaps[i] for i in order] for gaps in history])
    for before, after in zip(straight, permuted, strict=True):
        assert [before[i] for i in order] == pytest.approx(after, rel=1e-9)


def test_a_student_better_than_its_teacher_still_gets_the_floor():
    """A negative gap is a ratio below 1: the domain keeps (1-alpha)/N and more."""
    weights = ours([[-0.5, 3.0]] * 5)[-1]
    assert 0.25 < weights[0] < 0.2501


def test_a_cap_makes_all_larger_signals_equal():
    """Ratios of e^4 and e^5 both count as 20: the two domains share alike."""
    first = ours([[0.0, 4.0, 5.0]], signal_cap=20.0)[0]
    assert first[1] == first[2]
    assert math.exp(1) / (math.exp(1) + 2 * math.exp(20)) == pytest.approx(first[0])


def test_the_first_interval_is_drawn_from_the_data_as_it_is():
    """Algorithm 1, line 2: the first mixture is natural; r_0 of Eq. 1 only enters Eq. 2."""
    gaps, natural = [math.log(math.log(6)), math.log(math.log(3))], np.array([0.9, 0.1])
    policy = Ddk()
    state = policy.init(domain_losses(gaps), natural)
    assert [0.9, 0.1] == state["mixture_weights"]
    assert [0.65, 0.35] == pytest.approx(policy.update(state, domain_losses(gaps))["mixture_weights"])


def test_the_first_interval_can_follow_equation_1():
    """`first_interval: eq1` starts with r_0 = 2/3 and 1/3 whatever the data's sizes are."""
    gaps, natural = [math.log(math.log(6)), math.log(math.log(3))], np.array([0.9, 0.1])
    state = Ddk(first_interval="eq1").init(domain_losses(gaps), natural)
    assert [2 / 3, 1 / 3] == pytest.approx(state["mixture_weights"])


@SETTINGS
@given(intervals(50.0), st.sampled_from([0.0, 0.5, 1.0]))
def test_the_state_is_json_and_round_trips_exactly(history, uniform_mix):
    """A state read back from JSON is equal, and the next weights from it are bit-identical."""
    policy, natural = Ddk(uniform_mix=uniform_mix), np.full(len(history[0]), 1 / len(history[0]))
    state = policy.init(domain_losses(history[0]), natural)
    for gaps in history:
        restored = json.loads(json.dumps(state))
        assert state == restored
        losses = domain_losses(gaps)
        assert policy.update(state, losses) == policy.update(restored, losses)
        state = policy.update(state, losses)


def test_an_update_leaves_the_old_state_alone():
    """The history of states is the history of weights, so none may change afterwards."""
    policy = Ddk()
    state = policy.init(domain_losses([0.1, 0.9]), np.array([0.5, 0.5]))
    before = json.dumps(state)
    policy.update(state, domain_losses([0.9, 0.1]))
    assert before == json.dumps(state)


def test_the_defaults_are_the_published_ones():
    """alpha = 0.5, the perplexity ratio without a cap, and a random first interval."""
    expected = {
        "uniform_mix": 0.5, "signal": "perplexity_ratio", "signal_cap": None, "first_interval": "random"
    }  # fmt: skip
    assert expected == {name: getattr(Ddk(), name) for name in expected}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"uniform_mix": 1.5}, "policy.uniform_mix = 1.5: Input should be less than or equal to 1."),
        ({"uniform_mix": -0.1}, "policy.uniform_mix = -0.1: Input should be greater than or equal to 0."),
        ({"uniform_mix": float("nan")}, "policy.uniform_mix = nan: Input should be less than or equal to 1."),
        (
            {"signal": "ppl"},
            "policy.signal = 'ppl': Input should be 'perplexity_ratio', 'loss_gap', 'excess_loss', "
            "'forward_kl' or 'bits_per_byte_gap'.",
        ),
        ({"signal_cap": 0}, "policy.signal_cap = 0: Input should be greater than 0."),
        ({"first_interval": "r0"}, "policy.first_interval = 'r0': Input should be 'random' or 'eq1'."),
        ({"uniform_mx": 1}, "policy (ddk) has no parameter 'uniform_mx'; did you mean 'uniform_mix'?"),
    ],
)
def test_a_wrong_parameter_is_one_line(parameters, message):
    """The message holds the key, the value that was found and the rule."""
    with pytest.raises(ConfigError) as error:
        build_policy(Named.model_validate({"name": "ddk", **parameters}))
    assert message == str(error.value)


def test_the_checks_around_a_policy_accept_every_state_of_it():
    """`next_state` finds nothing to refuse even at the edge of float64."""
    policy, state = Ddk(uniform_mix=0.0), None
    for gaps in ([0.0, 709.0, 710.0], [1e4, 0.0, 0.0], [0.0, 0.0, 0.0]):
        state = next_state(policy, state, domain_losses(gaps), np.full(3, 1 / 3))
    assert 1.0 == pytest.approx(sum(state["mixture_weights"]))


@pytest.mark.parametrize("signal", ["excess_loss", "forward_kl", "bits_per_byte_gap"])
def test_any_signal_of_one_evaluation_will_do(signal):
    """Eq. 1 and 2 with another s: softmax(s), then half of softmax(log r + s) and half of uniform."""
    policy, losses = Ddk(signal=signal, first_interval="eq1"), full_losses([1.0, 0.0, 2.0])
    s = signal_of(signal, losses)
    first = np.exp(s) / np.exp(s).sum()
    psi = first * np.exp(s)
    state = policy.init(losses, np.full(3, 1 / 3))
    assert first == pytest.approx(np.array(state["mixture_weights"]))
    assert 0.5 * psi / psi.sum() + 0.5 / 3 == pytest.approx(
        np.array(policy.update(state, losses)["mixture_weights"])
    )
