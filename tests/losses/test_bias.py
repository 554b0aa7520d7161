"""The bias of every kind of truncated signal, shown: its closed form, or that there is none.

For signals without randomness the gradient is compared with its published form, and its distance from the
dense one with the bias that this form has. For random draws every outcome of a few draws is enumerated, so
that the expectation is exact; with more draws and classes the mean over many is held against its standard
error.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from ddkmix.losses import LOSSES
from ddkmix.losses.closed_form import LogProbs, logit_gradient
from tests.losses.stores import random_pair

from show_bias import (  # isort: skip  # found by tests.losses.stores
    FORMATS,
    counts_of,
    drawn,
    example,
    from_counts,
    gradient,
    main,
    measure,
    renormalized_draws,
    signal_of,
    top,
)

TEMPERATURES = [1.0, 2.0]


def sides(temperature=1.0, classes=8, k=3):
    """Student's and teacher's logits, q and p at a temperature, and which classes are kept."""
    student, teacher = random_pair(classes=classes)
    student = student.detach()
    kept = torch.zeros_like(teacher, dtype=torch.bool).scatter(1, teacher.topk(k).indices, True)
    return student, teacher, (student / temperature).softmax(-1), (teacher / temperature).softmax(-1), kept


def sums(values, where):
    """Over the classes of a mask, one for each token."""
    return values.masked_fill(~where, 0.0).sum(-1, keepdim=True)


# --- without randomness: not zero, and this -------------------------------------------------------


def of_bucket(q, p, kept):
    """None on the kept classes; outside, all classes move together: p - q r / q_r."""
    return torch.where(kept, 0.0, p - q * sums(p, ~kept) / sums(q, ~kept))


def of_renormalize(q, p, kept):
    """Kept classes are asked for too much, -p (1 - a) / a; all others for nothing, p."""
    a = sums(p, kept)
    return torch.where(kept, -p * (1 - a) / a, p)


def of_drop(q, p, kept):
    """The student's own probability counts a instead of 1: -(1 - a) q, and + p outside."""
    return -(1 - sums(p, kept)) * q + torch.where(kept, 0.0, p)


