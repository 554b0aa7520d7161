"""Pair objectives against their published formulas, one pair at a time, and what these imply."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.errors import ConfigError, DataError
from ddkmix.plugins import build
from ddkmix.preference import CPO, IPO, PAIR_LOSSES, ChosenNLL, Dpkd, PairLoss, PladMargin, PladRanking, SimPO
from tests.conftest import REPO
from tests.preference.pairs import random_sides, scores

SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)


def log_sigmoid(x):
    """Stable on both sides."""
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def eq_9(q_t, p_t, q_s, p_s, y_t, y_s, beta):
    """DPKD: -log sigma(beta/|y_t| log(q/p)(y_t) - beta/|y_s| log(q/p)(y_s))."""
    return -log_sigmoid(beta / y_t * (q_t - p_t) - beta / y_s * (q_s - p_s))


LITERAL = {
    "dpkd": (Dpkd(beta=2.0), lambda a, b: eq_9(a.q, a.p, b.q, b.p, a.n, b.n, 2.0)),
    "dpkd of sums": (
        Dpkd(beta=0.1, length_normalize=False),
        lambda a, b: eq_9(a.q, a.p, b.q, b.p, 1, 1, 0.1),
    ),
    "chosen_nll": (ChosenNLL(), lambda a, b: -a.q / a.n),
    "chosen_nll of sums": (ChosenNLL(length_normalize=False), lambda a, b: -a.q),
    "plad_ranking": (PladRanking(beta=0.5), lambda a, b: max(0, 0.5 - a.q / a.n + b.q / b.n)),
    "plad_ranking of sums": (
        PladRanking(beta=2.0, length_normalize=False),
        lambda a, b: max(0, 2.0 - a.q + b.q),
    ),
    "plad_margin": (PladMargin(beta=3.0), lambda a, b: max(0, 3 * (a.s - b.s) - a.q / a.n + b.q / b.n)),
    "ipo": (IPO(beta=0.2), lambda a, b: ((a.q - a.p) - (b.q - b.p) - 1 / (2 * 0.2)) ** 2),
    "ipo of means": (
        IPO(beta=0.5, length_normalize=True),
        lambda a, b: ((a.q - a.p) / a.n - (b.q - b.p) / b.n - 1) ** 2,
    ),
    "cpo": (CPO(beta=0.3), lambda a, b: -log_sigmoid(0.3 * a.q - 0.3 * b.q)),
    "cpo of means": (
        CPO(beta=0.3, length_normalize=True),
        lambda a, b: -log_sigmoid(0.3 * (a.q / a.n - b.q / b.n)),
    ),
    "simpo": (SimPO(beta=2.5, gamma=0.5), lambda a, b: -log_sigmoid(2.5 * a.q / a.n - 2.5 * b.q / b.n - 0.5)),
}
"""Name -> objective, its formula of one pair. q, p: log-probabilities; n: tokens; s: quality."""
EVERY = pytest.mark.parametrize("name", LITERAL)
SIGMOID = [Dpkd(beta=1.0), CPO(), SimPO()]


class One:
    """One response."""

    def __init__(self, side, i):
        self.q, self.p = side.student[i].item(), side.teacher[i].item()
        self.n, self.s = side.tokens[i].item(), side.quality[i].item()


def formula(name, sides):
    """Its value for every pair."""
    pairs = range(len(sides[0].student))
    return [LITERAL[name][1](*(One(side, i) for side in sides)) for i in pairs]


@EVERY
def test_it_is_the_published_formula(name):
    """Responses of different lengths; float64."""
    sides = random_sides()
    assert formula(name, sides) == pytest.approx(LITERAL[name][0](*sides).tolist(), abs=1e-12)


@EVERY
def test_the_formulas_tell_them_apart(name):
    """Another objective, sums for means, or exchanged sides would be noticed."""
    sides = random_sides(1)
    expected = formula(name, sides)
    for other in set(LITERAL) - {name}:
        assert expected != pytest.approx(LITERAL[other][0](*sides).tolist(), rel=1e-3)
    if "nll" not in name:
        assert expected != pytest.approx(LITERAL[name][0](*sides[::-1]).tolist(), rel=1e-3)


@EVERY
def test_finite_differences_agree_with_the_gradient(name):
    """By the student's sums of both sides; none by the teacher's."""
    sides, loss = random_sides(2), LITERAL[name][0]

    def values(chosen, rejected):
        return loss(replace(sides[0], student=chosen), replace(sides[1], student=rejected))

    assert torch.autograd.gradcheck(values, tuple(side.student for side in sides))


@EVERY
def test_values_per_pair_in_float32(name):
    """(B,) finite values, close to float64's; pairs know nothing of each other."""
    sides, loss = random_sides(3), LITERAL[name][0]
    single = [
        replace(s, student=s.student.float(), teacher=s.teacher.float(), quality=s.quality.float())
        for s in sides
    ]
    assert isinstance(loss, PairLoss)
    assert loss(*sides).tolist() == pytest.approx(loss(*single).tolist(), rel=1e-3, abs=1e-4)
    first = [
        replace(s, **{n: getattr(s, n)[:1] for n in ("student", "teacher", "tokens", "quality")})
        for s in sides
    ]
    assert loss(*sides).tolist()[:1] == loss(*first).tolist()


