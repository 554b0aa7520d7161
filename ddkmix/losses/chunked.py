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
from ddkmix.losses.logits import Block, Projection, blocks, compute_type, teacher_chunks

_SLICE_ELEMENTS = 2**22
"""Of the output weights' gradient, where it must be made in a smaller type before it is added up."""


class ChunkedObjective(torch.autograd.Function):
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
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        values = hidden.new_empty((len(terms), len(hidden)), dtype=compute_type(hidden))
        token_weight = token_weight.to(values.dtype)
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
                values[:, here], slope = _gradient(terms, logits, about, labels[here], token_weight[here])
                raw[rows] = student.pull_back(slope, logits)
            if gradients.wanted:
                gradients.add(part, raw, student.weight)
        factors = values.new_tensor([term.weight for term in terms])
        ctx.grads = gradients.of_inputs
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(values)
        return ((factors @ values) * token_weight).sum(), values

    @staticmethod
    def backward(ctx: Any, grad_objective: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, once."""
        if ctx.grads is None:
            raise RuntimeError("the gradients of this objective were already taken; run forward again")
        scaled = [
            None if grad is None else grad.mul_(grad_objective).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        ctx.grads = None
        return (*scaled, *[None] * 6)


class _Gradients:
    """Of hidden states, output weights and bias, as far as they are wanted."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool]) -> None:
        self.wanted, self._hidden = any(wanted), hidden.detach()
        # float32 whatever the compute type: a vocabulary row collects thousands of small terms
        total = compute_type(hidden)
        self.of_inputs = (
            torch.empty_like(hidden) if wanted[0] else None,
            torch.zeros_like(weight, dtype=total) if wanted[1] else None,
            torch.zeros_like(bias, dtype=total) if bias is not None and wanted[2] else None,
        )

    def add(self, part: slice, by_logits: Tensor, weight: Tensor) -> None:
        """What a chunk adds."""
        of_hidden, of_weight, of_bias = self.of_inputs
        classes = by_logits.shape[1]
        if of_hidden is not None:
            torch.mm(by_logits, weight, out=of_hidden[part])
        if of_weight is not None:
            _add_product(of_weight[:classes], by_logits, self._hidden[part])
        if of_bias is not None:
            of_bias[:classes] += by_logits.sum(dim=0, dtype=of_bias.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right. In a smaller type a part of the classes at a time, or it would exist twice."""
    if total.dtype == left.dtype:
        total.addmm_(left.T, right)
        return
    step = max(1, _SLICE_ELEMENTS // total.shape[1])
    for start in range(0, len(total), step):
        some = slice(start, start + step)
        total[some] += left[:, some].T @ right


def _values(terms: Sequence[LossTerm], logits: Tensor, said: Block, labels: Tensor) -> Tensor:
    """(terms, n) losses of a block."""
    teacher = said.logits if isinstance(said, LogProbs) else said
    return torch.stack([term.loss(logits, teacher, labels) for term in terms])


def _gradient(
    terms: Sequence[LossTerm], logits: Tensor, said: Block, labels: Tensor, token_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """(terms, n) losses of a block, and the derivative of their weighted sum by the logits."""
    student, values, slopes, others = LogProbs(logits), [], [], []
    for term in terms:
        if keeps_up(type(term.loss), "value_and_slope", "__call__"):
            value, slope = term.loss.value_and_slope(student, said, labels)  # type: ignore[attr-defined]
            slopes.append((term.weight * token_weight, slope))
            values.append(value)
            continue
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            value = term.loss(leaf, said.logits if isinstance(said, LogProbs) else said, labels)
            weighted = (term.weight * token_weight * value).sum()
        others.append(torch.autograd.grad(weighted, leaf)[0])
        values.append(value.detach())
    gradient = logit_gradient(student, slopes)
    for other in others:
        gradient.add_(other)
    return torch.stack(values), gradient
