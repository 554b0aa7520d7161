"""One objective, three implementations: every signal, head and loss against the reference in float64."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.batch import DenseSignal, EnsembleSignal, Head
from ddkmix.errors import ConfigError, ModelError, NumericsError
from ddkmix.losses import CrossEntropy, ForwardKL, LossTerm, ReverseKL, logits
from ddkmix.losses.liger import why_not
from ddkmix.losses.objective import distillation_objective, tokens_within
from tests.losses.signals import KINDS, teacher_of

TOKENS, HIDDEN, CLASSES = 7, 5, 11
EXACT = {"rtol": 1e-9, "atol": 1e-10}
CE = LossTerm("cross_entropy", 0.7, CrossEntropy())
KL = LossTerm("forward_kl", 0.2, ForwardKL(temperature=2.0))
REVERSE = LossTerm("reverse_kl", 1.5, ReverseKL(temperature=2.0))


@dataclass(frozen=True, kw_only=True)
class Margin:
    """A loss from outside the package, with nothing but a call: distance of the label from the best logit."""

    needs_teacher: ClassVar[bool] = False

    def __call__(self, student_logits: Any, teacher: Any, labels: Any) -> Any:
        """Best logit minus the label's."""
        return student_logits.amax(-1) - student_logits.gather(1, labels[:, None])[:, 0]


@dataclass(frozen=True, kw_only=True, slots=True)
class WrongSlope(ForwardKL):
    """A closed form that is not the derivative of its value."""

    def between_and_slope(self, log_q: Any, log_p: Any) -> tuple[Any, Any]:
        """Twice the slope."""
        values, slope = ForwardKL.between_and_slope(self, log_q, log_p)
        return values, 2 * slope


MARGIN = LossTerm("margin", 0.3, Margin())


