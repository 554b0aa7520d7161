"""Objectives of responses inside the student, against whole logits, autograd and the papers' formulas."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddkmix.batch import RoutedSignal
from ddkmix.distillation import DistillationModel
from ddkmix.errors import DataError
from ddkmix.preference import IPO, Dpkd, PladMargin, PladRanking
from ddkmix.preference.contrastive import ContrastiveSkew
from ddkmix.preference.minillm import MiniLLM
from ddkmix.preference.rewards import PAIR_MEASURES
from ddkmix.preference.steps import PairStep, PolicyGradientStep, SkewStep, with_quality
from ddkmix.sources import IGNORE
from ddkmix.teacher import DomainTeachers, EnsembleTeacher, LiveTeacher, SignalSource
from tests.generation.models import CLASSES, small_model

CLOSE = {"rtol": 1e-4, "atol": 1e-7}
"""Of gradients: shares of tokens and the teacher's log-probabilities are float32, all else is float64."""

PROMPTS, RESPONSES, DOMAINS = (3, 3, 1, 1, 2, 2), (4, 2, 1, 5, 3, 3), (0, 0, 1, 1, 0, 0)
"""Tokens of six rows' prompts and responses, and the rows' domains: three pairs."""


def make_batch(seed: int = 0) -> dict[str, Tensor]:
    """Six rows of random tokens, padded; labels are the responses."""
    generator = torch.Generator().manual_seed(seed)
    width = max(p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)) + 1
    ids = torch.randint(CLASSES, (len(PROMPTS), width), generator=generator)
    labels = torch.full_like(ids, IGNORE)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        labels[row, prompt : prompt + response] = ids[row, prompt : prompt + response]
    return {"input_ids": ids, "labels": labels, "domain_ids": torch.tensor(DOMAINS)}


@torch.no_grad()
def written_by(batch: dict[str, Tensor], dense: Callable[[Tensor, int], Tensor]) -> dict[str, Tensor]:
    """The same with the likeliest responses of a writer."""
    ids, labels = batch["input_ids"].clone(), batch["labels"].clone()
    for row, domain in enumerate(DOMAINS):
        for t in (labels[row] != IGNORE).nonzero()[:, 0].tolist():
            ids[row, t] = labels[row, t] = dense(ids[row], domain)[t - 1].argmax()
    return {**batch, "input_ids": ids, "labels": labels}


@dataclass(frozen=True)
class Taught:
    """A teacher, and the same in whole log-probabilities."""

    source: SignalSource
    dense: Callable[[Tensor, int], Tensor]
    """(ids (T,), domain) -> (T, V) log p."""


def log_softmax_of(model: nn.Module, ids: Tensor) -> Tensor:
    """(T, V) of one row; whole logits."""
    found: Tensor = model(ids[None]).logits[0].log_softmax(-1)
    return found


@pytest.fixture(scope="module")
def models() -> list[nn.Module]:
    """A student and two teachers, in float64."""
    return [small_model(seed=seed, num_hidden_layers=1).double() for seed in (1, 2, 3)]


@pytest.fixture(scope="module", params=["one", "by domain", "ensemble"])
def taught(request: pytest.FixtureRequest, models: list[nn.Module]) -> Taught:
    """One teacher; a teacher for each of two domains; two teachers who speak together."""
    own = [LiveTeacher(model) for model in models[1:]]
    if request.param == "one":
        return Taught(own[0], lambda ids, domain: log_softmax_of(models[1], ids))
    if request.param == "by domain":
        return Taught(
            DomainTeachers(own, [0, 1]), lambda ids, domain: log_softmax_of(models[1 + domain], ids)
        )

    def mean(ids: Tensor, domain: int) -> Tensor:
        first, second = (log_softmax_of(model, ids) for model in models[1:])
        return (0.3 * first + 0.7 * second).log_softmax(-1)

    return Taught(EnsembleTeacher(own, [0.3, 0.7]), mean)


