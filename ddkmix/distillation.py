"""The student with its objective inside its forward pass.

DDP, FSDP and ZeRO act through hooks on the wrapped module's forward. The output layer is used here, inside
it, and never by its parameters from outside, so those hooks see every use.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddkmix.batch import CrossSignal, DenseSignal, Head, RoutedSignal, Signal
from ddkmix.boundaries import check_isolation, document_positions
from ddkmix.errors import ConfigError
from ddkmix.losses import LossTerm
from ddkmix.losses.aligned import aligned_objective, is_across
from ddkmix.losses.hidden_consistency import HiddenConsistency
from ddkmix.losses.hidden_match import HiddenMatch
from ddkmix.losses.objective import distillation_objective
from ddkmix.matching import Matching, Mixing, teacher_states
from ddkmix.models import head_of, hidden_states
from ddkmix.predicted_tokens import OfResponses, ResponseBatch, about_predicted, of_each_teacher, predicted

_ALIGNED_TOKENS = 256
"""Tokens of either model whose logits exist at one time where vocabularies differ."""


class DistillationModel(nn.Module):
    """A student that returns the distillation objective instead of logits."""

    def __init__(
        self,
        student: nn.Module,
        *,
        vocab_size: int | None = None,
        chunk_tokens: int | None = None,
        memory_mb: float = 512.0,
        separator_id: int | None = None,
        matching: Matching | None = None,
        consistency: HiddenConsistency | None = None,
    ) -> None:
        """Documents of a row see each other unless there is a `separator_id` that keeps them apart.

        `matching` has the projections of a `hidden_match` term, which are trained with the student;
        `consistency` is the loss of a `hidden_consistency` term.
        """
        super().__init__()
        head_of(student)  # refuses a model that cannot be split, before training starts
        if separator_id is not None:
            check_isolation(student, separator_id)
        self.student, self.matching = student, matching
        self._mixing = None if consistency is None else Mixing(consistency, student)
        self._vocab_size, self._chunk_tokens, self._memory_mb = vocab_size, chunk_tokens, memory_mb
        self._separator_id = separator_id
        self.keeps_states = False
        """Whether a forward pass with autograd on leaves its hidden states to `said`."""
        self._kept: Tensor | None = None

    def said(self) -> DenseSignal:
        """What the student said in the last training pass, held fixed, for a teacher that learns from it.

        Its states are given once, and only where `keeps_states`; the output layer is as it is now.
        """
        assert self._kept is not None, "set keeps_states, run a forward pass with autograd on, and ask once"
        hidden, self._kept = self._kept, None
        head = head_of(self.student, self._vocab_size, check=False)
        bias = None if head.bias is None else head.bias.detach()
        return DenseSignal(hidden=hidden, head=replace(head, weight=head.weight.detach(), bias=bias))

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"],
        token_weight: float | Tensor,
        terms: Sequence[LossTerm] | OfResponses,
        signal: Signal | RoutedSignal | CrossSignal | None = None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "terms n"]]:
        """Objective and per-token losses of a batch.

        Args:
            input_ids: rows of tokens.
            labels: the same, unshifted, -100 where there is only padding.
            token_weight: share of every predicted token in the objective.
            terms: the losses, or an objective of whole responses, whose values are returned in their place.
            signal: what the teacher says, or each teacher about its own rows, or one with another tokenizer;
                None if no term needs it.

        Returns:
            The sum over predicted tokens of token_weight x weighted losses, and the detached value of each
            term at the n predicted tokens, in row order (see `predicted`).
        """
        if isinstance(terms, OfResponses):
            return terms(self._responses(input_ids, labels, signal), token_weight)
        others = [t for t in terms if not isinstance(t.loss, HiddenMatch | HiddenConsistency)]
        if len(others) == len(terms):
            return self._of_logits(self._states(input_ids), labels, token_weight, terms, signal)
        with ExitStack() as recording:
            outputs: dict[type, dict[int, Tensor]] = {
                kind: recording.enter_context(part.layers.recorded(self.student))
                for kind, part in ((HiddenMatch, self.matching), (HiddenConsistency, self._mixing))
                if part is not None
            }
            hidden = self._states(input_ids)
        compared = {
            i: self._compared(term, outputs.get(type(term.loss)), input_ids, labels, signal)
            for i, term in enumerate(terms)
            if term not in others
        }
        if isinstance(signal, DenseSignal):  # the objective must not copy the layers once more
            signal = replace(signal, layers={})
        objective, values = self._of_logits(hidden, labels, token_weight, others, signal)
        rows = iter(values)
        for i, distance in compared.items():
            objective = objective + terms[i].weight * (distance * token_weight).sum()
        in_order = [compared[i].detach() if i in compared else next(rows) for i in range(len(terms))]
        return objective, torch.stack(in_order)

    def _compared(
        self,
        term: LossTerm,
        outputs: dict[int, Tensor] | None,
        input_ids: Tensor,
        labels: Tensor,
        signal: Signal | RoutedSignal | CrossSignal | None,
    ) -> Tensor:
        """The values of a term that compares outputs of layers, at the predicted tokens."""
        if outputs is None:
            part = "matching" if isinstance(term.loss, HiddenMatch) else "consistency"
            raise ConfigError(f"loss {term.name}: this DistillationModel was made without `{part}`.")
        if self._mixing is not None and isinstance(term.loss, HiddenConsistency):
            positions = document_positions(input_ids, self._separator_id)
            return self._mixing.values(self.student, outputs, input_ids, labels, positions)
        assert self.matching is not None
        where = predicted(labels)
        about = about_predicted(signal, where) if isinstance(signal, DenseSignal) else signal
        own = {number: output[:, :-1][where] for number, output in outputs.items()}
        distance: Tensor = self.matching(own, teacher_states(about, self.matching.loss))
        return distance

    def _states(self, input_ids: Tensor) -> Float[Tensor, "B T D"]:
        """The student's last hidden states, in the type in which it computes."""
        hidden = hidden_states(self.student, input_ids, document_positions(input_ids, self._separator_id))
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        if self.keeps_states and torch.is_grad_enabled():
            self._kept = hidden.detach()
        return hidden

    def _responses(
        self, input_ids: Tensor, labels: Tensor, signal: Signal | RoutedSignal | CrossSignal | None
    ) -> ResponseBatch:
        assert signal is not None
        assert not isinstance(signal, CrossSignal), "one tokenizer"
        where, head = predicted(labels), head_of(self.student, self._vocab_size, check=False)
        return ResponseBatch(
            states=self._states(input_ids)[:, :-1][where],
            head=head,
            labels=labels[:, 1:][where],
            where=where,
            signal=signal if isinstance(signal, RoutedSignal) else about_predicted(signal, where),
            compute=partial(self._objective, head),
            chunk_tokens=self._chunk_tokens,
            memory_mb=self._memory_mb,
        )

    def _of_logits(
        self,
        hidden: Tensor,
        labels: Tensor,
        token_weight: float | Tensor,
        terms: Sequence[LossTerm],
        signal: Signal | RoutedSignal | CrossSignal | None,
    ) -> tuple[Tensor, Tensor]:
        """Terms that look at logits."""
        where = predicted(labels)
        targets = labels[:, 1:][where]
        weight = torch.as_tensor(token_weight, dtype=torch.float32, device=hidden.device)
        weight = weight if weight.dim() == 2 else weight.expand(len(targets))
        states, head = hidden[:, :-1][where], head_of(self.student, self._vocab_size, check=False)
        compute = partial(self._objective, head)
        if isinstance(signal, RoutedSignal):
            return of_each_teacher(compute, states, targets, weight, terms, signal, where)
        if signal is not None and not isinstance(signal, CrossSignal):
            signal = about_predicted(signal, where)
        return compute(states, targets, weight, terms, signal)

    def _objective(
        self,
        head: Head,
        states: Tensor,
        targets: Tensor,
        weight: Tensor,
        terms: Sequence[LossTerm],
        signal: Signal | CrossSignal | None,
    ) -> tuple[Tensor, Tensor]:
        """Of some tokens, with one signal; at another vocabulary only losses that are made for it look."""
        if not isinstance(signal, CrossSignal):
            return distillation_objective(
                states,
                head,
                targets,
                weight,
                terms,
                signal=signal,
                chunk_tokens=self._chunk_tokens,
                memory_mb=self._memory_mb,
            )
        plain = [term for term in terms if not is_across(term)]
        across = [term for term in terms if is_across(term)]
        size = self._chunk_tokens or _ALIGNED_TOKENS
        total, values = aligned_objective(states, head, targets, weight, across, signal, chunk_tokens=size)
        if plain:
            objective, own = self._objective(head, states, targets, weight, plain, None)
            total, values = total + objective, torch.cat([own, values])
        order = [[*plain, *across].index(term) for term in terms]
        return total, values[order]
