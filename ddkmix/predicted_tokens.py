"""Which positions of a batch predict something, and what student and teacher say there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ddkmix.batch import CrossSignal, DenseSignal, EnsembleSignal, Head, RoutedSignal, Signal, TruncatedSignal
from ddkmix.errors import ConfigError
from ddkmix.losses import LossTerm
from ddkmix.sources import IGNORE
from ddkmix.teacher import CHUNK_TOKENS, label_nats

S = TypeVar("S", DenseSignal, DenseSignal | EnsembleSignal, Signal)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ResponseBatch:
    """What student and teacher say about the predicted tokens of B rows, for whole responses."""

    states: Float[Tensor, "n D"]
    """The student's, before each predicted token; differentiable."""
    head: Head
    labels: Int[Tensor, " n"]
    where: Bool[Tensor, "B P"]
    """As `predicted` gives it."""
    signal: Signal | RoutedSignal
    """About the n tokens; where there are several teachers, about their rows."""
    compute: Callable[..., tuple[Tensor, Tensor]]
    """(states, labels, weights, terms, signal) -> objective and values, of one teacher."""
    chunk_tokens: int | None
    """Tokens whose logits exist at one time; None: as many as `memory_mb` holds."""
    memory_mb: float
    """For the logits of a chunk."""

    @property
    def row_of(self) -> Int[Tensor, " n"]:
        """The row of each token."""
        return self.where.nonzero()[:, 0]

    @property
    def num_rows(self) -> int:
        """B, rows without a predicted token included."""
        return len(self.where)

    def objective(self, terms: Sequence[LossTerm], weights: Tensor) -> tuple[Tensor, Tensor]:
        """As `distillation_objective`, with the weight of each token, or of each term at each token."""
        if isinstance(self.signal, RoutedSignal):
            about = (self.states, self.labels, weights, terms, self.signal, self.where)
            return of_each_teacher(self.compute, *about)
        return self.compute(self.states, self.labels, weights, terms, self.signal)

    def teacher_log_probs(self) -> Float[Tensor, " n"]:
        """log p(label) of each token, nats, without a gradient."""
        assert not isinstance(self.signal, TruncatedSignal), "a store knows the data's tokens alone"
        return -_nats(self.signal, self.labels, self.where, CHUNK_TOKENS)

    def of(self, tokens: Bool[Tensor, " n"]) -> "ResponseBatch":
        """The same of some tokens."""
        where = self.where.clone()
        where[self.where] = tokens
        routed = isinstance(self.signal, RoutedSignal)
        return replace(
            self,
            states=self.states[tokens],
            labels=self.labels[tokens],
            where=where,
            signal=self.signal if routed else self.signal.at(tokens),  # type: ignore[union-attr]
        )

    def in_rows(self, values: Float[Tensor, " n"]) -> Float[Tensor, "B P"]:
        """Values of tokens at their places, 0 elsewhere."""
        rows = values.new_zeros(self.where.shape)
        rows[self.where] = values
        return rows


@runtime_checkable
class OfResponses(Protocol):
    """An objective that sees whole responses: see `ddkmix.preference.steps`."""

    @property
    def weights(self) -> list[float]:
        """Of each of its values in the objective."""
        ...

    def __call__(self, batch: ResponseBatch, weight: float | Tensor) -> tuple[Tensor, Tensor]:
        """The objective, and detached values to be watched, of each token or pair.

        Args:
            batch: the rows.
            weight: share of each token or pair.
        """
        ...


def of_each_teacher(
    compute: Callable[..., tuple[Tensor, Tensor]],
    states: Tensor,
    targets: Tensor,
    weight: Tensor,
    terms: Sequence[LossTerm],
    signal: RoutedSignal,
    where: Tensor,
) -> tuple[Tensor, Tensor]:
    """Each teacher's rows by themselves; values are put back into row order.

    Args:
        compute: (states, labels, weights, terms, signal) -> objective and values, of one teacher.
        states: of the n predicted tokens.
        targets: these tokens.
        weight: (n,) of each token, or (terms, n) of each term at each token.
        terms: the losses.
        signal: what each teacher says about its rows.
        where: as `predicted` gives it.
    """
    row_of, total = where.nonzero()[:, 0], states.new_zeros((), dtype=torch.float32)
    tokens, values = [], []
    for rows, said in zip(signal.rows, signal.signals, strict=True):
        own = torch.isin(row_of, rows).nonzero()[:, 0]
        objective, value = compute(
            states[own], targets[own], weight[..., own], terms, about_predicted(said, where[rows])
        )
        total = total + objective
        tokens.append(own)
        values.append(value)
    return total, torch.cat(values, dim=1)[:, torch.cat(tokens).argsort()]


def signal_nats(
    signal: Signal | RoutedSignal | CrossSignal, labels: Int[Tensor, "B T"], *, chunk_tokens: int
) -> Float[Tensor, " n"]:
    """The teacher's loss at the n predicted tokens of a batch, in row order, nats; live or stored.

    Args:
        signal: what the teacher says about every position.
        labels: of the batch.
        chunk_tokens: tokens whose logits exist at one time.

    Raises:
        ConfigError: the teacher speaks of other tokens.
    """
    where = predicted(labels)
    if isinstance(signal, CrossSignal):
        raise ConfigError(
            "rows are weighed by what teacher and student think of the same tokens, and this teacher has "
            "another tokenizer; leave the selection out."
        )
    about = signal if isinstance(signal, RoutedSignal) else about_predicted(signal, where)
    return _nats(about, labels[:, 1:][where], where, chunk_tokens)


def _nats(
    signal: Signal | RoutedSignal, labels: Tensor, where: Tensor, chunk_tokens: int
) -> Float[Tensor, " n"]:
    """The same, given what is said about the predicted tokens, or by several teachers about their rows."""
    if isinstance(signal, RoutedSignal):
        row_of, nats = where.nonzero()[:, 0], torch.zeros(len(labels), device=labels.device)
        for rows, said in zip(signal.rows, signal.signals, strict=True):
            own = torch.isin(row_of, rows)
            nats[own] = _nats(about_predicted(said, where[rows]), labels[own], where[rows], chunk_tokens)
        return nats
    if isinstance(signal, TruncatedSignal):
        return signal.teacher_nats
    return label_nats(signal, labels, chunk_tokens=chunk_tokens)


def about_predicted(signal: S, where: Tensor) -> S:
    """What is said about the predicted tokens of some rows, in row order; `where` as `predicted` gives it."""
    return signal.at((slice(None), slice(None, -1))).at(where)


def predicted(labels: Int[Tensor, "B T"]) -> Tensor:
    """(B, T-1) bool: position t holds a state that predicts label t + 1."""
    return labels[:, 1:] != IGNORE
