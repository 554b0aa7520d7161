"""What is kept of the teacher's distribution: the published sets, exact scalars, unbiased draws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix import truncation
from ddkmix.batch import DenseSignal, EnsembleSignal, Head
from ddkmix.errors import NumericsError
from ddkmix.logits_store.card import Kept
from ddkmix.losses import ForwardKL
from ddkmix.truncation import seeded_uniforms, truncate, truncate_said

TOP_P_K = Kept(keep="top_p_k", p=0.95, k=50, log_prob_bytes=1)
DRAWN = Kept(keep="drawn", draws=12, log_prob_bytes=1)
BOTH = Kept(keep="top_k_drawn", k=3, draws=8, log_prob_bytes=1)
LABEL = torch.tensor([0])


def logits_of(probabilities):
    """Logits whose softmax is this; one token."""
    return torch.tensor([probabilities]).log()


def random_logits(n, classes, *, seed=0, scale=3.0):
    """Logits of n tokens."""
    return scale * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


def uniforms(n, draws, seed=0):
    """Random numbers for n tokens."""
    return torch.from_numpy(seeded_uniforms(seed, n, draws))


def used(signal, token=0):
    """The classes that are kept of a token, in order."""
    return signal.ids[token][signal.log_probs[token] > -math.inf].tolist()


def published(probabilities, p, k):
    """top-p-k as arXiv 2410.16215 has it: the smallest prefix of mass p, truncated to k."""
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
    kept, mass = [], 0.0
    for i in order:
        if kept and (mass >= p or len(kept) == k):
            break
        kept.append(i)
        mass += probabilities[i]
    return kept


@pytest.mark.parametrize(
    ("p", "k", "expected"),
    [
        (0.95, 50, [1, 3, 0, 2]),
        (0.9, 50, [1, 3, 0]),  # 0.5 + 0.3 + 0.12 = 0.92
        (0.8, 50, [1, 3, 0]),  # in float32, 0.5 + 0.3 is a little less than 0.8
        (0.79, 50, [1, 3]),
        (0.1, 50, [1]),
        (0.95, 2, [1, 3]),
        (1.0, 50, [1, 3, 0, 2]),
    ],
)
def test_the_smallest_prefix_with_the_mass_is_kept(p, k, expected):
    """At least one class, at most k, likeliest first."""
    kept = Kept(keep="top_p_k", p=p, k=k, log_prob_bytes=1)
    signal = truncate(logits_of([0.12, 0.5, 0.08, 0.3]), LABEL, kept)
    assert expected == used(signal)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([5, 63, 64, 65, 700, 1500]),
    st.floats(0.05, 1.0),
    st.integers(1, 60),
)
def test_top_p_k_is_the_published_set(seed, classes, p, k):
    """Whatever the vocabulary's size is against the blocks in which the largest logits are looked for."""
    logits = random_logits(1, classes, seed=seed)
    signal = truncate(logits, LABEL, Kept(keep="top_p_k", p=p, k=min(k, classes), log_prob_bytes=1))
    exact = logits[0].double().softmax(-1)
    expected = published(exact.tolist(), p, k)
    if abs(exact[expected].sum() - p) > 1e-5 and abs(exact[expected[:-1]].sum() - p) > 1e-5:
        assert expected == used(signal)


def test_scalars_are_those_of_the_whole_distribution():
    """In float64: true log-probabilities, loss, entropy, and log sum p^(1/temperature)."""
    logits, labels = random_logits(40, 1000), torch.arange(40)
    temperatures = (0.5, 1.7, 2.0, 3.0, 4.0)
    signal = truncate(logits, labels, TOP_P_K, temperatures)
    log_p = logits.double().log_softmax(-1)
    kept = signal.log_probs > -math.inf
    torch.testing.assert_close(log_p.gather(1, signal.ids)[kept].float(), signal.log_probs[kept])
    torch.testing.assert_close(-log_p.gather(1, labels[:, None])[:, 0].float(), signal.teacher_nats)
    torch.testing.assert_close(-(log_p.exp() * log_p).sum(-1).float(), signal.entropy, atol=2e-6, rtol=1e-5)
    for t in temperatures:
        expected = (log_p / t).logsumexp(-1).float()
        torch.testing.assert_close(expected, signal.log_z[t], atol=2e-6, rtol=1e-5)


def test_the_logits_are_not_touched():
    """Passes over the vocabulary overwrite a copy."""
    logits = random_logits(3, 200)
    before = logits.clone()
    truncate(logits, torch.zeros(3, dtype=torch.int64), BOTH, (2.0,), uniforms=uniforms(3, 8))
    assert torch.equal(before, logits)


