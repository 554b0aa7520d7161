"""Log-probabilities of responses against whole logits and autograd, and sums over rows by hand."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ddkmix.batch import Head
from ddkmix.errors import DataError
from ddkmix.losses.reference import logits_of
from ddkmix.preference.scores import mean_per_row, response_log_probs, response_scores, sum_per_row

SETTINGS = settings(deadline=None, derandomize=True, max_examples=25)
EXACT = {"rtol": 1e-9, "atol": 1e-10}


def make_case(seed=0, *, tokens=7, classes=11, hidden=5, dtype=torch.float64, bias=True, **head):
    """Hidden states, a head with leaves, and labels."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    states = random(tokens, hidden)
    made = Head(weight=random(classes, hidden), bias=random(classes) if bias else None, **head)
    labels = torch.randint(made.vocab_size or classes, (tokens,), generator=generator)
    return states, made, labels


def literal(states, head, labels):
    """log softmax of whole logits at the labels."""
    return logits_of(states, head).log_softmax(-1).gather(1, labels[:, None])[:, 0]


def leaves(states, head):
    """What has a gradient."""
    return [tensor for tensor in (states, head.weight, head.bias) if tensor is not None]


def compare(case, chunk_tokens, **tolerance):
    """Values, and the gradients of a function that needs all tokens of a row at once."""
    states, head, labels = case
    rows = torch.arange(len(labels)) % 3
    found = []
    for compute in (literal, lambda *case: response_log_probs(*case, chunk_tokens=chunk_tokens)):
        values = compute(states, head, labels)
        objective = sum_per_row(values, rows, 3).sin().sum()
        found.append((values.detach(), *torch.autograd.grad(objective, leaves(states, head))))
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, **(tolerance or EXACT))


@pytest.mark.parametrize(
    "changes",
    [{}, {"bias": False}, {"scale": 3.0, "softcap": 2.0, "vocab_size": 8}],
    ids=["plain", "no bias", "all"],
)
@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
def test_values_and_gradients_are_those_of_whole_logits(changes, chunk_tokens):
    """Any head, any chunk, through a function of sums over rows."""
    compare(make_case(**changes), chunk_tokens)


@SETTINGS
@given(st.integers(0, 10**6), st.integers(0, 9), st.integers(2, 20), st.integers(1, 12))
def test_any_shape(seed, tokens, classes, chunk_tokens):
    """No token to nine, two classes to twenty."""
    compare(make_case(seed, tokens=tokens, classes=classes), chunk_tokens)


def test_finite_differences_agree():
    """gradcheck of all three inputs."""
    states, head, labels = make_case(tokens=4, classes=5, hidden=3)

    def compute(states, weight, bias):
        return response_log_probs(states, Head(weight=weight, bias=bias), labels, chunk_tokens=3)

    assert torch.autograd.gradcheck(compute, (states, head.weight, head.bias))


def test_two_tokens_by_hand():
    """Logits (0, ln 3): log 1/4 and log 3/4; the derivative of the second by its logit is 1 - 3/4."""
    weight = torch.tensor([[0.0], [3.0]]).log().nan_to_num(neginf=0.0).requires_grad_()
    values = response_log_probs(torch.ones(2, 1), Head(weight=weight), torch.tensor([0, 1]))
    assert [0.25, 0.75] == pytest.approx(values.exp().tolist())
    values[1].backward()
    assert [-0.25, 0.25] == pytest.approx(weight.grad[:, 0].tolist())


@pytest.mark.parametrize("frozen", ["states", "weight", "bias", "states and bias"])
def test_what_is_frozen_has_no_gradient(frozen):
    """And the others have the same as ever."""
    states, head, labels = make_case()
    rows = dict(zip(("states", "weight", "bias"), leaves(states, head), strict=True))
    response_log_probs(states, head, labels, chunk_tokens=3).square().sum().backward()
    expected = {name: tensor.grad.clone() for name, tensor in rows.items()}
    for name, tensor in rows.items():
        tensor.grad = None
        tensor.requires_grad_(name not in frozen.split(" and "))
    response_log_probs(states, head, labels, chunk_tokens=3).square().sum().backward()
    for name, tensor in rows.items():
        assert (tensor.grad is None) == (name in frozen.split(" and "))
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, expected[name], rtol=0, atol=0)


