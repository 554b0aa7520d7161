"""What holds for every divergence, against its published formula written out, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.losses import (
    JSD,
    MSE,
    NLL,
    ForwardKL,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TotalVariation,
)
from tests.losses.stores import random_pair, top

INFINITE = math.inf
SETTINGS = settings(deadline=None, derandomize=True, max_examples=30)


def kl(a, b):
    """sum a log(a / b), where a = 0 adds nothing."""
    return math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def mixed(share, a, b):
    """share a + (1 - share) b."""
    return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]


def jsd(p, q, beta):
    """GKD, Eq. 1."""
    m = mixed(beta, p, q)
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def squares_of_logits(p, q):
    """Mean of the squared differences of centred logits."""
    y, z = ([math.log(x) for x in side] for side in (p, q))
    n = len(p)
    return math.fsum((a - sum(y) / n - b + sum(z) / n) ** 2 for a, b in zip(y, z, strict=True)) / n


PUBLISHED = {
    "forward_kl": (ForwardKL, {}, kl),
    "reverse_kl": (ReverseKL, {}, lambda p, q: kl(q, p)),
    "nll": (NLL, {}, lambda p, q: -math.fsum(a * math.log(b) for a, b in zip(p, q, strict=True))),
    "jsd": (JSD, {}, lambda p, q: jsd(p, q, 0.5)),
    "jsd 0.1": (JSD, {"beta": 0.1}, lambda p, q: jsd(p, q, 0.1)),
    "jsd of one scale": (JSD, {"beta": 0.9, "normalize": True}, lambda p, q: jsd(p, q, 0.9) / 0.09),
    "skew_kl": (SkewKL, {}, lambda p, q: kl(p, mixed(0.1, p, q))),
    "skew_kl 0.7": (SkewKL, {"skew": 0.7}, lambda p, q: kl(p, mixed(0.7, p, q))),
    "skew_reverse_kl": (SkewReverseKL, {}, lambda p, q: kl(q, mixed(0.1, q, p))),
    "skew_reverse_kl 0.7": (SkewReverseKL, {"skew": 0.7}, lambda p, q: kl(q, mixed(0.7, q, p))),
    "total_variation": (
        TotalVariation,
        {},
        lambda p, q: math.fsum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
    ),
    "mse": (MSE, {}, lambda p, q: math.fsum((a - b) ** 2 for a, b in zip(p, q, strict=True))),
    "mse of logits": (MSE, {"of": "logits"}, squares_of_logits),
}
"""Name -> loss, parameters, formula of p and q."""
EVERY = pytest.mark.parametrize("name", PUBLISHED)
BOUNDED = [name for name in PUBLISHED if name.split()[0] in ("jsd", "skew_kl", "skew_reverse_kl", "mse")]
BOUNDED.remove("mse of logits")


def loss_of(name, **parameters):
    """The loss with the parameters of its entry."""
    cls, own, _ = PUBLISHED[name]
    return cls(**own, **parameters)


def softmax(logits, temperature=1.0):
    """Probabilities, one at a time."""
    powers = [math.exp(z / temperature) for z in logits]
    return [power / math.fsum(powers) for power in powers]


def tensor(*logits):
    """One row of logits in float64."""
    return torch.tensor([list(logits)], dtype=torch.float64)


def pairs(largest=8.0):
    """Logits of student and teacher over the same 2 to 8 classes."""
    return st.lists(
        st.tuples(st.floats(-largest, largest), st.floats(-largest, largest)), min_size=2, max_size=8
    )


@EVERY
@SETTINGS
@given(logits=pairs(), temperature=st.sampled_from([0.5, 1.0, 2.0]))
def test_it_is_the_published_formula(name, logits, temperature):
    """At any temperature, for any logits, with the factor of its scale and without."""
    student, teacher = zip(*logits, strict=True)
    expected = PUBLISHED[name][2](softmax(teacher, temperature), softmax(student, temperature))
    for scaled in (False, True):
        loss = loss_of(name, temperature=temperature, scale_by_temperature=scaled)
        value = loss(tensor(*student), tensor(*teacher), None).item()
        factor = temperature**loss.scale_power if scaled else 1.0
        assert factor * expected == pytest.approx(value, rel=1e-7, abs=1e-10)


@pytest.mark.parametrize(
    ("right", "wrong"), [("skew_kl", "skew_reverse_kl"), ("jsd 0.1", "jsd"), ("mse", "nll")]
)
def test_the_formulas_tell_the_losses_apart(right, wrong):
    """A swapped direction, another beta or the wrong loss would be noticed."""
    student, teacher = (0.0, 1.0, 3.0), (2.0, 0.5, 0.0)
    value = loss_of(wrong)(tensor(*student), tensor(*teacher), None).item()
    assert value != pytest.approx(PUBLISHED[right][2](softmax(teacher), softmax(student)), rel=0.02)


@EVERY
@SETTINGS
@given(logits=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8))
def test_equal_distributions_have_no_divergence(name, logits):
    """d(p, p) is exactly 0, and so is its gradient but for rounding; NLL is the entropy instead."""
    student = tensor(*logits).requires_grad_()
    value = loss_of(name)(student, student.detach().clone(), None)
    if name != "nll":
        assert [0.0] == value.tolist()
    value.sum().backward()
    assert student.grad.abs().max() < 1e-12


@EVERY
@pytest.mark.parametrize("kind", ["dense", "bucket", "renormalize"])
def test_finite_differences_agree_with_the_gradient(name, kind):
    """In float64, at a temperature, for every kind of signal that it accepts of these."""
    student, logits = random_pair()
    loss = loss_of(name, temperature=2.0)
    if kind not in loss.kinds:
        pytest.skip("not defined")
    teacher = logits if kind == "dense" else top(logits, 3, kind, unused=1)
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher, None), (student,))


@EVERY
@SETTINGS
@given(logits=pairs(), left=st.floats(-50, 50), right=st.floats(-50, 50))
def test_a_constant_added_to_the_logits_changes_nothing(name, logits, left, right):
    """Softmax knows differences alone, on either side."""
    student, teacher = (tensor(*side) for side in zip(*logits, strict=True))
    loss = loss_of(name)
    shifted = loss(student + left, teacher + right, None).item()
    assert loss(student, teacher, None).item() == pytest.approx(shifted, rel=1e-7, abs=1e-9)


@EVERY
@SETTINGS
@given(logits=pairs(largest=1e3))
def test_it_is_never_negative_and_never_nan(name, logits):
    """Within rounding, even for logits a thousand nats apart."""
    student, teacher = (tensor(*side) for side in zip(*logits, strict=True))
    student.requires_grad_()
    value = loss_of(name)(student, teacher, None)
    value.sum().backward()
    assert value.item() >= -1e-9
    assert student.grad.isfinite().all()


@EVERY
def test_classes_that_both_exclude_add_nothing(name):
    """-inf on both sides: value and gradient are those without the class."""
    student, teacher = tensor(0.0, 1.0, 2.5), tensor(1.0, 0.0, 0.5)
    values, gradients = [], []
    for extra in ([], [-INFINITE]):
        z = torch.cat([student, tensor(*extra)], dim=1).requires_grad_()
        value = loss_of(name)(z, torch.cat([teacher, tensor(*extra)], dim=1), None)
        value.sum().backward()
        values.append(value.item())
        gradients.append(z.grad[0, :3].tolist())
    assert values[0] == pytest.approx(values[1])
    assert gradients[0] == pytest.approx(gradients[1])


@pytest.mark.parametrize("name", [*BOUNDED, "total_variation"])
def test_it_stays_finite_where_one_side_excludes_a_class(name):
    """Zero probability on one side alone: the published formula with 0 log 0 = 0, and a finite gradient."""
    for logits in [((0.0, 1.0, -INFINITE), (0.5, 0.0, 1.0)), ((0.0, 1.0, 2.0), (0.5, 0.0, -INFINITE))]:
        student, teacher = logits
        z = tensor(*student).requires_grad_()
        value = loss_of(name)(z, tensor(*teacher), None)
        value.sum().backward()
        expected = PUBLISHED[name][2](softmax(teacher), softmax(student))
        assert expected == pytest.approx(value.item())
        assert z.grad.isfinite().all()


@EVERY
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_bucket_signal_compares_the_kept_classes_and_one_for_the_rest(name, temperature):
    """The formula over K + 1 probabilities; unused places change nothing."""
    student, logits = random_pair()
    loss = loss_of(name, temperature=temperature, scale_by_temperature=False)
    if "bucket" not in loss.kinds:
        pytest.skip("not defined")
    for i, (z, y) in enumerate(zip(student.tolist(), logits.tolist(), strict=True)):
        p, q = softmax(y, temperature), softmax(z, temperature)
        kept = sorted(range(6), key=lambda v: -p[v])[:3]
        sides = [[side[v] for v in kept] + [1 - sum(side[v] for v in kept)] for side in (p, q)]
        for unused in (0, 2):
            value = loss(student, top(logits, 3, unused=unused), None)[i].item()
            assert PUBLISHED[name][2](*sides) == pytest.approx(value)


@EVERY
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_renormalised_signal_has_probability_0_elsewhere(name, temperature):
    """The formula with F = softmax(Truncate(z) / temperature) of PD's Eq. 4, over all classes."""
    student, logits = random_pair()
    loss = loss_of(name, temperature=temperature, scale_by_temperature=False)
    if "renormalize" not in loss.kinds:
        pytest.skip("not defined")
    for i, (z, y) in enumerate(zip(student.tolist(), logits.tolist(), strict=True)):
        least = sorted(y)[-3]
        powers = [math.exp(x / temperature) if x >= least else 0.0 for x in y]
        f = [power / sum(powers) for power in powers]
        value = loss(student, top(logits, 3, "renormalize", unused=2), None)[i].item()
        assert PUBLISHED[name][2](f, softmax(z, temperature)) == pytest.approx(value)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "mse" not in name and name != "nll"])