def make_case(kind="dense", seed=0, *, tokens=TOKENS, classes=CLASSES, terms=(CE, KL, MARGIN), **head):
    """Arguments of `distillation_objective` in float64 with leaves for its three gradients."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student = Head(weight=random(classes, HIDDEN).requires_grad_(), bias=random(classes).requires_grad_())
    student = replace(student, **head)
    kept = student.vocab_size or classes
    if kind in ("dense", "ensemble"):
        members = tuple(
            DenseSignal(hidden=random(tokens, size), head=Head(weight=random(classes, size), vocab_size=kept))
            for size in (3, 4)
        )
        signal = members[0] if kind == "dense" else EnsembleSignal(members=members, weights=(0.25, 0.75))
    else:
        signal = teacher_of(kind, 2 * random(tokens, kept), kept=min(4, kept))
    return {
        "hidden": random(tokens, HIDDEN).requires_grad_(),
        "head": student,
        "labels": torch.randint(kept, (tokens,), generator=generator),
        "token_weight": torch.rand(tokens, generator=generator, dtype=torch.float64),
        "terms": terms,
        "signal": signal,
    }


def run(case, **options):
    """Objective, values, and gradients of hidden states, weights and bias."""
    leaves = [case["hidden"], case["head"].weight, case["head"].bias]
    objective, values = distillation_objective(**case, **options)
    return (objective.detach(), values, *torch.autograd.grad(objective, leaves))


def assert_same(expected, actual, **tolerance):
    """Objective, values and gradients agree."""
    for left, right in zip(expected, actual, strict=True):
        torch.testing.assert_close(left, right, **(tolerance or EXACT))


# --- chunked against the reference, and the reference against the formula -------------------------------


@pytest.mark.parametrize("head", [{}, {"scale": 3.0, "softcap": 2.0, "vocab_size": 8}], ids=["plain", "all"])
@pytest.mark.parametrize("kind", [*KINDS, "ensemble"])
def test_every_signal_equals_the_reference(kind, head, monkeypatch):
    """Chunks of 3 tokens, of which losses see 2 at a time; closed forms and autograd in one objective."""
    monkeypatch.setitem(logits._BLOCK_ELEMENTS, "cpu", 2 * CLASSES)
    case = make_case(kind, **head)
    assert_same(run(case, impl="reference"), run(case, chunk_tokens=3))


@pytest.mark.parametrize("kind", ["dense", "bucket", "ensemble"])
def test_losses_of_one_temperature_equal_the_reference(kind):
    """Forward and reverse KL at one temperature beside cross-entropy at another."""
    case = make_case(kind, terms=(REVERSE, CE, KL))
    assert_same(run(case, impl="reference"), run(case, chunk_tokens=4))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    st.integers(0, 10**6), st.integers(0, 9), st.integers(2, 20), st.integers(1, 12), st.sampled_from(KINDS)
)
def test_any_shape_equals_the_reference(seed, tokens, classes, chunk_tokens, kind):
    """No token to nine, two classes to twenty, any chunk."""
    case = make_case(kind, seed, tokens=tokens, classes=classes)
    assert_same(run(case, impl="reference"), run(case, chunk_tokens=chunk_tokens))


@pytest.mark.parametrize("kind", ["dense", "bucket", "ensemble"])
def test_each_term_may_have_its_own_weight_at_each_token(kind):
    """Closed forms and autograd, weights of either sign: the reference, and the sum of the terms alone."""
    case = make_case(kind)
    weight = torch.randn(3, TOKENS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = {**case, "token_weight": weight}
    assert_same(run(whole, impl="reference"), run(whole, chunk_tokens=3))
    alone = [
        run({**case, "token_weight": row, "terms": (term,)}, chunk_tokens=3)
        for row, term in zip(weight, case["terms"], strict=True)
    ]
    together = run(whole, chunk_tokens=3)
    for part in (0, 2, 3, 4):
        torch.testing.assert_close(sum(found[part] for found in alone), together[part], **EXACT)


def test_one_row_of_weights_is_that_row_for_every_term():
    """Bit for bit."""
    case = make_case()
    repeated = {**case, "token_weight": case["token_weight"].expand(3, -1)}
    assert_same(run(case, chunk_tokens=3), run(repeated, chunk_tokens=3), rtol=0, atol=0)


def test_a_wrong_closed_form_would_be_noticed():
    """The comparison can fail: the same values, and gradients that are not theirs."""
    case = make_case(terms=(LossTerm("wrong", 1.0, WrongSlope()),))
    expected, actual = run(case, impl="reference"), run(case, chunk_tokens=3)
    assert_same(expected[:2], actual[:2])
    assert (expected[2] - actual[2]).abs().max() > 0.01


def test_the_reference_is_the_formula():
    """0.7 x CE + 0.2 x 2^2 KL(p || q), written out token by token."""
    case = make_case(terms=(CE, KL))
    teacher, head = case["signal"], case["head"]
    total = 0.0
    for i in range(TOKENS):
        z = head.weight @ case["hidden"][i] + head.bias
        y = teacher.head.weight @ teacher.hidden[i]
        log_q, log_p = torch.log_softmax(z / 2, 0), torch.log_softmax(y / 2, 0)
        ce = -torch.log_softmax(z, 0)[case["labels"][i]]
        kl = 4 * (log_p.exp() * (log_p - log_q)).sum()
        total = total + case["token_weight"][i] * (0.7 * ce + 0.2 * kl)
    assert total.item() == pytest.approx(distillation_objective(**case, impl="reference")[0].item())


def test_finite_differences_agree():
    """Central differences of the whole function along a random direction, in float64."""
    case = make_case(tokens=3, classes=5, softcap=3.0)
    leaves = {"hidden": case["hidden"], "weight": case["head"].weight, "bias": case["head"].bias}
    gradients = dict(zip(leaves, run(case, chunk_tokens=2)[2:], strict=True))
    generator = torch.Generator().manual_seed(1)
    for name, leaf in leaves.items():
        step = 1e-6 * torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        found = []
        for sign in (1, -1):
            moved = {**leaves, name: leaf.detach() + sign * step}
            head = replace(case["head"], weight=moved["weight"], bias=moved["bias"])
            objective, _ = distillation_objective(**{**case, "hidden": moved["hidden"], "head": head})
            found.append(objective.item())
        assert (gradients[name] * step).sum().item() == pytest.approx((found[0] - found[1]) / 2, rel=1e-6)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_without_gradients_the_values_are_the_same(impl):
    """Under no_grad, for closed forms and for losses that have none."""
    case = make_case(terms=(CE, KL, REVERSE, MARGIN))
    expected, values = distillation_objective(**case, impl=impl)
    with torch.no_grad():
        objective, same = distillation_objective(**case, impl=impl)
    assert (True, False) == (expected.requires_grad, objective.requires_grad)
    torch.testing.assert_close(values, same, rtol=1e-14, atol=0)


def test_a_term_of_weight_zero_is_measured_and_teaches_nothing():
    """Its value stands beside the others', and gradients are those without it."""
    case = make_case(terms=(CE, replace(KL, weight=0.0)))
    alone = run({**case, "terms": (CE,)})
    both = run(case)
    assert_same((alone[0], *alone[2:]), (both[0], *both[2:]))
    assert both[1][1].abs().min() > 0