def test_the_backward_pass_takes_no_parameters_that_have_changed():
    """An optimizer step in between would give the gradient of another model; torch refuses."""
    states, head, labels = make_case()
    objective = response_log_probs(states, head, labels).sum()
    with torch.no_grad():
        head.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        objective.backward()


def test_half_precision_gives_float32():
    """Values are softmaxed in float32; gradients have the type of the inputs."""
    states, head, labels = make_case(dtype=torch.bfloat16, classes=50, hidden=16)
    values = response_log_probs(states, head, labels, chunk_tokens=3)
    assert torch.float32 == values.dtype
    torch.testing.assert_close(values, literal(states, head, labels))
    values.sum().backward()
    assert torch.bfloat16 == states.grad.dtype == head.weight.grad.dtype


class Seen(TorchDispatchMode):
    """The most elements of any tensor that an operation gives, and the products of two matrices."""

    elements = products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Look at the result."""
        out = func(*args, **(kwargs or {}))
        self.products += "mm" in func.__name__ and min(out.shape) > 1
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_no_tensor_of_tokens_times_vocabulary():
    """200 tokens, 300 classes, chunks of 10: neither pass makes anything larger than a chunk of logits or
    the output weights, and no pass keeps one."""
    states, head, labels = make_case(tokens=200, classes=300, hidden=4, dtype=torch.float32)
    with Seen() as seen:
        values = response_log_probs(states, head, labels, chunk_tokens=10)
        values.sum().backward()
    assert 10 * 300 >= seen.elements
    with Seen() as seen:
        literal(states, head, labels).sum().backward()
    assert 200 * 300 == seen.elements


def test_four_products_with_the_output_weights():
    """One forward, three backward; two backward where the weights are frozen."""
    for frozen, products in ((False, 4), (True, 3)):
        states, head, labels = make_case(tokens=12, bias=False)
        head.weight.requires_grad_(not frozen)
        with Seen() as seen:
            values = response_log_probs(states, head, labels, chunk_tokens=12)
            assert 1 == seen.products
            values.sum().backward()
        assert products == seen.products


def test_without_gradients_it_is_the_same_value():
    """As for the teacher, or for measuring."""
    case = make_case()
    with torch.no_grad():
        value = response_log_probs(*case, chunk_tokens=3)
    assert not value.requires_grad
    torch.testing.assert_close(value, response_log_probs(*case, chunk_tokens=3).detach(), rtol=0, atol=0)


# --- rows -------------------------------------------------------------------------------------------


def test_sums_and_means_by_hand():
    """Rows of 2 and 1 tokens, in any order; a row of none sums to 0 and has no mean."""
    values, rows = torch.tensor([1.0, 5.0, 2.0]), torch.tensor([0, 2, 0])
    assert [3.0, 0.0, 5.0] == sum_per_row(values, rows, 3).tolist()
    assert [1.5, 5.0] == mean_per_row(values, rows // 2, 2).tolist()
    with pytest.raises(DataError, match=r"^rows \[1\] of a batch of 3 have no response token; a response"):
        mean_per_row(values, rows, 3)


def test_scores_of_rows():
    """Sums of both sides and tokens; the student's have a gradient, the teacher's never."""
    student = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    teacher = torch.tensor([-1.0, -1.0, -3.0], requires_grad=True)
    rows = torch.tensor([0, 0, 1])
    found = response_scores(student, teacher, rows, 2)
    assert ([-3.0, -4.0], [-2.0, -3.0], [2, 1]) == (
        found.student.tolist(),
        found.teacher.tolist(),
        found.tokens.tolist(),
    )
    assert found.student.requires_grad and not found.teacher.requires_grad
    with pytest.raises(DataError, match=r"rows \[2, 3\] of a batch of 4"):
        response_scores(student, teacher, rows, 4)
    assert found.quality is None and replace(found, quality=torch.ones(2)).quality is not None
