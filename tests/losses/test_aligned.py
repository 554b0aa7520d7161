"""Losses of aligned spans against whole matrices of logits, and the merging of spans, in float64."""

import math

import pytest
import torch

from ddkmix.batch import CrossSignal, DenseSignal, Head
from ddkmix.losses import GOLD, ULD, CrossEntropy, LossTerm
from ddkmix.losses.aligned import aligned_objective, is_across, merged
from tests.losses.test_chunked import Allocations

HIDDEN, CLASSES, THEIRS = 4, 7, 9
SPANS = torch.tensor([[1, 2, 0, 2], [2, 5, 2, 3], [6, 8, 5, 8], [8, 9, 8, 9]])
"""Of nine student's and nine teacher's tokens; tokens 0 and 5 of the student are in none."""
TERMS = (LossTerm("uld", 1.5, ULD()), LossTerm("gold", 0.5, GOLD(merge="bayesian", temperature=2.0)))


def make_case(seed=0, terms=TERMS, bias=True, **head):
    """Arguments of `aligned_objective` in float64, with leaves for its gradients."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "hidden": random(9, HIDDEN).requires_grad_(),
        "head": Head(
            weight=random(CLASSES, HIDDEN).requires_grad_(),
            bias=random(CLASSES).requires_grad_() if bias else None,
            **head,
        ),
        "labels": torch.randint(CLASSES - 1, (9,), generator=generator),
        "token_weight": torch.rand(9, generator=generator, dtype=torch.float64),
        "terms": terms,
        "signal": CrossSignal(
            teacher=DenseSignal(hidden=random(9, 3), head=Head(weight=random(THEIRS, 3))),
            labels=torch.randint(THEIRS, (9,), generator=generator),
            spans=SPANS,
            pairs=torch.tensor([[0, 3], [2, 2], [5, 8]]),
        ),
    }


def literal_merged(log_probs, labels, start, stop, merge):
    """One token after the other: the distribution at the base, times the probabilities of the others."""
    base = stop - 1 if merge == "bayesian" else start
    result = log_probs[base].exp()
    for token in range(start, stop):
        if token != base and merge != "none":
            result = result * log_probs[token, labels[token]].exp()
    return result


def literal(case):
    """Objective and values from whole logits and a loop over spans."""
    head, signal = case["head"], case["signal"]
    z = case["hidden"] @ head.weight.T + (0 if head.bias is None else head.bias)
    z = head.finish(z[:, : head.vocab_size])
    y = signal.teacher.hidden @ signal.teacher.head.weight.T
    objective = torch.zeros((), dtype=torch.float64)
    values = torch.zeros(len(case["terms"]), 9, dtype=torch.float64)
    for k, term in enumerate(case["terms"]):
        log_q, log_p = ((x / term.loss.temperature).log_softmax(-1) for x in (z, y))
        for start, stop, their_start, their_stop in signal.spans.tolist():
            q = literal_merged(log_q, case["labels"], start, stop, term.loss.merge)
            p = literal_merged(log_p, signal.labels, their_start, their_stop, term.loss.merge)
            value = term.loss.across(q[None], p[None], signal.pairs)[0]
            objective = objective + term.weight * case["token_weight"][start] * value
            values[k, start] = value.detach()
    return objective, values


def gradients(case):
    """Of hidden states, output weights and bias, which are then forgotten."""
    leaves = [case["hidden"], case["head"].weight, case["head"].bias]
    found = [leaf.grad.clone() for leaf in leaves if leaf is not None]
    for leaf in leaves:
        if leaf is not None:
            leaf.grad = None
    return found


@pytest.mark.parametrize("chunk_tokens", [1, 3, 1000])
@pytest.mark.parametrize(
    "head",
    [{}, {"bias": False, "scale": 0.5, "softcap": 3.0}, {"vocab_size": 6}],
    ids=["plain", "capped", "cut"],
)
def test_value_and_gradients_are_the_literal_ones(chunk_tokens, head):
    """Any chunks, scaled, capped and cut heads, with and without a bias."""
    case = make_case(**head)
    objective, expected = literal(case)
    objective.backward()
    truth = gradients(case)
    ours, values = aligned_objective(**case, chunk_tokens=chunk_tokens)
    (3 * ours).backward()
    assert objective.item() == pytest.approx(ours.item(), rel=1e-12)
    torch.testing.assert_close(expected, values, rtol=1e-9, atol=1e-12)
    for theirs, gradient in zip(truth, gradients(case), strict=True):
        torch.testing.assert_close(3 * theirs, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("merge", ["observed", "bayesian"])
def test_merging_multiplies_what_the_other_tokens_were_given(merge):
    """Three tokens with p(label) = 1/2, 1/4, 1/8 each: the base stays, the two others scale it."""
    probs = torch.tensor([[1 / 2, 1 / 2], [1 / 4, 3 / 4], [1 / 8, 7 / 8]])
    start, stop = torch.tensor([0]), torch.tensor([3])
    actual = merged(probs.log(), torch.zeros(3, dtype=torch.int64), start, stop, merge)
    base, others = (0, 1 / 32) if merge == "observed" else (2, 1 / 8)
    assert (probs[base] * others).tolist() == pytest.approx(actual[0].tolist())


def test_the_chain_rule_makes_bayesian_merging_a_probability_of_text():
    """At the last token's label it is the probability of the whole span, in either tokenisation."""
    probs = torch.rand(4, 5, dtype=torch.float64).softmax(-1)
    labels = torch.tensor([1, 4, 0, 2])
    span = merged(probs.log(), labels, torch.tensor([1]), torch.tensor([4]), "bayesian")
    expected = math.prod(probs[i, labels[i]].item() for i in (1, 2, 3))
    assert expected == pytest.approx(span[0, labels[3]].item())


