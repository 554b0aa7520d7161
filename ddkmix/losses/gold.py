"""GOLD: tokens that both vocabularies have are compared one by one, the others by sorted probabilities."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ddkmix.losses.uld import ULD

__all__ = ["GOLD"]

_LEAST = 1e-8
"""Probabilities are not taken for smaller inside a logarithm (as in TRL)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GOLD:
    """The hybrid loss of TRL's GOLD trainer (`trl.experimental.gold` 1.16), for two vocabularies; its L1
    part is that of ULD (arXiv 2402.12030).

        GOLD[i] = w_same * JSD(beta) of the tokens that both have  +  w_other * ULD of the others
        JSD(beta) = beta sum p log(p / m) + (1 - beta) sum q log(q / m),  m = beta p + (1 - beta) q
        beta = 0: sum p log(p / q);  beta = 1: sum q log(q / p)

    q and p are merged over an aligned span: the distribution at one of its tokens, times the probabilities
    that the model gave to the span's other tokens. Sums over a part of the classes, so they need not be
    distributions, and the first summand may be negative. Nats and L1 in one number; its value counts at the
    span's first token.

    TRL in its default mode takes each distribution one position late; here, as in its `bayesian` mode, each
    is the one that predicts the token. TRL drops the second summand where one side has no token of its own.

    Two classes that both have: 1/2 (3/4 ln(6/5) + 1/4 ln(2/3) + 1/2 ln(4/5) + 1/2 ln(4/3)).

    >>> import torch
    >>> from ddkmix.losses import GOLD
    >>> student, teacher = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
    >>> [round(value, 4) for value in GOLD()(student, teacher, torch.tensor([0])).tolist()]
    [0.0338]
    """

    beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight between the two divergences: 0 is forward KL, 1 reverse KL."""
    merge: Literal["observed", "bayesian"] = "observed"
    """`observed`: the distribution at the first token times the probabilities of the later ones. `bayesian`:
    at the last token times those of the earlier ones (the chain rule)."""
    same_weight: Annotated[float, Field(ge=0, lt=1e6)] | None = None
    """w_same; when unset, the share of the teacher's tokens that the student has too."""
    other_weight: Annotated[float, Field(ge=0, lt=1e6)] | None = None
    """w_other; when unset, 1 - w_same."""
    temperature: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Divides both logits."""
    needs_teacher: ClassVar[bool] = True
    """Whether it looks at the teacher."""
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "cross"})
    """Logits of all classes: of the same vocabulary, or of another."""

    def across(self, q: Any, p: Any, pairs: Any) -> Any:
        """The loss of merged distributions over different classes.

        Args:
            q: (g, V) merged probabilities of the student, differentiable.
            p: (g, W) merged probabilities of the teacher.
            pairs: (m, 2) student's and teacher's ids of the tokens that both have.

        Returns:
            (g,) nats and L1, weighted.
        """
        same = len(pairs) / p.shape[1] if self.same_weight is None else self.same_weight
        other = 1 - same if self.other_weight is None else self.other_weight
        of_same = self._divergence(q[:, pairs[:, 0]], p[:, pairs[:, 1]])
        of_other = ULD().across(_without(q, pairs[:, 0]), _without(p, pairs[:, 1]), None)
        return same * of_same + other * of_other

    def __call__(self, student_logits: Any, teacher: Any, labels: Any) -> Any:
        """The loss of each token, of models with one vocabulary: JSD(beta).

        Args:
            student_logits: (n, V) float32.
            teacher: (n, V) float32 logits of the same positions.
            labels: not looked at.

        Returns:
            (n,) float32, nats per token.
        """
        from torch import arange

        q, p = ((logits / self.temperature).softmax(-1) for logits in (student_logits, teacher))
        everything = arange(q.shape[1], device=q.device)
        return self.across(q, p, everything[:, None].expand(-1, 2))

    def _divergence(self, q: Any, p: Any) -> Any:
        log_q, log_p = q.clamp(min=_LEAST).log(), p.clamp(min=_LEAST).log()
        if self.beta in (0, 1):
            difference = log_p - log_q
            return (log_p.exp() * difference if self.beta == 0 else -log_q.exp() * difference).sum(-1)
        log_m = (log_p + math.log(self.beta)).logaddexp(log_q + math.log1p(-self.beta))
        of_p, of_q = (log_p.exp() * (log_p - log_m)).sum(-1), (log_q.exp() * (log_q - log_m)).sum(-1)
        return self.beta * of_p + (1 - self.beta) * of_q


def _without(probabilities: Any, ids: Any) -> Any:
    """The classes that are not among `ids`."""
    keep = probabilities.new_ones(probabilities.shape[1], dtype=bool).index_fill(0, ids, False)
    return probabilities[:, keep]