# --- DPKD -------------------------------------------------------------------------------------------


def test_dpkd_by_hand():
    """Mean log-ratios -1 (of 4 tokens) and -1/2 (of 2): u = 2 (-1 + 1/2) = -1, so ln(1 + e)."""
    chosen, rejected = scores([-8.0], [-4.0], [4]), scores([-3.0], [-2.0], [2])
    assert [math.log1p(math.e)] == pytest.approx(Dpkd(beta=2.0)(chosen, rejected).tolist())


@SETTINGS
@given(
    q=st.floats(-500, 0),
    p=st.floats(-500, 0),
    tokens=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    beta=st.floats(0.01, 10),
)
def test_equal_margins_cost_log_2(q, p, tokens, beta):
    """Whatever the lengths, as long as the student is equally far from the reference per token."""
    chosen, rejected = (scores([q * n], [p * n], [n]) for n in tokens)
    assert [math.log(2)] == pytest.approx(Dpkd(beta=beta)(chosen, rejected).tolist(), abs=1e-9)


@SETTINGS
@given(
    sums=st.lists(st.floats(-300, 0), min_size=4, max_size=4),
    tokens=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    more=st.floats(0.1, 50),
)
@pytest.mark.parametrize("loss", SIGMOID, ids=lambda loss: type(loss).__name__)
def test_it_falls_with_the_chosen_and_rises_with_the_rejected(loss, sums, tokens, more):
    """Monotone; never negative; at most beta nats of change for a nat (of a token, without lengths)."""
    q_t, p_t, q_s, p_s = sums

    def value(ahead=0.0, behind=0.0):
        chosen, rejected = scores([q_t + ahead], [p_t], tokens[:1]), scores([q_s + behind], [p_s], tokens[1:])
        return loss(chosen, rejected).item()

    assert value(ahead=more) <= value() <= value(behind=more)
    assert value(ahead=more) >= 0
    assert value() - value(ahead=more) <= loss.beta * more * (1 + 1e-9)


def gradient(loss, chosen, rejected):
    """By the student's sums."""
    return torch.autograd.grad(loss(chosen, rejected).sum(), (chosen.student, rejected.student))


def test_the_weight_of_the_gradient_grows_where_the_student_is_wrong():
    """-sigmoid(-u) beta / |y|, as the text below Eq. 11 says; its print has sigmoid(+u), which shrinks."""
    tokens, beta, found = 4, 2.0, []
    for q_t in (-2.0, -8.0, -20.0):
        chosen, rejected = scores([q_t], [-8.0], [tokens]), scores([-8.0], [-8.0], [tokens])
        u = beta * (q_t + 8.0) / tokens
        by_chosen, by_rejected = gradient(Dpkd(beta=beta), chosen, rejected)
        assert -beta / tokens / (1 + math.exp(u)) == pytest.approx(by_chosen.item())
        assert by_chosen.item() == pytest.approx(-by_rejected.item())
        as_printed = -beta / tokens / (1 + math.exp(-u))
        assert (u == 0) == (as_printed == pytest.approx(by_chosen.item()))
        found.append(abs(by_chosen.item()))
    assert sorted(found) == found


