"""liger-kernel's chunked distillation loss, where it computes the objective of this package.

Its `LigerFusedLinearJSDLoss` (0.8.5) is the mean over tokens of weight_hard x CE + weight_soft x JSD(beta),
with JSD(0) = forward and JSD(1) = reverse KL. It differs from ours in that values of single tokens are not
given, the temperature's square is left out, logits are neither capped nor scaled, and in bfloat16 it takes
the softmax and adds up the gradient of the weights in bfloat16. What cannot be made equal is refused.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddkmix.batch import DenseSignal, Head, Signal
from ddkmix.errors import ConfigError
from ddkmix.losses import CrossEntropy, ForwardKL, LossTerm, ReverseKL
from ddkmix.losses.divergence import Divergence

_BETA: dict[type, float] = {ForwardKL: 0.0, ReverseKL: 1.0}


def liger_objective(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    token_weight: Tensor,
    terms: Sequence[LossTerm],
    signal: Signal | None,
) -> tuple[Tensor, Tensor]:
    """The objective, and for every term its mean over the tokens in the place of each token's value.

    Raises:
        ConfigError: liger-kernel is not installed, or computes something else.
    """
    reason = why_not(hidden, head, token_weight, terms, signal)
    if reason:
        raise ConfigError(f"impl = 'liger' {reason}; use 'chunked', which has no such limit.")
    try:
        from liger_kernel.chunked_loss import (
            LigerFusedLinearJSDLoss,
        )
    except ImportError as error:
        raise ConfigError(
            f"impl = 'liger' needs liger-kernel and triton ({error}): pip install liger-kernel."
        ) from None
    assert isinstance(signal, DenseSignal)
    hard = sum(term.weight for term in terms if type(term.loss) is CrossEntropy)
    ((soft, divergence),) = [(t.weight, t.loss) for t in terms if isinstance(t.loss, Divergence)]
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=hard,
        weight_soft_loss=soft * divergence.scale,
        beta=_BETA[type(divergence)],
        temperature=divergence.temperature,
        compiled=hidden.is_cuda,
        return_soft_hard_loss=True,
    )
    weights = (head.weight[: head.vocab_size], None if head.bias is None else head.bias[: head.vocab_size])
    theirs = signal.head
    mean, soft_mean, hard_mean = loss(
        hidden,
        weights[0],
        signal.hidden,
        theirs.weight[: theirs.vocab_size],
        labels,
        weights[1],
        None if theirs.bias is None else theirs.bias[: theirs.vocab_size],
    )
    means = [soft_mean * divergence.scale if isinstance(t.loss, Divergence) else hard_mean for t in terms]
    values = torch.stack(means).detach()[:, None].expand(-1, len(hidden))
    return mean * token_weight.sum(), values


def why_not(
    hidden: Tensor, head: Head, token_weight: Tensor, terms: Sequence[LossTerm], signal: Signal | None
) -> str:
    """What keeps liger-kernel from computing this objective, as the middle of a sentence; '' if nothing."""
    divergences = [term.loss for term in terms if type(term.loss) in _BETA]
    others = [term.name for term in terms if type(term.loss) not in (CrossEntropy, *_BETA)]
    if not isinstance(signal, DenseSignal):
        return "needs the hidden states of one teacher"
    if others or len(divergences) != 1:
        return f"computes cross_entropy and one of forward_kl and reverse_kl, not {[t.name for t in terms]}"
    if divergences[0].adapt != "fixed":  # type: ignore[attr-defined]
        return "has one temperature for all tokens"
    if divergences[0].temperature_on != "both" and divergences[0].temperature != 1.0:  # type: ignore[attr-defined]
        return "divides the logits of both sides by the temperature"
    if any(h.scale != 1.0 or h.softcap is not None for h in (head, signal.head)):
        return "knows no scale and no soft cap of logits"
    if {hidden.dtype, head.weight.dtype, signal.hidden.dtype, signal.head.weight.dtype} != {torch.float32}:
        return "takes softmax and sums in the type of its inputs, so only float32 gives the same"
    if token_weight.dim() > 1 or len(token_weight) == 0 or bool((token_weight != token_weight[0]).any()):
        return "gives every token the same weight, and needs a token"
    return ""
