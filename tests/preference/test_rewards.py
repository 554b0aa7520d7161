"""What is measured of pairs, and DPKD's reward hacking in a toy: with and without language modelling."""

from functools import cache

import pytest
import torch

from ddkmix.batch import Head
from ddkmix.losses import CrossEntropy, LossTerm
from ddkmix.losses.objective import distillation_objective
from ddkmix.metrics import LossWindow
from ddkmix.preference import ChosenNLL, Dpkd
from ddkmix.preference.rewards import PAIR_MEASURES, pair_measures
from ddkmix.preference.scores import response_log_probs, response_scores
from tests.preference.pairs import random_sides, scores

CHOSEN, REJECTED, MARGIN, PREFERRED = (
    PAIR_MEASURES.index(name)
    for name in ("chosen_log_prob", "rejected_log_prob", "reward_margin", "preferred")
)


def test_measures_by_hand():
    """Two pairs: rewards 2 (-1), 2 (-1/2) and 2 (1/2), 2 (0); log-probabilities per token."""
    chosen = scores([-8.0, -1.0], [-4.0, -3.0], [4, 4])
    rejected = scores([-3.0, -2.0], [-2.0, -2.0], [2, 1])
    expected = {
        "chosen_log_prob": [-2.0, -0.25],
        "rejected_log_prob": [-1.5, -2.0],
        "chosen_reward": [-2.0, 1.0],
        "rejected_reward": [-1.0, 0.0],
        "reward_margin": [-1.0, 1.0],
        "preferred": [0.0, 1.0],
    }
    found = pair_measures(chosen, rejected, beta=2.0)
    assert expected == dict(zip(PAIR_MEASURES, found.tolist(), strict=True))
    assert not found.requires_grad
    sums = pair_measures(chosen, rejected, beta=2.0, length_normalize=False)
    assert [-8.0, 4.0] == sums[PAIR_MEASURES.index("chosen_reward")].tolist()


def test_the_margin_is_what_dpkd_sees():
    """-log sigmoid of it is the loss."""
    sides = random_sides()
    margin = pair_measures(*sides, beta=0.7)[MARGIN]
    torch.testing.assert_close(-torch.nn.functional.logsigmoid(margin), Dpkd(beta=0.7)(*sides).detach())


def test_the_window_of_the_log_takes_them():
    """As it takes losses of tokens: means over pairs, by domain."""
    window = LossWindow(PAIR_MEASURES, ["code", "prose"], torch.device("cpu"))
    chosen, rejected = scores([-2.0, -4.0, -6.0]), scores([-1.0, -9.0, -9.0])
    window.add(pair_measures(chosen, rejected), torch.tensor([0, 1, 1]), [0.0] * len(PAIR_MEASURES))
    record = window.close(lambda tensor: tensor)
    assert (-5.0, -9.0, 2 / 3) == (
        record["train/chosen_log_prob/prose"],
        record["train/rejected_log_prob/prose"],
        pytest.approx(record["train/preferred"]),
    )


# --- reward hacking ---------------------------------------------------------------------------------

CLASSES, LENGTH, STEPS = 6, 4, 150


def drawn(weight, starts, length, generator):
    """Tokens of a bigram model: (rows, 1 + length)."""
    rows = [starts]
    for _ in range(length):
        shares = weight.softmax(0)[:, rows[-1]].T
        rows.append(torch.multinomial(shares, 1, generator=generator)[:, 0])
    return torch.stack(rows, dim=1)


def predicted(rows):
    """States (one of each class of the token before), labels."""
    return torch.eye(CLASSES, dtype=torch.float64)[rows[:, :-1].flatten()], rows[:, 1:].flatten()


def scored(student, teacher, rows):
    """`ResponseScores` of rows under both models."""
    states, labels = predicted(rows)
    log_q, log_p = (response_log_probs(states, Head(weight=weight), labels) for weight in (student, teacher))
    return response_scores(log_q, log_p, torch.arange(len(rows)).repeat_interleave(LENGTH), len(rows))


@cache
def history(text=0.0, chosen=0.0):
    """(steps, measures) means over 24 pairs of a bigram student that learns with DPKD; `text` and `chosen`
    are the weights of language modelling on the teacher's text and on the chosen responses."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (
        torch.randn(CLASSES, CLASSES, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    starts = torch.arange(24) % CLASSES
    of_teacher, of_student = (drawn(w, starts, LENGTH, generator) for w in (teacher, student))
    states, labels = predicted(drawn(teacher, torch.arange(60) % CLASSES, 8, generator))
    student.requires_grad_()
    measures, weight = [], torch.full((len(labels),), 1 / len(labels))
    modelling = (LossTerm("cross_entropy", text, CrossEntropy()),)
    for _ in range(STEPS):
        sides = [scored(student, teacher, rows) for rows in (of_teacher, of_student)]
        anchor, _ = distillation_objective(states, Head(weight=student), labels, weight, modelling)
        values = Dpkd(beta=2.0)(*sides) + chosen * ChosenNLL()(*sides)
        (gradient,) = torch.autograd.grad(values.mean() + anchor, student)
        measures.append(pair_measures(*sides, beta=2.0).mean(1))
        with torch.no_grad():
            student -= 20.0 * gradient
    return torch.stack(measures)


def last_fall(column):
    """By how much a measure falls in the last half of the run."""
    return (column[STEPS // 2] - column[-1]).item()


def test_without_an_anchor_the_rejected_responses_are_driven_down_without_end():
    """From -1.6 nats per token below -7, and still falling; the chosen ones, which were to be learnt, fall
    too, and every pair is `preferred`: the loss and its margin look their best."""
    run = history()
    assert run[0, REJECTED] > -2 and run[-1, REJECTED] < -7
    assert last_fall(run[:, REJECTED]) > 0.7
    assert run[-1, CHOSEN] < run[0, CHOSEN] - 1
    assert 1.0 == run[-1, PREFERRED] and run[-1, MARGIN] > 7


def test_language_modelling_on_text_stops_it():
    """Lambda 1: the rejected ones come to rest where text has them, the chosen ones become likelier."""
    run = history(text=1.0)
    assert run[-1, REJECTED] > -3.2
    assert abs(last_fall(run[:, REJECTED])) < 0.06
    assert run[-1, CHOSEN] > run[0, CHOSEN] + 0.4
    assert run[-1, PREFERRED] > 0.9


def test_language_modelling_on_the_chosen_responses_slows_it():
    """It keeps them likely; what only rejected responses have still falls, at a fraction of the speed."""
    run = history(chosen=1.0)
    assert run[-1, CHOSEN] > run[0, CHOSEN] + 0.4
    assert 0.05 < last_fall(run[:, REJECTED]) < 0.2 * last_fall(history()[:, REJECTED])
    assert run[-1, REJECTED] > -4