def test_bfloat16_gradients_of_the_weights_are_added_up_in_float32(monkeypatch):
    """bf16 states and weights, slices of two classes: errors against float64 no larger than autograd's."""
    monkeypatch.setattr("ddkmix.losses.gradients._SLICE_ELEMENTS", 2 * HIDDEN)
    case = make_case(tokens=400, classes=40, terms=(CE, KL))

    def as_type(dtype):
        head = case["head"]
        low = {
            "weight": head.weight.detach().to(torch.bfloat16),
            "bias": head.bias.detach().to(torch.bfloat16),
        }
        low = {name: tensor.to(dtype).requires_grad_() for name, tensor in low.items()}
        hidden = case["hidden"].detach().to(torch.bfloat16).to(dtype).requires_grad_()
        return {**case, "hidden": hidden, "head": Head(**low)}

    truth = run(as_type(torch.float64), impl="reference")
    plain, ours = (run(as_type(torch.bfloat16), impl=impl) for impl in ("reference", "chunked"))
    for exact, theirs, mine in zip(truth[2:], plain[2:], ours[2:], strict=True):
        assert torch.bfloat16 == mine.dtype
        assert (exact - mine).norm() <= 1.05 * (exact - theirs).norm()


# --- ensembles --------------------------------------------------------------------------------------


def test_an_ensemble_is_the_geometric_mean():
    """p proportional to p_1^(1/4) p_2^(3/4)."""
    case = make_case("ensemble", terms=(LossTerm("forward_kl", 1.0, ForwardKL()),))
    p = [torch.softmax(m.hidden @ m.head.weight.T, -1) for m in case["signal"].members]
    mean = p[0] ** 0.25 * p[1] ** 0.75
    mean = mean / mean.sum(-1, keepdim=True)
    log_q = torch.log_softmax(case["hidden"] @ case["head"].weight.T + case["head"].bias, -1)
    expected = (mean * (mean.log() - log_q)).sum(-1).detach()
    torch.testing.assert_close(expected, run(case, chunk_tokens=2)[1][0], **EXACT)


def test_an_ensemble_of_one_is_its_member():
    """Weight 1: the same to rounding."""
    case = make_case()
    one = EnsembleSignal(members=(case["signal"],), weights=(1.0,))
    assert_same(run(case), run({**case, "signal": one}))


def test_positions_of_an_ensemble_are_those_of_its_members():
    """`at` is applied to each."""
    signal = make_case("ensemble")["signal"]
    part = signal.at(slice(1, 3))
    assert signal.weights == part.weights
    assert [m.hidden[1:3].tolist() for m in signal.members] == [m.hidden.tolist() for m in part.members]


@pytest.mark.parametrize("weights", [(0.5, 0.6), (1.0,), (1.5, -0.5), (0.0, 1.0), (math.nan, 1.0)])
def test_weights_of_an_ensemble_are_checked(weights):
    """One for each, positive, sum 1."""
    members = make_case("ensemble")["signal"].members
    with pytest.raises(ConfigError, match="an ensemble of 2 teachers has the weights"):
        EnsembleSignal(members=members, weights=weights)