def test_other_merging_would_be_noticed():
    """The comparison above can fail: the two ways differ on every span of several tokens."""
    values = [
        aligned_objective(**make_case(terms=(LossTerm("gold", 1.0, GOLD(merge=merge)),)))[1][0]
        for merge in ("observed", "bayesian")
    ]
    several = [1, 2, 6]
    assert ((values[0] - values[1])[several].abs() > 1e-4).all()
    assert values[0][8] == values[1][8] != 0


def test_tokens_outside_the_spans_have_no_value_and_no_gradient():
    """Nobody compares them: a row's first span and the rest of a character at its end."""
    case = make_case()
    objective, values = aligned_objective(**case)
    objective.backward()
    outside = [0, 5]
    assert 0.0 == values[:, outside].abs().sum() == case["hidden"].grad[outside].abs().sum()
    assert [1, 2, 6, 8] == values[0].nonzero()[:, 0].tolist()


def test_a_text_without_a_common_byte_is_no_loss():
    """No span: 0, with gradients of 0 that DDP can reduce."""
    case = make_case()
    object.__setattr__(case["signal"], "spans", torch.zeros(0, 4, dtype=torch.int64))
    objective, values = aligned_objective(**case)
    objective.backward()
    assert (0.0, 0.0) == (objective.item(), values.abs().sum().item())
    assert not case["hidden"].grad.any()


def test_without_gradients_the_values_are_the_same():
    """Evaluation and training measure the same; a frozen head gets none."""
    case = make_case()
    expected = aligned_objective(**case)[1]
    with torch.no_grad():
        objective, values = aligned_objective(**case)
    assert not objective.requires_grad
    torch.testing.assert_close(expected, values, rtol=0, atol=0)
    case["head"].weight.requires_grad_(False)
    aligned_objective(**case)[0].backward()
    assert case["head"].weight.grad is None
    assert case["hidden"].grad.any()


def test_a_second_backward_pass_is_refused():
    """Gradients are handed out once."""
    objective, _ = aligned_objective(**make_case())
    objective.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already taken"):
        objective.backward()


def test_no_tensor_of_tokens_by_vocabulary_is_made():
    """64 tokens of 300 classes, four at a time: nothing exceeds the output weights; a chunk of all does."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 8, generator=generator), torch.randn(300, 8, generator=generator)
    steps = torch.arange(64)
    signal = CrossSignal(
        teacher=DenseSignal(hidden=hidden, head=Head(weight=weight)),
        labels=steps,
        spans=torch.stack([steps, steps + 1, steps, steps + 1], dim=1),
        pairs=torch.tensor([[0, 0]]),
    )
    largest = {}
    for size in (4, 64):
        leaf = hidden.clone().requires_grad_()
        with Allocations() as seen:
            head = Head(weight=weight.clone().requires_grad_())
            aligned_objective(leaf, head, steps, torch.ones(64), TERMS, signal, chunk_tokens=size)[
                0
            ].backward()
        largest[size] = seen.elements
    assert largest[4] <= 300 * 8 < 64 * 300 <= largest[64]


def test_terms_across_vocabularies_are_told_by_what_they_accept():
    """Cross-entropy and divergences over one vocabulary are not."""
    assert [True, True] == [is_across(term) for term in TERMS]
    assert not is_across(LossTerm("cross_entropy", 1.0, CrossEntropy()))
