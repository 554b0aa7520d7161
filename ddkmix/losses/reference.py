"""The objective as one would write it down: whole logits and autograd. The truth for tests; for reading."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddkmix.batch import DenseSignal, EnsembleSignal, Head, Signal
from ddkmix.losses import LossTerm
from ddkmix.losses.logits import compute_type


def reference_objective(
    hidden: Float[Tensor, "n D"],
    head: Head,
    labels: Int[Tensor, " n"],
    token_weight: Float[Tensor, "*k n"],
    terms: Sequence[LossTerm],
    signal: Signal | None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "terms n"]]:
    """The objective and the value of every term at every token; see `distillation_objective`."""
    logits = logits_of(hidden, head)
    teacher: Any = signal
    with torch.no_grad():
        if isinstance(signal, DenseSignal | EnsembleSignal):
            teacher = dense_logits(signal)
    values = torch.stack([term.loss(logits, teacher, labels) for term in terms])
    weights = values.new_tensor([term.weight for term in terms])
    return (weights[:, None] * values * token_weight).sum(), values.detach()


def logits_of(hidden: Float[Tensor, "n D"], head: Head) -> Float[Tensor, "n V"]:
    """All logits, in the compute type of the hidden states and then in float32."""
    weight = head.weight[: head.vocab_size].to(hidden.dtype)
    bias = None if head.bias is None else head.bias[: head.vocab_size].to(hidden.dtype)
    return head.finish(torch.nn.functional.linear(hidden, weight, bias).to(compute_type(hidden)))


def dense_logits(signal: DenseSignal | EnsembleSignal) -> Float[Tensor, "n V"]:
    """Logits of one model, or those of an ensemble: sum_k weight_k log p_k, which lacks only log Z."""
    if isinstance(signal, DenseSignal):
        return logits_of(signal.hidden, signal.head)
    shares = zip(signal.members, signal.weights, strict=True)
    return sum(
        (share * dense_logits(member).log_softmax(-1) for member, share in shares),
        torch.zeros((), device=signal.members[0].hidden.device),
    )
