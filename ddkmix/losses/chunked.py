"""Hidden states -> weighted loss and its gradients, a chunk of tokens at a time.

With a vocabulary of 49,000 and more, logits are the largest tensors of a small student's step. Here the
logits of one chunk exist at a time, once for the student and once for a dense teacher. Their gradient is
made at once, in the place of the student's logits, from closed forms where the losses have them, and folded
into the gradients of hidden states and output weights: no tokens x vocabulary tensor ever exists, and every
matrix product of the plain computation is done once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddkmix.batch import Head, Signal
from ddkmix.losses import LossTerm, token_multiple
from ddkmix.losses.closed_form import LogProbs, keeps_up, logit_gradient
from ddkmix.losses.gradients import Gradients, MadeInForward
from ddkmix.losses.logits import Block, Projection, blocks, compute_type, teacher_chunks


class ChunkedObjective(MadeInForward):
    """Gradients are made in the forward pass and only scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        labels: Tensor,
        token_weight: Tensor,
        terms: tuple[LossTerm, ...],
        signal: Signal | None,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        """Objective and values; see `distillation_objective` for the arguments."""
        student = Projection(head, hidden, chunk_tokens)
        teacher = teacher_chunks(signal, chunk_tokens)
        gradients = Gradients(hidden, weight, bias, ctx.needs_input_grad[:3], covered=True)
        values = hidden.new_empty((len(terms), len(hidden)), dtype=compute_type(hidden))
        token_weight = token_weight.to(values.dtype).expand(len(terms), -1)
        multiple = token_multiple(terms)
        assert chunk_tokens % multiple == 0, "a group of tokens must not be cut"
        for start in range(0, len(hidden), chunk_tokens):
            part = slice(start, min(start + chunk_tokens, len(hidden)))
            raw, said = student.project(part), teacher(part)
            for rows in blocks(len(raw), student.classes, raw.device, multiple):
                here = slice(start + rows.start, start + rows.stop)
                logits, about = student.finish(raw[rows]), said(rows)
                if not gradients.wanted:
                    values[:, here] = _values(terms, logits, about, labels[here])
                    continue
                values[:, here], slope = _gradient(terms, logits, about, labels[here], token_weight[:, here])
                raw[rows] = student.pull_back(slope, logits)
            if gradients.wanted:
                gradients.add(part, raw, student.weight)
        factors = values.new_tensor([term.weight for term in terms])
        gradients.keep(ctx, values)
        return (factors @ (values * token_weight)).sum(), values


def _values(terms: Sequence[LossTerm], logits: Tensor, said: Block, labels: Tensor) -> Tensor:
    """(terms, n) losses of a block, by the closed forms where there are some: the same as in training."""
    student, values = LogProbs(logits), []
    for term in terms:
        if _has_closed_form(term):
            values.append(term.loss.value_and_slope(student, said, labels)[0])  # type: ignore[attr-defined]
        else:
            values.append(term.loss(logits, said.logits if isinstance(said, LogProbs) else said, labels))
    return torch.stack(values)


def _has_closed_form(term: LossTerm) -> bool:
    return keeps_up(type(term.loss), "value_and_slope", "__call__")


def _gradient(
    terms: Sequence[LossTerm], logits: Tensor, said: Block, labels: Tensor, token_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """(terms, n) losses of a block, and the derivative of their weighted sum by the logits.

    `token_weight` is (terms, n).
    """
    student, values, slopes, others = LogProbs(logits), [], [], []
    for term, row in zip(terms, token_weight, strict=True):
        if _has_closed_form(term):
            value, slope = term.loss.value_and_slope(student, said, labels)  # type: ignore[attr-defined]
            slopes.append((term.weight * row, slope))
            values.append(value)
            continue
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            value = term.loss(leaf, said.logits if isinstance(said, LogProbs) else said, labels)
            weighted = (term.weight * row * value).sum()
        others.append(torch.autograd.grad(weighted, leaf)[0])
        values.append(value.detach())
    gradient = logit_gradient(student, slopes)
    for other in others:
        gradient.add_(other)
    return torch.stack(values), gradient
