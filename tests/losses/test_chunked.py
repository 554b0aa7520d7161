"""The chunked objective against one unchunked matrix of logits, and the size of what it allocates."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ddkmix.batch import DenseSignal, EnsembleSignal, Head
from ddkmix.losses import CrossEntropy, ForwardKL, LossTerm
from ddkmix.losses.objective import distillation_objective

NUM_TOKENS, HIDDEN, TEACHER_HIDDEN, CLASSES = 7, 5, 6, 11
CE = LossTerm("cross_entropy", 1.0, CrossEntropy())
KL = LossTerm("forward_kl", 0.2, ForwardKL(temperature=2.0))
TERMS = (CE, KL)
TOLERANCE = 1e-6


def make_case(seed=0, *, tokens=NUM_TOKENS, classes=CLASSES, hidden=HIDDEN, **changes):
    """Arguments of `distillation_objective` in float64, with leaves for its three gradients."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    head = Head(weight=random(classes, hidden).requires_grad_(), bias=random(classes).requires_grad_())
    head = replace(head, **changes)
    kept = head.vocab_size or classes
    return {
        "hidden": random(tokens, hidden).requires_grad_(),
        "head": head,
        "labels": torch.randint(kept, (tokens,), generator=generator),
        "token_weight": torch.rand(tokens, generator=generator),
        "terms": TERMS,
        "signal": DenseSignal(
            hidden=random(tokens, TEACHER_HIDDEN),
            head=Head(weight=random(classes, TEACHER_HIDDEN), vocab_size=head.vocab_size),
        ),
    }


def in_dtype(case, dtype):
    """The same case with leaves of another type."""

    def convert(tensor):
        return None if tensor is None else tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)

    def head(old):
        return replace(old, weight=convert(old.weight), bias=convert(old.bias))

    return {
        **case,
        "hidden": convert(case["hidden"]),
        "head": head(case["head"]),
        "signal": DenseSignal(hidden=convert(case["signal"].hidden), head=head(case["signal"].head)),
    }


def unchunked(case, *, dtype=torch.float64):
    """Objective, values and gradients from whole logits and autograd, everything computed in `dtype`."""
    case = in_dtype(case, dtype)

    def logits(hidden, head):
        raw = hidden @ head.weight.T * head.scale
        if head.bias is not None:
            raw = (hidden @ head.weight.T + head.bias) * head.scale
        if head.softcap is not None:
            raw = head.softcap * torch.tanh(raw / head.softcap)
        return raw[:, : head.vocab_size]

    z = logits(case["hidden"], case["head"])
    y = logits(case["signal"].hidden, case["signal"].head)
    values = []
    for term in case["terms"]:
        if isinstance(term.loss, CrossEntropy):
            log_q = z - torch.logsumexp(z, -1, keepdim=True)
            values.append(-log_q[torch.arange(len(z)), case["labels"]])
        else:
            temperature = term.loss.temperature
            p = torch.softmax(y / temperature, -1)
            log_q = torch.log_softmax(z / temperature, -1)
            values.append(temperature**2 * (p * (p.log() - log_q)).sum(-1))
    values = torch.stack(values)
    weights = torch.tensor([term.weight for term in case["terms"]], dtype=dtype)
    objective = (weights[:, None] * values * case["token_weight"].to(dtype)).sum()
    objective.backward()
    return objective.detach(), values.detach(), gradients(case)


def gradients(case):
    """What backward left on the leaves."""
    bias = case["head"].bias
    return (case["hidden"].grad, case["head"].weight.grad, None if bias is None else bias.grad)


def run(case, *, chunk_tokens=3, scale=1.0, dtype=None):
    """Objective, values and gradients of the chunked function on copies of the leaves."""
    case = in_dtype(case, dtype or case["hidden"].dtype)
    objective, values = distillation_objective(**case, chunk_tokens=chunk_tokens)
    (scale * objective).backward()
    return objective.detach(), values, gradients(case)


def assert_same(expected, actual):
    """Objective, values and gradients agree with the float64 ones to float32's precision."""
    for left, right in zip(
        (expected[0], expected[1], *expected[2]), (actual[0], actual[1], *actual[2]), strict=True
    ):
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right.double(), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("chunk_tokens", [1, 3, NUM_TOKENS, NUM_TOKENS + 10])
def test_any_chunk_size_equals_the_undistillation_objective(chunk_tokens):
    """One token at a time, a ragged last chunk, all at once and more: value and gradients are the same."""
    case = make_case()
    assert_same(unchunked(case), run(case, chunk_tokens=chunk_tokens))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.integers(0, 10**6), st.integers(1, 9), st.integers(2, 20), st.integers(1, 12), st.sampled_from([1, 2])
)
def test_any_shape_equals_the_undistillation_objective(seed, tokens, classes, chunk_tokens, hidden):
    """Random sizes down to one token, two classes and one hidden unit."""
    case = make_case(seed, tokens=tokens, classes=classes, hidden=hidden)
    assert_same(unchunked(case), run(case, chunk_tokens=chunk_tokens))


