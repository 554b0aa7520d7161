"""The table of losses, and what a config may say about them."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from ddkmix.config import Named
from ddkmix.errors import ConfigError
from ddkmix.losses import LOSSES, CrossEntropy, ForwardKL, LossTerm, build_terms, check_terms
from tests.conftest import REPO
from tests.losses.signals import KINDS, teacher_of
from tests.losses.stores import random_pair, top


def specs(*entries: dict[str, Any]) -> list[Named]:
    """The `loss` section of a config."""
    return [Named.model_validate(entry) for entry in entries]


@dataclass(frozen=True, kw_only=True)
class FirstLogit:
    """A loss from outside the package: a multiple of the first logit."""

    needs_teacher: ClassVar[bool] = False
    factor: float = 1.0

    def __call__(self, student_logits: Any, teacher_logits: Any, labels: Any) -> Any:
        """factor times the first logit of every token."""
        return self.factor * student_logits[:, 0]


def test_the_table_names_every_loss():
    """A loss of the package is one line of a literal dict."""
    modules = {path.stem for path in (REPO / "ddkmix" / "losses").glob("*.py")}
    assert set(LOSSES) <= modules
    assert all(f"ddkmix.losses.{name}" == cls.__module__ for name, cls in LOSSES.items())


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_gives_nats_per_token_and_a_gradient_to_the_student_alone(name):
    """(n, V) logits and (n,) labels give (n,) finite values; only the student's logits have a gradient."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(5, 7, generator=generator).requires_grad_()
    teacher = torch.randn(5, 7, generator=generator)
    values = LOSSES[name]()(student, teacher, torch.arange(5))
    assert (5,) == values.shape
    assert values.isfinite().all()
    values.sum().backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "sinkhorn"])
def test_tokens_do_not_influence_each_other(name):
    """The value of a token in a chunk is bit for bit its value alone: chunking cannot change a loss."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 9, generator=generator) for _ in range(2))
    labels = torch.arange(6)
    together = LOSSES[name]()(student, teacher, labels)
    alone = [LOSSES[name]()(student[i : i + 1], teacher[i : i + 1], labels[i : i + 1]) for i in range(6)]
    assert together.tolist() == torch.cat(alone).tolist()


def test_no_loss_asks_for_a_teacher_that_it_does_not_use():
    """Cross-entropy works without a teacher's logits; the divergence says that it needs them."""
    assert (False, True) == (CrossEntropy.needs_teacher, ForwardKL.needs_teacher)
    values = CrossEntropy()(torch.zeros(2, 4), None, torch.tensor([0, 3]))
    assert torch.full((2,), 4.0).log().tolist() == pytest.approx(values.tolist())


def test_terms_carry_names_weights_and_parameters():
    """DDK's objective, as a config writes it."""
    terms = build_terms(specs({"name": "cross_entropy"}, {"name": "forward_kl", "weight": 0.2}))
    expected = (
        LossTerm("cross_entropy", 1.0, CrossEntropy()),
        LossTerm("forward_kl", 0.2, ForwardKL(temperature=1.0, scale_by_temperature=True)),
    )
    assert expected == terms


def test_parameters_of_a_loss_are_its_own():
    """`temperature` goes to the loss, `weight` to the term."""
    (term,) = build_terms(specs({"name": "forward_kl", "weight": 3, "temperature": 2}))
    assert (3.0, ForwardKL(temperature=2.0)) == (term.weight, term.loss)


def test_terms_are_made_of_mappings_and_names_too():
    """What a loop in Python has at hand gives what the entries of a config give."""
    entries = ({"name": "cross_entropy"}, {"name": "forward_kl", "weight": 0.2, "temperature": 2.0})
    plain = ["cross_entropy", entries[1]]
    assert build_terms(specs(*entries)) == build_terms(plain) == build_terms(entries)
    with pytest.raises(ConfigError, match=r"^loss.0 = 3; give a name, or a mapping"):
        build_terms([3])
    with pytest.raises(ConfigError, match=r"^loss.0.name is missing"):
        build_terms([{"weight": 1.0}])


def test_a_weight_of_zero_only_watches():
    """A term of weight 0 is kept for its metric as long as another one teaches."""
    terms = build_terms(specs({"name": "cross_entropy", "weight": 0}, {"name": "forward_kl"}))
    assert [0.0, 1.0] == [term.weight for term in terms]