def test_a_lead_of_a_thousand_nats_is_finite_both_ways():
    """No overflow: 0 on one side, the lead on the other, gradients 0 and beta."""
    near, far = scores([0.0]), scores([-1e3])
    loss = Dpkd(beta=1.0)
    assert [0.0] == loss(near, far).tolist() and [1e3] == loss(far, near).tolist()
    assert [0.0] == gradient(loss, near, far)[0].tolist()
    assert [-1.0] == gradient(loss, far, near)[0].tolist()


def test_a_long_response_weighs_no_more_than_a_short_one():
    """Per token the pull on a response of 100 tokens is a hundredth; of sums it is the same."""
    for normalise, ratio in ((True, 100.0), (False, 1.0)):
        chosen, rejected = scores([-100.0], [-100.0], [100]), scores([-1.0], [-1.0], [1])
        by_chosen, by_rejected = gradient(Dpkd(length_normalize=normalise), chosen, rejected)
        assert ratio == pytest.approx(-by_rejected.item() / by_chosen.item())


# --- the others -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss", [PladRanking(beta=1.0), PladMargin(beta=2.0)], ids=lambda loss: type(loss).__name__
)
def test_a_hinge_learns_nothing_beyond_its_margin(loss):
    """At a lead of 1 nat per token the value is 0, and beyond it the gradient; before it, -1 / tokens."""
    quality = ([0.75], [0.25])
    for lead, by_sum in ((2.5, 0.0), (0.0, -0.5)):
        chosen = scores([-6.0 + 2 * lead], tokens=[2], quality=quality[0])
        rejected = scores([-12.0], tokens=[4], quality=quality[1])
        assert [max(0.0, 1.0 - lead)] == loss(chosen, rejected).tolist()
        assert [by_sum] == gradient(loss, chosen, rejected)[0].tolist()


def test_equal_quality_asks_for_no_lead():
    """Of a student's response that is as good as the teacher's."""
    chosen, rejected = scores([-2.0], quality=[0.4]), scores([-2.0], quality=[0.4])
    assert [0.0] == PladMargin(beta=5.0)(chosen, rejected).tolist()


def test_a_margin_without_quality_is_one_line():
    """With the way out."""
    with pytest.raises(DataError, match=r"^plad_margin follows the quality of responses, and these pairs"):
        PladMargin()(scores([-1.0]), scores([-1.0], quality=[0.1]))


def test_ipo_pulls_back_beyond_its_goal():
    """h = 1 / (2 beta) = 5 costs nothing; further ahead the chosen response is pushed down."""
    loss = IPO(beta=0.1)
    assert [0.0] == loss(scores([5.0]), scores([0.0])).tolist()
    assert gradient(loss, scores([9.0]), scores([0.0]))[0].item() > 0


def test_what_has_no_reference_does_not_see_the_teacher():
    """Any teacher gives the same."""
    sides = random_sides(4)
    other = [replace(side, teacher=side.teacher - 7) for side in sides]
    for name in LITERAL:
        loss = LITERAL[name][0]
        same = loss(*sides).tolist() == loss(*other).tolist()
        shifted_alike = not isinstance(loss, ChosenNLL) and name in ("dpkd of sums", "ipo")
        assert same or loss.needs_teacher
        assert not loss.needs_teacher or shifted_alike or not same


# --- the table --------------------------------------------------------------------------------------


def test_the_table_names_every_objective():
    """By the name of a config, with its parameters checked."""
    assert {"dpkd", "chosen_nll", "plad_ranking", "plad_margin", "ipo", "cpo", "simpo"} == set(PAIR_LOSSES)
    assert Dpkd(beta=0.3) == build({"name": "dpkd", "beta": 0.3}, PAIR_LOSSES, where="pairs.0")
    with pytest.raises(ConfigError, match=r"^pairs.0.beta = 0: Input should be greater than 0"):
        build({"name": "dpkd", "beta": 0}, PAIR_LOSSES, where="pairs.0")


def test_the_table_loads_no_torch():
    """`lint` looks at it."""
    code = "import sys, json, ddkmix.preference, ddkmix.preference.minillm, ddkmix.preference.on_policy"
    code += "; print(json.dumps('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=True)
    assert json.loads(done.stdout) is False