def dense_rows(student: nn.Module, taught: Taught, batch: dict[str, Tensor]) -> list[tuple[Tensor, ...]]:
    """Of each row: log q (n, V), log p (n, V) before each token of the response, and these tokens (n,)."""
    rows = []
    for ids, labels, domain in zip(*batch.values(), strict=True):
        places = (labels != IGNORE).nonzero()[:, 0]
        with torch.no_grad():
            log_p = taught.dense(ids, int(domain))[places - 1]
        rows.append((log_softmax_of(student, ids)[places - 1], log_p, labels[places]))
    return rows


def of_tokens(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Those of the tokens that are there."""
    return log_probs.gather(-1, tokens[:, None])[:, 0]


def gradients(student: nn.Module, objective: Tensor) -> list[Tensor]:
    """Of all parameters."""
    return list(torch.autograd.grad(objective, list(student.parameters())))


def ours(
    student: nn.Module, taught: Taught, batch: dict[str, Tensor], step: Any, weight: float, **options: Any
) -> tuple[Tensor, Tensor]:
    """Objective and values."""
    model = DistillationModel(student, **options)
    found: tuple[Tensor, Tensor] = model(
        batch["input_ids"], batch["labels"], weight, step, taught.source.signal(batch)
    )
    return found


def compare(student: nn.Module, expected: Tensor, actual: Tensor) -> None:
    """Gradients of two objectives, which are not 0."""
    for truth, found in zip(gradients(student, expected), gradients(student, actual), strict=True):
        assert truth.abs().max() > 1e-4
        torch.testing.assert_close(found, truth, **CLOSE)


def differ(student: nn.Module, expected: Tensor, actual: Tensor) -> bool:
    """Whether `compare` would notice."""
    pairs = zip(gradients(student, expected), gradients(student, actual), strict=True)
    return any(not torch.allclose(found, truth, **CLOSE) for truth, found in pairs)


# --- pairs -------------------------------------------------------------------------------------------------


def literal_dpkd(
    rows: list[tuple[Tensor, ...]], *, beta: float, nll: float, sign: float = 1.0, lengths: bool = True
) -> Tensor:
    """DPKD's Eq. 9 of each pair, and lambda times language modelling on the chosen response."""
    losses = []
    for chosen, rejected in zip(rows[::2], rows[1::2], strict=True):
        rewards = []
        for log_q, log_p, tokens in (chosen, rejected):
            total = of_tokens(log_q, tokens).sum() - of_tokens(log_p, tokens).sum()
            rewards.append(beta / (len(tokens) if lengths else 1) * total)
        preferred = -torch.log(torch.sigmoid(sign * (rewards[0] - rewards[1])))
        losses.append(preferred - nll * of_tokens(chosen[0], chosen[2]).mean())
    return torch.stack(losses)


@pytest.mark.parametrize("chunk_tokens", [None, 3])
def test_dpkd_is_equation_9(models: list[nn.Module], taught: Taught, chunk_tokens: int | None) -> None:
    """Value of every pair and gradient of every parameter, for any kind of teacher; with the sign turned, or
    without lengths, it is another one."""
    student, batch = models[0], make_batch()
    step = PairStep(loss=Dpkd(beta=0.7), weight=0.5, chosen_nll=0.3)
    objective, values = ours(student, taught, batch, step, 0.25, chunk_tokens=chunk_tokens)
    expected = literal_dpkd(dense_rows(student, taught, batch), beta=0.7, nll=0.3)
    torch.testing.assert_close(values[0] + 0.3 * values[1], expected.detach(), rtol=1e-6, atol=1e-6)
    assert objective.item() == pytest.approx(0.25 * 0.5 * expected.sum().item(), rel=1e-6)
    assert [0.5, 0.15, *[0.0] * 6] == pytest.approx(step.weights)
    assert (len(step.weights), 3) == values.shape == (2 + len(PAIR_MEASURES), 3)
    compare(student, 0.125 * expected.sum(), objective)


@pytest.mark.parametrize("broken", [{"sign": -1.0}, {"lengths": False}, {"nll": 0.0}])
def test_another_equation_would_be_noticed(models: list[nn.Module], broken: dict[str, Any]) -> None:
    """The comparison above fails when the sign is turned, lengths are left in, or the anchor is left out."""
    student, batch = models[0], make_batch()
    taught = Taught(LiveTeacher(models[1]), lambda ids, domain: log_softmax_of(models[1], ids))
    step = PairStep(loss=Dpkd(beta=0.7), weight=1.0, chosen_nll=0.3)
    objective, _ = ours(student, taught, batch, step, 1.0)
    other = literal_dpkd(dense_rows(student, taught, batch), **{"beta": 0.7, "nll": 0.3, **broken})
    assert differ(student, other.sum(), objective)


def test_no_gradient_reaches_a_teacher(models: list[nn.Module], taught: Taught) -> None:
    """Of pairs, policy gradients and skews."""
    batch = make_batch()
    steps = (
        PairStep(loss=Dpkd(), weight=1.0, chosen_nll=0.0),
        PolicyGradientStep(minillm=MiniLLM(), weight=1.0),
        SkewStep(contrast=ContrastiveSkew(), of_teacher=True, step=0, steps=1, weight=1.0),
    )
    for step in steps:
        ours(models[0], taught, batch, step, 1.0)[0].backward()
    models[0].zero_grad()
    assert all(parameter.grad is None for model in models[1:] for parameter in model.parameters())


def test_pairs_are_measured_with_the_factor_of_their_rewards(models: list[nn.Module]) -> None:
    """beta of a loss with a reference; where it is a margin, which may be 0, rewards stay what they are."""
    student, batch = models[0], make_batch()
    taught = Taught(LiveTeacher(models[1]), lambda ids, domain: log_softmax_of(models[1], ids))
    margins = {}
    for loss in (Dpkd(beta=2.0), IPO(beta=0.5, length_normalize=True), PladRanking(beta=0.0)):
        step = PairStep(loss=loss, weight=1.0, chosen_nll=0.0)
        values = ours(student, taught, batch, step, 1.0)[1]
        margins[type(loss)] = values[2 + PAIR_MEASURES.index("reward_margin")]
    torch.testing.assert_close(margins[Dpkd], 2 * margins[PladRanking])
    torch.testing.assert_close(margins[IPO], 0.5 * margins[PladRanking])


def test_graded_pairs(models: list[nn.Module]) -> None:
    """The margin follows the quality of either response; without grades there is one line."""
    student, batch = models[0], make_batch()
    taught = Taught(LiveTeacher(models[1]), lambda ids, domain: log_softmax_of(models[1], ids))
    step = PairStep(loss=PladMargin(beta=40.0), weight=1.0, chosen_nll=0.0)
    quality = torch.tensor([0.9, 0.1, 0.5, 0.5, 0.3, 0.7])
    _, values = ours(student, taught, batch, with_quality(step, quality), 1.0)
    leads = [of_tokens(log_q, tokens).mean() for log_q, _, tokens in dense_rows(student, taught, batch)]
    expected = [
        max(0.0, 40 * float(quality[i] - quality[i + 1]) - (leads[i] - leads[i + 1]).item())
        for i in (0, 2, 4)
    ]
    assert expected == pytest.approx(values[0].tolist(), rel=1e-5, abs=1e-5)
    with pytest.raises(DataError, match="these pairs have none") as error:
        ours(student, taught, batch, with_quality(step, None), 1.0)
    assert "\n" not in str(error.value)


# --- MiniLLM -----------------------------------------------------------------------------------------------


def literal_minillm(rows: list[tuple[Tensor, ...]], share: float, *, own_step: bool = False) -> Any:
    """What has the gradient of MiniLLM (arXiv 2306.08543, Eq. 6), as a sum over tokens, and its values."""
    total, values = torch.zeros((), dtype=torch.float64), []
    for log_q, log_p, tokens in rows:
        q, p = of_tokens(log_q, tokens).detach(), of_tokens(log_p, tokens)
        reward, ratio = p - q, q.exp() / (share * p.exp() + (1 - share) * q.exp())
        for t in range(len(tokens)):
            ahead = reward[t if own_step else t + 1 :]
            earned = ahead.mean() if len(ahead) else torch.zeros((), dtype=torch.float64)
            exact = (log_q[t].exp() * (log_p[t] - log_q[t])).sum()
            total = total - ratio[t] * (exact + earned * log_q[t, tokens[t]])
            values.append([-exact.item(), -q[t].item(), earned.item(), ratio[t].item()])
    return total, torch.tensor(values, dtype=torch.float64).T


def test_minillm_has_the_gradient_of_the_paper(models: list[nn.Module], taught: Taught) -> None:
    """At every parameter, for any kind of teacher, and what is recorded of every token."""
    student, batch = models[0], make_batch(1)
    step = PolicyGradientStep(minillm=MiniLLM(teacher_share=0.2), weight=0.5)
    objective, values = ours(student, taught, batch, step, 0.1, chunk_tokens=4)
    expected, of_each = literal_minillm(dense_rows(student, taught, batch), 0.2)
    torch.testing.assert_close(values.double(), of_each, rtol=1e-5, atol=1e-5)
    compare(student, 0.05 * expected, objective)
    assert [0.5, 0.0, 0.0, 0.0] == step.weights


def test_another_policy_gradient_would_be_noticed(models: list[nn.Module]) -> None:
    """Another share, and a return that counts its own step, whose gradient is in the exact term already."""
    student, batch = models[0], make_batch(1)
    taught = Taught(LiveTeacher(models[1]), lambda ids, domain: log_softmax_of(models[1], ids))
    step = PolicyGradientStep(minillm=MiniLLM(teacher_share=0.2), weight=1.0)
    for share, own_step in ((0.3, False), (0.2, True)):
        other, _ = literal_minillm(dense_rows(student, taught, batch), share, own_step=own_step)
        assert differ(student, other, ours(student, taught, batch, step, 1.0)[0])


def test_options_of_the_authors_code_reach_the_step(models: list[nn.Module]) -> None:
    """`own_step` is the literal one; whitened advantages have mean 0 and variance 1 over the tokens."""
    student, batch = models[0], make_batch(1)
    taught = Taught(LiveTeacher(models[1]), lambda ids, domain: log_softmax_of(models[1], ids))
    own = PolicyGradientStep(minillm=MiniLLM(own_step=True), weight=1.0)
    expected, _ = literal_minillm(dense_rows(student, taught, batch), 0.2, own_step=True)
    compare(student, expected, ours(student, taught, batch, own, 1.0)[0])
    white = PolicyGradientStep(minillm=MiniLLM(whiten=True), weight=1.0)
    advantages = ours(student, taught, batch, white, 1.0)[1][2]
    assert (0.0, 1.0) == pytest.approx(
        (advantages.mean().item(), advantages.var(correction=0).item()), abs=1e-5
    )


# --- DistiLLM-2 --------------------------------------------------------------------------------------------


def literal_skew(rows: list[tuple[Tensor, ...]], skews: list[float], *, of_teacher: bool) -> list[Tensor]:
    """SKL of every token of the teacher's responses, or SRKL of the student's, row by row."""
    found = []
    for (log_q, log_p, _), a in zip(rows, skews, strict=True):
        q, p = log_q.exp(), log_p.exp()
        if of_teacher:
            found.append((p * (log_p - torch.log(a * p + (1 - a) * q))).sum(-1))
        else:
            found.append((q * (log_q - torch.log((1 - a) * p + a * q))).sum(-1))
    return found


def literal_skews(rows: list[tuple[Tensor, ...]], start: float, *, of_teacher: bool) -> list[float]:
    """a = clip(1 - (1 - a_0) m / (p(y) - q(y)), 0.01, a_0), rounded to hundredths."""
    means = [
        [of_tokens(log_probs, tokens).mean().exp().item() for log_probs in (log_p, log_q)]
        for log_q, log_p, tokens in rows
    ]
    gaps = [(p - q) if of_teacher else (q - p) for p, q in means]
    mean = sum(gaps) / len(gaps)
    return [round(min(max(1 - (1 - start) * mean / (gap + 1e-5), 0.01), start), 2) for gap in gaps]


@pytest.mark.parametrize("of_teacher", [True, False], ids=["teacher's side", "student's side"])
@pytest.mark.parametrize(
    "contrast",
    [ContrastiveSkew(skew=0.125, beta=0.3), ContrastiveSkew(skew=0.4, moving_skew=True, moving_beta=True)],
    ids=["fixed", "moving"],
)
def test_distillm2_is_the_paper_s(
    models: list[nn.Module], taught: Taught, contrast: ContrastiveSkew, of_teacher: bool
) -> None:
    """Divergence and skew of every token and the gradient of every parameter; a skew that does not move is
    the config's to the last digit."""
    student, moving = models[0], contrast.moving_skew
    writer = taught.dense if of_teacher else (lambda ids, domain: log_softmax_of(student, ids))
    batch = written_by(make_batch(2), writer)
    rows = dense_rows(student, taught, batch)
    skews = [contrast.skew] * len(rows)
    if moving:
        skews = literal_skews(rows, contrast.skew, of_teacher=of_teacher)
    assert len(set(skews)) > 1 or not moving
    beta = 0.75 if moving else contrast.beta  # 30 of 40 steps
    weight = 2 * (1 - beta) if of_teacher else 2 * beta
    divergences = literal_skew(rows, skews, of_teacher=of_teacher)
    step = SkewStep(contrast=contrast, of_teacher=of_teacher, step=30, steps=40, weight=0.5)
    objective, values = ours(student, taught, batch, step, 0.1)
    expected = torch.cat(divergences)
    torch.testing.assert_close(values[0].double(), expected.detach(), rtol=1e-5, atol=1e-5)
    of_rows = [a for a, own in zip(skews, divergences, strict=True) for _ in own]
    assert of_rows == pytest.approx(values[1].tolist())
    assert [0.5 * weight, 0.0] == pytest.approx(step.weights)
    compare(student, 0.05 * weight * expected.sum(), objective)


def test_the_other_side_s_divergence_would_be_noticed(models: list[nn.Module]) -> None:
    """SRKL in the place of SKL has another gradient."""
    student, batch = models[0], make_batch(2)
    taught = Taught(LiveTeacher(models[1]), lambda ids, domain: log_softmax_of(models[1], ids))
    step = SkewStep(contrast=ContrastiveSkew(), of_teacher=True, step=0, steps=1, weight=1.0)
    objective, _ = ours(student, taught, batch, step, 1.0)
    other = literal_skew(dense_rows(student, taught, batch), [0.1] * 6, of_teacher=False)
    assert differ(student, torch.cat(other).sum(), objective)


def test_a_teacher_whose_rows_have_all_another_skew_is_not_asked(models: list[nn.Module]) -> None:
    """The tokens of one skew may lie in one teacher's rows; the other has none, and gives nothing."""
    batch = make_batch(3)
    signal = DomainTeachers([LiveTeacher(model) for model in models[1:]], [0, 1]).signal(batch)
    assert isinstance(signal, RoutedSignal)
    model = DistillationModel(models[0])
    seen = {}

    @dataclass(frozen=True)
    class Halves:
        """Sums over the rows of domain 0 alone."""

        weights = (1.0,)

        def __call__(self, rows: Any, weight: float) -> tuple[Tensor, Tensor]:
            own = torch.tensor(DOMAINS)[rows.row_of] == 0
            half = rows.of(own)
            term = SkewStep(contrast=ContrastiveSkew(), of_teacher=True, step=0, steps=1, weight=1.0)._term(
                0.1
            )
            objective, values = half.objective([term], torch.ones(int(own.sum())))
            seen["log_p"] = (half.teacher_log_probs(), rows.teacher_log_probs()[own])
            return objective, values

    objective, values = model(batch["input_ids"], batch["labels"], 1.0, Halves(), signal)
    assert values.shape[1] == sum(n for n, d in zip(RESPONSES, DOMAINS, strict=True) if d == 0)
    assert objective.item() == pytest.approx(values.sum().item(), rel=1e-6)
    torch.testing.assert_close(*seen["log_p"])


def test_a_row_without_a_response_is_one_line(models: list[nn.Module], taught: Taught) -> None:
    """A pair whose response has no token at all."""
    batch = make_batch()
    labels = batch["labels"].clone()
    labels[3] = IGNORE
    step = PairStep(loss=Dpkd(), weight=1.0, chosen_nll=0.0)
    with pytest.raises(DataError, match=r"rows \[3\] of a batch of 6 have no response token"):
        ours(models[0], taught, {**batch, "labels": labels}, step, 1.0)
    assert replace(step, weight=2.0).weights[0] == 2.0