# --- chunks from a budget -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "tokens", "memory_mb", "kind"),
    [
        (1000, 1000, 512.0, None),
        (500, 1000, 2.0, None),  # 500 x 1000 x 4 bytes
        (250, 1000, 2.0, "dense"),
        (125, 1000, 2.0, "ensemble"),  # the student's, the mean's and two members'
        (334, 1000, 1.9, None),  # 475 fit, so three chunks, of equal size
        (63, 1000, 0.001, None),  # 64 are the least: sixteen chunks of 63
        (1, 0, 512.0, None),
    ],
)
def test_tokens_of_a_chunk_by_hand(expected, tokens, memory_mb, kind):
    """A thousand classes in float32."""
    head = Head(weight=torch.zeros(1000, 2))
    member = DenseSignal(hidden=torch.zeros(tokens, 2), head=head)
    ensemble = EnsembleSignal(members=(member, member), weights=(0.5, 0.5))
    signal = {None: None, "dense": member, "ensemble": ensemble}[kind]
    assert expected == tokens_within(memory_mb, torch.zeros(tokens, 2), head, signal)


def test_a_narrower_type_has_room_for_twice_the_tokens():
    """In bfloat16 the buffers are half as large; a cut vocabulary counts as cut."""
    head = Head(weight=torch.zeros(2000, 2), vocab_size=1000)
    assert 500 == tokens_within(1.0, torch.zeros(1000, 2, dtype=torch.bfloat16), head)


def test_the_budget_decides_the_chunk():
    """With no chunk size given, the objective of any budget is the same."""
    case = make_case(tokens=200)
    assert_same(run(case, impl="reference"), run(case, memory_mb=1e-3))


# --- what is refused ------------------------------------------------------------------------------------


def spoilt(case, kind, value):
    """The case with a teacher that says `value` about token 4."""
    signal = case["signal"]
    if kind in ("dense", "ensemble"):
        member = signal if kind == "dense" else signal.members[1]
        hidden = member.hidden.clone()
        hidden[4] = value
        weight = member.head.weight.abs() + 0.1  # +inf x weight is +inf in every class
        member = replace(member, hidden=hidden, head=replace(member.head, weight=weight))
        spoiled = member if kind == "dense" else replace(signal, members=(signal.members[0], member))
        return {**case, "signal": spoiled}
    log_probs = signal.log_probs.clone()
    log_probs[4, 1] = value
    return {**case, "signal": replace(signal, log_probs=log_probs)}


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize(
    ("kind", "name"), [("dense", "logits"), ("ensemble", "logits"), ("bucket", "log-prob")]
)
@pytest.mark.parametrize(("said", "value"), [("NaN", math.nan), ("+inf", math.inf)])
def test_a_teacher_that_is_not_finite_is_named(kind, name, said, value, impl):
    """NaN and +inf, of one teacher, of one of several, of a store: one line, with the token."""
    case = spoilt(make_case(kind), kind, value)
    with pytest.raises(NumericsError) as error:
        distillation_objective(**case, impl=impl, chunk_tokens=3)
    assert str(error.value).startswith(f"the teacher's {name}")
    assert f" hold {said} at predicted token 4 of the batch (1 losses" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_teacher_may_exclude_classes():
    """-inf for a class is a probability of 0; values and gradients are the reference's."""
    case = make_case()
    bias = torch.zeros(CLASSES, dtype=torch.float64)
    bias[3] = -math.inf
    teacher = replace(case["signal"], head=replace(case["signal"].head, bias=bias))
    case["signal"] = teacher
    actual = run(case, chunk_tokens=2)
    assert all(part.isfinite().all() for part in actual)
    assert_same(run(case, impl="reference"), actual)


