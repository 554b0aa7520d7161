"""Hidden states -> weighted loss and its gradients, a chunk of tokens at a time.

With a vocabulary of 49,000 and more, logits are the largest tensors of a small student's step. Here the
logits of `chunk_tokens` tokens exist at once; their gradient is taken at once and folded into the
gradients of the hidden states and of the output weights, so that no tokens x vocabulary tensor ever exists
and the two projections are computed once (not again in the backward pass).
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddkmix.batch import DenseSignal, EnsembleSignal, Head, Signal
from ddkmix.losses import LossTerm


def chunked_objective(
    hidden: Float[Tensor, "n D"],
    head: Head,
    labels: Int[Tensor, " n"],
    token_weight: Float[Tensor, " n"],
    terms: Sequence[LossTerm],
    *,
    signal: Signal | None = None,
    chunk_tokens: int = 256,
) -> tuple[Float[Tensor, ""], Float[Tensor, "terms n"]]:
    """The objective and the value of every term at every token.

    objective = sum_i token_weight_i sum_k weight_k loss_k(i). Differentiable in `hidden`, `head.weight` and
    `head.bias`; the second result is detached.

    Args:
        hidden: student's last hidden states of the tokens that predict.
        head: student's output layer.
        labels: next tokens.
        token_weight: share of each token in the objective; the trainer puts all normalisation here.
        terms: the weighted losses.
        signal: what the teacher says about the same tokens; None if no term needs it.
        chunk_tokens: tokens whose logits exist at one time.
    """
    weight, bias = head.weight, head.bias
    if not torch.is_grad_enabled():  # a Function is not told, and would make gradients for nobody
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    # the compute type is that of `hidden`; autocast would choose again inside every chunk
    with torch.autocast(hidden.device.type, enabled=False):
        return _ChunkedObjective.apply(  # type: ignore[no-untyped-call]
            hidden,
            weight,
            bias,
            head,
            labels,
            token_weight,
            tuple(terms),
            signal,
            chunk_tokens,
        )


class _ChunkedObjective(torch.autograd.Function):
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
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        differentiate = needs_hidden or needs_weight or needs_bias
        values = hidden.new_zeros((len(terms), len(hidden)), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # float32 whatever the compute type: a vocabulary row collects thousands of small terms
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs_bias else None
        compute = _Projection(head, hidden.dtype)
        teachers: list[_Projection] = []
        if isinstance(signal, DenseSignal):
            teachers = [_Projection(signal.head, signal.hidden.dtype)]
        elif isinstance(signal, EnsembleSignal):
            teachers = [_Projection(member.head, member.hidden.dtype) for member in signal.members]
        objective = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            raw = compute.project(hidden[part].detach())
            said: Any = None if signal is None else signal.at(part)
            if isinstance(said, DenseSignal):
                said = teachers[0].finish(teachers[0].project(said.hidden))
            elif isinstance(said, EnsembleSignal):
                said = _mean_log_probs(said, teachers)
            with torch.set_grad_enabled(differentiate):
                raw.requires_grad_(differentiate)
                logits = compute.finish(raw)
                chunk = logits.new_zeros(())
                for k, term in enumerate(terms):
                    value = term.loss(logits, said, labels[part])
                    values[k, part] = value.detach()
                    chunk = chunk + term.weight * (value * token_weight[part]).sum()
            objective += chunk.detach()
            if not differentiate:
                continue
            (grad_raw,) = torch.autograd.grad(chunk, raw)
            grad_raw = grad_raw.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_raw @ compute.weight
            if grad_weight is not None:
                grad_weight[: grad_raw.shape[1]] += grad_raw.T @ hidden[part]
            if grad_bias is not None:
                grad_bias[: grad_raw.shape[1]] += grad_raw.sum(dim=0)
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(values)
        return objective, values

    @staticmethod
    def backward(ctx: Any, grad_objective: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the gradients of this objective were already taken; run forward again")
        scaled = [
            None if grad is None else grad.mul_(grad_objective).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        ctx.grads = None
        return (*scaled, *[None] * 6)


class _Projection:
    """A head in the compute type, in two steps, so that the chunk's gradient starts between them."""

    def __init__(self, head: Head, dtype: torch.dtype) -> None:
        self.weight = head.weight.detach()[: head.vocab_size].to(dtype)
        self._bias = None if head.bias is None else head.bias.detach()[: head.vocab_size].to(dtype)
        self._head = head

    def project(self, hidden: Tensor) -> Tensor:
        """h W^T + b as float32, before scale and soft cap."""
        hidden = hidden.to(self.weight.dtype)
        return torch.nn.functional.linear(hidden, self.weight, self._bias).float()

    def finish(self, raw: Tensor) -> Tensor:
        """The logits."""
        return self._head.finish(raw)


def _mean_log_probs(signal: EnsembleSignal, teachers: list[_Projection]) -> Tensor:
    """sum_k weight_k log p_k, which are logits of the ensemble: it lacks only log Z."""
    summands = (
        share * teacher.finish(teacher.project(member.hidden)).log_softmax(-1)
        for member, teacher, share in zip(signal.members, teachers, signal.weights, strict=True)
    )
    total = next(summands)
    for summand in summands:
        total += summand
    return total
