"""Gradients of hidden states, output weights and bias, made in the forward pass a chunk at a time."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ddkmix.batch import Head
from ddkmix.losses.logits import compute_type

_SLICE_ELEMENTS = 2**22
"""Of the output weights' gradient, where it must be made in a smaller type before it is added up."""


class MadeInForward(torch.autograd.Function):
    """Of hidden states, output weights, bias and six more; its `forward` calls `Gradients.keep`."""

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


class Gradients:
    """Of hidden states, output weights and bias, as far as they are wanted."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool], *, covered: bool
    ) -> None:
        """`covered`: every hidden state is in some chunk; otherwise those in none have a gradient of 0."""
        self.wanted, self._hidden = any(wanted), hidden.detach()
        # float32 whatever the compute type: a vocabulary row collects thousands of small terms
        total = compute_type(hidden)
        like_hidden = torch.empty_like if covered else torch.zeros_like
        self._of_inputs = (
            like_hidden(hidden) if wanted[0] else None,
            torch.zeros_like(weight, dtype=total) if wanted[1] else None,
            torch.zeros_like(bias, dtype=total) if bias is not None and wanted[2] else None,
        )
        self._dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)

    def add(self, part: slice, by_logits: Float[Tensor, "c V"], weight: Float[Tensor, "V D"]) -> None:
        """What a chunk adds, from the derivative by its logits before scale and soft cap."""
        of_hidden, of_weight, of_bias = self._of_inputs
        classes = by_logits.shape[1]
        if of_hidden is not None:
            torch.mm(by_logits, weight, out=of_hidden[part])
        if of_weight is not None:
            _add_product(of_weight[:classes], by_logits, self._hidden[part])
        if of_bias is not None:
            of_bias[:classes] += by_logits.sum(dim=0, dtype=of_bias.dtype)

    def keep(self, ctx: Any, values: Tensor) -> None:
        """Leave them where `MadeInForward.backward` looks; the values of the losses have none."""
        ctx.grads, ctx.dtypes = self._of_inputs, self._dtypes
        ctx.mark_non_differentiable(values)


def without_gradients(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """Both detached where autograd is off: a Function is not told, and would make gradients for nobody."""
    if torch.is_grad_enabled():
        return hidden, head
    bias = None if head.bias is None else head.bias.detach()
    return hidden.detach(), replace(head, weight=head.weight.detach(), bias=bias)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right. In a smaller type a part of the classes at a time, or it would exist twice."""
    if total.dtype == left.dtype:
        total.addmm_(left.T, right)
        return
    step = max(1, _SLICE_ELEMENTS // total.shape[1])
    for start in range(0, len(total), step):
        some = slice(start, start + step)
        total[some] += left[:, some].T @ right
