"""Temperatures of each token against the authors' lines, and what a truncated signal can serve of them."""

import math

import pytest
import torch
from torch.nn import functional as F

from ddkmix.batch import DenseSignal, Head
from ddkmix.config import Named
from ddkmix.errors import ConfigError
from ddkmix.losses import (
    JSD,
    MSE,
    NLL,
    ForwardKL,
    LossTerm,
    ReverseKL,
    SkewKL,
    TotalVariation,
    build_terms,
)
from ddkmix.losses.closed_form import LogProbs, logit_gradient
from ddkmix.losses.liger import why_not
from ddkmix.losses.temperature import deviation
from tests.losses.signals import KINDS, teacher_of
from tests.losses.stores import random_pair, top

ADAPTIVE = {
    "norm_kd": {"adapt": "norm_kd", "temperature": 1.5},
    "norm_kd unscaled": {"adapt": "norm_kd", "temperature": 0.7, "scale_by_temperature": False},
    "wttm": {"adapt": "wttm", "temperature": 2.0, "temperature_on": "teacher"},
    "adakd_sd": {"adapt": "adakd_sd", "temperature": 4.0},
    "adakd_h": {"adapt": "adakd_h", "temperature": 4.0},
    "adakd_h teacher": {"adapt": "adakd_h", "temperature": 4.0, "temperature_on": "teacher"},
}
DIVERGENCES = [ForwardKL, ReverseKL, NLL, JSD, SkewKL, TotalVariation, MSE]


def gradient(values, student):
    """By the student's logits."""
    return torch.autograd.grad(values.sum(), student, retain_graph=True)[0]


def norm_kd_as_published(logits_student, logits_teacher, t_norm):
    """The loss of NormKD's repository, before its mean."""
    tstd = logits_teacher.std(dim=1, keepdim=True)
    sstd = logits_student.std(dim=1, keepdim=True)
    log_pred_student = F.log_softmax(logits_student / (sstd * t_norm), dim=1)
    pred_teacher = F.softmax(logits_teacher / (tstd * t_norm), dim=1)
    kl = F.kl_div(log_pred_student, pred_teacher, reduction="none").sum(1, keepdim=True)
    return (kl * (tstd * t_norm) ** 2)[:, 0]


def wttm_as_published(y_s, y_t, gamma):
    """The loss of WTTM's repository, before its mean."""
    p_t = torch.pow(torch.softmax(y_t, dim=1), gamma)
    norm = torch.sum(p_t, dim=1)
    kl = torch.sum(F.kl_div(F.log_softmax(y_s, dim=1), p_t / norm[:, None], reduction="none"), dim=1)
    return norm * kl


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_norm_kd_is_the_published_one(temperature):
    """Value and gradient, which runs through the student's standard deviation."""
    student, teacher = random_pair(spread=5.0)
    ours = ForwardKL(adapt="norm_kd", temperature=temperature)(student, teacher, None)
    theirs = norm_kd_as_published(student, teacher, temperature)
    torch.testing.assert_close(theirs, ours)
    torch.testing.assert_close(gradient(theirs, student), gradient(ours, student))
    fixed = norm_kd_as_published(student.detach(), teacher, temperature)
    assert fixed.tolist() == pytest.approx(ours.tolist())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_wttm_is_the_published_one(temperature):
    """Value and gradient; a truncated signal that keeps every class, or nearly, gives the same."""
    student, teacher = random_pair()
    loss = ForwardKL(adapt="wttm", temperature=temperature, temperature_on="teacher")
    ours, theirs = loss(student, teacher, None), wttm_as_published(student, teacher, 1 / temperature)
    torch.testing.assert_close(theirs, ours)
    torch.testing.assert_close(gradient(theirs, student), gradient(ours, student))
    torch.testing.assert_close(theirs, loss(student, top(teacher, 5), None))


def test_wttms_weight_is_at_most_a_power_of_the_vocabulary():
    """1 for a certain teacher, V**(1 - 1/2) = 3 for one that knows nothing among 9 classes."""
    loss = NLL(adapt="wttm", temperature=2.0, temperature_on="teacher")
    teacher = torch.zeros(2, 9)
    teacher[0, 4] = 500.0
    values = loss(torch.zeros(2, 9), teacher, None)
    assert [math.log(9), 3 * math.log(9)] == pytest.approx(values.tolist())


def test_adakd_by_hand():
    """As reconstructed: fully tempered where the teacher is certain, not at all where it knows nothing; p =
    (3/4, 1/4) has a standard deviation of 1/4 out of 1/2 and an entropy of 0.8113 bits out of 1."""
    teacher = torch.tensor([[500.0, 0.0], [0.0, 0.0], [math.log(3), 0.0]])
    expected = {"adakd_sd": [5.0, 1.0, 3.0], "adakd_h": [5.0, 1.0, 1 + 4 * (1 - 0.811278)]}
    for form, temperatures in expected.items():
        tempered = ForwardKL(adapt=form, temperature=5.0).tempering(LogProbs(teacher), LogProbs(teacher))
        assert temperatures == pytest.approx(tempered.teacher.tolist(), abs=1e-3)
        assert temperatures == pytest.approx(tempered.student.tolist(), abs=1e-3)
        assert [t**2 for t in temperatures] == pytest.approx(tempered.factor.tolist(), abs=1e-2)


