"""MiniLLM against the exact gradient of KL(q || p) over all responses, and against its authors' lines."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.batch import DenseSignal, Head
from ddkmix.errors import ConfigError
from ddkmix.losses.objective import distillation_objective
from ddkmix.plugins import build
from ddkmix.preference.minillm import MiniLLM, mixed_log_probs

SETTINGS = settings(deadline=None, derandomize=True, max_examples=40)
CLASSES, STEPS = 3, 3
RELEASED = MiniLLM(
    own_step=True,
    weigh_single_step=False,
    discount=0.95,
    reward_divisor=0.5,
    reward_clip=100.0,
    ratio_clip=0.2,
    whiten=True,
)
"""What the authors' script for GPT2 sets."""


# --- the exact gradient ------------------------------------------------------------------------------


def models(seed=0):
    """Logits of student (a leaf) and teacher after each context: the start, or the token before."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(CLASSES, CLASSES + 1, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return student.requires_grad_(), teacher


def responses(steps=STEPS):
    """All responses of some tokens, and the context of each token."""
    every = torch.tensor(list(itertools.product(range(CLASSES), repeat=steps)))
    contexts = torch.cat([torch.full((len(every), 1), CLASSES), every[:, :-1]], dim=1)
    return every, contexts


def log_probs(weight, tokens, contexts):
    """(B, T) log-probabilities of all tokens."""
    return weight.log_softmax(0)[tokens, contexts]


def exact(steps=STEPS):
    """The gradient of KL(q || p) = sum over all responses of q(y) log(q(y) / p(y))."""
    student, teacher = models()
    log_q, log_p = (log_probs(weight, *responses(steps)).sum(-1) for weight in (student, teacher))
    return torch.autograd.grad((log_q.exp() * (log_q - log_p)).sum(), student)[0]


def expected(minillm, steps=STEPS):
    """The mean of our gradient over all responses, each as often as it is drawn."""
    student, teacher = models()
    tokens, contexts = responses(steps)
    log_q, log_p = (log_probs(weight, tokens, contexts).detach() for weight in (student, teacher))
    sampled = mixed_log_probs(log_q, log_p, minillm.teacher_share)
    advantages = minillm.advantages(log_q, log_p, torch.ones_like(tokens, dtype=torch.bool))
    drawn = sampled.sum(-1, keepdim=True).exp().expand(-1, steps)
    weights = drawn.flatten() * minillm.token_weights(
        log_q.flatten(), sampled.flatten(), advantages.flatten()
    )
    hidden = torch.eye(CLASSES + 1, dtype=torch.float64)[contexts.flatten()]
    signal = DenseSignal(hidden=hidden, head=Head(weight=teacher))
    objective, _ = distillation_objective(
        hidden, Head(weight=student), tokens.flatten(), weights, MiniLLM.terms, signal=signal, chunk_tokens=5
    )
    return torch.autograd.grad(objective, student)[0]


def test_on_average_it_is_the_gradient_of_the_reverse_kl_of_responses():
    """Sampled from the student, lengths left in: the decomposition is exact."""
    plain = MiniLLM(teacher_share=0.0, length_normalize=False)
    torch.testing.assert_close(expected(plain), exact(), rtol=1e-9, atol=1e-12)


def test_without_the_decomposition_it_is_so_too():
    """REINFORCE with each token's own reward: the same mean, with more variance."""
    plain = MiniLLM(teacher_share=0.0, length_normalize=False, single_step=False, own_step=True)
    torch.testing.assert_close(expected(plain), exact(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
def test_importance_weights_undo_the_mixing_of_one_step(share):
    """Responses of one token, drawn with any share of the teacher: exact; for longer ones w_t is the paper's
    approximation."""
    torch.testing.assert_close(expected(MiniLLM(teacher_share=share), 1), exact(1), rtol=1e-9, atol=1e-12)
    assert share == 0.0 or not torch.allclose(
        expected(MiniLLM(teacher_share=share, length_normalize=False)), exact(), rtol=0.01
    )


@pytest.mark.parametrize(
    "broken",
    [
        MiniLLM(teacher_share=0.0, length_normalize=False, own_step=True),
        MiniLLM(teacher_share=0.0),
        MiniLLM(teacher_share=0.0, length_normalize=False, discount=0.9),
        MiniLLM(teacher_share=0.2, length_normalize=False, weigh_single_step=False),
    ],
    ids=["own step twice", "lengths out", "discount", "no weight on the exact term"],
)
def test_the_authors_additions_change_the_gradient(broken):
    """Each of them, so the comparison can fail; they are off by default but for lengths."""
    assert not torch.allclose(expected(broken), exact(), rtol=0.01)


# --- the authors' lines ------------------------------------------------------------------------------


def authors_advantages(log_q, log_p, mask, gamma, scaling, clip, whitening):
    """`run_sample` and `_get_advantages_and_returns` of LMOps/minillm, row by row, without padding."""
    rows = []
    for q, p, there in zip(log_q.tolist(), log_p.tolist(), mask.tolist(), strict=True):
        rewards = [(b - a) / scaling for a, b, m in zip(q, p, there, strict=True) if m]
        rewards = [min(max(reward, -clip), clip) for reward in rewards]
        last, found = 0.0, []
        for t in reversed(range(len(rewards))):
            last = rewards[t] + gamma * last
            found.append(last / (len(rewards) - t))
        rows.append(found[::-1])
    every = [value for row in rows for value in row]
    mean = sum(every) / len(every)
    var = sum((value - mean) ** 2 for value in every) / len(every)
    if whitening:
        rows = [[(value - mean) / math.sqrt(var + 1e-8) for value in row] for row in rows]
    return rows


def batch(seed=0):
    """Log-probabilities of three responses of 4, 1 and 6 tokens behind prompts of different length."""
    generator = torch.Generator().manual_seed(seed)
    log_q, log_p = (-3 * torch.rand(3, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 2:6], mask[1, 3:4], mask[2, 1:7] = True, True, True
    return log_q, log_p, mask


@pytest.mark.parametrize("whitening", [True, False])
def test_with_the_released_options_advantages_are_the_authors(whitening):
    """Division, clipping, discount, own step, remaining length, whitening; padding counts nothing."""
    log_q, log_p, mask = batch()
    released = MiniLLM(own_step=True, discount=0.95, reward_divisor=0.5, reward_clip=2.0, whiten=whitening)
    found = released.advantages(log_q, log_p, mask)
    expected = authors_advantages(log_q, log_p, mask, 0.95, 0.5, 2.0, whitening)
    for row, there, wanted in zip(found, mask, expected, strict=True):
        assert wanted == pytest.approx(row[there].tolist())
        assert not row[~there].any()


@SETTINGS
@given(log_ratio=st.floats(-2, 2), advantage=st.floats(-3, 3), clip=st.sampled_from([0.1, 0.2, 0.5]))
def test_the_weight_of_the_reward_is_the_derivative_of_the_clipped_objective(log_ratio, advantage, clip):
    """max(-A rho, -A clip(rho)) by log q, where rho = q / p~ now; -weight of grad log q."""
    log_q = torch.tensor([log_ratio - 1.0], dtype=torch.float64, requires_grad=True)
    sampled, by = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    ratio = (log_q - sampled).exp()
    loss = torch.maximum(-by * ratio, -by * ratio.clamp(1 - clip, 1 + clip))
    (wanted,) = torch.autograd.grad(loss.sum(), log_q)
    inside = abs(abs(ratio.item() - 1) - clip) > 1e-9 and advantage != 0
    _, weight = MiniLLM(ratio_clip=clip).token_weights(log_q, sampled, by)
    if inside:
        assert wanted.item() == pytest.approx(-weight.item())


# --- by hand ----------------------------------------------------------------------------------------


def test_returns_by_hand():
    """Rewards 1, 2, 6: after the first 8 or their mean 4, after the second 6, after the last nothing."""
    log_q, mask = torch.zeros(1, 4), torch.tensor([[True, True, True, False]])
    log_p = torch.tensor([[1.0, 2.0, 6.0, 99.0]])
    assert [4.0, 6.0, 0.0, 0.0] == MiniLLM().advantages(log_q, log_p, mask)[0].tolist()
    sums = MiniLLM(length_normalize=False)
    assert [8.0, 6.0, 0.0, 0.0] == sums.advantages(log_q, log_p, mask)[0].tolist()
    own = MiniLLM(length_normalize=False, own_step=True, discount=0.5)
    assert [3.5, 5.0, 6.0, 0.0] == own.advantages(log_q, log_p, mask)[0].tolist()
    clipped = MiniLLM(length_normalize=False, reward_divisor=0.5, reward_clip=3.0)
    assert [6.0, 3.0, 0.0, 0.0] == clipped.advantages(log_q, log_p, mask)[0].tolist()


def test_weights_by_hand():
    """q = 1/2, p = 1: p~ = 0.2 x 1 + 0.8 x 1/2 = 0.6, w = 5/6; with an advantage of -3, -5/2."""
    log_q, log_p = torch.tensor([0.5]).log(), torch.zeros(1)
    sampled = mixed_log_probs(log_q, log_p, 0.2)
    assert [0.6] == pytest.approx(sampled.exp().tolist())
    weights = MiniLLM().token_weights(log_q, sampled, torch.tensor([-3.0]))
    assert [5 / 6, -2.5] == pytest.approx(weights[:, 0].tolist())
    unweighted = RELEASED.token_weights(log_q, sampled, torch.tensor([-3.0]))
    assert [1.0, -2.5] == pytest.approx(unweighted[:, 0].tolist())
    plain = MiniLLM(single_step=False, own_step=True).token_weights(log_q, sampled, torch.tensor([-3.0]))
    assert [0.0, -2.5] == pytest.approx(plain[:, 0].tolist())


@SETTINGS
@given(log_q=st.floats(-40, 0), log_p=st.floats(-40, 0), share=st.floats(0, 0.9))
def test_an_importance_weight_is_at_most_one_over_the_students_share(log_q, log_p, share):
    """p~ is at least (1 - a) q: w <= 1.25 at the paper's a, however sure the student is of nonsense."""
    q, p = (torch.tensor([value], dtype=torch.float64) for value in (log_q, log_p))
    weights = MiniLLM(teacher_share=share).token_weights(q, mixed_log_probs(q, p, share), torch.ones(1))
    assert 0 <= weights[0].item() <= 1 / (1 - share) * (1 + 1e-12)


def test_nothing_here_has_a_gradient():
    """Neither rewards nor weights, whatever has one before them (TRL's port lets it flow)."""
    log_q, log_p, mask = batch()
    log_q.requires_grad_()
    advantages = MiniLLM().advantages(log_q, log_p, mask)
    weights = MiniLLM().token_weights(log_q[mask], log_p[mask], advantages[mask])
    assert not advantages.requires_grad and not weights.requires_grad


@SETTINGS
@given(
    logits=st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30)), min_size=2, max_size=9),
    share=st.floats(0, 1),
)
def test_a_mixture_is_a_distribution_between_both(logits, share):
    """It sums to 1, is the literal a p + (1 - a) q, and is exactly one side at share 0 and 1."""
    log_q, log_p = (
        torch.tensor(side, dtype=torch.float64).log_softmax(0) for side in zip(*logits, strict=True)
    )
    mixed = mixed_log_probs(log_q, log_p, share).exp()
    assert 1.0 == pytest.approx(mixed.sum().item())
    torch.testing.assert_close(mixed, share * log_p.exp() + (1 - share) * log_q.exp())
    assert mixed_log_probs(log_q, log_p, 0.0).tolist() == log_q.tolist()
    assert mixed_log_probs(log_q, log_p, 1.0).tolist() == log_p.tolist()


def test_a_class_that_both_exclude_stays_excluded():
    """-inf, not nan; one that only one side has, has its share."""
    log_q, log_p = torch.tensor([-math.inf, -math.inf, 0.0]), torch.tensor([-math.inf, 0.0, -math.inf])
    assert [0.0, 0.25, 0.75] == pytest.approx(mixed_log_probs(log_q, log_p, 0.25).exp().tolist())


def test_a_contradiction_is_one_line():
    """Without the exact term, returns from the next token leave each token's own reward out."""
    table = {"minillm": MiniLLM}
    assert MiniLLM(discount=0.9) == build({"name": "minillm", "discount": 0.9}, table, where="objective")
    with pytest.raises(ConfigError, match=r"without single_step the return must begin at its own token"):
        build({"name": "minillm", "single_step": False}, table, where="objective")


def test_rows_of_padding_alone_are_nobodys_tokens():
    """A row without a response has no advantage, and does not touch the others'."""
    log_q, log_p, mask = batch()
    mask[1] = False
    found = MiniLLM().advantages(log_q, log_p, mask)
    assert not found[1].any()
    torch.testing.assert_close(found[0], MiniLLM().advantages(*batch())[0], rtol=0, atol=0)