def test_a_loss_from_outside_the_package_is_named_by_module_and_class():
    """`package.module:Class` is imported and gets its parameters."""
    name = "tests.losses.test_losses:FirstLogit"
    (term,) = build_terms(specs({"name": name, "factor": 3.0}))
    assert name == term.name
    assert [6.0] == term.loss(torch.tensor([[2.0, 5.0]]), None, torch.tensor([1])).tolist()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "loss: every weight is 0 or there is no term; nothing would be learnt."),
        ([{"name": "cross_entropy", "weight": 0}], "loss: every weight is 0 or there is no term; nothing"),
        (
            [{"name": "crossentropy"}],
            "loss.0.name = 'crossentropy' is unknown; did you mean 'cross_entropy'?",
        ),
        (
            [{"name": "cross_entropy", "weight": -1}],
            "loss.0.weight = -1; a loss weight is a finite number >= 0, `rest`,",
        ),
        ([{"name": "cross_entropy", "weight": float("nan")}], "loss.0.weight = nan; a loss weight is a"),
        ([{"name": "cross_entropy", "weight": float("inf")}], "loss.0.weight = inf; a loss weight is a"),
        ([{"name": "cross_entropy", "weight": "1"}], "loss.0.weight = '1'; a loss weight is a finite"),
        ([{"name": "cross_entropy", "weight": True}], "loss.0.weight = True; a loss weight is a finite"),
        (
            [{"name": "cross_entropy", "temperature": 2}],
            "loss.0 (cross_entropy) has no parameter 'temperature'",
        ),
        (
            [{"name": "cross_entropy"}, {"name": "forward_kl", "temperatur": 2}],
            "loss.1 (forward_kl) has no parameter 'temperatur'; did you mean 'temperature'?",
        ),
        (
            [{"name": "forward_kl", "temperature": 0}],
            "loss.0.temperature = 0: Input should be greater than 0.",
        ),
        ([{"name": "forward_kl"}, {"name": "forward_kl"}], "loss: ['forward_kl', 'forward_kl'] names a loss"),
    ],
)
def test_a_wrong_loss_section_is_one_line(entries, message):
    """The message holds the place in the config, the value that was found and the rule."""
    with pytest.raises(ConfigError) as error:
        build_terms(specs(*entries))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_serves_the_kinds_that_it_names(kind):
    """A finite value and gradient for each kind in `accepts`; `check_terms` lets those through."""
    student, logits = random_pair(tokens=5, classes=9)
    for name, cls in LOSSES.items():
        loss = cls()
        term = LossTerm(name, 1.0, loss)
        if loss.needs_teacher and kind not in loss.accepts:
            with pytest.raises(ConfigError, match=name):
                check_terms([term], kind)
            continue
        check_terms([term], kind)
        if name == "hidden_consistency":  # it is given the student's states twice, whatever the signal
            continue
        values = loss(student, teacher_of(kind, logits, temperatures=(2.0,)), torch.arange(5))
        assert (5,) == values.shape
        assert values.isfinite().all()
        (gradient,) = torch.autograd.grad(values.sum(), student)
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("entry", "kind", "message"),
    [
        (
            {"name": "reverse_kl"},
            "drawn",
            "loss.1 (reverse_kl) is not defined for a teacher signal of the kind 'drawn', only for bucket, "
            "dense; capture without random draws, or use one of forward_kl, nll.",
        ),
        (
            {"name": "reverse_kl"},
            "renormalize",
            "loss.1 (reverse_kl) is not defined for a teacher signal of the kind 'renormalize', only for "
            "bucket, dense; set the signal's tail to bucket, or use one of forward_kl, jsd, mse, nll, "
            "skew_kl, skew_reverse_kl, total_variation.",
        ),
        (
            {"name": "ranking"},
            "bucket",
            "loss.1 (ranking) is not defined for a teacher signal of the kind 'bucket', only for dense; use "
            "the live teacher, or use one of forward_kl, jsd,",
        ),
        (
            {"name": "forward_kl", "adapt": "norm_kd"},
            "bucket",
            "loss.1 (forward_kl) with adapt: norm_kd is not defined for a teacher signal of the kind "
            "'bucket', only for dense; leave out adapt, or use the live teacher.",
        ),
        ({"name": "mse", "of": "logits"}, "bucket", "loss.1 (mse) is not defined for a teacher signal of"),
        (
            {"name": "tests.losses.test_losses:Outsider"},
            "drop",
            "loss.1 (tests.losses.test_losses:Outsider) is",
        ),
    ],
)
def test_a_loss_that_a_signal_cannot_serve_is_one_line(entry, kind, message):
    """Which term, what it is given, what it takes and what to do; cross-entropy is never refused."""
    terms = build_terms(specs({"name": "cross_entropy"}, entry))
    with pytest.raises(ConfigError) as error:
        check_terms(terms, kind)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    check_terms(terms, "dense")


@dataclass(frozen=True, kw_only=True)
class Outsider:
    """A loss from outside the package that names no kinds: it is given dense logits."""

    needs_teacher: ClassVar[bool] = True

    def __call__(self, student_logits: Any, teacher_logits: Any, labels: Any) -> Any:
        """Differences of the first logits."""
        return student_logits[:, 0] - teacher_logits[:, 0]


def test_a_temperature_that_a_store_does_not_know_is_one_line():
    """Before a training step fails for want of log Z; renormalised signals need it for WTTM alone."""
    terms = build_terms(specs({"name": "cross_entropy"}, {"name": "forward_kl", "temperature": 3.0}))
    for kind, known in (("dense", ()), ("bucket", None), ("bucket", (2.0, 3.0)), ("renormalize", ())):
        check_terms(terms, kind, known)
    with pytest.raises(ConfigError) as error:
        check_terms(terms, "bucket", (2.0,))
    assert (
        "loss.1 (forward_kl) wants the teacher at temperature 3.0, but its truncated signal is exact only at "
        "1.0, 2.0; capture it again with this temperature."
    ) == str(error.value)
    wttm = {"name": "forward_kl", "temperature": 3.0, "temperature_on": "teacher", "adapt": "wttm"}
    with pytest.raises(ConfigError, match="wants the teacher at temperature 3"):
        check_terms(build_terms(specs(wttm)), "renormalize", ())


@pytest.mark.parametrize("name", ["forward_kl", "nll", "jsd", "mse"])
def test_a_renormalised_signal_serves_any_temperature(name):
    """It is a softmax over the kept classes, so no log Z is asked for."""
    student, logits = random_pair()
    signal = replace(top(logits, 3, "renormalize"), log_z={})
    values = LOSSES[name](temperature=3.3)(student, signal, None)
    full = top(logits, 3, "renormalize")
    log_z = {3.3: (logits.log_softmax(-1) / 3.3).logsumexp(-1)}
    assert (
        values.tolist() == LOSSES[name](temperature=3.3)(student, replace(full, log_z=log_z), None).tolist()
    )