@pytest.mark.parametrize("form", ["adakd_sd", "adakd_h"])
def test_adakd_is_the_loss_at_the_temperature_of_each_token(form):
    """Token by token it is the fixed loss at the teacher's own temperature, on both sides or one."""
    student, teacher = random_pair()
    for on in ("both", "teacher"):
        loss = ForwardKL(adapt=form, temperature=3.0, temperature_on=on)
        values = loss(student, teacher, None)
        tempered = loss.tempering(LogProbs(student), LogProbs(teacher))
        for i, tau in enumerate(tempered.teacher.tolist()):
            fixed = ForwardKL(temperature=tau, temperature_on=on)(
                student[i : i + 1], teacher[i : i + 1], None
            )
            assert fixed.item() == pytest.approx(values[i].item())
            assert 1.0 <= tau <= 3.0


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("cls", DIVERGENCES)
def test_closed_forms_equal_autograd_and_finite_differences(cls, name):
    """For every divergence and every way to choose temperatures, in float64."""
    student, teacher = random_pair(tokens=3, classes=7)
    loss = cls(**ADAPTIVE[name])
    row = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)
    values = loss(student, teacher, None)
    detached = LogProbs(student.detach())
    closed, slope = loss.value_and_slope(detached, LogProbs(teacher), None)
    torch.testing.assert_close(values.detach(), closed)
    torch.testing.assert_close(gradient(values * row, student), logit_gradient(detached, [(row, slope)]))
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher, None), (student,))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dense"])
def test_wttm_serves_every_truncated_signal(kind):
    """Closed form and autograd agree, and the weight is that of all classes: exp(log Z)."""
    student, logits = random_pair(tokens=3, classes=7)
    teacher = teacher_of(kind, logits)
    plain = ForwardKL(temperature=2.0, temperature_on="teacher")
    loss = ForwardKL(temperature=2.0, temperature_on="teacher", adapt="wttm")
    weight = logits.softmax(-1).sqrt().sum(-1)
    values = loss(student, teacher, None)
    torch.testing.assert_close(weight * plain(student, teacher, None), values)
    detached, row = LogProbs(student.detach()), torch.ones(3, dtype=torch.float64)
    closed, slope = loss.value_and_slope(detached, teacher, None)
    torch.testing.assert_close(values.detach(), closed)
    torch.testing.assert_close(gradient(values, student), logit_gradient(detached, [(row, slope)]))


@pytest.mark.parametrize("name", [name for name in ADAPTIVE if "teacher" not in name and name != "wttm"])
def test_equal_logits_have_no_divergence(name):
    """Both sides have one temperature then, so d(p, p) is 0, and so is the gradient."""
    _, teacher = random_pair()
    student = teacher.clone().requires_grad_()
    values = ForwardKL(**ADAPTIVE[name])(student, teacher, None)
    assert [0.0] * 4 == values.tolist()
    assert gradient(values, student).abs().max() < 1e-12


def test_a_standard_deviation_leaves_out_classes_that_are_not_there():
    """-inf is no class; numbers as torch's std has them; equal logits have a floor, not a nan."""
    logits = torch.tensor([[1.0, 2.0, 4.0, -math.inf]])
    assert logits[:, :3].std(dim=1).tolist() == pytest.approx(deviation(logits).tolist())
    student = torch.zeros(1, 4, requires_grad=True)
    ForwardKL(adapt="norm_kd")(student, torch.tensor([[1.0, 2.0, 3.0, 4.0]]), None).sum().backward()
    assert student.grad.isfinite().all()


def test_what_is_wanted_of_a_store_and_what_it_can_serve():
    """Temperatures that differ by token need all logits and no log Z; WTTM needs one log Z."""
    assert () == ForwardKL(adapt="adakd_h", temperature=2.0).temperatures
    assert {"dense"} == ForwardKL(adapt="norm_kd").kinds
    wttm = ForwardKL(adapt="wttm", temperature=2.0, temperature_on="teacher")
    assert ((2.0,), ForwardKL.accepts) == (wttm.temperatures, wttm.kinds)
    assert {"dense"} == MSE(of="logits").kinds
    assert MSE.accepts == MSE().kinds


def test_ligers_kernel_is_refused_where_tokens_have_temperatures_of_their_own():
    """It knows one for all."""
    head = Head(weight=torch.zeros(3, 2))
    signal = DenseSignal(hidden=torch.zeros(4, 2), head=head)
    reasons = {"fixed": "", "adakd_h": "has one temperature for all tokens"}
    for adapt, reason in reasons.items():
        loss = ForwardKL(adapt=adapt)
        terms = [LossTerm("forward_kl", 1.0, loss)]
        assert reason == why_not(torch.zeros(4, 2), head, torch.ones(4), terms, signal)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"adapt": "wttm"},
            "loss.0: adapt: wttm tempers the teacher alone; write temperature_on: teacher beside it.",
        ),
        (
            {"adapt": "norm_kd", "temperature_on": "teacher"},
            "loss.0: adapt: norm_kd tempers both sides; leave out temperature_on.",
        ),
        ({"adapt": "normkd"}, "loss.0.adapt = 'normkd': Input should be 'fixed', 'norm_kd', 'wttm', "),
        ({"temperature": 0, "adapt": "adakd_h"}, "loss.0.temperature = 0: Input should be greater than 0."),
    ],
)
def test_a_wrong_temperature_is_one_line(parameters, message):
    """What, where, the rule and the way out."""
    with pytest.raises(ConfigError) as error:
        build_terms([Named.model_validate({"name": "forward_kl", **parameters})])
    assert str(error.value).startswith(message)
