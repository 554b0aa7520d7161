"""Whole responses in a batch: rows of tokens, parts of them, and what each teacher says there."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.batch import DenseSignal, EnsembleSignal, Head, RoutedSignal
from ddkmix.predicted_tokens import ResponseBatch, about_predicted, predicted
from ddkmix.sources import IGNORE

CLASSES, WIDTH = 11, 6


def labels_of(lengths: list[int]) -> torch.Tensor:
    """Rows whose last tokens are predicted, so many in each."""
    labels = torch.full((len(lengths), WIDTH), IGNORE)
    for row, length in enumerate(lengths):
        labels[row, WIDTH - length :] = torch.arange(length)
    return labels


def random_signal(rows: int, size: int) -> DenseSignal:
    """What a teacher of some hidden size says about rows."""
    generator = torch.Generator().manual_seed(size)
    hidden, weight = (
        torch.randn(*shape, generator=generator) for shape in ((rows, WIDTH, size), (CLASSES, size))
    )
    return DenseSignal(hidden=hidden, head=Head(weight=weight))


def batch_of(labels: torch.Tensor, signal: Any = None) -> ResponseBatch:
    """A batch whose states are the numbers of their tokens."""
    where = predicted(labels)
    count = int(where.sum())
    said = signal or random_signal(len(labels), 4)
    return ResponseBatch(
        states=torch.arange(float(count))[:, None],
        head=Head(weight=torch.zeros(CLASSES, 1)),
        labels=labels[:, 1:][where],
        where=where,
        signal=said if isinstance(said, RoutedSignal) else about_predicted(said, where),
        compute=lambda states, labels, weights, terms, signal: (states.sum(), weights[None]),
        chunk_tokens=None,
        memory_mb=1.0,
    )


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.integers(0, WIDTH - 1), min_size=1, max_size=5), st.integers(0, 2**30))
def test_some_tokens_of_a_batch_are_a_batch(lengths: list[int], bits: int) -> None:
    """States, labels and rows of the tokens asked for; rows keep their numbers, even without any."""
    batch = batch_of(labels_of(lengths))
    assert [row for row, n in enumerate(lengths) for _ in range(n)] == batch.row_of.tolist()
    kept = torch.tensor([bool(bits >> i & 1) for i in range(len(batch.labels))], dtype=torch.bool)
    part = batch.of(kept)
    assert batch.row_of[kept].tolist() == part.row_of.tolist()
    assert batch.labels[kept].tolist() == part.labels.tolist()
    assert torch.equal(batch.states[kept], part.states)
    assert len(lengths) == part.num_rows == batch.num_rows
    torch.testing.assert_close(batch.teacher_log_probs()[kept], part.teacher_log_probs())


def test_values_go_back_to_their_rows() -> None:
    """And 0 elsewhere."""
    batch = batch_of(labels_of([2, 0, 3]))
    rows = batch.in_rows(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert (3, WIDTH - 1) == tuple(rows.shape)
    assert [[1.0, 2.0], [], [3.0, 4.0, 5.0]] == [row[row != 0].tolist() for row in rows]
    assert batch.where[rows != 0].all()


@pytest.mark.parametrize("kind", ["dense", "ensemble", "routed"])
def test_the_teacher_s_log_probabilities_are_those_of_whole_logits(kind: str) -> None:
    """Of each row its own teacher's, in float32, without a gradient."""
    labels = labels_of([2, 1, 3, 0])
    one, two = random_signal(4, 4), random_signal(4, 7)

    def log_probs(signal: DenseSignal) -> torch.Tensor:
        return (signal.hidden @ signal.head.weight.T).log_softmax(-1)

    if kind == "dense":
        signal, whole = one, log_probs(one)
    elif kind == "ensemble":
        signal = EnsembleSignal(members=(one, two), weights=(0.25, 0.75))
        whole = (0.25 * log_probs(one) + 0.75 * log_probs(two)).log_softmax(-1)
    else:
        rows = (torch.tensor([0, 3]), torch.tensor([1, 2]))
        signal = RoutedSignal(rows=rows, signals=(one.at(rows[0]), two.at(rows[1])))
        whole = log_probs(one)
        whole[rows[1]] = log_probs(two)[rows[1]]
    batch = batch_of(labels, signal)
    expected = whole[:, :-1][batch.where].gather(1, batch.labels[:, None])[:, 0]
    found = batch.teacher_log_probs()
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
