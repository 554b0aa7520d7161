"""What single divergences promise beyond their formula: limits, bounds, symmetry, scale."""

import math

import pytest
import torch
from torch.nn.functional import mse_loss

from ddkmix.config import Named
from ddkmix.errors import ConfigError
from ddkmix.losses import (
    JSD,
    MSE,
    NLL,
    ForwardKL,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TotalVariation,
    build_terms,
)
from tests.losses.stores import random_pair, top

CERTAIN = (torch.tensor([[800.0, 0.0]]), torch.tensor([[0.0, 800.0]]))
"""Student and teacher that are sure of different classes."""


@pytest.mark.parametrize("kl", [ForwardKL, ReverseKL])
def test_of_one_scale_jsd_goes_to_forward_and_to_reverse_kl(kl):
    """As beta -> 0 and -> 1; as published it goes to 0 there, and the KLs are its slope."""
    student, teacher = random_pair()
    expected = kl()(student, teacher, None)
    small = 1e-7
    beta = small if kl is ForwardKL else 1 - small
    actual = JSD(beta=beta, normalize=True)(student, teacher, None)
    torch.testing.assert_close(expected, actual, rtol=1e-5, atol=1e-5)
    assert (JSD(beta=beta)(student, teacher, None) < 1e-5).all()


def test_jsd_of_a_half_is_symmetric_and_at_most_ln_2():
    """Swapping the sides changes nothing; reached where they exclude each other."""
    student, teacher = random_pair()
    torch.testing.assert_close(JSD()(student, teacher, None), JSD()(teacher, student, None))
    assert [math.log(2)] == pytest.approx(JSD()(*CERTAIN, None).tolist())


def test_jsd_near_its_ends_is_exact_in_float32():
    """beta = 1e-3, where q - m is small: within 1e-4 of float64."""
    student, teacher = random_pair(tokens=8, classes=1000)
    loss = JSD(beta=1e-3, normalize=True)
    single = loss(student.float(), teacher.float(), None)
    assert loss(student, teacher, None).tolist() == pytest.approx(single.tolist(), rel=1e-4)


@pytest.mark.parametrize("skew", [0.01, 0.1, 0.5])
def test_skew_kls_are_at_most_the_logarithm_of_one_over_skew(skew):
    """Reached where the sides exclude each other, where the KLs would be infinite."""
    for cls in (SkewKL, SkewReverseKL):
        assert [-math.log(skew)] == pytest.approx(cls(skew=skew)(*CERTAIN, None).tolist())


def test_skew_kls_go_to_the_kls_and_mirror_each_other():
    """As skew -> 0; one is the other with the sides swapped."""
    student, teacher = random_pair()
    for cls, kl in ((SkewKL, ForwardKL), (SkewReverseKL, ReverseKL)):
        torch.testing.assert_close(
            kl()(student, teacher, None), cls(skew=1e-9)(student, teacher, None), rtol=1e-6, atol=1e-6
        )
    torch.testing.assert_close(SkewKL()(student, teacher, None), SkewReverseKL()(teacher, student, None))


def test_the_gradient_of_nll_is_that_of_forward_kl():
    """They differ by the teacher's entropy, whatever the signal keeps."""
    for kind in ("dense", "bucket", "renormalize", "drop"):
        student, logits = random_pair()
        teacher = logits if kind == "dense" else top(logits, 3, kind)
        gradients = []
        for cls in (NLL, ForwardKL):
            (gradient,) = torch.autograd.grad(cls(temperature=2.0)(student, teacher, None).sum(), student)
            gradients.append(gradient)
        torch.testing.assert_close(*gradients)
    student, teacher = random_pair()
    log_p = teacher.log_softmax(-1)
    difference = NLL()(student, teacher, None) - ForwardKL()(student, teacher, None)
    torch.testing.assert_close(-(log_p.exp() * log_p).sum(-1), difference)


def test_total_variation_is_multiplied_by_the_temperature_itself():
    """Not by its square, which would make it grow."""
    assert (3.0, 1.0, 9.0) == (
        TotalVariation(temperature=3.0).scale,
        TotalVariation(temperature=3.0, temperature_on="teacher").scale,
        ForwardKL(temperature=3.0).scale,
    )


def test_squared_errors_of_logits_do_not_know_the_temperature():
    """temperature**2 undoes the division on both sides exactly; a shift of either side is no error."""
    student, teacher = random_pair()
    one, four = (MSE(of="logits", temperature=t)(student, teacher, None) for t in (1.0, 4.0))
    torch.testing.assert_close(one, four)
    torch.testing.assert_close(one, MSE(of="logits")(student + 7, teacher - 3, None))
    centred = (side - side.mean(-1, keepdim=True) for side in (student, teacher))
    torch.testing.assert_close(mse_loss(*centred, reduction="none").mean(-1), one)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "jsd", "beta": 0}, "loss.0.beta = 0: Input should be greater than 0."),
        ({"name": "jsd", "beta": 1}, "loss.0.beta = 1: Input should be less than 1."),
        ({"name": "skew_kl", "skew": 1.0}, "loss.0.skew = 1.0: Input should be less than 1."),
        (
            {"name": "mse", "of": "hidden"},
            "loss.0.of = 'hidden': Input should be 'probabilities' or 'logits'.",
        ),
        ({"name": "ranking", "top_k": 1}, "loss.0.top_k = 1: Input should be greater than or equal to 2."),
        ({"name": "sinkhorn", "group_tokens": 0}, "loss.0.group_tokens = 0: Input should be greater than or"),
        ({"name": "total_variation", "beta": 1}, "loss.0 (total_variation) has no parameter 'beta'"),
    ],
)
def test_a_wrong_parameter_is_one_line(entry, message):
    """The place, the value and the rule."""
    with pytest.raises(ConfigError) as error:
        build_terms([Named.model_validate(entry)])
    assert str(error.value).startswith(message)
