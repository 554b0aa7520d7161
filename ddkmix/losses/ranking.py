"""Ranking loss: the student should order the likeliest classes as the teacher does."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

__all__ = ["Ranking"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """Ranking loss (RLKD, arXiv 2409.12545), used beside a divergence, there with weight 2.

        RANK[i] = 1 - rho(r(p_U), r(q_U)) = 6 sum_{v in U} (r_p(v) - r_q(v))**2 / (m (m**2 - 1))
        U = top-k of the teacher and top-k of the student, m = |U|, r the soft ranks of Blondel et al. 2020
        (arXiv 2002.08871), rho Spearman's correlation

    Published: U, Spearman, soft ranks, k = 15 in pre-training and 5 later. Not seen there: which form of
    Spearman's coefficient (they agree for true ranks; this one is 0 for equal ranks, soft or not) and how
    soft the ranks are. The paper ranks probabilities. Ranks are the same for any increasing function of
    them, soft ranks are not: those of probabilities, which all lie in [0, 1], are hardly ever a rank apart.
    So logits are ranked here, unless `of` says otherwise. Where all gaps exceed `strength` the gradient is
    0. In [0, 2], not nats.

    Ranks (1, 2, 3) for the teacher and (3, 2, 1) for the student: 6 (4 + 0 + 4) / (3 x 8).

    >>> import torch
    >>> from ddkmix.losses import Ranking
    >>> student_logits, teacher_logits = torch.tensor([[1.0, 3.0, 5.0]]), torch.tensor([[9.0, 7.0, 5.0]])
    >>> Ranking(top_k=3)(student_logits, teacher_logits, torch.tensor([0])).tolist()
    [2.0]
    """

    top_k: Annotated[int, Field(ge=2, le=100)] = 15
    """Classes of each side that are ranked. Takes tokens x (2 top_k)**2 numbers."""
    strength: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    """Gap, in nats or for probabilities in shares, from which two soft ranks are a whole rank apart."""
    of: Literal["logits", "probabilities"] = "logits"
    """What is ranked."""
    needs_teacher: ClassVar[bool] = True
    """Whether it looks at the teacher."""
    accepts: ClassVar[frozenset[str]] = frozenset({"dense"})
    """A truncated signal does not rank the classes that only the student has among its first."""

    def __call__(self, student_logits: Any, teacher: Any, labels: Any) -> Any:
        """1 - Spearman's correlation of the soft ranks of each token.

        Args:
            student_logits: (n, V) float32.
            teacher: (n, V) float32 logits.
            labels: not looked at.

        Returns:
            (n,) float32, in [0, 2].
        """
        import torch

        from ddkmix.losses.soft_ranks import soft_ranks

        k = min(self.top_k, student_logits.shape[1])
        first, second = teacher.topk(k).indices, student_logits.detach().topk(k).indices
        ids = torch.cat([first, second], dim=1)
        there = torch.ones_like(ids, dtype=torch.bool)
        there[:, k:] = (second[:, :, None] != first[:, None, :]).all(-1)
        if self.of == "probabilities":
            student_logits, teacher = student_logits.softmax(-1), teacher.softmax(-1)
        difference = soft_ranks(student_logits.gather(1, ids), there, self.strength) - soft_ranks(
            teacher.gather(1, ids), there, self.strength
        )
        m = there.sum(-1)
        return 6 * difference.square().sum(-1) / (m * (m.square() - 1)).clamp(min=1)