BIAS = {"bucket": of_bucket, "renormalize": of_renormalize, "drop": of_drop}


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("tail", BIAS)
def test_the_bias_of_a_tail_is_its_closed_form(tail, temperature):
    """Distance from the dense gradient; far from 0 for each, and only the bucket has none on what it
    keeps."""
    student, teacher, q, p, kept = sides(temperature)
    bias = gradient(student, top(teacher, 3, tail), temperature) - gradient(student, teacher, temperature)
    torch.testing.assert_close(temperature * BIAS[tail](q, p, kept), bias)
    assert bias.abs().max() > 0.01
    assert (bias[kept].abs().max() < 1e-9) == (tail == "bucket")
    torch.testing.assert_close(torch.zeros_like(bias.sum(-1)), bias.sum(-1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("tail", BIAS)
def test_the_published_truncation_keeps_another_number_of_classes_for_each_token(tail):
    """top-p-k: the smallest prefix of mass p, at most k classes; its bias is that of those classes."""
    student, teacher, q, p, _ = sides()
    signal = top(teacher, 4, tail, p=0.8)
    kept = torch.zeros_like(p, dtype=torch.bool)
    for i, row in enumerate(p.tolist()):
        order = sorted(range(len(row)), key=lambda v: -row[v])
        mass = [0.0, *itertools.accumulate(row[v] for v in order)]
        kept[i, [v for n, v in enumerate(order[:4]) if mass[n] < 0.8]] = True
    assert len(set(kept.sum(-1).tolist())) > 1
    torch.testing.assert_close(BIAS[tail](q, p, kept), gradient(student, signal) - gradient(student, teacher))


@pytest.mark.parametrize("tail", BIAS)
def test_all_classes_kept_is_no_bias(tail):
    """The closed forms end in 0."""
    student, teacher, *_ = sides()
    torch.testing.assert_close(gradient(student, teacher), gradient(student, top(teacher, 8, tail)))


@pytest.mark.parametrize("tail", ["renormalize", "drop"])
def test_a_perfect_student_is_driven_away_by_the_biased_tails(tail):
    """At q = p the dense gradient and the bucket's are 0; the others take all probability from the tail."""
    _, teacher, _, _, kept = sides()
    assert gradient(teacher, top(teacher, 3)).abs().max() < 1e-12
    pushed = gradient(teacher, top(teacher, 3, tail))
    assert (pushed[kept] < 0).all()
    assert (pushed[~kept] > 0).all()


# --- with randomness: every outcome -----------------------------------------------------------------


def enumerated(student, teacher, make, *, draws, exact=0, temperature=1.0):
    """The exact expectation of one token's gradient over all sequences of draws."""
    p = teacher.softmax(-1)
    outside = p.scatter(1, p.topk(exact).indices, 0.0)[0]
    chances, counts = [], []
    for sequence in itertools.product(range(len(outside)), repeat=draws):
        chance = math.prod((outside[v] / outside.sum()).item() for v in sequence)
        if chance > 0:
            chances.append(chance)
            counts.append([sequence.count(v) for v in range(len(outside))])
    assert math.fsum(chances) == pytest.approx(1)
    rows = len(chances)
    signal = make(teacher.expand(rows, -1), torch.tensor(counts, dtype=torch.float64))
    each = gradient(student.expand(rows, -1), signal, temperature)
    return torch.tensor(chances, dtype=torch.float64) @ each


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("draws", "exact"), [(1, 0), (3, 0), (2, 2)])
def test_draws_have_no_bias_in_any_number(draws, exact, temperature):
    """The expectation over every outcome is the dense gradient, with classes kept for themselves or
    without."""
    student, teacher, *_ = (side[:1] for side in sides(classes=5))
    expectation = enumerated(
        student,
        teacher,
        lambda y, counts: from_counts(y, counts, exact=exact),
        draws=draws,
        exact=exact,
        temperature=temperature,
    )
    torch.testing.assert_close(gradient(student, teacher, temperature)[0], expectation)


def tail_mass_forgotten(teacher_logits, counts):
    """Broken: drawn outside two kept classes, but weighted as if drawn from all."""
    signal = from_counts(teacher_logits, counts, exact=2)
    return signal_of(
        teacher_logits,
        signal.ids,
        signal.log_probs,
        draws=signal.draws,
        num_draws=signal.num_draws,
        drawn_mass=torch.ones_like(signal.drawn_mass),
    )


@pytest.mark.parametrize(("broken", "exact"), [(renormalized_draws, 0), (tail_mass_forgotten, 2)])
def test_broken_draws_have_one(broken, exact):
    """Drawn classes scaled to 1 (Gemma 3's text), and a forgotten tail mass, are off by percents."""
    student, teacher, *_ = (side[:1] for side in sides(classes=5))
    expectation = enumerated(student, teacher, broken, draws=3, exact=exact)
    dense = gradient(student, teacher)[0]
    assert (expectation - dense).norm() > 0.05 * dense.norm()


# --- with randomness: many draws of many classes ------------------------------------------------------


def deviations(make, *, classes=30, repeats=20_000):
    """Means over `repeats` signals less the dense gradient, in standard errors, of each class of one
    token."""
    student, teacher = (side[:1] for side in example(classes, 1))
    generator = torch.Generator().manual_seed(0)
    each = gradient(student.expand(repeats, -1), make(teacher.expand(repeats, -1), generator))
    # classes that stand for themselves have none, but for rounding
    error = (each.std(0) / math.sqrt(repeats)).clamp(min=1e-12)
    return (each.mean(0) - gradient(student, teacher)[0]) / error


@pytest.mark.parametrize(
    ("make", "unbiased"),
    [
        (lambda y, g: drawn(y, 8, g), True),
        (lambda y, g: drawn(y, 4, g, exact=4), True),
        (lambda y, g: renormalized_draws(y, counts_of(y, 8, g)), False),
    ],
    ids=["RS-KD", "top-4 and 4 draws", "renormalised draws"],
)
def test_the_mean_over_many_draws_is_within_its_standard_error(make, unbiased):
    """30 classes: the largest of 30 normal deviations stays below 4; the broken version is beyond 20."""
    largest = deviations(make).abs().max().item()
    assert (largest < 4) == unbiased
    assert unbiased or largest > 20


# --- who is told --------------------------------------------------------------------------------------


def test_losses_that_are_not_linear_in_p_would_be_biased_by_draws():
    """Why they do not accept them: their expectation over every outcome, with drawn weights in the place of
    p, is not their dense gradient; those that accept draws are exact."""
    student, teacher, *_ = (side[:1] for side in sides(classes=4))
    p, chances, targets = teacher.softmax(-1)[0], [], []
    for sequence in itertools.product(range(4), repeat=3):
        chances.append(math.prod(p[v].item() for v in sequence))
        targets.append([sequence.count(v) / 3 for v in range(4)])
    weights, log_p = torch.tensor(chances, dtype=torch.float64), torch.tensor(targets).double().log()
    off = {}
    for name in ("forward_kl", "nll", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "mse"):
        loss = LOSSES[name]()
        expectation = weights @ slope_gradient(loss, student.expand(len(weights), -1), log_p)
        dense = slope_gradient(loss, student, teacher.log_softmax(-1))[0]
        off[name] = (expectation - dense).norm().item() / dense.norm().item()
        assert (off[name] < 1e-9) == ("drawn" in loss.accepts) or name == "mse"
    # MSE's value is biased by the variance of the draws, its gradient by q (q - p) is linear in p
    assert off["mse"] < 1e-9


def slope_gradient(loss, student: Tensor, log_p: Tensor) -> Tensor:
    """By the closed form; draws may leave classes without any probability."""
    log_q = LogProbs(student)
    _, slope = loss.value_and_slope(log_q, LogProbs(log_p), None)
    return logit_gradient(log_q, [(torch.ones(len(student), dtype=student.dtype), slope)])


def test_the_table_shows_what_the_tests_show(capsys, monkeypatch):
    """A line for every format; draws within chance, renormalised ones and tails beyond."""
    monkeypatch.setattr("sys.argv", ["show_bias.py", "--classes", "60", "--tokens", "3", "--repeats", "500"])
    main()
    assert len(FORMATS) + 2 == len(capsys.readouterr().out.splitlines())
    student, teacher = example(60, 3)
    for name, make in FORMATS.items():
        found = measure(make, student, teacher, repeats=500 if "draws" in name else 1)
        unbiased = "draws" in name and "renormalised" not in name
        assert (found.bias < 2 * found.chance) == unbiased, name