def test_it_is_no_less_exact_than_plain_float32():
    """In float32 its errors against float64 are no larger than those of plain float32 logits."""
    case = make_case(tokens=64, classes=500, hidden=32)
    exact, naive = unchunked(case), unchunked(case, dtype=torch.float32)
    ours = run(case, dtype=torch.float32, chunk_tokens=16)
    for truth, plain, mine in zip(exact[2], naive[2], ours[2], strict=True):
        naive_error = (truth - plain.double()).abs().max().item()
        assert (truth - mine.double()).abs().max().item() <= 2 * naive_error + 1e-8


def test_in_bfloat16_it_is_no_less_exact_than_plain_bfloat16():
    """bf16 hidden states over float32 parameters: float32 sums keep errors below those of plain bf16."""
    case = make_case(tokens=256, classes=64, hidden=16)
    hidden = case["hidden"].detach().to(torch.bfloat16)
    case["hidden"] = hidden.double().requires_grad_()  # the truth starts from the same rounded states
    exact, naive = unchunked(case), unchunked(case, dtype=torch.bfloat16)
    case = in_dtype(case, torch.float32)
    case["hidden"] = hidden.requires_grad_()
    objective, values = distillation_objective(**case, chunk_tokens=32)
    objective.backward()
    assert (torch.float32, torch.float32) == (objective.dtype, values.dtype)
    ours = gradients(case)
    assert [torch.bfloat16, torch.float32, torch.float32] == [gradient.dtype for gradient in ours]
    for truth, plain, mine in zip(exact[2], naive[2], ours, strict=True):
        assert (truth - mine.double()).abs().max() <= (truth - plain.double()).abs().max()
    assert exact[0].item() == pytest.approx(objective.item(), rel=1e-2)


def test_finite_differences_agree():
    """The gradient made in the forward pass is the derivative of the objective (float32 inside)."""
    case, step = make_case(), 1e-2
    _, _, (grad_hidden, grad_weight, grad_bias) = run(case)
    generator = torch.Generator().manual_seed(1)
    for leaf, grad in ((case["hidden"], grad_hidden), (case["head"].weight, grad_weight)):
        direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf += sign * step * direction
            values.append(run(case)[0].item())
            with torch.no_grad():
                leaf -= sign * step * direction
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(
            (grad * direction).sum().item(), rel=1e-2
        )
    assert grad_bias is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": None},
        {"scale": 0.25},
        {"softcap": 1.5},
        {"scale": 3.0, "softcap": 2.0},
        {"vocab_size": 8},
        {"vocab_size": 8, "bias": None, "scale": 0.5, "softcap": 3.0},
    ],
    ids=str,
)
def test_every_kind_of_head_equals_the_undistillation_objective(changes):
    """Without bias, scaled, soft-capped, cut to its first classes, and all of it together."""
    case = make_case(**changes)
    assert_same(unchunked(case), run(case, chunk_tokens=2))


def test_classes_behind_vocab_size_learn_nothing():
    """Rows of the output weights that belong to no token have a gradient of exactly 0."""
    _, _, (_, weight, bias) = run(make_case(vocab_size=8))
    assert 0.0 == weight[8:].abs().sum().item() == bias[8:].abs().sum().item()
    assert (weight[:8].abs().sum(dim=1) > 0).all()


def test_logits_behind_vocab_size_have_no_part_in_the_distribution():
    """Whatever stands behind the cut, values stay the same."""
    case = make_case(vocab_size=8)
    before = run(case)[1]
    with torch.no_grad():
        case["head"].weight[8:] = 1e3
        case["signal"].head.weight[8:] = -1e3
    torch.testing.assert_close(before, run(case)[1], rtol=0, atol=0)