def test_a_student_that_is_not_finite_is_no_fault_of_the_teacher():
    """Its loss is NaN, which the trainer reports; nobody else is accused."""
    case = make_case()
    with torch.no_grad():
        case["hidden"][2] = math.nan
    _, values = distillation_objective(**case)
    assert [2] == values.isnan().any(dim=0).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("loss", "kind"), [(ReverseKL(), "drop"), (ReverseKL(), "drawn"), (Margin(), "bucket")]
)
def test_a_loss_is_not_given_a_signal_that_it_is_not_defined_for(loss, kind):
    """Reverse KL of a sampled signal would be something else; a loss that says nothing wants dense logits."""
    term = LossTerm("mine", 1.0, loss)
    case = make_case(kind, terms=(CE, term))
    if loss.needs_teacher:
        with pytest.raises(
            ConfigError, match=rf"\(mine\) is not defined for a teacher signal of the kind '{kind}'"
        ):
            distillation_objective(**case)
    else:
        distillation_objective(**case)


def test_other_classes_are_one_line():
    """A teacher with more classes than the student: cut both."""
    case = make_case()
    case["head"] = replace(case["head"], vocab_size=8)
    with pytest.raises(ModelError, match="the teacher has 11 classes and the student 8; cut both heads"):
        distillation_objective(**case)


def test_an_unknown_implementation_is_one_line():
    """The names that there are."""
    with pytest.raises(ConfigError, match=r"impl = 'fast'; it is one of chunked, reference, liger\."):
        distillation_objective(**make_case(), impl="fast")


# --- liger-kernel, which need not be here ----------------------------------------------------------------


def liger_case(**changes):
    """A case that liger-kernel computes: float32, one divergence, equal weights."""
    case = make_case(terms=(CE, KL))

    def single(head):
        bias = None if head.bias is None else head.bias.detach().float()
        return replace(head, weight=head.weight.detach().float(), bias=bias)

    signal = case["signal"]
    return {
        "hidden": case["hidden"].detach().float(),
        "head": single(case["head"]),
        "token_weight": torch.full((TOKENS,), 1 / TOKENS),
        "terms": case["terms"],
        "signal": replace(signal, hidden=signal.hidden.float(), head=single(signal.head)),
        **changes,
    }


def test_liger_is_allowed_where_it_computes_the_same():
    """No reason against it."""
    assert "" == why_not(**liger_case())
    assert "" == why_not(**liger_case(terms=(LossTerm("reverse_kl", 1.0, ReverseKL()),)))


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("needs the hidden states of one teacher", {"signal": None}),
        ("needs the hidden states of one teacher", {"signal": make_case("bucket")["signal"]}),
        ("computes cross_entropy and one of", {"terms": (CE,)}),
        ("computes cross_entropy and one of", {"terms": (KL, REVERSE)}),
        ("computes cross_entropy and one of", {"terms": (KL, MARGIN)}),
        ("computes cross_entropy and one of", {"terms": (LossTerm("wrong", 1.0, WrongSlope()),)}),
        (
            "divides the logits of both",
            {"terms": (LossTerm("f", 1.0, ForwardKL(temperature=2.0, temperature_on="teacher")),)},
        ),
        ("knows no scale and no soft cap", {"head": Head(weight=torch.zeros(CLASSES, HIDDEN), scale=2.0)}),
        ("knows no scale and no soft cap", {"head": Head(weight=torch.zeros(CLASSES, HIDDEN), softcap=2.0)}),
        ("takes softmax and sums in the type", {"hidden": torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16)}),
        ("gives every token the same weight", {"token_weight": torch.arange(7.0)}),
        ("gives every token the same weight", {"token_weight": torch.zeros(0)}),
        ("gives every token the same weight", {"token_weight": torch.ones(2, TOKENS)}),
    ],
)
def test_liger_is_refused_where_it_computes_something_else(reason, changes):
    """Each difference that its source shows."""
    assert why_not(**liger_case(**changes)).startswith(reason)


def test_a_refusal_names_the_way_out():
    """One line, from the public function."""
    with pytest.raises(
        ConfigError, match=r"impl = 'liger' computes cross_entropy .* use 'chunked', which has no"
    ):
        distillation_objective(**make_case(terms=(CE, KL, MARGIN)), impl="liger")
