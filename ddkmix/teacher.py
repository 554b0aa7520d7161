"""Teacher signals of live models, whose logits are made a few tokens at a time.

One model, an ensemble of models, or a teacher for each domain: each answers `signal(batch)`.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddkmix.batch import CrossSignal, DenseSignal, EnsembleSignal, RoutedSignal, Signal
from ddkmix.boundaries import check_isolation, document_positions
from ddkmix.losses.closed_form import LogProbs
from ddkmix.losses.reference import dense_logits
from ddkmix.matching import Layers
from ddkmix.models import head_of, hidden_states

CHUNK_TOKENS = 256
"""Tokens whose logits exist at one time where a teacher is only measured and the config names no number."""


@runtime_checkable
class SignalSource(Protocol):
    """What the trainer wants of a teacher."""

    def signal(self, batch: Mapping[str, Tensor]) -> Signal | RoutedSignal | CrossSignal:
        """What the teacher says about every position of a batch's rows.

        Args:
            batch: `input_ids` and `labels` (B, T) and `domain_ids` (B,), as the loader gives them.
        """
        ...


class LiveTeacher:
    """A frozen model that comments on batches."""

    def __init__(
        self,
        model: nn.Module,
        *,
        vocab_size: int | None = None,
        separator_id: int | None = None,
        layers: Sequence[int] = (),
    ) -> None:
        """Documents of a row see each other unless there is a `separator_id` that keeps them apart; `layers`
        are those whose outputs a `HiddenMatch` wants."""
        self.model, self._separator_id = model, separator_id
        self._layers = Layers("teacher", model, layers)
        self._head = head_of(model, vocab_size)
        if separator_id is not None:
            check_isolation(model, separator_id)

    @torch.no_grad()
    def signal(self, batch: Mapping[str, Tensor]) -> DenseSignal:
        """What the teacher says about every position of a batch's `input_ids` (B, T)."""
        input_ids = batch["input_ids"]
        positions = document_positions(input_ids, self._separator_id)
        with self._layers.recorded(self.model) as outputs:
            hidden = hidden_states(self.model, input_ids, positions)
        return DenseSignal(hidden=hidden, head=self._head, layers=outputs)


class EnsembleTeacher:
    """Frozen models whose log-probabilities are averaged."""

    def __init__(self, members: Sequence[LiveTeacher], weights: Sequence[float]) -> None:
        """`weights` sum to 1."""
        self.members, self._weights = tuple(members), tuple(weights)

    def signal(self, batch: Mapping[str, Tensor]) -> EnsembleSignal:
        """What the models say together; each of them reads all rows."""
        said = tuple(member.signal(batch) for member in self.members)
        return EnsembleSignal(members=said, weights=self._weights)


class DomainTeachers:
    """A teacher for each domain; no model reads rows that are not its own."""

    def __init__(self, teachers: Sequence[SignalSource], teacher_of: Sequence[int]) -> None:
        """`teacher_of`: for each domain, in the order of `domain_ids`, its number among `teachers`."""
        self._teachers, self._teacher_of = tuple(teachers), torch.tensor(teacher_of)

    def signal(self, batch: Mapping[str, Tensor]) -> RoutedSignal:
        """What each teacher says about its rows; a teacher without a row in the batch is not asked."""
        teacher_of = self._teacher_of.to(batch["domain_ids"].device)[batch["domain_ids"]]
        rows, signals = [], []
        for number in sorted(set(teacher_of.tolist())):
            own = (teacher_of == number).nonzero()[:, 0]
            said = self._teachers[number].signal({name: tensor[own] for name, tensor in batch.items()})
            assert not isinstance(said, RoutedSignal | CrossSignal)
            rows.append(own)
            signals.append(said)
        return RoutedSignal(rows=tuple(rows), signals=tuple(signals))


@torch.no_grad()
def label_nats(
    signal: DenseSignal | EnsembleSignal, labels: Int[Tensor, " n"], *, chunk_tokens: int
) -> Float[Tensor, " n"]:
    """-log p(label) of n tokens, nats: the teacher's own loss, without a tokens x vocabulary tensor.

    Args:
        signal: what the teacher says about the positions before the labels.
        labels: next tokens.
        chunk_tokens: tokens whose logits exist at one time.
    """
    nats = torch.zeros(len(labels), device=labels.device)
    for start in range(0, len(labels), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        # as the student's are made, so that the gap of a model to itself is 0 and not a rounding error
        log_probs = LogProbs(dense_logits(signal.at(part)))
        nats[part] = -log_probs.of(labels[part][:, None], 1.0)[:, 0]
    return nats