def test_tied_weights_collect_the_gradient_of_both_uses():
    """Embedding and output layer are one parameter: its gradient is the sum of the two."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(CLASSES, HIDDEN, generator=generator, dtype=torch.float64)
    ids, labels = torch.tensor([1, 2, 3, 4]), torch.tensor([2, 3, 4, 5])

    def total(function):
        shared = weight.clone().requires_grad_()
        function(shared).backward()
        return shared.grad

    ours = total(
        lambda shared: distillation_objective(
            torch.tanh(shared[ids]), Head(weight=shared), labels, torch.ones(4), (CE,), chunk_tokens=3
        )[0]
    )
    plain = total(lambda shared: F.cross_entropy(torch.tanh(shared[ids]) @ shared.T, labels, reduction="sum"))
    torch.testing.assert_close(plain, ours, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_frozen_head_gets_no_gradient():
    """With the output layer frozen, hidden states learn as before and the layer does not."""
    case = make_case()
    expected = run(case)[2][0]
    for parameter in (case["head"].weight, case["head"].bias):
        parameter.requires_grad_(False)
    hidden, weight, bias = run(case)[2]
    assert (None, None) == (weight, bias)
    torch.testing.assert_close(expected, hidden, rtol=0, atol=0)


def test_frozen_hidden_states_leave_the_head_its_gradient():
    """With the body frozen, the output layer learns as before."""
    case = make_case()
    expected = run(case)[2]
    case["hidden"].requires_grad_(False)
    hidden, weight, bias = run(case)[2]
    assert hidden is None
    torch.testing.assert_close(expected[1:], (weight, bias), rtol=0, atol=0)


def test_the_backward_pass_scales_with_what_comes_from_above():
    """A factor on the objective, such as a loss scaler's, is a factor on every gradient."""
    case = make_case()
    for once, four_times in zip(run(case)[2], run(case, scale=4.0)[2], strict=True):
        assert (4 * once).tolist() == four_times.tolist()


def test_gradients_accumulate_over_micro_batches():
    """Two halves, each with its own backward pass, leave the gradients of the whole."""
    case = make_case(tokens=8)
    expected = unchunked(case)[2]
    for half in (slice(0, 4), slice(4, 8)):
        part = {
            **case,
            **{name: case[name][half] for name in ("hidden", "labels", "token_weight")},
            "signal": case["signal"].at(half),
        }
        distillation_objective(**part, chunk_tokens=3)[0].backward()
    for truth, ours in zip(expected, gradients(case), strict=True):
        torch.testing.assert_close(truth, ours, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_second_backward_pass_is_refused():
    """Gradients are handed out once; asking again is an error, not a silent zero or double."""
    case = make_case()
    objective, _ = distillation_objective(**case)
    objective.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already taken"):
        objective.backward()


def test_per_token_values_are_detached():
    """Values are for the log; only the objective has a gradient."""
    objective, values = distillation_objective(**make_case())
    assert objective.requires_grad
    assert not values.requires_grad


def test_a_token_of_weight_zero_teaches_nothing_and_is_still_measured():
    """Its hidden state has a gradient of 0 and its values are those of any other token."""
    case = make_case()
    before = run(case)[1]
    case["token_weight"][2] = 0.0
    _, values, (hidden, _, _) = run(case)
    assert [0.0] * HIDDEN == hidden[2].tolist()
    assert hidden[3].abs().sum() > 0
    torch.testing.assert_close(before, values, rtol=0, atol=0)


def test_no_tokens_are_no_loss():
    """A micro-batch of nothing but padding: objective 0 and gradients of 0, not an error."""
    objective, values, (hidden, weight, bias) = run(make_case(tokens=0))
    assert (0.0, (2, 0), (0, HIDDEN)) == (objective.item(), tuple(values.shape), tuple(hidden.shape))
    assert 0.0 == weight.abs().sum().item() == bias.abs().sum().item()


def test_no_teacher_is_needed_where_no_term_asks_for_one():
    """Cross-entropy alone runs without the teacher's states, and equals transformers' convention."""
    case = make_case() | {"terms": (CE,), "signal": None}
    objective, values = distillation_objective(**case, chunk_tokens=2)
    logits = case["hidden"] @ case["head"].weight.T + case["head"].bias
    expected = F.cross_entropy(logits, case["labels"], reduction="none")
    torch.testing.assert_close(expected, values[0].double(), rtol=TOLERANCE, atol=TOLERANCE)
    assert (expected * case["token_weight"]).sum().item() == pytest.approx(objective.item(), rel=1e-6)


def test_inside_autocast_the_type_of_the_hidden_states_decides():
    """Under bf16 autocast float32 hidden states are still computed in float32."""
    case = in_dtype(make_case(), torch.float32)
    expected, _ = distillation_objective(**case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, _ = distillation_objective(**case)
    assert expected.item() == actual.item()


# --- several teachers -------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_an_ensemble_is_the_geometric_mean_of_its_members(temperature):
    """KL to p = prod_k p_k^w_k / Z at temperature 1, tempered afterwards; value and gradients literal."""
    case, second = make_case(), make_case(seed=5)["signal"]
    case["terms"] = (LossTerm("forward_kl", 1.0, ForwardKL(temperature=temperature)),)
    members, weights = (case["signal"], second), (0.3, 0.7)
    p = math.prod(
        (said.hidden @ said.head.weight.T).softmax(-1) ** share
        for said, share in zip(members, weights, strict=True)
    )
    p = p / p.sum(-1, keepdim=True)
    p = p ** (1 / temperature) / (p ** (1 / temperature)).sum(-1, keepdim=True)
    z = case["hidden"] @ case["head"].weight.T + case["head"].bias
    log_q = (z / temperature).log_softmax(-1)
    expected = temperature**2 * (p * (p.log() - log_q)).sum(-1)
    (expected * case["token_weight"]).sum().backward()
    truth = [leaf.grad.clone() for leaf in (case["hidden"], case["head"].weight)]
    case["hidden"].grad = case["head"].weight.grad = case["head"].bias.grad = None
    case["signal"] = EnsembleSignal(members=members, weights=weights)
    objective, values = distillation_objective(**case, chunk_tokens=3)
    objective.backward()
    torch.testing.assert_close(expected.detach(), values[0], rtol=1e-9, atol=1e-12)
    for gradient, leaf in zip(truth, (case["hidden"], case["head"].weight), strict=True):
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-9, atol=1e-12)


# --- what is allocated ------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Records the shape of every tensor that an operation makes while it is active; views are not made."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run the operation and note what came out of it."""
        result = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(args)}
        for tensor in tensors_in(result):
            if tensor.untyped_storage().data_ptr() not in given:
                self.shapes.add(tuple(tensor.shape))
        return result

    @property
    def elements(self):
        """Elements of the largest one."""
        return max(math.prod(shape) for shape in self.shapes)