@pytest.mark.parametrize("kept", [TOP_P_K, DRAWN, BOTH])
def test_chunks_change_nothing(kept, monkeypatch):
    """A token's record does not depend on how many are looked at together."""
    logits, labels, random = random_logits(9, 300), torch.arange(9), uniforms(9, kept.draws or 1)
    whole = truncate(logits, labels, kept, (2.0,), uniforms=random)
    monkeypatch.setitem(truncation._CHUNK_BYTES, "cpu", 1)
    single = truncate(logits, labels, kept, (2.0,), uniforms=random)
    assert torch.equal(whole.ids, single.ids)
    assert torch.equal(whole.log_probs, single.log_probs)
    assert torch.equal(whole.entropy, single.entropy)
    assert torch.equal(whole.log_z[2.0], single.log_z[2.0])


def test_excluded_classes_are_never_kept():
    """A logit of -inf is a probability of 0: fine, but no entry, even where fewer than k classes remain."""
    logits = logits_of([0.5, 0.0, 0.25, 0.25, 0.0])
    signal = truncate(logits, torch.tensor([1]), Kept(keep="top_k", k=5, log_prob_bytes=1), (2.0,))
    assert {0, 2, 3} == set(used(signal))
    assert 1.5 * math.log(2) == pytest.approx(signal.entropy.item())
    assert math.inf == signal.teacher_nats.item()
    expected = math.log(math.sqrt(0.5) + 1.0)
    assert expected == pytest.approx(signal.log_z[2.0].item())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error_that_names_the_token(bad):
    """Before anything is drawn from them, wherever in the vocabulary they are."""
    logits = random_logits(5, 700)
    logits[3, 650] = bad
    with pytest.raises(NumericsError, match=r"row 3: the teacher's largest logit is (nan|inf)"):
        truncate(logits, torch.zeros(5, dtype=torch.int64), TOP_P_K, name=lambda i: f"row {i}")


def test_a_token_without_any_class_is_an_error():
    """All logits -inf: there is no distribution."""
    with pytest.raises(NumericsError, match="token 0: the teacher's largest logit is -inf"):
        truncate(torch.full((1, 9), -math.inf), LABEL, TOP_P_K)


@pytest.mark.parametrize("kept", [TOP_P_K, DRAWN, BOTH])
def test_no_tokens_give_an_empty_signal(kept):
    """A row of padding predicts nothing."""
    empty = torch.zeros(0, dtype=torch.int64)
    signal = truncate(torch.zeros(0, 70), empty, kept, (2.0,), uniforms=uniforms(0, kept.draws or 1))
    assert 0 == len(signal.ids) == len(signal.log_z[2.0])


# --- draws ------------------------------------------------------------------------------------------


def test_draws_come_from_the_content_alone():
    """The same row of the same shard in the same store gives the same numbers, any other different ones."""
    first = seeded_uniforms(["key", "sha", 3], 5, 4)
    assert np.array_equal(first, seeded_uniforms(["key", "sha", 3], 5, 4))
    for other in (["key", "sha", 4], ["key", "other", 3], ["other", "sha", 3]):
        assert not np.array_equal(first, seeded_uniforms(other, 5, 4))
    assert 0 <= first.min() <= first.max() < 1


def test_a_draw_inverts_the_cumulative_distribution():
    """p = (1/2, 1/4, 0, 1/4): 0.49 falls on class 0, 0.5 on class 1, 0.75 and 0.999 on class 3."""
    numbers = torch.tensor([[0.0, 0.49, 0.5, 0.74, 0.75, 0.999]], dtype=torch.float64)
    kept = Kept(keep="drawn", draws=6, log_prob_bytes=1)
    signal = truncate(logits_of([0.5, 0.25, 0.0, 0.25]), LABEL, kept, uniforms=numbers)
    assert [0, 1, 3] == used(signal)
    assert [2, 2, 2, 0, 0, 0] == signal.draws[0].tolist()
    assert [1.0] == signal.drawn_mass.tolist()


@pytest.mark.parametrize("number", [0.0, 0.5, np.nextafter(1.0, 0.0)])
def test_no_draw_falls_on_a_class_without_mass(number):
    """Not at either end, where rounding could reach over the edge, nor on the padding of the last block."""
    logits = torch.full((1, 130), -math.inf)
    logits[0, 70:75] = torch.tensor([0.0, -1.0, -2.0, -3.0, -40.0])
    kept = Kept(keep="drawn", draws=1, log_prob_bytes=1)
    signal = truncate(
        logits, torch.tensor([70]), kept, uniforms=torch.tensor([[number]], dtype=torch.float64)
    )
    assert 70 <= signal.ids[0, 0] < 75
    assert signal.log_probs[0, 0] > -math.inf


def test_draws_beside_kept_classes_are_of_others():
    """The mass from which they were made is what the kept classes leave."""
    logits = random_logits(30, 400)
    signal = truncate(logits, torch.zeros(30, dtype=torch.int64), BOTH, uniforms=uniforms(30, 8))
    for token in range(30):
        exact, drawn = signal.ids[token, :3].tolist(), signal.ids[token, 3:][signal.draws[token, 3:] > 0]
        assert not set(exact) & set(drawn.tolist())
    assert [8] * 30 == signal.draws.sum(1).tolist()
    rest = 1 - logits.double().softmax(-1).topk(3).values.sum(-1)
    torch.testing.assert_close(rest.float(), signal.drawn_mass)