def test_the_bucket_is_a_lower_bound(name):
    """Merging classes cannot increase an f-divergence (data processing); with k = V - 1 nothing is merged."""
    student, logits = random_pair(tokens=50)
    dense = loss_of(name)(student, logits, None)
    values = [loss_of(name)(student, top(logits, k), None) for k in range(1, 6)]
    for coarse, fine in zip(values, [*values[1:], dense], strict=True):
        assert (coarse <= fine + 1e-9).all()
    torch.testing.assert_close(dense, values[-1])


@EVERY
def test_float32_is_close_to_float64_with_a_large_vocabulary(name):
    """20,000 classes: within 1e-5 of the value, and of the gradient's norm."""
    student, teacher = random_pair(tokens=3, classes=20_000)
    single = student.detach().float().requires_grad_()
    exact, value = loss_of(name)(student, teacher, None), loss_of(name)(single, teacher.float(), None)
    assert exact.tolist() == pytest.approx(value.tolist(), rel=1e-4, abs=1e-5)
    exact.sum().backward()
    value.sum().backward()
    assert (student.grad - single.grad).norm() < 1e-4 * student.grad.norm()


@EVERY
def test_no_tokens_give_no_values(name):
    """An empty chunk is allowed."""
    assert (0,) == loss_of(name)(torch.zeros(0, 4), torch.zeros(0, 4), None).shape


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "nll"])
def test_the_scale_keeps_the_gradient_of_one_size_at_high_temperatures(name):
    """Scaled by its power of the temperature, the gradient at 200 is within 10 % of that at 100: neither
    temperature**2 for total variation nor no factor at all for the others would do that."""
    sizes = []
    for temperature in (100.0, 200.0):
        student, teacher = random_pair()
        loss_of(name, temperature=temperature)(student, teacher, None).sum().backward()
        sizes.append(student.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)