def tensors_in(value):
    """The tensors of a value and of the lists and tuples in it."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in tensors_in(item)] if isinstance(value, tuple | list) else []


MANY = {"tokens": 64, "classes": 300, "hidden": 32}
BOUND = max(4 * 300, 300 * 32, 64 * 32)
"""Elements of the logits of 4 tokens, of the output weights, or of all hidden states."""


def allocations(chunk_tokens, *, frozen_head=False, differentiate=True):
    """What a forward and backward pass over 64 tokens and 300 classes makes."""
    case = make_case(**MANY)
    if frozen_head:
        case["head"] = replace(case["head"], weight=case["head"].weight.detach(), bias=None)
    with Allocations() as seen, torch.set_grad_enabled(differentiate):
        objective, _ = distillation_objective(**case, chunk_tokens=chunk_tokens)
        if differentiate:
            objective.backward()
    return seen


def test_no_tensor_of_tokens_by_vocabulary_is_made():
    """Nothing is larger than the logits of a chunk, the output weights or the hidden states."""
    seen = allocations(4)
    assert (4, 300) in seen.shapes
    assert seen.elements <= BOUND < 64 * 300


def test_a_chunk_of_all_tokens_would_be_noticed():
    """The measurement fails for chunk_tokens = n, where the whole matrix of logits exists."""
    seen = allocations(64)
    assert (64, 300) in seen.shapes
    assert seen.elements > BOUND


def test_a_frozen_head_costs_no_gradient_of_its_weights():
    """A gradient of the output weights is made only if they learn."""
    assert (300, 32) in allocations(4).shapes
    assert (300, 32) not in allocations(4, frozen_head=True).shapes


def test_without_gradients_only_logits_are_made():
    """Under no_grad no gradient is made of hidden states or weights, though parameters want theirs."""
    shapes = allocations(4, differentiate=False).shapes
    assert (4, 300) in shapes
    assert not {(64, 32), (4, 32), (300, 32), (300,)} & shapes


def test_without_gradients_the_values_are_the_same():
    """Evaluation and training measure the same losses."""
    case = make_case()
    expected, values = distillation_objective(**case, chunk_tokens=3)
    with torch.no_grad():
        objective, same = distillation_objective(**case, chunk_tokens=3)
    assert not objective.requires_grad
    assert expected.item() == objective.item()
    torch.testing.assert_close(values, same, rtol=0, atol=0)