def test_where_nothing_is_left_nothing_is_drawn():
    """Three classes have all the mass: no entry beside them, and none is counted."""
    logits = torch.full((1, 100), -math.inf)
    logits[0, :3] = 0.0
    signal = truncate(logits, LABEL, BOTH, uniforms=uniforms(1, 8))
    assert {0, 1, 2} == set(used(signal))
    assert 0 == signal.draws.sum() == signal.drawn_mass.sum()


@pytest.mark.parametrize("kept", [DRAWN, BOTH])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_expected_gradient_of_drawn_classes_is_the_dense_one(kept, temperature):
    """Over 4,000 captures of one token the mean gradient of the forward KL is within five standard errors of
    the dense one at every class, and the mean value likewise."""
    tokens, classes = 4000, 30
    teacher, student = random_logits(1, classes, scale=2.0), random_logits(1, classes, seed=1)
    labels = torch.zeros(tokens, dtype=torch.int64)
    signal = truncate(teacher.expand(tokens, -1), labels, kept, (2.0,), uniforms=uniforms(tokens, kept.draws))
    loss = ForwardKL(temperature=temperature)
    dense = student.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(dense, teacher, labels[:1]).sum(), dense)
    many = student.repeat(tokens, 1).requires_grad_()
    values = loss(many, signal, labels)
    (found,) = torch.autograd.grad(values.sum(), many)
    error = found.std(0) / math.sqrt(tokens)
    assert ((found.mean(0) - expected[0]).abs() <= 5 * error + 1e-5).all()
    (value,) = loss(student, teacher, labels[:1]).tolist()
    assert value == pytest.approx(values.mean().item(), abs=5 * values.std().item() / math.sqrt(tokens))


def test_the_tails_are_biased_and_the_bucket_least():
    """Why it is the default: relative error of the gradient that each treatment of the rest gives, on a
    teacher of whose mass 16 classes hold most."""
    from dataclasses import replace

    teacher, student = random_logits(50, 400, scale=2.0), random_logits(50, 400, seed=1, scale=0.5)
    student = teacher + student
    labels = torch.zeros(50, dtype=torch.int64)
    kept = truncate(teacher, labels, Kept(keep="top_k", k=16, log_prob_bytes=1))

    def gradient(said):
        variable = student.clone().requires_grad_()
        return torch.autograd.grad(ForwardKL()(variable, said, labels).sum(), variable)[0]

    dense = gradient(teacher)
    errors = {
        tail: ((gradient(replace(kept, tail=tail)) - dense).norm() / dense.norm()).item()
        for tail in ("bucket", "renormalize", "drop")
    }
    assert errors["bucket"] < 0.5 * errors["drop"] < 0.5 * errors["renormalize"]


# --- from hidden states -----------------------------------------------------------------------------


def test_hidden_states_of_a_teacher_are_truncated_in_parts(monkeypatch):
    """Scale, soft cap and the number of classes are the head's; chunks of tokens change nothing."""
    hidden, weight = torch.randn(11, 8), torch.randn(90, 8)
    head = Head(weight=weight, bias=torch.randn(90), scale=0.5, softcap=3.0, vocab_size=80)
    said = DenseSignal(hidden=hidden, head=head)
    logits = head.finish(hidden @ weight[:80].T + head.bias[:80])
    labels = torch.arange(11)
    expected = truncate(logits, labels, TOP_P_K, (2.0,))
    monkeypatch.setattr(truncation, "_PROJECTED_TOKENS", 4)
    actual = truncate_said(said, labels, TOP_P_K, (2.0,))
    torch.testing.assert_close(expected.log_probs, actual.log_probs)
    torch.testing.assert_close(expected.teacher_nats, actual.teacher_nats)
    with pytest.raises(NumericsError, match="token 9"):
        broken = hidden.clone()
        broken[9] = math.nan
        truncate_said(DenseSignal(hidden=broken, head=head), labels, TOP_P_K)


def test_an_ensemble_is_truncated_as_one_distribution():
    """The weighted mean of log-probabilities, normalised."""
    members = tuple(DenseSignal(hidden=torch.randn(5, 8), head=Head(weight=torch.randn(70, 8))) for _ in "ab")
    labels = torch.arange(5)
    signal = truncate_said(EnsembleSignal(members=members, weights=(0.25, 0.75)), labels, TOP_P_K)
    mean = sum(
        w * (m.hidden @ m.head.weight.T).log_softmax(-1) for m, w in zip(members, (0.25, 0.75), strict=True)
    )
    expected = -mean.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(expected, signal.teacher_nats)
